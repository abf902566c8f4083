"""Trains only the tensors that are worth their bytes under a budget, and prunes the backward pass to them.

Formula: choose the set S of parameters with the largest sum of scores whose step fits the budget; theta_p <-
    U(theta_p, g_p) for p in S, as soon as g_p is complete; all other parameters stay
Memory: gradients and optimizer state of S alone; activations from the earliest tensor of S on, and of those only what
    S needs: convolutions and norms with a frozen weight save no input where eager autograd would. With
    ``update_in_backward`` gradients live one at a time. Time: no operation of backward before the earliest tensor of
    S, no weight gradient outside S; choosing takes about fifteen traces on fake tensors, once.
Exactness: different: other parameters stay as they were. The gradients of S are autograd's, up to rounding.
Limits: ``BudgetError`` where not even one tensor fits; a model that cannot be traced on fake tensors is refused by
    that trace; scores stay as they were when S was chosen. Accuracy is not always that of training
    everything: MiniLM on eight topics of documentation, half of the peak, 120 steps, three seeds, each at its best
    rate: 68.3 %, everything 68.1 %, the head alone 67.2 %; on four topics, 280 samples, at one rate: 70.5 %, everything
    77.5 %, the head alone 43.5 % (torch 2.13 on a CPU, November 2026).
References: Zhu et al. (2023), sections 2 (sparse backpropagation) and 3 (pruned backward graph, reordered updates); Lin
    et al., On-Device Training Under 256KB Memory, section 2.2 (contribution analysis, search under a memory
    constraint). *departs:* scores are given, or squared norms of one batch's gradient in place of the accuracy that
    each tensor's training alone brings; whole tensors, no channels; nested sets by score a byte in place of an
    evolutionary search; eager layers in place of a compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim import Optimizer

from slimgrad.errors import BudgetError, MethodError
from slimgrad.host import Batch, Host, LossFn
from slimgrad.measuring.fake import faked
from slimgrad.measuring.trace import checked_loss
from slimgrad.measuring.tracker import Tracker
from slimgrad.method import Block, Paper, Scope, Undo, component
from slimgrad.methods.gradients.pruned_backward import prune
from slimgrad.methods.gradients.update_in_backward import UpdateInBackward
from slimgrad.optimizers import is_separable
from slimgrad.types import Budget, BudgetLike, Column, Exactness, format_bytes

_CUTS = (1.0, 0.5)  # of the deepest reach of backward that fits: shallower leaves more for weights
_GRAIN = 16  # a set is found to within this part of the tensors: each halving takes a trace


@dataclass
class SparseUpdate:
    """What trains. ``peak_bytes`` is the step's predicted peak, ``full_peak_bytes`` that of training everything.

    ``undo()`` makes everything trainable again.
    """

    model: nn.Module
    loss_fn: LossFn
    chosen: tuple[str, ...]
    scores: Mapping[str, float]
    peak_bytes: int
    full_peak_bytes: int
    undo: Undo = field(repr=False)

    def update_in_backward(self, optimizer: Optimizer) -> Undo:
        """From now on ``backward()`` updates each chosen tensor as its gradient completes, and frees the gradient.

        Raises MethodError for an optimizer that does not treat parameters one by one. ``undo`` ends this too.
        """
        if not is_separable(optimizer):
            raise MethodError("expected an optimizer that treats parameters one by one")
        host = Host(self.model, optimizer, self.loss_fn)
        undo = UpdateInBackward().attach(Block("", Scope.MODEL, host=host))
        for parameter in host.parameters():
            assert host.on_gradient is not None
            undo.then(parameter.register_post_accumulate_grad_hook(host.on_gradient).remove)
        self.undo.then(undo)
        return undo

    def __str__(self) -> str:
        total = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for n, p in self.model.named_parameters() if n in set(self.chosen))
        worth = sum(self.scores[n] for n in self.chosen) / max(sum(self.scores.values()), 1e-300)
        return (
            f"{len(self.chosen)} tensors train, {trained / total:.1%} of the parameters and {worth:.1%} of the "
            f"scores; peak {format_bytes(self.peak_bytes)}, all of them: {format_bytes(self.full_peak_bytes)}"
        )


@component(
    Column.ACTIVATIONS,
    Exactness.DIFFERENT,
    Paper(
        "PockEngine: Sparse and Efficient Fine-tuning in a Pocket",
        "Ligeng Zhu, Lanxiang Hu, Ji Lin, Wei-Chen Wang, Wei-Ming Chen, Chuang Gan, Song Han",
        2023,
        "2310.17752",
    ),
)
def sparse_update(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    *,
    budget: BudgetLike,
    scores: Mapping[str, float] | None = None,
    state_tensors: int = 2,
) -> SparseUpdate:
    """Freeze all but the parameters that are worth most under ``budget``, the bytes at any instant of a step.

    ``scores`` says by parameter name what training a tensor is worth; those without one, or with 0, stay frozen.
    Without scores a full backward pass on ``batch`` gives squared norms of gradients, one gradient in memory at a
    time. ``state_tensors`` is what the optimizer keeps a parameter (AdamW: 2). The peak is that with updates in
    backward. Raises BudgetError where nothing fits, MethodError for names that the model has not.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    worth = (
        gradient_scores(model, loss_fn, batch) if scores is None else _checked(scores, trainable)
    )
    search = _Search(model, loss_fn, batch, state_tensors, trainable)
    full_bytes, order = search.peak(list(trainable)), search.completed
    limit = Budget.parse(budget).resolve(full_bytes)
    names = [n for n in order if worth.get(n, 0) > 0]
    try:
        chosen = search.best(names, worth, limit)
        peak_bytes = search.peak(chosen)
    except BaseException:
        search.train(list(trainable))
        raise
    undo = Undo(lambda: search.train(list(trainable)))
    undo.then(prune(model))
    return SparseUpdate(model, loss_fn, tuple(chosen), worth, peak_bytes, full_bytes, undo)


def gradient_scores(model: nn.Module, loss_fn: LossFn, batch: Batch) -> dict[str, float]:
    """The squared norm of each trainable parameter's gradient on ``batch``: what a small step of SGD would gain.

    Gradients are freed as they complete; those that were there before are kept.
    """
    found: dict[str, float] = {}
    before = {p: p.grad for p in model.parameters()}
    handles = [
        p.register_post_accumulate_grad_hook(_noting(n, found))
        for n, p in model.named_parameters()
        if p.requires_grad
    ]
    try:
        for parameter in before:
            parameter.grad = None
        checked_loss(loss_fn(model, batch)).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient in before.items():
            parameter.grad = gradient
    return found


def _noting(name: str, found: dict[str, float]) -> Callable[[Tensor], None]:
    def note(parameter: Tensor) -> None:
        if parameter.grad is not None:
            found[name] = float(parameter.grad.detach().double().square().sum())
            parameter.grad = None

    return note


def _checked(scores: Mapping[str, float], trainable: Mapping[str, Tensor]) -> Mapping[str, float]:
    unknown = sorted(set(scores) - set(trainable))
    if unknown:
        raise MethodError(f"expected scores of trainable parameters by name, got {unknown[:3]}")
    return scores


@dataclass
class _Search:
    """Looks for what trains; every set is judged by the traced peak of its step."""

    model: nn.Module
    loss_fn: LossFn
    batch: Batch
    state_tensors: int
    trainable: Mapping[str, nn.Parameter]
    completed: list[str] = field(
        default_factory=list
    )  # by the last trace, in the order of backward

    def train(self, names: Sequence[str]) -> None:
        wanted = set(names)
        for name, parameter in self.trainable.items():
            parameter.requires_grad_(name in wanted)

    def peak(self, names: Sequence[str]) -> int:
        """Bytes of a step that trains ``names``, updated in backward; afterwards those are what requires a gradient."""
        self.train(names)
        state = sum(self.trainable[n].nbytes for n in names) * self.state_tensors
        self.completed = []
        pruned = prune(self.model)
        try:
            with faked(self.model, self.batch) as (batch,):
                for name, parameter in self.model.named_parameters():
                    if parameter.requires_grad:
                        parameter.register_post_accumulate_grad_hook(self._freeing(name))
                with Tracker(self.model, inputs=batch) as tracker:
                    checked_loss(self.loss_fn(self.model, batch)).backward()
        finally:
            pruned()
        return tracker.peak_bytes + state

    def _freeing(self, name: str) -> Callable[[Tensor], None]:
        def free(parameter: Tensor) -> None:
            self.completed.append(name)
            parameter.grad = None

        return free

    def best(
        self, names: Sequence[str], worth: Mapping[str, float], limit: int | None
    ) -> list[str]:
        """Of ``names``, in the order of backward, the set of highest worth found that fits."""
        alone = self.peak(names[:1]) if names else 0
        if limit is None:  # "min"
            limit = alone
        if not names or alone > limit:
            raise BudgetError(
                f"expected a budget of at least {format_bytes(alone)}, which one tensor takes",
                smallest_bytes=alone,
            )
        deepest = _longest(len(names), lambda n: self.peak(names[n - 1 : n]) <= limit)
        found: list[list[str]] = []
        for reach in dict.fromkeys(max(1, round(cut * deepest)) for cut in _CUTS):
            dense = sorted(names[:reach], key=lambda n: -worth[n] / self.trainable[n].nbytes)
            num_kept = _longest(len(dense), lambda n, dense=dense: self.peak(dense[:n]) <= limit)
            found.append(dense[:num_kept])
        found = [f for f in found if f and self.peak(f) <= limit] or [list(names[:1])]
        return max(found, key=lambda chosen: sum(worth[n] for n in chosen))


def _longest(length: int, fits: Callable[[int], bool]) -> int:
    """The longest prefix found to fit by bisection, to within a part of the length; 1 where even that does not."""
    low, high = 1, length
    while high - low > length // _GRAIN:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
