"""`python -m sparsity_forcing STAGE`: exit codes and what a person reads on failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sparsity_forcing import lineage
from sparsity_forcing.__main__ import app, explains_itself, set_environment
from sparsity_forcing.files import WriteError, write_text_atomic
from sparsity_forcing.params import ParamsError, load_params, parse_params

ROOT = Path(__file__).parents[1]
SMOKE = yaml.safe_load((ROOT / "presets" / "smoke.yaml").read_text())


def test_wrong_parameters_exit_with_2_and_without_a_traceback(tmp_path):
    (tmp_path / "params.yaml").write_text("model: {name: scratch, curriculum: [{steps: 1}]}\nsparsity: {p: 7}\n")
    done = subprocess.run(
        [sys.executable, "-m", "sparsity_forcing", "prepare", "--root", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("prepare: ")
    assert "sparsity.p" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_stage_is_told_what_stages_there_are():
    result = CliRunner().invoke(app, ["prepair"])
    assert result.exit_code == 2
    assert "evaluate" in result.output


def test_bad_input_exits_with_2_and_names_the_file(workspace):
    data = {"source": "chat_jsonl", "user": {"path": "user_data/missing.jsonl"}}
    (workspace / "params.yaml").write_text(yaml.safe_dump(SMOKE | {"data": data, "model": {"name": "org/model"}}))
    result = CliRunner().invoke(app, ["prepare", "--root", str(workspace)])
    assert (result.exit_code, "missing.jsonl" in result.output) == (2, True), result.output
    assert not (workspace / "data" / "prepared").exists()


def test_errors_that_need_no_traceback(tmp_path):
    assert explains_itself(ParamsError("p"))
    assert explains_itself(WriteError("full"))
    assert not explains_itself(ValueError("a bug"))
    assert not explains_itself(FileNotFoundError("a bug"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the kind differs between systems
        write_text_atomic(tmp_path / "file" / "below-a-file", "x")
    assert not explains_itself(caught.value)


@pytest.mark.parametrize("stage", ["prepare", "base"])
def test_a_place_that_dvc_does_not_see_is_refused_before_the_stage(workspace, stage):
    (workspace / "models/base").mkdir(parents=True)
    (workspace / "params.yaml").write_text(yaml.safe_dump(SMOKE | {"model": {"name": "models/base"}}))
    result = CliRunner().invoke(app, [stage, "--root", str(workspace)])
    assert (result.exit_code, "inside models/, which the pipeline writes" in result.output) == (2, True), result.output
    assert not (workspace / "data").exists()


@pytest.mark.parametrize(
    "preset, processor, capability",
    [
        ("smoke", "model name\t: x\nflags\t\t: fpu avx avx2 fma avx512f\n", "avx2"),
        ("smoke", "flags\t\t: fpu avx fma\n", None),
        ("smoke", "CPU implementer\t: 0x41\n", None),
        ("smoke", None, None),
        ("qwen2.5-vl-7b", "flags\t\t: fpu avx avx2 fma\n", None),
    ],
)
def test_what_is_trained_from_scratch_is_held_to_avx2(preset, processor, capability, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {})
    params = load_params(ROOT / "presets" / f"{preset}.yaml")
    cpuinfo = tmp_path / "cpuinfo"
    if processor is not None:
        cpuinfo.write_text(processor)
    monkeypatch.setattr(lineage, "Path", lambda path: cpuinfo)
    set_environment(params, tmp_path)
    assert os.environ.get("ATEN_CPU_CAPABILITY") == capability
    assert os.environ.get("ONEDNN_MAX_CPU_ISA") == os.environ.get("MKL_CBWR") == (capability and capability.upper())


@pytest.mark.parametrize("preset, offline", [("smoke", "1"), ("qwen2.5-vl-7b", None)])
def test_the_hub_is_asked_only_when_the_model_is_on_it(preset, offline, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "3"})
    set_environment(load_params(ROOT / "presets" / f"{preset}.yaml"), tmp_path)
    assert os.environ.get("HF_HUB_OFFLINE") == offline
    assert os.environ["OMP_NUM_THREADS"] == "3"  # what the caller has set stays


def test_a_model_directory_of_the_workspace_is_not_looked_for_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {})
    (tmp_path / "my_model").mkdir()
    set_environment(parse_params(SMOKE | {"model": {"name": "my_model"}}), tmp_path)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
