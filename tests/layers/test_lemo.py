"""Tokens left out of layers: the plain model with none, autograd's gradients of the kept ones, bytes, recall, learning."""

import pytest
import torch
from tests.layers.small_language_model import windows
from torch import nn

from slimgrad import Ledger
from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.layers.lemo import LeMo, picked
from slimgrad.layers.token_predictor import attention_shares, beside_position, recall
from slimgrad.types import Column

transformers = pytest.importorskip("transformers")


def llama(layers=4, dtype=torch.float64, width=32, vocabulary=128):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=3 * width, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).train()


def ids_of(num=3, length=12, seed=0):
    return windows(num, length, torch.Generator().manual_seed(seed))[:, :-1]


def gradients(model, loss):
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def plain_gradients(model, ids):
    return gradients(model, model(input_ids=ids, labels=ids).loss)


def lemo_gradients(lemo, ids):
    return gradients(lemo.model, lemo.loss(lemo.model(input_ids=ids).logits, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_nothing_left_out_it_is_the_plain_model(dtype):
    model, ids = llama(dtype=dtype), ids_of()
    loss, expected = plain_gradients(model, ids)
    lemo = LeMo(model, {0: 1.0, 2: 1.0}, block=4)
    found_loss, found = lemo_gradients(lemo, ids)
    assert lemo.kept is None
    torch.testing.assert_close(found_loss, loss)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def all_tokens(number, h, num_all):
    return torch.arange(h.shape[1]).expand(len(h), -1)


def test_all_tokens_picked_have_autograds_gradients():
    model, ids = llama(), ids_of()
    loss, expected = plain_gradients(model, ids)
    lemo = LeMo(model, {1: 0.5, 3: 0.25}, block=4)
    lemo.chosen = all_tokens
    found_loss, found = lemo_gradients(lemo, ids)
    assert lemo.kept.shape == ids.shape
    torch.testing.assert_close(found_loss, loss)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # its norms are computed in float32


def test_kept_tokens_are_a_sequence_of_their_own():
    """From the first layer on: the plain model on these tokens, at their positions."""
    model, ids = llama(), ids_of(2, 16)
    kept = torch.tensor([[0, 1, 6, 7, 8], [0, 3, 4, 9, 15]])
    lemo = LeMo(model, {0: 0.5}, block=2)
    lemo.chosen = lambda number, h, num_all: kept
    found_loss, found = lemo_gradients(lemo, ids)
    lemo.undo()
    logits = model(input_ids=ids.gather(1, kept), position_ids=kept).logits
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1).gather(1, kept)
    loss, expected = gradients(
        model, nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    )
    torch.testing.assert_close(found_loss, loss)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_later_stages_choose_among_what_is_left():
    model, ids = llama(), ids_of(2, 33)
    lemo = LeMo(model, {1: 0.5, 2: 0.25}, block=4, choice="random")
    logits = model(input_ids=ids).logits
    kept = lemo.kept
    assert kept.shape == logits.shape[:2] == (2, 2 * 4 + 1)  # and the one left over
    assert (kept[:, :4] == torch.arange(4)).all()
    assert (kept[:, -1] == 32).all()
    assert (kept[:, 1:] > kept[:, :-1]).all()
    assert (kept[:, 4:8] % 4 == torch.arange(4)).all()
    assert not lemo._along


def test_which_blocks_are_chosen():
    lemo, h = LeMo(llama(), {1: 0.5}, block=2), torch.randn(2, 12, 32).double()
    lemo.predictors[1] = lambda h: h[..., 0]
    index = lemo.chosen(1, h, 12)
    blocks = h[..., 0].unflatten(1, (6, 2)).mean(-1)
    blocks[:, 0] = torch.inf
    best = blocks.topk(3, dim=1).indices.sort(1).values
    assert torch.equal(index, torch.stack([2 * best, 2 * best + 1], -1).flatten(1))


def test_masks_and_positions_are_picked():
    index = torch.tensor([[0, 2], [1, 3]])
    mask, cosines = torch.randn(2, 1, 4, 4), torch.randn(1, 4, 5)
    found = picked(
        {"attention_mask": mask, "position_embeddings": (cosines, cosines), "other": 3}, index
    )
    for i, kept in enumerate(index):
        assert torch.equal(found["attention_mask"][i, 0], mask[i, 0][kept][:, kept])
        assert torch.equal(found["position_embeddings"][1][i], cosines[0, kept])
    assert found["other"] == 3
    with pytest.raises(UnsupportedError, match="4-d attention mask"):
        picked({"attention_mask": torch.ones(1, 4)}, index)


def test_shares_of_attention_and_recall_by_hand():
    even = torch.tril(torch.ones(5, 5)) / torch.arange(1, 6)[:, None]
    torch.testing.assert_close(attention_shares(even[None, None]).exp(), torch.full((1, 5), 1.001))
    first = torch.zeros(1, 2, 4, 4)
    first[..., 0] = 1.0
    assert attention_shares(first).argmax(1).tolist() == [0]
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert recall(torch.tensor([[0, 2]]), scores) == 0.5


def held(layers, share, ids):
    """Activation bytes of a step that trains queries' projections; ``share`` None: the plain model."""
    model = llama(layers, torch.float32)
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name)
    lemo = None if share is None else LeMo(model, {1: share}, block=4, choice="random")
    with Ledger(model, inputs=ids) as ledger:
        logits = model(input_ids=ids).logits
        loss = (
            nn.functional.cross_entropy(logits.mT, ids) if lemo is None else lemo.loss(logits, ids)
        )
        loss.backward()
    return ledger.columns[Column.ACTIVATIONS]


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_layers_activations_are_its_tokens(share):
    ids = ids_of(2, 64)
    plain, kept = (held(6, s, ids) - held(4, s, ids) for s in (None, share))
    assert kept == share * plain
    assert held(6, None, ids) > 1.5 * held(6, share, ids)


def test_fit_finds_what_is_attended_to():
    """Attention in this untrained model follows tokens' keys: predictors do better than chance."""
    model = llama(dtype=torch.float32)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.q_proj.weight, std=0.5)
        nn.init.normal_(layer.self_attn.k_proj.weight, std=0.5)
    lemo = LeMo(model, {1: 0.5, 2: 0.25}, block=2)
    implementation = model.config._attn_implementation
    with pytest.raises(UnsupportedError, match="call fit"):
        model(input_ids=ids_of())
    batches = [{"input_ids": ids_of(16, 32, seed)} for seed in range(4)]
    found = lemo.fit(batches)
    assert list(found) == [1, 2]
    assert found[1] > 0.55
    assert found[2] > 0.3
    assert model.config._attn_implementation == implementation
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    lemo_gradients(lemo, ids_of())


def test_undo_evaluation_and_names():
    model, ids = llama(), ids_of()
    keys, use_cache, (loss, expected) = (
        list(model.state_dict()),
        model.config.use_cache,
        plain_gradients(model, ids),
    )
    lemo = LeMo(model, {1: 0.5}, block=2, choice="random")
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, loss, rtol=0, atol=0)
    assert not torch.equal(lemo_gradients(lemo, ids)[0], loss)
    lemo.undo()
    assert model.config.use_cache == use_cache
    found_loss, found = plain_gradients(model, ids)
    assert torch.equal(found_loss, loss)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_padding_is_masked():
    model, ids = llama(), ids_of(3, 12)
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    lemo = LeMo(model, {0: 0.5}, block=4)
    lemo.chosen = all_tokens
    found = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    lemo.undo()
    torch.testing.assert_close(found, model(input_ids=ids[:, :-1]).logits, rtol=1e-6, atol=1e-7)


def test_what_it_refuses():
    for stages in ({}, {4: 0.5}, {1: 0.0}, {1: 0.5, 2: 0.7}):
        with pytest.raises(MethodError, match="whose shares fall"):
            LeMo(llama(), stages)
    with pytest.raises(MethodError, match="choice 'predicted' or 'random'"):
        LeMo(llama(), {1: 0.5}, choice="first")
    with pytest.raises(UnsupportedError, match="no list of layers"):
        LeMo(nn.Linear(2, 2), {0: 0.5})
    model = llama()
    lemo = LeMo(model, {1: 0.5}, block=2, choice="random")
    with pytest.raises(UnsupportedError, match="without a key-value cache"):
        model(input_ids=ids_of(), use_cache=True)
    with pytest.raises(UnsupportedError, match="two batches or more"):
        lemo.fit([{"input_ids": ids_of()}])
    with pytest.raises(UnsupportedError, match="keyword arguments of the model"):
        lemo.fit([ids_of(), ids_of()])
    with pytest.raises(UnsupportedError, match="logits of all tokens"):
        lemo.loss(torch.randn(3, 5, 128), ids_of())


def test_no_place_in_a_text_is_preferred():
    by_place, texts = torch.arange(6.0), [torch.randn(3, 6), torch.randn(2, 4)]
    found = beside_position([score + 10 * by_place[: score.shape[1]] for score in texts])
    assert torch.cat([score[:, :4] for score in found]).mean(0).abs().max() < 1e-5
    assert found[0][:, 4:].mean(0).abs().max() < 1e-5
    for score, original in zip(found, texts, strict=True):
        between = original[1] - original[0]  # what texts differ in stays
        assert torch.allclose(score[1] - score[0], between, atol=1e-4)
