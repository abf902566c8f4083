"""Sequence parallelism over two processes: gradients of the whole layer, half the bytes of norms and dropouts."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn import functional

from slimgrad import Ledger
from slimgrad.errors import ArgumentError, UnsupportedError
from slimgrad.layers.sequence_parallel import SequenceParallel

WIDTH, HEADS, LENGTH = 32, 4, 24


class Layer(nn.Module):
    """A Transformer layer whose norms and dropouts are named, so that the ledger can tell their bytes."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop1, self.drop2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x):
        normed = self.norm1(x)
        q, k, v = (
            part(normed).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop1(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.drop2(self.down(functional.gelu(self.up(self.norm2(x)))))


def in_parallel(layer):
    parallel = SequenceParallel()
    for name in ("q", "k", "v", "up"):
        setattr(layer, name, parallel.columns(getattr(layer, name)))
    for name in ("out", "down"):
        setattr(layer, name, parallel.rows(getattr(layer, name)))
    parallel.sum_gradients(layer.norm1, layer.norm2)
    return parallel, layer


def whole_of(parallel, name, gradient, dim):
    parts = [torch.empty_like(gradient) for _ in range(parallel.size)]
    dist.all_gather(parts, gradient.contiguous())
    return torch.cat(parts, dim)


def compare():
    torch.manual_seed(0)
    plain = Layer().double()
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    out = plain(x)
    out.square().mean().backward()
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    torch.manual_seed(0)
    parallel, layer = in_parallel(Layer().double())
    y = x.detach().clone().requires_grad_()
    found = parallel.unshard(layer(parallel.shard(y)))
    torch.testing.assert_close(found, out, rtol=1e-10, atol=1e-12)
    found.square().mean().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-9, atol=1e-12)
    for name, parameter in layer.named_parameters():
        gradient, owner = parameter.grad, name.split(".")[0]
        if owner in ("q", "k", "v", "up"):
            gradient = whole_of(parallel, name, gradient, 0)
        elif name in ("out.weight", "down.weight"):
            gradient = whole_of(parallel, name, gradient, 1)
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-12, msg=name)


def held(layer, x):
    with Ledger(layer, inputs=x) as ledger:
        out = layer(x)
    modules = ledger.modules
    names = ("norm1", "norm2", "drop1", "drop2")
    assert out.requires_grad
    return {name: modules.get(name, 0) for name in names}


def count_bytes():
    x = torch.randn(2, LENGTH, WIDTH)
    plain = held(Layer(dropout=0.1), x.clone().requires_grad_())
    parallel, layer = in_parallel(Layer(dropout=0.1))
    shared = held(layer, parallel.part(x).clone().requires_grad_())
    assert all(plain.values()), plain
    for name, num_bytes in plain.items():
        assert shared[name] <= 0.55 * num_bytes, (name, shared[name], num_bytes)


def refuse():
    parallel = SequenceParallel()
    with pytest.raises(ArgumentError, match="multiple of 2"):
        parallel.shard(torch.zeros(1, 5, 4))
    x = torch.randn(1, 4, WIDTH, requires_grad=True)
    (grad,) = torch.autograd.grad(
        parallel.columns(nn.Linear(WIDTH, 8))(x).square().sum(), x, create_graph=True
    )
    with pytest.raises(UnsupportedError, match="double backward"):
        grad.sum().backward()


def worker(rank, port, jobs):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for job in jobs:
            job()
    finally:
        dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one_and_half_the_bytes_of_norms_and_dropouts():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(worker, args=(port, (compare, count_bytes, refuse)), nprocs=2)


def test_without_processes_it_is_refused():
    with pytest.raises(UnsupportedError, match="init_process_group"):
        SequenceParallel()
