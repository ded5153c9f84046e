"""L2. Broyden's methods with limited memory.

They seek the root of F(x) = f(x) - x with an inverse Jacobian H, H_0 = -I (so the first step is the plain one):

    x_{k+1} = x_k - H_k F(x_k)
    good:  H_{k+1} = H_k + (dx - H_k dF) (dx^T H_k) / (dx^T H_k dF)
    bad:   H_{k+1} = H_k + (dx - H_k dF) dF^T / (dF^T dF)

Kept is not H but the last m pairs (dx_i, dF_i), S and Y. The updates that they make, oldest first, starting from -I,
have the compact forms

    good:  H = -I + (S + Y) (S^T Y + L)^-1 S^T,   L = strictly lower triangle (younger row, older column) of S^T S
    bad:   H = -I + (S + Y) U^-1 Y^T,             U = upper triangle (older row, younger column) of Y^T Y

which follow from the compact form of the direct update with the Sherman-Morrison-Woodbury identity, and by exchanging
the parts of dx and dF.

Source: Broyden, Math. Comp. 19 (1965); Byrd, Nocedal & Schnabel, "Representations of quasi-Newton matrices and their
use in limited memory methods", Math. Programming 63 (1994), sec. 7.

Deliberate deviations: dropping the oldest pair leaves exactly the matrix that the remaining updates define, so the
newest secant equation H dF = dx always holds. (Overwriting a slot of the usual product form breaks all of them.) For
the others see `deqkit.solvers.multisecant`, which computes the steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from deqkit.solvers.base import Solver, require_float, require_int
from deqkit.solvers.inverse_jacobian import InverseJacobian
from deqkit.solvers.line_search import LineSearchState
from deqkit.solvers.multisecant import Formula, MultisecantState


@dataclass(frozen=True)
class Broyden(Solver):
    """Limited-memory Broyden method.

    Args:
        history: m, how many past pairs define the inverse Jacobian.
        restart_factor: a sample forgets its history when its distance from the tolerance exceeds this multiple of its
            best one. Broyden's residuals rise on the way even where it converges, so this should not be small.
        variant: "good" or "bad", as Broyden called them. The bad one changes the inverse as little as possible, and not
            the Jacobian; it is not always worse.
        line_search: how many steps in a row a sample may take back because they raise its residual, see
            `deqkit.solvers.line_search`; 0 for no line search. Some four are worth it where whole steps overshoot,
            because the derivative of f(x) - x fades away from the solution. Elsewhere they may save calls of f or cost
            some. Each try is an evaluation of f and a step of the solve.
        check_every: see `Solver`.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "broyden"
    record: ClassVar[type | None] = InverseJacobian
    history: int = 100
    restart_factor: float = 1000.0
    variant: Literal["good", "bad"] = "good"
    line_search: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int(self, "history", minimum=1)
        require_float(self, "restart_factor", 1.0, float("inf"), ends="[]")
        if self.variant not in ("good", "bad"):
            raise ValueError(f"Broyden: variant must be 'good' or 'bad', got {self.variant!r}")
        require_int(self, "line_search", minimum=0)

    def start(self) -> MultisecantState:
        """A fresh state for one solve."""
        return self._state()

    def start_recording(self) -> MultisecantState:
        """A state that keeps each sample's inverse Jacobian as it was when the sample ended."""
        return self._state(recording=True)

    def _state(self, *, recording: bool = False) -> MultisecantState:
        left = "S" if self.variant == "good" else "Y"
        formula = Formula(left, True, self.history, 1.0, 0.0, self.restart_factor)
        if self.line_search:
            return LineSearchState(formula, self.line_search, recording=recording)
        return MultisecantState(formula, recording=recording)
