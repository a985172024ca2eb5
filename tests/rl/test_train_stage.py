"""Stage `train` as a process: killed, stopped, started again, and the same policy as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_families import build_family
from transformers import AutoModelForImageTextToText

from sparsity_forcing.data.digits_source import digits_row
from sparsity_forcing.data.schema import write_rows
from sparsity_forcing.params import DigitsParams, load_params
from sparsity_forcing.stages.inputs import InputError
from sparsity_forcing.stages.train import run

ROOT = Path(__file__).parents[2]
STEPS = 24


@pytest.fixture
def prepared(workspace) -> Path:
    """A workspace with what stage `train` reads: rows, a small base and parameters."""
    params = yaml.safe_load((ROOT / "presets/smoke.yaml").read_text())
    params["train"] |= {
        "steps": STEPS,
        "checkpoint_every": 2,
        "validate_every": 4,
        "validation_rows": 4,
        "accuracy_guard": 1.0,
    }
    (workspace / "params.yaml").write_text(yaml.safe_dump(params))
    for split, count in (("train", 20), ("validation", 4)):
        rows = [digits_row(DigitsParams(grids=(4,)), 0, split, place) for place in range(count)]
        write_rows(rows, workspace / f"data/prepared/{split}.parquet")
    model, processor = build_family("qwen2_5_vl")
    model.save_pretrained(workspace / "models/base")
    processor.save_pretrained(workspace / "models/base")
    return workspace


def start(workspace: Path) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    return subprocess.Popen(
        [sys.executable, "-m", "sparsity_forcing", "train", "--root", str(workspace)],
        env=environment | {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def newest(workspace: Path) -> int:
    """Step of the newest checkpoint."""
    steps = [int(path.name[5:]) for path in workspace.glob("checkpoints/train/*/step-*")]
    return max(steps, default=0)


def signalled_after_a_checkpoint(workspace: Path, number: signal.Signals) -> tuple[int, str]:
    """Exit code and output of a run that got the signal once it had saved a checkpoint more than there was."""
    before, process = newest(workspace), start(workspace)
    while newest(workspace) <= before:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


def finished(workspace: Path) -> str:
    process = start(workspace)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_killed_and_stopped_and_started_again_it_ends_with_the_same_policy(prepared, tmp_path_factory):
    straight = shutil.copytree(prepared, tmp_path_factory.mktemp("straight") / "workspace")
    finished(straight)

    assert signalled_after_a_checkpoint(prepared, signal.SIGKILL)[0] == -signal.SIGKILL
    code, output = signalled_after_a_checkpoint(prepared, signal.SIGTERM)
    assert code == 143, output
    assert "resumed from" in output
    assert not (prepared / "models/policy").exists()
    assert "resumed from" in finished(prepared)

    policy, expected = (load_file(w / "models/policy/model.safetensors") for w in (prepared, straight))
    assert policy.keys() == expected.keys()
    assert all(torch.equal(policy[name], value) for name, value in expected.items())
    base = load_file(straight / "models/base/model.safetensors")
    assert any(not torch.equal(base[name], value) for name, value in expected.items())

    found, wanted = (json.loads((w / "metrics/train.json").read_text()) for w in (prepared, straight))
    for name in ("rollouts", "new_tokens", "start", "end", "policy_step", "replay_max_difference", "skipped_steps"):
        assert found[name] == wanted[name]
    assert (found["steps"], found["rollouts"]) == (STEPS, STEPS * 8)
    assert pd.read_csv(prepared / "plots/train.csv")["step"].tolist() == list(range(1, STEPS + 1))
    assert not (prepared / "checkpoints/train").exists()
    assert not list(prepared.rglob("*.tmp*"))
    AutoModelForImageTextToText.from_pretrained(prepared / "models/policy")


def test_a_missing_input_is_named_with_the_stage_that_makes_it(prepared):
    (prepared / "data/prepared/validation.parquet").unlink()
    with pytest.raises(InputError, match=r"validation.parquet \(made by stage prepare\)"):
        run(load_params(prepared / "params.yaml"), prepared)
