"""Sparse convolutions: masked dense autograd up to rounding, and bytes that follow the nonzeros."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from slimgrad import Ledger
from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.layers.sparse_conv2d import SparseConv2d
from slimgrad.types import Column


def results(convolve, x, g, *wanted):
    """Output and the gradients of x and of ``wanted``."""
    x = x.clone().requires_grad_()
    y = convolve(x)
    return y.detach(), *torch.autograd.grad(y, [x, *wanted], g)


def of_masked_dense(conv, mask, x, g):
    dense = copy.deepcopy(conv)
    parameters = list(dense.parameters())

    def convolve(x):
        masked = {"weight": dense.weight * mask}
        return torch.func.functional_call(dense, masked, (x,))

    y, dx, dweight, *dbias = results(convolve, x, g, *parameters)
    return y, dx, dweight[mask], *dbias


def assert_agrees(layer, conv, x):
    """At most a few times the dense convolution's own distance to float64, or rounding of as many terms as are summed."""
    mask = layer.to_dense().weight != 0
    g = torch.randn_like(conv(x))
    plain = of_masked_dense(conv, mask, x, g)
    truth = of_masked_dense(copy.deepcopy(conv).double(), mask, x.double(), g.double())
    found = results(layer, x, g, *layer.parameters())
    assert len(found) == len(plain)
    for ours, dense, exact in zip(found, plain, truth, strict=True):
        assert ours.shape == exact.shape
        assert ours.dtype == dense.dtype
        own = (dense.double() - exact).abs().max()
        eps = torch.finfo(ours.dtype).eps
        rounding = eps * (8 * exact.abs().max() + 2 * g.numel() / g.shape[1])
        assert (ours.double() - exact).abs().max() <= 4 * own + rounding


@settings(max_examples=40, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 1)),
    dilation=st.integers(1, 2),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.95]),
    bias=st.booleans(),
    images=st.integers(1, 3),
    size=st.tuples(st.integers(5, 13), st.integers(5, 13)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_outputs_and_gradients_are_those_of_the_masked_dense_convolution(
    channels, kernel, stride, padding, dilation, sparsity, bias, images, size, dtype
):
    conv = nn.Conv2d(
        *channels, kernel, stride, padding=padding, dilation=dilation, bias=bias, dtype=dtype
    )
    layer = SparseConv2d.from_dense(conv, sparsity=sparsity)
    assert layer.values.numel() == max(1, round((1 - sparsity) * conv.weight.numel()))
    assert_agrees(layer, conv, torch.randn(images, channels[0], *size, dtype=dtype))


@pytest.mark.parametrize("sparsity", [0.9, 0.95])
@pytest.mark.parametrize("kernel", [1, 3])
def test_at_90_to_95_percent_sparsity_a_large_layer_agrees(sparsity, kernel):
    conv = nn.Conv2d(64, 96, kernel, padding="same")
    layer = SparseConv2d.from_dense(conv, sparsity=sparsity)
    assert_agrees(layer, conv, torch.randn(3, 64, 14, 15))


def test_channels_last_and_a_single_image():
    conv = nn.Conv2d(4, 8, 3, padding=1)
    layer = SparseConv2d.from_dense(conv, sparsity=0.8)
    x = torch.randn(2, 4, 7, 9)
    assert_agrees(layer, conv, x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


def test_bytes_follow_the_nonzeros_and_patches_are_those_of_one_image():
    conv = nn.Conv2d(32, 48, 3, padding=1, bias=False)
    layer, found = SparseConv2d.from_dense(conv, sparsity=0.95), []
    nonzeros = layer.values.numel()
    assert nonzeros == round(0.05 * conv.weight.numel())
    for images in (2, 8):
        x = torch.randn(images, 32, 12, 12)
        g = torch.randn(images, 48, 12, 12)
        optimizer = torch.optim.AdamW(layer.parameters())
        with Ledger(layer, optimizer, inputs=(x, g)) as ledger:
            y = layer(x)
            y.backward(g)
            optimizer.step()
            layer.zero_grad()
        columns = ledger.columns
        assert columns[Column.WEIGHTS] == 16 * nonzeros + 4 * (48 + 32 * 9 + 2)
        assert columns[Column.GRADIENTS] == 4 * nonzeros
        assert columns[Column.OPTIMIZER_STATE] == 8 * nonzeros + 4
        assert columns[Column.ACTIVATIONS] == y.nbytes
        found.append(columns[Column.TEMPORARIES])
    patches = 4 * 32 * 9 * 12 * 12
    assert found[0] == found[1] <= patches + 4 * nonzeros


def test_back_to_a_dense_layer_and_its_state_dict():
    conv = nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0))
    layer = SparseConv2d.from_dense(conv, mask=torch.rand(6, 4, 3, 1) < 0.3)
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(layer.to_dense()(x), layer(x))
    twin = SparseConv2d.from_dense(
        nn.Conv2d(4, 6, (3, 1), 2, (1, 0)), mask=layer.to_dense().weight != 0
    )
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))


def test_what_is_refused():
    for conv in (
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 2, padding="same"),
    ):
        with pytest.raises(UnsupportedError, match="expected"):
            SparseConv2d.from_dense(conv, sparsity=0.5)
    layer = SparseConv2d.from_dense(nn.Conv2d(4, 4, 3), sparsity=0.5)
    with pytest.raises(MethodError, match="expected 4 features"):
        layer(torch.randn(2, 3, 8, 8))
    with pytest.raises(UnsupportedError, match="float32"):
        layer(torch.randn(2, 4, 8, 8).bfloat16())
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="double backward"):
        first.sum().backward()
    assert functional.conv2d(x, layer.to_dense().weight).shape == layer(x).shape
