"""Makes a pretrained Transformer reversible: adapters beside its layers, arranged so that it starts near what it was.

Formula: y1 = l x1 + F(x2), y2 = b x2 + G(y1), both streams the embedding at first. Arrangement 1: F is the layer
    with an adapter beside its feed-forward part, G an adapter, (l, b) = (1/32, 1), streams exchanged after each
    layer. 2: F an adapter, G the layer, (1, 1/32), exchanged. 3: F is the attention part, G the feed-forward
    part, each with an adapter, (1/16, 1/16), not exchanged. An adapter is W_up gelu(W_down x), N(0, 0.02^2).
Memory: activations of the layers are the two streams in float64 for each chain of ``blocks_per_chain`` layers, whatever its
    depth; optimizer state and gradients are the adapters'. Time: the layers' forward pass once more.
Exactness: different: the function is near the pretrained one, not the same (MiniLM: a mean cosine of tokens above 0.99
    at scales of 1/32; larger scales, the paper's 0.1 among them, and arrangements 2 and 3 start farther away), and
    only adapters are trained (``train_all`` trains everything). The gradient is that of the new function. Below float64, streams
    on a grid of 2^-22 are reconstructed to the bit for 6 layers where scales are powers of two; at others bits are lost.
    In float64, errors grow by about 1 / l with each layer, below 1e-8 of MiniLM's gradient in one chain of arrangement 1;
    2 and 3 need shorter chains. ``reconstruction_error`` measures, ``max_error`` bounds; more layers
    in a chain need larger scales, which start farther away.
Limits: a new head wants a higher rate than the adapters: MiniLM on eight topics of documentation, 120 steps, three
    seeds, at 1e-2 and 1e-3: 69.0 %, everything 68.1 %, the head alone 67.2 %. Models with a list of BERT-like or Llama-like layers; no key-value
    cache, cross-attention or chunked feed-forward. The names of layers' parameters change while it is converted. A new
    head is frozen with the rest: set its ``requires_grad`` afterwards. Forward passes without gradients, and those of plain autograd, are not
    on the grid: they differ in float32's rounding.
References: Liao et al., Make Pre-trained Model Reversible, section 3 and figure 4, and its scripts for the scales.
    *departs:* scales are powers of two, and smaller than the paper's 0.1, to start nearer; streams are wide; the
    output is the stream that went through the last layer, and arrangement 1 has no adapter after that;
    ``output="mean"`` is the paper's mean of both. In arrangement 3 the attention's adapter stands before the dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from torch import Tensor, nn

from slimgrad.errors import ArgumentError, UnsupportedError
from slimgrad.layers.coupling import ReversibleBlock
from slimgrad.layers.reversible_sequence import ReversibleSequence
from slimgrad.method import Paper, Undo, component
from slimgrad.types import Column, Exactness

_SCALES: Final = {1: (2**-5, 1.0), 2: (1.0, 2**-5), 3: (2**-4, 2**-4)}  # exact in binary: see Wide
_CARRIER: Final = {1: 1, 2: 0, 3: 1}  # the stream that went through the last layer


@component(
    Column.ACTIVATIONS,
    Exactness.DIFFERENT,
    Paper(
        "Make Pre-trained Model Reversible: From Parameter to Memory Efficient Fine-Tuning",
        "Baohao Liao, Shaomu Tan, Christof Monz",
        2023,
        "2306.00477",
    ),
)
def meft(
    model: nn.Module,
    arrangement: int = 1,
    *,
    bottleneck: int = 64,
    scales: tuple[float, float] | None = None,
    output: str = "carrier",
    train_all: bool = False,
    blocks_per_chain: int | None = 6,
    max_error: float | None = None,
) -> Undo:
    """Convert ``model`` in place; the Undo gives it its own layers back (and keeps what was learned in them).

    ``bottleneck`` is the adapters' width; ``scales`` are (l, b), best powers of two. A chain has
    ``blocks_per_chain`` layers (None: all); between chains both streams are kept. Raises ArgumentError for an unknown
    arrangement or output, UnsupportedError for a model without a list of BERT-like or Llama-like layers.
    """
    if arrangement not in _SCALES or output not in ("carrier", "mean"):
        raise ArgumentError(
            f"expected an arrangement of 1, 2 or 3 and an output 'carrier' or 'mean', found {arrangement!r} and {output!r}"
        )
    if blocks_per_chain is not None and blocks_per_chain < 1:
        raise ArgumentError(f"expected blocks_per_chain of 1 or more, found {blocks_per_chain}")
    owner, name, layers = _layers_of(model)
    config: Any = getattr(model, "config", None)
    undo = Undo()
    if getattr(config, "use_cache", None) is not None:
        undo.then(_restored(config, "use_cache", False))
    if not train_all:
        for parameter in model.parameters():
            undo.then(_restored(parameter, "requires_grad", False))
    blocks = [
        _block(layer, arrangement, bottleneck, scales or _SCALES[arrangement], undo)
        for layer in layers
    ]
    if arrangement == 1 and output == "carrier":
        blocks[-1] = _without_adapter(blocks[-1])
    size = blocks_per_chain or len(blocks)
    chains = [
        ReversibleSequence(blocks[i : i + size], max_error=max_error, wide=True)
        for i in range(0, len(blocks), size)
    ]
    stack = ReversibleLayers(chains, None if output == "mean" else _CARRIER[arrangement])
    undo.then(_restored(owner, name, nn.ModuleList([stack])))
    return undo


class ReversibleLayers(nn.Module):
    """All layers of a model, as one: hidden states in, hidden states out."""

    def __init__(self, chains: Sequence[ReversibleSequence], carrier: int | None) -> None:
        super().__init__()
        self.chains = nn.ModuleList(chains)
        self.carrier = carrier

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Both streams start as ``hidden_states``; the other arguments are the layers'."""
        if kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None:
            raise UnsupportedError(
                "a reversible model keeps no key-value cache: call it with use_cache=False"
            )
        streams: tuple[Tensor, ...] = (hidden_states, hidden_states)
        for chain in self.chains:
            streams = chain(streams, *args, **kwargs)
        if self.carrier is None:
            return (streams[0] + streams[1]) / 2
        return streams[self.carrier]


class Adapter(nn.Module):
    """W_up gelu(W_down x), both near zero, on the device and in the dtype of ``like``."""

    def __init__(self, width: int, bottleneck: int, like: Tensor) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.down = nn.Linear(width, bottleneck, **place)
        self.up = nn.Linear(bottleneck, width, **place)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Of x alone; a layer's other arguments are passed over."""
        return self.up(nn.functional.gelu(self.down(x)))


class _Beside(nn.Module):
    """A feed-forward part plus an adapter of the same input."""

    def __init__(self, inner: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.inner, self.adapter = inner, adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.adapter(x)


class _BesideBert(nn.Module):
    """The same where the residual is added inside: norm(dense(hidden) + x + adapter(x))."""

    def __init__(self, inner: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.inner, self.adapter = inner, adapter

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return self.inner(hidden, x + self.adapter(x))


class _After(nn.Module):
    """A projection, and an adapter of what it returns."""

    def __init__(self, inner: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.inner, self.adapter = inner, adapter

    def forward(self, x: Tensor) -> Tensor:
        projected = self.inner(x)
        return projected + self.adapter(projected)


class _Whole(nn.Module):
    """A layer, of which some versions return a tuple."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _first(self.layer(x, *args, **kwargs))


class _Attention(nn.Module):
    """The attention part with its residual: before the norm (Llama) or inside (BERT)."""

    def __init__(self, attention: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.attention, self.norm = attention, norm

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.norm is None:
            return _first(self.attention(x, *args[:1], **kwargs))
        return x + _first(self.attention(self.norm(x), *args, **kwargs))


class _FeedForward(nn.Module):
    """The feed-forward part with its residual."""

    def __init__(self, parts: Sequence[nn.Module], norm: nn.Module | None) -> None:
        super().__init__()
        self.parts, self.norm = nn.ModuleList(parts), norm

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        if self.norm is None:
            intermediate, output = self.parts
            return output(intermediate(x), x)
        return x + self.parts[0](self.norm(x))


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _block(
    layer: nn.Module, arrangement: int, bottleneck: int, scales: tuple[float, float], undo: Undo
) -> ReversibleBlock:
    """The layer with its adapters. What is changed on it is added to ``undo``."""
    parts: Any = layer
    is_bert = _is_bert(layer)
    like: Tensor = parts.output.dense.weight if is_bert else parts.input_layernorm.weight
    width = like.shape[0]

    def adapter() -> Adapter:
        return Adapter(width, bottleneck, like)

    if is_bert:
        undo.then(_restored(layer, "output", _BesideBert(parts.output, adapter())))
    else:
        undo.then(_restored(layer, "mlp", _Beside(parts.mlp, adapter())))
    if arrangement < 3:
        pair = [_Whole(layer), adapter()]
        return ReversibleBlock(
            *(pair if arrangement == 1 else pair[::-1]), scales=scales, rotate=True
        )
    if is_bert:
        out = parts.attention.output
        undo.then(_restored(out, "dense", _After(out.dense, adapter())))
        first = _Attention(parts.attention, None)
        second = _FeedForward([parts.intermediate, parts.output], None)
    else:
        undo.then(_restored(parts.self_attn, "o_proj", _After(parts.self_attn.o_proj, adapter())))
        first = _Attention(parts.self_attn, parts.input_layernorm)
        second = _FeedForward([parts.mlp], parts.post_attention_layernorm)
    return ReversibleBlock(first, second, scales=scales)


def _without_adapter(block: ReversibleBlock) -> ReversibleBlock:
    """The last block of arrangement 1: nothing that is read comes from its adapter."""
    return ReversibleBlock(block.functions[0], None, scales=block.scales, rotate=True)


def _restored(owner: Any, name: str, value: object) -> Callable[[], None]:
    """Set an attribute; what is returned sets it back."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def _is_bert(layer: nn.Module) -> bool:
    return all(hasattr(layer, part) for part in ("attention", "intermediate", "output"))


def _is_llama(layer: nn.Module) -> bool:
    parts = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    return all(hasattr(layer, part) for part in parts)


def _layers_of(model: nn.Module) -> tuple[nn.Module, str, list[nn.Module]]:
    """Where the list of layers is: its owner, its name there, and the layers."""
    for owner in model.modules():
        for name, layers in owner.named_children():
            if isinstance(layers, nn.ModuleList) and len(layers):
                if all(_is_bert(x) and not hasattr(x, "crossattention") for x in layers):
                    return owner, name, list(layers)
                if all(_is_llama(x) for x in layers):
                    return owner, name, list(layers)
    raise UnsupportedError(
        f"{type(model).__name__} has no list of layers with attention, intermediate and output (BERT), or with "
        "self_attn, mlp, input_layernorm and post_attention_layernorm (Llama)"
    )
