"""L0. The linear algebra that the quasi-Newton solvers share, batched over samples.

Legend: B samples, d numbers of a leaf, m (history) columns, n <= m columns in use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deqkit import arrays
from deqkit.arrays import Array
from deqkit.state import Blocks


class History:
    """The last m vectors of a state in a ring of columns, in a few buffers (B, capacity, d) per leaf.

    Buffers are allocated as the history fills, up to m columns in all; then the oldest column is overwritten. A small
    buffer is replaced by one twice as large, so that products run over few of them; beside a large one another is
    put, because to move it would take longer than the product. With gradients enabled every write goes to a fresh copy,
    so that a solve can be differentiated through its steps.

    Args:
        size: m, the number of columns kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0  # vectors pushed so far
        self._chunks: list[Blocks] = []

    @property
    def num_columns(self) -> int:
        """n, the columns in use."""
        return min(self.count, self.size)

    @property
    def next_slot(self) -> int:
        """The column that the next push writes."""
        return self.count % self.size

    @property
    def capacity(self) -> int:
        """The columns allocated."""
        return sum(chunk[0].shape[1] for chunk in self._chunks)

    def push(self, blocks: Blocks, scaling: Scaling | None = None) -> Blocks:
        """Store one vector, of shape (B, d) per leaf, scaled, in `next_slot`; returns what is stored there."""
        slot = self.next_slot
        if slot >= self.capacity:
            self._grow(blocks)
        self.count += 1
        if torch.is_grad_enabled():
            index, _ = self._place(slot)
            self._chunks[index] = tuple(buffer.clone() for buffer in self._chunks[index])
        columns = self.column(slot)
        for column, block in zip(columns, blocks, strict=True):
            if scaling is None:
                column.copy_(block)
            elif torch.is_grad_enabled() or torch.compiler.is_compiling():
                column.copy_(scaling.apply(block))
            else:
                torch.mul(block, scaling.factor.unsqueeze(1), out=column)
                if not scaling.all_good:
                    column.masked_fill_(~scaling.good.unsqueeze(1), 0.0)
        return columns

    def column(self, slot: int) -> Blocks:
        """One of the columns, (B, d) per leaf: views, which the next push may change."""
        index, slot = self._place(slot)
        return tuple(buffer[:, slot] for buffer in self._chunks[index])

    def columns(self) -> Blocks:
        """All columns in use, (B, n, d) per leaf; views where they lie in one buffer."""
        return tuple(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in self._by_leaf())

    def _by_leaf(self) -> list[tuple[Tensor, ...]]:
        return list(zip(*self._filled(), strict=True))

    def _place(self, slot: int) -> tuple[int, int]:
        """In which buffer a column lies, and where there."""
        index = 0
        while slot >= self._chunks[index][0].shape[1]:
            slot -= self._chunks[index][0].shape[1]
            index += 1
        return index, slot

    def _grow(self, blocks: Blocks) -> None:
        # A choice that depends on a symbolic batch size would bound the batches that an exported program takes.
        samples = blocks[0].shape[0] if isinstance(blocks[0].shape[0], int) else 1
        column = max(1, samples * sum(b.shape[1] * b.element_size() for b in blocks))  # bytes
        capacity = self.capacity
        # The size of a batch may not be known to an exported graph, and then decides nothing.
        small = torch.compiler.is_exporting() or capacity * column <= _SMALL_BUFFER
        if self._chunks and not small:
            more = min(self.size - capacity, capacity, max(2, _LARGE_BUFFER // column))
            self._chunks.append(tuple(b.new_empty(b.shape[0], more, b.shape[1]) for b in blocks))
            return
        larger = tuple(b.new_zeros(b.shape[0], min(self.size, max(2, 2 * capacity)), b.shape[1]) for b in blocks)
        for chunk in self._chunks:  # at most one
            for new, old in zip(larger, chunk, strict=True):
                new[:, :capacity] = old
        self._chunks = [larger]

    def _filled(self) -> list[Blocks]:
        """The columns in use, buffer by buffer."""
        filled, left = [], self.num_columns
        for chunk in self._chunks:
            n = min(left, chunk[0].shape[1])
            filled.append(tuple(buffer[:, :n] for buffer in chunk))
            left -= n
        return filled

    def dot(self, blocks: Blocks) -> Tensor:
        """Inner product of every column with one vector, shape (B, n)."""
        parts = [_row_products(chunk, blocks) for chunk in self._filled()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def subtract_combination(self, base: Blocks, coefficients: Tensor) -> Blocks:
        """``base`` minus the columns weighted by ``coefficients`` (B, n)."""
        weights = coefficients.to(base[0].dtype).unsqueeze(1)
        rows, start = tuple(b.unsqueeze(1) for b in base), 0
        for chunk in self._filled():
            end = start + chunk[0].shape[1]
            part = weights if end == weights.shape[2] and not start else weights[:, :, start:end]
            rows = tuple(torch.baddbmm(b, part, h, alpha=-1) for h, b in zip(chunk, rows, strict=True))
            start = end
        return tuple(b.squeeze(1) for b in rows)


_SMALL_BUFFER, _LARGE_BUFFER = 2**19, 2**22  # bytes


def _row_products(columns: Blocks, blocks: Blocks) -> Tensor:
    # A row times a matrix: the other way round, bmm takes an order of magnitude longer on the CPU.
    products = [torch.bmm(b.unsqueeze(1), h.transpose(1, 2)).squeeze(1) for h, b in zip(columns, blocks, strict=True)]
    return sum(products[1:], start=products[0])


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
    """Euclidean norm of every row of a (B, d) matrix, shape (B,): see `row_norms`."""
    return row_norms((x,))[0]


def row_norms(matrices: tuple[Tensor, ...]) -> Tensor:
    """Euclidean norms of every row of matrices (B, d), each with its own d, in `small_dtype`; (number of matrices, B).

    They are right for tiny and huge rows, too. In the working dtype the squares of a tiny row vanish and those of a
    huge one overflow, and a residual that seems to be zero, or a scale that seems to be infinite, would pass for
    convergence. Such rows are computed once more, with room. All others keep the working dtype's sum, so that no row
    depends on its neighbours.
    """
    device, dtype = matrices[0].device, matrices[0].dtype
    wide = small_dtype(device)
    if device.type != "cpu" and dtype != wide:  # bound by memory, so that the wider sum costs nothing
        return torch.stack([torch.linalg.vector_norm(x, dim=1, dtype=wide) for x in matrices])
    plain = torch.stack([torch.linalg.vector_norm(x, dim=1) for x in matrices])
    low, high = _SAFE_NORMS[dtype]
    if arrays.free_to_look(device) and plain.numel():
        smallest, largest = torch.aminmax(plain)
        if low <= smallest.item() and largest.item() <= high:
            return plain.to(wide)
    unsafe = (plain < low) | (plain > high)
    exact = torch.stack([_exact_row_norm(x, wide) if x.shape[1] else x.sum(dim=1).to(wide) for x in matrices])
    return torch.where(unsafe, exact, plain.to(wide))


def _exact_row_norm(x: Tensor, wide: torch.dtype) -> Tensor:
    return _scaled_row_norm(x) if x.dtype == wide else torch.linalg.vector_norm(x, dim=1, dtype=wide)


def _scaled_row_norm(x: Tensor) -> Tensor:
    largest = x.detach().abs().amax(dim=1)
    largest = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    return torch.linalg.vector_norm(x / largest.unsqueeze(1), dim=1) * largest


def norm(a: Blocks) -> Tensor:
    """Euclidean norm of a state per sample, shape (B,), in `small_dtype`."""
    return norms((a,))[0]


def norms(states: tuple[Blocks, ...]) -> Tensor:
    """Euclidean norm of several states per sample, shape (number of states, B), in `small_dtype`."""
    leaves = row_norms(tuple(x for state in states for x in state))
    if len(leaves) == len(states):
        return leaves
    return row_norms(leaves.reshape(len(states), -1, leaves.shape[1]).transpose(1, 2).unbind())


@dataclass(frozen=True)
class Scaling:
    """A factor per sample.

    Attributes:
        factor: (B,), zero where it would not be a usable number.
        good: where it is one, (B,).
        all_good: whether it is known to be one everywhere.
    """

    factor: Tensor
    good: Tensor
    all_good: bool

    def apply(self, x: Tensor) -> Tensor:
        """The matrix (B, d), scaled; zero where the factor is no good, even if the matrix is not finite there."""
        return (x * self.factor.unsqueeze(1)).masked_fill(~self.good.unsqueeze(1), 0.0)


def unit_scaling(a: Blocks, allowed: Array = None) -> Scaling:
    """What makes every sample a unit vector, as a constant; good where ``allowed`` (B,) and the factor is a number."""
    dtype = a[0].dtype
    with torch.no_grad(), arrays.quiet():
        size: Array = norm(a)
        if arrays.free_to_look(a[0].device):
            size = arrays.to_host(size)
            allowed = None if allowed is None else arrays.to_host(allowed)
        inverse = 1 / size
        good = (inverse >= torch.finfo(dtype).tiny) & (inverse <= torch.finfo(dtype).max)  # not so for size inf or NaN
        good = good if allowed is None else good & allowed
        all_good = arrays.known_all(good)
        inverse = inverse if all_good else arrays.where(good, inverse, 0.0)
        return Scaling(arrays.as_tensor(inverse, a[0]).to(dtype), arrays.as_tensor(good, a[0]), all_good)


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
