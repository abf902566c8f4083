"""Segments and nested segments: the bits of plain training, the bytes of the replay, the laws of the papers."""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.sample_models import SAMPLES, adamw
from tests.single_method_plans import measured_peak, plan_of, scheme_of
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from slimgrad import Ledger, measure
from slimgrad.applying.step import apply
from slimgrad.errors import MethodError
from slimgrad.host import Host
from slimgrad.measuring.model_cache import switch_off_cache
from slimgrad.measuring.profile import Profile
from slimgrad.method import Block, Scope, hyperparameters, method_name
from slimgrad.methods.activations.nested_recompute import NestedRecompute
from slimgrad.methods.activations.schedules import Chain, best_schedules, holdings
from slimgrad.planning.menu import Menu
from slimgrad.planning.offers import Allowed, options
from slimgrad.planning.plan import Choice
from slimgrad.planning.runs import chains, segments
from slimgrad.planning.settings import layout_of
from slimgrad.planning.solve import Programme
from slimgrad.types import Column


class Residual(nn.Module):
    def __init__(self, width=32, dropout=0.0):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_ND):
        return x_ND + self.dropout(functional.gelu(self.linear(self.norm(x_ND))))


class Stack(nn.Module):
    def __init__(self, num, width=32, dropout=0.0):
        super().__init__()
        self.body = nn.ModuleList(Residual(width, dropout) for _ in range(num))

    def forward(self, x_ND):
        for block in self.body:
            x_ND = block(x_ND)
        return x_ND


def mean_square(model, x_ND):
    return model(x_ND).square().mean()


def step(model, loss_fn, batch):
    """Loss and gradients of one step from a fixed random state, and the state it ends in."""
    torch.manual_seed(3)
    model.zero_grad(set_to_none=True)
    loss = loss_fn(model, batch)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    return [loss.detach(), torch.get_rng_state(), *gradients.values(), *buffers.values()]


def attach(model, paths, schedule=(), keep=(), by_modules=False):
    block = Block(paths[0], Scope.RUN, host=Host(model, None, mean_square))
    return NestedRecompute(tuple(paths), tuple(schedule), tuple(keep), by_modules).attach(block)


BOTH = pytest.mark.parametrize("by_modules", [False, True], ids=["operations", "modules"])


def random_schedule(rng, num):
    codes = []

    def cut(start, stop):
        while start < stop:
            code = rng.choice([0, *range(stop - start)])
            codes.append(code)
            if code:
                cut(start + code, stop)
                stop = start + code
            else:
                start += 1

    cut(0, num)
    return tuple(codes)


def forward_passes(schedule, num):
    """How often each of ``num`` stages is run again under a schedule."""
    codes, counts = iter(schedule), [0] * num

    def cut(start, stop):
        while start < stop:
            code = next(codes, 0)
            for stage in range(start, start + (code or 1)):
                counts[stage] += 1
            if code:
                cut(start + code, stop)
                stop = start + code
            else:
                start += 1

    cut(0, num)
    return counts


@functools.cache
def profile_of(name: str) -> Profile:
    model, loss_fn, batch = SAMPLES[name].make()
    return measure(model, adamw(model), loss_fn, batch, limit_s=0.0)


@functools.cache
def chains_of(name: str):
    profile = profile_of(name)
    return chains(layout_of(profile, profile.variants[()]))


WITH_CHAINS = [n for n in SAMPLES if chains_of(n)]


# -- exactness ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WITH_CHAINS)
@BOTH
def test_every_sample_trains_to_the_same_bits_under_any_schedule(name, seed, by_modules):
    rng = random.Random(f"{name} {seed}")
    profile = profile_of(name)
    layout = layout_of(profile, profile.variants[()])
    model, loss_fn, batch = SAMPLES[name].make()
    plain = step(model, loss_fn, batch)
    model, loss_fn, batch = SAMPLES[name].make()
    switch_off_cache(model)  # as apply does: a second run would add to it
    for chain in chains_of(name):
        length = rng.randint(2, len(chain))
        keep = () if by_modules else layout.held_anyway(chain[:length])
        attach(model, chain[:length], random_schedule(rng, length), keep, by_modules)
    ours = step(model, loss_fn, batch)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@BOTH
def test_dropout_is_drawn_again_in_nested_segments(by_modules):
    rng, paths = random.Random(0), [f"body.{i}" for i in range(9)]
    torch.manual_seed(0)
    model, batch = Stack(9, dropout=0.3), torch.randn(16, 32)
    plain = step(model, mean_square, batch)
    for _ in range(12):
        undo = attach(model, paths, random_schedule(rng, 9), (), by_modules)
        ours = step(model, mean_square, batch)
        undo()
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


class Noisy(nn.Module):
    """A block that draws from a generator of its own."""

    def __init__(self, seed):
        super().__init__()
        self.linear, self.seed = nn.Linear(32, 32), seed
        self.generator = torch.Generator()

    def forward(self, x_ND):
        return (self.linear(x_ND) * torch.rand(x_ND.shape, generator=self.generator)).tanh()


@BOTH
def test_what_a_block_draws_from_a_generator_of_its_own_is_drawn_again(by_modules):
    torch.manual_seed(0)
    model, batch = Stack(4), torch.randn(16, 32)
    model.body = nn.Sequential(*(Noisy(seed) for seed in range(4)))

    def seeded_step():
        for block in model.body:
            block.generator.manual_seed(block.seed)
        return [*step(model, mean_square, batch), *(b.generator.get_state() for b in model.body)]

    plain = seeded_step()
    for schedule in ((), (2,), (2, 1)):
        undo = attach(model, [f"body.{i}" for i in range(4)], schedule, (), by_modules)
        ours = seeded_step()
        undo()
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


class Interrupted(Stack):
    """Does something to the stream between blocks."""

    def __init__(self, between):
        super().__init__(4)
        self.between = between

    def forward(self, x_ND):
        kept = []
        for block in self.body:
            x_ND = self.between(block(x_ND), kept)
        return x_ND


@pytest.mark.parametrize(
    "between",
    [
        lambda x, kept: x * 2,
        lambda x, kept: x.mul_(2),
        lambda x, kept: x.clone().add_(1),
        lambda x, kept: kept.append(x) or x + kept[0].tanh(),
        lambda x, kept: x.t().contiguous().t(),
    ],
    ids=["times two", "in place", "a copy in place", "skips", "transposed"],
)
@pytest.mark.parametrize("schedule", [(), (2, 0, 0, 1, 0, 0), (1, 1, 1)])
@BOTH
def test_what_is_done_between_blocks_does_not_matter(between, schedule, by_modules):
    torch.manual_seed(0)
    model, batch = Interrupted(between), torch.randn(16, 32)
    plain = step(model, mean_square, batch)
    attach(model, [f"body.{i}" for i in range(4)], schedule, (), by_modules)
    ours = step(model, mean_square, batch)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@BOTH
def test_a_pass_that_leaves_the_chain_early_or_fails_trains_as_plainly(by_modules):
    class Moody(Stack):
        stop = 99

        def forward(self, x_ND):
            for index, block in enumerate(self.body):
                if index == self.stop:
                    break
                if index == -self.stop:
                    raise KeyError("stopped")
                x_ND = block(x_ND)
            return x_ND

    torch.manual_seed(0)
    model, batch = Moody(5), torch.randn(8, 32)
    model.stop = 3
    plain = step(model, mean_square, batch)
    attach(model, [f"body.{i}" for i in range(5)], (2,), (), by_modules)
    model.stop = -2
    with pytest.raises(KeyError):
        step(model, mean_square, batch)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    model.stop = 3
    ours = step(model, mean_square, batch)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@BOTH
def test_a_backward_pass_may_be_run_twice_and_undo_leaves_nothing(by_modules):
    torch.manual_seed(0)
    model, batch = Stack(6), torch.randn(8, 32)
    plain = step(model, mean_square, batch)[2:]
    undo = attach(model, [f"body.{i}" for i in range(6)], (3, 1, 0, 1), (), by_modules)
    model.zero_grad()
    loss = mean_square(model, batch)
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
    undo()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_schedule_with_a_negative_number_is_refused():
    with pytest.raises(MethodError, match="negative"):
        NestedRecompute(("a", "b"), (-1,))


# -- modules that are run again ----------------------------------------------------------------------------


class Counted(Stack):
    """One block draws or branches on something outside torch's random state."""

    def __init__(self, inner):
        super().__init__(4)
        plain = self.body[2].forward
        self.body[2].forward = lambda x_ND: inner(self, plain, x_ND)


def test_a_block_that_takes_another_path_on_its_second_run_raises():
    def inner(model, plain, x_ND):
        model.num = getattr(model, "num", 0) + 1
        return plain(x_ND) if model.num == 1 else plain(x_ND).tanh()

    model = Counted(inner)
    attach(model, [f"body.{i}" for i in range(4)], by_modules=True)
    with pytest.raises(RuntimeError, match="another path"):
        step(model, mean_square, torch.randn(8, 32))


@pytest.mark.parametrize("schedule", [(), (2, 0, 0, 1, 0, 0), (1, 1, 1)])
def test_python_s_and_numpy_s_random_numbers_are_drawn_again(schedule):
    def inner(model, plain, x_ND):
        return plain(x_ND) * random.random() * float(np.random.rand()) + x_ND.tanh()

    def seeded(model, batch):
        random.seed(5)
        np.random.seed(5)
        found = step(model, mean_square, batch)
        return [*found, torch.tensor([random.random(), np.random.rand()])]

    torch.manual_seed(0)
    model, batch = Counted(inner), torch.randn(8, 32)
    plain = seeded(model, batch)
    attach(model, [f"body.{i}" for i in range(4)], schedule, by_modules=True)
    assert all(torch.equal(a, b) for a, b in zip(seeded(model, batch), plain, strict=True))


def test_hooks_inside_that_only_look_are_called_once():
    calls, model = [], Stack(4)
    model.body[1].linear.register_forward_hook(lambda *_: calls.append(1))
    model.body[1].register_forward_hook(lambda *_: calls.append(2))
    attach(model, [f"body.{i}" for i in range(4)], (2,), by_modules=True)
    step(model, mean_square, torch.randn(8, 32))
    assert calls == [1, 2]


@pytest.mark.parametrize("schedule", [(), (2, 0, 0, 1, 0, 0)])
def test_modules_are_run_again_under_the_autocast_of_their_first_run(schedule):
    torch.manual_seed(0)
    model, batch = Stack(4, dropout=0.2).float(), torch.randn(8, 32, dtype=torch.float32)

    def loss_fn(model, x_ND):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x_ND)
        return out.float().square().mean()

    plain = step(model, loss_fn, batch)
    attach(model, [f"body.{i}" for i in range(4)], schedule, by_modules=True)
    assert all(torch.equal(a, b) for a, b in zip(step(model, loss_fn, batch), plain, strict=True))


@pytest.mark.parametrize("changed", ["input", "parameter"])
def test_what_a_second_run_needs_must_not_be_modified_before_it(changed):
    model, batch = Stack(4), torch.randn(8, 32)
    attach(model, [f"body.{i}" for i in range(4)], by_modules=True)
    loss = mean_square(model, batch)
    with torch.no_grad():
        (batch if changed == "input" else model.body[1].linear.bias).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


# -- bytes ------------------------------------------------------------------------------------------------


def run_again(option, *, by_modules):
    """The option with operations, or modules, run again."""
    (method,) = option.methods
    record = replace(option.record, by_modules=by_modules)
    return replace(option, methods=(replace(method, by_modules=by_modules),), record=record)


@pytest.mark.parametrize("name", WITH_CHAINS)
def test_the_replay_predicts_every_segment_and_schedule(name):
    profile = profile_of(name)
    scheme = scheme_of(profile)
    layout = layout_of(profile, scheme.trace)
    found = [o for o in options(profile, scheme, layout, Allowed()) if o.paths]
    if len(found) > 12:
        found = random.Random(name).sample(found, 12)
    found += [run_again(o, by_modules=False) for o in found if o.record.by_modules]
    for option in found:
        predicted = int(Programme(scheme, Menu(layout, [option])).replay(np.ones(1))[0].max())
        model, loss_fn, batch = SAMPLES[name].make()
        optimizer = adamw(model)
        (method,) = option.methods
        choice = Choice(option.path, method_name(method), dict(hyperparameters(method)))
        with apply(plan_of(model, optimizer, [choice]), model, optimizer, loss_fn) as applied:
            measured = measured_peak(applied, batch)
        assert 0.97 * measured <= predicted <= 1.03 * measured + 2**14, method


def held_bytes(num, schedule, length):
    """The ledger's maximum of activations with segments of ``length`` blocks, in units of one block's input."""
    model, batch = Stack(num), torch.randn(64, 32, requires_grad=False)
    for start in range(0, num, length):
        attach(model, [f"body.{i}" for i in range(start, min(start + length, num))], schedule)
    with Ledger(model, None, inputs=batch) as ledger:
        mean_square(model, batch).backward()
    return int(max(ledger.timeline.columns[Column.ACTIVATIONS])) / batch.nbytes


def test_segments_hold_the_square_root_of_the_depth():
    nums = [16, 64, 256]
    held = [held_bytes(n, (), math.isqrt(n)) for n in nums]
    exponent = np.polyfit(np.log(nums), np.log(held), 1)[0]
    assert 0.4 <= exponent <= 0.6


def test_halving_again_and_again_holds_the_logarithm_of_the_depth():
    def halved(num):
        return () if num == 1 else (num // 2, *padded(num - num // 2), *padded(num // 2))

    def padded(num):
        return halved(num) or (0,)

    nums = [16, 32, 64, 128, 256]
    held = [held_bytes(n, halved(n), n) for n in nums]
    steps = np.diff(held)
    assert all(step <= 3 for step in steps)  # a few tensors more for each doubling
    passes = [max(forward_passes(halved(n), n)) for n in nums]
    assert passes == [math.log2(n) + 1 for n in nums]


class Products(TorchDispatchMode):
    """Counts the matrix products of linear layers that are run, in backward again."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func is torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num", [16, 64])
@BOTH
def test_one_level_of_segments_runs_no_block_more_than_once_again(num, by_modules):
    model, batch = Stack(num), torch.randn(4, 32)
    for start in range(0, num, 4):
        attach(model, [f"body.{i}" for i in range(start, start + 4)], (), (), by_modules)
    with Products() as products:
        mean_square(model, batch).backward()
    assert products.num == 2 * num


@pytest.mark.parametrize("seed", range(6))
@BOTH
def test_a_schedule_runs_each_block_as_often_as_it_says(seed, by_modules):
    schedule = random_schedule(random.Random(seed), 8)
    model, batch = Stack(8), torch.randn(4, 32)
    attach(model, [f"body.{i}" for i in range(8)], schedule, (), by_modules)
    with Products() as products:
        mean_square(model, batch).backward()
    assert products.num == 8 + sum(forward_passes(schedule, 8))


# -- schedules --------------------------------------------------------------------------------------------


def all_schedules(num):
    if num <= 0:
        yield ()
        return
    for rest in all_schedules(num - 1):
        yield (0, *rest)
    for code in range(1, num):
        for right, left in itertools.product(all_schedules(num - code), all_schedules(code)):
            yield (code, *right, *left)


def cost(chain, schedule):
    """Seconds of a schedule, and the most bytes of what it holds on purpose."""
    num = len(chain.seconds)
    passes = forward_passes(schedule, num)
    held = [
        sum(chain.saved_bytes[s] for s in h.stages if s <= stage)
        + sum(chain.border_bytes[b] for b in h.borders if b)
        for stage, h in enumerate(holdings(schedule, num))
    ]
    return sum(p * s for p, s in zip(passes, chain.seconds, strict=True)), max(held)


@pytest.mark.parametrize("seed", range(5))
def test_no_schedule_is_faster_within_the_bytes_of_those_found(seed):
    rng = random.Random(seed)
    seconds = tuple(rng.uniform(1, 5) for _ in range(5))
    saved = tuple(rng.randint(100, 400) for _ in range(5))
    chain = Chain(seconds, saved, tuple(rng.randint(20, 90) for _ in range(5)))
    every = [cost(chain, s) for s in all_schedules(5)]
    room = 0.01 * sum(saved)  # memory is counted in steps
    for schedule in best_schedules(chain):
        ours, held = cost(chain, schedule)
        assert (
            ours <= min(s for s, b in every if b <= held - room) + 1e-9
            if any(b <= held - room for _, b in every)
            else True
        )
    assert cost(chain, best_schedules(chain)[0])[0] == pytest.approx(sum(seconds))


def test_deep_chains_get_schedules_from_one_forward_pass_more_to_few_bytes():
    chain = Chain((1.0,) * 1000, (3,) * 1000, (1,) * 1000)
    found = [cost(chain, s) for s in best_schedules(chain)]
    assert found[0][0] == 1000
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(found))
    assert any(s <= 2000 and b <= 0.05 * 3000 for s, b in found)
    assert found[-1][1] <= 0.01 * 3000
    assert found[-1][0] <= 1000 * (1 + math.log2(1000))


def test_segments_tile_a_chain():
    for num in (2, 5, 12, 48, 200, 1000):
        chain = tuple(map(str, range(num)))
        found = list(segments(chain))
        assert chain in found
        by_length = {}
        for segment in found:
            start = int(segment[0])
            assert segment == chain[start : start + len(segment)]
            by_length.setdefault(len(segment), []).append(segment)
        assert len(found) <= 200
