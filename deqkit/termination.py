"""L1. When a sample is done, and when it is lost: a value of its own, passed to the loop.

A sample is done when |f(x) - x| <= atol + rtol |f(x)|. It is given up early

* as diverged, when its residual exceeds `divergence_factor` times |f(x0) - x0| + |f(x0)|, the scale of the problem at
  the start (so that a good starting point, whose first residual is tiny, is no ground for alarm);
* as diverged, too, when its patience runs out (see below) at a residual beyond the square root of that factor;
* as stagnated, when for `patience` steps the best distance from the tolerance has not shrunk by even `min_progress`.

Where a norm tells several parts of the state apart, the part farthest from its tolerance speaks for the sample.

With rtol = atol = 0 there is nothing to reach: the solve runs a fixed number of steps, and only samples that are no
longer finite are given up.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Termination:
    """Tolerances and the limits of patience.

    Args:
        rtol: tolerated residual relative to |f(x)|.
        atol: tolerated residual, in the units of the state's norm.
        divergence_factor: growth of the residual beyond which a sample has diverged.
        patience: steps without progress after which a sample has stagnated.
        min_progress: relative fall of the best residual that counts as progress.

    Raises:
        ValueError: a negative or non-finite tolerance.
    """

    rtol: float
    atol: float = 0.0
    divergence_factor: float = 1e8  # an expanding map may well leave a tiny start for a fixed point of ordinary size
    patience: int = 30
    min_progress: float = 1e-3

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

    def measure(self, residuals: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residual, scale and `distance`, each (B,), of the part of each sample that is farthest from done.

        Args:
            residuals: of every part that counts by itself, (K, B).
            scales: likewise.
        """
        distances = self.distance(residuals, scales)
        if distances.shape[0] == 1:
            return residuals[0], scales[0], distances[0]
        worst = distances.argmax(dim=0, keepdim=True)  # to which NaN is the largest of all
        residual, scale, distance = (t.gather(0, worst).squeeze(0) for t in (residuals, scales, distances))
        return residual, scale, distance

    def distance(self, residual: Tensor, scale: Tensor) -> Tensor:
        """How far from done: the residual in units of the tolerance, done at <= 1; NaN where anything is not finite.

        With fixed steps it is the relative residual, and done only at exactly 0.
        """
        tolerance = scale if self.fixed_steps else self.atol + self.rtol * scale
        distance = (residual / tolerance).masked_fill(residual == 0, 0.0)
        # Any residual is small relative to an infinite scale. Neither is negative: NaN, too, fails this.
        return distance.masked_fill(~(residual + scale < torch.inf), torch.nan)

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


class Patience:
    """Per-sample memory of the divergence and stagnation tests; all tensors (B,)."""

    def __init__(self, termination: Termination, residual: Tensor, scale: Tensor) -> None:
        self.termination = termination
        self.start = residual + scale
        self.reference = torch.full_like(residual, torch.inf)
        self.idle_steps = torch.zeros_like(residual, dtype=torch.int32)

    def diverged(self, residual: Tensor, stagnated: Tensor) -> Tensor:
        """Which samples have left the scale of their start, by how far it takes for each."""
        factor = self.termination.divergence_factor
        return residual > torch.where(stagnated, math.sqrt(factor), factor) * self.start

    def stagnated(self, distance: Tensor) -> Tensor:
        """Record one more distance, and tell which samples have stopped making progress."""
        progress = distance < (1 - self.termination.min_progress) * self.reference
        self.reference = torch.where(progress, distance, self.reference)
        self.idle_steps = (self.idle_steps + 1).masked_fill(progress, 0)
        return self.idle_steps >= self.termination.patience
