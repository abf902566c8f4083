"""Single storages moved out of memory: their bytes by closed forms, when they are read, and what is chosen."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import random

import pytest
import torch
from tests.methods.activations.test_selective_recompute import attached, is_empty
from tests.single_method_plans import plan_of, predicted_peak, programme_of, scheme_of
from torch import nn

from slimgrad import Ledger, measure
from slimgrad.errors import StorageError
from slimgrad.method import Block, OperationGraph, Record, Restore, Scope
from slimgrad.methods.activations.selective_recompute import (
    SelectiveRecompute,
    Transfers,
    operations_again,
    pareto_front,
)
from slimgrad.planning.offers import Allowed
from slimgrad.planning.plan import Choice, Plan
from slimgrad.planning.settings import layout_of
from slimgrad.planning.workbench import Workbench
from slimgrad.storage import store_of

N, D, H = 64, 32, 256  # samples, features, hidden
HIDDEN = N * H * 4
UP, GELU = 0, 1  # the storages of a block that its backward needs, by number


def chain(num=4):
    torch.manual_seed(5)
    blocks = [nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)) for _ in range(num)]
    return nn.Sequential(*blocks)


def loss_of(model, batch):
    return model(batch).square().sum()


def made_chain():
    return chain(), loss_of, torch.randn(N, D)


def gradients(model):
    return [p.grad for p in model.parameters()]


def assert_equal(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("move", [(), (UP,), (GELU,), (UP, GELU)])
def test_what_is_moved_leaves_memory_between_the_passes(move):
    held = []
    for chosen in (None, move):
        model, _, batch = made_chain()
        if chosen is not None:
            attached(model, tuple({UP, GELU} - set(chosen)), move=chosen)
        with Ledger(model) as ledger:
            loss = loss_of(model, batch)
            held.append(ledger.now_bytes)
        loss.backward()
    assert held[0] - held[1] == 4 * len(move) * HIDDEN


@pytest.mark.parametrize("num", [4, 8])
def test_backward_holds_what_it_is_at_and_the_next_whatever_the_depth(num):
    model, batch = chain(num), torch.randn(N, D)
    attached(model, (), move=(UP, GELU))
    with Ledger(model) as ledger:
        loss = loss_of(model, batch)
        between, forward_peak = ledger.now_bytes, ledger.peak_bytes
        loss.backward()
    block_gradients = 2 * D * H * 4 + (D + H) * 4
    border = N * D * 4
    # the block's two storages, the gradient of GELU's output and that of its input
    most = between + 4 * HIDDEN + num * block_gradients + 3 * border
    least = between + 3 * HIDDEN + (num - 1) * block_gradients - num * border
    assert forward_peak < least <= ledger.peak_bytes <= most


@pytest.mark.parametrize("keep", [(), (UP,), (GELU,)])
def test_the_replay_predicts_a_chain_to_the_bytes_of_its_biases(keep):
    model, _, batch = made_chain()
    profile = measure(model, None, loss_of, batch, limit_s=0.0)
    layout = layout_of(profile, profile.variants[()])
    method = SelectiveRecompute(keep, tuple({UP, GELU} - set(keep)))
    programme = programme_of(profile, scheme_of(profile), dict.fromkeys(layout.blocks, method))
    assert len(programme.menu.options) == 4
    model = chain()
    attached(model, keep, move=method.move)
    with Ledger(model) as ledger:
        loss_of(model, batch).backward()
    biases = (D + H) * 4  # the instant at which their gradients are made, with or without this
    assert 0 <= predicted_peak(programme) - ledger.peak_bytes <= biases


def test_writes_that_outlive_a_block_are_counted_where_nobody_waits_for_them():
    model, _, batch = made_chain()
    profile = measure(model, None, loss_of, batch, limit_s=0.0)
    live = []
    for device in ("cpu", "cuda"):
        profile.device = device
        programme = programme_of(
            profile, scheme_of(profile), {"1": SelectiveRecompute((), (UP, GELU))}
        )
        assert programme.layout.writes_behind == (device == "cuda")
        live.append(programme.replay([1])[0])
    assert (live[1] - live[0]).max() == 2 * HIDDEN
    assert (live[1] >= live[0]).all()


def test_the_next_one_is_read_while_backward_is_at_one(monkeypatch):
    block = nn.Sequential(nn.Linear(D, H), *(nn.Tanh() for _ in range(3)), nn.Linear(H, D))
    host = attached(block, (), [""], move=(1, 2, 3))
    store, reads = store_of(host), []
    start_read = store.start_read
    monkeypatch.setattr(store, "start_read", lambda *a: reads.append(1) or start_read(*a))
    x = torch.randn(N, D)
    counts = []
    for tanh in block[1:4]:
        tanh.register_forward_hook(
            lambda *a: a[2].register_hook(lambda _: counts.append(len(reads))) and None
        )
    block(x).sum().backward()
    # before each tanh's backward, the last first: the layer after it asked for storage 3, and 2 was read ahead
    assert counts == [2, 2, 3]
    assert len(reads) == 3


@pytest.mark.parametrize("move", [(UP,), (UP, GELU), (GELU,)])
def test_backward_twice_and_second_derivatives(move):
    model = chain()
    plain = copy.deepcopy(model)
    store = store_of(attached(model, (), move=move))
    for each in (model, plain):
        loss = loss_of(each, torch.ones(N, D))
        loss.backward(retain_graph=True)
        loss.backward()
        x = torch.ones(N, D, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss_of(each, x), x, create_graph=True)
        gradient.square().sum().backward()
        del loss, gradient
    assert_equal(gradients(model), gradients(plain))
    gc.collect()
    assert is_empty(store)


def test_a_graph_dropped_without_backward_frees_the_store():
    model, _, batch = made_chain()
    store = store_of(attached(model, (), move=(UP, GELU)))
    loss = loss_of(model, batch)
    assert store.file_bytes == 4 * 2 * HIDDEN
    assert not is_empty(store)
    del loss
    gc.collect()
    size = store.file_bytes
    for _ in range(3):
        loss_of(model, batch).backward()
    assert store.file_bytes == size
    gc.collect()
    assert is_empty(store)


def test_a_block_that_fails_leaves_nothing_in_the_store():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(D, H)

        def forward(self, x_ND):
            h_NH = self.up(x_ND).tanh().sin().cos()
            raise ValueError(f"on purpose, with {h_NH.shape}")

    block = Failing()
    store = store_of(attached(block, (), [""], move=(1, 2, 3)))
    with pytest.raises(ValueError, match="on purpose"):
        block(torch.randn(N, D))
    gc.collect()
    assert store.file_bytes > 0
    assert is_empty(store)


def test_a_store_that_fails_is_told(monkeypatch):
    model, _, batch = made_chain()
    store = store_of(attached(model, (), move=(UP,)))
    loss = loss_of(model, batch)
    os.ftruncate(store.fileno(), 0)
    with pytest.raises(StorageError, match="cut short"):
        loss.backward()
    del loss
    monkeypatch.setattr(
        store, "start_write", lambda *_: (_ for _ in ()).throw(StorageError("full"))
    )
    with pytest.raises(StorageError, match="full"):
        loss_of(model, batch)
    gc.collect()
    assert is_empty(store)


class WrittenOver(nn.Module):
    """What is saved and moved is written over, by ``how``, while it may be on its way."""

    def __init__(self, how):
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.randn(N, H))

    def forward(self, x_NH):
        h_NH = x_NH * 2
        self.unused = h_NH * self.weight  # saves h
        with torch.no_grad():
            self.how(h_NH)
        return (h_NH * self.weight).sum()  # saves another value of the same storage


@pytest.mark.parametrize("how", [torch.Tensor.zero_, lambda h: h[:, 1:].add_(1)])
def test_a_value_is_in_the_store_before_it_is_written_over(how):
    found = []
    block = WrittenOver(how)
    plain = copy.deepcopy(block)
    attached(block, (), [""], move=(0,))
    for each in (block, plain):
        loss = each(torch.ones(N, H))
        if each is block:  # plain autograd refuses the value that was written over
            each.unused.sum().backward()
            assert each.weight.grad.eq(2).all()
            each.weight.grad = None
        loss.backward()
        found.append(each.weight.grad)
    assert torch.equal(*found)


def test_what_a_block_returns_stays():
    block = nn.Sequential(nn.Linear(D, H), nn.Tanh())
    store = store_of(attached(block, (), [""], move=(0, 1)))
    x = torch.randn(N, D)
    y = block(x)  # tanh saves what it returns
    with torch.no_grad():
        held = y.clone()
    y.sum().backward()
    assert torch.equal(y, held)
    gc.collect()
    assert is_empty(store)


def drawn_graph(seed, num=7):
    draw = random.Random(seed)
    operations = tuple(
        (
            draw.uniform(0.01, 1.0),
            tuple(sorted(draw.sample(range(i), min(i, draw.randint(1, 2))))),
            (i,),
        )
        for i in range(num)
    )
    sizes = tuple(draw.randint(1, 9) * 1000 for _ in range(num))
    is_saved = tuple(draw.random() < 0.7 or i == 0 for i in range(num))
    return OperationGraph(sizes, is_saved, operations)


def seconds_of(graph, transfers, keep, move):
    again = operations_again(graph, SelectiveRecompute(keep, move))
    moved = sum(transfers.seconds(graph.num_bytes[s]) for s in move)
    return sum(graph.operations[o][0] + 40e-6 for o in again) + moved


@pytest.mark.parametrize("seed", range(6))
def test_three_states_a_storage_are_what_exhaustive_search_finds(seed):
    graph, transfers = drawn_graph(seed), Transfers(2e4, 3e4, min_bytes=2000)
    large = [s for s, b in enumerate(graph.num_bytes) if graph.is_saved[s] and b >= 2000]
    everything = []
    for states in itertools.product("rkm", repeat=len(graph.num_bytes)):
        keep, move = (tuple(i for i, s in enumerate(states) if s == which) for which in "km")
        if set(move) <= set(large):
            held = sum(graph.num_bytes[s] for s in keep)
            everything.append((held, seconds_of(graph, transfers, keep, move)))
    front = pareto_front(graph, transfers)
    for keep, move in front:
        held = sum(graph.num_bytes[s] for s in keep)
        best = min(seconds for nbytes, seconds in everything if nbytes <= held)
        assert seconds_of(graph, transfers, keep, move) <= best * 1.02 + 1e-3
        assert set(move) <= set(large)
    assert front[0].keep == ()
    assert len(set(front)) == len(front)


def test_fast_transfers_are_used_and_slow_ones_change_nothing():
    used = 0
    for seed in range(6):
        graph = drawn_graph(seed)
        plain = pareto_front(graph)
        assert pareto_front(graph, Transfers(1.0, 1.0, min_bytes=1)) == plain
        assert pareto_front(graph, Transfers(1e9, 1e9)) == plain  # all are small
        fast = pareto_front(graph, Transfers(1e9, 1e9, min_bytes=1))
        used += any(point.move for point in fast)
        spent = [seconds_of(graph, Transfers(1e9, 1e9), *point) for point in fast]
        assert spent == sorted(spent, reverse=True)
        assert spent[0] <= seconds_of(graph, Transfers(1e9, 1e9), *plain[0]) + 1e-9
    assert used == 6


def test_offer_counts_what_is_moved_both_ways():
    graph = OperationGraph(
        (10**6, 10**6, 10**6),
        (True, True, False),
        ((1.0, (), (0,)), (2.0, (0,), (1,)), (4.0, (1,), (2,))),
    )
    record = Record(
        2 * 10**6, 2 * 10**6, 0, 0, 1.0, 2.0, graph=graph, read_bytes_s=1e6, write_bytes_s=5e5
    )
    block = Block("x", Scope.BLOCK, record)
    changed = SelectiveRecompute((), (0, 2)).offer(block).record
    assert changed.restore is Restore.OPERATIONS
    assert (changed.held_bytes, changed.moved) == (0, (0,))  # backward does not ask for the last
    assert changed.restore_s == pytest.approx(2.0 + 1.0, abs=1e-3)
    assert changed.store_s == pytest.approx(2.0, abs=1e-3)
    moved = SelectiveRecompute((1,), (0, 1)).offer(block).record
    assert (moved.kept, moved.moved) == ((1,), (0,))


def test_the_planner_moves_where_files_are_fast_and_products_slow():
    model, _, batch = made_chain()
    profile = measure(model, None, loss_of, batch, limit_s=0.0)
    trace = profile.variants[()]
    trace.op_seconds = trace.op_seconds * 0 + 1e-2
    chosen = {}
    for rate in (1e10, 1e3):
        profile.read_bytes_s = profile.write_bytes_s = rate
        programme = Workbench(profile, Allowed()).programme(scheme_of(profile))
        methods = [m for o in programme.menu.options for m in o.methods]
        chosen[rate] = [m for m in methods if isinstance(m, SelectiveRecompute) and m.move]
    assert chosen[1e10]
    assert not chosen[1e3]


def test_plans_saved_before_storages_were_moved_are_read(tmp_path):
    made = plan_of(
        chain(), None, [Choice("0", "selective_recompute", {"keep": (UP,), "move": (GELU,)})]
    )
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").choices[0].fields["move"] == (GELU,)
    data = json.loads((tmp_path / "plan.json").read_text())
    del data["choices"][0]["fields"]["move"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    choice = Plan.load(tmp_path / "plan.json").choices[0]
    assert SelectiveRecompute(**choice.fields) == SelectiveRecompute((UP,))
