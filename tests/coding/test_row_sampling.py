import math

import pytest
import torch
from tests.coding.test_group_codes import use_of
from tests.coding.unbiased import assert_mean
from torch._subclasses.fake_tensor import FakeTensorMode

from slimgrad import Ledger
from slimgrad.coding.row_sampling import RowSamplingCode, num_winners, sample_rows
from slimgrad.errors import MethodError


def uneven_rows(num_rows=40, width=6):
    """A few large rows, many small ones, as tokens of a language model."""
    return (
        torch.randn(num_rows, width, dtype=torch.float64) * torch.logspace(0, -2, num_rows)[:, None]
    )


def weight_gradients(code, x, g, num_draws):
    """Of a linear layer, ``[draws, out, in]``: what backward makes of the decoded input."""
    return torch.stack([g.T @ code.encode(x).decode() for _ in range(num_draws)])


def test_only_the_weight_gradient_of_a_linear_layer_changes():
    x = uneven_rows().requires_grad_()
    w = torch.randn(3, x.shape[1], dtype=x.dtype, requires_grad=True)
    plain = torch.nn.functional.linear(x, w)
    g = torch.randn_like(plain)
    code = RowSamplingCode(0.3, seed=1)

    def pack(tensor):
        return code.encode(tensor) if tensor is x else tensor

    def unpack(kept):
        return kept if isinstance(kept, torch.Tensor) else kept.decode()

    found = []
    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y = torch.nn.functional.linear(x, w)
        assert torch.equal(y, plain)
        dx, dw = torch.autograd.grad(y, (x, w), g)
        assert torch.equal(dx, g @ w.detach())
        found.append(dw)
    code.draws.restart()
    torch.testing.assert_close(torch.stack(found), weight_gradients(code, x.detach(), g, 3))


def test_the_mean_weight_gradient_is_the_exact_one_at_less_variance_than_plain_sampling():
    x = uneven_rows()
    g = torch.randn(len(x), 3, dtype=x.dtype)
    exact = g.T @ x
    draws = weight_gradients(RowSamplingCode(0.3, seed=1), x, g, 5000)
    error, deviation = draws.mean(0) - exact, draws.std(0) / math.sqrt(len(draws))
    z = error / deviation
    assert z.abs().max() < 5  # each coordinate
    assert z.square().mean().sqrt() < 2
    norm_error = error.norm() / deviation.norm()
    assert norm_error < 3  # the whole gradient, in its standard errors
    assert (0.9 * draws.mean(0) - exact).norm() / deviation.norm() > 3
    plain = weight_gradients(RowSamplingCode(0.3, False, seed=1), x, g, 2000)
    assert draws.var(0).sum() < 0.8 * plain.var(0).sum()


@pytest.mark.parametrize("is_winner_take_all", [True, False])
def test_the_decoded_tensor_is_unbiased_and_a_scaled_twin_is_not(is_winner_take_all):
    x = uneven_rows(12, 4) + 0.3
    code = RowSamplingCode(0.5, is_winner_take_all, seed=2)

    def with_length(y):  # along x itself, where there is little variance
        return torch.cat([y.flatten(), (y * x).sum().view(1)])

    assert_mean(lambda: with_length(code.encode(x).decode()), with_length(x))
    with pytest.raises(AssertionError, match="are off"):
        assert_mean(lambda: with_length(0.9 * code.encode(x).decode()), with_length(x))


def test_winners_are_kept_as_they_are_and_their_number_has_the_least_variance():
    p = uneven_rows().norm(dim=1)
    p = (p / p.sum()).sort(descending=True).values
    k = 12

    def variance(surely):
        """Of the sampled part of ``sum_i x_i`` for orthogonal rows with norms ``p``: sum_j p_j^2 (1 / (m q_j) - 1 / m)."""
        rest = p[surely:]
        mass = rest.sum()
        return float((mass**2 - rest.square().sum()) / (k - surely))

    def bound(surely):
        return float(p[surely:].sum() / (k - surely))

    best = int(num_winners(p, k))
    assert bound(best) == pytest.approx(min(map(bound, range(k))))
    assert 0 < best < k
    assert variance(best) < variance(0)
    rows, scale = sample_rows(p, k, torch.Generator().manual_seed(0))
    assert rows[:best].tolist() == list(range(best))
    assert (scale[:best] == 1).all()
    assert (rows[best:] >= best).all()
    assert num_winners(torch.full((40,), 1 / 40), 12) == 0  # nobody wins


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(0, 8), (1, 8), (30, 8), (2, 15, 8)])
def test_bytes_are_exact_and_other_rows_are_zeros(dtype, size):
    x = torch.randn(size).to(dtype)
    code = RowSamplingCode(0.3)
    with Ledger(inputs=x) as ledger:
        encoded = code.encode(x)
    num_rows = x.numel() // 8
    k = max(1, int(0.3 * num_rows)) if num_rows else 0
    assert ledger.now_bytes - x.nbytes == encoded.num_bytes == code.num_bytes(use_of(x))
    assert encoded.num_bytes == k * (8 * x.itemsize + 8)
    back = encoded.decode()
    assert back.shape == x.shape
    assert back.dtype == x.dtype
    assert (back.view(-1, 8) != 0).any(1).sum() <= k


def test_all_rows_and_rows_of_zeros():
    x = torch.randn(5, 3)
    assert torch.equal(RowSamplingCode(1.0).encode(x).decode(), x)
    x[1:] = 0
    assert torch.equal(RowSamplingCode(0.5).encode(x).decode(), x)
    assert torch.equal(RowSamplingCode(0.5).encode(0 * x).decode(), 0 * x)


def test_dense_tensors_in_any_order_of_dimensions():
    x = torch.randn(4, 6, 8)
    back = RowSamplingCode(0.5).encode(x.transpose(0, 1)).decode()
    assert back.stride() == x.transpose(0, 1).stride()
    assert torch.equal(back, RowSamplingCode(0.5).encode(x).decode().transpose(0, 1))


def test_nothing_waits_for_a_value():
    code = RowSamplingCode(0.3)
    with FakeTensorMode():
        assert code.encode(torch.empty(20, 4)).num_bytes == 6 * (4 * 4 + 8)


def test_random_numbers_are_the_codes_own():
    x = torch.randn(30, 4)
    before = torch.get_rng_state()
    first = RowSamplingCode(0.3, seed=4).encode(x).decode()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(RowSamplingCode(0.3, seed=4).encode(x).decode(), first)
    assert not torch.equal(RowSamplingCode(0.3, seed=5).encode(x).decode(), first)


@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_fields_have_bounds(keep):
    with pytest.raises(MethodError, match="keep"):
        RowSamplingCode(keep)
