"""A continuous-depth block: its output solves an ODE, and its gradient an adjoint ODE backwards in time.

Formula: dy/dt = f(t, y), y(t0) = x, output y(t1); a(t1) = dL/dy(t1),
    da/dt = -a^T df/dy, dL/dx = a(t0), dL/dtheta = integral over [t0, t1] of a^T df/dtheta
Memory: activations no longer grow with the number of solver steps. ``backsolve`` keeps the output alone;
    ``interpolated`` the states at ``num_nodes`` instants; ``checkpointed`` one state every ``every`` steps, and
    ``every`` more while backward runs. Plain backpropagation keeps every stage's activations. The temporaries of
    ``backsolve`` hold one tensor of the parameters' size per Runge-Kutta stage.
Exactness: approximate: ``backsolve`` and ``interpolated`` differentiate the ODE and not its solver, so that the
    error falls with the tolerance (``gradient_error`` measures it on your input); ``checkpointed`` is exact.
Limits: the field is an nn.Module, deterministic, and its parameters are found as the module's (one reached through a
    closure would get no gradient); ``backsolve`` runs the state backwards, which is unstable where the dynamics
    contract strongly; ``checkpointed`` needs a solver with fixed steps; no second derivatives; needs torchdiffeq.
References: Chen et al. (2018), section 2 and algorithm 1 of appendix B. *departs:* ``interpolated`` takes the
    state from barycentric interpolation on a Chebyshev grid, as Daulbaev et al. (2020, arXiv 2003.05271), section 3,
    and the parameters' integral by Clenshaw-Curtis quadrature on the same grid, in the way of Norcliffe and
    Deisenroth (2023, arXiv 2308.10644), section 3: no solver stage holds a tensor of the parameters' size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimgrad.errors import ArgumentError, MethodError, UnsupportedError
from slimgrad.method import Paper, component
from slimgrad.methods.time.chebyshev import barycentric, nodes, quadrature
from slimgrad.single_backward import single_backward
from slimgrad.types import Column, Exactness

ADJOINTS = ("backsolve", "interpolated", "checkpointed", "backprop")
FIXED_STEPS = ("euler", "midpoint", "heun2", "heun3", "rk4")


@component(
    Column.ACTIVATIONS,
    Exactness.APPROXIMATE,
    Paper(
        "Neural Ordinary Differential Equations",
        "Ricky T. Q. Chen, Yulia Rubanova, Jesse Bettencourt, David Duvenaud",
        2018,
        "1806.07366",
    ),
)
class AdjointODE(nn.Module):
    """``y = AdjointODE(field)(x)``: the solution at ``times[1]`` of dy/dt = field(t, y) from x at ``times[0]``.

    ``field(t, y)`` takes a scalar tensor and a state of x's shape. ``adjoint`` is ``backsolve``, ``interpolated``,
    ``checkpointed``, or ``backprop`` through the solver, to compare with. ``solver`` is one of torchdiffeq's:
    adaptive ones follow ``rtol`` and ``atol``, those with fixed steps take ``num_steps``. Raises MethodError for
    fields out of bounds and UnsupportedError without torchdiffeq.
    """

    def __init__(
        self,
        field: nn.Module,
        times: tuple[float, float] = (0.0, 1.0),
        *,
        adjoint: str = "backsolve",
        solver: str = "dopri5",
        rtol: float = 1e-6,
        atol: float | None = None,
        num_steps: int = 16,
        every: int | None = None,
        num_nodes: int = 16,
    ) -> None:
        super().__init__()
        if not isinstance(field, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError(
                f"expected the field as an nn.Module, got {type(field).__name__}: the parameters that get a "
                "gradient are the module's"
            )
        _check(adjoint, solver, rtol, num_steps, every, num_nodes, times)
        _torchdiffeq()
        self.field = field
        self.times = times
        self.adjoint = adjoint
        self.solver = solver
        self.rtol = rtol
        self.atol = rtol / 100 if atol is None else atol
        self.num_steps = num_steps
        self.every = every or math.isqrt(num_steps - 1) + 1
        self.num_nodes = num_nodes

    def forward(self, x: Tensor) -> Tensor:
        """The state at ``times[1]``, of x's shape."""
        times = torch.tensor(self.times, dtype=x.dtype, device=x.device)
        ode = _torchdiffeq()
        if self.adjoint == "backsolve":
            return ode.odeint_adjoint(self.field, x, times, **self.tolerances())[-1]
        if self.adjoint == "backprop":
            return ode.odeint(self.field, x, times, **self.tolerances())[-1]
        function = _Interpolated if self.adjoint == "interpolated" else _Checkpointed
        parameters = [p for p in self.field.parameters() if p.requires_grad]
        return function.apply(self, times, x, *parameters)  # pyright: ignore[reportReturnType]

    def tolerances(self) -> dict[str, Any]:
        """What the solver is told, as torchdiffeq's keyword arguments."""
        if self.solver not in FIXED_STEPS:
            return {"method": self.solver, "rtol": self.rtol, "atol": self.atol}
        grid = _even_grid(self.num_steps)
        return {"method": self.solver, "options": {"grid_constructor": grid}}

    def extra_repr(self) -> str:
        """The adjoint, the solver and its tolerance or steps."""
        fixed = self.solver in FIXED_STEPS
        told = f"num_steps={self.num_steps}" if fixed else f"rtol={self.rtol:g}"
        return f"times={self.times}, adjoint={self.adjoint}, solver={self.solver}, {told}"


@dataclass(frozen=True)
class GradientError:
    """How far a block's gradient is from backpropagation through its solver: relative L2 errors, and in a sentence.

    ``relative`` is over the input's and all parameters' gradients together, ``by_name`` each one's own.
    """

    adjoint: str
    solver: str
    setting: str
    relative: float
    by_name: Mapping[str, float]

    def __str__(self) -> str:
        return (
            f"gradient by {self.adjoint} at {self.setting}: relative error {self.relative:.1e} to backprop "
            f"through {self.solver}"
        )


def gradient_error(
    block: AdjointODE, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None
) -> GradientError:
    """The error of ``block``'s gradient at ``x``, next to backpropagation through the same solver.

    ``loss`` maps the output to a scalar; by default half the sum of squares. Costs both gradients, and the memory
    of plain backpropagation; no parameter's ``grad`` is touched.
    """
    measured = loss or (lambda y: y.square().sum() / 2)
    names = ["x", *(n for n, p in block.field.named_parameters() if p.requires_grad)]
    plain = copy.copy(block)
    plain.adjoint = "backprop"
    found, true = (_gradients(b, x, measured) for b in (block, plain))
    missed = [(a - b).double().norm() for a, b in zip(found, true, strict=True)]
    sizes = [b.double().norm() for b in true]
    tiny = torch.finfo(torch.float64).tiny
    by_name = {
        name: float(m / s.clamp_min(tiny)) for name, m, s in zip(names, missed, sizes, strict=True)
    }
    relative = float(torch.stack(missed).norm() / torch.stack(sizes).norm().clamp_min(tiny))
    setting = block.extra_repr().rpartition(", ")[2]
    return GradientError(block.adjoint, block.solver, setting, relative, by_name)


def _gradients(block: AdjointODE, x: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x = x.detach().requires_grad_()
    asked = [x, *(p for p in block.field.parameters() if p.requires_grad)]
    with torch.enable_grad():
        found = torch.autograd.grad(
            loss(block(x)), asked, allow_unused=True, materialize_grads=True
        )
    return list(found)


def _check(
    adjoint: str,
    solver: str,
    rtol: float,
    num_steps: int,
    every: int | None,
    num_nodes: int,
    times: tuple[float, float],
) -> None:
    if adjoint not in ADJOINTS:
        raise MethodError(f"expected adjoint to be one of {', '.join(ADJOINTS)}, got {adjoint!r}")
    if adjoint == "checkpointed" and solver not in FIXED_STEPS:
        raise MethodError(
            f"checkpointed runs steps again one by one and needs a solver with fixed steps "
            f"({', '.join(FIXED_STEPS)}), got {solver!r}"
        )
    if not 0 < rtol < 1:
        raise MethodError(f"expected 0 < rtol < 1, got {rtol}")
    if num_steps < 1 or (every is not None and every < 1) or num_nodes < 2:
        raise MethodError(
            f"expected num_steps >= 1, every >= 1 and num_nodes >= 2, got {num_steps}, {every} and {num_nodes}"
        )
    if times[0] == times[1]:
        raise MethodError(f"expected two different times, got {times}")


def _torchdiffeq() -> Any:
    try:
        import torchdiffeq
    except ImportError as missing:
        raise UnsupportedError(
            "AdjointODE needs torchdiffeq, which the extra 'ode' brings: pip install 'slimgrad[ode]'"
        ) from missing
    return torchdiffeq


def _even_grid(num_steps: int) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """Even steps between each two of the given times, ``num_steps`` or a few more over all."""

    def grid(_field: Any, _state: Tensor, times: Tensor) -> Tensor:
        num_parts = -(-num_steps // (len(times) - 1))
        parts = torch.arange(num_parts, dtype=times.dtype, device=times.device) / num_parts
        starts = times[:-1, None] + parts * times.diff()[:, None]
        return torch.cat([starts.flatten(), times[-1:]])

    return grid


class _Interpolated(torch.autograd.Function):
    """Keeps the states at Chebyshev nodes; solves for the adjoint alone, and sums up the parameters' integral."""

    @staticmethod
    def forward(ctx: Any, block: AdjointODE, times: Tensor, x: Tensor, *parameters: Tensor) -> Any:
        nodes_K = nodes(block.num_nodes, times)
        with torch.no_grad():
            states_K = _torchdiffeq().odeint(block.field, x, nodes_K, **block.tolerances())
        ctx.block = block
        ctx.save_for_backward(nodes_K, states_K, *parameters)
        return states_K[-1].clone()

    @staticmethod
    @single_backward("AdjointODE")
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        block: AdjointODE = ctx.block
        nodes_K, states_K, *parameters = ctx.saved_tensors
        flat_KD = states_K.flatten(1)

        def adjoint(t: Tensor, a: Tensor) -> Tensor:
            weights_K = barycentric(nodes_K, t)
            y = (weights_K @ flat_KD).view_as(a)
            return -_pull_back(block.field, t, y, a, [])[0]

        adjoints_K = _torchdiffeq().odeint(
            adjoint, gradients[0], nodes_K.flip(0), **block.tolerances()
        )
        sums = [torch.zeros_like(p) for p in parameters]
        if parameters:
            weights_K = quadrature(nodes_K)
            for k, t in enumerate(nodes_K):
                a = weights_K[k] * adjoints_K[-1 - k]
                for total, part in zip(
                    sums, _pull_back(block.field, t, states_K[k], a, parameters)[1:], strict=True
                ):
                    total += part
        return None, None, adjoints_K[-1], *sums


class _Checkpointed(torch.autograd.Function):
    """Keeps a state every few steps; backward makes the others again and differentiates the solver step by step."""

    @staticmethod
    def forward(ctx: Any, block: AdjointODE, times: Tensor, x: Tensor, *parameters: Tensor) -> Any:
        grid = _even_grid(block.num_steps)(None, x, times)
        kept: list[Tensor] = []
        with torch.no_grad():
            for i in range(block.num_steps):
                if i % block.every == 0:
                    kept.append(x)
                x = _step(block, grid, i, x)
        ctx.block = block
        ctx.num_kept = len(kept)
        ctx.save_for_backward(grid, *kept, *parameters)
        return x

    @staticmethod
    @single_backward("AdjointODE")
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        block: AdjointODE = ctx.block
        grid, *saved = ctx.saved_tensors
        kept, parameters = saved[: ctx.num_kept], saved[ctx.num_kept :]
        sums = [torch.zeros_like(p) for p in parameters]
        a = gradients[0]
        for k in reversed(range(len(kept))):
            first = k * block.every
            states = [kept[k]]
            with torch.no_grad():
                for i in range(first, min(first + block.every, block.num_steps) - 1):
                    states.append(_step(block, grid, i, states[-1]))
            while states:
                i = first + len(states) - 1
                y = states.pop().detach().requires_grad_()
                with torch.enable_grad():
                    end = _step(block, grid, i, y)
                a, *parts = _vector_jacobian(end, a, [y, *parameters])
                for total, part in zip(sums, parts, strict=True):
                    total += part
                del end, parts
        return None, None, a, *sums


def _step(block: AdjointODE, grid: Tensor, i: int, y: Tensor) -> Tensor:
    """The solver's i-th step, with torchdiffeq's own arithmetic."""
    both = _torchdiffeq().odeint(block.field, y, grid[i : i + 2], method=block.solver)
    return both[1] if torch.is_grad_enabled() else both[1].clone()  # the start is not kept with it


def _pull_back(
    field: nn.Module, t: Tensor, y: Tensor, a: Tensor, parameters: list[Tensor]
) -> list[Tensor]:
    """a^T df/dy, and a^T df/dtheta for each parameter, at (t, y)."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        rate = field(t, y)
    return _vector_jacobian(rate, a, [y, *parameters])


def _vector_jacobian(output: Tensor, a: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    if not output.requires_grad:
        return [torch.zeros_like(i) for i in inputs]
    return list(torch.autograd.grad(output, inputs, a, allow_unused=True, materialize_grads=True))
