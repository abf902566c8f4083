"""Saved tensors in one arena: bit-equal gradients, no overlap, a size near the live bytes, one step at a time."""

import copy
import itertools

import pytest
import torch
from tests.layers.small_language_model import Layer
from torch import nn

from slimgrad import Ledger
from slimgrad.arena import overlapping
from slimgrad.errors import ArgumentError, PlanError
from slimgrad.layers.saved_arena import SavedArena
from slimgrad.types import Column


def mlp(width=24):
    return nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, width), nn.Tanh())  # fmt: skip


def conv():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))


CASES = {
    "mlp": (lambda: [mlp() for _ in range(6)], (8, 24)),
    "transformer": (lambda: [Layer(32, 4) for _ in range(6)], (2, 16, 32)),
    "conv": (lambda: [conv() for _ in range(6)], (3, 4, 8, 8)),
}


def step(chain, x):
    torch.manual_seed(3)
    out = chain(x)
    out.square().mean().backward()
    found = [x.grad, *(p.grad for p in chain.parameters())]
    x.grad = None
    chain.zero_grad()
    return [out.detach(), *found, *(b.clone() for b in chain.buffers())]


def assert_same_bits(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("num_segments", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_bit_equal_and_the_arena_is_near_the_bound(case, num_segments):
    torch.manual_seed(0)
    blocks, shape = CASES[case][0](), CASES[case][1]
    plain = nn.Sequential(*copy.deepcopy(blocks))
    chain = SavedArena(blocks, num_segments)
    for _ in range(4):
        x = torch.randn(shape, requires_grad=True)
        assert_same_bits(step(chain, x), step(plain, x))
    assert overlapping(chain.lifetimes, chain.arena.offsets) == []
    assert chain.bound_bytes <= chain.arena.nbytes <= 1.05 * chain.bound_bytes
    assert chain.arena.nbytes <= chain.first_fit_bytes
    if num_segments > 1:  # places are used again
        assert chain.arena.nbytes < 0.75 * chain.lifetimes.total_bytes
    else:
        assert chain.bound_bytes == chain.lifetimes.total_bytes


def saved_tensors(out):
    """Every tensor that the graph of ``out`` has saved."""
    stack, met, found = [out.grad_fn], set(), []
    while stack:
        node = stack.pop()
        if node is None or node in met:
            continue
        met.add(node)
        names = [n for n in dir(node) if n.startswith("_saved_")]
        found += [t for n in names if isinstance(t := getattr(node, n), torch.Tensor)]
        stack += [n for n, _ in node.next_functions]
    return found


def test_what_is_saved_lies_in_the_arena_without_overlap():
    torch.manual_seed(0)
    chain, x = SavedArena([Layer(32, 4) for _ in range(3)]), torch.randn(2, 16, 32)
    for _ in range(2):
        step(chain, x.requires_grad_())
    out = chain(x)
    begin = chain._memory.data_ptr()
    own = {t.untyped_storage().data_ptr() for t in (x, *chain.parameters())}
    saved = [t for t in saved_tensors(out) if t.untyped_storage().data_ptr() not in own]
    assert len(saved) > 30
    assert all(t.untyped_storage().data_ptr() == begin for t in saved)
    spans = sorted({(t.data_ptr(), t.data_ptr() + t.nbytes) for t in saved if t.is_contiguous()})
    assert len(spans) > 20
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert end <= start
    assert spans[-1][1] <= begin + chain._memory.nbytes


def test_nothing_saved_is_allocated_beside_the_arena():
    torch.manual_seed(0)
    chain, x = SavedArena([Layer(32, 4) for _ in range(6)], 3), torch.randn(4, 32, 32)
    plain = nn.Sequential(*[Layer(32, 4) for _ in range(6)])
    for _ in range(2):
        step(chain, x.requires_grad_())
    held = {}
    for name, model in (("arena", chain), ("plain", plain)):
        with Ledger(model, inputs=x) as ledger:
            out = model(x)
            weights = ledger.columns[Column.WEIGHTS]
            held[name] = ledger.now_bytes - weights - x.nbytes - out.nbytes
        del out
    assert held["arena"] <= chain.arena.nbytes + 2**12
    assert held["arena"] < 0.6 * held["plain"]


def test_one_step_at_a_time():
    torch.manual_seed(0)
    chain, x = SavedArena([mlp(), mlp()]), torch.randn(4, 24)
    step(chain, x.requires_grad_())
    step(chain, x)
    out = chain(x)
    with pytest.raises(PlanError, match="before the next forward pass"):
        chain(x)
    del out  # its graph is gone
    step(chain, x)
    with torch.no_grad():
        assert not chain(x).requires_grad


def test_a_graph_that_is_retained_beyond_its_places_is_told():
    torch.manual_seed(0)
    chain, x = SavedArena([mlp() for _ in range(6)], 3), torch.randn(4, 24)
    chain(x)  # without a backward pass there is nothing to plan for
    for _ in range(2):
        step(chain, x.requires_grad_())
    out = chain(x)
    with pytest.raises(PlanError, match="do not retain"):
        out.sum().backward(retain_graph=True)
    del out
    step(chain, x)


class Forking(nn.Module):
    def forward(self, x):
        return x.sin() if float(x.detach().sum()) > 0 else x.exp().sin() * x


def test_steps_unlike_the_first_are_refused():
    chain = SavedArena([mlp()])
    for _ in range(2):
        step(chain, torch.randn(4, 24, requires_grad=True))
    with pytest.raises(PlanError, match="make another"):
        chain(torch.randn(5, 24, requires_grad=True))
    chain = SavedArena([nn.Sequential(Forking(), nn.Linear(4, 4))])
    for _ in range(2):
        step(chain, torch.ones(3, 4, requires_grad=True))
    with pytest.raises(PlanError, match="path depends on the inputs"):
        step(chain, -torch.ones(3, 4, requires_grad=True).detach().requires_grad_())
    with pytest.raises(ArgumentError, match="between 1 and 2"):
        SavedArena([mlp(), mlp()], 3)
