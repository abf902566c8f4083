"""Blocks of tokens against the whole layer; what is saved; the longest sequence under a budget."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.layers.plain_attention import assert_same, gradients, normal
from tests.layers.plain_transformer import PlainTransformer, make_layer, plain_layer
from torch import nn

from slimgrad import Ledger
from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.layers.blockwise_transformer import BlockwiseTransformer
from slimgrad.types import Column


class Answering(nn.Module):
    """Returns the same whatever it is given."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, *inputs):
        return self.answer


def leaves_of(layer, *tensors):
    return [*tensors, *(p for p in layer.parameters() if p.requires_grad)]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 11),
    num_groups=st.sampled_from([1, 2]),
    block_size=st.sampled_from([1, 3, 4, 100]),
    key_chunk=st.sampled_from([2, 5, 100]),
    is_causal=st.booleans(),
    masked=st.booleans(),
    biased=st.sampled_from([None, (2, 11, 11), (1, 1, 11)]),
    keep_attention=st.booleans(),
    rotary=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_plain_layer(
    batch,
    length,
    num_groups,
    block_size,
    key_chunk,
    is_causal,
    masked,
    biased,
    keep_attention,
    rotary,
    seed,
):
    layer = make_layer(
        num_groups=num_groups,
        block_size=block_size,
        key_chunk=key_chunk,
        is_causal=is_causal,
        keep_attention=keep_attention,
    )
    x = normal(batch, length, 12, seed=seed)
    mask = normal(batch, 1, 1, length, seed=seed, grad=False) > -0.8 if masked else None
    bias = None if biased is None else normal(*(min(n, length) if n == 11 else n for n in biased))
    along = [normal(length, 6, seed=i, grad=False) for i in range(2)] if rotary else []
    leaves = leaves_of(layer, x, *([] if bias is None else [bias]))
    found = layer(x, mask, bias=bias, along=along)
    plain = plain_layer(layer, x, mask, bias, along)
    assert_same([found], [plain])
    assert_same(gradients(found, leaves), gradients(plain, leaves))


@pytest.mark.parametrize("keep_attention", [False, True])
def test_dropout_in_the_feed_forward_is_drawn_again(keep_attention):
    layer = make_layer(dropout=0.4, block_size=4, keep_attention=keep_attention)
    x = normal(2, 11, 12)
    leaves = leaves_of(layer, x)
    torch.manual_seed(3)
    plain = plain_layer(layer, x, block=4)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    found = layer(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same([found], [plain])
    torch.rand(7)  # the generator has moved on when backward comes
    state = torch.get_rng_state()
    assert_same(gradients(found, leaves), gradients(plain, leaves))
    assert torch.equal(torch.get_rng_state(), state)


def test_gradcheck_with_dropout_in_attention_too():
    layer = make_layer(width=4, dropout=0.3, dropout_p=0.3, block_size=2, key_chunk=3)

    def run(x, bias):
        torch.manual_seed(5)
        return layer(x, bias=bias)

    assert torch.autograd.gradcheck(run, (normal(1, 5, 4), normal(2, 5, 5)))
    x = normal(1, 5, 4)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert_same([layer(x)], [plain_layer(layer, x)])


def test_incoming_gradients_are_left_alone():
    class Passing(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(1, 1, 12, dtype=torch.float64))

        def forward(self, x, attended):
            return x + attended.transpose(1, 2).flatten(2) + self.shift

    base = make_layer()
    layer = BlockwiseTransformer(base.queries, base.keys_values, Passing(), block_size=1)
    x, grad = normal(1, 3, 12), normal(1, 3, 12, seed=9, grad=False)
    before = grad.clone()
    found = torch.autograd.grad(layer(x), leaves_of(layer, x), grad)
    assert torch.equal(grad, before)
    assert_same(found, torch.autograd.grad(plain_layer(layer, x), leaves_of(layer, x), grad))


def test_frozen_and_shared_weights_and_two_calls_before_backward():
    layer = make_layer(block_size=4)
    layer.finish.mlp.requires_grad_(False)
    layer.keys_values.keys.project = layer.queries.project
    x = normal(2, 9, 12)
    leaves = leaves_of(layer, x)
    found, plain = layer(layer(x)), plain_layer(layer, plain_layer(layer, x))
    assert_same(gradients(found, leaves), gradients(plain, leaves))
    layer(x.detach()).sum().backward()
    assert layer.finish.out.weight.grad is not None
    assert layer.finish.mlp[0].weight.grad is None


def test_a_weight_changed_before_backward_is_an_error():
    layer = make_layer(block_size=4)
    out = layer(normal(1, 9, 12))
    with torch.no_grad():
        layer.finish.out.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_under_autocast_backward_runs_under_the_same():
    layer = make_layer(dtype=torch.float32, block_size=4)
    x = normal(2, 9, 12, dtype=torch.float32)
    leaves = leaves_of(layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, plain = layer(x), plain_layer(layer, x)
    assert found.dtype == plain.dtype
    truth = plain_layer(layer, x)
    mine, theirs, true = (gradients(y, leaves) for y in (found, plain, truth))
    for a, b, c in zip(mine, theirs, true, strict=True):
        assert a.dtype == b.dtype
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-6
    assert any((a - c).norm() > 1e-5 * c.norm() for a, c in zip(mine, true, strict=True))


def test_a_second_backward_pass_works_and_a_double_backward_is_refused():
    layer = make_layer(block_size=4)
    x = normal(1, 9, 12)
    out = layer(x)
    (first,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(UnsupportedError, match=r"blockwise_transformer.*double backward"):
        torch.autograd.grad(second.sum(), layer.finish.out.weight)


@pytest.mark.parametrize("keep_attention", [False, True])
def test_what_is_saved_is_the_input(keep_attention):
    layer = make_layer(dtype=torch.float32, block_size=8, keep_attention=keep_attention)
    x = normal(2, 32, 12, dtype=torch.float32)
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    found = sum(nbytes for place, nbytes in saved.items() if place not in weights)
    attention = 2 * 32 * (12 + 2) * 4 if keep_attention else 0
    assert found == 2 * 32 * 12 * 4 + attention


def counted(model, shape):
    """The ledger of a forward and backward pass from an input of ``shape``."""
    with Ledger(model) as ledger:
        x = torch.zeros(shape, requires_grad=True)
        torch.autograd.grad(model(x).sum(), leaves_of(model, x))
    return ledger


def stack(depth, form, width=32, num_heads=8):
    options = {"dtype": torch.float32, "block_size": 64, "key_chunk": 128}
    layers = [make_layer(width, num_heads, **options) for _ in range(depth)]
    return nn.Sequential(*layers) if form == "blockwise" else PlainTransformer(layers, form)


def test_each_further_layer_saves_its_input_and_nothing_else():
    saved = [
        counted(stack(depth, "blockwise"), (2, 200, 32)).columns[Column.ACTIVATIONS]
        for depth in (2, 4, 6)
    ]
    assert saved[1] - saved[0] == saved[2] - saved[1] == 2 * 2 * 200 * 32 * 4


def peak(form, length, depth):
    return counted(stack(depth, form), (1, length, 32)).peak_bytes


def test_twice_the_sequence_of_tiled_attention_and_eight_times_that_of_whole_scores():
    """Each budget is what another form takes for a length: the blockwise layer takes 2 and 8 times that length."""
    assert peak("blockwise", 2 * 384, 2) <= peak("tiled", 384, 2)
    assert peak("blockwise", 8 * 128, 2) <= peak("whole", 128, 2)
    assert peak("tiled", 8 * 128, 2) > peak("whole", 128, 2)  # so the budget is a tight one


def longest(form, depth, budget, step):
    """The most tokens, a multiple of ``step``, whose peak is within the budget: by Newton's method on the peak."""

    @functools.cache
    def at(number):
        return peak(form, number * step, depth)

    number = 4
    while not at(number) <= budget < at(number + 1):
        slope = max(1, at(number + 1) - at(number))
        number = max(1, number + (budget - at(number)) // slope)
    return number * step


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 3])
def test_the_longest_sequence_under_three_mebibytes(depth):
    budget = 3 * 2**20
    steps = {"whole": 8, "tiled": 64, "blockwise": 64}
    found = {form: longest(form, depth, budget, step) for form, step in steps.items()}
    assert found["blockwise"] >= 2 * found["tiled"]
    assert found["blockwise"] >= 8 * found["whole"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": lambda x: x}, "queries to be an nn.Module, found function"),
        ({"finish": nn.Sequential(nn.BatchNorm1d(3))}, "finish to treat every token alone"),
        ({"keys_values": nn.Identity()}, "keys_values to return keys and values"),
        ({"queries": nn.Identity()}, "queries of"),
        ({"finish": Answering(torch.zeros(1, 2))}, "finish to return"),
        ({"dropout_p": -1.0}, "dropout_p"),
        ({"block_size": 0}, "at least one token"),
        ({"x": normal(9, 12)}, "batch, tokens, features"),
        ({"x": normal(1, 0, 12)}, "at least one token"),
        ({"attn_mask": torch.ones(8, 9) > 0}, r"broadcasts to \(1, heads, 9, 9\)"),
        ({"bias": torch.ones(3, 9, 9)}, "1 or 2 heads"),
        ({"along": [torch.ones(8, 6)]}, "along"),
        ({"along": [normal(9, 6)]}, "requires_grad=True"),
    ],
)
def test_what_does_not_fit_is_told(change, message):
    base = make_layer()
    given = {"x": normal(1, 9, 12)} | change
    stages = [given.pop(name, getattr(base, name)) for name in ("queries", "keys_values", "finish")]
    options = {name: given.pop(name) for name in ("dropout_p", "block_size") if name in given}
    with pytest.raises(MethodError, match=message):
        BlockwiseTransformer(*stages, **options)(given.pop("x"), **given)
