"""Where tensors lie in one piece of memory: offsets from sizes and lifetimes, without fragmentation.

A tensor takes ``nbytes`` bytes at every instant ``t`` with ``birth <= t < death``. No two that are live at the same
instant may overlap; the highest end is the *arena*'s size. It is at least the live bytes of any instant, the bound
that every rule is compared with. The problem (dynamic storage allocation) is NP-hard: two greedy rules (Pisarchyk and
Lee, 2020), the better of them improved step by step, an integer programme for few tensors, and the same programme on two levels (MEMO, 2024) for many: first
inside each stretch of the step, then for the stretches' own arenas together with what outlives them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array

from slimgrad.integer_programs import at_most, solve

ALIGNMENT = 64  # bytes: a cache line, and what vector instructions ask for
_MOST_PAIRS = 1200  # of tensors that are live together, which an integer programme is given


@dataclass(frozen=True)
class Lifetimes:
    """Sizes in bytes, and first and past-the-end instants, one entry a tensor."""

    nbytes: np.ndarray
    birth: np.ndarray
    death: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.nbytes) == len(self.birth) == len(self.death):
            raise ValueError("expected one size, birth and death a tensor")
        if np.any(self.nbytes < 0) or np.any(self.death <= self.birth):
            raise ValueError("expected sizes of at least 0 and deaths after births")

    def __len__(self) -> int:
        return len(self.nbytes)

    def take(self, which: np.ndarray) -> Lifetimes:
        """Those at the positions (or under the mask) ``which``."""
        return Lifetimes(self.nbytes[which], self.birth[which], self.death[which])

    def aligned(self, alignment: int = ALIGNMENT) -> Lifetimes:
        """With sizes rounded up to multiples of ``alignment``."""
        return Lifetimes(-(-self.nbytes // alignment) * alignment, self.birth, self.death)

    def live_bytes(self) -> np.ndarray:
        """Bytes live at each instant from 0 on."""
        change = np.zeros(int(self.death.max(initial=0)) + 1, dtype=np.int64)
        np.add.at(change, self.birth, self.nbytes)
        np.add.at(change, self.death, -self.nbytes)
        return np.cumsum(change)

    @property
    def bound(self) -> int:
        """The most bytes live at any instant: no arena is smaller."""
        return int(self.live_bytes().max(initial=0))

    @property
    def total_bytes(self) -> int:
        """All sizes: the arena in which nothing is used twice."""
        return int(self.nbytes.sum())

    def meets(self, index: int) -> np.ndarray:
        """Which tensors are live at an instant at which ``index`` is."""
        return (self.birth < self.death[index]) & (self.birth[index] < self.death)


def size_of(lifetimes: Lifetimes, offsets: np.ndarray) -> int:
    """The arena's size, in bytes."""
    return int((offsets + lifetimes.nbytes).max(initial=0))


def overlapping(lifetimes: Lifetimes, offsets: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of tensors that would lie on one another while both are live: none of a sound layout."""
    found: list[tuple[int, int]] = []
    ends = offsets + lifetimes.nbytes
    for i in range(len(lifetimes)):
        both = lifetimes.meets(i) & (offsets < ends[i]) & (offsets[i] < ends)
        both &= lifetimes.nbytes > 0
        found += [(i, int(j)) for j in np.flatnonzero(both) if j > i and lifetimes.nbytes[i]]
    return found


def first_fit(lifetimes: Lifetimes) -> np.ndarray:
    """In order of birth, each at the lowest place that is free: what an allocator does that cannot look ahead."""
    return _placed(lifetimes, np.argsort(lifetimes.birth, kind="stable"), lowest=True)


def greedy_by_size(lifetimes: Lifetimes) -> np.ndarray:
    """The largest first, each into the smallest gap between those it meets that it fits in."""
    return _placed(lifetimes, np.lexsort((lifetimes.birth, -lifetimes.nbytes)))


def greedy_by_breadth(lifetimes: Lifetimes) -> np.ndarray:
    """The instants with the most live bytes first, and of each instant the largest tensors first."""
    live = lifetimes.live_bytes()
    order: list[int] = []
    is_left = np.ones(len(lifetimes), dtype=bool)
    for instant in np.argsort(-live, kind="stable"):
        here = np.flatnonzero(is_left & (lifetimes.birth <= instant) & (instant < lifetimes.death))
        order += here[np.argsort(-lifetimes.nbytes[here], kind="stable")].tolist()
        is_left[here] = False
        if not is_left.any():
            break
    return _placed(lifetimes, np.array(order, dtype=np.int64))


def _placed(lifetimes: Lifetimes, order: np.ndarray, *, lowest: bool = False) -> np.ndarray:
    """Place one tensor after the other into the smallest gap that it fits in, or the lowest."""
    offsets = np.zeros(len(lifetimes), dtype=np.int64)
    is_placed = np.zeros(len(lifetimes), dtype=bool)
    for index in order:
        others = np.flatnonzero(is_placed & lifetimes.meets(index))
        others = others[np.argsort(offsets[others], kind="stable")]
        ends = np.maximum.accumulate(
            np.concatenate(([0], offsets[others] + lifetimes.nbytes[others]))
        )
        gaps = offsets[others] - ends[:-1]
        fitting = np.flatnonzero(gaps >= lifetimes.nbytes[index])
        if not len(fitting):
            offsets[index] = ends[-1]
        else:
            best = fitting[0] if lowest else fitting[np.argmin(gaps[fitting])]
            offsets[index] = ends[best]
        is_placed[index] = True
    return offsets


def climbed(lifetimes: Lifetimes, *, tries: int = 60) -> np.ndarray:
    """By breadth, or by size with what lies on top of the arena placed earlier and earlier: the best of all tries."""
    order = np.lexsort((lifetimes.birth, -lifetimes.nbytes))
    best = greedy_by_breadth(lifetimes)
    bound = lifetimes.bound
    for _ in range(tries):
        offsets = _placed(lifetimes, order)
        if size_of(lifetimes, offsets) < size_of(lifetimes, best):
            best = offsets
        if size_of(lifetimes, best) == bound:
            break
        top = int(np.argmax(offsets + lifetimes.nbytes))
        place = int(np.flatnonzero(order == top)[0])
        order = np.insert(np.delete(order, place), place // 2, top)
    return best


def by_programme(lifetimes: Lifetimes, *, limit_s: float = 10.0) -> np.ndarray:
    """The smallest arena, by an integer programme; the best greedy one where that has found nothing smaller.

    Two tensors that meet get one bit: which of them lies lower. ``ValueError`` for too many pairs.
    """
    best = climbed(lifetimes)
    most = size_of(lifetimes, best)
    pairs = [
        (i, j)
        for i in range(len(lifetimes))
        for j in (np.flatnonzero(lifetimes.meets(i)[i + 1 :]) + i + 1).tolist()
        if lifetimes.nbytes[i] and lifetimes.nbytes[j]
    ]
    if len(pairs) > _MOST_PAIRS:
        raise ValueError(
            f"{len(pairs)} pairs of tensors meet, more than the {_MOST_PAIRS} of one programme: use by_stretches"
        )
    if most == lifetimes.bound or not pairs:
        return best
    found = _programme(lifetimes, pairs, most, limit_s)
    return best if found is None or size_of(lifetimes, found) >= most else found


def _programme(
    lifetimes: Lifetimes, pairs: Sequence[tuple[int, int]], most: int, limit_s: float
) -> np.ndarray | None:
    """Offsets in units of the arena's upper bound: all coefficients lie between 0 and 1."""
    n, m = len(lifetimes), len(pairs)
    sizes = lifetimes.nbytes / most
    first, second = np.array(pairs).T
    row, bit = np.arange(m), n + 1 + np.arange(m)
    ones = np.ones(m)
    # lower first: o_i + s_i <= o_j + 1 - z; lower second: o_j + s_j <= o_i + z
    a = _sparse((row, first, ones), (row, second, -ones), (row, bit, ones), shape=(m, n + 1 + m))
    b = _sparse((row, second, ones), (row, first, -ones), (row, bit, -ones), shape=(m, n + 1 + m))
    each, all_ = np.arange(n), np.full(n, n)
    top = _sparse((each, each, np.ones(n)), (each, all_, -np.ones(n)), shape=(n, n + 1 + m))
    cost = np.zeros(n + 1 + m)
    cost[n] = 1.0
    upper = np.ones(n + 1 + m)
    answer = solve(
        cost,
        [at_most(a, 1 - sizes[first]), at_most(b, -sizes[second]), at_most(top, -sizes)],
        is_integer=np.concatenate((np.zeros(n + 1), np.ones(m))).astype(int),
        upper=upper,
        gap=1e-6,
        limit_s=limit_s,
    )
    return None if answer is None else _pressed(lifetimes, answer[:n] * most)


def _sparse(
    *entries: tuple[np.ndarray, np.ndarray, np.ndarray], shape: tuple[int, int]
) -> coo_array:
    rows, columns, values = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    return coo_array((values, (rows, columns)), shape=shape)


def _pressed(lifetimes: Lifetimes, places: np.ndarray) -> np.ndarray:
    """Whole offsets in the order that ``places`` gives: each on top of the highest below it that it meets."""
    offsets = np.zeros(len(lifetimes), dtype=np.int64)
    done: list[int] = []
    for index in np.argsort(places, kind="stable"):
        meets = lifetimes.meets(index)
        under = [j for j in done if meets[j] and lifetimes.nbytes[j]]
        offsets[index] = max((offsets[j] + lifetimes.nbytes[j] for j in under), default=0)
        done.append(int(index))
    return offsets


def by_stretches(
    lifetimes: Lifetimes, borders: Sequence[int], *, limit_s: float = 10.0
) -> np.ndarray:
    """Two levels: what lives inside one stretch ``[borders[i], borders[i+1])`` is laid out alone, then all together.

    Equal stretches are laid out once. Each becomes one tensor as large as its arena, live throughout it.
    """
    edges = [-1, *borders, int(lifetimes.death.max(initial=0)) + 1]
    stretch = np.searchsorted(edges, lifetimes.birth, side="right") - 1
    ends = np.array(edges)[np.minimum(stretch + 1, len(edges) - 1)]
    is_inside = lifetimes.death <= ends
    offsets = np.zeros(len(lifetimes), dtype=np.int64)
    known: dict[tuple[bytes, ...], np.ndarray] = {}
    outer = [np.flatnonzero(~is_inside)]
    rows: list[tuple[int, int, int]] = []
    inner: list[np.ndarray] = []
    for number in np.unique(stretch[is_inside]).tolist():
        members = np.flatnonzero(is_inside & (stretch == number))
        part = lifetimes.take(members)
        key = (
            part.nbytes.tobytes(),
            (part.birth - part.birth.min()).tobytes(),
            (part.death - part.birth.min()).tobytes(),
        )
        if key not in known:
            known[key] = _best_of_few(part, limit_s)
        offsets[members] = known[key]
        rows.append((size_of(part, known[key]), int(part.birth.min()), int(part.death.max())))
        inner.append(members)
    sizes, births, deaths = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    whole = lifetimes.take(outer[0])
    whole = Lifetimes(
        np.concatenate((whole.nbytes, sizes)),
        np.concatenate((whole.birth, births)),
        np.concatenate((whole.death, deaths)),
    )
    placed = _best_of_few(whole, limit_s)
    offsets[outer[0]] = placed[: len(outer[0])]
    for members, base in zip(inner, placed[len(outer[0]) :].tolist(), strict=True):
        offsets[members] += base
    return offsets


def _best_of_few(lifetimes: Lifetimes, limit_s: float) -> np.ndarray:
    try:
        return by_programme(lifetimes, limit_s=limit_s)
    except ValueError:
        return climbed(lifetimes)


RULES: Mapping[str, Callable[[Lifetimes], np.ndarray]] = {
    "first fit": first_fit,
    "greedy by breadth": greedy_by_breadth,
    "greedy by size": greedy_by_size,
    "greedy, improved": climbed,
}


@dataclass(frozen=True)
class Arena:
    """One layout: the rule that made it, the offset of each tensor, and the arena's size in bytes."""

    rule: str
    offsets: np.ndarray
    nbytes: int


def layouts(
    lifetimes: Lifetimes, borders: Sequence[int] = (), *, limit_s: float = 10.0
) -> list[Arena]:
    """The layout of every rule, the smallest arena first; on two levels where ``borders`` are given."""
    made = {name: rule(lifetimes) for name, rule in RULES.items()}
    if borders:
        made["two levels"] = by_stretches(lifetimes, borders, limit_s=limit_s)
    arenas = [Arena(name, offsets, size_of(lifetimes, offsets)) for name, offsets in made.items()]
    return sorted(arenas, key=lambda arena: arena.nbytes)
