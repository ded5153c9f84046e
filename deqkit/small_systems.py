"""L0. The small linear systems of the quasi-Newton solvers, one per sample.

ONNX has no linear solver among its operators. While a graph is exported to it, the systems are solved by Gauss-Jordan
elimination, column by column in elementary operations,

    row_j <- row_j / a_jj,   row_i <- row_i - a_ij row_j   (i != j)

with row exchanges (partial pivoting) where the matrix is general, and without where it is to be positive definite: then
the pivots are those of its Cholesky factors, and none may be negative or zero (Golub & Van Loan, "Matrix Computations",
4th ed., sec. 3.4 and 4.2).

Legend: B samples, n unknowns.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
