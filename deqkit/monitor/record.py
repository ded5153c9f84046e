"""L6. What is known of one layer: its solves, their backward solves, and its spectral radius now and then."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from torch import Tensor

from deqkit.monitor.tally import Tally, Totals
from deqkit.solution import AdjointStats, Solution, Status

SOLVE, ADJOINT = "", "adjoint_"  # what there are figures of, as the prefix of their names

# Solves whose backward pass may still come. Those without one (in eval mode, without gradients) leave by and by.
_WAITING = 1024
_RADII = 1024
_COLLECT_EVERY = 64  # solves


@dataclass(frozen=True)
class Window:
    """The solves from one flush to the next, on the host.

    Attributes:
        totals: of the solves and of the adjoint solves, by prefix.
        radii: spectral radii measured, those of samples with a finite Jacobian.
    """

    totals: dict[str, Totals]
    radii: list[float]

    def figures(self) -> dict[str, float]:
        """Names and values for a logger; only what there is a measurement of."""
        named = {f"{kind}{name}": value for kind, part in self.totals.items() for name, value in part.figures().items()}
        if self.radii:
            named["spectral_radius_mean"] = sum(self.radii) / len(self.radii)
            named["spectral_radius_max"] = max(self.radii)
        return named


class Record:
    """Collects what a layer's solutions report.

    Attributes:
        num_solves: solves entered so far.
        totals: of all windows that have ended, by prefix.
    """

    def __init__(self) -> None:
        self.num_solves = 0
        self.totals = {SOLVE: Totals(), ADJOINT: Totals()}
        self._tallies = {SOLVE: Tally(), ADJOINT: Tally()}
        self._waiting: deque[AdjointStats] = deque(maxlen=_WAITING)
        self._radii: deque[Tensor] = deque(maxlen=_RADII)
        self._warned: dict[str, tuple[set[Status], int]] = {SOLVE: (set(), 0), ADJOINT: (set(), 0)}

    def add(self, solution: Solution) -> None:
        """Enter a solve, and its adjoint solve when there has been one."""
        self.num_solves += 1
        self._tallies[SOLVE].add(solution)
        self._waiting.append(solution.adjoint_stats)
        if self.num_solves % _COLLECT_EVERY == 0:
            self._collect_adjoints()

    def add_radius(self, radius: Tensor) -> None:
        """Enter spectral radii, of any shape."""
        self._radii.append(radius.detach().reshape(-1))

    def read(self) -> Window:
        """The window so far. The host waits for the device."""
        self._collect_adjoints()
        radii = [value for radius in self._radii for value in radius.tolist() if math.isfinite(value)]
        return Window({kind: tally.read() for kind, tally in self._tallies.items()}, radii)

    def end(self, window: Window) -> None:
        """Start a new window after this one, just read. Solves that wait for their backward pass go on waiting."""
        self.totals = self.totals_with(window)
        for tally in self._tallies.values():
            tally.reset()
        self._radii.clear()

    def totals_with(self, window: Window) -> dict[str, Totals]:
        """Of all windows that have ended and this one."""
        return {kind: self.totals[kind] + window.totals[kind] for kind in self.totals}

    def news(self, final: bool) -> list[str]:
        """Prefixes of what has failed in a way not reported yet; at the end: of what has failed more often since."""
        found = []
        for kind, totals in self.totals.items():
            known, reported = self._warned[kind]
            seen = set(totals.seen_failures())
            if seen - known or (final and totals.failed_solves > reported):
                self._warned[kind] = (known | seen, totals.failed_solves)
                found.append(kind)
        return found

    def _collect_adjoints(self) -> None:
        """Enter the adjoint solves that have taken place."""
        done = [stats for stats in self._waiting if stats.status is not None]
        if done:
            self._waiting = deque((stats for stats in self._waiting if stats.status is None), maxlen=_WAITING)
        for stats in done:
            self._tallies[ADJOINT].add(stats)
