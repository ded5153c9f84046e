"""L0. The small linear systems of the quasi-Newton solvers, one per sample.

A system that gains a row and a column at every step is not factorised again each time. Its inverse is kept as a product
that grows by bordering (Faddeev & Faddeeva, "Computational Methods of Linear Algebra", 1963, sec. 19): with

    M' = [[M, c], [r^T, d]],   u = M^-1 c,   v = M^-T r,   s = d - r^T u

it is M'^-1 = [[M^-1, 0], [0, 0]] + (-u, 1) (-v, 1)^T / s, a sum of one such term per step. There is no pivoting, and a
row that depends on the others is left out instead: s is then zero but for rounding.

ONNX has no linear solver among its operators. While a graph is exported to it, the systems are solved by Gauss-Jordan
elimination, column by column in elementary operations,

    row_j <- row_j / a_jj,   row_i <- row_i - a_ij row_j   (i != j)

with row exchanges (partial pivoting) where the matrix is general, and without where it is to be positive definite: then
the pivots are those of its Cholesky factors, and none may be negative or zero (Golub & Van Loan, "Matrix Computations",
4th ed., sec. 3.4 and 4.2).

Legend: B samples, n unknowns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deqkit import arrays, linalg
from deqkit.arrays import Array


class BorderedInverse:
    """M^-1 of systems that grow, for use without gradients; on the host or on the device, as it is given them.

    Args:
        positive_definite: whether the systems are to be symmetric and positive definite.
        resolution: relative precision of their entries.
        limit: the largest n there will be.
    """

    def __init__(self, *, positive_definite: bool, resolution: float, limit: int) -> None:
        self.positive_definite, self.resolution, self.limit = positive_definite, resolution, limit
        self.count = 0  # n
        self._right: Array  # rows (-u, 1), over sqrt(s) where positive definite, (B, at least n, at least n)
        self._left: Array  # rows (-v, 1) / s; the same where positive definite

    def append(self, row: Array, column: Array) -> Array:
        """Border the systems.

        Args:
            row: the last row of M', (B, n + 1); not looked at where it is the column.
            column: its last column, (B, n + 1).

        Returns:
            Which were bordered (B,). The others got a row and a column of the identity, and what is appended later is
            to be zero there.
        """
        n = self.count
        c, corner = column[:, :n], column[:, n]
        u = v = c
        pivot, size = corner, abs(corner)
        if n:
            u = self.solve(c)
            r, v = (c, u) if self.positive_definite else (row[:, :n], self._solve_transposed(row[:, :n]))
            along = arrays.rows_dot(r, u)
            pivot, size = corner - along, size + abs(along)
        good = ((pivot if self.positive_definite else abs(pivot)) > self.resolution * size) & (size < math.inf)
        if not arrays.known_all(good):
            u, v = (arrays.where(good[:, None], b, 0.0) for b in (u, v))
            pivot = arrays.where(good, pivot, 1.0)
        per_pivot = (pivot**-0.5 if self.positive_definite else 1 / pivot)[:, None]
        self._make_room(column)
        self._left[:, n, :n] = -per_pivot * v
        self._left[:, n, n : n + 1] = per_pivot
        if not self.positive_definite:
            self._right[:, n, :n] = -u
            self._right[:, n, n] = 1.0
        self.count += 1
        return good

    def solve(self, right: Array) -> Array:
        """M^-1 times the right-hand sides (B, n)."""
        return self._product(right, self._left, self._right)

    def select(self, rows: Array) -> None:
        """Keep the systems with these indices alone."""
        if self.count:
            self._left = self._left[rows]
            self._right = self._left if self.positive_definite else self._right[rows]

    def _solve_transposed(self, right: Array) -> Array:
        return self._product(right, self._right, self._left)

    def _product(self, right: Array, first: Array, second: Array) -> Array:
        n = self.count
        weights = arrays.matmul(right[:, None], first[:, :n, :n].swapaxes(1, 2))
        return arrays.matmul(weights, second[:, :n, :n])[:, 0]

    def _make_room(self, like: Array) -> None:
        n = self.count
        if n == 0:
            self._left = self._right = arrays.zeros(like, like.shape[0], 0, 0)
        self._left = linalg.grown(self._left, n + 1, self.limit)
        self._right = self._left if self.positive_definite else linalg.grown(self._right, n + 1, self.limit)


def solve(matrix: Tensor, right: Tensor, *, positive_definite: bool) -> tuple[Tensor, Tensor]:
    """Solve a system per sample.

    Args:
        matrix: the systems, (B, n, n).
        right: the right-hand sides, (B, n).
        positive_definite: whether the matrices are to be symmetric and positive definite; one that is not counts as
            unsolvable.

    Returns:
        The solutions, (B, n), and a status, (B,), which is 0 where there is one.
    """
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        return _eliminate(matrix, right, exchange=not positive_definite)
    if positive_definite:
        factor, info = torch.linalg.cholesky_ex(matrix)
        return torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2), info
    solution, info = torch.linalg.solve_ex(matrix, right.unsqueeze(2))
    return solution.squeeze(2), info


def _eliminate(matrix: Tensor, right: Tensor, *, exchange: bool) -> tuple[Tensor, Tensor]:
    n = matrix.shape[1]
    rows = torch.cat([matrix, right.unsqueeze(2)], dim=2)
    index = torch.arange(n, device=matrix.device)
    failed = torch.zeros_like(right[:, 0], dtype=torch.bool)
    for j in range(n):
        if exchange:
            size = torch.where(index < j, -1.0, rows[:, :, j].abs())  # (B, n)
            pivot = size.argmax(dim=1, keepdim=True)
            order = torch.where(index == j, pivot, torch.where(index == pivot, j, index))
            rows = rows.gather(1, order.unsqueeze(2).expand(-1, -1, n + 1))
        head = rows[:, j, j]
        failed = failed | ((head == 0) if exchange else ~(head > 0))
        row = (rows[:, j] / torch.where(failed, 1.0, head).unsqueeze(1)).unsqueeze(1)
        rows = torch.where((index == j).reshape(1, n, 1), row, rows - rows[:, :, j : j + 1] * row)
    return rows[:, :, n], failed.to(torch.int32)
