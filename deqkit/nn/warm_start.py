"""L6. Better starting points than zeros: the fixed point that the same sample had last time, or a prediction.

Where f is well-behaved the answer does not depend on the starting point, only the number of steps does. A start at
distance e from x* instead of e0 saves about log(e0 / e) / log(1 / rate) steps of an iteration that converges with that
rate.

Sources: fixed points kept from epoch to epoch: Bai et al., "Deep Equilibrium Optical Flow Estimation", arXiv 2204.08442
(from frame to frame), and arXiv 2304.00600. Learned start: Pal, Edelman & Rackauckas, "Continuous Deep Equilibrium
Models", arXiv 2201.12240 (Skip DEQ): a second network predicts x* from the input, trained with

    loss = task loss + weight * |x0 - x*|

Deliberate deviations from that: x* is held constant, so that the auxiliary loss trains the prediction and nothing else;
the distance is squared, relative to that of a start at zero, and taken over converged samples only.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from deqkit.solution import Solution, Status
from deqkit.solvers.base import as_int
from deqkit.state import autocast_enabled


class _Entry(NamedTuple):
    leaves: tuple[Tensor, ...]
    spec: TreeSpec

    @property
    def num_bytes(self) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves)

    def fits(self, leaves: list[Tensor], spec: TreeSpec, batch_dims: int) -> bool:
        """Whether this is one sample of a state like ``leaves``."""
        return self.spec == spec and all(
            mine.shape == other.shape[batch_dims:] and mine.is_complex() == other.is_complex()
            for mine, other in zip(self.leaves, leaves, strict=True)
        )


class FixedPointCache:
    """The last fixed point of every sample of a data set, to start the next solve of that sample from.

        >>> cache = FixedPointCache()
        >>> for ids, inputs in batches:
        ...     x = layer(cache.start(ids, torch.zeros(len(ids), 8)), inputs)
        ...     cache.store(ids, layer.last_solution)

    Worth it where a sample returns with much the same input: small weight changes move its fixed point little, a random
    crop moves it far. In distributed training a sampler that shuffles hands a sample to another process in most epochs.

    Only points that can be trusted are stored: those of samples that converged, or, after a solve of a fixed number of
    steps, that are finite. Which ones that are the host has to look up: one synchronisation for each `store`.

    Args:
        max_samples: how many samples to keep; None for no limit of that kind. The samples not used for longest leave.
        max_bytes: how much memory their tensors may take; None likewise. 1 GiB by default.
        device: where to keep them: "cpu", another device, or "same" for that of the solution.
        dtype: what to keep floating-point leaves as, such as ``torch.float16`` for half of the memory; None for their
            own dtype. Complex ones stay as they are.

    Attributes:
        hits: samples that `start` has found so far.
        misses: samples that it has not.

    Raises:
        ValueError: a limit that is not positive.
        TypeError: a setting of the wrong type.
    """

    def __init__(
        self,
        max_samples: int | None = None,
        max_bytes: int | None = 2**30,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.max_samples, self.max_bytes = _limit("max_samples", max_samples), _limit("max_bytes", max_bytes)
        self.device = None if device == "same" else torch.device(device)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating dtype such as torch.float16, got {dtype!r}")
        self.dtype = dtype
        self.hits = self.misses = 0
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()  # by falling time since the last use
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """What the tensors kept take."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sample_id: Hashable) -> bool:
        return sample_id in self._entries

    def start(self, ids: Any, x0: Any) -> Any:
        """``x0``, with the fixed point that is known in place of every sample that there is one of.

        Args:
            ids: which samples these are: a tensor or array of integers of the batch shape, or a list of anything
                hashable for one batch dim; a single one for a state without batch dims.
            x0: where other samples start, a tensor or pytree of tensors (*batch, ...). A point of other shapes or
                structure than x0's is not used.

        Returns:
            A new state like x0, or x0 itself where no point is known. Points from the cache carry no gradient, those of
            x0 theirs.

        Raises:
            ValueError: ids and x0 disagree on the batch.
        """
        keys, batch = _keys(ids)
        leaves, spec = tree_flatten(x0)
        _check_batch(batch, leaves)
        found: list[tuple[int, _Entry]] = []
        with self._lock:
            for i, key in enumerate(keys):
                entry = self._entries.get(key)
                if entry is not None and entry.fits(leaves, spec, len(batch)):
                    self._entries.move_to_end(key)
                    found.append((i, entry))
            self.hits += len(found)
            self.misses += len(keys) - len(found)
        if not found:
            return x0
        rows = torch.tensor([i for i, _ in found])
        stored = ([entry.leaves[j] for _, entry in found] for j in range(len(leaves)))
        filled = [_filled(leaf, len(batch), rows, points) for leaf, points in zip(leaves, stored, strict=True)]
        return tree_unflatten(filled, spec)

    def store(self, ids: Any, solution: Solution) -> None:
        """Keep the fixed points of a solve.

        Args:
            ids: see `start`. Of a sample that occurs twice the later one is kept.
            solution: what the solve returned, or the layer's ``last_solution``.

        Raises:
            ValueError: ids and solution disagree on the batch, or one sample is larger than ``max_bytes``.
            TypeError: not a `Solution`.
        """
        if not isinstance(solution, Solution):
            raise TypeError(f"solution must be a deqkit.Solution, got {type(solution).__name__}")
        keys, batch = _keys(ids)
        leaves, spec = tree_flatten(solution.value)
        if batch != tuple(solution.status.shape):
            raise ValueError(f"ids of the batch shape {batch} do not fit a solve of {tuple(solution.status.shape)}")
        good = trustworthy(solution).reshape(-1)
        points: list[Tensor] = []
        for leaf in leaves:
            point = self._as_kept(leaf.detach().reshape(len(keys), *leaf.shape[len(batch) :]))
            finite = point.isfinite()  # the cast may have overflowed
            good = good & (finite.flatten(1).all(dim=1) if finite.dim() > 1 else finite)
            points.append(point)
        chosen = [i for i, is_good in enumerate(good.tolist()) if is_good]
        points = [point.to(self.device or point.device) for point in points]
        for i in chosen:
            # Copies: a view would keep the whole batch in memory.
            self._put(keys[i], _Entry(tuple(point[i].clone() for point in points), spec))

    def clear(self) -> None:
        """Forget everything, counts included."""
        with self._lock:
            self._entries.clear()
            self._num_bytes = self.hits = self.misses = 0

    def state_dict(self) -> dict[Hashable, Any]:
        """The points by sample id, the ones used last at the end; loads with ``weights_only=True`` for plain ids."""
        with self._lock:
            return {key: tree_unflatten(list(entry.leaves), entry.spec) for key, entry in self._entries.items()}

    def load_state_dict(self, state_dict: dict[Hashable, Any]) -> None:
        """Keep the points of another cache instead of one's own, as far as the limits allow."""
        self.clear()
        for key, point in state_dict.items():
            leaves, spec = tree_flatten(point)
            kept = (self._as_kept(leaf).to(self.device or leaf.device) for leaf in leaves)
            self._put(key, _Entry(tuple(leaf.clone() for leaf in kept), spec))

    def _as_kept(self, leaf: Tensor) -> Tensor:
        return leaf if self.dtype is None or leaf.is_complex() else leaf.to(self.dtype)

    def _put(self, key: Hashable, entry: _Entry) -> None:
        if self.max_bytes is not None and entry.num_bytes > self.max_bytes:
            raise ValueError(f"max_bytes={self.max_bytes} cannot hold one sample of {entry.num_bytes} bytes")
        with self._lock:
            before = self._entries.pop(key, None)
            self._num_bytes += entry.num_bytes - (before.num_bytes if before else 0)
            self._entries[key] = entry
            while self._is_full():
                self._num_bytes -= self._entries.popitem(last=False)[1].num_bytes

    def _is_full(self) -> bool:
        too_many = self.max_samples is not None and len(self._entries) > self.max_samples
        return too_many or (self.max_bytes is not None and self._num_bytes > self.max_bytes)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_entries": OrderedDict(self._entries)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        used = f"{len(self)} samples, {self.num_bytes / 2**20:.1f} MiB"
        return f"FixedPointCache({used}, {self.hits} hits, {self.misses} misses)"


class LearnedStart(nn.Module):
    """A starting point that is predicted from the input, by a module that learns where the fixed points are.

        >>> start = LearnedStart(torch.nn.Linear(8, 8))
        >>> x0 = start(inputs)
        >>> x = layer(x0, inputs)
        >>> loss = task_loss(x) + start.loss(x0, layer.last_solution)

    The task's own gradient does not reach the prediction, since x* does not depend on where the solve starts
    (``adjoint="unrolled"`` apart): hence a loss of its own. It trains this module and leaves the equilibrium alone.
    Unlike a cache it helps with inputs never seen before, as far as the module generalises.

    Args:
        module: called with whatever this is called with; returns x0, a tensor or pytree of tensors (*batch, ...).

    Raises:
        TypeError: not a module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The starting point; float32 where autocast made it less, since the dtype of x0 is that of the solve."""
        return tree_map(_full_precision, self.module(*args, **kwargs))

    def loss(self, x0: Any, solution: Solution) -> Tensor:
        """How far the starts were from the fixed points: |x0 - x*|^2 / |x*|^2, both summed over the samples.

        It is 1 for a start at zero; its root is the relative error that is left to the solver.

        Args:
            x0: what this module returned.
            solution: of the solve that started there, such as the layer's ``last_solution``. Samples whose point
                cannot be trusted (see `FixedPointCache`) are left out.

        Returns:
            A scalar, differentiable towards x0 only; 0 where no sample counts.

        Raises:
            ValueError: x0 and the solution's value differ in structure or shapes.
            TypeError: not a `Solution`.
        """
        if not isinstance(solution, Solution):
            raise TypeError(f"solution must be a deqkit.Solution, got {type(solution).__name__}")
        starts, spec = tree_flatten(x0)
        points, other_spec = tree_flatten(solution.value)
        if spec != other_spec or [a.shape for a in starts] != [b.shape for b in points]:
            raise ValueError("x0 must have the structure and the shapes of the solution's value")
        good, batch_dims = trustworthy(solution), solution.status.dim()
        distance = size = torch.zeros((), device=good.device)
        for a, b in zip(starts, points, strict=True):
            a, b = _reals(a), _reals(b.detach())
            # Before anything is computed: the gradient of what is left out must be 0, and not 0 times NaN.
            mask = good.reshape(*good.shape, *(1,) * (a.dim() - batch_dims))
            a, b = torch.where(mask, a, 0.0), torch.where(mask, b, 0.0)
            distance = distance + (a - b).square().sum()
            size = size + b.square().sum()
        return distance / size.clamp(min=torch.finfo(size.dtype).eps)


def trustworthy(solution: Solution) -> Tensor:
    """Which samples' points are what was asked for, bool, batch."""
    if solution.rtol or solution.atol:
        return solution.converged
    return solution.status != Status.NONFINITE


def _keys(ids: Any) -> tuple[list[Hashable], tuple[int, ...]]:
    """Sample ids one after the other, and their batch shape."""
    if isinstance(ids, list | tuple | range):
        return [key.item() if isinstance(key, Tensor) else key for key in ids], (len(ids),)
    if hasattr(ids, "tolist") and hasattr(ids, "shape"):  # a tensor or an array
        return ids.reshape(-1).tolist(), tuple(ids.shape)
    return [ids], ()


def _check_batch(batch: tuple[int, ...], leaves: list[Tensor]) -> None:
    for leaf in leaves:
        if tuple(leaf.shape[: len(batch)]) != batch:
            raise ValueError(f"ids of the batch shape {batch} do not fit a state of the shape {tuple(leaf.shape)}")


def _filled(leaf: Tensor, batch_dims: int, rows: Tensor, points: list[Tensor]) -> Tensor:
    """``leaf`` with ``points`` at ``rows`` of its flattened batch."""
    if len({point.device for point in points}) > 1:
        points = [point.to(leaf.device) for point in points]
    batch = torch.stack(points).to(leaf.device, leaf.dtype)
    flat = leaf.reshape(math.prod(leaf.shape[:batch_dims]), *leaf.shape[batch_dims:])
    return flat.index_copy(0, rows.to(leaf.device), batch).reshape(leaf.shape)


def _full_precision(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) and autocast_enabled(x.device) else x


def _reals(x: Tensor) -> Tensor:
    """As real numbers, of at least single precision."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _limit(name: str, value: int | None) -> int | None:
    if value is None:
        return None
    value = as_int(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
