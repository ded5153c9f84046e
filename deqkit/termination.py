"""L1. When a sample is done, and when it is lost: a value of its own, passed to the loop.

A sample is done when |f(x) - x| <= atol + rtol |f(x)|. It is given up early

* as diverged, when its residual exceeds `divergence_factor` times |f(x0) - x0| + |f(x0)|, the scale of the problem at
  the start (so that a good starting point, whose first residual is tiny, is no ground for alarm);
* as diverged, too, when its patience runs out (see below) at a residual beyond the square root of that factor;
* as stagnated, when in the last `patience` steps the best distance from the tolerance has not shrunk by even
  `min_progress`;
* as stagnated, too, where another solver is waiting for it, when at the pace of the last `outlook` steps it would not
  get there in six times the steps that are left.

Where a norm tells several parts of the state apart, the part farthest from its tolerance speaks for the sample.

With rtol = atol = 0 there is nothing to reach: the solve runs a fixed number of steps, and only samples that are no
longer finite are given up.
"""

from __future__ import annotations

import math
import numbers
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch

from deqkit import arrays
from deqkit.arrays import Array

# Below any tolerance that means something, and above what makes an overflow of a residual of ordinary size.
_SMALLEST = {torch.float64: 1e-270, torch.float32: 1e-30, np.dtype("float64"): 1e-270, np.dtype("float32"): 1e-30}


@dataclass(frozen=True)
class Termination:
    """Tolerances and the limits of patience.

    Args:
        rtol: tolerated residual relative to |f(x)|.
        atol: tolerated residual, in the units of the state's norm.
        divergence_factor: growth of the residual beyond which a sample has diverged.
        patience: steps without progress after which a sample has stagnated.
        min_progress: relative fall of the best residual that counts as progress.
        outlook: steps over which the pace of a sample is judged; None: it is not given up for being slow.

    Raises:
        ValueError: a negative or non-finite tolerance.
    """

    rtol: float
    atol: float = 0.0
    divergence_factor: float = 1e8  # an expanding map may well leave a tiny start for a fixed point of ordinary size
    patience: int = 30
    min_progress: float = 1e-3
    outlook: int | None = None

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int | float | numbers.Real):
                raise TypeError(f"{name} must be a number, got {type(given).__name__}")
            value = float(given)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
            if type(given) not in (int, float):
                object.__setattr__(self, name, value)

    @property
    def fixed_steps(self) -> bool:
        """Whether the solve runs its full number of steps whatever the residual."""
        return self.rtol == 0 and self.atol == 0

    def measure(self, residuals: Array, scales: Array) -> tuple[Array, Array, Array]:
        """Residual, scale and `distance`, each (B,), of the part of each sample that is farthest from done.

        Args:
            residuals: of every part that counts by itself, (K, B).
            scales: likewise.
        """
        distances = self.distance(residuals, scales)
        if len(distances) == 1:
            return residuals[0], scales[0], distances[0]
        worst = distances.argmax(0), arrays.indices(distances[0])  # to which NaN is the largest of all
        return residuals[worst], scales[worst], distances[worst]

    def distance(self, residual: Array, scale: Array) -> Array:
        """How far from done: the residual in units of the tolerance, done at <= 1; not finite where anything is not.

        With fixed steps it is the relative residual, and done only at exactly 0.
        """
        tolerance = scale if self.fixed_steps else self.rtol * scale + self.atol
        # No residual is divided by zero, and none is small relative to an infinite scale.
        return residual / arrays.at_least(tolerance, _SMALLEST[residual.dtype]) + 0 * scale

    @property
    def target(self) -> float:
        """The `distance` at which a sample is done."""
        return 0.0 if self.fixed_steps else 1.0


def patience_for(max_steps: int, blind_steps: int = 0) -> int:
    """Steps without progress that a solve is granted.

    Args:
        max_steps: limit of its steps: who allows for many expects slow ones.
        blind_steps: the solver's, see `deqkit.solvers.base.Solver`.
    """
    return max(30, max_steps // 4, 2 * blind_steps)


def outlook_for(max_steps: int, blind_steps: int = 0) -> int:
    """Steps over which a sample's pace is judged, where another solver is waiting for it; see `patience_for`."""
    return max(10, max_steps // 8, 2 * blind_steps)


# What served best on the problems of benchmarks/problems.py, solved to 0.15 to 1e-5: 2 or 4 units of the precision cost
# more evaluations in the full one, half a unit is below what rounding lets f reach.
_ROUGH, _BRIEF = 1.0, 8


def roughly(termination: Termination, resolution: float, blind_steps: int = 0) -> Termination:
    """The rules of a solve that is to come as near as a precision allows, at little cost, for another to take over.

    Args:
        termination: the rules of the solve as a whole.
        resolution: relative spacing of that precision.
        blind_steps: the solver's, see `deqkit.solvers.base.Solver`.
    """
    rtol, patience = max(termination.rtol, _ROUGH * resolution), max(_BRIEF, 2 * blind_steps)
    return replace(termination, rtol=rtol, patience=patience)


_HASTE = 6  # how much quicker a sample may become than it is: accelerated solvers do, the closer they get


class Patience:
    """Per-sample memory of the divergence and stagnation tests; all arrays (B,)."""

    def __init__(self, termination: Termination, residual: Array, scale: Array) -> None:
        self.termination = termination
        self.start = residual + scale
        self.limit = termination.divergence_factor * self.start
        self.low_limit = math.sqrt(termination.divergence_factor) * self.start
        self.bests: deque[Array] = deque(maxlen=termination.patience + 1)  # distances, after every step

    def diverged(self, residual: Array) -> Array:
        """Which samples have left the scale of their start, however patient one is."""
        return residual > self.limit

    def record(self, best_distance: Array) -> None:
        """Enter the best distance so far."""
        self.bests.append(best_distance)

    @property
    def is_running_out(self) -> bool:
        """Whether enough has been recorded for a sample to have stagnated."""
        return len(self.bests) > self.termination.patience

    def stagnated(self) -> Array | None:
        """Which samples have made no progress; None before any could."""
        if not self.is_running_out:
            return None
        return self.bests[-1] > (1 - self.termination.min_progress) * self.bests[0]

    def hopeless(self, steps_left: Array) -> Array | None:
        """Which samples are too slow; None before any could be."""
        outlook = self.termination.outlook
        if outlook is None or len(self.bests) <= outlook:
            return None
        pace = arrays.log(self.bests[-1 - outlook] / self.bests[-1]) / outlook
        return arrays.log(self.bests[-1]) > _HASTE * pace * steps_left
