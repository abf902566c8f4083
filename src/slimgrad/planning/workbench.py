"""The programmes of all schemes, solved best first: the fastest solution under a budget, or the leanest of all."""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np

from slimgrad.measuring.profile import Profile
from slimgrad.planning.bounds import least_live
from slimgrad.planning.menu import Menu
from slimgrad.planning.offers import Allowed, Option, Scheme, coding_limit_s, options
from slimgrad.planning.settings import gradients_stay, layout_of
from slimgrad.planning.simulate import Layout
from slimgrad.planning.solve import GAP, Programme, Solution


class Workbench:
    """Programmes of schemes; those of one traced variant share its layout and menu, those of like blocks their options."""

    def __init__(self, profile: Profile, allowed: Allowed) -> None:
        self.profile, self.allowed = profile, allowed
        self._layouts: dict[int, Layout] = {}
        self._menus: dict[tuple[int, float, bool], Menu] = {}
        self._first: dict[bytes, Layout] = {}  # of those whose blocks do the same
        self._offered: dict[tuple[bytes, float, bool], list[Option]] = {}
        self._least_live: dict[int, np.ndarray] = {}
        self._saved_s = 0.0  # what options that are faster than plain blocks take off a scheme

    def programme(self, scheme: Scheme) -> Programme:
        """A scheme with its menu, ready to be solved."""
        # what is offered hangs on when gradients go only where blocks may be compiled
        leaving = bool(self.profile.compiled) and not gradients_stay(scheme.record)
        key = (id(scheme.trace), scheme.repeats, leaving)
        if key not in self._menus:
            layout = self._layout(scheme)
            alike = layout.what_blocks_do.digest
            if self._first.setdefault(alike, layout) is not layout:
                layout.learns_from(self._first[alike])
            offered = (alike, scheme.repeats, leaving)
            if offered not in self._offered:
                self._offered[offered] = options(self.profile, scheme, layout, self.allowed)
            self._menus[key] = Menu(layout, self._offered[offered])
        menu = self._menus[key]
        self._saved_s = max(self._saved_s, menu.most_saved_s)
        return Programme(scheme, menu, self.allowed.planned_error, coding_limit_s(self.profile))

    def _layout(self, scheme: Scheme) -> Layout:
        key = id(scheme.trace)
        if key not in self._layouts:
            self._layouts[key] = layout_of(self.profile, scheme.trace)
        return self._layouts[key]

    def peak_bound(self, scheme: Scheme) -> float:
        """No choice for blocks has a lower peak; found without asking what is offered."""
        key, layout = id(scheme.trace), self._layout(scheme)
        if key not in self._least_live:
            compiles = self.allowed.compile and bool(self.profile.compiled)
            self._least_live[key] = least_live(layout, may_compile=compiles)
        fixed = layout.live(layout.model_changes(scheme.record))
        return float((self._least_live[key] + fixed).max())

    def fastest(self, found: list[Scheme], limit: int) -> Solution | None:
        """The fastest solution of all schemes that fits; best first, so that few are solved in whole choices."""
        best: Solution | None = None
        bound_s, programmes = np.inf, dict[int, Programme]()
        waiting = [(scheme.seconds, order) for order, scheme in enumerate(found)]
        while waiting:
            least_s, order = heapq.heappop(waiting)
            unknown_s = 0.0 if order in programmes else self._saved_s
            if best is not None and least_s - unknown_s >= best.seconds * (1 - GAP):
                bound_s = min(bound_s, least_s - unknown_s)
                continue
            if order not in programmes:
                if self.peak_bound(found[order]) > limit:
                    continue
                programmes[order] = self.programme(found[order])
                bound = programmes[order].relaxed_seconds(limit)
                if bound is not None:
                    heapq.heappush(waiting, (bound, order))
                continue
            bound_s = min(bound_s, least_s)
            solution = programmes[order].least_seconds(limit)
            if solution is not None and (best is None or solution.seconds < best.seconds):
                best = solution
        return best and replace(best, bound_s=min(bound_s, best.seconds))

    def leanest(self, found: list[Scheme]) -> Solution:
        """The solution with the lowest peak of all schemes, and a fast one of that peak."""
        best, programme = self._lowest(found)
        return programme.made_faster(best)

    def least_peak_bytes(self, found: list[Scheme]) -> int:
        """The lowest peak of all schemes, however long it takes."""
        return self._lowest(found)[0].peak_bytes

    def _lowest(self, found: list[Scheme]) -> tuple[Solution, Programme]:
        """The solution with the lowest peak, and its programme; best first, as above."""
        best: tuple[Solution, Programme] | None = None
        programmes = dict[int, Programme]()
        bounds = [self.peak_bound(scheme) * (1 - GAP) for scheme in found]  # as relaxed ones are
        waiting = [(bound, order) for order, bound in enumerate(bounds)]
        heapq.heapify(waiting)
        while waiting:
            least, order = heapq.heappop(waiting)
            if best is not None and least >= best[0].peak_bytes:
                break
            if order not in programmes:
                programmes[order] = self.programme(found[order])
                heapq.heappush(waiting, (programmes[order].relaxed_peak(), order))
                continue
            solution = programmes[order].lowest()
            if best is None or solution.peak_bytes < best[0].peak_bytes:
                best = solution, programmes[order]
        assert best is not None
        return best
