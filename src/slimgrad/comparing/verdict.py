"""The verdict: slimgrad beside each peer at that peer's own peak, and predictions beside measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from slimgrad.comparing.rows import Row


@dataclass(frozen=True)
class Duel:
    """One peer and slimgrad planned for the peer's measured peak, to within a thousandth; nothing is interpolated.

    ``peer_bytes`` is that peak as ``Row.peak_like`` gives it.

    ``time_ratio`` is slimgrad's median time over the peer's, below one where slimgrad is faster; None where one
    of the two has no time, with the ``reason``.
    """

    model: str
    peer: str
    peer_bytes: int
    slim_bytes: int | None
    time_ratio: float | None
    reason: str = ""


@dataclass(frozen=True)
class Prediction:
    """How far predictions are from what was measured, as shares (measured / predicted - 1) over slimgrad's rows."""

    model: str
    num_plans: int
    worst_peak: float
    median_time: float | None
    worst_time: float | None


def duels(rows: Sequence[Row]) -> list[Duel]:
    """A duel for each peer of one model that was measured; the first row is plain training's."""
    named = {row.contender: row for row in rows}
    found: list[Duel] = []
    for row in rows:
        peer_bytes = row.peak_like(rows[0])
        if row.kind != "peer" or peer_bytes is None or row.error is not None:
            continue
        slim = named.get(f"slimgrad@{row.contender}")
        if slim is None:
            found.append(Duel(row.model, row.contender, peer_bytes, None, None, "not planned"))
            continue
        ratio = slim.time_s / row.time_s if slim.time_s and row.time_s and not slim.error else None
        peak = None if slim.error else slim.peak_bytes
        found.append(Duel(row.model, row.contender, peer_bytes, peak, ratio, slim.error or ""))
    return found


def prediction(rows: Sequence[Row]) -> Prediction | None:
    """The errors of prediction on one model; None where no plan was measured."""
    plans = [r for r in rows if r.kind in ("slimgrad", "approximate") and r.error is None]
    peaks = [
        r.peak_bytes / r.predicted_peak_bytes - 1
        for r in plans
        if r.peak_bytes and r.predicted_peak_bytes
    ]
    times = [
        r.time_ratio / r.predicted_time_ratio - 1
        for r in plans
        if r.time_ratio and r.predicted_time_ratio
    ]
    if not peaks:
        return None
    return Prediction(
        rows[0].model,
        len(peaks),
        max(peaks, key=abs),
        median(times) if times else None,
        max(times, key=abs) if times else None,
    )
