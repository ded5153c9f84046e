"""L2. What Anderson's and Broyden's methods have in common: a step corrected by the last m pairs of differences.

With r_k = f(x_k) - x_k, S = [dx_i], Y = [dr_i] of the last pairs, and a mixing beta, all of them take the step

    x_{k+1} = x_k + beta r_k - (S + beta Y) M^-1 W^T r_k

and differ in W and M alone. W = Y is the family of least squares ("type II"), W = S that of the secant equations
projected on the steps ("type I").

    Anderson, type II    W = Y    M = Y^T Y
    Anderson, type I     W = S    M = S^T Y
    Broyden, good        W = S    M = S^T Y + strict lower triangle (younger row, older column) of S^T S
    Broyden, bad         W = Y    M = upper triangle (older row, younger column, with diagonal) of Y^T Y

Source: Fang & Saad, "Two classes of multisecant methods for nonlinear acceleration", Numer. Linear Algebra Appl. 16
(2009); for Broyden's forms: Byrd, Nocedal & Schnabel, Math. Programming 63 (1994), sec. 7.

Deliberate deviations:
* Every pair is divided by the length of its vector in W before it is stored, which leaves the step as it is. M then has
  entries of order one, a ridge is relative to its trace, and old, large differences do not drown new, small ones.
* One row and one column of M are computed per step, when the pair is the newest: which of two pairs is the older
  never changes. The m by m system is solved in float64.
* Each sample has a safeguard of its own: a pair that is no use (nothing changed, or not finite) is skipped, a solve
  that fails falls back to the plain step, and a distance far above the best one seen clears that sample's history.
* Dropping the oldest pair leaves exactly the method that the remaining pairs define.

Legend: B samples, m history, n <= m columns in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deqkit import arrays, linalg, small_systems
from deqkit.arrays import Array
from deqkit.solvers.base import Point, Safeguard
from deqkit.solvers.inverse_jacobian import InverseJacobian
from deqkit.state import Blocks


@dataclass(frozen=True)
class Formula:
    """Which of the family.

    Attributes:
        left: W, "S" or "Y".
        triangular: the Broyden form of M instead of the Anderson form.
        history: m.
        mixing: beta.
        ridge: added to the diagonal of M, relative to the mean diagonal of W^T W; None for the working precision.
        restart_factor: see `deqkit.solvers.base.Safeguard`.
    """

    left: Literal["S", "Y"]
    triangular: bool
    history: int
    mixing: float
    ridge: float | None
    restart_factor: float


@dataclass(frozen=True)
class _Resting:
    """What one slot holds of samples that have ended, ``mask`` (B,)."""

    mask: Tensor
    left: Blocks
    move: Blocks
    row: Tensor  # of M, (B, n)
    column: Tensor
    good: Tensor  # whether the pair is usable, (B,)


class MultisecantState:
    """The last point, and the ring of scaled pairs with the small system that they make.

    A state that records leaves the pairs of samples that have ended as they are.
    """

    def __init__(self, formula: Formula, *, recording: bool = False) -> None:
        self.formula, self.recording = formula, recording
        self.last: Point | None = None
        self.last_plain: Blocks = ()
        self.left = linalg.History(formula.history)  # W
        self.move = linalg.History(formula.history)  # S + beta Y
        self.system: Tensor  # M, (B, m, m), with the ridge; zero between a pair that is usable and one that is not
        self.ridge: float
        self.safeguard: Safeguard

    def step(self, point: Point) -> Blocks:
        """The next point."""
        plain = self._plain(point)
        if self.last is None:
            self._allocate(point)
        else:
            self.safeguard.restart(point)
            self._remember(point, plain, self.last)
        self.last, self.last_plain = point, plain
        if self.left.count == 0:
            return plain
        return self.move.subtract_combination(plain, self._coefficients(point))

    def conclude(self, point: Point) -> InverseJacobian:
        """The inverse Jacobian, with the pair that ends at the last point."""
        if self.last is None:
            self._allocate(point)
        else:
            self.safeguard.restart(point)
            self._remember(point, self._plain(point), self.last)
        n, x = self.left.num_columns, point.x[0]
        usable = self.safeguard.usable
        if usable is None:
            usable = torch.ones(x.shape[0], n, dtype=torch.bool, device=x.device)
        mixing = torch.full((), self.formula.mixing, dtype=x.dtype, device=x.device)
        return InverseJacobian(self.left.columns(), self.move.columns(), self.system[:, :n, :n], usable, mixing)

    def _plain(self, point: Point) -> Blocks:
        """The step without history, x + beta r."""
        beta = self.formula.mixing
        if beta == 1:  # a copy: f may hand out the same buffer again, or a tensor of the caller's
            return tuple(fx.clone() for fx in point.fx)
        return tuple(x.add(r, alpha=beta) for x, r in zip(point.x, point.r, strict=True))

    def _allocate(self, point: Point) -> None:
        x = point.x[0]
        self.system = torch.zeros(x.shape[0], 0, 0, dtype=linalg.small_dtype(x.device), device=x.device)
        ridge = self.formula.ridge
        self.ridge = 10 * torch.finfo(x.dtype).eps if ridge is None else ridge
        self.safeguard = Safeguard(self.formula.restart_factor, x.shape[0], x.device)

    def _remember(self, point: Point, plain: Blocks, last: Point) -> None:
        slot = self.left.next_slot
        resting = self._resting(slot, point) if self.recording else None
        y = tuple(torch.sub(a, b) for a, b in zip(point.r, last.r, strict=True))
        move = tuple(torch.sub(a, b) for a, b in zip(plain, self.last_plain, strict=True))
        if self.formula.left == "Y":
            left, scaling = y, linalg.unit_scaling(y, point.active if self.recording else None)
        else:
            left = tuple(torch.sub(a, b) for a, b in zip(point.x, last.x, strict=True))
            finite = point.residual < torch.inf
            scaling = linalg.unit_scaling(left, finite & point.active if self.recording else finite)
        left = self.left.push(left, scaling)
        self.move.push(move, scaling)
        self.safeguard.admit(slot, scaling)
        self._extend_system(slot, left, y, scaling)
        if resting is not None:
            self._put_back(slot, resting)

    def _resting(self, slot: int, point: Point) -> _Resting | None:
        """What is in ``slot``, if it is about to be overwritten although it belongs to samples that have ended."""
        if slot == self.left.num_columns or arrays.known_all(point.measured.active):
            return None
        columns = tuple(tuple(b.clone() for b in history.column(slot)) for history in (self.left, self.move))
        n, usable = self.left.num_columns, self.safeguard.usable
        row, column = self.system[:, slot, :n].clone(), self.system[:, :n, slot].clone()
        good = torch.ones_like(point.active) if usable is None else usable[:, slot].clone()
        return _Resting(~point.active, columns[0], columns[1], row, column, good)

    def _put_back(self, slot: int, resting: _Resting) -> None:
        mask, n = resting.mask, self.left.num_columns
        for history, old in ((self.left, resting.left), (self.move, resting.move)):
            for now, then in zip(history.column(slot), old, strict=True):
                now.copy_(torch.where(mask.unsqueeze(1), then, now))
        row = torch.where(mask.unsqueeze(1), resting.row, self.system[:, slot, :n])
        column = torch.where(mask.unsqueeze(1), resting.column, self.system[:, :n, slot])
        self.system = linalg.write_column(linalg.write_row(self.system, slot, row), slot, column)
        if self.safeguard.usable is not None:
            self.safeguard.usable[:, slot] = torch.where(mask, resting.good, self.safeguard.usable[:, slot])

    def _extend_system(self, slot: int, left: Blocks, y: Blocks, scaling: linalg.Scaling) -> None:
        """Write the row and the column of M that belong to the newest pair."""
        formula, n, dtype = self.formula, self.left.num_columns, self.system.dtype
        if formula.left == "Y":
            column = self.left.dot(left).to(dtype)
            row = torch.zeros_like(column) if formula.triangular else column
        else:
            column = self.left.dot(y).to(dtype) * scaling.factor.unsqueeze(1)
            row = self.move.dot(left).to(dtype)  # s^T S + beta s^T Y: what Broyden's form asks for
            if not formula.triangular:
                row = (row - self.left.dot(left).to(dtype)) / formula.mixing
        if self.safeguard.usable is not None:
            pairs = self.safeguard.usable & scaling.good.unsqueeze(1)
            unit = torch.arange(n, device=column.device) == slot
            row, column = torch.where(pairs, row, 0.0), torch.where(pairs, column, unit.to(dtype))
        self.system = linalg.grown(self.system, n, formula.history)
        self.system = linalg.write_column(linalg.write_row(self.system, slot, row), slot, column)
        if self.ridge:
            self.system[:, slot, slot].add_(self.ridge)

    def _coefficients(self, point: Point) -> Tensor:
        """M^-1 W^T r, (B, n): zero for columns that are not usable, and for samples whose small system fails."""
        n = self.left.num_columns
        right = self.left.dot(point.r).to(self.system.dtype)
        if self.safeguard.usable is not None:
            right = torch.where(self.safeguard.usable, right, 0.0)
        return _where_solved(*small_systems.solve(self.system[:, :n, :n], right, positive_definite=self._symmetric))

    @property
    def _symmetric(self) -> bool:
        return self.formula.left == "Y" and not self.formula.triangular


def _where_solved(gamma: Tensor, info: Tensor) -> Tensor:
    """The solutions (B, n) of the small systems, and zero where there is none."""
    seen: tuple[Array, Array] = (gamma, info)
    if arrays.free_to_look(gamma.device):
        seen = arrays.to_host(gamma), arrays.to_host(info)
    solved = (seen[1] == 0) & (abs(seen[0]) < torch.inf).all(1)
    return gamma if arrays.known_all(solved) else torch.where(arrays.as_tensor(solved, gamma).unsqueeze(1), gamma, 0.0)
