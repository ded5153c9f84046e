"""L2. Anderson acceleration, in its difference form.

With r_k = f(x_k) - x_k and the last m differences dx_i = x_{i+1} - x_i, dr_i = r_{i+1} - r_i, type II is

    gamma = argmin | r_k - sum_i gamma_i dr_i |^2
    x_{k+1} = x_k + beta r_k - sum_i gamma_i (dx_i + beta dr_i)

and type I asks instead that r_k - sum_i gamma_i dr_i be orthogonal to all dx_i.

Source: Walker & Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49 (2011), eq. 2.4;
Fang & Saad, "Two classes of multisecant methods", Numer. Linear Algebra Appl. 16 (2009). Deviations: see
`deqkit.solvers.multisecant`, which computes the steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deqkit.solvers.base import Solver, require_float, require_int
from deqkit.solvers.inverse_jacobian import InverseJacobian
from deqkit.solvers.multisecant import Formula, MultisecantState


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration.

    Args:
        history: m, how many past differences are combined.
        mixing: beta, the weight of the residual in the new point, in (0, 1].
        ridge: regularisation of the small system relative to its trace; None takes the precision of the working dtype.
        restart_factor: a sample forgets its history when its distance from the tolerance exceeds this multiple of its
            best one.
        type: 2 minimises the residual. 1 is the projection; it is less robust, and can be faster where f is close to
            symmetric.
        check_every: see `Solver`.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "anderson"
    record: ClassVar[type | None] = InverseJacobian
    history: int = 100
    mixing: float = 1.0
    ridge: float | None = None
    restart_factor: float = 10.0
    type: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int(self, "history", minimum=1)
        require_float(self, "mixing", 0.0, 1.0, ends="(]")
        if self.ridge is not None:
            require_float(self, "ridge", 0.0, float("inf"))
        require_float(self, "restart_factor", 1.0, float("inf"), ends="[]")
        if self.type not in (1, 2):
            raise ValueError(f"Anderson: type must be 1 or 2, got {self.type!r}")

    def start(self) -> MultisecantState:
        """A fresh state for one solve."""
        return MultisecantState(self._formula)

    def start_recording(self) -> MultisecantState:
        """A state that keeps each sample's inverse Jacobian as it was when the sample ended."""
        return MultisecantState(self._formula, recording=True)

    @property
    def _formula(self) -> Formula:
        left = "Y" if self.type == 2 else "S"
        return Formula(left, False, self.history, self.mixing, self.ridge, self.restart_factor)
