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

from sparsity_forcing.checkpoints import fingerprint
from sparsity_forcing.data.digits_source import digits_row
from sparsity_forcing.data.schema import write_rows
from sparsity_forcing.inputs import InputError
from sparsity_forcing.lineage import hardware
from sparsity_forcing.params import DigitsParams, load_params, parse_params
from sparsity_forcing.rl import identity as naming
from sparsity_forcing.rl.errors import TrainingError
from sparsity_forcing.rl.identity import decisive
from sparsity_forcing.stages.train import run

ROOT = Path(__file__).parents[2]
STEPS = 12
LEFT_ALIVE = 20  # seconds that schedulers give a process after SIGTERM


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
    output = process.communicate(timeout=LEFT_ALIVE)[0]
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


def changed(workspace: Path, **values: object):
    """The parameters of the workspace with some of `train` replaced."""
    params = yaml.safe_load((workspace / "params.yaml").read_text())
    params["train"] |= values
    return parse_params(params)


def identity(*args) -> str:
    """The name of the training's checkpoints."""
    return fingerprint(decisive(*args))


DIFFERENT = [
    {"beta": 0.2},
    {"validate_every": 3},  # decides which weights are chosen
    {"reward": {"correct": "scenes:always_right"}},
    {"selection_policy": {"sigma": 0.1}},
    {"rollout_prompts": 1},  # other noise
]
INDIFFERENT = [
    {"checkpoint_every": 3, "keep_checkpoints": 5, "log_samples_every": 7},
    {"micro_batch_prompts": 1, "logits_chunk": 64, "gradient_checkpointing": True, "validation_batch_size": 2},
]


def test_a_checkpoint_belongs_to_all_that_decides_the_weights(prepared):
    same = identity(changed(prepared), prepared, 1)
    assert identity(changed(prepared), prepared, 1) == same
    assert {identity(changed(prepared, **values), prepared, 1) for values in INDIFFERENT} == {same}
    others = [identity(changed(prepared, **values), prepared, 1) for values in DIFFERENT]
    others.append(identity(changed(prepared), prepared, 2))
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        path = prepared / "models/base" / name
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        others.append(identity(changed(prepared), prepared, 1))
        path.write_bytes(before)
    assert len({same, *others}) == 1 + len(others)


@pytest.mark.parametrize("name", ["code_digest", "versions"])
def test_a_checkpoint_belongs_to_the_code_and_its_packages(prepared, monkeypatch, name):
    same = identity(changed(prepared), prepared, 1)
    monkeypatch.setattr(naming, name, lambda named: "another")
    assert identity(changed(prepared), prepared, 1) != same


def test_the_users_own_score_function_is_part_of_the_code(prepared, monkeypatch):
    seen = []
    monkeypatch.setattr(naming, "code_digest", lambda paths: seen.append([str(path) for path in paths]) or "")
    identity(changed(prepared, reward={"correct": "scenes:always_right"}), prepared, 1)
    identity(changed(prepared), prepared, 1)
    assert str(Path(__file__).parent / "scenes.py") in seen[0]
    assert len(seen[0]) == len(seen[1]) + 1
    assert {"rl", "generation", "attention", "scoring.py"} <= set(seen[1])
    assert any(path.endswith("sparsity_kernels") for path in seen[1])


def test_checkpoints_stay_until_the_run_is_closed(prepared, monkeypatch):
    def cannot_close(self, run_id, status):
        raise ConnectionError("the server went away")

    monkeypatch.setattr("mlflow.MlflowClient.set_terminated", cannot_close)
    with pytest.raises(ConnectionError):
        run(changed(prepared, steps=2), prepared)
    assert list(prepared.glob("checkpoints/train/*/step-000002"))


def test_the_metrics_name_the_device_that_was_used(prepared):
    metrics = run(changed(prepared, steps=1), prepared)
    assert metrics["device"] == hardware()
    assert not (prepared / "checkpoints/train").exists()


def test_a_missing_input_is_named_with_the_stage_that_makes_it(prepared):
    (prepared / "data/prepared/validation.parquet").unlink()
    with pytest.raises(InputError, match=r"validation.parquet \(made by stage prepare\)"):
        run(load_params(prepared / "params.yaml"), prepared)


def test_a_sharded_launch_on_the_cpu_is_refused_with_the_configuration_that_runs(prepared, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match=r"shards on accelerators only; .* presets/accelerate/cpu-2proc\.yaml"):
        run(load_params(prepared / "params.yaml"), prepared)
