"""An experiment end to end, at the smallest scale."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from mlflow import MlflowClient
from tiny_families import build_family
from typer.testing import CliRunner

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.data.digits import questions_about
from sparsity_forcing.data.digits_source import digits_row
from sparsity_forcing.data.schema import read_rows, write_rows
from sparsity_forcing.evidence import __main__ as command
from sparsity_forcing.evidence import experiment, gradient, lengths, turns
from sparsity_forcing.evidence.alternatives import OBJECTIVES
from sparsity_forcing.evidence.arms import ARMS, Arm
from sparsity_forcing.evidence.experiment import run_arm, run_base
from sparsity_forcing.evidence.summary import accept_results, outdated, read_results, write_summary
from sparsity_forcing.evidence.tables import GRADIENTS
from sparsity_forcing.inputs import InputError
from sparsity_forcing.models.load import load
from sparsity_forcing.params import DigitsParams, ParamsError, load_params
from sparsity_forcing.rl.facts import Facts, credit

ROOT = Path(__file__).parents[2]


@pytest.fixture
def prepared(workspace, monkeypatch) -> Path:
    """A workspace after the stages prepare and base."""
    monkeypatch.setattr(experiment, "QUESTIONS", 8)
    params = yaml.safe_load((ROOT / "presets/smoke.yaml").read_text())
    params["train"] |= {"steps": 2, "validate_every": 1, "validation_rows": 4, "accuracy_guard": 1.0}
    params["data"]["digits"] = {"grids": [4], "test_rows": 6}
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
    for page in ("docs/evidence.md", "README.md"):
        shutil.copy(ROOT / page, workspace / page)
    return workspace


def test_from_the_base_to_the_page(prepared):
    params = load_params(prepared / "params.yaml")
    base, found = run_base(params, prepared), run_arm(ARMS["literal"], params, prepared)
    budget = str(params.sparsity.p)
    assert [point["step"] for point in found["curve"]] == [0, 1, 2]
    assert found["test"][budget]["questions"] == 8  # 6 are in the split
    assert len(found["test"]["1.0"]["scores"]) == 8
    assert found["test"]["1.0"]["visual_token_ratio"] == 1
    assert 0 < found["test"][budget]["visual_token_ratio"] < 1
    assert found["changed"]["train"] == ARMS["literal"].train
    assert base["test"]["1.0"]["visual_token_ratio"] == 1
    assert not list(prepared.glob("checkpoints/evidence/*/*"))

    quoted = write_summary(params, prepared)
    assert quoted["literal_tau_end"] == found["test"][budget]["visual_token_ratio"]
    assert quoted["tau_end"] is None
    assert ARMS["literal"].question in (prepared / "docs/evidence.md").read_text()
    assert "against the dense base: the literal objective" in (prepared / "README.md").read_text()
    assert (prepared / "plots/evidence.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["sft_relaxed_ratio", "dpo"])
def test_an_alternative_from_the_base_to_its_result(prepared, name):
    arm = ARMS[name]
    few = Arm(name, arm.question, arm.train | {"prompts_per_step": 2}, objective=arm.objective)
    found = run_arm(few, load_params(prepared / "params.yaml"), prepared)
    assert found["test"]["0.8"]["questions"] == 8
    assert (found["rollouts"] > 0) == (name == "dpo") == (found["new_tokens"] > 0)


def test_what_has_run_does_not_run_again_unless_something_changed(prepared, monkeypatch):
    params = load_params(prepared / "params.yaml")
    first = run_arm(ARMS["default"], params, prepared)
    monkeypatch.setattr("sparsity_forcing.evidence.experiment.load", None)
    assert run_arm(ARMS["default"], params, prepared) == json.loads(json.dumps(first))
    faster = params.model_copy(update={"train": params.train.model_copy(update={"learning_rate": 1e-3})})
    with pytest.raises(TypeError):  # it wants to load the model
        run_arm(ARMS["default"], faster, prepared)


def test_a_result_is_current_until_something_that_decides_it_changes(prepared):
    params = load_params(prepared / "params.yaml")
    run_base(params, prepared)
    assert read_results(params, prepared).keys() == {"base"}
    deeper = params.sparsity.model_copy(update={"scoring_rows": "all"})
    assert read_results(params.model_copy(update={"sparsity": deeper}), prepared) == {}
    write_rows(
        [digits_row(DigitsParams(grids=(4,)), 1, "test", place) for place in range(6)],
        prepared / "data/prepared/test.parquet",
    )
    assert read_results(params, prepared) == {}


def test_a_result_of_other_code_is_kept_if_one_says_so_and_nothing_else_has_changed(prepared, monkeypatch):
    params = load_params(prepared / "params.yaml")
    first = run_base(params, prepared)
    monkeypatch.setattr(experiment, "code_digest", lambda paths: "of other code")
    assert read_results(params, prepared) == {}
    assert outdated(params, prepared) == ["base"]
    other = params.model_copy(update={"seed": 1})
    assert accept_results(["base"], other, prepared) == []
    assert accept_results(["gradient", "default"], params, prepared) == []
    assert accept_results(["base"], params, prepared) == ["base"]
    assert accept_results(["base"], params, prepared) == []
    assert outdated(params, prepared) == []
    kept = read_results(params, prepared)["base"]
    assert kept["code"] != first["code"]
    assert {**kept, "code": first["code"]} == json.loads(json.dumps(first))


def test_what_is_not_trained_is_recorded_too(prepared):
    params = load_params(prepared / "params.yaml")
    found = run_base(params, prepared)
    client = MlflowClient(tracking_uri=f"sqlite:///{prepared / 'mlflow.db'}")
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert run.data.tags["arm"] == "base"
    assert run.data.metrics["eval/test/0.8/visual_token_ratio"] == found["test"]["0.8"]["visual_token_ratio"]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["base.json"]


def test_hard_questions_are_those_the_base_gets_wrong(prepared, monkeypatch):
    """By a score that some of the questions earn whatever is answered."""
    params = load_params(prepared / "params.yaml")
    rows = read_rows(prepared / "data/prepared/train.parquet")
    monkeypatch.setattr(experiment, "score_function", lambda name: lambda said, answer: float(ord(answer[-1]) % 2))
    wrong = [row.id for row in rows if ord(row.answer[-1]) % 2 == 0]
    assert 0 < len(wrong) < len(rows)
    model, processor = load(prepared / "models/base", "float32", "cpu")
    found = experiment.wrongly_answered(model, processor, rows, params)
    assert [row.id for row in found] == wrong
    seen = {}
    trainer = lambda model, processor, rows, *rest: seen.update(rows=rows) or 1 / 0  # noqa: E731
    monkeypatch.setitem(OBJECTIVES, "grpo", trainer)
    with pytest.raises(ZeroDivisionError):
        run_arm(Arm("hard", "", rows="hard"), params, prepared)
    assert [row.id for row in seen["rows"]] == wrong


def test_undistorted_questions_show_the_scans_as_they_are(prepared, monkeypatch):
    path = prepared / "data/prepared/train.parquet"
    plain, params = read_rows(path), load_params(prepared / "params.yaml")
    arm = Arm("undistorted", "", rows="undistorted")
    with pytest.raises(ParamsError, match=r"data\.digits\.distorted is false: the rows show the scans as they are"):
        run_arm(arm, params, prepared)
    digits = params.data.digits.model_copy(update={"distorted": True})
    write_rows([digits_row(digits, params.seed, "train", place) for place in range(len(plain))], path)
    seen = {}
    trainer = lambda model, processor, rows, *rest: seen.update(rows=rows) or 1 / 0  # noqa: E731
    monkeypatch.setitem(OBJECTIVES, "grpo", trainer)
    params = params.model_copy(update={"data": params.data.model_copy(update={"digits": digits})})
    for one, rows in ((arm, plain), (ARMS["default"], read_rows(path))):
        with pytest.raises(ZeroDivisionError):
            run_arm(one, params, prepared)
        assert seen.pop("rows") == rows
    assert rows != plain
    others = params.model_copy(update={"data": params.data.model_copy(update={"source": "chat_jsonl"})})
    with pytest.raises(ParamsError, match=r"data\.source is chat_jsonl: only the rows of digits show distorted scans"):
        run_arm(arm, others, prepared)


def test_gradients_of_a_small_base(prepared, monkeypatch):
    monkeypatch.setattr(gradient, "PROMPTS", 2)
    monkeypatch.setattr(gradient, "score_function", lambda name: lambda said, answer: float(len(said) % 2))
    params = load_params(prepared / "params.yaml")
    found = gradient.measure(params, prepared, draws=3)
    assert found["parts"].keys() == GRADIENTS.keys()
    assert all(part["noise"] > 0 for part in found["parts"].values())
    assert json.loads((prepared / "metrics/evidence/gradient.json").read_text()) == found
    monkeypatch.setattr(gradient, "load", None)
    assert gradient.measure(params, prepared, draws=3) == found  # nothing to do
    with pytest.raises(ParamsError, match=r"needs train\.selection_policy\.sigma above 0"):
        gradient.measure(ARMS["literal"].params(params), prepared)
    with pytest.raises(ParamsError, match=r"train\.selection_policy\.credit layer or layer_by_share only, got joint"):
        gradient.measure(ARMS["layers_joint"].params(params), prepared)


def test_lengths_of_a_small_base_and_policy(prepared, monkeypatch):
    monkeypatch.setattr(lengths, "GRIDS", (4, 6))
    monkeypatch.setattr(lengths, "TOKENS", 3 * 36)
    monkeypatch.setattr(lengths, "MOST", 5)
    monkeypatch.setattr(lengths, "BATCH", 40)
    params = load_params(prepared / "params.yaml")
    with pytest.raises(InputError, match="models/policy"):
        lengths.measure(params, prepared)
    shutil.copytree(prepared / "models/base", prepared / "models/policy")
    found = lengths.measure(params, prepared)["lengths"]
    assert [(one["checkpoint"], one["visual_tokens"]) for one in found[::2]] == [
        (checkpoint, tokens) for checkpoint in ("base", "policy") for tokens in (16, 36)
    ]
    assert [one["questions"] for one in found[:4:2]] == [5, 3]
    assert all((one["visual_token_ratio"] == 1) == (one["p"] == 1) for one in found)
    assert [one["visual_token_ratio"] for one in found[:4]] == [one["visual_token_ratio"] for one in found[4:]]
    monkeypatch.setattr(lengths, "load", None)
    assert lengths.measure(params, prepared)["lengths"] == found  # nothing to do
    other = params.model_copy(update={"data": params.data.model_copy(update={"source": "parquet"})})
    with pytest.raises(ParamsError, match=r"need data\.source digits"):
        lengths.measure(other, prepared)
    dense = params.model_copy(update={"sparsity": params.sparsity.model_copy(update={"p": 1.0})})
    with pytest.raises(ParamsError, match=r"sparsity\.p has to be below 1"):
        lengths.measure(dense, prepared)


def test_second_questions_of_a_small_base_and_policy(prepared, monkeypatch):
    monkeypatch.setattr(turns, "BATCH", 3)
    params = load_params(prepared / "params.yaml")
    with pytest.raises(InputError, match="models/policy"):
        turns.measure(params, prepared)
    shutil.copytree(prepared / "models/base", prepared / "models/policy")
    found = turns.measure(params, prepared)
    assert 0 < found["questions"] <= 8
    assert found["checkpoints"]["policy"] == found["checkpoints"]["base"]
    assert found["checkpoints"]["base"]["dense"]["visual_token_ratio"] == 1
    monkeypatch.setattr(turns, "load", None)
    assert turns.measure(params, prepared) == json.loads(json.dumps(found))  # nothing to do
    for prefill in ("sparse", "dense"):
        other = params.model_copy(update={"sparsity": params.sparsity.model_copy(update={"prefill": prefill})})
        with pytest.raises(ParamsError, match=rf"sparsity\.prefill suffix with scoring_rows text, got '{prefill}'"):
            turns.measure(other, prepared)


@pytest.fixture
def answering(prepared):
    """Samplers of an untrained model at p = 0.6 and dense, and rows whose prompts differ in length."""
    params = load_params(prepared / "params.yaml")
    model, processor = load(prepared / "models/base", "float32", "cpu")
    rows = [digits_row(DigitsParams(grids=(4, 6)), 0, "test", place) for place in range(8)]
    with decoder_attention(model):
        yield *(experiment.sampler_at(model, processor, params, p) for p in (0.6, 1.0)), rows


def test_an_answer_over_leftovers(answering):
    """Over its own kept sets a question is answered as before, over all tokens as if dense; and as if it were alone."""
    sparse, dense, rows = answering
    for sampler in (sparse, dense):
        own = sampler.deployed(rows)
        again = sparse.deployed(rows, partial(turns.LeftoverContext, left=own.kept))
        assert torch.equal(again.completions, own.completions)
        assert torch.allclose(again.logps, own.logps, atol=1e-5)
        assert torch.equal(again.visual_token_ratio, own.visual_token_ratio)
    pairs = [(row, second) for row in rows if (second := turns.second_question(row, 0)) is not None]
    first, second = (list(asked) for asked in zip(*pairs, strict=True))
    together = sparse.deployed(second, partial(turns.LeftoverContext, left=sparse.deployed(first).kept))
    for place, (one, other) in enumerate(pairs):
        alone = sparse.deployed([other], partial(turns.LeftoverContext, left=sparse.deployed([one]).kept))
        assert torch.allclose(alone.visual_token_ratio, together.visual_token_ratio[place])
        sampled = alone.completion_mask[0]
        assert torch.equal(alone.completions[0][sampled], together.completions[place][together.completion_mask[place]])


def test_the_second_question_has_what_the_first_kept(answering):
    """What is asked over the pruned cache keeps as much as the first question, not as itself."""
    sparse, dense, rows = answering
    pairs = [(row, second) for row in rows if (second := turns.second_question(row, 0)) is not None]
    first, second = (list(asked) for asked in zip(*pairs, strict=True))
    found = turns.answered_twice(sparse, dense, pairs, lambda said, answer: float(len(said) % 2))
    own, others = (sparse.deployed(asked).visual_token_ratio.mean() for asked in (first, second))
    assert found["pruned_cache"]["visual_token_ratio"] == pytest.approx(float(own), rel=1e-6)
    assert found["dense_cache"]["visual_token_ratio"] == pytest.approx(float(others), rel=1e-6)
    left, prefix = sparse.deployed(first).kept, sparse.prompts(first).prefix
    over = sparse.deployed(second, partial(turns.LeftoverContext, left=left)).kept
    assert all(torch.equal(over[layer][:, :prefix], left[layer][:, :prefix]) for layer in left)
    assert any(
        not torch.equal(kept[:, :prefix], left[layer][:, :prefix])
        for layer, kept in sparse.deployed(second).kept.items()
    )
    assert all(len(way["scores"]) == len(pairs) for way in found.values())


def test_a_second_question_asks_for_another_colour_of_the_same_canvas(prepared):
    without = 0
    for row in read_rows(prepared / "data/prepared/train.parquet"):
        second = turns.second_question(row, 0)
        if second is None:
            without += 1
            continue
        assert turns.colours_in(second.question)
        assert not turns.colours_in(second.question) & turns.colours_in(row.question)
        assert second.images == row.images
        assert (second.task, second.question, second.answer) in questions_about(row.meta["colours"], row.meta["labels"])
        assert turns.second_question(row, 0) == second
    assert 0 < without < 20


def test_what_these_parameters_do_not_allow_is_left_out(prepared, monkeypatch):
    values = yaml.safe_load((prepared / "params.yaml").read_text())
    values["sparsity"]["prefill"] = "dense"
    (prepared / "params.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(command, "ROOT", prepared)
    monkeypatch.setattr(command, "ARMS", {name: ARMS[name] for name in ("default", "undistorted")})
    asked = []
    monkeypatch.setattr(command, "run_all", lambda names, jobs: asked.extend(names) or [])
    shutil.copytree(prepared / "models/base", prepared / "models/policy")
    done = CliRunner().invoke(command.app, [])
    assert done.exit_code == 0, done.output
    assert asked == ["base", "gradient", "lengths", "default"]
    asked.clear()
    assert CliRunner().invoke(command.app, ["lengths"]).exit_code == 0
    assert asked == ["lengths"]  # it is compared with nothing
    assert "sparsity.prefill suffix" in (prepared / "docs/evidence.md").read_text()


@pytest.mark.parametrize("kind", ["layer", "layer_by_share"])
def test_the_parts_of_an_advantage_add_up_to_it(kind):
    """What is taken apart is what the trainer uses."""
    params = Arm("own", "", {"selection_policy": {"credit": kind}}).params(load_params(ROOT / "params.yaml"))
    ratios = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    scores = (torch.rand(16, generator=torch.Generator().manual_seed(1)) > 0.4).float()
    p = torch.tensor(params.train.budgets).repeat(2)
    rollouts = SimpleNamespace(token_ratio=ratios.mean(0), layer_ratio=ratios, p=p)
    ones = torch.ones(16)
    facts = Facts(scores, p, ratios.mean(0), ratios.mean(0), ones, ones, ones, ratios, ratios, torch.tensor(0.0))
    parts = gradient._advantages(scores, rollouts, params.train)
    found = parts["correct_selection"][1] + parts["efficiency_selection"][1]
    torch.testing.assert_close(found, credit(facts, params.train).selection_advantages, atol=1e-5, rtol=1e-5)
    literal = ARMS["literal"].params(params).train
    parts = gradient._advantages(scores, rollouts, literal)
    found = parts["correct_tokens"][0] + parts["efficiency_tokens"][0]
    torch.testing.assert_close(found, credit(facts, literal).advantages.flatten(), atol=1e-5, rtol=1e-5)


def test_without_the_pipelines_outputs_it_says_so(workspace, monkeypatch):
    shutil.copy(ROOT / "params.yaml", workspace / "params.yaml")
    with pytest.raises(InputError, match="models/base"):
        run_arm(ARMS["default"], load_params(workspace / "params.yaml"), workspace)
    monkeypatch.chdir(workspace)
    done = CliRunner().invoke(command.app, [])
    assert done.exit_code == 2
    assert "evidence: " in done.stderr
    assert "models/base" in done.stderr


def test_what_ran_is_told_and_what_failed_is_named(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    assert [command.run_one(name) for name in ("base", "literal")] == [0, 0]  # as the processes below would
    ran = []

    def start(name: str) -> subprocess.Popen:
        ran.append(name)
        return subprocess.Popen(["false" if name == "hard" else "true"])

    monkeypatch.setattr(command, "_start", start)
    done = CliRunner().invoke(command.app, ["literal", "hard", "literal", "--jobs", "1"])
    assert ran == ["base", "literal", "hard"]  # nothing twice
    assert done.exit_code == 1
    assert "did not finish, see above: hard; what ran is kept" in done.stderr
    quoted = json.loads(done.stdout.splitlines()[-1])
    assert quoted["literal_tau_end"] is not None
    assert quoted["tau_end"] is None
    assert "not in the tables" not in done.stderr
    values = yaml.safe_load((prepared / "params.yaml").read_text())
    (prepared / "params.yaml").write_text(yaml.safe_dump(values | {"train": values["train"] | {"beta": 0.5}}))
    done = CliRunner().invoke(command.app, ["literal", "--only-summary"])
    assert "so not in the tables: base, literal. `make evidence` runs them again" in done.stderr
    (prepared / "params.yaml").write_text(yaml.safe_dump(values | {"seed": 1}))
    done = CliRunner().invoke(command.app, ["literal"])
    assert "data/prepared/test.parquet was not made with these parameters of data.digits" in done.stderr
    values["data"]["digits"]["distorted"] = True
    (prepared / "params.yaml").write_text(yaml.safe_dump(values))
    done = CliRunner().invoke(command.app, ["literal"])
    assert "data/prepared/train.parquet was not made with these parameters of data.digits" in done.stderr
    done = CliRunner().invoke(command.app, ["literal", "nonsense"])
    assert done.exit_code == 2
    assert "there is no experiment nonsense" in done.stderr


def test_asked_to_stop_it_stops_the_processes(monkeypatch):
    processes = []

    def endless(name: str) -> subprocess.Popen:
        processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return processes[-1]

    monkeypatch.setattr(command, "_start", endless)
    before = signal.signal(signal.SIGTERM, command._stop)
    try:
        with pytest.raises(SystemExit):
            command.run_all(["base", "literal"], 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [process.wait(20) for process in processes] == [-signal.SIGTERM]


def test_every_arm_changes_something_and_keeps_the_number_of_rollouts():
    params = load_params(ROOT / "params.yaml")
    for name, arm in ARMS.items():
        changed = arm.params(params)
        assert (changed != params) == (name not in ("default", "hard", "undistorted"))
        if arm.objective in ("grpo", "dpo"):
            assert changed.train.prompts_per_step * changed.train.num_generations == 64
