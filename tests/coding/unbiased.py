"""Whether the mean of random tensors is what it should be, coordinate by coordinate."""

import torch

DRAWS, LIMIT = 400, 5.0


def assert_mean(draw, expected, num_draws=DRAWS):
    """The mean of ``num_draws`` calls of ``draw`` is ``expected``: |z| < 5, or equal to rounding without variance."""
    mean = torch.zeros_like(expected, dtype=torch.float64)
    squares = torch.zeros_like(mean)
    for number in range(1, num_draws + 1):  # Welford: exact where all draws are the same
        off = draw().double() - mean
        mean += off / number
        squares += off * off * (number - 1) / number
    error = mean - expected.double()
    deviation = (squares / (num_draws - 1) / num_draws).sqrt()
    rounding = 4 * torch.finfo(expected.dtype).eps * (expected.double().abs().amax() + 1e-30)
    is_off = error.abs() > LIMIT * deviation + rounding
    assert not is_off.any(), f"{int(is_off.sum())} of {is_off.numel()} coordinates are off"
