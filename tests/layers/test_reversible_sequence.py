"""A reversible chain: autograd's gradients, bytes that do not grow with depth, and what it refuses."""

import pytest
import torch
from torch import nn

from slimgrad import Ledger
from slimgrad.errors import ArgumentError, SlimgradError, UnsupportedError
from slimgrad.layers.coupling import ReversibleBlock
from slimgrad.layers.reversible_sequence import ReversibleSequence, reconstruction_error
from slimgrad.types import Column

WIDTH = 8


def mlp(width=WIDTH, dropout=0.0):
    return nn.Sequential(
        nn.Linear(width, 2 * width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(2 * width, width)
    )


def chain_of(depth=3, n=2, *, dtype=torch.float64, make=mlp, **options):
    scales = options.pop("scales", None)
    rotate = options.pop("rotate", False)
    blocks = [
        ReversibleBlock(*(make() for _ in range(n)), scales=scales, rotate=rotate)
        for _ in range(depth)
    ]
    return ReversibleSequence(blocks, **options).to(dtype)


def streams_of(n=2, dtype=torch.float64, shape=(5, WIDTH)):
    return [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(n)]


def loss_of(out):
    return sum((x.double() ** 2 * (k + 1)).mean() for k, x in enumerate(out))


def gradients(chain, streams, *args, is_reversible, seed=1, leaves=(), **kwargs):
    chain.is_reversible = is_reversible
    wanted = [x for x in [*streams, *leaves, *chain.parameters()] if x.requires_grad]
    torch.manual_seed(seed)
    return torch.autograd.grad(loss_of(chain(streams, *args, **kwargs)), wanted, allow_unused=True)


def relative_error(found, expected):
    pairs = [
        (a.detach().double(), b.detach().double()) for a, b in zip(found, expected, strict=True)
    ]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def assert_gradients_match(chain, streams, *args, limit=1e-8, **kwargs):
    expected = gradients(chain, streams, *args, is_reversible=False, **kwargs)
    found = gradients(chain, streams, *args, is_reversible=True, **kwargs)
    assert relative_error(found, expected) < limit


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_gradients_are_those_of_autograd(n, dtype, limit):
    assert_gradients_match(chain_of(4, n, dtype=dtype), streams_of(n, dtype), limit=limit)


@pytest.mark.parametrize("n", [2, 3])
def test_scales_and_rotation_are_differentiated(n):
    chain = chain_of(3, n, scales=[0.5, *([1.5] * (n - 1))], rotate=True)
    assert_gradients_match(chain, streams_of(n))


def test_a_wrong_scale_is_noticed():
    chain, streams = chain_of(2, scales=[0.5, 1.0]), streams_of()
    expected = gradients(chain, streams, is_reversible=False)
    chain.blocks[0].scales = (0.51, 1.0)
    assert relative_error(gradients(chain, streams, is_reversible=True), expected) > 1e-3


def test_two_streams_are_the_revnet_coupling():
    chain, (a, b) = chain_of(1), streams_of()
    f, g = chain.blocks[0].functions
    y1 = a + f(b)
    y2 = b + g(y1)
    for found, expected in zip(chain([a, b]), (y1, y2), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("overlap", [False, True])
def test_dropout_draws_the_same_and_moves_the_state_as_plain(overlap):
    chain, streams = chain_of(make=lambda: mlp(dropout=0.4), overlap=overlap), streams_of()
    assert_gradients_match(chain, streams)
    states = []
    for chain.is_reversible in (False, True):
        torch.manual_seed(3)
        loss_of(chain(streams)).backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


class Counted(nn.Module):
    """Batch norm, and a buffer that the value depends on."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.norm(self.linear(x)) * self.calls


def test_buffers_change_once_and_are_those_of_the_first_run():
    chain, plain = chain_of(make=Counted), chain_of(make=Counted)
    plain.load_state_dict(chain.state_dict())
    streams = streams_of()
    for _ in range(2):
        found = gradients(chain, streams, is_reversible=True)
        expected = gradients(plain, streams, is_reversible=False)
        assert relative_error(found, expected) < 1e-8
    for a, b in zip(chain.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


def test_autocast_is_entered_again_with_parameters_in_its_first_precision():
    chain, streams = chain_of(dtype=torch.float32), streams_of(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = chain(streams)
    assert out[0].dtype == torch.float32
    found = torch.autograd.grad(loss_of(out), list(chain.parameters()))
    chain.is_reversible = False
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.autograd.grad(loss_of(chain(streams)), list(chain.parameters()))
    full = torch.autograd.grad(loss_of(chain(streams)), list(chain.parameters()))
    unit = relative_error(expected, full)
    assert unit > 1e-4
    assert relative_error(found, full) < 2 * unit


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, memory, power=1, mask=None):
        x = self.linear(x) + memory**power
        return torch.tanh(x if mask is None else x.masked_fill(mask, 0.0))


@pytest.mark.parametrize("overlap", [False, True])
def test_extra_arguments_reach_every_function_and_get_gradients(overlap):
    memory = torch.rand(WIDTH, dtype=torch.float64).requires_grad_()
    mask = torch.rand(5, WIDTH) > 0.7
    chain = chain_of(make=Attends, overlap=overlap)
    assert_gradients_match(chain, streams_of(), memory, leaves=[memory], power=3, mask=mask)


@pytest.mark.parametrize("overlap", [False, True])
def test_frozen_parameters_and_inputs_without_gradient(overlap):
    chain, streams = chain_of(4, overlap=overlap), [x.detach() for x in streams_of()]
    chain.blocks[0].requires_grad_(False)
    chain.blocks[2].requires_grad_(False)
    assert_gradients_match(chain, streams)
    assert not ReversibleSequence([chain.blocks[0]])(streams)[0].requires_grad


def test_parameters_shared_between_blocks_get_one_gradient_and_hooks_see_it_once():
    chain, streams = chain_of(3), streams_of()
    shared = chain.blocks[0].functions[0][0]
    chain.blocks[2].functions[1][0] = shared
    assert_gradients_match(chain, streams)
    expected = dict(
        zip(chain.parameters(), gradients(chain, streams, is_reversible=False)[2:], strict=True)
    )
    chain.is_reversible = True
    seen, scaled = [], []
    shared.weight.register_hook(lambda g: scaled.append(1) or 2 * g)
    for p in chain.parameters():
        p.register_post_accumulate_grad_hook(seen.append)
    loss_of(chain(streams)).backward()
    assert len(seen) == len(set(seen)) == len(expected)
    assert len(scaled) == 1
    for p, g in expected.items():
        assert relative_error([p.grad], [2 * g if p is shared.weight else g]) < 1e-8


@pytest.mark.parametrize("overlap", [False, True])
def test_updates_inside_backward_are_those_after_it(overlap):
    after, during = chain_of(4), chain_of(4, overlap=overlap)
    during.load_state_dict(after.state_dict())
    streams = streams_of()

    def update(p):
        with torch.no_grad():
            p -= 0.5 * p.grad
        p.grad = None

    loss_of(after(streams)).backward()
    for p in after.parameters():
        update(p)
    for p in during.parameters():
        p.register_post_accumulate_grad_hook(update)
    loss_of(during(streams)).backward()
    assert relative_error(list(during.parameters()), list(after.parameters())) == 0


def peak_of(depth, *, is_reversible=True, **options):
    chain = chain_of(depth, dtype=torch.float32, **options)
    chain.is_reversible = is_reversible
    chain.requires_grad_(False)  # weights' gradients are another column
    streams = streams_of(dtype=torch.float32, shape=(64, WIDTH))
    with Ledger(chain, inputs=streams) as ledger:
        loss_of(chain(streams)).backward()
    held = ledger.timeline.columns
    return int((held[Column.ACTIVATIONS] + held[Column.TEMPORARIES]).max()), ledger.columns[
        Column.ACTIVATIONS
    ]


@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"fixed_point": 30}, {"wide": True}])
def test_bytes_do_not_grow_with_depth(options):
    shallow, deep = peak_of(4, **options), peak_of(16, **options)
    assert deep == shallow
    assert deep[0] < peak_of(16, is_reversible=False)[0] / 3


def test_backward_has_one_function_in_memory_beyond_its_streams():
    stream = 64 * WIDTH * 4
    one_function = (
        2 * stream * 4
    )  # what a Linear, Tanh, Dropout and Linear save and make, in widths of 2
    assert peak_of(16)[0] <= 6 * stream + one_function + 64  # the loss's scalars


def test_a_chain_is_refused_twice_differentiated():
    chain, streams = chain_of(), streams_of()
    with pytest.raises(UnsupportedError, match="differentiated once"):
        torch.autograd.grad(loss_of(chain(streams)), streams, create_graph=True)


def test_a_second_backward_is_as_with_autograd():
    chain, streams = chain_of(), streams_of()
    loss = loss_of(chain(streams))
    first = torch.autograd.grad(loss, streams, retain_graph=True)
    again = torch.autograd.grad(loss, streams)
    assert all(map(torch.equal, first, again))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, streams)


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 2:
            raise ValueError("on the second call")
        return self.linear(x)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failed_backward_says_so_and_can_be_run_again(overlap):
    chain, streams = chain_of(3, overlap=overlap), streams_of()
    chain.blocks[1].functions[0] = Fails().double()
    loss = loss_of(chain(streams))
    with pytest.raises(ValueError, match="second call"):
        torch.autograd.grad(loss, streams, retain_graph=True)
    expected = gradients(chain, streams, is_reversible=False)
    assert relative_error(torch.autograd.grad(loss, streams), expected[:2]) < 1e-8


class InPlace(nn.Linear):
    def forward(self, x):
        return super().forward(x.mul_(2) if not x.requires_grad else x)


def test_what_would_be_wrong_in_silence_is_refused():
    streams = streams_of()
    with pytest.raises(UnsupportedError, match="in place"):
        chain_of(make=lambda: InPlace(WIDTH, WIDTH))([x.detach().clone() for x in streams])
    with pytest.raises(ArgumentError, match="2 streams of one shape"):
        chain_of()(streams[:1])
    with pytest.raises(ArgumentError, match="stream's shape"):
        chain_of(make=lambda: nn.Linear(WIDTH, 3))(streams)
    with pytest.raises(ArgumentError, match="other than 0"):
        chain_of(scales=[0.0, 1.0])
    with pytest.raises(ArgumentError, match="lose bits"):
        chain_of(scales=[0.5, 1.0], fixed_point=20)
    with pytest.raises(UnsupportedError, match="does not fit"):
        chain_of(fixed_point=60)(streams_of())
    outside = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)
    chain = chain_of()
    chain.blocks[1].functions[0].register_forward_hook(lambda _m, _a, out: out * outside)
    with pytest.raises(UnsupportedError, match="register or pass it"):
        gradients(chain, streams, is_reversible=True)


def test_parameters_changed_before_backward_are_noticed():
    chain, streams = chain_of(), streams_of()
    loss = loss_of(chain(streams))
    with torch.no_grad():
        next(chain.parameters()).mul_(2)
    with pytest.raises(SlimgradError, match="between forward and backward"):
        loss.backward()


def test_errors_grow_with_depth_and_are_far_larger_in_low_precision():
    errors = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        chain = chain_of(12, dtype=dtype)
        (errors[dtype],) = reconstruction_error(chain, streams_of(dtype=dtype)).values()
        assert len(errors[dtype]) == 12
        assert 0 < errors[dtype][-1] < errors[dtype][0]
    assert errors[torch.float64][0] < 1e-14 < 1e-8 < errors[torch.float32][0] < 1e-5
    assert errors[torch.bfloat16][0] > 1e-3


def test_a_depth_above_the_allowed_error_is_refused():
    streams = streams_of(dtype=torch.float32)
    options = {"dtype": torch.float32, "scales": [0.1, 0.1], "max_error": 1e-4}
    assert_gradients_match(chain_of(2, **options), streams, limit=1e-4)
    with pytest.raises(UnsupportedError, match=r"12 blocks.*max_error"):
        chain_of(12, **options)(streams)


@pytest.mark.parametrize(
    ("dtype", "bits", "limit"), [(torch.float64, 44, 1e-11), (torch.float32, 30, 1e-5)]
)
def test_fixed_point_reconstructs_every_bit(dtype, bits, limit):
    chain, streams = chain_of(24, dtype=dtype, fixed_point=bits), streams_of(dtype=dtype)
    (errors,) = reconstruction_error(chain, streams).values()
    assert errors == (0.0,) * 24
    assert_gradients_match(chain, streams, limit=limit)
    chain.is_reversible = True
    with torch.no_grad():
        evaluated = chain(streams)
    assert all(map(torch.equal, evaluated, chain(streams)))


def test_floating_point_does_not_reconstruct_every_bit():
    (errors,) = reconstruction_error(
        chain_of(24, dtype=torch.float32), streams_of(dtype=torch.float32)
    ).values()
    assert min(errors[:12]) > 0


def test_wide_streams_come_back_to_the_bit_under_scales_of_a_power_of_two():
    errors = {}
    for scale in (2.0**-5, 0.03):
        for wide in (False, True):
            torch.manual_seed(0)
            chain = chain_of(6, dtype=torch.float32, scales=(scale, 1), rotate=True, wide=wide)
            streams = streams_of(dtype=torch.float32)
            (errors[scale, wide],) = reconstruction_error(chain, streams).values()
            assert_gradients_match(chain, streams, limit=1e-5 if wide and scale != 0.03 else 1)
    assert max(errors[2.0**-5, True]) == 0
    assert 0 < max(errors[0.03, True]) < max(errors[0.03, False]) / 10
    with pytest.raises(ArgumentError, match="found both"):
        chain_of(2, wide=True, fixed_point=30)


def test_wide_streams_of_float64_are_left_as_they_are():
    chain, streams = chain_of(3, wide=True), streams_of()
    found = chain(streams)
    chain.wide = False
    assert all(torch.equal(a, b) for a, b in zip(found, chain(streams), strict=True))
