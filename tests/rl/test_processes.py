"""Two processes train what one does, stop together and write once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from process_worker import SCENES, train
from runs import timeless, trainer_of
from safetensors.torch import load_file
from test_train_stage import STEPS, newest, prepared  # noqa: F401  (a fixture)
from tiny_prompts import sharp_model

from sparsity_forcing.rl.batches import share_of

ROOT = Path(__file__).parents[2]
TOGETHER = 40  # seconds in which all processes end after one
SHARDED = ("fsdp-zero2", "fsdp-zero3")
CONFIGURATIONS = sorted((ROOT / "presets/accelerate").glob("*.yaml"))


def launch(*arguments: str, configuration: str = "cpu-2proc", **variables: str) -> subprocess.Popen:
    """Two processes; of a configuration for GPUs, two on the CPU. ``variables``: of their environment."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--num_processes", "2"]
    command += ["--config_file", str(ROOT / f"presets/accelerate/{configuration}.yaml"), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    environment |= variables | {
        "OMP_NUM_THREADS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONPATH": f"{ROOT / 'tests/rl'}:{ROOT / 'tests'}:{ROOT}",
    }
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finished(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    try:
        output = process.communicate(timeout=seconds)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_every_configuration_is_one_that_accelerate_reads(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type == ("FSDP" if path.stem in SHARDED else "MULTI_GPU")
    assert config.num_processes >= 2
    assert set(yaml.safe_load(path.read_text())) <= set(vars(config)) | {"use_cpu"}


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 8])
def test_every_row_is_in_one_share(rows):
    everything = list(range(rows))
    shares = [share_of(everything, process, 3) for process in range(3)]
    assert [row for share in shares for row in share] == everything
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.fixture(scope="module", params=["cpu-2proc", *SHARDED])
def trained_by_two(request, tmp_path_factory) -> Path:
    """A directory per scene with the weights and the history of both processes, whole or sharded weights in each."""
    directory = tmp_path_factory.mktemp("two")
    worker = str(ROOT / "tests/rl/process_worker.py")
    code, output = finished(launch(worker, str(directory), configuration=request.param))
    assert code == 0, output
    sharded = list(directory.glob("adapters/checkpoints/*/step-*/pytorch_model_fsdp_0/__*_0.distcp"))
    assert {path.name for path in sharded} == ({"__0_0.distcp", "__1_0.distcp"} if request.param in SHARDED else set())
    return directory


@pytest.mark.slow
def test_zero3_alone_gathers_weights_layer_by_layer(trained_by_two, request):
    found = [json.loads((trained_by_two / scene / "rank-1.json").read_text()) for scene in SCENES]
    by_layer = request.node.callspec.params["trained_by_two"] == "fsdp-zero3"
    assert [scene["whole_layers"] for scene in found] == [[1] if by_layer else [2]] * len(SCENES)


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["bfloat16", "bfloat16 adapters"])
def test_processes_of_a_bfloat16_model_stay_together_and_learn(trained_by_two, tmp_path, scene):
    """Against one process rounding decides too much: only that both have the same weights, and finite steps."""
    untrained = trainer_of(tmp_path, dtype=torch.bfloat16).model.state_dict()
    ranks = [load_file(trained_by_two / scene / f"rank-{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in untrained)
    assert {value.dtype for value in ranks[0].values()} == {torch.bfloat16}
    assert any(not torch.equal(ranks[0][name], value) for name, value in untrained.items())
    history = json.loads((trained_by_two / scene / "rank-0.json").read_text())["history"]
    assert [row["skipped_steps"] for row in history] == [0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("scene", [scene for scene in SCENES if not scene.startswith("bfloat16")])
def test_two_processes_end_with_the_weights_of_one(trained_by_two, tmp_path, scene):
    expected, alone = train(tmp_path, scene)
    untrained = sharp_model(SCENES[scene].get("family", "qwen2_5_vl"))[0].state_dict()
    assert any(not torch.equal(untrained[name], value) for name, value in expected.items())
    ranks = [load_file(trained_by_two / scene / f"rank-{rank}.safetensors") for rank in (0, 1)]
    for name, value in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], value, rtol=0, atol=1e-9)

    main, other = (json.loads((trained_by_two / scene / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert (main["images"] != other["images"]) == scene.startswith("text alone")  # it is what these scenes are for
    assert (main["reported"], other["reported"]) == ([1, 2, 3, 4], [])
    assert (main["tables"], other["tables"]) == (1 if scene == "resumed" else alone["tables"], 0)
    assert timeless(main["history"]) == timeless(other["history"])  # of all ranks, not of one
    for found, wanted in zip(timeless(main["history"]), timeless(alone["history"]), strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-8), name


def with_one_signalled(workspace: Path, arguments: tuple[str, ...], number: signal.Signals) -> str:
    """Output of a run of which one process got the signal after a new checkpoint."""
    before, process = newest(workspace), launch(*arguments)
    while newest(workspace) <= before:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    workers = [child for child in psutil.Process(process.pid).children() if "train" in child.cmdline()]
    assert len(workers) == 2
    workers[-1].send_signal(number)
    asked = time.monotonic()
    code, output = finished(process)
    assert code != 0
    assert time.monotonic() - asked < TOGETHER
    assert not (workspace / "models/policy").exists()
    return output


@pytest.mark.slow
def test_when_one_process_fails_is_stopped_or_dies_the_other_ends_and_the_run_goes_on(prepared):  # noqa: F811
    params = yaml.safe_load((prepared / "params.yaml").read_text())
    params["train"]["reward"] = {"correct": "scenes:fails_in_one_process"}
    (prepared / "params.yaml").write_text(yaml.safe_dump(params))
    arguments = ("-m", "sparsity_forcing", "train", "--root", str(prepared))

    code, output = finished(launch(*arguments, FAILING_RANK="1"))
    assert code != 0
    assert "no score for this answer" in output
    assert "train.reward.correct in params.yaml names it" in output
    assert newest(prepared) >= 2
    assert not (prepared / "models/policy").exists()

    output = with_one_signalled(prepared, arguments, signal.SIGTERM)
    assert output.count("resumed from") == 1
    assert output.count("stopped by signal 15; saved step") == 1  # both at the same step, one speaks for both
    output = with_one_signalled(prepared, arguments, signal.SIGKILL)
    assert output.count("resumed from") == 1

    code, output = finished(launch(*arguments))
    assert code == 0, output
    assert output.count("resumed from") == 1
    assert (prepared / "models/policy/model.safetensors").exists()
    assert not (prepared / "checkpoints/train").exists()
    assert json.loads((prepared / "metrics/train.json").read_text())["steps"] == STEPS
    assert run_names(prepared) == ["train"] * 4


def run_names(workspace: Path) -> list[str]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{workspace / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.info.run_name for run in client.search_runs(experiments)]
