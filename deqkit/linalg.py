"""L0. The linear algebra that the quasi-Newton solvers share, batched over samples.

Legend: B samples, d numbers of a leaf, m (history) columns, n <= m columns in use.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
                scaling.write(block, column)
        return columns

    def select(self, rows: Tensor) -> None:
        """Keep the samples with these indices alone."""
        self._chunks = [tuple(buffer.index_select(0, rows) for buffer in chunk) for chunk in self._chunks]

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
        start = 0
        for chunk in self._chunks:
            end = start + chunk[0].shape[1]
            for new, old in zip(larger, chunk, strict=True):
                new[:, start:end] = old
            start = end
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
        return self._products(tuple(b.unsqueeze(1) for b in blocks)).squeeze(1)

    def dots(self, first: Blocks, second: Blocks) -> Tensor:
        """Inner products of every column with two vectors, shape (B, 2, n): the columns are read once."""
        return self._products(tuple(torch.stack(pair, dim=1) for pair in zip(first, second, strict=True)))

    def _products(self, rows: Blocks) -> Tensor:
        # Rows times a matrix: the other way round, bmm takes an order of magnitude longer on the CPU.
        parts = []
        for chunk in self._filled():
            products = [torch.bmm(b, h.transpose(1, 2)) for h, b in zip(chunk, rows, strict=True)]
            parts.append(products[0] if len(products) == 1 else sum(products[1:], start=products[0]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

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


def grown(matrix: Array, n: int, limit: int) -> Array:
    """The matrix (B, k, k) with room for n rows: itself, or twice as large, up to ``limit``, with zeros in the rest."""
    k = matrix.shape[1]
    if n <= k:
        return matrix
    size = min(limit, max(n, 2 * k))
    larger = arrays.zeros(matrix, matrix.shape[0], size, size)
    larger[:, :k, :k] = matrix
    return larger


def write_row(matrix: Array, slot: int, row: Array) -> Array:
    """The matrix (B, m, m) with its row ``slot`` replaced by ``row`` (B, n); a copy where gradients are enabled."""
    matrix = arrays.copy(matrix) if torch.is_grad_enabled() else matrix
    matrix[:, slot, : row.shape[1]] = row
    return matrix


def write_column(matrix: Array, slot: int, column: Array) -> Array:
    """The matrix (B, m, m) with its column ``slot`` replaced by ``column`` (B, n), as `write_row` does."""
    return write_row(matrix.swapaxes(1, 2), slot, column).swapaxes(1, 2)


def dot(a: Blocks, b: Blocks) -> Tensor:
    """Inner product of two states per sample, shape (B,)."""
    products = [torch.linalg.vecdot(x, y) for x, y in zip(a, b, strict=True)]
    return sum(products[1:], start=products[0])


# Norms whose squares a dtype holds with room to spare, so that nothing of weight under- or overflowed in their sum.
_SAFE_NORMS = {torch.float32: (1e-15, 1e18), torch.float64: (1e-140, 1e150)}


_RANGES = {dtype: (torch.finfo(dtype).tiny, torch.finfo(dtype).max) for dtype in _SAFE_NORMS}


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
    if arrays.free_to_look(device) and _all_safe(arrays.to_host(plain), dtype):
        return plain.to(wide)
    low, high = _SAFE_NORMS[dtype]
    unsafe = (plain < low) | (plain > high)
    exact = torch.stack([_exact_row_norm(x, wide) if x.shape[1] else x.sum(dim=1).to(wide) for x in matrices])
    return torch.where(unsafe, exact, plain.to(wide))


def row_sizes(matrices: tuple[Tensor, ...]) -> Array:
    """`row_norms` as constants, on the host where it is free to look at them."""
    if not arrays.free_to_look(matrices[0].device):
        return row_norms(matrices).detach()
    plain = np.array([arrays.to_host(torch.linalg.vector_norm(x, dim=1)) for x in matrices], np.float64)
    return plain if _all_safe(plain, matrices[0].dtype) else arrays.to_host(row_norms(matrices))


def _all_safe(norms: np.ndarray, dtype: torch.dtype) -> bool:
    low, high = _SAFE_NORMS[dtype]
    return bool(norms.size) and bool(low <= norms.min()) and bool(norms.max() <= high)  # not so where there is a NaN


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


def sizes(states: tuple[Blocks, ...]) -> Array:
    """`norms` as constants, on the host where it is free to look at them."""
    leaves = row_sizes(tuple(x for state in states for x in state))
    if len(leaves) == len(states):
        return leaves
    grouped = arrays.as_tensor(leaves, states[0][0]).reshape(len(states), -1, leaves.shape[1])
    return row_sizes(grouped.transpose(1, 2).unbind())


@dataclass(frozen=True)
class Scaling:
    """A factor per sample.

    Attributes:
        factor: (B, 1), zero where it would not be a usable number.
        good: where it is one, (B,); None where it is known to be one everywhere.
    """

    factor: Tensor
    good: Array | None

    def apply(self, x: Tensor) -> Tensor:
        """The matrix (B, d), scaled; zero where the factor is no good, even if the matrix is not finite there."""
        scaled = x * self.factor
        return scaled if self.good is None else scaled.masked_fill(self._bad(x), 0.0)

    def write(self, x: Tensor, out: Tensor) -> None:
        """`apply`, into a given place, without gradient."""
        torch.mul(x, self.factor, out=out)
        if self.good is not None:
            out.masked_fill_(self._bad(x), 0.0)

    def _bad(self, like: Tensor) -> Tensor:
        return ~arrays.as_tensor(self.good, like).unsqueeze(1)


def unit_scaling(a: Blocks, allowed: Array = None) -> Scaling:
    """What makes every sample a unit vector, as a constant; good where ``allowed`` (B,) and the factor is a number."""
    dtype = a[0].dtype
    size = sizes((a,))[0]
    if arrays.free_to_look(a[0].device):
        size = arrays.on_host(size)
    inverse = 1 / size
    tiny, huge = _RANGES[dtype]
    good = (inverse >= tiny) & (inverse <= huge)  # not so for size inf or NaN
    good = good if allowed is None else good & arrays.placed(allowed, good)
    if arrays.known_all(good):
        good = None
    else:
        inverse = arrays.where(good, inverse, 0.0)
    return Scaling(arrays.as_tensor(inverse[:, None], a[0]).to(dtype), good)


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
