"""L2. Fixed-point iteration, plain or damped.

    x_{k+1} = (1 - damping) f(x_k) + damping x_k

It converges when the spectral radius of (1 - damping) J + damping I is below 1; damping helps where J has eigenvalues
with a large negative real part. Reported residuals are those of f, not of the damped map (Kelley, "Iterative Methods
for Linear and Nonlinear Equations", SIAM 1995, ch. 4).

With ``adaptive``, every sample has a damping of its own: the weight of f(x), 1 - damping, is halved when the residual
has grown in a step, and raised by a tenth, up to where it started, when it has fallen. The rule is ours; it is the
multiplicative form of the step-size control that line searches use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deqkit.solvers.base import Point, Solver, SolverState, require_float
from deqkit.state import Blocks

_LOWER, _RAISE = 0.5, 1.1  # the weight's factor after a step in which the residual grew, or fell
_SMALLEST = 2.0**-10  # weight, relative to the one it starts from


@dataclass(frozen=True)
class FixedPointIteration(Solver):
    """Fixed-point (Picard) iteration.

    Args:
        damping: weight of the old point, in [0, 1).
        adaptive: damp a sample more while its residual grows, see above; for maps that expand, with eigenvalues whose
            real parts are below 1.
        check_every: see `Solver`.

    Raises:
        ValueError: damping out of range.
    """

    name: ClassVar[str] = "fixed_point"
    damping: float = 0.0
    adaptive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_float(self, "damping", 0.0, 1.0)
        if not isinstance(self.adaptive, bool):
            raise TypeError(f"FixedPointIteration: adaptive must be True or False, got {self.adaptive!r}")

    def start(self) -> SolverState:
        """A fresh state for one solve."""
        return _Adaptive(1 - self.damping) if self.adaptive else _Constant(self.damping)


@dataclass
class _Constant:
    damping: float

    def step(self, point: Point) -> Blocks:
        if self.damping == 0:
            # A copy: f may hand out the same buffer again, or a tensor of the caller's.
            return tuple(fx.clone() for fx in point.fx)
        return tuple(fx.sub(r, alpha=self.damping) for fx, r in zip(point.fx, point.r, strict=True))


class _Adaptive:
    """The weight of f(x) per sample, and the residual that it is judged by."""

    def __init__(self, largest: float) -> None:
        self.largest = largest
        self.weight: Tensor | None = None
        self.residual: Tensor

    def step(self, point: Point) -> Blocks:
        if self.weight is None:
            self.weight = torch.full_like(point.residual, self.largest)
        else:
            raised = (_RAISE * self.weight).clamp(max=self.largest)
            lowered = (_LOWER * self.weight).clamp(min=_SMALLEST * self.largest)
            self.weight = torch.where(point.residual > self.residual, lowered, raised)
        self.residual = point.residual
        weight = self.weight.to(point.x[0].dtype).unsqueeze(1)
        return tuple(torch.addcmul(x, r, weight) for x, r in zip(point.x, point.r, strict=True))
