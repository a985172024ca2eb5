"""Training from scratch: it learns, and a stopped run ends where one that was not stopped ends."""

from __future__ import annotations

import math

import pytest
import torch
from full_disk import files_at_most
from imported_code import ROOT, imported_modules, module_file

from sparsity_forcing.checkpoints import Checkpoints
from sparsity_forcing.data.digits import COLOURS, corpus
from sparsity_forcing.files import WriteError
from sparsity_forcing.models import pretrain as training
from sparsity_forcing.models.families import ModelError
from sparsity_forcing.models.pretrain import (
    PhaseBatches,
    answer_loss,
    configuration_fingerprint,
    learning_rate_factor,
    pretrain,
)
from sparsity_forcing.models.tiny import build_model, build_processor
from sparsity_forcing.models.validate import generate_answers, validate, validation_questions
from sparsity_forcing.params import ModelParams, Phase, ScratchModel

PARAMS = ModelParams(
    scratch=ScratchModel(layers=2),
    curriculum=(
        Phase(steps=3, batch_size=4, grids=(4,), tasks=("read", "sum")),
        Phase(steps=3, batch_size=4, grids=(4, 5)),
    ),
    warmup_steps=2,
    checkpoint_every=2,
)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def processor():
    return build_processor(corpus())


def fresh(processor):
    return build_model(PARAMS.scratch, processor.tokenizer, seed=0)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def straight(processor):
    """Weights and steps of a run that nothing stops."""
    model, steps = fresh(processor), []
    pretrain(model, processor, PARAMS, seed=0, on_step=steps.append)
    return weights(model), steps


class StoppedError(RuntimeError):
    pass


def stopped_after(number):
    def on_step(step):
        if step.number == number:
            raise StoppedError

    return on_step


def test_every_step_is_reported(straight):
    _, steps = straight
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    assert {step.total for step in steps} == {6}
    assert steps[-1].loss < steps[0].loss
    assert all(0 <= step.accuracy <= 1 for step in steps)


@pytest.mark.parametrize("stop", [1, 5, 6])
def test_a_stopped_run_ends_with_the_same_weights(processor, straight, tmp_path, stop):
    checkpoints = Checkpoints(tmp_path, "key")
    with pytest.raises(StoppedError):
        pretrain(fresh(processor), processor, PARAMS, 0, checkpoints, stopped_after(stop))
    model, steps = fresh(processor), []
    pretrain(model, processor, PARAMS, 0, checkpoints, steps.append)
    assert [step.number for step in steps] == list(range(2 * ((stop - 1) // 2) + 1, 7))
    assert same(weights(model), straight[0])
    assert not model.training


def test_a_corrupted_checkpoint_falls_back_to_the_one_before(processor, straight, tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, "key")
    pretrain(fresh(processor), processor, PARAMS, 0, checkpoints)
    _, newest = checkpoints.latest()
    damaged = newest / "state.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    model, steps = fresh(processor), []
    pretrain(model, processor, PARAMS, 0, checkpoints, steps.append)
    assert "corrupted" in caplog.text
    assert [step.number for step in steps] == [5, 6]
    assert same(weights(model), straight[0])


def test_the_seed_decides(processor, straight):
    model = fresh(processor)
    pretrain(model, processor, PARAMS, seed=1)
    assert not same(weights(model), straight[0])


def test_only_what_decides_the_weights_is_in_the_fingerprint(processor):
    def key(seed=0, **changes):
        params = PARAMS.model_copy(update=changes)
        model = build_model(params.scratch, processor.tokenizer, seed=0)
        return configuration_fingerprint(model, processor, params, seed)

    same_result = [key(), key(min_accuracy=0.5), key(validation_rows=7), key(checkpoint_every=1)]
    another = [
        key(seed=1),
        key(learning_rate=1e-3),
        key(warmup_steps=3),
        key(curriculum=PARAMS.curriculum[:1]),
        key(scratch=ScratchModel(layers=1)),
    ]
    assert len(set(same_result)) == 1
    assert len({*same_result, *another}) == 1 + len(another)


def test_a_change_of_the_rendering_is_another_configuration(processor, monkeypatch):
    before = configuration_fingerprint(fresh(processor), processor, PARAMS, 0)
    monkeypatch.setitem(COLOURS, "red", (0.9, 0, 0))
    assert configuration_fingerprint(fresh(processor), processor, PARAMS, 0) != before


def test_a_change_of_the_code_or_of_a_package_is_another_configuration(processor, monkeypatch, tmp_path):
    def key() -> str:
        return configuration_fingerprint(fresh(processor), processor, PARAMS, 0)

    keys = [key()]
    module = tmp_path / "loss.py"
    for text in ("a = 1", "a = 2"):
        module.write_text(text)
        monkeypatch.setattr(training, "CODE", (module,))
        keys.append(key())
    monkeypatch.setattr(training, "versions", lambda packages: dict.fromkeys(packages, "another"))
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_the_code_in_the_fingerprint_is_all_that_decides_the_weights():
    """Every module that training runs, but those that only carry the result; families names an error, tiny's work (the
    initial weights, the tokenizer) and params' values are in the fingerprint themselves."""
    around = {"files", "lineage", "checkpoints", "models", "models.families", "models.tiny"}
    around |= {"params", "params.fields", "params.inputs", "params.measuring", "params.training"}
    named = {ROOT / "sparsity_forcing" / name for name in training.CODE}
    files = {module_file(module) for module in imported_modules("models.pretrain") - around}
    assert files - {ROOT / "sparsity_forcing/data/__init__.py"} == named


def test_a_full_disk_under_a_checkpoint_leaves_the_ones_before(processor, tmp_path):
    """A checkpoint is larger than what is left, a batch, which comes through shared memory, is not."""
    checkpoints = Checkpoints(tmp_path, "key")
    with pytest.raises(StoppedError):
        pretrain(fresh(processor), processor, PARAMS, 0, checkpoints, stopped_after(3))
    with files_at_most(300_000), pytest.raises(WriteError, match="as on a full disk") as caught:
        pretrain(fresh(processor), processor, PARAMS, 0, checkpoints)
    assert "step-000004, which was not written" in caught.value.__notes__[0]
    assert checkpoints.latest()[0] == 2
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step-000002"]


def test_the_smallest_vision_heads_that_are_allowed_are_built(processor):
    with pytest.raises(ValueError, match="vision_hidden_size must be a multiple of 4"):
        ScratchModel(layers=1, vision_hidden_size=20, vision_heads=10)
    model = build_model(ScratchModel(layers=1, vision_hidden_size=8, vision_heads=2), processor.tokenizer, 0).eval()
    rows = validation_questions(PARAMS.curriculum[-1], count=1, seed=0)
    assert len(generate_answers(model, processor, rows)) == 1


def test_a_diverging_run_says_so_and_saves_nothing_bad(processor, tmp_path):
    checkpoints = Checkpoints(tmp_path, "key")
    with pytest.raises(ModelError, match=r"the loss is (nan|inf) at step \d of 6; lower model\.learning_rate"):
        pretrain(fresh(processor), processor, PARAMS.model_copy(update={"learning_rate": 1e30}), 0, checkpoints)


def test_the_loss_is_that_of_the_answer_tokens(processor):
    model = fresh(processor).eval()
    inputs, labels = next(iter(PhaseBatches(processor, PARAMS.curriculum[0], seed=0)))
    with torch.no_grad():
        loss, accuracy = answer_loss(model, inputs, labels)
        logits = model(**inputs).logits
    rows = []
    for row, wanted in zip(logits[:, :-1], labels[:, 1:], strict=True):
        answer = wanted != -100
        rows.append(torch.nn.functional.cross_entropy(row[answer], wanted[answer], reduction="none"))
    assert loss.item() == pytest.approx(torch.cat(rows).mean().item(), abs=1e-5)
    assert accuracy == 0.0


def test_the_schedule():
    factors = [learning_rate_factor(step, 100 - step, warmup=10, decay=50) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9:51] == [1.0] * 42
    assert factors[50:] == sorted(factors[50:], reverse=True)
    assert 0.02 <= factors[-1] < 0.03


def gated(until: float, at_most: int) -> ModelParams:
    """A phase that may go on, then two steps."""
    first = PARAMS.curriculum[0].model_copy(update={"steps": 10, "until": until, "at_most": at_most})
    last = PARAMS.curriculum[1].model_copy(update={"steps": 2})
    return PARAMS.model_copy(update={"curriculum": (first, last), "checkpoint_every": 20})


def accuracies(monkeypatch, values):
    """``values[step]`` in the place of the share of right answers."""
    answers = iter(values)
    monkeypatch.setattr(training, "answer_loss", lambda *inputs: (answer_loss(*inputs)[0], next(answers)))


@pytest.mark.parametrize("right, expected", [([1.0] * 10, 10), ([0.0] * 12 + [1.0] * 90, 57)])
def test_a_phase_goes_on_until_the_model_can_do_it(processor, monkeypatch, right, expected):
    """57: 45 of the last 50 batches are right then."""
    steps = []
    accuracies(monkeypatch, right + [0.0] * 2)
    pretrain(fresh(processor), processor, gated(0.9, at_most=70), 0, on_step=steps.append)
    assert len(steps) == expected + 2
    assert [step.total for step in steps[:10]] == [12] * 10
    assert [step.total for step in steps[10:]] == [*range(13, expected + 3), expected + 2, expected + 2]


def test_stopped_in_a_phase_that_goes_on_it_ends_with_the_same_weights(processor, monkeypatch, tmp_path):
    model, checkpoints = fresh(processor), Checkpoints(tmp_path, "key")
    values, params = [0.0] * 12 + [1.0] * 90, gated(0.9, at_most=70)
    accuracies(monkeypatch, values)
    pretrain(model, processor, params, 0)
    again = fresh(processor)
    accuracies(monkeypatch, values)
    with pytest.raises(StoppedError):
        pretrain(again, processor, params, 0, checkpoints, stopped_after(45))
    accuracies(monkeypatch, values[40:])
    pretrain(again, processor, params, 0, checkpoints)
    assert same(weights(again), weights(model))


def test_a_phase_that_the_model_cannot_do_ends_the_training(processor, monkeypatch):
    accuracies(monkeypatch, [0.5] * 60)
    told = r"phase 1 of model.curriculum is right on 50.0% of its questions after 55 steps, `until` asks for 90.0%"
    with pytest.raises(ModelError, match=told):
        pretrain(fresh(processor), processor, gated(0.9, at_most=55), 0)


@pytest.mark.parametrize(
    "wrong, told", [({"until": 0.9}, "go together"), ({"at_most": 9}, "go together"),
                    ({"until": 0.9, "at_most": 2}, r"at_most \(2\) must be at least steps \(3\)")]
)  # fmt: skip
def test_an_open_phase_has_a_goal_and_a_limit(wrong, told):
    with pytest.raises(ValueError, match=told):
        Phase(steps=3, **wrong)


def test_an_open_phase_ends_before_the_learning_rate_falls():
    one, two = Phase(steps=2, until=0.5, at_most=9), Phase(steps=2)
    ModelParams(curriculum=(one, two))
    with pytest.raises(ValueError, match="phase 2 of the curriculum ends at step 4 of 4, when the learning rate falls"):
        ModelParams(curriculum=(two, one))


def test_a_phase_that_took_too_many_steps_goes_on_with_more(processor, monkeypatch, tmp_path):
    def checkpoints(params: ModelParams) -> Checkpoints:
        return Checkpoints(tmp_path, configuration_fingerprint(fresh(processor), processor, params, 0))

    steps, short, long = [], gated(0.9, at_most=55), gated(0.9, at_most=90)
    accuracies(monkeypatch, [0.5] * 55)
    with pytest.raises(ModelError, match="raise at_most and it goes on from here"):
        pretrain(fresh(processor), processor, short, 0, checkpoints(short))
    accuracies(monkeypatch, [1.0] * 60)
    pretrain(fresh(processor), processor, long, 0, checkpoints(long), steps.append)
    assert steps[0].number == 41  # a checkpoint every 20 steps


def test_validation_asks_about_every_task_and_grid_and_scores_what_is_generated(processor):
    rows = validation_questions(PARAMS.curriculum[-1], count=12, seed=0)
    assert {row.split for row in rows} == {"validation"}
    model = fresh(processor).eval()
    scores = validate(model, processor, rows)
    assert {label: len(of_label) for label, of_label in scores.items()} == {
        f"{task}_{grid}x{grid}": 2 for task in ("read", "count", "sum") for grid in (4, 5)
    }
    answers = generate_answers(model, processor, rows[:1])
    perfect = [type(rows[0])(**{**vars(rows[0]), "answer": answers[0] or "x"})]
    assert validate(model, processor, perfect) == {rows[0].label: [float(bool(answers[0].strip()))]}


def test_it_learns_what_an_answer_looks_like(processor):
    """After 48 steps only the digit itself is open: log(10) over two tokens, digit and end."""
    params = ModelParams(
        scratch=ScratchModel(layers=2),
        curriculum=(Phase(steps=48, batch_size=16, grids=(3,), tasks=("read",), grey_share=0, clutter_share=0),),
        warmup_steps=20,
    )
    losses = []
    model = build_model(params.scratch, processor.tokenizer, seed=0)
    pretrain(model, processor, params, seed=0, on_step=lambda step: losses.append(step.loss))
    assert losses[0] > 4
    assert sum(losses[-5:]) / 5 < 1.3 * math.log(10) / 2
