"""The benchmarks at toy sizes: what they check, refuse and write. No test looks at a time."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import sparsity_forcing.bench.__main__ as command
import sparsity_forcing.bench.operations as operations
import sparsity_forcing.bench.rollouts as rollouts
from sparsity_forcing.bench.__main__ import app
from sparsity_forcing.bench.compare import BenchError, Case, captured, fastest, require_close, require_equal, time_arms
from sparsity_forcing.bench.rollouts import SEPARATE, UNSHARED, group_case, loop_case, one_case
from sparsity_forcing.reporting.readme import speed


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    """Three pruned caches of the lengths used here."""
    monkeypatch.setattr(operations, "COLD_BYTES", 3 * 2 * 2 * 32 * 4 * 128 * 4)


def test_arms_take_turns():
    calls = []
    arms = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = time_arms(arms, repetitions=2, inner=1, warm_up=1)
    assert "".join(calls) == "abc" + "abc" + "bca"
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_the_speedup_is_the_median_of_the_ratios_within_repetitions():
    case = Case("x", {}, "fast", "slow", {"fast": [1.0, 2.0, 1.0], "slow": [4.0, 4.0, 3.0]}, [])
    assert case.speedup == 3.0
    assert case.as_json()["speedups"]["slow"]["range"] == [2.0, 4.0]


def test_every_arm_has_its_speedup_and_the_fastest_is_known():
    seconds = {"own": [1.0, 1.0], "slow": [4.0, 6.0], "fair": [2.0, 3.0]}
    assert fastest(seconds, besides="own") == "fair"
    case = Case("x", {}, "own", "fair", seconds, []).as_json()
    assert case["speedups"] == {
        "slow": {"median": 5.0, "range": [4.0, 6.0]},
        "fair": {"median": 2.5, "range": [2.0, 3.0]},
    }


def test_without_a_gpu_nothing_is_captured():
    run = lambda: torch.ones(1)  # noqa: E731
    assert captured(run, "cpu") is run


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


def test_decode_attention_takes_cold_caches_in_turn(monkeypatch):
    """Between two uses of a cache, dense or pruned, at least `COLD_BYTES` of others are read."""
    read = {"sparse": [], "dense": []}
    ragged, dense = operations.ragged_attention, operations.scaled_dot_product_attention
    monkeypatch.setattr(
        operations, "ragged_attention", lambda q, k, *rest, **o: (read["sparse"].append(k), ragged(q, k, *rest, **o))[1]
    )
    monkeypatch.setattr(
        operations,
        "scaled_dot_product_attention",
        lambda q, k, v, **o: (read["dense"].append(k), dense(q, k, v, **o))[1],
    )
    monkeypatch.setattr(operations, "COLD_BYTES", 3 * 2 * 128 * 4 * 128 * 4)  # three dense caches, twelve pruned ones
    case = operations.decode_case(128, 1, 0.25, "cpu", torch.float32, repetitions=1)
    assert (case.setting["caches"], case.setting["dense_caches"]) == (12, 3)
    assert len({k.data_ptr() for k in read["sparse"]}) == 12
    assert len({k.data_ptr() for k in read["dense"]}) == 3
    turns = [k.data_ptr() for k in read["sparse"][-12:]]
    assert len(set(turns)) == case.setting["calls_a_sample"] == 12


def test_whole_answers():
    group, loop = group_case(4, 3, repetitions=1), loop_case(4, 2, 3, repetitions=1)
    assert (group.setting["answers"], loop.setting["rollouts"]) == (8, 16)
    assert loop.notes["rollouts_per_second"]["loop"] == pytest.approx(16 / loop.seconds["loop"][0])


def test_group_and_loop_name_all_their_arms(monkeypatch):
    """The loop's figure is against the faster form of `model.generate`, the group's against eight generations."""
    times = {"loop": [1.0], "model.generate, 1 row a call": [9.0], "model.generate, 8 rows a call": [3.0]}
    monkeypatch.setattr(rollouts, "time_arms", lambda arms, *_: {arm: times[arm] for arm in arms})
    loop = loop_case(4, 1, 2, repetitions=1)
    assert set(loop.seconds) == set(times)
    assert (loop.baseline, loop.speedup) == ("model.generate, 8 rows a call", 3.0)
    assert loop.speedups["model.generate, 1 row a call"]["median"] == 9.0

    times = {"group": [1.0], SEPARATE: [6.0], UNSHARED: [2.0]}
    group = group_case(4, 2, repetitions=1)
    assert (group.baseline, group.speedup) == ("8 separate generations", 6.0)
    assert group.speedups[UNSHARED]["median"] == 2.0

    manifest = {"hardware": "a machine", "versions": {"torch": "2.0"}}
    table = speed({"cases": {"group": group.as_json(), "loop": loop.as_json()}, "manifest": manifest}, None)
    assert "| one unshared 8-row call | 2.00 × (2.00–2.00) |" in table
    assert "| model.generate, 8 rows a call | 3.00 × (3.00–3.00) |" in table
    assert "| model.generate, 1 row a call | 9.00 × (9.00–9.00) |" in table


def test_a_rollout_of_a_group_beside_one():
    case = one_case(4, 4, 1)
    assert case.checked[0]["equal"]
    assert case.setting["visual_tokens"] == 16
    assert case.speedup == pytest.approx(8 / case.notes["group_over_one"])


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


def test_a_case_that_fails_is_named_and_the_others_are_written(tmp_path, monkeypatch):
    def wrong(*_):
        raise BenchError("attention: not equal")

    case = Case("a case", {}, "ours", "theirs", {"ours": [1.0], "theirs": [2.0]}, [{"equal": True}])
    for name in ("mass_case", "group_case", "loop_case"):
        monkeypatch.setattr(command, name, lambda *_: case)
    monkeypatch.setattr(command, "decode_case", wrong)
    output = tmp_path / "bench.json"
    done = CliRunner().invoke(app, ["cpu", "--output", str(output), "--repetitions", "1"])
    assert done.exit_code == 1
    assert "no figure for decode_4k, decode_16k" in done.stderr
    assert done.stdout.strip().splitlines()[-1] == "{}"
    written = json.loads(output.read_text())
    assert written["failed"] == dict.fromkeys(("decode_4k", "decode_16k"), "attention: not equal")
    assert set(written["cases"]) == {"mass_4k", "group_of_8", "loop"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_gpu_set_says_so():
    done = CliRunner().invoke(app, ["gpu"])
    assert done.exit_code == 2
    assert "no CUDA device" in done.output
