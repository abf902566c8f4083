"""Gradient caching: the whole batch's gradients from one chunk's graph, masks replayed, over processes too."""

import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from slimgrad import Ledger
from slimgrad.errors import ArgumentError, BatchError, LossError, MethodError, UnsupportedError
from slimgrad.measuring.randomness import RandomState
from slimgrad.methods.activations.gathering import gather_rows
from slimgrad.methods.activations.grad_cache import GradCache
from slimgrad.methods.activations.replayed_calls import joined
from slimgrad.types import Column

VOCABULARY, TOKENS, WIDTH = 50, 12, 32


class Encoder(nn.Module):
    """A small Transformer over tokens, averaged where the mask is 1."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout, batch_first=True), 3
        )

    def forward(self, input_ids, attention_mask):
        x = self.layers(self.embedding(input_ids))
        return (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)


def encoder(dropout=0.0, dtype=torch.float64):
    torch.manual_seed(1)
    return Encoder(dropout).to(dtype)


def sentences(number, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (number, TOKENS), generator=generator)
    length = torch.randint(3, TOKENS + 1, (number, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(TOKENS) < length).to(dtype)}


class InfoNCE(nn.Module):
    """Queries against the passages of the whole batch, both ways, with a temperature that is learned."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, queries, passages):
        similar = self.scale * F.normalize(queries) @ F.normalize(passages).T
        targets = torch.arange(len(queries), device=queries.device)
        return F.cross_entropy(similar, targets) + F.cross_entropy(similar.T, targets)


def gradients(*modules):
    return [p.grad for module in modules for p in module.parameters()]


def cleared(*modules):
    for module in modules:
        module.zero_grad()


def assert_equal_to_rounding(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def in_chunks(module, batch, size):
    """The embeddings of a batch with the graphs of all chunks: what is to be reproduced where masks are drawn."""
    starts = range(0, len(batch["input_ids"]), size)
    parts = [{k: v[i : i + size] for k, v in batch.items()} for i in starts]
    return torch.cat([module(**part) for part in parts])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", [4, 7, 64])
def test_gradients_are_those_of_the_full_batch(shared, size):
    first, loss_fn = encoder(), InfoNCE()
    second = first if shared else encoder().requires_grad_()
    queries, passages = sentences(22), sentences(22, seed=1)
    modules = (first, second, loss_fn)
    plain = loss_fn(first(**queries), second(**passages))
    plain.backward()
    expected = gradients(*modules)
    cleared(*modules)
    cache = GradCache(first if shared else (first, second), loss_fn, size)
    loss = cache(queries, passages)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain.detach())
    assert_equal_to_rounding(gradients(*modules), expected)
    cache(queries, passages)  # and gradients are added up
    assert_equal_to_rounding(gradients(*modules), [2 * g for g in expected])


def test_a_wrong_share_of_the_gradient_is_seen():
    module, loss_fn = encoder(), InfoNCE()
    queries, passages = sentences(8), sentences(8, seed=1)
    loss_fn(module(**queries), module(**passages)).backward()
    expected = gradients(module)
    cleared(module)
    GradCache(module, loss_fn, 4, scale=lambda loss: 0.9 * loss)(queries, passages)
    with pytest.raises(AssertionError):
        assert_equal_to_rounding(gradients(module), expected)
    assert_equal_to_rounding(gradients(module), [0.9 * g for g in expected])


def test_dropout_masks_are_replayed_and_random_states_end_where_they_would():
    module, loss_fn = encoder(dropout=0.2), InfoNCE()
    queries, passages = sentences(20), sentences(20, seed=1)
    torch.manual_seed(5)
    loss_fn(in_chunks(module, queries, 8), in_chunks(module, passages, 8)).backward()
    expected, after = gradients(module), RandomState.now()
    cleared(module)
    torch.manual_seed(5)
    GradCache(module, loss_fn, 8)(queries, passages)
    assert RandomState.now().same_as(after)
    assert_equal_to_rounding(gradients(module), expected)
    cleared(module)
    torch.manual_seed(6)  # other masks, other gradients: the comparison can tell
    GradCache(module, loss_fn, 8)(queries, passages)
    with pytest.raises(AssertionError):
        assert_equal_to_rounding(gradients(module), expected)


def test_inputs_may_be_tensors_tuples_and_of_different_number():
    torch.manual_seed(0)
    one, two = nn.Linear(6, 4).double(), nn.Bilinear(3, 5, 4).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    pair = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)

    def loss_fn(a, b):
        return (a @ b.T).logsumexp(1).mean()

    (loss_fn(one(x * 2), two(*pair))).backward()
    expected = [*gradients(one, two), x.grad]
    cleared(one, two)
    x.grad = None
    y = x * 2  # an input with a graph of its own
    GradCache((one, two), loss_fn, (2, 16))(y, pair)
    assert_equal_to_rounding([*gradients(one, two), x.grad], expected)


def test_embeddings_may_be_taken_from_the_output_and_be_several():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 8).double()

        def forward(self, x):
            return {"hidden": self.layer(x).tanh(), "other": None}

    def embed(encoder, chunk):
        hidden = encoder(chunk["x"])["hidden"]
        return {"dense": hidden[:, :4] * chunk["weight"], "sparse": hidden[:, 4:].relu()}

    def loss_fn(found):
        return found["dense"].square().sum().sqrt() * found["sparse"].sum()

    torch.manual_seed(0)
    module = Both()
    batch = {"x": torch.randn(9, 6).double(), "weight": torch.rand(9, 1).double()}
    loss_fn(embed(module, batch)).backward()
    expected = gradients(module)
    cleared(module)
    GradCache(module, loss_fn, 2, embed=embed)(batch)
    assert_equal_to_rounding(gradients(module), expected)
    with pytest.raises(ArgumentError, match="embed="):
        GradCache(module, loss_fn, 2)(batch["x"])


def test_autocast_is_the_callers_and_weights_cast_without_a_graph_do_not_lose_their_gradient():
    module, loss_fn = encoder(dtype=torch.float32), InfoNCE().float()
    queries = sentences(12, dtype=torch.float32)
    passages = sentences(12, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss_fn(in_chunks(module, queries, 4), in_chunks(module, passages, 4)).backward()
        expected = gradients(module)
        cleared(module)
        GradCache(module, loss_fn, 4)(queries, passages)
    exact = encoder()
    double = [{k: v.double() if v.is_floating_point() else v for k, v in x.items()} for x in (queries, passages)]  # fmt: skip
    InfoNCE()(exact(**double[0]), exact(**double[1])).backward()
    for a, b, truth in zip(gradients(module), expected, gradients(exact), strict=True):
        own = (b - truth).norm()
        assert (a - truth).norm() <= 2 * own + 1e-7


class Counting(nn.Module):
    """Counts its calls in a buffer and uses it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4).double()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * self.calls.clone()


def test_buffers_are_as_the_first_run_saw_them_and_count_once():
    torch.manual_seed(0)
    module, x = Counting(), torch.randn(8, 6).double()
    torch.cat([module(part) for part in x.split(2)]).square().mean().sqrt().backward()
    expected = gradients(module)
    cleared(module)
    module.calls.zero_()
    GradCache(module, lambda e: e.square().mean().sqrt(), 2)(x)
    assert module.calls == 4
    assert_equal_to_rounding(gradients(module), expected)


def test_batch_norm_is_refused_unless_its_statistics_are_the_batchs():
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    x = torch.randn(8, 6)

    def loss_fn(e):
        return e.square().mean().sqrt()

    with pytest.raises(UnsupportedError, match="chunk_size=8"):
        GradCache(module, loss_fn, 4)(x)
    GradCache(module, loss_fn, 8)(x)
    assert module[1].num_batches_tracked == 1
    GradCache(module.eval(), loss_fn, 4)(x)


def test_the_encoder_runs_once_more_and_hooks_that_only_look_do_not():
    module, loss_fn = encoder(), InfoNCE()
    queries, passages = sentences(22), sentences(22, seed=1)
    samples, seen = [], []
    forward = module.layers.forward
    module.layers.forward = lambda x: samples.append(len(x)) or forward(x)
    module.register_forward_hook(lambda _m, _i, out: seen.append(len(out)))
    GradCache(module, loss_fn, 8)(queries, passages)
    assert sum(samples) == 2 * 44  # plain training runs it once
    assert samples == [8, 8, 6] * 4
    assert seen == [8, 8, 6] * 2


def test_a_frozen_encoder_gets_no_gradient_and_the_other_one_its_own():
    frozen, module, loss_fn = encoder().requires_grad_(False), encoder(), InfoNCE()
    queries, passages = sentences(8), sentences(8, seed=1)
    loss_fn(frozen(**queries), module(**passages)).backward()
    expected = gradients(module)
    cleared(module)
    GradCache((frozen, module), loss_fn, 4)(queries, passages)
    assert_equal_to_rounding(gradients(module), expected)
    assert gradients(frozen) == [None] * len(expected)


def ledger_of(module, run, inputs):
    with Ledger(module, inputs=inputs) as ledger:
        run()
    return ledger


def test_saved_bytes_are_one_chunk_and_the_embeddings_however_large_the_batch():
    module, loss_fn = encoder(dropout=0.1), InfoNCE()
    one = sentences(8)
    plain = ledger_of(module, lambda: module(**one).sum().backward(), one)
    chunk = plain.columns[Column.ACTIVATIONS]
    found = {}
    for number in (32, 128):
        batch = sentences(number), sentences(number, seed=1)
        cleared(module, loss_fn)
        found[number] = ledger_of(
            module, lambda batch=batch: GradCache(module, loss_fn, 8)(*batch), batch
        )
        embeddings = 2 * number * WIDTH * 8
        assert chunk <= found[number].columns[Column.ACTIVATIONS] <= chunk + embeddings
    inputs = found[128].columns[Column.INPUTS] - found[32].columns[Column.INPUTS]
    grown = found[128].peak_bytes - found[32].peak_bytes - inputs
    assert 0 < grown <= 2 * 96 * WIDTH * 8  # the embeddings' gradients, and nothing else


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: GradCache(m, InfoNCE(), 0), MethodError, "1 sample or more"),
        (lambda m: GradCache((m, m), InfoNCE(), 4)(sentences(4)), ArgumentError, "the 2 encoders"),
        (lambda m: GradCache(m, InfoNCE(), 4)(), ArgumentError, "no inputs"),
        (lambda m: GradCache(m, InfoNCE(), (4,))(sentences(4), sentences(4)), ArgumentError, "1 ch"),
        (lambda m: GradCache(m, InfoNCE())({"x": torch.ones(2), "y": torch.ones(3)}, {}), BatchError, "agree"),
        (lambda m: GradCache(m, lambda e: e)(sentences(4)), LossError, r"shape \[4, 32\]"),
        (lambda m: GradCache(m, lambda e: e.detach().sum())(sentences(4)), LossError, "without"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(make, error, message):
    with pytest.raises(error, match=message):
        make(encoder())


# -- over processes ----------------------------------------------------------------------------------


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def one_process(rank, port, folder):
    """Half of the batch on each of two processes; the negatives of both."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    module, averaged = DistributedDataParallel(encoder()), []

    def count(_, bucket):
        averaged.append(bucket.buffer().numel())
        return allreduce_hook(dist.group.WORLD, bucket)

    module.register_comm_hook(None, count)
    batches = [{k: v[rank * 6 : rank * 6 + 6] for k, v in sentences(12, s).items()} for s in (0, 1)]

    def loss_fn(queries, passages):
        similar = F.normalize(queries) @ F.normalize(gather_rows(passages)).T
        return F.cross_entropy(similar, torch.arange(6) + rank * 6)

    loss = GradCache(module, loss_fn, 2)(*batches)
    parameters = [p.grad for p in module.parameters()]
    with pytest.raises(BatchError, match="last, smaller batch"):
        gather_rows(torch.zeros(1 + rank, 2))
    torch.save((loss, parameters, sum(averaged)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_once_and_have_each_others_negatives(tmp_path):
    mp.spawn(one_process, (free_port(), str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    module = encoder()
    queries, passages = sentences(12), sentences(12, seed=1)
    similar = F.normalize(module(**queries)) @ F.normalize(module(**passages)).T
    plain = F.cross_entropy(similar, torch.arange(12))
    plain.backward()
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, plain.detach())
    for _, parameters, averaged in found:
        assert_equal_to_rounding(parameters, gradients(module))
        assert averaged == sum(p.numel() for p in module.parameters())  # in one chunk's backward


def test_without_processes_rows_are_as_they_were():
    rows = torch.ones(2, 3)
    assert gather_rows(rows) is rows
    assert torch.equal(joined([rows, rows]), torch.ones(4, 3))
