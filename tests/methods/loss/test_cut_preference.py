"""Preference losses by tiles: log-probabilities of answers, and the loss and gradients of plain logits."""

import pytest
import torch
from torch.nn import functional

from slimgrad import Ledger
from slimgrad.errors import MethodError
from slimgrad.methods.loss.cut_preference import answer_log_probabilities, cut_preference
from slimgrad.types import Column


def made(dtype=torch.float64, batch=4, length=9, classes=80):
    torch.manual_seed(0)
    weight = torch.randn(classes, 8, dtype=dtype, requires_grad=True)
    hidden = [torch.randn(batch, length, 8, dtype=dtype, requires_grad=True) for _ in range(2)]
    targets = [torch.randint(classes, (batch, length)) for _ in range(2)]
    targets[0][:, 7:] = -100
    return weight, hidden, targets


def plain(hidden, weight, target):
    logs = functional.linear(hidden, weight).log_softmax(-1)
    picked = logs.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(target < 0, 0.0).sum(1)


def test_the_loss_and_its_gradients():
    weight, hidden, targets = made()
    reference = [torch.randn(4, dtype=torch.float64) for _ in range(2)]
    by_tiles = [
        answer_log_probabilities(h, weight, t, filter_eps=None, token_block=5, vocab_block=16)
        for h, t in zip(hidden, targets, strict=True)
    ]
    by_logits = [plain(h, weight, t) for h, t in zip(hidden, targets, strict=True)]
    for a, b in zip(by_tiles, by_logits, strict=True):
        torch.testing.assert_close(a, b)
    loss = cut_preference(*by_tiles, *reference, beta=0.3)
    gained = (by_logits[0] - by_logits[1]) - (reference[0] - reference[1])
    wanted = -torch.log(torch.sigmoid(0.3 * gained)).mean()
    torch.testing.assert_close(loss, wanted)
    inputs = (weight, *hidden)
    for a, b in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(wanted, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_smoothed_labels_mix_both_orders():
    a, b, zero = torch.tensor([1.0]), torch.tensor([-0.5]), torch.zeros(1)
    right = cut_preference(a, b, zero, zero, beta=1.0)
    wrong = cut_preference(b, a, zero, zero, beta=1.0)
    mixed = cut_preference(a, b, zero, zero, beta=1.0, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(mixed, (0.9 * right + 0.1 * wrong).view(1))


def test_no_logits_are_held():
    weight, hidden, targets = made(torch.float32, 4, 128, 8000)
    with Ledger(inputs=(weight, hidden, targets)) as ledger:
        logs = [
            answer_log_probabilities(h, weight, t, token_block=64, vocab_block=512)
            for h, t in zip(hidden, targets, strict=True)
        ]
        cut_preference(*logs, torch.zeros(4), torch.zeros(4)).backward()
    logits = 2 * 4 * 128 * 8000 * 4
    assert ledger.peak_bytes - ledger.columns[Column.INPUTS] < logits / 20


def test_what_does_not_belong_is_refused():
    weight, hidden, targets = made()
    with pytest.raises(MethodError, match="four tensors"):
        cut_preference(torch.zeros(2), torch.zeros(3), torch.zeros(2), torch.zeros(2))
    with pytest.raises(MethodError, match="label_smoothing"):
        cut_preference(*[torch.zeros(2)] * 4, label_smoothing=0.7)
    with pytest.raises(MethodError, match="B, T, D"):
        answer_log_probabilities(hidden[0][0], weight, targets[0][0])
