"""The benchmarks at toy sizes: what they check, refuse and write. No test looks at a time."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import sparsity_forcing.bench.__main__ as command
import sparsity_forcing.bench.operations as operations
from sparsity_forcing.bench.__main__ import app
from sparsity_forcing.bench.compare import BenchError, Case, require_close, require_equal, time_arms
from sparsity_forcing.bench.models import equal_batch_case, equal_memory_case, prefill_case, random_qwen
from sparsity_forcing.bench.rollouts import group_case, loop_case
from sparsity_forcing.params import SparsityParams

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    return random_qwen(SMALL, "cpu", torch.float32, vision)


def test_arms_take_turns():
    calls = []
    arms = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = time_arms(arms, repetitions=2, inner=1, warm_up=1)
    assert "".join(calls) == "abc" + "abc" + "bca"
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_the_speedup_is_the_median_of_the_ratios_within_repetitions():
    case = Case("x", {}, "fast", "slow", {"fast": [1.0, 2.0, 1.0], "slow": [4.0, 4.0, 3.0]}, {})
    assert case.speedup == 3.0
    assert case.as_json()["speedup_range"] == [2.0, 4.0]


@pytest.mark.parametrize("found", [1.2, float("nan"), float("inf")])
def test_a_wrong_result_gets_no_speedup(found):
    with pytest.raises(BenchError, match="largest relative error"):
        require_close(torch.tensor([found, 0.0]), torch.tensor([1.0, 0.0]), 0.1, "what")
    with pytest.raises(BenchError, match="not equal"):
        require_equal(torch.tensor([found]), torch.tensor([1.0]), "what")


def test_an_operation_that_is_wrong_stops_the_bench(monkeypatch):
    right = operations.ragged_attention
    monkeypatch.setattr(operations, "ragged_attention", lambda *args, **options: right(*args, **options) * 1.01)
    with pytest.raises(BenchError, match="attention among the kept keys"):
        operations.decode_case(64, 2, 0.25, "cpu", torch.float32, repetitions=1)


def test_operations():
    decode = operations.decode_case(128, 2, 0.25, "cpu", torch.float32, repetitions=2)
    assert decode.notes["bytes_read"] == 2 * 2 * 32 * 4 * 128 * 4
    mass = operations.mass_case(96, 96, "cpu", torch.float32, repetitions=2)
    selection = operations.selection_case(64, 8, "cpu", repetitions=2)
    for case in (decode, mass, selection):
        assert set(case.seconds) >= {case.subject, case.baseline}
        assert all(len(samples) == 2 for samples in case.seconds.values())
        assert case.setting["device"] == "cpu"
        assert case.checked


def test_whole_answers():
    group, loop = group_case(4, 3, repetitions=1), loop_case(4, 2, 3, repetitions=1)
    assert (group.setting["answers"], loop.setting["rollouts"]) == (8, 16)
    assert loop.notes["rollouts_per_second"]["loop"] == pytest.approx(16 / loop.seconds["loop"][0])


def test_whole_models(model):
    step = equal_batch_case(model, "small", batch=2, length=128, share=0.25, repetitions=1)
    assert set(step.seconds) == {"dense", "sparse"}
    assert step.notes["cache_bytes_dense"] == 2 * 2 * 128 * 2 * 2 * 16 * 4
    limit = step.notes["bandwidth_limit_of_speedup"]
    assert 1 < limit < 4
    memory = equal_memory_case(model, "small", 128, 0.25, cache_bytes=4 * 128 * 2 * 2 * 2 * 16 * 4, repetitions=1)
    assert memory.setting["batch"] == {"dense": 4, "sparse": 16}
    with pytest.raises(BenchError, match="hold no row"):
        equal_memory_case(model, "small", 128, 0.25, cache_bytes=1000, repetitions=1)
    for settings in (SparsityParams(), SparsityParams(prefill="sparse", scoring_rows="probe")):
        assert prefill_case(model, "small", 128, 0.25, settings, repetitions=1).setting["prefill"] == settings.prefill


def test_the_command_writes_samples_and_manifest_and_ends_with_the_figures(tmp_path, monkeypatch):
    """The whole command, every length a 32nd of what it is in earnest."""
    monkeypatch.setattr(command, "decode_case", lambda length, *rest: operations.decode_case(length // 32, *rest))
    monkeypatch.setattr(command, "mass_case", lambda length, rows, *rest: operations.mass_case(128, 128, *rest))
    monkeypatch.setattr(command, "group_case", lambda grid, *rest: group_case(grid // 8, *rest))
    monkeypatch.setattr(command, "loop_case", lambda grid, *rest: loop_case(grid // 2, *rest))
    output = tmp_path / "bench.json"
    done = CliRunner().invoke(app, ["cpu", "--output", str(output), "--repetitions", "1"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(figures) == {
        *("decode_4k_speedup", "decode_16k_speedup", "mass_over_dense_attention"),
        *("group_of_8_speedup", "loop_over_generate"),
    }
    written = json.loads(output.read_text())
    assert {"commit", "hardware", "threads", "versions"} <= set(written["manifest"])
    for case in written["cases"].values():
        assert all(len(samples) == 1 for samples in case["seconds"].values())
        assert case["checked"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_gpu_set_says_so():
    done = CliRunner().invoke(app, ["gpu"])
    assert done.exit_code == 2
    assert "no CUDA device" in done.output
