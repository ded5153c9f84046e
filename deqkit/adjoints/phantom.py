"""L4. The phantom gradient: differentiate a few damped steps taken from the fixed point.

    y_0 = x*,   y_{j+1} = (1 - damping) f(y_j) + damping y_j,   dL/dtheta ~ dL/dx* dy_k/dtheta

Source: Geng et al., "On Training Implicit Models", NeurIPS 2021, arXiv 2111.05177 (unrolled form, eq. 8-9; their lambda
is 1 - damping). The value stays x*; the graph holds k evaluations of f.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deqkit.adjoints.base import Adjoint, Evaluation, Problem, straight_through
from deqkit.adjoints.once import constant_below
from deqkit.solvers.base import require_float, require_int
from deqkit.state import Blocks


@dataclass(frozen=True)
class PhantomAdjoint(Adjoint):
    """Approximate gradients from k damped steps at the fixed point.

    Args:
        num_steps: k, steps that are differentiated; memory and time grow with it.
        damping: weight of the old point in each step, in [0, 1).

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "phantom"
    has_levels: ClassVar[bool] = True
    num_steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        require_int(self, "num_steps", minimum=1)
        require_float(self, "damping", 0.0, 1.0)

    @property
    def traceable(self) -> bool:
        """Always."""
        return True

    def attach(self, problem: Problem, x: Blocks) -> Blocks:
        """``x`` with an approximate gradient."""
        if torch.compiler.is_compiling():  # which traces no walk along a graph
            y = self._step(x, problem.f(x))
        else:
            at = Evaluation.of(problem.f, constant_below(x))
            if not at.dependencies.any:
                return x
            y = self._step(at.x, at.fx)
        for _ in range(self.num_steps - 1):
            y = self._step(y, problem.f(y))
        return straight_through(x, y)

    def _step(self, y: Blocks, fy: Blocks) -> Blocks:
        return tuple(torch.lerp(a, b, self.damping) for a, b in zip(fy, y, strict=True))
