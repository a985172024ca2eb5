import numpy as np
import pytest
from PIL import Image

from sparsity_forcing.methods import Full, TopP
from sparsity_forcing.models.prompts import encode_prompts
from sparsity_forcing.reporting import efficiency
from sparsity_forcing.reporting.efficiency import Arm, Sample, measure, run_once, summarise


@pytest.fixture(scope="module")
def prompts(processor):
    pictures = [np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8) for i in range(2)]
    return encode_prompts(processor, ["which digit is red?"] * 2, [[Image.fromarray(p)] for p in pictures])


def dense_bytes(model, prompt: int, batch: int, generated: int) -> int:
    """Keys and values of every layer; the last new token is never put into the cache."""
    text = model.config.get_text_config()
    head_dim = text.hidden_size // text.num_attention_heads
    values = batch * text.num_key_value_heads * (prompt + generated - 1) * head_dim
    return 2 * 4 * values * text.num_hidden_layers


def test_dense_run_counts_every_step_and_byte(model, prompts):
    found = run_once(Arm("dense", model, Full()), prompts, new_tokens=5)
    assert len(found.steps) == 4
    assert found.prefill > 0
    assert (found.steps > 0).all()
    assert found.cache_bytes == dense_bytes(model, prompts["input_ids"].shape[1], batch=2, generated=5)
    assert found.token_ratio == found.visual_token_ratio == 1.0


def test_sparse_run_holds_fewer_bytes(model, prompts):
    dense = run_once(Arm("dense", model, Full()), prompts, new_tokens=3)
    sparse = run_once(Arm("sparse", model, TopP(p=0.3)), prompts, new_tokens=3)
    assert sparse.visual_token_ratio < 0.5
    assert sparse.cache_bytes < 0.7 * dense.cache_bytes
    everything = run_once(Arm("all", model, TopP(p=1.0)), prompts, new_tokens=3)
    assert everything.cache_bytes == dense.cache_bytes


def test_arms_take_turns_in_being_first(model, monkeypatch):
    order = []

    def note(arm, inputs, new_tokens):
        order.append((arm.name, new_tokens))
        return Sample(0.1, np.ones(1), 1, 1.0, 1.0)

    monkeypatch.setattr(efficiency, "run_once", note)
    samples = measure([Arm(name, model, Full()) for name in "abc"], {}, new_tokens=7, repetitions=3)
    assert order[:3] == [("a", 2), ("b", 2), ("c", 2)]  # the untimed round
    assert [name for name, _ in order[3:]] == [*"abc", *"bca", *"cab"]
    assert {name: len(runs) for name, runs in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_taken_within_a_repetition():
    """The machine is twice as slow in the second repetition: the ratio does not notice."""
    dense = [Sample(1.0 * slow, np.array([0.010, 0.010, 0.9]) * slow, 400, 1, 1) for slow in (1, 2, 1)]
    sparse = [Sample(1.5 * slow, np.array([0.005, 0.005, 0.005]) * slow, 100, 0.3, 0.2) for slow in (1, 2, 1)]
    found = summarise({"dense": dense, "sparse": sparse}, baseline="dense")["sparse"]
    assert found["decode_ratio"] == pytest.approx({"median": 0.5, "low": 0.5, "high": 0.5})
    assert found["prefill_ratio"]["median"] == pytest.approx(1.5)
    assert found["decode_ms_per_token"] == pytest.approx({"median": 5.0, "low": 5.0, "high": 7.5})
    assert found["cache_ratio"] == 0.25


def test_one_new_token_has_no_decode_time(model):
    with pytest.raises(ValueError, match="at least 2"):
        measure([Arm("a", model, Full())], {}, new_tokens=1, repetitions=1)
