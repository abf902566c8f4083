"""Offloaded activations give the bits of plain autograd, leave memory between the passes, and leave no trace."""

import copy
import functools
import os
import threading

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimgrad.errors import MethodError, StorageError
from slimgrad.host import Host
from slimgrad.method import Block, Record, Refusal, Restore, Scope, Undo
from slimgrad.methods.activations.offload_activations import OffloadActivations
from slimgrad.storage import store_of


class Attention(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        weights = functional.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.3, self.training)
        mixed = (weights @ v).transpose(1, 2).reshape(n, t, d)
        return x + functional.dropout(functional.gelu(self.out(mixed)), 0.2, self.training)


class Recurrent(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


class Mlp(nn.Sequential):
    def __init__(self, width=16):
        super().__init__(
            nn.Linear(width, 2 * width), nn.ReLU(inplace=True), nn.Linear(2 * width, width)
        )


class Conv(nn.Sequential):
    def __init__(self, width=4):
        super().__init__(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )


class Chain(nn.Module):
    """Blocks one after another, the first of them called once more at the end."""

    def __init__(self, block, num=3):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(num))

    def forward(self, x):
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        return x


SHAPES = {Attention: (2, 5, 16), Recurrent: (2, 5, 16), Mlp: (7, 16), Conv: (2, 4, 6, 6)}


def host_of(model):
    return Host(model, None, lambda model, batch: model(batch).square().mean())


def attach(host, paths=("blocks.0", "blocks.1", "blocks.2"), **fields):
    method = OffloadActivations(**{"min_bytes": 1, **fields})
    return Undo.all([method.attach(Block(path, Scope.BLOCK, host=host)) for path in paths])


def gradients(host, batch, num_backward=1):
    torch.manual_seed(7)
    batch = batch.clone().requires_grad_()
    loss = host.loss_fn(host.model, batch)
    for i in range(num_backward):
        loss.backward(retain_graph=i + 1 < num_backward)
    found = [loss.detach(), batch.grad]
    for parameter in host.model.parameters():
        found.append(parameter.grad)
        parameter.grad = None
    return found + [b.clone() for b in host.model.buffers()] + [torch.rand(3)]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def flush(store):
    """When this is written, everything before it is."""
    slot = store.allocate(1)
    store.write(slot, torch.zeros(1, dtype=torch.uint8))
    store.free(slot)


class Live(TorchDispatchMode):
    """Every storage that an operation returned and that is no weight, while it is alive."""

    def __init__(self, model):
        super().__init__()
        self._seen = {}
        self._weights = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if StorageWeakRef(storage) not in self._weights:
                    self._seen[StorageWeakRef(storage)] = storage.nbytes()
        return result

    @property
    def bytes(self):
        return sum(size for seen, size in self._seen.items() if not seen.expired())


def written_bytes(monkeypatch):
    sizes, pwritev = [], os.pwritev

    def count(fd, parts, position):
        sizes.append(sum(map(len, parts)))
        return pwritev(fd, parts, position)

    monkeypatch.setattr(os, "pwritev", count)
    return sizes


@pytest.mark.parametrize("prefetch", [0, 1, 2])
@pytest.mark.parametrize("block", SHAPES, ids=lambda block: block.__name__)
def test_bits_of_plain_autograd(block, prefetch):
    host = host_of(Chain(block))
    plain = host_of(copy.deepcopy(host.model))
    undo = attach(host, prefetch=prefetch)
    for _ in range(2):
        batch = torch.randn(SHAPES[block])
        assert equal(gradients(host, batch), gradients(plain, batch))
    undo()
    batch = torch.randn(SHAPES[block])
    assert equal(gradients(host, batch), gradients(plain, batch))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_and_autocast(dtype):
    host = host_of(Chain(Attention).to(dtype))
    plain = host_of(copy.deepcopy(host.model))
    attach(host)
    batch = torch.randn(SHAPES[Attention], dtype=dtype)
    assert equal(gradients(host, batch), gradients(plain, batch))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float64):
        assert equal(gradients(host, batch), gradients(plain, batch))


@pytest.mark.parametrize("prefetch", [0, 1])
def test_two_backward_passes(prefetch):
    host = host_of(Chain(Attention))
    plain = host_of(copy.deepcopy(host.model))
    attach(host, prefetch=prefetch)
    batch = torch.randn(SHAPES[Attention])
    assert equal(gradients(host, batch, 3), gradients(plain, batch, 3))


def test_second_derivatives():
    host = host_of(Chain(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())))
    plain = host_of(copy.deepcopy(host.model))
    attach(host)
    found = []
    for each in (host, plain):
        batch = torch.ones(3, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(each.loss_fn(each.model, batch), batch, create_graph=True)
        gradient.square().sum().backward()
        found.append([p.grad for p in each.model.parameters() if p.grad is not None])
    assert equal(*found)


def test_a_non_contiguous_input_and_a_frozen_layer():
    host = host_of(Chain(Mlp))
    host.model.blocks[1][0].weight.requires_grad_(False)
    plain = host_of(copy.deepcopy(host.model))
    attach(host)
    found = []
    for each in (host, plain):
        leaf = torch.arange(16.0 * 7).view(16, 7).requires_grad_()
        each.loss_fn(each.model, leaf.t()).backward()
        found.append([leaf.grad, *(p.grad for p in each.model.parameters() if p.grad is not None)])
    assert equal(*found)


def test_memory_between_the_passes():
    sizes = []
    for is_offloaded in (False, True):
        host = host_of(
            Chain(lambda: nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)))
        )
        if is_offloaded:
            attach(host)
        with Live(host.model) as live:
            loss = host.loss_fn(host.model, torch.randn(100, 64))
            if is_offloaded:
                flush(store_of(host))
            sizes.append(live.bytes)
        loss.backward()
    block_inputs, hidden = 4 * 100 * 64 * 4, 2 * 4 * 100 * 256 * 4
    slack = 100 * 64 * 4 + 64  # the loss's own tensors
    assert block_inputs + hidden <= sizes[0] <= block_inputs + hidden + slack
    assert block_inputs <= sizes[1] <= block_inputs + slack


def drop(live, seen, parameter):
    parameter.grad = None  # gradients do grow with depth
    seen.append(live.bytes)


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_memory_during_backward_does_not_grow_with_depth(prefetch):
    peaks = []
    for num in (4, 8):
        model = Chain(lambda: nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64)), num)
        host = host_of(model)
        attach(host, [f"blocks.{i}" for i in range(num)], prefetch=prefetch)
        with Live(host.model) as live:
            loss = host.loss_fn(model, torch.randn(100, 64))
            flush(store_of(host))
            held, seen = live.bytes, []
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(functools.partial(drop, live, seen))
            loss.backward()
        peaks.append(max(seen) - held)
    hidden = 100 * 512 * 4
    assert peaks[1] <= peaks[0] + hidden // 4
    assert peaks[1] <= (2 * (prefetch + 1) + 2) * hidden


def test_each_storage_is_written_once_and_no_weight(monkeypatch):
    class Reuse(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32))
            self.register_buffer("shift", torch.ones(32, 32))

        def forward(self, x):
            h = x @ self.weight.t()  # saves the input and a view of the weight
            a, b = h[:, :16], h[:, 16:]
            return (
                torch.cat([a * b, a.sin()], 1) * self.shift
            )  # saves h three times, and the buffer

    host = host_of(Chain(Reuse, 1))
    attach(host, ["blocks.0"])
    sizes = written_bytes(monkeypatch)
    host.model.blocks[0](torch.randn(32, 32, requires_grad=True)).sum().backward()
    flush(store_of(host))
    assert sizes == [32 * 32 * 4, 1]


def test_small_tensors_stay(monkeypatch):
    host = host_of(Chain(Mlp))
    attach(host, min_bytes=7 * 32 * 4 + 1)
    sizes = written_bytes(monkeypatch)
    gradients(host, torch.randn(SHAPES[Mlp]))
    assert sizes == []


def test_forwards_without_gradients_write_nothing(monkeypatch):
    host = host_of(Chain(Attention))
    attach(host)
    sizes = written_bytes(monkeypatch)
    with torch.no_grad():
        host.model(torch.randn(SHAPES[Attention]))
    with torch.inference_mode():
        host.model(torch.randn(SHAPES[Attention]))
    host.model.requires_grad_(False)(torch.randn(SHAPES[Attention]))
    assert sizes == []


def test_slots_are_used_again():
    host = host_of(Chain(Attention))
    attach(host)
    sizes = []
    for _ in range(4):
        gradients(host, torch.randn(SHAPES[Attention]))
        sizes.append(store_of(host).file_bytes)
    host.loss_fn(host.model, torch.randn(SHAPES[Attention]))  # a graph dropped without backward
    gradients(host, torch.randn(SHAPES[Attention]))
    assert set(sizes) == {sizes[0]}
    assert store_of(host).file_bytes == sizes[0]


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_the_block_before_is_read_ahead(prefetch, monkeypatch):
    host = host_of(Chain(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)), 3))
    store, reads = None, []
    attach(host, prefetch=prefetch)
    store = store_of(host)
    start_read = store.start_read
    monkeypatch.setattr(store, "start_read", lambda *a: reads.append(1) or start_read(*a))
    x = torch.randn(5, 4)
    outputs = []
    for block in host.model.blocks:
        x = block[0].weight.new_ones(5, 4) * x[:, :4]
        x = block(x)
        outputs.append(x)
    counts = []
    outputs[1].register_hook(lambda _: counts.append(len(reads)))
    x.sum().backward()
    assert counts == [1 + prefetch]  # of one storage a block, before the block in the middle begins
    assert len(reads) == 3


def test_undo_leaves_no_trace():
    host = host_of(Chain(Mlp))
    before = [dict(m.__dict__) for m in host.model.modules()]
    undo = attach(host)
    assert "forward" in host.model.blocks[0].__dict__
    undo()
    undo()
    assert [dict(m.__dict__) for m in host.model.modules()] == before
    own = host.model.blocks[0].forward
    host.model.blocks[0].forward = own
    attach(host, ["blocks.0"])()
    assert host.model.blocks[0].__dict__["forward"] is own


def test_a_copy_of_the_model_computes_with_its_own_weights():
    host = host_of(Chain(Mlp))
    attach(host)
    copied = copy.deepcopy(host.model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied(torch.randn(SHAPES[Mlp])).any()


def test_module_hooks_fire_once():
    host, calls = host_of(Chain(Mlp)), []
    host.model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    attach(host)
    gradients(host, torch.randn(SHAPES[Mlp]))
    assert calls == [1]


class Modified(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x):
        h = x * 2
        y = (h * self.weight).sum()  # saves h and the weight
        y = (
            y + torch.tanh(x * self.weight * 0).sum()
        )  # saves the input, and a tensor after which h is written
        with torch.no_grad():
            {"saved": h, "input": x, "weight": self.weight}[self.what].add_(1)
        return y


class ModifiedLast(nn.Module):
    """Nothing is saved after ``h``, so it is not written when it is modified."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x):
        h = x * 2
        y = (h * self.weight).sum()
        with torch.no_grad():
            h.add_(1)
        return y


class ModifiedBetween(nn.Module):
    """Allowed in plain autograd: the first thing that saved ``h`` is not in the loss."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x):
        h = x * 2
        self.unused = h * self.weight
        with torch.no_grad():
            h.add_(1)
        return (h * self.weight).sum()


def test_a_storage_is_written_again_when_it_was_modified():
    host = host_of(Chain(ModifiedBetween, 1))
    attach(host, ["blocks.0"])
    host.model.blocks[0](torch.ones(64)).backward()
    assert host.model.blocks[0].weight.grad.eq(3).all()


@pytest.mark.parametrize("what", ["input", "weight"])
def test_what_stays_is_checked_as_autograd_does(what):
    host = host_of(Chain(lambda: Modified(what), 1))
    attach(host, ["blocks.0"])
    x = torch.ones(64, requires_grad=True) * 1
    y = x * host.model.blocks[0].weight if what == "weight" else x
    loss = host.model.blocks[0](y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_change_after_the_write_does_no_harm_and_one_during_it_is_told(monkeypatch):
    host = host_of(Chain(lambda: Modified("saved"), 1))
    attach(host, ["blocks.0"])
    store, weight = store_of(host), host.model.blocks[0].weight
    start_write = store.start_write

    def written_first(*arguments):
        transfer = start_write(*arguments)
        transfer.wait()
        return transfer

    monkeypatch.setattr(store, "start_write", written_first)
    host.model.blocks[0](torch.ones(64)).backward()
    assert weight.grad.eq(2).all()
    monkeypatch.undo()

    begun, pwritev = threading.Event(), os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda *a: begun.wait() and pwritev(*a))
    loss = host.model.blocks[0](torch.ones(64))
    begun.set()
    with pytest.raises(StorageError, match="in-place"):
        loss.backward()


def test_a_change_before_the_write_is_told_as_autograd_tells_it():
    host = host_of(Chain(ModifiedLast, 1))
    attach(host, ["blocks.0"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        host.model.blocks[0](torch.ones(64)).backward()


def test_what_a_block_returns_stays(monkeypatch):
    host = host_of(Chain(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh()), 3))
    attach(host)
    sizes = written_bytes(monkeypatch)
    gradients(host, torch.randn(5, 8))
    assert sizes == []  # tanh saves its output alone, which is the next block's input


def test_a_shortened_file_is_told():
    host = host_of(Chain(Mlp))
    attach(host)
    loss = host.loss_fn(host.model, torch.randn(SHAPES[Mlp]))
    flush(store_of(host))
    os.ftruncate(store_of(host).fileno(), 0)
    with pytest.raises(StorageError, match="cut short"):
        loss.backward()


def test_backward_after_undo_still_works():
    host = host_of(Chain(Mlp))
    plain = host_of(copy.deepcopy(host.model))
    undo = attach(host)
    batch = torch.randn(SHAPES[Mlp])
    for each in (host, plain):
        loss = each.loss_fn(each.model, batch)
        undo()
        loss.backward()
    assert equal(*([p.grad for p in each.model.parameters()] for each in (host, plain)))


def record(**changed):
    return Record(
        **{
            "saved_bytes": 10**6,
            "held_bytes": 10**6,
            "input_bytes": 1000,
            "output_bytes": 1000,
            "forward_s": 1.0,
            "backward_s": 2.0,
            "read_bytes_s": 1e6,
            "write_bytes_s": 5e5,
            **changed,
        }
    )


def test_offer():
    changed = OffloadActivations().offer(Block("x", Scope.BLOCK, record())).record
    assert changed.held_bytes == 0
    assert changed.saved_bytes == 10**6
    assert changed.restore is Restore.COPY
    assert (changed.store_s, changed.restore_s) == (pytest.approx(2.0), pytest.approx(1.0))


@pytest.mark.parametrize(
    "changed",
    [
        {"saved_bytes": 1000, "held_bytes": 1000},
        {"held_bytes": 0},
        {"restore": Restore.REPLAY, "held_bytes": 0},
    ],
)
def test_refusals(changed):
    block = Block("x", Scope.BLOCK, record(**changed))
    assert isinstance(OffloadActivations().offer(block), Refusal)


def test_bounds():
    for fields in ({"min_bytes": 0}, {"prefetch": -1}):
        with pytest.raises(MethodError):
            OffloadActivations(**fields)
