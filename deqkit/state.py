"""L0. A pytree of tensors seen as one batch of flat vectors, and back.

A state is any pytree of floating or complex tensors whose first ``batch_dims`` dimensions index independent samples.
The solvers see it as ``Blocks``: one real matrix (B, d) per leaf, all of one working dtype, so that they need no case
for structure, complex numbers or half precision:

* a complex leaf is viewed as pairs of reals, the convention in which PyTorch differentiates;
* a leaf of a lower precision than the working dtype (float16 or bfloat16, or float32 beside float64) is worked on in
  that, while every point handed to f is representable in the leaf's own dtype (see `StateLayout.round`), so that a
  residual belongs to exactly the point that the caller gets;
* the dimensions of a sample are laid out in the leaf's own memory order, so that a channels_last tensor reaches f as a
  channels_last view and not as a copy.

Legend: B number of samples (product of the batch dims), d numbers in one sample of a leaf, D their sum over leaves.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

from deqkit import levels
from deqkit.compiled import graphs_to_keep

Blocks = tuple[Tensor, ...]

_REAL_OF = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


@dataclass(frozen=True)
class _Leaf:
    """What is needed to turn one leaf into a (B, d) matrix and back."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    real_dtype: torch.dtype
    order: tuple[int, ...]  # dims in memory order, batch dims first
    inverse: tuple[int, ...]
    is_plain: bool  # whether that is the order of the dims
    permuted_shape: tuple[int, ...]
    width: int  # d
    is_direct: bool  # whether a block is the leaf under another shape

    def stacked(self, size: int) -> _Leaf:
        order, inverse = ((0, *(d + 1 for d in dims)) for dims in (self.order, self.inverse))
        shape, permuted_shape = torch.Size((size, *self.shape)), (size, *self.permuted_shape)
        return replace(self, shape=shape, order=order, inverse=inverse, permuted_shape=permuted_shape)

    def narrowed(self, size: int) -> _Leaf:
        shape, permuted_shape = torch.Size((size, *self.shape[1:])), (size, *self.permuted_shape[1:])
        return replace(self, shape=shape, permuted_shape=permuted_shape)


def _memory_order(x: Tensor, batch_dims: int) -> tuple[int, ...]:
    """Dims of x with the batch dims first and the others by falling stride."""
    rest = sorted(range(batch_dims, x.dim()), key=lambda d: -x.stride(d))
    return (*range(batch_dims), *rest)


class StateLayout:
    """How one particular pytree maps to `Blocks`.

    Args:
        x0: the pytree that fixes structure, shapes, dtypes and device.
        batch_dims: how many leading dims of every leaf index samples.

    Raises:
        TypeError: a leaf is no tensor or is neither floating nor complex.
        ValueError: no leaf at all, leaves that disagree on batch shape or device, too few dims.
    """

    def __init__(self, x0: Any, batch_dims: int) -> None:
        paths, self.treespec = tree_flatten_with_path(x0)
        if not paths:
            raise ValueError("x0 holds no tensor: the state to solve for is empty")
        self.batch_dims = batch_dims
        named = [(f"x0{keystr(path)}", leaf) for path, leaf in paths]
        for name, leaf in named:
            _check_initial_leaf(name, leaf, batch_dims)
        first_name, first = named[0]
        self.device = first.device
        self.batch_shape = first.shape[:batch_dims]
        for name, leaf in named[1:]:
            if leaf.shape[:batch_dims] != self.batch_shape:
                raise ValueError(
                    f"leaves disagree on the batch shape: {first_name} has {tuple(self.batch_shape)}, "
                    f"{name} has {tuple(leaf.shape[:batch_dims])} (batch_dims={batch_dims})"
                )
            if leaf.device != self.device:
                raise ValueError(
                    f"leaves lie on different devices: {first_name} on {self.device}, {name} on {leaf.device}"
                )
        self.num_samples = math.prod(self.batch_shape)
        reals = [_REAL_OF.get(leaf.dtype, leaf.dtype) for _, leaf in named]
        self.dtype = torch.float64 if torch.float64 in reals else torch.float32
        self.leaves = [self._leaf(name, leaf) for name, leaf in named]
        self.needs_rounding = any(leaf.real_dtype != self.dtype for leaf in self.leaves)

    def _leaf(self, name: str, x: Tensor) -> _Leaf:
        order = _memory_order(x, self.batch_dims)
        inverse = tuple(sorted(range(len(order)), key=order.__getitem__))
        permuted = tuple(x.shape[d] for d in order) + ((2,) if x.is_complex() else ())
        real, plain = _REAL_OF.get(x.dtype, x.dtype), order == tuple(range(len(order)))
        width, direct = math.prod(permuted[self.batch_dims :]), plain and x.dtype == self.dtype
        return _Leaf(name, x.shape, x.dtype, real, order, inverse, plain, permuted, width, direct)

    def of_blocks(self, blocks: Blocks) -> StateLayout:
        """A layout in which blocks of this one are themselves the states, of the same batch."""
        layout = StateLayout(blocks, batch_dims=1)
        layout.batch_shape = self.batch_shape
        return layout

    def stacked(self, size: int) -> StateLayout:
        """The layout of ``size`` such batches, along a new leading dim."""
        other = copy.copy(self)
        other.batch_dims, other.batch_shape = self.batch_dims + 1, torch.Size((size, *self.batch_shape))
        other.num_samples = size * self.num_samples
        other.leaves = [leaf.stacked(size) for leaf in self.leaves]
        return other

    def narrowed(self, size: int) -> StateLayout:
        """The layout of ``size`` such samples; of one batch dim."""
        other = copy.copy(self)
        other.batch_shape, other.num_samples = torch.Size((size,)), size
        other.leaves = [leaf.narrowed(size) for leaf in self.leaves]
        return other

    @property
    def resolution(self) -> float:
        """Relative spacing of the coarsest dtype among the leaves: no relative residual much below it can be had."""
        return max(torch.finfo(leaf.dtype).eps for leaf in self.leaves)

    def pack(self, tree: Any) -> Blocks:
        """The pytree as blocks: views where dtype and memory order allow it."""
        return self._pack(self._flatten(tree)[0])

    def _flatten(self, tree: Any) -> tuple[list[Any], TreeSpec]:
        if isinstance(tree, Tensor) and self.treespec.is_leaf():  # the common case, and on the way of every evaluation
            return [tree], self.treespec
        return tree_flatten(tree)

    def _pack(self, leaves: list[Tensor]) -> Blocks:
        return tuple(self._to_block(leaf, x) for leaf, x in zip(self.leaves, leaves, strict=True))

    def _to_block(self, leaf: _Leaf, x: Tensor) -> Tensor:
        if leaf.is_direct and x.dtype == self.dtype:
            return x.reshape(self.num_samples, leaf.width)
        if not leaf.is_plain:
            x = x.permute(leaf.order)
        if x.is_complex():
            x = torch.view_as_real(x.resolve_conj())
        return x.reshape(self.num_samples, leaf.width).to(self.dtype)

    def unpack(self, blocks: Blocks) -> Any:
        """The blocks as a pytree of x0's structure, shapes and dtypes: views wherever dtypes allow it."""
        leaves = [self._from_block(leaf, b) for leaf, b in zip(self.leaves, blocks, strict=True)]
        return leaves[0] if self.treespec.is_leaf() else tree_unflatten(leaves, self.treespec)

    def _from_block(self, leaf: _Leaf, block: Tensor) -> Tensor:
        if leaf.is_direct:
            return block.reshape(leaf.shape)
        x = block.to(leaf.real_dtype).reshape(leaf.permuted_shape)
        if leaf.dtype.is_complex:
            x = torch.view_as_complex(x.contiguous())
        return x if leaf.is_plain else x.permute(leaf.inverse)

    def round(self, blocks: Blocks) -> Blocks:
        """The nearest blocks that the leaves' own dtypes can represent."""
        if not self.needs_rounding:
            return blocks
        return tuple(b.to(leaf.real_dtype).to(self.dtype) for leaf, b in zip(self.leaves, blocks, strict=True))

    def pack_output(self, out: Any) -> Blocks:
        """What f returned, checked against the state and packed.

        Under autocast f may return a lower or higher precision than the state has; it is cast back.

        Raises:
            ValueError: another structure, shape or device than the state's.
            TypeError: a leaf that is no tensor, or of another dtype outside autocast.
        """
        leaves, spec = self._flatten(out)
        if spec is not self.treespec and spec != self.treespec:
            leaves = self._match(out, spec)
        for leaf, x in zip(self.leaves, leaves, strict=True):
            self._check_output_leaf(leaf, x)
        return self._pack(leaves)

    def _match(self, out: Any, spec: TreeSpec) -> list[Any]:
        """The leaves of ``out``, whose dicts may have their keys in another order than the state's."""
        try:
            leaves = self.treespec.flatten_up_to(out)
            if len(tree_leaves(leaves)) == len(leaves) == spec.num_leaves:
                return leaves
        except ValueError:
            pass
        raise ValueError(
            f"f must return the structure of x0: expected {_describe(self.treespec)}, got {_describe(spec)}"
        )

    def _check_output_leaf(self, leaf: _Leaf, x: Any) -> None:
        name = leaf.name.replace("x0", "f(x)", 1)
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.shape != leaf.shape:
            raise ValueError(
                f"f must keep the shape of the state: {name} has {tuple(x.shape)}, {leaf.name} {tuple(leaf.shape)}"
            )
        if x.device != self.device:
            raise ValueError(
                f"f must keep the device of the state: {name} is on {x.device}, {leaf.name} on {self.device}"
            )
        if x.dtype != leaf.dtype and not (
            autocast_enabled(self.device) and x.is_floating_point() and leaf.dtype.is_floating_point
        ):
            raise TypeError(
                f"f must keep the dtype of the state: {name} is {x.dtype}, {leaf.name} {leaf.dtype}. "
                f"Give x0 the dtype of f's output, or cast inside f."
            )

    def per_sample(self, values: Tensor) -> Tensor:
        """A (..., B) tensor with the batch shape in place of B."""
        return values.reshape(values.shape[:-1] + self.batch_shape)


def autocast_enabled(device: torch.device) -> bool:
    """Whether operations on ``device`` are autocast now."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context for arithmetic that must keep its precision whatever the caller's autocast says."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else contextlib.nullcontext()


class Evaluator:
    """f as a map from blocks to blocks that counts its calls.

    f alone sees the autocast state in which the evaluator was made, whenever and wherever it is called.

    Args:
        f: the function, called as ``f(x, *args)``.
        layout: the layout of its first argument and of its result.
        args: what else f gets.
        shares_casts: whether evaluations with gradient may use the casts of parameters that autocast has cached. Those
            have a graph of their own, older than the evaluation.
        keeps_tangents: whether values carry the tangents of forward-mode differentiation on.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        layout: StateLayout,
        args: tuple[Any, ...] = (),
        *,
        shares_casts: bool = False,
        keeps_tangents: bool = False,
    ) -> None:
        self.f, self.layout, self.args, self.shares_casts = f, layout, args, shares_casts
        self.num_calls = 0
        #: Positions in ``args`` of what belongs to samples, where f may be called on some samples alone; else None.
        self.sample_args: frozenset[int] | None = None
        self.masks: Mapping[Any, Tensor] = {}  # drawn while f was evaluated, for all samples
        # What carries tangents of forward-mode differentiation is solved without, see `ImplicitAdjoint.with_tangent`.
        self.drops_tangents = not keeps_tangents and levels.carries_tangents()
        self.autocast_dtype = torch.get_autocast_dtype(layout.device.type) if autocast_enabled(layout.device) else None

    def with_args(self, args: tuple[Any, ...]) -> Evaluator:
        """The same map with other further arguments, and a count of its own."""
        other = copy.copy(self)
        other.args, other.num_calls = args, 0
        return other

    def narrowed(self, index: Tensor) -> Evaluator:
        """The same map for some samples alone, with a count of its own."""
        assert self.sample_args is not None
        pick = functools.partial(torch.index_select, dim=0, index=index)
        args = (tree_map(pick, a) if i in self.sample_args else a for i, a in enumerate(self.args))
        other = self.with_args(tuple(args))
        other.layout = self.layout.narrowed(len(index))
        return other

    @property
    def can_be_lowered(self) -> bool:
        """Whether autocast would give f a lower precision than it has. It leaves float64 and complex numbers alone."""
        available = torch.amp.is_autocast_available(self.layout.device.type)
        return available and self.autocast_dtype is None and all(x.dtype == torch.float32 for x in self.layout.leaves)

    @contextlib.contextmanager
    def lowered_to(self, dtype: torch.dtype) -> Iterator[None]:
        """Evaluate f under autocast to ``dtype`` for the time of a block, in which weights are cast to it once."""
        before, self.autocast_dtype = self.autocast_dtype, dtype
        torch.clear_autocast_cache()  # inside of an outer autocast it outlives a call, and does not look at dtypes
        try:
            # What is cached without gradient lasts until the outermost autocast ends.
            with torch.autocast(self.layout.device.type, enabled=False):
                yield
        finally:
            self.autocast_dtype = before
            torch.clear_autocast_cache()

    @property
    def resolution(self) -> float:
        """Relative precision of a value of f: that of the coarsest dtype that it goes through."""
        resolution = self.layout.resolution
        return resolution if self.autocast_dtype is None else max(resolution, torch.finfo(self.autocast_dtype).eps)

    def __call__(self, x: Blocks) -> Blocks:
        """f(x, *args).

        Raises:
            RuntimeError: f changed its first argument in place.
            NotImplementedError: f draws masks, which it would draw anew for fewer samples.
        """
        versions = versions_of(x)
        self.num_calls += 1
        with self._autocast(), graphs_to_keep():
            fx = self.layout.pack_output(self.f(self.layout.unpack(x), *self.args))
        if is_changed(x, versions):
            raise RuntimeError("f changed its input in place; it must leave x as it is and return a new value")
        if self.masks and self.sample_args is not None:  # at once, and not only where samples are let go
            raise NotImplementedError(
                "sample_args does not go with VariationalDropout in training mode: a mask is for the whole batch"
            )
        return primal(fx) if self.drops_tangents else fx

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        device = self.layout.device
        if self.autocast_dtype is None:
            return without_autocast(device)
        cache = torch.is_autocast_cache_enabled() and (self.shares_casts or not torch.is_grad_enabled())
        return torch.autocast(device.type, dtype=self.autocast_dtype, cache_enabled=cache)


def primal(blocks: Blocks) -> Blocks:
    """The blocks without their tangents."""
    return tuple(forward_ad.unpack_dual(b).primal for b in blocks)


def versions_of(blocks: Blocks) -> list[int]:
    """How often each block has been changed in place; empty where that is not tracked."""
    if torch.compiler.is_compiling():
        return []
    try:
        return [b._version for b in blocks]
    except RuntimeError:  # made in inference mode
        return []


def is_changed(blocks: Blocks, versions: list[int]) -> bool:
    """Whether a block was changed in place since it had ``versions``, where that is tracked then and now.

    What PyTorch compiles in one thread stops the tracking in all of them, between two looks, too.
    """
    return any(a != b for a, b in zip(versions, versions_of(blocks), strict=False))


def _check_initial_leaf(name: str, leaf: Any, batch_dims: int) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(leaf).__name__}")
    if not (leaf.is_floating_point() or leaf.is_complex()):
        raise TypeError(f"{name} must have a floating or complex dtype, got {leaf.dtype}")
    if leaf.dim() < batch_dims:
        raise ValueError(
            f"{name} has shape {tuple(leaf.shape)}, fewer dims than batch_dims={batch_dims}; one system: batch_dims=0"
        )


def _describe(spec: TreeSpec) -> str:
    return "a tensor" if spec.is_leaf() else str(tree_unflatten(["*"] * spec.num_leaves, spec))
