"""Softmax attention as a textbook writes it, and inputs for it."""

import torch

from slimgrad import Ledger


def plain_attention(
    query, key, value, mask=None, bias=None, *, is_causal=False, scale=None, kept=None
):
    """Whole score matrices; rows that may attend to nothing are zero. ``kept`` multiplies the probabilities."""
    heads = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool)
    if is_causal:
        hidden = torch.ones_like(hidden).triu(1)
    if mask is not None:
        hidden = hidden | ~mask
    scores = scores.masked_fill(hidden, float("-inf"))
    probabilities = scores.softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return (probabilities if kept is None else probabilities * kept) @ value


def normal(*shape, seed=0, dtype=torch.float64, grad=True):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, dtype=torch.float64, generator=draw).to(dtype)
    return x.requires_grad_(grad)


def gradients(out, leaves, seed=7):
    """Gradients of a random projection of ``out``, which no symmetry makes zero."""
    weights = normal(*out.shape, seed=seed, dtype=out.dtype, grad=False)
    return torch.autograd.grad((out * weights).sum(), [t for t in leaves if t is not None])


def assert_same(found, expected, tolerance=1e-11):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def overhead_bytes(attend, inputs):
    """The peak of a forward and backward pass over what ``inputs`` take, by the ledger."""
    held = sum(t.untyped_storage().nbytes() for t in inputs)
    with Ledger(inputs=inputs) as ledger:
        torch.autograd.grad(attend(*inputs).sum(), [t for t in inputs if t.requires_grad])
    return ledger.peak_bytes - held
