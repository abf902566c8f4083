"""Leaves tokens out of the deeper layers of a language model while it is trained: they take the informative ones alone.

Formula: from layer l on, of blocks of ``block`` tokens those whose predictor s_l scores highest go on, as many as hold the share
    ``stages[l]`` of the T tokens, in their order and at their positions: h <- h[I]. Logits and loss are those of the tokens that
    went all the way. What s_l learns: log of the attention a token gets, over all heads and later queries, against
    what it would get if attention were even, less the mean of that at its place in all texts.
Memory: activations of a layer, logits and loss are the kept share of what they were, and the indices, 8 bytes a token. Time: linear
    parts take the kept share of theirs, attention its square.
Exactness: different: the loss is of fewer tokens, which see fewer; with a share of 1 it is the plain model.
    SmolLM2-135M's shape, LoRA, 1,024 tokens, half of them from layer 4 on: activations 1.80 times lower, peak 1.50 times.
    Before any training, the kept tokens' loss on documentation: 2.85 nats for every other block of 64, 4.04 for half of the tokens at
    random, against 2.26 of all tokens; where each layer left out tokens of its own, 8.8 and more against 2.58: so it is not done
    here. After 12 windows of 1,024 tokens held-out loss is 0.024 nats above that of all tokens, of random blocks 0.030 (three
    seeds, of which one has it the other way round; docs/adapters.md).
Limits: models with a list of Llama-like layers, with no padding or with a 4-d mask, without key-value cache (``use_cache`` is
    switched off); others raise ``UnsupportedError``. While gradients are recorded the output has the kept tokens alone: use
    ``loss``, not the model's own labels. No recomputation of single layers. ``fit`` runs the model with attention of
    whole matrices on its batches, and keeps the inputs of the layers it learns from.
References: Wang et al. (2025), token elimination and pattern prediction. *departs:* what a layer leaves out is left out of later
    ones too, and of the loss, in whole blocks; shares are set, where the paper has thresholds: bytes are known beforehand;
    a predictor is one small network that sees a token and the mean of all; kernels are torch's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.layers.token_predictor import Predictor, beside_position, recall, received_attention
from slimgrad.method import Paper, Undo, component
from slimgrad.replaced_forward import replace_forward
from slimgrad.types import Column, Exactness

_PARTS: Final = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_BY_TOKEN: Final = ("position_ids", "position_embeddings")

# Shapes: N sequences, T tokens, K of them kept, D features, V words.


def rows_of(h: Tensor, index_NK: Tensor) -> Tensor:
    """Of each sequence its tokens ``index_NK``; indexing keeps the indices for backward, gather would keep ``h``."""
    return h[torch.arange(len(index_NK), device=h.device)[:, None], index_NK]


def picked(kwargs: Mapping[str, Any], index_NK: Tensor) -> dict[str, Any]:
    """A layer's other arguments, of the kept tokens alone."""
    kept = dict(kwargs)
    for name in _BY_TOKEN:
        kept[name] = _picked(kept.get(name), index_NK)
    if kept.get("attention_mask") is not None:
        kept["attention_mask"] = _picked_mask(kept["attention_mask"], index_NK)
    return kept


def _picked(values: Any, index_NK: Tensor) -> Any:
    """What there is for each token, (1 or N, T, ...), of the kept ones."""
    if isinstance(values, (tuple, list)):
        return tuple(_picked(v, index_NK) for v in values)
    if values is None:
        return None
    return rows_of(values.expand(len(index_NK), *values.shape[1:]), index_NK)


def _picked_mask(mask: Any, index_NK: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise UnsupportedError(
            f"expected a 4-d attention mask or none, found {type(mask).__name__} {mask}"
        )
    size = mask.shape[-1]
    mask = mask.expand(index_NK.shape[0], -1, -1, -1)
    rows = index_NK[:, None, :, None].expand(-1, mask.shape[1], -1, size)
    columns = index_NK[:, None, None, :].expand(-1, mask.shape[1], index_NK.shape[1], -1)
    return mask.gather(2, rows).gather(3, columns)


def _layers_of(model: nn.Module) -> list[nn.Module]:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    for found in lists:
        if all(hasattr(layer, part) for layer in found for part in _PARTS):
            return list(found)
    raise UnsupportedError(
        f"{type(model).__name__} has no list of layers with {', '.join(_PARTS)} (Llama)"
    )


@component(
    Column.ACTIVATIONS,
    Exactness.DIFFERENT,
    Paper(
        "LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning",
        "Tuowei Wang, Xingyu Chen, Kun Li, Ting Cao, Ju Ren, Yaoxue Zhang",
        2025,
        "2501.09767",
    ),
)
class LeMo:
    """``lemo = LeMo(model, {4: 0.5}); lemo.fit(batches)``; train on ``lemo.loss(model(ids).logits, ids)``; ``lemo.undo()``.

    ``stages``: from which layer on which share of the tokens is kept, each at most that before it. ``choice`` "random" keeps
    random blocks, for comparison. ``kept`` are the last forward pass's tokens, (N, K), None for all. Raises MethodError for
    values out of bounds, UnsupportedError for other models, and where a model is trained before ``fit``.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Mapping[int, float],
        *,
        block: int = 64,
        width: int = 32,
        choice: Literal["predicted", "random"] = "predicted",
        seed: int = 0,
    ) -> None:
        self.model, self.layers = model, _layers_of(model)
        self.stages = dict(sorted(stages.items()))
        shares = [1.0, *self.stages.values()]
        falls = all(0 < b <= a for a, b in itertools.pairwise(shares))
        inside = all(0 <= number < len(self.layers) for number in stages)
        if not stages or not falls or not inside or block < 1 or width < 1:
            raise MethodError(
                f"expected stages of layers below {len(self.layers)} whose shares fall, in (0, 1], and block and width "
                f"of 1 or more, found {dict(stages)}, {block} and {width}"
            )
        if choice not in ("predicted", "random"):
            raise MethodError(f"expected choice 'predicted' or 'random', found {choice!r}")
        self.block, self.width, self.choice = block, width, choice
        self.predictors: dict[int, Predictor] = {}
        self.kept: Tensor | None = None
        self._along, self._num_tokens = dict[str, Any](), 0
        self._generator = torch.Generator().manual_seed(seed)
        self.undo = Undo()
        config: Any = getattr(model, "config", None)
        if getattr(config, "use_cache", None) is not None:
            self.undo.then(functools.partial(setattr, config, "use_cache", config.use_cache))
            config.use_cache = False
        try:
            for number in range(min(stages), len(self.layers)):
                self.undo.then(replace_forward(self.layers[number], self._forward_of(number)))
        except UnsupportedError:
            self.undo()
            raise

    def _forward_of(self, number: int) -> Callable[..., Tensor]:
        def forward(self_: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            plain = functools.partial(type(self_).forward, self_)
            if number == min(self.stages):
                self.kept = None
            if not torch.is_grad_enabled():
                return plain(hidden_states, *args, **kwargs)
            if args or kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None:
                raise UnsupportedError(
                    "expected a layer called with keywords and without a key-value cache: call the model with "
                    "use_cache=False"
                )
            if number in self.stages:
                hidden_states = self._narrowed(number, hidden_states, kwargs)
            along = kwargs if self.kept is None else self._along
            if number == len(self.layers) - 1:
                self._along = {}
            return plain(hidden_states, **along)

        return forward

    def _narrowed(self, number: int, h_NTD: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        num_all = h_NTD.shape[1] if self.kept is None else self._num_tokens
        index_NK = self.chosen(number, h_NTD, num_all)
        if index_NK is None:
            return h_NTD
        self._num_tokens = num_all
        self.kept = index_NK if self.kept is None else self.kept.gather(1, index_NK)
        self._along = picked(kwargs, self.kept)
        return rows_of(h_NTD, index_NK)

    @torch.no_grad()
    def chosen(self, number: int, h_NTD: Tensor, num_all: int) -> Tensor | None:
        """The tokens that layer ``number`` keeps of those that came, (N, K), rising; None for all.

        The first block stays, and what is over at the end of whole blocks.
        """
        num_sequences, num_tokens, _ = h_NTD.shape
        num_blocks = num_tokens // self.block
        num_kept = max(1, round(self.stages[number] * (num_all // self.block)))
        if num_kept >= num_blocks:
            return None
        if self.choice == "random":
            score_NB = torch.rand(num_sequences, num_blocks, generator=self._generator).to(
                h_NTD.device
            )
        elif number in self.predictors:
            score_NB = blocks_of(self.predictors[number](h_NTD), self.block)
        else:
            raise UnsupportedError("expected predictors that were trained: call fit(batches) first")
        score_NB[:, 0] = torch.inf
        best_NB = score_NB.topk(num_kept, dim=1).indices.sort(dim=1).values
        within = torch.arange(self.block, device=h_NTD.device)
        index_NK = (best_NB[..., None] * self.block + within).flatten(1)
        rest = torch.arange(num_blocks * self.block, num_tokens, device=h_NTD.device)
        return torch.cat([index_NK, rest.expand(num_sequences, -1)], 1)

    def loss(self, logits_NKV: Tensor, labels_NT: Tensor) -> Tensor:
        """Mean cross-entropy of the kept tokens' next ones; labels of -100 do not count."""
        next_NT = functional.pad(labels_NT[:, 1:], (0, 1), value=-100)
        next_NK = (
            next_NT
            if logits_NKV.shape[1] == next_NT.shape[1]
            else next_NT.gather(1, _known(self.kept))
        )
        return functional.cross_entropy(logits_NKV.flatten(0, 1).float(), next_NK.flatten())

    def fit(
        self, batches: Sequence[Mapping[str, Any]], *, num_steps: int = 200, lr: float = 3e-3
    ) -> dict[int, float]:
        """Train the predictors on the model's own attention; of each stage, the recall on the last batch.

        Batches are keyword arguments of the model: ``[{"input_ids": ids}, ...]``.

        Recall is the share of the most attended blocks that are chosen. The last of the batches trains
        nothing; it counts in the mean of each place.
        Raises UnsupportedError for fewer than two, or for those that are no mappings.
        """
        if not all(hasattr(batch, "keys") for batch in batches):
            raise UnsupportedError(
                'expected batches as keyword arguments of the model: [{"input_ids": ids}, ...]'
            )
        if len(batches) < 2:
            raise UnsupportedError(
                f"expected two batches or more, the last to test on, found {len(batches)}"
            )
        wanted = [number for number, share in self.stages.items() if share < 1]
        seen = [received_attention(self.model, self.layers, wanted, batch) for batch in batches]
        recalls: dict[int, float] = {}
        for number in wanted:
            inputs, shares = zip(*(found[number] for found in seen), strict=True)
            scores = beside_position(shares)
            predictor = Predictor(inputs[0].shape[-1], self.width, number).to(inputs[0])
            predictor.fit(inputs[:-1], scores[:-1], num_steps, lr)
            self.predictors[number] = predictor
            told, true = (blocks_of(s, self.block) for s in (predictor(inputs[-1]), scores[-1]))
            num_kept = max(1, round(self.stages[number] * told.shape[1]))
            recalls[number] = recall(told.topk(num_kept, dim=1).indices, true)
        return recalls


def blocks_of(score_NT: Tensor, block: int) -> Tensor:
    """Means over whole blocks, (N, B)."""
    return score_NT.detach().unfold(1, block, block).mean(-1)


def _known(kept: Tensor | None) -> Tensor:
    if kept is None:
        raise UnsupportedError(
            "expected logits of all tokens, or of those kept in the last forward pass"
        )
    return kept
