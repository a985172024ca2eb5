"""An experiment end to end, at the smallest scale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from tiny_families import build_family

from sparsity_forcing.data.digits_source import digits_row
from sparsity_forcing.data.schema import write_rows
from sparsity_forcing.evidence import __main__ as command
from sparsity_forcing.evidence import gradient
from sparsity_forcing.evidence.arms import ARMS, Arm
from sparsity_forcing.evidence.experiment import run_arm, run_base
from sparsity_forcing.evidence.summary import write_summary
from sparsity_forcing.params import DigitsParams, load_params
from sparsity_forcing.stages.inputs import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def prepared(workspace) -> Path:
    """A workspace after the stages prepare and base."""
    params = yaml.safe_load((ROOT / "presets/smoke.yaml").read_text())
    params["train"] |= {"steps": 2, "validate_every": 1, "validation_rows": 4, "accuracy_guard": 1.0}
    params["evaluate"]["budgets"] = [0.8]
    params["sparsity"] = {"p": 0.8}  # 16 tokens of a model that has learned nothing: a higher share is all of them
    (workspace / "params.yaml").write_text(yaml.safe_dump(params))
    for split, count in (("train", 20), ("validation", 4), ("test", 6)):
        rows = [digits_row(DigitsParams(grids=(4,)), 0, split, place) for place in range(count)]
        write_rows(rows, workspace / f"data/prepared/{split}.parquet")
    model, processor = build_family("qwen2_5_vl")
    model.save_pretrained(workspace / "models/base")
    processor.save_pretrained(workspace / "models/base")
    (workspace / "docs").mkdir()
    shutil.copy(ROOT / "docs/evidence.md", workspace / "docs/evidence.md")
    return workspace


def test_from_the_base_to_the_page(prepared):
    params = load_params(prepared / "params.yaml")
    base, found = run_base(params, prepared), run_arm(ARMS["literal"], params, prepared)
    budget = str(params.sparsity.p)
    assert [point["step"] for point in found["curve"]] == [0, 1, 2]
    assert found["test"][budget]["questions"] == 6
    assert len(found["test"]["1.0"]["scores"]) == 6
    assert found["test"]["1.0"]["visual_token_ratio"] == 1
    assert 0 < found["test"][budget]["visual_token_ratio"] < 1
    assert found["changed"]["train"] == ARMS["literal"].train
    assert base["test"]["1.0"]["visual_token_ratio"] == 1
    assert not list(prepared.glob("checkpoints/evidence/*/*"))

    quoted = write_summary(params, prepared)
    assert quoted["literal_tau_end"] == found["test"][budget]["visual_token_ratio"]
    assert quoted["tau_end"] is None
    assert ARMS["literal"].question in (prepared / "docs/evidence.md").read_text()
    assert (prepared / "plots/evidence.png").stat().st_size > 1000


def test_what_has_run_does_not_run_again_unless_something_changed(prepared, monkeypatch):
    params = load_params(prepared / "params.yaml")
    first = run_arm(ARMS["default"], params, prepared)
    monkeypatch.setattr("sparsity_forcing.evidence.experiment.load", None)
    assert run_arm(ARMS["default"], params, prepared) == json.loads(json.dumps(first))
    faster = params.model_copy(update={"train": params.train.model_copy(update={"learning_rate": 1e-3})})
    with pytest.raises(TypeError):  # it wants to load the model
        run_arm(ARMS["default"], faster, prepared)


def test_hard_questions_are_those_the_base_gets_wrong(prepared):
    params = load_params(prepared / "params.yaml")
    found = run_arm(Arm("hard", "", rows="hard"), params, prepared)
    assert 0 < found["training_rows"] <= 20  # this base has learned nothing


def test_gradients_of_a_small_base(prepared, monkeypatch):
    monkeypatch.setattr(gradient, "PROMPTS", 2)
    always = Arm("always", "", {"reward": {"gate": "always"}})  # this base is never right
    found = gradient.measure(always.params(load_params(prepared / "params.yaml")), prepared, draws=3)
    assert set(found) == {"correct_tokens", "efficiency_tokens", "efficiency_selection"}
    assert found["efficiency_tokens"]["noise"] > 0
    assert found["efficiency_selection"]["noise"] > 0
    assert found["correct_tokens"]["noise"] == 0
    assert json.loads((prepared / gradient.RESULT).read_text()) == found


def test_without_the_pipelines_outputs_it_says_so(workspace, capsys, monkeypatch):
    shutil.copy(ROOT / "params.yaml", workspace / "params.yaml")
    with pytest.raises(InputError, match="models/base"):
        run_arm(ARMS["default"], load_params(workspace / "params.yaml"), workspace)
    monkeypatch.chdir(workspace)
    assert command.run_one("default") == 1
    assert "evidence, default: " in capsys.readouterr().err


def test_every_arm_changes_one_thing_and_keeps_the_number_of_rollouts():
    params = load_params(ROOT / "params.yaml")
    for name, arm in ARMS.items():
        changed = arm.params(params)
        assert (changed != params) == (name not in ("default", "hard"))
        assert changed.train.prompts_per_step * changed.train.num_generations == 64
