import pytest
import torch
from tests.coding.test_group_codes import use_of
from tests.coding.unbiased import assert_mean
from torch._subclasses.fake_tensor import FakeTensorMode

from slimgrad import Ledger
from slimgrad.coding.bits import BLOCK
from slimgrad.coding.head_ranges import HeadRangesCode
from slimgrad.errors import MethodError, UnsupportedError


def heads_apart(batch=2, heads=3, tokens=10, size=4, dtype=torch.float32):
    """Heads whose ranges are far from each other's."""
    scale = 10.0 ** torch.arange(heads, dtype=dtype).view(heads, 1, 1)
    return torch.randn(batch, heads, tokens, size, dtype=dtype) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_first_tensor_is_within_a_step_of_its_head(dtype, stochastic):
    x = heads_apart().to(dtype)
    code = HeadRangesCode(3, stochastic=stochastic)
    y = code.encode(x).decode()
    assert y.dtype == dtype
    wide = (x.amax((0, 2, 3)) - x.amin((0, 2, 3))).double().view(3, 1, 1)
    largest = x.double().abs().amax((0, 2, 3)).view(3, 1, 1)
    bound = (1.0 if stochastic else 0.5) * wide / 255 + 2 * torch.finfo(dtype).eps * largest
    assert ((y.double() - x.double()).abs() <= bound).all()


def test_ranges_of_heads_are_nearer_than_one_of_the_layer():
    x = heads_apart()
    off = {}
    for heads in (1, 3):
        y = HeadRangesCode(heads, stochastic=False).encode(x).decode()
        by_head = [each.movedim(1, 0).flatten(1).norm(dim=1) for each in (y - x, x)]
        off[heads] = (by_head[0] / by_head[1]).max()
    assert off[3] < 0.1 * off[1]


def test_ranges_run_and_values_outside_are_clipped():
    code = HeadRangesCode(1, momentum=0.9, stochastic=False)
    code.encode(torch.tensor([[-1.0, 3.0]]))
    torch.testing.assert_close(code.ranges, torch.tensor([[-1.0], [4.0]]))
    kept = code.encode(torch.tensor([[-3.0, 7.0, 0.5]]))
    low, width = 0.9 * -1 + 0.1 * -3, 0.9 * 4 + 0.1 * 10
    torch.testing.assert_close(code.ranges, torch.tensor([[low], [width]]))
    code.encode(torch.tensor([[100.0, 200.0]]))  # what was encoded keeps its own range
    y = kept.decode()
    torch.testing.assert_close(y[0, :2], torch.tensor([low, low + width]))
    assert (y[0, 2] - 0.5).abs() <= width / 510 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stochastic_rounding_is_unbiased_within_the_range_and_a_scaled_twin_is_not(dtype):
    x = torch.randint(255, (2, 2, 20, 4)).to(dtype)
    x[..., ::2] += 0.1 + 0.8 * torch.rand(2, 2, 20, 2, dtype=dtype)
    x[0, :, 0, :2] = torch.tensor([0.0, 255.0], dtype=dtype)
    code = HeadRangesCode(2, seed=3)
    assert_mean(lambda: code.encode(x).decode(), x)
    with pytest.raises(AssertionError, match="are off"):
        assert_mean(lambda: 0.9 * code.encode(x).decode(), x)


@pytest.mark.parametrize("size", [(0, 6), (5, 6), (2, 5, 6), (2, 3, 5, 4), (6,), (2, 4, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_byte_an_element_and_two_numbers_a_head(size, dtype):
    x = torch.randn(size).to(dtype)
    code = HeadRangesCode(3)
    code.encode(x)
    with Ledger(inputs=(x, code.ranges)) as ledger:
        encoded = code.encode(x)
    place = 0 if code.ranges is None else code.ranges.nbytes
    assert ledger.now_bytes - x.nbytes - place == encoded.num_bytes == code.num_bytes(use_of(x))
    assert encoded.num_bytes == x.numel() + 2 * 3 * 4
    assert encoded.decode().shape == x.shape


def test_channels_are_cut_into_heads_elsewhere():
    x = heads_apart(1, 3, 20, 4)[0].movedim(0, 1).reshape(20, 12)  # (tokens, heads * size)
    y = HeadRangesCode(3, stochastic=False).encode(x).decode()
    for head in range(3):
        part, back = x[:, 4 * head : 4 * head + 4], y[:, 4 * head : 4 * head + 4]
        assert (back - part).abs().max() <= (part.amax() - part.amin()) / 510 * 1.001


def test_without_heads_the_tensor_says_how_many_ranges_it_has():
    code = HeadRangesCode(0, 4)
    for size, ranges in [((2, 3, 5, 4), 3), ((12,), 1), ((5, 8), 2), ((5, 6), 1), ((2, 5, 16), 4)]:
        x = torch.randn(size)  # each time of another number of ranges, which begin anew
        encoded = code.encode(x)
        assert encoded.ranges.shape == (2, ranges)
        assert encoded.num_bytes == x.numel() + 8 * ranges
        assert (encoded.decode() - x).abs().max() <= (x.max() - x.min()) / 254
    for size in [(5, 12), (5, 6), (2, 5, 8)]:
        x = torch.randn(size)
        assert code.encode(x).num_bytes == code.num_bytes(use_of(x))
    x = torch.randn(5, 12)
    assert HeadRangesCode(0).encode(x).num_bytes == x.numel() + 8


def test_dense_tensors_in_any_order_of_dimensions():
    x = heads_apart()
    y = (
        x.movedim(1, 2).contiguous().movedim(2, 1)
    )  # as attention makes them: heads second, not in memory
    code = HeadRangesCode(3, stochastic=False)
    back = code.encode(y).decode()
    assert back.stride() == y.stride()
    torch.testing.assert_close(back, HeadRangesCode(3, stochastic=False).encode(x).decode())


def test_scratch_is_bounded():
    extra = {}
    for blocks in (3, 6):
        x = torch.randn(blocks * 8, 4, BLOCK // 64, 2)
        code = HeadRangesCode(4)
        code.encode(x)
        with Ledger(inputs=(x, code.ranges)) as ledger:
            encoded = code.encode(x)
        extra[blocks] = ledger.peak_bytes - x.nbytes - encoded.num_bytes
    assert extra[3] == extra[6] <= 2 * 2**20


def test_random_numbers_are_the_codes_own():
    x = torch.randn(4, 40)
    before = torch.get_rng_state()
    first = HeadRangesCode(seed=4).encode(x).decode()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(HeadRangesCode(seed=4).encode(x).decode(), first)
    assert not torch.equal(HeadRangesCode(seed=5).encode(x).decode(), first)


def test_a_trace_leaves_no_state():
    code = HeadRangesCode(2)
    with FakeTensorMode():
        code.encode(torch.empty(2, 8))
    assert code.ranges is None
    code.encode(torch.randn(2, 8))
    assert code.ranges.isfinite().all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(UnsupportedError, match="5 heads"):
        HeadRangesCode(5).encode(torch.randn(2, 6))
    with pytest.raises(MethodError, match="momentum"):
        HeadRangesCode(momentum=1.0)
    with pytest.raises(MethodError, match="group_size at least 0"):
        HeadRangesCode(0, -1)


def test_ranges_follow_a_model_into_another_dtype():
    code, x = HeadRangesCode(3, stochastic=False), heads_apart()
    code.encode(x)
    y = code.encode(x.double()).decode()
    assert y.dtype == torch.float64
    assert (y - x).norm() < 0.01 * x.norm()
