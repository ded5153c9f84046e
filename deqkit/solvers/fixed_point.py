"""L2. Fixed-point iteration, plain or damped.

    x_{k+1} = (1 - damping) f(x_k) + damping x_k

It converges when the spectral radius of (1 - damping) J + damping I is below 1; damping helps where J has eigenvalues
with a large negative real part. Reported residuals are those of f, not of the damped map (Kelley, "Iterative Methods
for Linear and Nonlinear Equations", SIAM 1995, ch. 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deqkit.solvers.base import Point, Solver, require_float
from deqkit.state import Blocks


@dataclass(frozen=True)
class FixedPointIteration(Solver):
    """Fixed-point (Picard) iteration.

    Args:
        damping: weight of the old point, in [0, 1).
        check_every: see `Solver`.

    Raises:
        ValueError: damping out of range.
    """

    name: ClassVar[str] = "fixed_point"
    damping: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_float(self, "damping", 0.0, 1.0)

    def start(self) -> _State:
        """A fresh state for one solve."""
        return _State(self.damping)


@dataclass
class _State:
    damping: float

    def step(self, point: Point) -> Blocks:
        if self.damping == 0:
            # A copy: f may hand out the same buffer again, or a tensor of the caller's.
            return tuple(fx.clone() for fx in point.fx)
        return tuple(fx.sub(r, alpha=self.damping) for fx, r in zip(point.fx, point.r, strict=True))
