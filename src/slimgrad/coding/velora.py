"""Sub-tokens projected onto one direction: a number is kept for each, and a multiple of the direction comes back.

Formula: a row (token) of width ``D`` is cut into ``D / M`` sub-tokens ``z`` of size ``M``; ``z`` is kept as ``p = z . v`` and
    decoded to ``p v``, ``|v| = 1``. ``v`` is the mean of all sub-tokens of the first tensor, normalised, and then fixed.
Memory: ``1 / M`` of the tensor, exactly. The direction, ``M`` numbers, belongs to the place and stays.
Exactness: approximate: what is orthogonal to ``v`` is lost, and decoding twice loses nothing more.
Limits: the width of a row is a multiple of ``M``.
References: Miles et al., VeLoRA, arXiv 2405.17991: the projection, and the initialisation by the average of the first
    batch. *departs:* kept in the tensor's own dtype, its products summed in at least float32; no scale of the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from slimgrad.code import Use
from slimgrad.coding.memory_order import Form, in_memory_order
from slimgrad.errors import MethodError, UnsupportedError


@dataclass(frozen=True, eq=False)
class VeloraCode:
    """Keeps one number for each ``sub_token`` elements that follow each other in memory.

    The first tensor that is encoded gives the direction; it is the state of the place that this code belongs to.
    """

    sub_token: int = 32
    _direction: list[Tensor] = field(default_factory=list[Tensor], init=False, repr=False)

    def __post_init__(self) -> None:
        if self.sub_token < 1:
            raise MethodError(f"expected sub_token at least 1, found {self.sub_token}")

    @property
    def direction(self) -> Tensor | None:
        """``v``, ``[M]``, in float32 or float64; None before the first tensor."""
        return self._direction[0] if self._direction else None

    @torch.no_grad()
    def encode(self, tensor: Tensor) -> VeloraEncoded:
        """The projections of the sub-tokens of ``tensor``, rows along its fastest dimension.

        Raises UnsupportedError where that is no multiple of ``sub_token``, or the dtype is not a floating one.
        """
        width = row_of(tensor)
        if not tensor.dtype.is_floating_point or width % self.sub_token:
            raise UnsupportedError(
                f"expected a floating-point tensor with rows of a multiple of {self.sub_token}, "
                f"found {tensor.dtype} with rows of {width}"
            )
        z_SM = in_memory_order(tensor).view(-1, self.sub_token)
        v_M = self.direction
        if v_M is None:
            v_M = _mean_direction(z_SM) if len(z_SM) else z_SM.new_zeros(self.sub_token)
            if len(z_SM) and not is_fake(z_SM):  # a trace has no values to be remembered
                self._direction.append(v_M)
        return VeloraEncoded(torch.mv(z_SM, v_M.to(z_SM.dtype)), v_M, Form.of(tensor))

    def num_bytes(self, use: Use) -> int:
        """Bytes of the projections."""
        return use.num_elements // self.sub_token * use.torch_dtype.itemsize


@dataclass(frozen=True)
class VeloraEncoded:
    """A projection for each sub-token, ``[S]``, and the place's direction, ``[M]``."""

    projections: Tensor
    direction: Tensor
    form: Form

    @property
    def num_bytes(self) -> int:
        """Bytes of the projections; the direction belongs to the place."""
        return self.projections.nbytes

    @torch.no_grad()
    def decode(self) -> Tensor:
        """Each sub-token as a multiple of the direction."""
        out = self.form.empty()
        z_SM = in_memory_order(out).view(-1, len(self.direction))
        v_M = self.direction.to(out.dtype)
        torch.mul(self.projections.unsqueeze(1), v_M, out=z_SM)
        return out


def row_of(tensor: Tensor) -> int:
    """Elements along the dimension that is fastest in memory."""
    if not tensor.numel():
        return 0
    wide = [place for place in range(tensor.dim()) if tensor.shape[place] > 1]
    fastest = min(wide, key=tensor.stride, default=None)
    return 1 if fastest is None else tensor.shape[fastest]


def _mean_direction(z_SM: Tensor) -> Tensor:
    dtype = torch.float64 if z_SM.dtype == torch.float64 else torch.float32
    mean_M = z_SM.mean(0, dtype=dtype)
    norm = torch.linalg.vector_norm(mean_M)
    return torch.where(norm > 0, mean_M / norm, mean_M.new_full((), z_SM.shape[1] ** -0.5))
