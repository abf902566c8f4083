import itertools

import numpy as np
import pytest
import torch
from tests.coding.test_group_codes import use_of
from torch._subclasses.fake_tensor import FakeTensorMode

from slimgrad import Ledger
from slimgrad.coding.bits import BLOCK
from slimgrad.coding.few_bit import FewBitCode, best_cuts, levels
from slimgrad.coding.step_functions import ACTIVATIONS, activation
from slimgrad.errors import MethodError

FUNCTIONS = sorted(ACTIVATIONS)
ONE_BY_ONE = {"atol": 1e-5, "rtol": 1e-4}


def through(code, forward, x, g):
    """Output and input gradient with what is saved kept by ``code``, and the output of plain autograd."""
    plain = forward(x)
    x = x.clone().requires_grad_()
    encoded = []

    def pack(tensor):
        encoded.append(code.encode(tensor))
        return encoded[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.decode()):
        y = forward(x)
    y.backward(g)
    assert len(encoded) == 1
    return y, x.grad, plain


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [(1, torch.float32), (2, torch.float32), (3, torch.float64), (4, torch.float32)],
)
def test_backward_multiplies_by_the_level(function, bits, dtype):
    code = FewBitCode(function, bits)
    x = 4 * torch.randn(5000, dtype=dtype)
    g = torch.randn_like(x)
    y, gradient, plain = through(code, activation(function).forward, x, g)
    assert torch.equal(y, plain)
    expected = g * code.steps(x)
    inside = torch.ones_like(x, dtype=torch.bool)
    for boundary in code.steps.boundaries:  # a saved output next to a boundary is rounded across it
        inside &= (x.abs() - abs(boundary)).abs() > 1e-3
    tolerance = ONE_BY_ONE if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-9}
    torch.testing.assert_close(gradient[inside], expected[inside], **tolerance)
    assert gradient.unique().numel() > 100  # the gradients of the output came through


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", ["gelu", "silu", "tanh"])
def test_short_dtypes(function, dtype):
    code = FewBitCode(function, 3)
    x = (2 * torch.randn(3000)).to(dtype)
    _, gradient, _ = through(code, activation(function).forward, x, torch.ones_like(x))
    off = (gradient.double() - code.steps(x.double())).abs()
    assert off.median() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("num_pieces", [1, 2, 3, 4])
@pytest.mark.parametrize("function", ["gelu", "silu", "tanh"])
@pytest.mark.parametrize("weight", [None, "normal"])
def test_cuts_are_the_best_of_all(num_pieces, function, weight):
    x = np.linspace(-5, 5, 24)
    values = activation(function).derivative(torch.from_numpy(x)).numpy()
    weights = np.exp(-(x**2) / 2) if weight else np.ones_like(x)

    def error(cuts):
        bounds = [0, *cuts, len(x)]
        total = 0.0
        for i, j in itertools.pairwise(bounds):
            mean = np.average(values[i:j], weights=weights[i:j])
            total += float((weights[i:j] * (values[i:j] - mean) ** 2).sum())
        return total

    least = min(error(cuts) for cuts in itertools.combinations(range(1, len(x)), num_pieces - 1))
    assert error(best_cuts(values, weights, num_pieces)) == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_nearer_than_uniform_ones(function, bits):
    x = torch.linspace(-9.99, 9.99, 20001, dtype=torch.float64)
    f = activation(function)
    slopes = f.derivative(x)
    ours = (levels(function, bits)(x) - slopes).square().mean()
    low, high = slopes.min(), slopes.max()
    width = (high - low) / 2**bits  # levels in the middles of equal parts of the derivative's range
    number = ((slopes - low) / width).floor().clamp_(max=2**bits - 1)
    of_range = low + (number + 0.5) * width
    parts = 2**bits  # and the means over equal parts of the axis
    axis = ((x + 10) * parts / 20).floor().long()
    sums = torch.zeros(parts, dtype=x.dtype).index_add_(0, axis, slopes)
    of_axis = (sums / axis.bincount(minlength=parts))[axis]
    assert ours < (of_range - slopes).square().mean()
    halves = 1.0001 if bits == 1 else 1.0  # one cut, in the middle, can be the best
    assert ours < halves * (of_axis - slopes).square().mean()


def test_more_bits_are_nearer_and_parity_is_kept():
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    for function in ("gelu", "tanh"):
        slopes = activation(function).derivative(x)
        errors = [(levels(function, b)(x) - slopes).square().mean() for b in (1, 2, 3, 4)]
        assert all(later < 0.5 * sooner for sooner, later in itertools.pairwise(errors))
    found = np.array(levels("gelu", 3).levels)
    np.testing.assert_allclose(found + found[::-1], 1.0, atol=1e-9)  # f'(x) + f'(-x) = 1
    assert levels("tanh", 2).is_even


def test_the_normal_weight_is_nearer_where_inputs_are_normal():
    x = torch.randn(100_000, dtype=torch.float64)
    slopes = activation("gelu").derivative(x)
    near, far = (
        (levels("gelu", 2, weight)(x) - slopes).square().mean() for weight in ("normal", "uniform")
    )
    assert near < far


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(0,), (1,), (13,), (3, 5, 7), (2 * BLOCK + 11,)])
def test_bytes_are_exact(bits, size):
    code = FewBitCode("gelu", bits)
    x = torch.randn(size)
    encoded = code.encode(x)
    assert encoded.num_bytes == code.num_bytes(use_of(x)) == (x.numel() * bits + 7) // 8
    assert encoded.decode().shape == x.shape


def test_the_ledger_sees_the_predicted_bytes_and_bounded_scratch():
    code = FewBitCode("sigmoid", 3)
    extra = {}
    for blocks in (2, 5):
        x = torch.rand(blocks * BLOCK)
        with Ledger(inputs=x) as ledger:
            encoded = code.encode(x)
        assert ledger.now_bytes - x.nbytes == code.num_bytes(use_of(x)) == x.numel() * 3 // 8
        extra[blocks] = ledger.peak_bytes - x.nbytes - encoded.num_bytes
    assert extra[2] == extra[5] <= 2.5 * 2**20


def test_dense_tensors_in_any_order_of_dimensions():
    x = torch.randn(6, 5, 40)
    code = FewBitCode("silu", 3)
    back = code.encode(x.permute(2, 0, 1)).decode()
    assert back.stride() == x.permute(2, 0, 1).stride()
    assert torch.equal(back, code.encode(x).decode().permute(2, 0, 1))


def test_what_is_found_under_fake_tensors_is_real():
    levels.cache_clear()
    code = FewBitCode("softplus", 1, "normal")
    with FakeTensorMode():
        made = code.encode(torch.empty(100))
        assert made.num_bytes == 13
    x = torch.randn(50)
    assert code.encode(x).decode().unique().numel() == 2


@pytest.mark.parametrize("fields", [{"bits": 5}, {"function": "relu"}, {"weight": "none"}])
def test_fields_have_bounds(fields):
    with pytest.raises(MethodError, match="expected"):
        FewBitCode(**fields)
