"""Mixed-integer programmes, solved by HiGHS through SciPy."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack, issparse

PATIENCE = 10.0
_OUT_OF_TIME = 1  # what SciPy calls it


def solve(
    cost: np.ndarray,
    constraints: Sequence[LinearConstraint],
    *,
    is_integer: np.ndarray,
    upper: np.ndarray,
    gap: float,
    limit_s: float,
    patience: float = PATIENCE,
    constant: float = 0.0,
) -> np.ndarray | None:
    """The ``x`` with the least ``constant + cost @ x`` and ``0 <= x <= upper``; None where there is none.

    ``gap``: how far from the best, relative to the whole cost with its constant, a solution may be. Where
    none was found within ``limit_s``, ``patience`` times as long is spent (1: no longer).
    """
    constants = [
        LinearConstraint(_with_column(c.A), lb=c.lb, ub=c.ub)  # pyright: ignore[reportArgumentType]
        for c in constraints
    ]
    for limit in dict.fromkeys((limit_s, patience * limit_s)):
        with _silent():
            answer: Any = milp(
                np.append(cost, constant),
                constraints=constants,
                integrality=np.append(is_integer, 0),
                bounds=Bounds(
                    np.append(np.zeros(len(cost)), 1.0),  # pyright: ignore[reportArgumentType]
                    np.append(upper, 1.0),  # pyright: ignore[reportArgumentType]
                ),
                options={"time_limit": limit, "mip_rel_gap": gap},
            )
        if answer.x is not None:
            return answer.x[:-1]
        if answer.status != _OUT_OF_TIME:
            break
    return None


def at_most(matrix: Any, upper: np.ndarray) -> LinearConstraint:
    """``matrix @ x <= upper``, row by row."""
    return LinearConstraint(matrix, ub=upper)  # pyright: ignore[reportArgumentType]: typed as one number


def at_least(matrix: Any, lower: np.ndarray) -> LinearConstraint:
    """``matrix @ x >= lower``, row by row."""
    return LinearConstraint(matrix, lb=lower)  # pyright: ignore[reportArgumentType]: typed as one number


def _with_column(matrix: Any) -> Any:
    """``matrix`` with a column of zeros for the constant."""
    if issparse(matrix):
        return hstack((matrix, csr_array((matrix.shape[0], 1))), format="csr")
    return np.hstack((matrix, np.zeros((matrix.shape[0], 1))))


@contextmanager
def _silent() -> Generator[None]:
    """HiGHS writes lines meant for its own developers straight to the process's standard output."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)
