import numpy as np
import pytest
import torch
from tests.coding.test_few_bit import through
from tests.coding.test_group_codes import use_of

from slimgrad.coding.approx_bp import ApproxBpCode, relus
from slimgrad.coding.step_functions import activation
from slimgrad.errors import MethodError

# ReGELU2 and ReSiLU2 as their authors' code has them: a_1, a_2, a_3 and c_1, c_2, c_3
PUBLISHED = {
    "gelu": ((-0.0492226, 1.0979632, -0.0487406), (-3.1858810, -0.0011788, 3.1908326)),
    "silu": ((-0.0406036, 1.0809254, -0.0403219), (-6.3050461, -0.0008685, 6.3258152)),
}


def distance(function, slopes, kinks):
    """The squared distance of a sum of ReLUs to the function over the real line."""
    x = np.linspace(-40, 40, 400_001)
    h = sum(a * np.maximum(x - c, 0) for a, c in zip(slopes, kinks, strict=True))
    f = activation(function).forward(torch.from_numpy(x)).numpy()
    inside = np.abs(x) < 30  # the published digits leave a slope beyond the last kink
    return float(np.trapezoid((h - f)[inside] ** 2, x[inside]))


@pytest.mark.parametrize("function", ["gelu", "silu"])
def test_coefficients_are_near_the_published_ones_and_at_least_as_good(function):
    slopes, kinks = PUBLISHED[function]
    a, c = relus(function)
    ours = distance(function, (a, 1 - 2 * a, a), (-c, 0, c))
    assert a == pytest.approx((slopes[0] + slopes[2]) / 2, rel=0.02)
    assert c == pytest.approx((kinks[2] - kinks[0]) / 2, rel=0.02)
    assert ours <= distance(function, slopes, kinks)


@pytest.mark.parametrize("function", ["gelu", "silu"])
def test_no_coefficients_nearby_are_better(function):
    a, c = relus(function)
    ours = distance(function, (a, 1 - 2 * a, a), (-c, 0, c))
    for da, dc in ((1e-3, 0), (-1e-3, 0), (0, 1e-2), (0, -1e-2)):
        b, d = a + da, c + dc
        assert ours < distance(function, (b, 1 - 2 * b, b), (-d, 0, d))
    for shift in (0.01, -0.01):  # nor are unsymmetric ones
        slopes = (a + shift / 10, 1 - 2 * a, a - shift / 10)
        middle = (slopes[2] - slopes[0]) * -c / slopes[1]
        assert ours < distance(function, slopes, (-c, middle, c))


@pytest.mark.parametrize("function", ["gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_is_bit_equal_and_backward_multiplies_by_the_level(function, dtype):
    code = ApproxBpCode(function)
    x = 4 * torch.randn(4000, dtype=dtype)
    g = torch.randn_like(x)
    y, gradient, plain = through(code, activation(function).forward, x, g)
    assert torch.equal(y, plain)
    a, _ = relus(function)
    levels = torch.tensor([0.0, a, 1 - a, 1.0], dtype=dtype)
    expected = g * code.steps(x)
    assert (code.steps(x).unsqueeze(1) == levels).any(1).all()
    tolerance = (
        {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-9}
    )
    torch.testing.assert_close(gradient, expected, **tolerance)


@pytest.mark.parametrize("num_elements", [0, 1, 4, 1001])
def test_two_bits_an_element(num_elements):
    x = torch.randn(num_elements)
    code = ApproxBpCode()
    assert code.encode(x).num_bytes == code.num_bytes(use_of(x)) == (num_elements + 3) // 4


def test_other_functions_are_refused():
    with pytest.raises(MethodError, match="'tanh'"):
        ApproxBpCode("tanh")
