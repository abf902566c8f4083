"""Reconstruction on a second thread: the same bits, one function's bytes, and chosen only where it was timed faster."""

import threading

import pytest
import torch
from torch import nn

from slimgrad import Ledger
from slimgrad.errors import ArgumentError, UnsupportedError
from slimgrad.layers import overlap_times
from slimgrad.layers.coupling import ReversibleBlock
from slimgrad.layers.overlap_times import OverlapTimes
from slimgrad.layers.pareprop import pareprop
from slimgrad.layers.reversible_sequence import ReversibleSequence
from slimgrad.layers.sequence_operations import SelfAttention, feed_forward
from slimgrad.types import Column

WIDTH = 32


class Watched(nn.Module):
    """A feed-forward network with dropout that notes the threads it is called on."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(feed_forward(WIDTH, 4), nn.Dropout(0.2))
        self.threads = []

    def forward(self, x):
        self.threads.append(threading.current_thread().name)
        return self.net(x)


def transformer(depth=12, **options):
    torch.manual_seed(0)
    blocks = (ReversibleBlock(SelfAttention(WIDTH, 4), Watched()) for _ in range(depth))
    return ReversibleSequence(blocks, **options)


def streams_of(size=4, tokens=16):
    torch.manual_seed(1)
    return [torch.randn(size, tokens, WIDTH, requires_grad=True) for _ in range(2)]


def gradients(chain, streams):
    torch.manual_seed(2)
    loss = sum((k + 1) * x.square().mean() for k, x in enumerate(chain(streams)))
    return torch.autograd.grad(loss, [*streams, *chain.parameters()])


def test_gradients_of_12_blocks_are_bit_equal_to_those_in_order():
    streams = streams_of()
    in_order, overlapped = transformer(), transformer(overlap=True)
    expected = gradients(in_order, streams)
    for _ in range(3):
        for a, b in zip(gradients(overlapped, streams), expected, strict=True):
            assert torch.equal(a, b)
    here = threading.current_thread().name
    second = [set(block.functions[1].threads) for block in overlapped.blocks]
    assert all(threads == {here, "reversible_0"} for threads in second[:-1])
    assert second[-1] == {here}  # nothing comes before it
    assert all(set(block.functions[1].threads) == {here} for block in in_order.blocks)


def test_blocks_that_need_no_gradient_are_not_reconstructed():
    chain = transformer(4, overlap=True)
    chain.blocks[:2].requires_grad_(False)
    streams = [x.detach() for x in streams_of()]
    sum(x.square().mean() for x in chain(streams)).backward()
    assert [len(block.functions[1].threads) for block in chain.blocks] == [1, 1, 2, 2]


def peak_of(depth, **options):
    chain = transformer(depth, overlap=options.pop("overlap", False)).requires_grad_(False)
    chain.is_reversible = options.pop("is_reversible", True)
    streams = streams_of()
    with Ledger(chain, inputs=streams) as ledger:
        sum(x.square().mean() for x in chain(streams)).backward()
    held = ledger.timeline.columns
    return int((held[Column.ACTIVATIONS] + held[Column.TEMPORARIES]).max())


def test_the_peak_is_at_most_one_block_more_whatever_the_depth():
    in_order, overlapped = peak_of(12), peak_of(12, overlap=True)
    one_block = peak_of(6, is_reversible=False) - peak_of(5, is_reversible=False)
    print(in_order, overlapped, one_block)
    assert in_order < overlapped <= in_order + one_block
    assert overlapped == peak_of(4, overlap=True)


def times_of(overlapped_s, *in_order_s, num_cores=4):
    in_order = dict(zip((1, 2), in_order_s, strict=False))
    return OverlapTimes(overlapped_s, in_order, 1, num_cores)


@pytest.mark.parametrize(
    ("times", "is_faster"),
    [
        (times_of(0.8, 1.0), True),
        (times_of(0.8, 1.0, 0.9), True),
        (times_of(0.8, 1.0, 0.7), False),  # two threads inside operations do better
        (times_of(0.97, 1.0), False),  # noise
        (times_of(0.8, 1.0, num_cores=1), False),  # it cannot be
    ],
)
def test_it_is_chosen_only_where_it_is_faster_than_as_many_threads_in_order(times, is_faster):
    assert times.is_faster == is_faster
    assert ("overlapped is chosen" in str(times)) == is_faster


@pytest.fixture
def clock(monkeypatch):
    """``clock(overlapped_s)``: passes are run once, and told to have taken that and 1 s in order. Notes the ways."""
    asked = []

    def set_to(overlapped_s):
        def in_turns(trial, run, ways, num_runs):
            run()
            asked.append((len(trial.blocks), ways))
            return [overlapped_s if overlap else 1.0 for overlap, _ in ways]

        monkeypatch.setattr(overlap_times, "_in_turns", in_turns)
        monkeypatch.setattr(overlap_times, "cores", lambda: 2)
        return asked

    return set_to


@pytest.mark.parametrize(("overlapped_s", "is_faster"), [(0.8, True), (1.2, False)])
def test_what_was_faster_is_set(clock, overlapped_s, is_faster):
    asked = clock(overlapped_s)
    chain = transformer(6)
    assert pareprop(chain, streams_of()).is_faster == is_faster
    assert chain.overlap is is_faster
    assert asked == [(4, [(False, 1), (False, 2), (True, 1)])]


@pytest.mark.parametrize("overlapped_s", [0.8, 1.2])
def test_auto_times_once_at_the_first_pass_with_gradients(clock, overlapped_s):
    asked, streams = clock(overlapped_s), streams_of()
    chain, plain = transformer(4, overlap="auto"), transformer(4)
    with torch.no_grad():
        chain(streams)
    with Ledger(chain):
        chain(streams)
    assert not asked
    for _ in range(2):
        for a, b in zip(gradients(chain, streams), gradients(plain, streams), strict=True):
            assert torch.equal(a, b)
    assert len(asked) == 1
    threads = {name for block in chain.blocks for name in block.functions[1].threads}
    assert ("reversible_0" in threads) == (overlapped_s < 1)


def test_timing_is_real_and_changes_nothing():
    chain, streams, called = transformer(3), streams_of(), []
    chain.blocks[0].functions[0].norm = nn.BatchNorm1d(16)
    for module in chain.modules():
        module.register_forward_hook(lambda *_: called.append(1))
    state = {name: value.clone() for name, value in chain.state_dict().items()}
    random, num_threads = torch.get_rng_state(), torch.get_num_threads()
    times = chain.overlap_times(streams, num_runs=2)
    assert min(times.overlapped_s, *times.sequential_s.values()) > 0
    assert times.num_cores == overlap_times.cores()
    assert times.num_threads == num_threads == torch.get_num_threads()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in chain.state_dict().items())
    assert all(p.grad is None for p in [*chain.parameters(), *streams])
    assert not called
    assert not any(block.functions[1].threads for block in chain.blocks)


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(ArgumentError, match="found 'often'"):
        transformer(2, overlap="often")
    chain = transformer(2, overlap="auto")
    chain.blocks[0].functions[0].scaled = chain.blocks[0].functions[0].norm.weight * 2
    with pytest.raises(UnsupportedError, match="cannot be copied"):
        chain(streams_of())
