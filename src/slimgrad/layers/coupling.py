"""A reversible block: n streams, each changed by a function of the others, one after the other; and its inverse."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimgrad.errors import ArgumentError, UnsupportedError
from slimgrad.layers.replayed_call import ReplayedCall


class ReversibleBlock(nn.Module):
    """y_k = scale_k x_k + F_k(mean of the other streams), for k = 1..n in turn; with two streams, the RevNet coupling.

    ``functions`` are any modules that map a stream (and the extra arguments of the call) to a tensor of its
    shape; None leaves its stream as it is. ``scales`` are n factors other than 0. ``rotate`` hands the last
    stream on as the first. Raises ArgumentError for fewer than two streams.
    """

    def __init__(
        self,
        *functions: nn.Module | None,
        scales: Sequence[float] | None = None,
        rotate: bool = False,
    ) -> None:
        super().__init__()
        if len(functions) < 2:
            raise ArgumentError(
                f"expected a function for each of 2 or more streams, found {len(functions)}"
            )
        self.functions = nn.ModuleList([f if f is not None else nn.Identity() for f in functions])
        self._is_called = [f is not None for f in functions]
        self.scales = tuple(1.0 for _ in functions) if scales is None else tuple(scales)
        if len(self.scales) != len(functions) or not all(self.scales):
            raise ArgumentError(
                f"expected {len(functions)} scales other than 0, found {self.scales}: a stream times 0 cannot "
                "be reconstructed"
            )
        self.rotate = rotate
        self.checked: set[int] = set()  # functions whose graph was looked through

    @property
    def num_streams(self) -> int:
        """How many streams it takes and returns."""
        return len(self.scales)

    def forward(self, streams: Sequence[Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The streams after the block, by plain autograd. ``args`` and ``kwargs`` go to every function."""
        found = list(streams)
        for k, function in enumerate(self.functions):
            if self._is_called[k]:
                change = function(mean_of_others(found, k), *args, **kwargs)
                found[k] = FLOATING.add(found[k], change, self.scales[k])
            elif self.scales[k] != 1:
                found[k] = found[k] * self.scales[k]
        return tuple(self.rotated(found))

    def rotated(self, items: list[Any]) -> list[Any]:
        """Of the block's own order, the order in which it hands on."""
        return [items[-1], *items[:-1]] if self.rotate else items

    def unrotated(self, items: list[Any]) -> list[Any]:
        """The inverse of ``rotated``."""
        return [*items[1:], items[0]] if self.rotate else items


class Arithmetic(Protocol):
    """How streams are held between blocks, and added to."""

    def enter(self, stream: Tensor) -> Tensor:
        """From a floating stream."""
        ...

    def leave(self, held: Tensor, dtype: torch.dtype) -> Tensor:
        """To a floating stream."""
        ...

    def add(self, held: Tensor, change: Tensor, scale: float) -> Tensor:
        """``scale held + change``."""
        ...

    def subtract(self, held: Tensor, change: Tensor, scale: float) -> Tensor:
        """The inverse: ``(held - change) / scale``."""
        ...


class Floating:
    """Streams are held as they are; the inverse is exact up to rounding."""

    def enter(self, stream: Tensor) -> Tensor:
        """Nothing is done."""
        return stream

    def leave(self, held: Tensor, dtype: torch.dtype) -> Tensor:
        """Nothing is done."""
        return held

    def add(self, held: Tensor, change: Tensor, scale: float) -> Tensor:
        """In the stream's dtype, whatever a function returns under autocast."""
        total = held + change if scale == 1 else torch.add(change, held, alpha=scale)
        return total.to(held.dtype)

    def subtract(self, held: Tensor, change: Tensor, scale: float) -> Tensor:
        """In the stream's dtype."""
        rest = held - change
        return (rest if scale == 1 else rest / scale).to(held.dtype)


FLOATING = Floating()


class Wide(Floating):
    """Streams are held in float64; functions see them in their own dtype, and what is below float64 is rounded.

    With ``_GRID`` for what is added and a power of two for a scale, sums have an end within float64's 53 bits for
    as long as (bits of the largest value) + 22 + log2(1 / scale) x (times a stream was scaled) <= 53: then
    reconstruction is exact to the bit. Beyond that, errors grow from 1e-16. Float64 streams are as in ``Floating``.
    """

    def enter(self, stream: Tensor) -> Tensor:
        """Rounded to the grid."""
        return self._rounded(stream)

    def leave(self, held: Tensor, dtype: torch.dtype) -> Tensor:
        """Rounded to ``dtype``, the same each time."""
        return held.to(dtype)

    def add(self, held: Tensor, change: Tensor, scale: float) -> Tensor:
        """Of the change on the grid."""
        return super().add(held, self._rounded(change), scale)

    def subtract(self, held: Tensor, change: Tensor, scale: float) -> Tensor:
        """Of the same change on the grid."""
        return super().subtract(held, self._rounded(change), scale)

    @staticmethod
    def _rounded(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else torch.round(x.double() / _GRID) * _GRID


_GRID = 2.0**-22  # float32's own at values from 2 to 4


@dataclass(frozen=True)
class FixedPoint:
    """Streams are int64 multiples of 2^-fraction_bits: additions, and so the inverse, are exact. Scales must be 1."""

    fraction_bits: int

    def enter(self, stream: Tensor) -> Tensor:
        """Rounded to the nearest multiple. Raises UnsupportedError for what does not fit, NaN among it."""
        scaled = torch.round(stream.detach().double() * 2.0**self.fraction_bits)
        if not bool((scaled.abs() < 2.0**61).all()):
            raise UnsupportedError(
                f"a stream is not finite, or above {2.0 ** (61 - self.fraction_bits):g}: with "
                f"fixed_point={self.fraction_bits} it does not fit into 64 bits; give fewer bits"
            )
        return scaled.long()

    def leave(self, held: Tensor, dtype: torch.dtype) -> Tensor:
        """Rounded to ``dtype``, the same each time."""
        return (held.double() * 2.0**-self.fraction_bits).to(dtype)

    def add(self, held: Tensor, change: Tensor, scale: float) -> Tensor:
        """A sum of integers, which wraps around and back: nothing is lost."""
        return held + self.enter(change)

    def subtract(self, held: Tensor, change: Tensor, scale: float) -> Tensor:
        """The difference of the same integers."""
        return held - self.enter(change)


def mean_of_others(streams: Sequence[Tensor], k: int) -> Tensor:
    """What the function of stream ``k`` sees."""
    others = [x for j, x in enumerate(streams) if j != k]
    if len(others) == 1:
        return others[0]
    total = others[0] + others[1]
    for other in others[2:]:
        total = total + other
    return total / len(others)


@dataclass
class Piece:
    """A function's second call with its graph: stream ``k``, what it was given, what it returned (None: not called)."""

    k: int
    given: Tensor | None
    change: Tensor | None


@dataclass
class BlockCall:
    """One call of a block, in an arithmetic, that can be run backwards. ``dtypes`` are those of its streams."""

    block: ReversibleBlock
    arithmetic: Arithmetic
    dtypes: list[torch.dtype]
    calls: list[ReplayedCall | None]

    @staticmethod
    def run(
        block: ReversibleBlock,
        arithmetic: Arithmetic,
        held: list[Tensor],
        dtypes: list[torch.dtype],
        extras: tuple[Any, Any],
    ) -> tuple[BlockCall, list[Tensor]]:
        """The block's forward pass without a graph; the call and the streams after it."""
        args, kwargs = extras
        made = BlockCall(block, arithmetic, dtypes, [])
        held = list(held)
        for k, function in enumerate(block.functions):
            if not block._is_called[k]:
                made.calls.append(None)
                held[k] = held[k] if block.scales[k] == 1 else held[k] * block.scales[k]
                continue
            given = made._given(held, k)
            call, version = ReplayedCall(function, given.device), given._version
            change = call.first(lambda f=function, u=given: f(u, *args, **kwargs))
            _check(change, held[k], given._version != version, function)
            made.calls.append(call)
            held[k] = arithmetic.add(held[k], change, block.scales[k])
            del given, change
        return made, block.rotated(held)

    def reconstruct(
        self, held: list[Tensor], extras: tuple[Any, Any], *, graph: bool
    ) -> Generator[Piece]:
        """Turn ``held`` (the streams after the block, its own order) into those before it, in place.

        Yields a piece when its function has been called, and stream k is as before; with ``graph``, pieces
        can be differentiated.
        """
        args, kwargs = extras
        block = self.block
        for k in reversed(range(block.num_streams)):
            call = self.calls[k]
            if call is None:
                held[k] = held[k] if block.scales[k] == 1 else held[k] / block.scales[k]
                yield Piece(k, None, None)
                continue
            given = self._given(held, k).detach().requires_grad_(graph)
            with torch.set_grad_enabled(graph):
                change = call.again(lambda f=call.module, u=given: f(u, *args, **kwargs))
            held[k] = self.arithmetic.subtract(held[k], change.detach(), block.scales[k])
            yield Piece(k, given, change)
            del given, change

    def _given(self, held: list[Tensor], k: int) -> Tensor:
        floats = [
            held[j] if j == k else self.arithmetic.leave(held[j], self.dtypes[j])
            for j in range(len(held))
        ]
        return mean_of_others(floats, k)


def _check(change: object, held: Tensor, was_written: bool, function: nn.Module) -> None:
    name = type(function).__name__
    if was_written:
        raise UnsupportedError(
            f"{name} changed its input in place: the stream is needed as it was; write to a copy"
        )
    if not isinstance(change, Tensor) or change.shape != held.shape:
        found = tuple(change.shape) if isinstance(change, Tensor) else type(change).__name__
        raise ArgumentError(
            f"expected {name} to return a tensor of its stream's shape {tuple(held.shape)}, found {found}"
        )
