"""What users give to attention, as the sweep takes it: masks and biases of four dimensions, a seed for dropout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from slimgrad.errors import MethodError


def mask_and_bias(
    attn_mask: Tensor | None, bias: Tensor | None, full: Sequence[int | None]
) -> tuple[Tensor | None, Tensor | None]:
    """The boolean mask and what is added to the scores, each of four dimensions and 1 where broadcast.

    ``full`` is the shape of all scores (samples, heads, queries, keys), None where it is not known yet. Raises
    ``MethodError`` for what does not broadcast to it.
    """
    mask = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        mask = attn_mask
    elif attn_mask is not None:
        if bias is not None:
            raise MethodError(
                "expected a boolean attn_mask beside bias, found two that are added to the scores: give their sum"
            )
        bias = attn_mask
    return _four(mask, "attn_mask", full), _four(bias, "bias", full)


def drawn_seed(source: Tensor) -> int:
    """One draw from torch's generator: what recomputation restores, and the only state that changes."""
    drawn = torch.randint(2**62, (), device="cpu")
    return 0 if isinstance(source, FakeTensor) or isinstance(drawn, FakeTensor) else int(drawn)


def _four(given: Tensor | None, name: str, full: Sequence[int | None]) -> Tensor | None:
    if given is None:
        return None
    sizes = zip(given.shape[::-1], full[::-1], strict=False)
    fits = given.dim() <= 4 and all(whole is None or size in (1, whole) for size, whole in sizes)
    if not fits or not (given.dtype == torch.bool or given.is_floating_point()):
        heads = "heads" if full[1] is None else full[1]
        raise MethodError(
            f"expected {name} that is boolean or floating-point and broadcasts to ({full[0]}, {heads}, {full[2]}, "
            f"{full[3]}) (samples, heads, queries, keys), found {given.dtype} of shape {tuple(given.shape)}"
        )
    return given[(None,) * (4 - given.dim())]
