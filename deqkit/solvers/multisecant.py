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
* One row and one column of the products are computed per step; the m by m system is solved in float64.
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

from deqkit import linalg
from deqkit.solvers.base import Point, Safeguard
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


class MultisecantState:
    """Last point, and the ring of scaled pairs with their products."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self.last: Point | None = None
        self.left = linalg.History(formula.history)  # W
        self.move = linalg.History(formula.history)  # S + beta Y
        self.left_left: Tensor  # W^T W, (B, m, m)
        self.left_move: Tensor  # W^T (S + beta Y), (B, m, m); of type I only
        self.safeguard: Safeguard

    def step(self, point: Point) -> Blocks:
        """The next point."""
        if self.last is None:
            self._allocate(point)
        else:
            self.safeguard.restart(point.distance)
            self._remember(point, self.last)
        self.last = point
        plain = self._plain(point)
        if self.left.count == 0:
            return plain
        return self.move.subtract_combination(plain, self._coefficients(point))

    def _plain(self, point: Point) -> Blocks:
        beta = self.formula.mixing
        if beta == 1:  # a copy: f may hand out the same buffer again, or a tensor of the caller's
            return tuple(fx.clone() for fx in point.fx)
        return tuple(x.add(r, alpha=beta) for x, r in zip(point.x, point.r, strict=True))

    def _allocate(self, point: Point) -> None:
        x = point.x[0]
        self.left_left = torch.zeros(x.shape[0], 0, 0, dtype=linalg.small_dtype(x.device), device=x.device)
        self.left_move = self.left_left
        self.safeguard = Safeguard(self.formula.restart_factor, point.distance)

    def _remember(self, point: Point, last: Point) -> None:
        beta, slot, dtype = self.formula.mixing, self.left.next_slot, self.left_left.dtype
        s = tuple(torch.sub(a, b) for a, b in zip(point.x, last.x, strict=True))
        y = tuple(torch.sub(a, b) for a, b in zip(point.r, last.r, strict=True))
        move = tuple(torch.add(a, b, alpha=beta) for a, b in zip(s, y, strict=True))
        left = s if self.formula.left == "S" else y
        factor, good = linalg.inverse_size(linalg.norm(left), left[0].dtype)
        good = good & torch.isfinite(point.residual)
        factor = torch.where(good, factor, 0.0)
        left, move = linalg.scale(left, factor), linalg.scale(move, factor)
        self.left.push(left)
        self.move.push(move)
        n, m = self.left.num_columns, self.formula.history
        products = self.left.dot(left).to(dtype)
        self.left_left = linalg.grown(self.left_left, n, m)
        self.left_left = linalg.write_column(linalg.write_row(self.left_left, slot, products), slot, products)
        if self.formula.left == "S":
            self.left_move = linalg.grown(self.left_move, n, m)
            row, column = self.move.dot(left).to(dtype), self.left.dot(move).to(dtype)
            self.left_move = linalg.write_column(linalg.write_row(self.left_move, slot, row), slot, column)
        self.safeguard.admit(slot, good)

    def _coefficients(self, point: Point) -> Tensor:
        """M^-1 W^T r, (B, n): zero for columns that are not usable, and for samples whose small system fails."""
        n = self.left.num_columns
        usable = self.safeguard.usable[:, :n]
        right = torch.where(usable, self.left.dot(point.r).to(self.left_left.dtype), 0.0)
        identity = torch.eye(n, dtype=right.dtype, device=right.device)
        ridge = self.formula.ridge
        if ridge is None:
            ridge = 10 * torch.finfo(point.x[0].dtype).eps
        both = usable.unsqueeze(1) & usable.unsqueeze(2)
        system = torch.where(both, self._system(n), identity) + ridge * identity
        if self._symmetric:
            factor, info = torch.linalg.cholesky_ex(system)
            gamma = torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)
        else:
            gamma, info = torch.linalg.solve_ex(system, right.unsqueeze(2))
            gamma = gamma.squeeze(2)
        good = (info == 0) & torch.isfinite(gamma).all(dim=1)
        return torch.where(good.unsqueeze(1), gamma, 0.0)

    @property
    def _symmetric(self) -> bool:
        return self.formula.left == "Y" and not self.formula.triangular

    def _system(self, n: int) -> Tensor:
        """M, (B, n, n)."""
        products = self.left_left[:, :n, :n]
        if self.formula.left == "Y":
            return torch.where(self._not_younger(n), products, 0.0) if self.formula.triangular else products
        # S^T Y = (S^T (S + beta Y) - S^T S) / beta
        secant = (self.left_move[:, :n, :n] - products) / self.formula.mixing
        return secant + torch.where(self._not_younger(n), 0.0, products) if self.formula.triangular else secant

    def _not_younger(self, n: int) -> Tensor:
        """(n, n): whether the pair in the row is as old as the one in the column, or older."""
        newest = (self.left.count - 1) % self.left.size
        age = (newest - torch.arange(n, device=self.left_left.device)) % self.left.size
        return age.unsqueeze(1) >= age.unsqueeze(0)
