"""A Transformer layer as one function whose first tokens are swapped and whose other tokens are recomputed.

Shapes: ``B`` samples, ``N`` tokens, ``C`` features; ``H``, ``K``, ``D``, ``E`` as in ``attention_sweep``. The layer is
``q, k, v = before(x)``, ``y = after(x, attend(q, k, v))``, and both modules treat every token alone, so that the graph
of some tokens can be kept with its saved tensors in a store, while that of the others is made again in backward.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from slimgrad.errors import MethodError
from slimgrad.layers.attention_sweep import Rule
from slimgrad.layers.blockwise_sweep import Replay
from slimgrad.layers.chunked_attention import TiledAttention
from slimgrad.layers.memory_efficient_attention import memory_efficient_attention
from slimgrad.layers.replayed_randomness import Draws
from slimgrad.single_backward import single_backward
from slimgrad.storage import Store
from slimgrad.storage.saved import Geometry, Kept, is_plain
from slimgrad.storage.stored import Stored, whole_storage


@dataclass(frozen=True)
class Halves:
    """The two modules of a layer, its attention and its store; ``along`` are tensors that they read, cut as ``x`` is.

    ``before(x, *along)`` returns queries, keys and values, ``after(x, attended, *along)`` the layer's output.
    """

    before: nn.Module
    after: nn.Module
    rule: Rule
    store: Store
    num_swapped: int
    min_bytes: int
    along: tuple[Tensor, ...] = ()

    def parameters(self) -> list[nn.Parameter]:
        """What requires a gradient in the two modules, each once."""
        modules = nn.ModuleList([self.before, self.after])
        return [p for p in modules.parameters() if p.requires_grad]


class Swapped:
    """Storages in the store, each once, read back when they are asked for and shared while anyone has them."""

    def __init__(self, store: Store, min_bytes: int, stays: Sequence[Tensor]) -> None:
        self._store, self._min_bytes = store, min_bytes
        self._stays = {t.untyped_storage()._cdata for t in stays}
        self._known: dict[tuple[int, int], Piece] = {}

    def piece(self, tensor: Tensor) -> Piece | None:
        """Where ``tensor``'s storage goes; None for one that stays."""
        storage = tensor.untyped_storage() if is_plain(tensor) else None
        if storage is None or storage._cdata in self._stays or storage.nbytes() < self._min_bytes:
            return None
        key = storage._cdata, tensor._version
        if key not in self._known and (whole := whole_storage(tensor)) is not None:
            self._known[key] = Piece(self._store, whole)
        return self._known.get(key)

    @contextmanager
    def saving(self) -> Generator[None]:
        """What autograd saves in the body is swapped, and gone from memory after it."""
        with saved_tensors_hooks(self._pack, _unpack), torch.enable_grad():
            yield
        self.settle()

    def settle(self) -> None:
        """Wait until all is written; what was written is let go, and may be met again as another storage."""
        for piece in self._known.values():
            piece.settle()

    def forget(self) -> None:
        """Forward is over: no storage is met again."""
        self._known.clear()

    def _pack(self, tensor: Tensor) -> Kept | tuple[Piece, Geometry]:
        piece = self.piece(tensor)
        return Kept.of(tensor) if piece is None else (piece, Geometry.of(tensor))


class Piece:
    """One storage in the store."""

    def __init__(self, store: Store, whole: Tensor) -> None:
        self._source = StorageWeakRef(whole.untyped_storage())  # nothing else gets its identity
        self._stored = Stored(store, whole)
        self._read: StorageWeakRef | None = None

    def settle(self) -> None:
        """Wait until it is written."""
        self._stored.settle()

    def storage(self) -> torch.UntypedStorage:
        """Its bytes in memory, those that somebody has already where that is so."""
        live = None
        if self._read is not None:
            live = torch.UntypedStorage._new_with_weak_ptr(self._read.cdata)
        if live is None:
            live = self._stored.read()
            self._read = StorageWeakRef(live)
        return live


def _unpack(packed: Kept | tuple[Piece, Geometry]) -> Tensor:
    if isinstance(packed, Kept):
        return packed.checked()
    return packed[1].on(packed[0].storage())


class _Enter(torch.autograd.Function):
    """``x`` as the beginning of a graph that does not hold it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None


@dataclass
class _Graph:
    """The graph of one module over some tokens: where it ends and begins."""

    ends: list[GradientEdge]
    begins: list[GradientEdge]


class _Layer:
    """One pass over a layer: what is in the store between its forward and its backward."""

    def __init__(self, halves: Halves, x_BNC: Tensor, parameters: Sequence[Tensor]) -> None:
        self.halves, self.parameters = halves, list(parameters)
        self.replay = Replay.begun(x_BNC.device)
        modules = nn.ModuleList([halves.before, halves.after])
        stays = (*modules.parameters(), *modules.buffers(), *halves.along)
        self.swapped = Swapped(halves.store, halves.min_bytes, stays)
        length = x_BNC.shape[1]
        self.head, self.tail = slice(0, halves.num_swapped), slice(halves.num_swapped, length)
        self.num_tail = length - halves.num_swapped
        self.graphs: list[_Graph | None] = [None, None]
        self.away: dict[str, Any] = {}

    # -- forward -----------------------------------------------------------------------------------

    def forward(self, x_BNC: Tensor) -> Tensor:
        """The layer's output; its input, its attention and the first tokens' saved tensors go to the store."""
        self._put("x", x_BNC)
        heads, tails = self._first_run(0, self.halves.before, x_BNC)
        _check_projections(heads or tails)
        for name, part in zip("qkv", heads, strict=False):
            self._put(name, part)
        q, k, v = _joined(heads, tails, 2)
        del heads, tails
        out, lse = self._attend(q, k, v)
        del q, k, v
        self._put("out", out)
        self._put("lse", lse)
        del lse
        y_head, y_tail = self._first_run(1, self.halves.after, x_BNC, out)
        (y_BNC,) = _joined(y_head, y_tail, 1)
        self.swapped.settle()
        self.swapped.forget()
        return y_BNC

    def _put(self, name: str, tensor: Tensor) -> None:
        piece = self.swapped.piece(tensor)
        self.away[name] = (
            Kept.of(tensor.detach()) if piece is None else (piece, Geometry.of(tensor))
        )

    def _first_run(
        self, which: int, module: nn.Module, x_BNC: Tensor, out: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What a module returns for the swapped tokens, whose graph is kept, and for the others."""
        heads: list[Tensor] = []
        tails: list[Tensor] = []
        if self.halves.num_swapped:
            with self.swapped.saving():
                anchor = torch.zeros((), device=x_BNC.device).requires_grad_()
                given = [_Enter.apply(anchor, part) for part in self._cut(self.head, x_BNC, out)]
                heads = _listed(self._call(module, self.head, given))
                begins = [get_gradient_edge(cast(Tensor, part)) for part in given]
                self.graphs[which] = _Graph([get_gradient_edge(y) for y in heads], begins)
            heads = [y.detach() for y in heads]
        if self.num_tail:
            tails = _listed(self._call(module, self.tail, self._cut(self.tail, x_BNC, out)))
        return heads, tails

    def _cut(self, rows: slice, x_BNC: Tensor, out: Tensor | None) -> list[Any]:
        return [x_BNC[:, rows]] if out is None else [x_BNC[:, rows], out[:, :, rows]]

    def _call(self, module: nn.Module, rows: slice, given: Sequence[Any]) -> Any:
        along = [t[..., rows, :] for t in self.halves.along]
        return self.replay.call(module, rows, *given, *along)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            attention = self._attention(q, k, v)
            out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
            lse = q.new_empty(*q.shape[:3], 1, dtype=attention.work)
            for rows in attention.rows():
                out[:, :, rows], lse[:, :, rows] = attention.attend(q[:, :, rows], rows)
        return out, lse

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> TiledAttention:
        return TiledAttention(k, v, None, None, self.halves.rule, q.shape[1], q.shape[2])

    # -- backward ----------------------------------------------------------------------------------

    def backward(self, grad_y_BNC: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The gradient in the input, and those in the parameters."""
        self.sums: list[Tensor | None] = [None] * len(self.parameters)
        x_BNC, out, lse = (_unpack(self.away[name]) for name in ("x", "out", "lse"))
        grads = [self._pull(1, [grad_y_BNC[:, self.head]])]
        if self.num_tail:
            leaves, ys = self._again(self.halves.after, x_BNC, out)
            grads.append(self._gradients(ys, leaves, [grad_y_BNC[:, self.tail]]))
            del leaves, ys
        grad_x, grad_out = _joined(*_both(grads), (1, 2))
        del grads
        leaves, tails = self._again(self.halves.before, x_BNC) if self.num_tail else ([], [])
        del x_BNC
        heads = [_unpack(self.away[name]) for name in "qkv"] if self.halves.num_swapped else []
        q, k, v = _joined(heads, [t.detach() for t in tails], 2)
        del heads
        grad_qkv = self._pull_attention(q, k, v, out, lse, grad_out)
        del q, k, v, out, lse, grad_out
        grads = [self._pull(0, [g[:, :, self.head] for g in grad_qkv])]
        if self.num_tail:
            grads.append(self._gradients(tails, leaves, [g[:, :, self.tail] for g in grad_qkv]))
        del leaves, tails, grad_qkv
        (from_qkv,) = _joined(*_both(grads), 1)
        return grad_x + from_qkv, self.sums

    def _again(
        self, module: nn.Module, x_BNC: Tensor, out: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [t.detach().requires_grad_() for t in self._cut(self.tail, x_BNC, out)]
        with torch.enable_grad():
            return leaves, _listed(self._call(module, self.tail, leaves))

    def _pull(self, which: int, grads: list[Tensor]) -> list[Tensor]:
        """Through the kept graph of the swapped tokens, which is let go."""
        graph, self.graphs[which] = self.graphs[which], None
        return [] if graph is None else self._gradients(graph.ends, graph.begins, grads)

    def _gradients(self, ends: Any, begins: Sequence[Any], grads: list[Tensor]) -> list[Tensor]:
        """Gradients where the module begins; those in parameters are added to their sums."""
        inputs = [*begins, *self.parameters]
        found = cast(
            Sequence[Tensor | None], torch.autograd.grad(ends, inputs, grads, allow_unused=True)
        )
        for index, grad in enumerate(found[len(begins) :]):
            total = self.sums[index]
            if grad is not None:
                self.sums[index] = grad if total is None else total + grad
        mine = found[: len(begins)]
        if any(g is None for g in mine):
            raise MethodError("expected both modules to use every tensor that they are given")
        return cast(list[Tensor], list(mine))

    def _pull_attention(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor
    ) -> list[Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            attention = self._attention(q, k, v)
            sums, grad_q = attention.sums(), torch.empty_like(q)
            for rows in attention.rows():
                q_n, o_n, z_n, g_n = (t[:, :, rows] for t in (q, out, lse, grad_out))
                grad_q[:, :, rows] = attention.pull_back(q_n, rows, o_n, z_n, g_n, sums)
        return [grad_q, sums.key.to(k.dtype), sums.value.to(v.dtype)]


def without_gradients(halves: Halves, x_BNC: Tensor) -> Tensor:
    """The layer's output where nothing is saved for backward."""
    q, k, v = halves.before(x_BNC, *halves.along)
    rule = halves.rule
    out = memory_efficient_attention(
        q, k, v, is_causal=rule.is_causal, scale=rule.scale, enable_gqa=True
    )
    return halves.after(x_BNC, out, *halves.along)


class SwappedTokens(torch.autograd.Function):
    """The layer of ``halves``; ``parameters`` are theirs, given so that their gradients are this function's."""

    @staticmethod
    def forward(ctx: Any, x_BNC: Tensor, halves: Halves, *parameters: Tensor) -> Tensor:  # noqa: D102
        ctx.layer = _Layer(halves, x_BNC, parameters)
        ctx.save_for_backward(*parameters)
        return ctx.layer.forward(x_BNC)

    @staticmethod
    @single_backward("memo")
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: D102
        layer, _ = ctx.layer, ctx.saved_tensors  # asked for: it tells if parameters were changed
        if layer is None:
            raise MethodError(
                "expected one backward pass: what was swapped was let go in the first"
            )
        ctx.layer = None
        draws: Draws = layer.replay.draws
        with draws.replaying():
            grad_x, sums = layer.backward(grads[0])
        return (grad_x, None, *sums)


def _listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _both(grads: list[list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return grads[0], grads[1] if len(grads) > 1 else []


def _joined(
    heads: Sequence[Tensor], tails: Sequence[Tensor], dim: int | tuple[int, ...]
) -> list[Tensor]:
    """The tokens of both parts, each tensor along its dimension; one part alone as it is."""
    if not heads or not tails:
        return list(heads or tails)
    dims = dim if isinstance(dim, tuple) else (dim,) * len(heads)
    return [torch.cat(pair, d) for *pair, d in zip(heads, tails, dims, strict=True)]


def _check_projections(parts: Sequence[Tensor]) -> None:
    fits = len(parts) == 3 and all(t.dim() == 4 for t in parts)
    if not fits or parts[0].shape[1] % parts[1].shape[1] or parts[0].shape[3] != parts[1].shape[3]:
        raise MethodError(
            "expected before to return queries, keys and values of (batch, heads, tokens, width), the heads of keys "
            f"dividing those of queries, found {[tuple(t.shape) for t in parts]}"
        )
