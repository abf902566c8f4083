"""Direct preference optimisation over a large vocabulary: log-probabilities of whole answers, without logits.

Formula: loss = -logsigmoid(beta ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))));
    log p(answer) = sum over its tokens of z_t - logsumexp(z)
Memory: temporaries are one tile of logits; saved are the hidden states and one number a token.
Exactness: exact with ``filter_eps=None``; as in ``cut_cross_entropy`` otherwise.
Limits: answers come as two batches of equal size, padded with ``ignore_index``; no double backward.
References: Rafailov et al. (2023), equation 7; Wijmans et al. (2024) for the tiles. *departs:* nothing.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional

from slimgrad.errors import MethodError
from slimgrad.method import Paper, component
from slimgrad.methods.loss.cut_cross_entropy import (
    TOKEN_BLOCK,
    VOCAB_BLOCK,
    Backend,
    Filter,
    aims_and_sums,
)
from slimgrad.types import Column, Exactness


def answer_log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    filter_eps: Filter = "auto",
    token_block: int = TOKEN_BLOCK,
    vocab_block: int = VOCAB_BLOCK,
    backend: Backend = "auto",
) -> Tensor:
    """The log-probability of each answer, ``[B]``: of ``target`` ``[B, T]`` under the logits of ``hidden`` ``[B, T, D]``."""
    if hidden.dim() != 3:
        raise MethodError(f"expected hidden [B, T, D], found {tuple(hidden.shape)}")
    aim_N, lse_N, target_N = aims_and_sums(
        hidden, weight, target, bias, ignore_index=ignore_index, scale=scale, softcap=softcap,
        filter_eps=filter_eps, token_block=token_block, vocab_block=vocab_block, backend=backend,
    )  # fmt: skip
    return (aim_N - lse_N).masked_fill(target_N < 0, 0.0).view(target.shape).sum(1)


@component(
    Column.TEMPORARIES,
    Exactness.EXACT,
    Paper(
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "Rafael Rafailov, Archit Sharma, Eric Mitchell, Stefano Ermon, Christopher D. Manning, Chelsea Finn",
        2023,
        "2305.18290",
    ),
)
def cut_preference(
    chosen: Tensor,
    rejected: Tensor,
    chosen_reference: Tensor,
    rejected_reference: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """The preference loss from log-probabilities of answers, ``[B]`` each, as ``answer_log_probabilities`` gives them.

    The references' are constants. ``label_smoothing`` is the share of pairs whose labels are believed to be wrong.
    A scalar, or ``[B]``. Raises ``MethodError`` for shapes or bounds.

    >>> import torch
    >>> same = torch.zeros(2)
    >>> bool(cut_preference(same, same, same, same) == torch.tensor(2.0).log())
    True
    """
    parts = (chosen, rejected, chosen_reference, rejected_reference)
    if len({part.shape for part in parts}) != 1 or chosen.dim() != 1:
        raise MethodError(
            f"expected four tensors [B], found {[tuple(part.shape) for part in parts]}"
        )
    if not 0.0 <= label_smoothing < 0.5:
        raise MethodError(f"expected label_smoothing in [0, 0.5), found {label_smoothing}")
    gained = chosen - rejected - (chosen_reference - rejected_reference).detach()
    right, wrong = functional.logsigmoid(beta * gained), functional.logsigmoid(-beta * gained)
    loss_B = -(1 - label_smoothing) * right - label_smoothing * wrong
    return loss_B.mean() if reduction == "mean" else loss_B
