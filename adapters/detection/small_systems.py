"""The small linear systems of Anderson's and Broyden's method in elementary operations, which ONNX has.

ONNX has no factorisations. Those of a solver are n x n with n at most its history, one per sample, so that loops over n
are short; they are written out when a program is translated.

Shapes: B samples, n unknowns, r right-hand sides.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["DECOMPOSITIONS"]


def cholesky_ex(matrix: Tensor, *, upper: bool = False, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """`torch.linalg.cholesky_ex` of (B, n, n): the lower factor, and where it failed a number above 0."""
    if upper or check_errors:
        raise NotImplementedError("the lower factor without errors alone")
    n = matrix.shape[-1]
    columns: list[Tensor] = []
    info = torch.zeros_like(matrix[:, 0, 0], dtype=torch.int32)
    for j in range(n):
        column = matrix[:, :, j]
        for known in columns:
            column = column - known * known[:, j : j + 1]
        pivot = column[:, j : j + 1]
        info = torch.where((info == 0) & ~(pivot[:, 0] > 0), j + 1, info)
        below = (torch.arange(n, device=matrix.device) >= j).to(matrix)
        columns.append(column / pivot.sqrt() * below)
    return torch.stack(columns, dim=2), info


def cholesky_solve(right: Tensor, factor: Tensor, upper: bool = False) -> Tensor:
    """`torch.cholesky_solve`: solves L L^T x = right, (B, n, r)."""
    if upper:
        raise NotImplementedError("the lower factor alone")
    forward: list[Tensor] = []
    for i in range(factor.shape[-1]):
        row = right[:, i]
        for j, known in enumerate(forward):
            row = row - factor[:, i, j : j + 1] * known
        forward.append(row / factor[:, i, i : i + 1])
    solved: list[Tensor] = []
    for i, row in reversed(list(enumerate(forward))):
        for step, known in enumerate(solved):
            j = factor.shape[-1] - 1 - step
            row = row - factor[:, j, i : i + 1] * known
        solved.append(row / factor[:, i, i : i + 1])
    return torch.stack(solved[::-1], dim=1)


def solve_ex(matrix: Tensor, right: Tensor, *, left: bool = True, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """`torch.linalg.solve_ex` of (B, n, n) and (B, n, r), by Gauss-Jordan elimination with partial pivoting."""
    if not left or check_errors or right.dim() != matrix.dim():
        raise NotImplementedError("systems A x = b with b of shape (B, n, r) alone")
    n = matrix.shape[-1]
    rows = torch.cat((matrix, right), dim=2)
    info = torch.zeros_like(matrix[:, 0, 0], dtype=torch.int32)
    index = torch.arange(n, device=matrix.device)
    for k in range(n):
        at = rows[:, k:, k].abs().argmax(1) + k
        order = torch.where(index == k, at[:, None], torch.where(index == at[:, None], k, index))
        rows = rows.gather(1, order[:, :, None].expand(-1, -1, rows.shape[2]))
        pivot = rows[:, k : k + 1]
        info = torch.where((info == 0) & (pivot[:, 0, k] == 0), k + 1, info)
        pivot = pivot / pivot[:, :, k : k + 1]
        factors = torch.where(index == k, 0.0, rows[:, :, k])[:, :, None]
        rows = torch.where((index == k)[:, None], pivot, rows - factors * pivot)
    return rows[:, :, n:], info


_ATEN = torch.ops.aten
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _ATEN.linalg_cholesky_ex.default: cholesky_ex,
    _ATEN.cholesky_solve.default: cholesky_solve,
    _ATEN.linalg_solve_ex.default: solve_ex,
}
"""For `ExportedProgram.run_decompositions`."""
