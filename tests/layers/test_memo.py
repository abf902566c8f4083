"""Tokens swapped and recomputed: autograd's gradients, bytes that follow alpha, files, and the packed arena."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from slimgrad import Ledger
from slimgrad.arena import layouts, overlapping
from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.layers.llama_halves import After, Before
from slimgrad.layers.memo import Memo
from slimgrad.storage.choosing import open_store
from slimgrad.types import Column

transformers = pytest.importorskip("transformers")
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def smollm2(dtype=torch.float64, width=36, layers=3, vocabulary=128):
    """SmolLM2's architecture: three key/value heads for nine heads, tied embeddings, width to hidden as 3 to 8."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, intermediate_size=8 * width // 3, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).train()


def ids_of(length=23, num=2):
    return torch.randint(128, (num, length), generator=torch.Generator().manual_seed(1))


def gradients(model, ids):
    loss = model(input_ids=ids, labels=ids).loss
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_gradients_are_autograds(alpha):
    model, ids = smollm2(), ids_of()
    loss, expected = gradients(model, ids)
    undo = Memo.on(model, alpha, min_bytes=64)
    ours, found = gradients(model, ids)
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=0)
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-13)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(0.9 * found[0], expected[0], rtol=1e-10, atol=1e-13)
    undo()
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, ids)[1], expected, strict=True))


class Step:
    """A chain of layers alone, under a loss: what is measured is the layers'."""

    def __init__(self, alpha, folder, length=256, width=144, layers=3):
        self.model = smollm2(torch.float32, width, layers)
        self.x = torch.randn(1, length, width, requires_grad=True)
        self.place = self.model.model.rotary_emb(self.x, torch.arange(length)[None])
        store = open_store(torch.device("cpu"), folder)
        self.memos = [
            Memo(Before(layer), After(layer), alpha, scale=layer.self_attn.scaling, store=store)
            for layer in self.model.model.layers
        ]
        self.store = store
        self.borders = []

    def run(self, ledger=None):
        h = self.x
        for memo in self.memos:
            if ledger is not None:
                self.borders.append(ledger.num_operations + 1)
            h = memo(h, along=self.place)
        self.held = ledger.now_bytes if ledger is not None else 0
        h.square().mean().backward()

    def measured(self):
        self.run()
        self.file_bytes = self.store.file_bytes  # of one step: nothing was free to be used again
        self.model.zero_grad()
        self.x.grad = None
        with Ledger(self.model, inputs=(self.x, *self.place)) as ledger:
            self.run(ledger)
        return ledger


def test_peak_and_files_follow_alpha(tmp_path):
    peaks, activations, files, held = [], [], [], []
    for alpha in ALPHAS:
        step = Step(alpha, tmp_path)
        ledger = step.measured()
        peaks.append(ledger.peak_bytes)
        activations.append(ledger.columns[Column.ACTIVATIONS])
        files.append(step.file_bytes)
        held.append(step.held)
    assert max(held) - min(held) <= 16 * 1024  # between forward and backward: nothing of either
    for values, sign in ((activations, -1), (files, 1)):
        steps = np.diff(values) * sign
        assert (steps > 0).all()
        assert steps.max() <= 1.05 * steps.min()  # a straight line in alpha
    fall = -np.diff(peaks)[1:]  # at alpha = 0 and 1 there are no two parts to be joined
    assert fall[0] > 0
    assert fall[1] == pytest.approx(fall[0], rel=0.1)
    assert fall[2] >= fall[1]


def test_what_is_always_swapped_is_the_input_and_attention(tmp_path):
    nothing, everything = (Step(a, tmp_path) for a in (0.0, 1.0))
    nothing.measured()
    everything.measured()
    length, width, heads = 256, 144, 9
    always = 4 * length * (2 * width + heads)  # x, attention, log-sum-exp
    assert nothing.file_bytes == pytest.approx(3 * always, rel=0.05)
    assert everything.file_bytes > 4 * nothing.file_bytes


def test_the_plain_chain_saves_far_more(tmp_path):
    step = Step(0.5, tmp_path)
    lean = step.measured()
    plain = Step(0.5, tmp_path)

    def run():
        h = plain.x
        for layer in plain.model.model.layers:
            h = layer(h, position_embeddings=plain.place)
        h.square().mean().backward()

    run()
    plain.model.zero_grad()
    plain.x.grad = None
    with Ledger(plain.model, inputs=plain.x) as ledger:
        run()
    torch.testing.assert_close(plain.x.grad, step.x.grad, rtol=1e-3, atol=1e-7)
    assert lean.columns[Column.ACTIVATIONS] < 0.2 * ledger.columns[Column.ACTIVATIONS]
    assert lean.peak_bytes < 0.75 * ledger.peak_bytes


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_the_packed_arena_is_near_the_bound_and_below_first_fit(alpha, tmp_path):
    step = Step(alpha, tmp_path, length=192)
    lifetimes = step.measured().lifetimes.aligned()
    found = layouts(lifetimes, sorted(set(step.borders)))
    best = found[0]
    first_fit = next(a for a in found if a.rule == "first fit")
    assert overlapping(lifetimes, best.offsets) == []
    assert lifetimes.bound <= best.nbytes <= 1.05 * lifetimes.bound
    assert best.nbytes < first_fit.nbytes


class Dropping(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.linear, self.drop = nn.Linear(width, 3 * width), nn.Dropout(0.4)

    def forward(self, x):
        return [t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.drop(self.linear(x)).chunk(3, -1)]  # fmt: skip


class Adding(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.linear, self.drop = nn.Linear(width, width), nn.Dropout(0.3)

    def forward(self, x, attended):
        return x + self.drop(self.linear(attended.transpose(1, 2).flatten(2)).relu())


def test_dropout_is_that_of_the_first_run():
    torch.manual_seed(0)
    memo = Memo(Dropping(), Adding(), 0.0, min_bytes=64).double()
    x = torch.randn(2, 11, 16, dtype=torch.float64, requires_grad=True)
    inputs = [x, *memo.parameters()]
    found = []
    for alpha in (0.0, 1.0):  # all recomputed, against the graph of the first run itself
        memo.alpha = alpha
        torch.manual_seed(5)
        out = memo(x)
        torch.rand(3)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), inputs)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert memo.eval()(x).requires_grad


def test_without_gradients_nothing_is_written(tmp_path):
    step = Step(0.5, tmp_path, length=64)
    with torch.no_grad():
        out = step.memos[0](step.x, along=step.place)
    assert step.store.file_bytes == 0
    torch.testing.assert_close(out, step.memos[0](step.x, along=step.place).detach())


def test_deep_copies_have_their_own_weights():
    model, ids = smollm2(), ids_of()
    Memo.on(model, 0.5, min_bytes=64)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    plain = smollm2()
    torch.testing.assert_close(gradients(other, ids)[0], gradients(plain, ids)[0])


def test_the_share_whose_writes_hide_behind_the_layer():
    assert Memo.share_that_hides(100, 1000, 1.0, 600.0) == 0.5
    assert Memo.share_that_hides(100, 1000, 9.0, 600.0) == 1.0
    assert Memo.share_that_hides(100, 1000, 0.1, 600.0) == 0.0
    assert Memo.share_that_hides(100, 1000, 9.0, 600.0, num_layers=4, host_bytes=1200) == 0.2


def test_what_it_cannot_do_is_refused():
    with pytest.raises(MethodError, match="in \\[0, 1\\]"):
        Memo(Dropping(), Adding(), 1.5)
    with pytest.raises(MethodError, match="span the sequence"):
        Memo(nn.BatchNorm1d(4), Adding())
    with pytest.raises(MethodError, match="queries, keys and values"):
        Memo(nn.Linear(16, 16), Adding())(torch.randn(1, 4, 16))
    with pytest.raises(UnsupportedError, match="Llama-like"):
        Memo.on(nn.Linear(2, 2))
    model = smollm2()
    Memo.on(model)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(UnsupportedError, match="without a mask"):
        model.model.layers[0](torch.randn(1, 4, 36), attention_mask=mask)
    memo = Memo(Dropping(), Adding(), 0.5)
    x = torch.randn(1, 4, 16, requires_grad=True)
    out = memo(x).sum()
    out.backward(retain_graph=True)
    with pytest.raises(MethodError, match="one backward pass"):
        out.backward()
    (grad,) = torch.autograd.grad(memo(x).square().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="double backward"):
        grad.sum().backward()
