"""Distillation by tiles: the divergence and its gradients are the plain ones, and no logits are held."""

import pytest
import torch
from torch.nn import functional

from slimgrad import Ledger
from slimgrad.errors import MethodError
from slimgrad.methods.loss.cut_distillation import cut_distillation
from slimgrad.types import Column


def made(num=30, classes=70, dtype=torch.float64):
    torch.manual_seed(0)
    student = [torch.randn(num, 8, dtype=dtype), torch.randn(classes, 8, dtype=dtype)]
    teacher = [torch.randn(num, 12, dtype=dtype), torch.randn(classes, 12, dtype=dtype)]
    bias, teacher_bias = torch.randn(classes, dtype=dtype), torch.randn(classes, dtype=dtype)
    for tensor in (*student, bias):
        tensor.requires_grad_()
    return student, teacher, bias, teacher_bias


def plain(student, teacher, bias, teacher_bias, temperature):
    z = functional.linear(*student, bias) / temperature
    t = functional.linear(*teacher, teacher_bias) / temperature
    kl = functional.kl_div(
        z.log_softmax(1), t.log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    return kl * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("blocks", [(7, 11), (64, 128)])
def test_the_divergence_and_its_gradients(temperature, blocks):
    student, teacher, bias, teacher_bias = made()
    wanted = plain(student, teacher, bias, teacher_bias, temperature)
    mask = torch.arange(30) % 3 != 0
    found = cut_distillation(
        *student, *teacher, bias, teacher_bias, temperature=temperature, mask=mask,
        token_block=blocks[0], vocab_block=blocks[1],
    )  # fmt: skip
    mean = wanted[mask].mean()
    torch.testing.assert_close(found, mean, rtol=1e-11, atol=1e-12)
    inputs = (*student, bias)
    for a, b in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(mean, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient():
    student, _, bias, _ = made()
    copies = [t.detach() for t in (*student, bias)]
    loss = cut_distillation(*student, *copies[:2], bias, copies[2], reduction="none")
    assert loss.shape == (30,)
    assert loss.abs().max() < 1e-12
    assert torch.autograd.grad(loss.sum(), student[0])[0].abs().max() < 1e-12


def test_no_logits_are_held():
    student, teacher, _, _ = made(512, 8000, torch.float32)
    with Ledger(inputs=(student, teacher)) as ledger:
        cut_distillation(*student, *teacher, token_block=64, vocab_block=512).backward()
    logits = 512 * 8000 * 4
    assert ledger.peak_bytes - ledger.columns[Column.INPUTS] < logits / 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"reduction": "batchmean"}, "reduction"),
        ({"teacher_weight": torch.zeros(3, 12, dtype=torch.float64)}, "same tokens and classes"),
    ],
)
def test_what_does_not_belong_is_refused(change, message):
    student, teacher, _, _ = made()
    arguments = {"teacher_hidden": teacher[0], "teacher_weight": teacher[1]} | change
    with pytest.raises(MethodError, match=message):
        cut_distillation(*student, **arguments)
