"""What README.md shows a user works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny_prompts import sharp_model

from sparsity_forcing.data.digits_source import digits_row
from sparsity_forcing.data.schema import write_rows
from sparsity_forcing.params import DigitsParams, load_params, parse_params

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path, monkeypatch):
    model, processor = sharp_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "models/policy")
    processor.save_pretrained(tmp_path / "models/policy")
    write_rows([digits_row(DigitsParams(grids=(6,)), 0, "test", 0)], tmp_path / "data/prepared/test.parquet")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names)
    assert 0 < names["stats"].visual_token_ratio.item() < 1
    assert names["stats"].cache_bytes < names["stats"].dense_cache_bytes
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_the_row_and_the_parameters_of_the_data_example_are_valid():
    from sparsity_forcing.data.candidates import parse_json_object

    row = parse_json_object(re.search(r"# (\{\"prompt\".*\})", README)[1])
    assert row["prompt"]
    assert row["completion"]
    assert row["images"]
    data, model = re.search(r"# params\.yaml:\s+(data:.*)\n#\s+(model:.*)", README).groups()
    params = load_params(ROOT / "params.yaml").model_dump(mode="json")
    own = parse_params(params | yaml.safe_load(data) | yaml.safe_load(model))
    assert (own.data.user.path, own.model.name) == (Path("user_data/my_rows.jsonl"), "user_models/mine")


def test_every_path_and_make_target_it_names_exists():
    targets = re.findall(r"^make ([a-z]+)", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("page", ["README.md", "docs/evidence.md", "docs/parameters.md", "kernels/README.md"])
def test_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
