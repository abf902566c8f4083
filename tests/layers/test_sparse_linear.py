"""Sparse linear layers: masked dense autograd up to rounding, bytes that follow the nonzeros, and a measured break-even."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimgrad import Ledger
from slimgrad.errors import ArgumentError, MethodError, UnsupportedError
from slimgrad.layers.break_even_sparsity import break_even_sparsity, crossing
from slimgrad.layers.csr_pattern import GRADIENT_COLUMNS, ROWS
from slimgrad.layers.sparse_linear import SparseLinear
from slimgrad.measuring.fake import faked
from slimgrad.measuring.tracker import Tracker
from slimgrad.types import Column


def in_float64(linear):
    return copy.deepcopy(linear).double()


def masked_dense(linear, mask, x, g):
    """Output, input gradient, gradient at the nonzeros and bias gradient of the dense layer with a masked weight."""
    x, weight = x.clone().requires_grad_(), linear.weight.detach().clone().requires_grad_()
    bias = None if linear.bias is None else linear.bias.detach().clone().requires_grad_()
    y = nn.functional.linear(x, weight * mask, bias)
    y.backward(g)
    return y.detach(), x.grad, weight.grad[mask], None if bias is None else bias.grad


def sparse(layer, x, g):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    return y.detach(), x.grad, layer.values.grad, None if layer.bias is None else layer.bias.grad


def assert_close_to(found, dense, truth):
    """At most a few times the dense computation's own distance to float64, or rounding of as many terms as are summed."""
    num_rows = truth[0][..., :1].numel()
    for ours, plain, exact in zip(found, dense, truth, strict=True):
        if exact is None or exact.numel() == 0:
            assert ours is None or ours.shape == exact.shape
            continue
        assert ours.shape == exact.shape
        assert ours.dtype == plain.dtype
        scale = exact.abs().max()
        own = (plain.double() - exact).abs().max()
        rounding = torch.finfo(ours.dtype).eps * (8 * scale + 2 * num_rows)
        assert (ours.double() - exact).abs().max() <= 4 * own + rounding


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([(), (1,), (3,), (ROWS,), (2, ROWS + 5), (GRADIENT_COLUMNS + 3,)]),
    num_inputs=st.integers(1, 40),
    num_outputs=st.integers(1, 40),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.99]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_outputs_and_gradients_are_those_of_the_masked_dense_layer(
    rows, num_inputs, num_outputs, sparsity, bias, dtype
):
    linear = nn.Linear(num_inputs, num_outputs, bias=bias, dtype=dtype)
    layer = SparseLinear.from_dense(linear, sparsity=sparsity)
    mask = layer.to_dense().weight != 0
    assert int(mask.sum()) == max(1, round((1 - sparsity) * linear.weight.numel()))
    x, g = torch.randn(*rows, num_inputs, dtype=dtype), torch.randn(*rows, num_outputs, dtype=dtype)
    truth = masked_dense(in_float64(linear), mask, x.double(), g.double())
    assert_close_to(sparse(layer, x, g), masked_dense(linear, mask, x, g), truth)


@pytest.mark.parametrize("sparsity", [0.9, 0.95])
def test_at_90_to_95_percent_sparsity_a_large_layer_agrees(sparsity):
    linear = nn.Linear(384, 1536)
    layer = SparseLinear.from_dense(linear, sparsity=sparsity)
    mask = layer.to_dense().weight != 0
    x, g = torch.randn(4, 150, 384), torch.randn(4, 150, 1536)
    truth = masked_dense(in_float64(linear), mask, x.double(), g.double())
    found = sparse(layer, x, g)
    assert_close_to(found, masked_dense(linear, mask, x, g), truth)
    with pytest.raises(AssertionError):  # it would see a nonzero left out
        assert_close_to((found[0], found[1], found[2].clone().index_fill_(0, torch.tensor([7]), 0), found[3]),
                        masked_dense(linear, mask, x, g), truth)  # fmt: skip


def test_strided_inputs_and_gradients_and_two_backward_passes_add_up():
    linear = nn.Linear(12, 20, dtype=torch.float64)
    layer = SparseLinear.from_dense(linear, sparsity=0.8)
    mask = layer.to_dense().weight != 0
    x = torch.randn(12, 9, dtype=torch.float64).t()
    g = torch.randn(20, 18, dtype=torch.float64).t()[::2]
    once = sparse(layer, x, g)[2].clone()
    torch.testing.assert_close(once, masked_dense(linear, mask, x, g)[2])
    torch.testing.assert_close(sparse(layer, x, g)[2], 2 * once)


def test_an_empty_mask_and_an_empty_row_are_layers_too():
    linear = nn.Linear(5, 4)
    none = SparseLinear.from_dense(linear, mask=torch.zeros(4, 5, dtype=torch.bool))
    y, dx, dvalues, _ = sparse(none, torch.randn(3, 5), torch.randn(3, 4))
    assert torch.equal(y, linear.bias.expand(3, 4))
    assert torch.equal(dx, torch.zeros(3, 5))
    assert dvalues.shape == (0,)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2] = False
    x = torch.randn(3, 5)
    layer = SparseLinear.from_dense(linear, mask=mask)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, linear.weight * mask, linear.bias))


def ledger_of_a_step(layer, x):
    optimizer = torch.optim.AdamW(layer.parameters())
    with Ledger(layer, optimizer, inputs=x) as ledger:
        layer(x).square().sum().backward()
        optimizer.step()
    return ledger.columns


@pytest.mark.parametrize("sparsity", [0.9, 0.95])
def test_bytes_of_weights_gradients_and_state_follow_the_nonzeros(sparsity):
    num_inputs, num_outputs, x = 300, 200, torch.randn(16, 300)
    linear = nn.Linear(num_inputs, num_outputs, bias=False)
    layer = SparseLinear.from_dense(linear, sparsity=sparsity)
    nonzeros = layer.values.numel()
    assert nonzeros == round((1 - sparsity) * num_inputs * num_outputs)
    columns, dense = ledger_of_a_step(layer, x), ledger_of_a_step(linear, x)
    starts = 4 * (num_inputs + num_outputs + 2)
    assert columns[Column.WEIGHTS] == 16 * nonzeros + starts
    assert columns[Column.GRADIENTS] == 4 * nonzeros
    assert columns[Column.OPTIMIZER_STATE] == 8 * nonzeros + 4  # AdamW's two moments and its step
    assert dense[Column.GRADIENTS] == 4 * num_inputs * num_outputs
    # nothing dense was made on the way: all but the weights' columns is smaller than one dense weight
    assert columns[Column.TEMPORARIES] < dense[Column.GRADIENTS] / 2


def test_nothing_is_saved_beyond_the_input_and_not_even_that_without_a_weight_gradient():
    layer = SparseLinear.from_dense(nn.Linear(64, 48), sparsity=0.9)
    x = torch.randn(100, 64)
    with Ledger(layer, inputs=x) as ledger:
        y = layer(x)
    assert ledger.columns[Column.ACTIVATIONS] == y.nbytes
    layer.values.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        layer(x.clone().requires_grad_())
    assert saved == [layer.values.shape]


def test_temporaries_do_not_grow_with_the_rows():
    layer = SparseLinear.from_dense(nn.Linear(64, 48, bias=False), sparsity=0.9)
    found = []
    for rows in (1024, 4096):
        x, g = torch.randn(rows, 64), torch.randn(rows, 48)
        with Ledger(layer, inputs=(x, g)) as ledger:
            layer(x).backward(g)
        layer.zero_grad()
        found.append(ledger.columns[Column.TEMPORARIES])
    assert found[0] == found[1] <= 4 * GRADIENT_COLUMNS * (64 + 48) + 4 * layer.values.numel()


def test_it_trains_with_an_optimizer_and_survives_its_state_dict():
    def start():
        torch.manual_seed(1)
        linear = nn.Linear(20, 10, dtype=torch.float64)
        return SparseLinear.from_dense(linear, sparsity=0.8), linear

    layer, linear = start()
    mask = layer.to_dense().weight != 0
    linear.weight.data *= mask
    x, y = torch.randn(30, 20, dtype=torch.float64), torch.randn(30, 10, dtype=torch.float64)
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (layer, linear))
    for _ in range(5):
        for model, optimizer in ((layer, ours), (linear, theirs)):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            if model is linear:
                linear.weight.grad *= mask
            optimizer.step()
    torch.testing.assert_close(layer.to_dense().weight, linear.weight)
    again = start()[0]
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_a_trace_on_fake_tensors_has_its_bytes():
    layer = SparseLinear.from_dense(nn.Linear(32, 48), sparsity=0.9)
    x = torch.randn(1100, 32)
    with Ledger(layer, inputs=x) as ledger:
        layer(x).square().mean().backward()
    layer.zero_grad()
    with faked(layer, x) as (fake,), Tracker(layer, inputs=fake) as tracker:
        layer(fake).square().mean().backward()
    assert abs(tracker.peak_bytes - ledger.peak_bytes) <= 0.01 * ledger.peak_bytes


def test_autocast_runs_it_in_float32():
    layer = SparseLinear.from_dense(nn.Linear(8, 6), sparsity=0.5)
    x = torch.randn(4, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype is torch.float32
        y.sum().backward()  # in autocast, as some do
    assert torch.equal(y, layer(x.float()))
    inside, layer.values.grad = layer.values.grad, None
    layer(x.float()).sum().backward()
    assert torch.equal(layer.values.grad, inside)


def test_what_is_refused():
    linear = nn.Linear(8, 6)
    with pytest.raises(MethodError, match="either sparsity"):
        SparseLinear.from_dense(linear)
    with pytest.raises(MethodError, match=r"in \[0, 1\)"):
        SparseLinear.from_dense(linear, sparsity=1.0)
    with pytest.raises(MethodError, match="weight's shape"):
        SparseLinear.from_dense(linear, mask=torch.ones(8, 6, dtype=torch.bool))
    layer = SparseLinear.from_dense(linear, sparsity=0.5)
    with pytest.raises(MethodError, match="expected 8 features"):
        layer(torch.randn(4, 6))
    with pytest.raises(UnsupportedError, match="float32 or both in float64"):
        layer(torch.randn(4, 8).half())
    with pytest.raises(UnsupportedError, match="on the CPU"):
        layer(torch.empty(4, 8, device="meta"))
    with pytest.raises(ArgumentError, match="got GELU"):
        break_even_sparsity(nn.GELU(), torch.randn(4, 8))


def test_the_crossing_is_where_the_ratio_stays_below_one():
    assert crossing({0.5: 2.0, 0.9: 1.5, 0.95: 0.5}) == pytest.approx(0.925)
    assert crossing({0.5: 0.9, 0.8: 1.2, 0.9: 0.8}) == pytest.approx(0.85)
    assert crossing({0.5: 0.7, 0.9: 0.3}) == 0.5
    assert crossing({0.5: 2.0, 0.9: 1.1}) is None


def test_break_even_is_measured_on_both_kinds_of_layer():
    for layer, x in (
        (nn.Linear(64, 64), torch.randn(128, 64)),
        (nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 8, 8)),
    ):
        found = break_even_sparsity(layer, x, sparsities=(0.5, 0.9), num_runs=2)
        assert list(found.ratios) == [0.5, 0.9]
        assert all(ratio > 0 for ratio in found.ratios.values())
        assert found.sparsity == crossing(found.ratios)
        assert str(found).startswith("break-even sparsity")
        assert all(p.grad is None for p in layer.parameters())
