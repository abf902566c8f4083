"""Gradient caching on a pretrained encoder: MiniLM under InfoNCE over adjacent sentences, 256 pairs in chunks of 16."""

import re

import pytest
import torch
import torch.nn.functional as F

from slimgrad import Ledger
from slimgrad.errors import LoadError
from slimgrad.methods.activations.grad_cache import GradCache
from slimgrad.training.models import load_model
from slimgrad.training.text import text_source
from slimgrad.types import Column

PAIRS, CHUNK, TOKENS = 256, 16, 8


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("transformers")
    try:
        return load_model("minilm", dtype=torch.float64)
    except LoadError as error:
        pytest.skip(str(error))


def adjacent_sentences(tokenizer, number):
    """Sentences of Python's documentation and those that follow them, cut to ``TOKENS`` tokens."""
    pairs = []
    for document in text_source().documents:
        split = re.split(r"(?<=[.!?])\s+", " ".join(document.split()))
        sentences = [s for s in split if len(s) > 40]
        pairs += zip(sentences[::2], sentences[1::2], strict=False)
    assert len(pairs) >= number
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
    return [
        dict(tokenizer(list(side), return_tensors="pt", **options))
        for side in zip(*pairs[:number], strict=True)
    ]


def embed(encoder, chunk):
    hidden, mask = encoder(**chunk).last_hidden_state, chunk["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1))


def info_nce(queries, passages):
    return F.cross_entropy(20 * queries @ passages.T, torch.arange(len(queries)))


def in_chunks(encoder, batch, size):
    number = len(batch["input_ids"])
    parts = [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, number, size)]
    return torch.cat([embed(encoder, part) for part in parts])


def compare(model, number, chunk, dropout):
    """The largest relative error of a parameter's gradient, and the ledgers of one chunk and of the whole batch."""
    encoder = model.model.train(dropout)
    encoder.zero_grad()
    batches = adjacent_sentences(model.tokenizer, number)
    size = chunk if dropout else number  # with dropout, masks are drawn chunk by chunk
    torch.manual_seed(7)
    plain = info_nce(*(in_chunks(encoder, batch, size) for batch in batches))
    plain.backward()
    expected = [p.grad for p in encoder.parameters()]
    encoder.zero_grad()
    calls = []
    handle = encoder.embeddings.register_forward_hook(lambda _m, _i, out: calls.append(len(out)) or out)  # fmt: skip
    torch.manual_seed(7)
    with Ledger(encoder, inputs=batches) as ledger:
        loss = GradCache(encoder, info_nce, chunk, embed=embed)(*batches)
    handle.remove()
    torch.testing.assert_close(loss, plain.detach())
    assert sum(calls) == 2 * 2 * number  # plain training runs each of both sides once
    found = [p.grad for p in encoder.parameters()]
    assert [g is None for g in found] == [g is None for g in expected]
    norm = torch.stack([g.norm() for g in expected if g is not None]).norm()
    errors = [(a - b).norm() / norm for a, b in zip(found, expected, strict=True) if b is not None]
    encoder.zero_grad()
    one = [{k: v[:chunk] for k, v in batch.items()} for batch in batches]
    with Ledger(encoder, inputs=one) as single:
        embed(encoder, one[0]).sum().backward()
    encoder.zero_grad()
    saved = ledger.columns[Column.ACTIVATIONS], single.columns[Column.ACTIVATIONS]
    return max(float(e) for e in errors), *saved


def check(model, number, chunk, dropout):
    error, saved, one_chunk = compare(model, number, chunk, dropout)
    embeddings = 2 * number * model.model.config.hidden_size * 8
    print(f"error {error:.1e}, saved {saved}, one chunk {one_chunk}, embeddings {embeddings}")
    assert error < 1e-12
    assert saved <= one_chunk + embeddings


def test_a_small_batch(minilm):
    check(minilm, 6, 2, dropout=True)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [False, True])
def test_256_pairs_in_chunks_of_16(minilm, dropout):
    check(minilm, PAIRS, CHUNK, dropout)
