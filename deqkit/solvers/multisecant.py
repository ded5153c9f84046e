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
  never changes. The m by m system is kept in float64. For states of a lower precision its inverse grows with it until
  the oldest pair is dropped; otherwise it is factorised at every step.
* Each sample has a safeguard of its own: a pair that is no use (nothing changed, not finite, or dependent on the others
  but for rounding) is skipped, a solve that fails falls back to the plain step, and a distance far above the best one
  seen clears that sample's history.
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
from deqkit.rows import Rows
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

    mask: Array
    left: Blocks
    move: Blocks
    row: Array  # of M, (B, n)
    column: Array
    good: Array  # whether the pair is usable, (B,)


class MultisecantState:
    """The last point, and the ring of scaled pairs with the small system that they make.

    What is small is kept on the host where it is free to look and nothing is differentiated. A state that records
    leaves the pairs of samples that have ended as they are.
    """

    def __init__(self, formula: Formula, *, recording: bool = False) -> None:
        self.formula, self.recording = formula, recording
        self.last: Point | None = None
        self.last_plain: Blocks = ()
        self.left = linalg.History(formula.history)  # W
        self.move = linalg.History(formula.history)  # S + beta Y
        self.on_host: bool
        self.system: Array  # M, (B, m, m), with the ridge; zero between a pair that is usable and one that is not
        self.inverse: small_systems.BorderedInverse | None  # of M, until a pair is dropped
        self.ridge: float
        self.safeguard: Safeguard

    def step(self, point: Point) -> Blocks:
        """The next point."""
        plain = self._plain(point)
        last, self.last = self.last, point
        if last is None:
            self._allocate(point)
            self.last_plain = plain
            return plain
        self.safeguard.restart(point)
        right = self._remember(point, plain, last)
        self.last_plain = plain
        return self.move.subtract_combination(plain, self._coefficients(right, point.x[0]))

    def select(self, rows: Rows) -> None:
        """Go on with these samples alone."""
        if self.last is None:
            return
        self.last, self.last_plain = self.last.select(rows), rows.of_blocks(self.last_plain)
        for history in (self.left, self.move):
            history.select(rows.on_device)
        self.safeguard.select(rows)
        self.system = rows.of(self.system)
        if self.inverse is not None:
            self.inverse.select(rows.on_host if self.on_host else rows.on_device)

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
        system, usable = (arrays.as_tensor(a, x) for a in (self.system[:, :n, :n], usable))
        return InverseJacobian(self.left.columns(), self.move.columns(), system, usable, mixing)

    def _plain(self, point: Point) -> Blocks:
        """The step without history, x + beta r."""
        beta = self.formula.mixing
        if beta == 1:  # a copy: f may hand out the same buffer again, or a tensor of the caller's
            return tuple(fx.clone() for fx in point.fx)
        return tuple(x.add(r, alpha=beta) for x, r in zip(point.x, point.r, strict=True))

    def _allocate(self, point: Point) -> None:
        x, formula = point.x[0], self.formula
        self.on_host = arrays.free_to_look(x.device) and not torch.is_grad_enabled()
        samples = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        self.safeguard = Safeguard(formula.restart_factor, arrays.to_host(samples) if self.on_host else samples)
        self.system = self._small(x.new_zeros(x.shape[0], 0, 0))
        resolution = torch.finfo(x.dtype).eps
        self.ridge = 10 * resolution if formula.ridge is None else formula.ridge
        self.inverse = None
        # Its rounding errors, which no pivoting bounds, must be far below the precision of the entries.
        has_room = linalg.small_dtype(x.device) != x.dtype
        if has_room and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            self.inverse = small_systems.BorderedInverse(
                positive_definite=self._symmetric, resolution=resolution, limit=formula.history
            )

    def _small(self, values: Tensor) -> Array:
        """What goes into the small systems, in their precision and where they are kept."""
        values = values.to(linalg.small_dtype(values.device))
        return arrays.to_host(values) if self.on_host else values

    def _remember(self, point: Point, plain: Blocks, last: Point) -> Array:
        """Enter the pair from ``last`` to ``point``; returns W^T r of the latter, (B, n)."""
        slot = self.left.next_slot
        resting = self._resting(slot, point) if self.recording else None
        y = tuple(torch.sub(a, b) for a, b in zip(point.r, last.r, strict=True))
        move = tuple(torch.sub(a, b) for a, b in zip(plain, self.last_plain, strict=True))
        if self.formula.left == "Y":
            left, allowed = y, None
        else:
            left = tuple(torch.sub(a, b) for a, b in zip(point.x, last.x, strict=True))
            allowed = point.measured.residual < torch.inf
        if self.recording:
            active = point.measured.active
            allowed = active if allowed is None else allowed & active
        scaling = linalg.unit_scaling(left, allowed)
        left = self.left.push(left, scaling)
        self.move.push(move, scaling)
        self.safeguard.admit(slot, scaling.good)
        products = self._small(self.left.dots(left if self.formula.left == "Y" else y, point.r))
        self._extend_system(slot, left, products[:, 0], scaling)
        if resting is not None:
            self._put_back(slot, resting)
        return products[:, 1]

    def _resting(self, slot: int, point: Point) -> _Resting | None:
        """What is in ``slot``, if it is about to be overwritten although it belongs to samples that have ended."""
        if slot == self.left.num_columns or arrays.known_all(point.measured.active):
            return None
        columns = tuple(tuple(b.clone() for b in history.column(slot)) for history in (self.left, self.move))
        n, usable = self.left.num_columns, self.safeguard.usable
        row, column = arrays.copy(self.system[:, slot, :n]), arrays.copy(self.system[:, :n, slot])
        good = self.safeguard.all_samples if usable is None else arrays.copy(usable[:, slot])
        return _Resting(~arrays.placed(point.measured.active, good), columns[0], columns[1], row, column, good)

    def _put_back(self, slot: int, resting: _Resting) -> None:
        mask, n = resting.mask, self.left.num_columns
        rows = arrays.as_tensor(mask, resting.left[0]).unsqueeze(1)
        for history, old in ((self.left, resting.left), (self.move, resting.move)):
            for now, then in zip(history.column(slot), old, strict=True):
                now.copy_(torch.where(rows, then, now))
        row = arrays.where(mask[:, None], resting.row, self.system[:, slot, :n])
        column = arrays.where(mask[:, None], resting.column, self.system[:, :n, slot])
        self.system = linalg.write_column(linalg.write_row(self.system, slot, row), slot, column)
        if self.safeguard.usable is not None:
            self.safeguard.usable[:, slot] = arrays.where(mask, resting.good, self.safeguard.usable[:, slot])

    def _extend_system(self, slot: int, left: Blocks, column: Array, scaling: linalg.Scaling) -> None:
        """Write the row and the column of M that belong to the newest pair.

        Args:
            slot: its place.
            left: its vector in W.
            column: W^T times its residual difference, (B, n), scaled where that is the vector in W.
            scaling: of the pair.
        """
        formula, n = self.formula, self.left.num_columns
        if formula.left == "Y":
            row = 0 * column if formula.triangular else column
        else:
            column = column * self._small(scaling.factor)
            row = self._small(self.move.dot(left))  # s^T S + beta s^T Y: what Broyden's form asks for
            if not formula.triangular:
                row = (row - self._small(self.left.dot(left))) / formula.mixing
        if self.safeguard.usable is not None:
            row, column = _decoupled(self.safeguard.usable & self.safeguard.usable[:, slot, None], slot, row, column)
        if self.ridge:
            column = arrays.copy(column)
            column[:, slot] += self.ridge
        if self.left.count > formula.history:
            self.inverse = None
        if self.inverse is not None:
            good = self.inverse.append(row, column)
            if not arrays.known_all(good):
                self.safeguard.expel(slot, ~good)
                row, column = _decoupled(good[:, None], slot, row, column)
        self.system = linalg.grown(self.system, n, formula.history)
        self.system = linalg.write_column(linalg.write_row(self.system, slot, row), slot, column)

    def _coefficients(self, right: Array, like: Tensor) -> Tensor:
        """M^-1 W^T r, (B, n): zero for columns that are not usable, and for samples whose small system fails.

        Args:
            right: W^T r, (B, n).
            like: of the dtype of the state.
        """
        n = self.left.num_columns
        if self.safeguard.usable is not None:
            right = arrays.where(self.safeguard.usable, right, 0.0)
        if self.inverse is not None:
            gamma = _where_solved(self.inverse.solve(right))
        else:
            system, right = (arrays.as_tensor(a, like) for a in (self.system[:, :n, :n], right))
            gamma = _where_solved(*small_systems.solve(system, right, positive_definite=self._symmetric))
        return arrays.as_tensor(gamma, like).to(like.dtype)

    @property
    def _symmetric(self) -> bool:
        return self.formula.left == "Y" and not self.formula.triangular


def _decoupled(pairs: Array, slot: int, row: Array, column: Array) -> tuple[Array, Array]:
    """Row and column of M in ``slot``, those of the identity where ``pairs`` (B, n or 1) does not hold."""
    unit = arrays.indices(column[0]) == slot
    return arrays.where(pairs, row, 0.0), arrays.where(pairs, column, 1.0 * unit)


def _where_solved(gamma: Array, info: Array = None) -> Array:
    """The solutions (B, n) of the small systems, and zero where there is none: not finite, or a status but zero."""
    if isinstance(gamma, Tensor) and arrays.free_to_look(gamma.device) and not torch.is_grad_enabled():
        gamma, info = arrays.to_host(gamma), None if info is None else arrays.to_host(info)
    solved = abs(gamma) < torch.inf
    if info is not None:
        solved = solved & (info == 0)[:, None]
    return gamma if arrays.known_all(solved) else arrays.where(solved.all(1)[:, None], gamma, 0.0)
