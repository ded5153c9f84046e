"""L0. The linear algebra that the quasi-Newton solvers share, batched over samples.

Legend: B samples, d numbers of a leaf, m (history) columns, n <= m columns in use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deqkit.state import Blocks


class History:
    """The last m vectors of a state in a ring, as one (B, capacity, d) buffer per leaf.

    The buffers are allocated as the history fills, by doubling, up to m columns; then the oldest column is overwritten.
    With gradients enabled every write goes to a fresh copy, so that a solve can be differentiated through its steps.

    Args:
        size: m, the number of columns kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0  # vectors pushed so far
        self._buffers: list[Tensor] = []

    @property
    def num_columns(self) -> int:
        """n, the columns in use."""
        return min(self.count, self.size)

    @property
    def next_slot(self) -> int:
        """The column that the next push writes."""
        return self.count % self.size

    def push(self, blocks: Blocks) -> None:
        """Store one vector, of shape (B, d) per leaf, in `next_slot`."""
        slot = self.next_slot
        capacity = self._buffers[0].shape[1] if self._buffers else 0
        if slot >= capacity:
            self._grow(blocks, min(self.size, max(2, 2 * capacity)))
        elif torch.is_grad_enabled():
            self._buffers = [buffer.clone() for buffer in self._buffers]
        for buffer, block in zip(self._buffers, blocks, strict=True):
            buffer[:, slot] = block
        self.count += 1

    def _grow(self, blocks: Blocks, capacity: int) -> None:
        old = self._buffers
        self._buffers = [b.new_zeros(b.shape[0], capacity, b.shape[1]) for b in blocks]
        for buffer, previous in zip(self._buffers, old, strict=False):
            buffer[:, : previous.shape[1]] = previous

    def dot(self, blocks: Blocks) -> Tensor:
        """Inner product of every column with one vector, shape (B, n)."""
        n = self.num_columns
        # A row times a matrix: the other way round, bmm takes an order of magnitude longer on the CPU.
        products = [
            torch.bmm(b.unsqueeze(1), h[:, :n].transpose(1, 2)).squeeze(1)
            for h, b in zip(self._buffers, blocks, strict=True)
        ]
        return sum(products[1:], start=products[0])

    def subtract_combination(self, base: Blocks, coefficients: Tensor) -> Blocks:
        """``base`` minus the columns weighted by ``coefficients`` (B, n)."""
        n = self.num_columns
        weights = coefficients.to(base[0].dtype).unsqueeze(1)
        return tuple(
            torch.baddbmm(b.unsqueeze(1), weights, h[:, :n], alpha=-1).squeeze(1)
            for h, b in zip(self._buffers, base, strict=True)
        )


def grown(matrix: Tensor, n: int, limit: int) -> Tensor:
    """The matrix (B, k, k) with room for n rows: itself, or twice as large, up to ``limit``, with zeros in the rest."""
    k = matrix.shape[1]
    if n <= k:
        return matrix
    size = min(limit, max(n, 2 * k))
    larger = matrix.new_zeros(matrix.shape[0], size, size)
    larger[:, :k, :k] = matrix
    return larger


def write_row(matrix: Tensor, slot: int, row: Tensor) -> Tensor:
    """The matrix (B, m, m) with its row ``slot`` replaced by ``row`` (B, n); a copy where gradients are enabled."""
    matrix = matrix.clone() if torch.is_grad_enabled() else matrix
    matrix[:, slot, : row.shape[1]] = row
    return matrix


def write_column(matrix: Tensor, slot: int, column: Tensor) -> Tensor:
    """The matrix (B, m, m) with its column ``slot`` replaced by ``column`` (B, n), as `write_row` does."""
    return write_row(matrix.transpose(1, 2), slot, column).transpose(1, 2)


def dot(a: Blocks, b: Blocks) -> Tensor:
    """Inner product of two states per sample, shape (B,)."""
    products = [torch.linalg.vecdot(x, y) for x, y in zip(a, b, strict=True)]
    return sum(products[1:], start=products[0])


# Norms whose squares a dtype holds with room to spare, so that nothing of weight under- or overflowed in their sum.
_SAFE_NORMS = {torch.float32: (1e-15, 1e18), torch.float64: (1e-140, 1e150)}


def row_norm(x: Tensor) -> Tensor:
    """Euclidean norm of every row of a (B, d) matrix, shape (B,), in `small_dtype`; right for tiny and huge rows too.

    In the working dtype the squares of a tiny row vanish and those of a huge one overflow, and a residual that seems to
    be zero, or a scale that seems to be infinite, would pass for convergence. Such rows are computed once more, with
    room. All others keep the working dtype's sum, so that no row depends on its neighbours.
    """
    wide = small_dtype(x.device)
    if x.device.type != "cpu" and x.dtype != wide:  # bound by memory, so that the wider sum costs nothing
        return torch.linalg.vector_norm(x, dim=1, dtype=wide)
    plain = torch.linalg.vector_norm(x, dim=1)
    low, high = _SAFE_NORMS[x.dtype]
    unsafe = (plain < low) | (plain > high)
    may_look = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if x.shape[1] == 0 or (may_look and not bool(unsafe.any())):
        return plain.to(wide)
    exact = _scaled_row_norm(x) if x.dtype == wide else torch.linalg.vector_norm(x, dim=1, dtype=wide)
    return torch.where(unsafe, exact, plain.to(wide))


def _scaled_row_norm(x: Tensor) -> Tensor:
    largest = x.detach().abs().amax(dim=1)
    largest = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    return torch.linalg.vector_norm(x / largest.unsqueeze(1), dim=1) * largest


def norm(a: Blocks) -> Tensor:
    """Euclidean norm of a state per sample, shape (B,), in `small_dtype`."""
    norms = [row_norm(x) for x in a]
    return norms[0] if len(norms) == 1 else row_norm(torch.stack(norms, dim=1))


def inverse_size(size: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """1 / size (B,) in ``dtype``, and where that is a usable number; zero elsewhere."""
    inverse = (1 / size.masked_fill(size <= 0, 1.0)).to(dtype)
    good = (size > 0) & (inverse < torch.inf) & (inverse >= torch.finfo(dtype).tiny)  # not so for size inf or NaN
    return inverse.masked_fill(~good, 0.0), good


def scale(a: Blocks, factor: Tensor) -> Blocks:
    """Every sample times its factor (B,); a factor of zero gives zero even where the sample is not finite."""
    factor = factor.unsqueeze(1)
    drop = factor == 0
    return tuple((x * factor).masked_fill_(drop, 0.0) for x in a)


def where(mask: Tensor, a: Blocks, b: Blocks) -> Blocks:
    """Samples of ``a`` where ``mask`` (B,) holds, of ``b`` elsewhere."""
    return tuple(torch.where(mask.unsqueeze(1), x, y) for x, y in zip(a, b, strict=True))


def small_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the m by m systems: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
