"""The fused loop gives what `model.generate` gives inside `sparse_attention`."""

from __future__ import annotations

import pytest
import torch
from tiny_prompts import TEXT_ONLY, encode, mixed_questions, question, sharp_model

from sparsity_forcing import sparse_attention, sparse_generate
from sparsity_forcing.generation.loop import Sampling, draw
from sparsity_forcing.models.families import FAMILIES

KINDS = [("suffix", "text"), ("dense", "text"), ("sparse", "probe"), ("sparse", "all"), ("suffix", "all")]


def by_generate(model, inputs: dict, p, tokens: int = 6, **settings):
    """New tokens and statistics of transformers' own loop."""
    with sparse_attention(model, p=p, **settings) as stats, torch.no_grad():
        found = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return found[:, inputs["input_ids"].shape[1] :], stats


@pytest.mark.parametrize("prefill, scoring_rows", KINDS)
def test_greedy_answers_of_a_mixed_batch(tiny, prefill, scoring_rows):
    model, processor = tiny
    inputs = encode(processor, mixed_questions())
    p = torch.tensor([0.5, 0.7, 0.9, 0.6])
    expected, stats = by_generate(model, inputs, p, prefill=prefill, scoring_rows=scoring_rows)
    found = sparse_generate(model, inputs, p, max_new_tokens=6, prefill=prefill, scoring_rows=scoring_rows)
    pad = model.generation_config.pad_token_id
    assert torch.equal(found.tokens.masked_fill(~found.mask, pad), expected)
    torch.testing.assert_close(found.stats.layer_ratio, stats.layer_ratio)
    assert found.logps.masked_select(found.mask).max() <= 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model, processor = sharp_model(family)
    inputs = encode(processor, [question(6), TEXT_ONLY])
    expected, _ = by_generate(model, inputs, 0.6)
    found = sparse_generate(model, inputs, 0.6, max_new_tokens=6)
    assert torch.equal(found.tokens.masked_fill(~found.mask, model.generation_config.pad_token_id), expected)


def test_a_group_shares_its_prefix_and_gets_what_each_gets_alone(tiny):
    model, processor = tiny
    inputs = encode(processor, mixed_questions()[:2])
    p = torch.tensor([0.5, 0.7, 0.9, 0.4, 0.6, 1.0])
    together = sparse_generate(model, inputs, p, num_return_sequences=3, max_new_tokens=5)
    for row in range(6):
        alone = sparse_generate(
            model, encode(processor, [mixed_questions()[row // 3]]), float(p[row]), max_new_tokens=5
        )
        assert torch.equal(together.tokens[row][together.mask[row]], alone.tokens[0][alone.mask[0]])
        torch.testing.assert_close(together.stats.layer_ratio[:, row], alone.stats.layer_ratio[:, 0])


def test_rows_stop_by_themselves(tiny):
    model, processor = tiny
    inputs = encode(processor, mixed_questions())
    free = sparse_generate(model, inputs, 0.8, max_new_tokens=6)
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = int(free.tokens[1, 2])
    try:
        stopped = sparse_generate(model, inputs, 0.8, max_new_tokens=6)
    finally:
        model.generation_config.eos_token_id = before
    for row in range(4):
        answer = free.tokens[row].tolist()
        place = answer.index(free.tokens[1, 2]) + 1 if int(free.tokens[1, 2]) in answer else 6
        width = stopped.mask.shape[1]
        assert stopped.tokens[row][stopped.mask[row]].tolist() == answer[:place]
        assert stopped.mask[row].tolist() == [column < place for column in range(width)]
        assert bool(stopped.truncated[row]) == (place == 6 and answer[-1] != int(free.tokens[1, 2]))


def test_samples_are_those_of_multinomial():
    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(0.7, 1, (), 0, torch.tensor([3, 5]))
    found = draw(logits, sampling, torch.Generator().manual_seed(2))
    probabilities = torch.softmax(logits.index_fill(1, torch.tensor([3, 5]), -torch.inf) / 0.7, -1)
    expected = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(2))[:, 0]
    assert torch.equal(found, expected)


def test_images_are_never_sampled(tiny):
    model, processor = tiny
    found = sparse_generate(
        model,
        encode(processor, [question(6)] * 2),
        0.8,
        num_return_sequences=16,
        temperature=50.0,
        max_new_tokens=8,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(found.tokens.unique()) > 20
    assert not bool(torch.isin(found.tokens, torch.tensor([model.config.image_token_id])).any())


def test_what_is_wrong_is_named(tiny):
    model, processor = tiny
    inputs = encode(processor, [question(6)])
    with pytest.raises(ValueError, match="2 budgets for 3 answers"):
        sparse_generate(model, inputs, torch.tensor([0.5, 0.6]), num_return_sequences=3)
    with pytest.raises(ValueError, match=r"budget p must be in \(0, 1\]"):
        sparse_generate(model, inputs, 0.0)
    with pytest.raises(ValueError, match="needs a generator"):
        sparse_generate(model, inputs, temperature=1.0)
    with pytest.raises(ValueError, match="share no visual prefix"):
        sparse_generate(model, inputs, num_return_sequences=2, prefill="sparse", scoring_rows="probe")
    for name, value in {"max_new_tokens": 0, "num_return_sequences": 0, "temperature": -1.0}.items():
        with pytest.raises(ValueError, match=rf"{name} must be at least \d, got {value}"):
            sparse_generate(model, inputs, **{name: value}, generator=torch.Generator())
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            sparse_generate(model, inputs, cuda_graph=True)
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            sparse_generate(model, inputs)
    finally:
        model.eval()


@pytest.mark.parametrize("settings", [{}, {"prefill": "sparse", "scoring_rows": "probe"}])
def test_padding_on_the_right_is_refused(tiny, settings):
    model, processor = tiny
    inputs = encode(processor, [question(6), TEXT_ONLY])
    flipped = {name: inputs[name].flip(1) for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r'padded on the left: set processor\.tokenizer\.padding_side = "left"'):
        sparse_generate(model, {**inputs, **flipped}, **settings)


def test_without_a_mask_every_token_is_real(tiny):
    model, processor = tiny
    inputs = dict(encode(processor, [question(6)]))
    expected = sparse_generate(model, inputs, 0.6, max_new_tokens=3)
    del inputs["attention_mask"]
    assert torch.equal(sparse_generate(model, inputs, 0.6, max_new_tokens=3).tokens, expected.tokens)


def test_attention_that_is_no_number_is_an_error(tiny):
    model, processor = tiny
    key = model.model.language_model.layers[1].self_attn.k_proj
    handle = key.register_forward_hook(lambda module, args, output: output * torch.nan)
    try:
        with pytest.raises(ValueError, match="attention mass is not finite"):
            sparse_generate(model, encode(processor, [question(6)]), 0.6)
    finally:
        handle.remove()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("stops_after", [3, 8, 13, None])
def test_a_captured_loop_gives_what_the_plain_one_gives(temperature, stops_after):
    model, processor = sharp_model(dtype=torch.float32)
    model.cuda()
    inputs = {name: value.cuda() for name, value in encode(processor, mixed_questions(), torch.float32).items()}
    options = {"max_new_tokens": 20, "temperature": temperature}

    def answers(captured: bool):
        noise = torch.Generator("cuda").manual_seed(5)
        return sparse_generate(model, inputs, 0.8, generator=noise, cuda_graph=captured, **options)

    if stops_after is not None:
        model.generation_config.eos_token_id = int(answers(False).tokens[0, stops_after - 1])
    plain, captured = answers(False), answers(True)
    assert torch.equal(captured.tokens, plain.tokens)
    assert torch.equal(captured.mask, plain.mask)
    torch.testing.assert_close(captured.logps, plain.logps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_prefix_serves_further_questions(family, monkeypatch):
    """Without the vision tower and without another pass over the prefix, the answers are the same."""
    model, processor = sharp_model(family)
    first = [question(4), question(6, "sum"), question(3, "count", images=2), TEXT_ONLY]
    texts = ("read it", "how many of the digits are not red?", "sum", "which?")
    second = encode(processor, [(text, images) for text, (_, images) in zip(texts, first, strict=True)])
    options = {"num_return_sequences": 2, "max_new_tokens": 5}
    p = torch.tensor([0.5, 0.8] * 4)
    expected = sparse_generate(model, second, p, **options)
    asked = sparse_generate(model, encode(processor, first), p, keep_prefix=True, **options)
    assert expected.prefix is None
    plain = sparse_generate(model, encode(processor, first), p, **options)
    assert torch.equal(asked.tokens, plain.tokens)

    monkeypatch.setattr(model, "get_image_features", None)
    for _ in range(2):  # a prefix is not used up
        found = sparse_generate(model, second, p, prefix=asked.prefix, **options)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.logps, expected.logps)
        assert torch.equal(found.stats.layer_ratio, expected.stats.layer_ratio)


def test_a_prefix_of_other_images_is_refused(tiny):
    model, processor = tiny
    kept = sparse_generate(model, encode(processor, [question(6)]), max_new_tokens=1, keep_prefix=True).prefix
    for other in ([question(4)], [question(6, seed=1)], [question(6)] * 2, [TEXT_ONLY]):
        with pytest.raises(ValueError, match="do not begin as those whose visual prefix was kept"):
            sparse_generate(model, encode(processor, other), max_new_tokens=1, prefix=kept)
    other_model, _ = sharp_model()
    with pytest.raises(ValueError, match="kept by another model"):
        sparse_generate(other_model, encode(processor, [question(6)]), max_new_tokens=1, prefix=kept)
    sharing_none = {"prefill": "sparse", "scoring_rows": "probe"}
    for inputs, settings in (([TEXT_ONLY], {}), ([question(6)], sharing_none)):
        with pytest.raises(ValueError, match="no visual prefix to keep"):
            sparse_generate(model, encode(processor, inputs), max_new_tokens=1, keep_prefix=True, **settings)
