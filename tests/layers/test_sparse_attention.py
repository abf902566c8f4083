"""Factorised attention against dense attention under the same mask; bytes by length; a model of text."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.layers.plain_attention import (
    assert_same,
    gradients,
    normal,
    overhead_bytes,
    plain_attention,
)
from torch import nn
from torch.nn import functional

from slimgrad.errors import MethodError
from slimgrad.layers.sparse_attention import sparse_attention
from slimgrad.training.text import text_source


def mask_of(length, pattern, part, stride, summary, num_heads):
    """The paper's sets, written out: ``[heads, length, length]``."""
    i, j = torch.arange(length).unsqueeze(1), torch.arange(length)
    if pattern == "strided":
        first, second = i - j <= stride, (i - j) % stride == 0
    else:
        first, second = i // stride == j // stride, j % stride >= stride - summary
    whole = {"first": first, "second": second, "merged": first | second}
    if part == "heads":
        half = num_heads // 2
        return torch.stack([first & (j <= i)] * half + [second & (j <= i)] * half)
    return (whole[part] & (j <= i)).expand(num_heads, length, length)


@settings(max_examples=120, deadline=None)
@given(
    pattern=st.sampled_from(["strided", "fixed"]),
    part=st.sampled_from(["merged", "heads", "first", "second"]),
    length=st.integers(1, 23),
    stride=st.integers(1, 8),
    summary=st.integers(1, 3),
    widths=st.sampled_from([(3, 3), (4, 2)]),
    recompute=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_dense_attention_under_the_same_mask(
    pattern, part, length, stride, summary, widths, recompute, seed
):
    summary = min(summary, stride)
    query, key = (normal(2, 2, length, widths[0], seed=seed + i) for i in range(2))
    value = normal(2, 2, length, widths[1], seed=seed + 2)
    leaves = (query, key, value)
    mask = mask_of(length, pattern, part, stride, summary, 2)
    plain = plain_attention(*leaves, mask)
    found = sparse_attention(
        *leaves, pattern=pattern, part=part, stride=stride, summary=summary, recompute=recompute
    )
    assert_same([found], [plain])
    assert_same(gradients(found, leaves), gradients(plain, leaves))


def test_without_a_stride_it_is_the_square_root_rounded_up():
    query = normal(1, 1, 17, 3)
    found = sparse_attention(query, query, query, scale=0.7)
    assert_same([found], [sparse_attention(query, query, query, stride=5, scale=0.7)])
    mask = mask_of(17, "strided", "merged", 5, 1, 1)
    assert_same([found], [plain_attention(query, query, query, mask, scale=0.7)])
    assert sparse_attention(query[:, :, :0], query[:, :, :0], query[:, :, :0]).shape[2] == 0


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
@pytest.mark.parametrize("part", ["merged", "heads", "first", "second"])
def test_recomputation_leaves_the_gradients_bits_and_saves_no_scores(pattern, part):
    leaves = [normal(1, 2, 64, 4, seed=i, dtype=torch.float32) for i in range(3)]
    outs, saved = [], []
    for recompute in (False, True):
        held = {}

        def pack(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outs.append(sparse_attention(*leaves, pattern=pattern, part=part, recompute=recompute))
        saved.append(sum(held.values()))
    first, second = (gradients(out, leaves) for out in outs)
    assert torch.equal(*outs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert saved[1] <= sum(t.nbytes for t in leaves) < saved[0]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_bytes_grow_as_the_length_to_the_power_of_one_and_a_half(pattern, recompute):
    lengths, found = [256, 1024, 4096, 9216], []
    for length in lengths:
        inputs = [normal(1, 1, length, 1, seed=i, dtype=torch.float32) for i in range(3)]
        found.append(
            overhead_bytes(
                lambda q, k, v: sparse_attention(q, k, v, pattern=pattern, recompute=recompute),
                inputs,
            )
        )
    exponent = np.polyfit(np.log(lengths), np.log(found), 1)[0]
    assert exponent == pytest.approx(1.5, abs=0.1)
    assert found[-1] < lengths[-1] ** 2 * 4 / 4  # a quarter of one matrix of scores


LENGTH = 144  # bytes of a sequence: the stride is 12


class ByteModel(nn.Module):
    """A small causal Transformer over bytes."""

    def __init__(self, attend, width=48, num_heads=4, depth=2):
        super().__init__()
        self.attend, self.num_heads = attend, num_heads
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.projections = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.outs = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 256)

    def forward(self, text):
        """Bits a byte of ``text``, ``[B, LENGTH + 1]``, after its first byte."""
        x = self.tokens(text[:, :-1]) + self.places.weight
        for n, (project, out, mlp) in enumerate(
            zip(self.projections, self.outs, self.mlps, strict=True)
        ):
            heads = project(self.norms[2 * n](x)).unflatten(-1, (3, self.num_heads, -1))
            attended = self.attend(*heads.permute(2, 0, 3, 1, 4))
            x = x + out(attended.transpose(1, 2).flatten(2))
            x = x + mlp(self.norms[2 * n + 1](x))
        logits = self.head(self.norms[-1](x))
        return functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()) / math.log(2)


def bits_per_byte(attend, steps):
    """Bits a byte on the last tenth of Python's own documentation after training on the rest."""
    text = torch.tensor(list("\n".join(text_source().documents).encode()))
    sequences = text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].unflatten(0, (-1, LENGTH + 1))
    train, held_out = sequences.split([len(sequences) * 9 // 10, -(-len(sequences) // 10)])
    torch.manual_seed(0)
    model = ByteModel(attend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps + 1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(train[torch.randint(len(train), (12,))]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return model(held_out).item()


@pytest.mark.slow
def test_text_takes_within_three_per_cent_of_the_bits_of_dense_attention():
    def dense(query, key, value):
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    def blind(query, key, value):
        return torch.zeros_like(value)

    def fixed(query, key, value):
        return sparse_attention(query, key, value, pattern="fixed", summary=4)

    bits = bits_per_byte(dense, steps=500)
    assert bits_per_byte(sparse_attention, steps=500) <= 1.03 * bits
    assert bits_per_byte(fixed, steps=500) <= 1.03 * bits
    assert bits_per_byte(blind, steps=500) > 1.03 * bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": normal(1, 3, 5, 4)}, "of one sequence"),
        ({"value": normal(3, 6, 4)}, "of one sequence"),
        ({"pattern": "random"}, "pattern"),
        ({"part": "third"}, "part"),
        ({"part": "heads"}, "even number of heads"),
        ({"stride": 0}, "stride"),
        ({"stride": 2, "summary": 3}, "summary"),
    ],
)
def test_what_does_not_fit_is_told(change, message):
    given = {"query": normal(1, 3, 6, 4), "key": normal(1, 3, 6, 4), "value": normal(1, 3, 6, 4)}
    with pytest.raises(MethodError, match=message):
        sparse_attention(**(given | change))
