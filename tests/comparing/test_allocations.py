"""The profiler's allocation events against known sizes, and against the ledger on eager models."""

import pytest
import torch
from torch import nn

from slimgrad.comparing.allocations import allocated_peak, held_bytes
from slimgrad.comparing.peers import PEERS, PLAIN
from slimgrad.comparing.runner import PeerRunner
from slimgrad.comparing.zoo import subject
from slimgrad.measuring.ledger import Ledger

CPU = torch.device("cpu")
SIZE = 4 * 2**20


def test_the_peak_of_known_allocations():
    def run():
        kept = torch.zeros(2**20)
        other = torch.zeros(2**21)
        del other
        return kept + 1, torch.zeros(2**20)

    assert allocated_peak(run) == 3 * SIZE
    assert allocated_peak(run, 1000) == 3 * SIZE + 1000


def test_what_was_there_before_counts_to_the_end_even_if_it_is_freed():
    held = [torch.zeros(2**20)]

    def run():
        held.clear()
        return torch.zeros(2**20)

    assert allocated_peak(run, SIZE) == 2 * SIZE


def test_what_an_operation_allocates_in_backward_is_seen():
    x = torch.randn(2**20, requires_grad=True)
    y = x.sin()

    def run():
        y.sum().backward()

    assert allocated_peak(run) >= 2 * SIZE  # the cosine and the gradient


def test_held_bytes_counts_each_storage_once():
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    model["b"].weight = model["a"].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batch = [torch.zeros(10), torch.zeros(10)]
    batch[1] = batch[0][:5]
    assert held_bytes(model, optimizer, batch) == 4 * (64 + 10)
    model["a"](torch.randn(8)).sum().backward()
    assert held_bytes(model, optimizer, batch) == 4 * (64 + 64 + 10)
    optimizer.step()
    assert held_bytes(model, optimizer, batch) == 4 * (64 * 3 + 10)


@pytest.mark.parametrize("peer", [PLAIN, PEERS["checkpoint"]], ids=lambda p: p.name)
@pytest.mark.parametrize("name", ["gpt2", "vit", "t5"])
def test_profiler_and_ledger_agree_on_eager_steps(name, peer):
    runner = PeerRunner(peer, subject(name, "small"), CPU)
    runner.step()
    before = held_bytes(runner.model, runner.optimizer, runner.batch)
    profiled = allocated_peak(runner.step, before)
    with Ledger(runner.model, runner.optimizer, inputs=runner.batch) as ledger:
        runner.step()
    assert profiled == pytest.approx(ledger.peak_bytes, rel=0.03)
    assert before < 0.8 * profiled  # the agreement is not that of the weights alone
