"""L6. What is being examined: f and a point in its domain, with every call counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from deqkit import linalg
from deqkit.diagnosis.modules import modules_of, submodules
from deqkit.diagnosis.untouched import seed
from deqkit.state import Blocks, Evaluator, StateLayout

_ASIDE = 0.01  # of the size of f(x0), by which the probing point lies beside it


class Subject:
    """f, where it starts, and means to evaluate and to compare it.

    Args:
        f: the map.
        x0: its starting point; copied.
        args: further arguments of f.
        batch_dims: leading dims that index independent samples.

    Attributes:
        call: f, counted: what solves are given.
        num_calls: how often f was called.
        num_products: how often it was differentiated.
        resolution: relative precision of a value of f.
    """

    def __init__(self, f: Callable[..., Any], x0: Any, args: tuple[Any, ...], batch_dims: int) -> None:
        self.layout = StateLayout(x0, batch_dims)
        self.x0 = tree_map(lambda leaf: leaf.detach().clone(memory_format=torch.preserve_format), x0)
        self.f, self.args, self.batch_dims, self.num_calls = f, args, batch_dims, 0
        self.num_products = 0
        self.modules: dict[str, nn.Module] = submodules(modules_of(f, args))
        self.evaluator = Evaluator(self.call, self.layout, args)
        self.resolution = self.evaluator.resolution
        self.device = self.layout.device
        self._generator = torch.Generator(self.device).manual_seed(0)

    def call(self, x: Any, *args: Any) -> Any:
        """f(x, *args)."""
        self.num_calls += 1
        out = self.f(x, *args)
        if torch.is_grad_enabled():
            leaves, spec = tree_flatten(out)
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaves[i] = leaf.view_as(leaf)  # the hook must not stay behind on a tensor of the caller's
                    leaves[i].register_hook(self._count_product)
                    return tree_unflatten(leaves, spec)
        return out

    def _count_product(self, gradient: Tensor) -> None:
        self.num_products += 1

    def call_with_same_draws(self, x: Any, *args: Any) -> Any:
        """f(x, *args), with the same random numbers at every call."""
        seed(self.device)
        return self.call(x, *args)

    def evaluate(self, x: Blocks) -> Blocks:
        """The value of f at ``x``, with the same random numbers each time: what differs does so for another reason."""
        seed(self.device)
        return self.evaluator(x)

    def raw(self, x: Blocks) -> Any:
        """What f returns at ``x``, whatever it is."""
        return self.call(self.layout.unpack(x), *self.args)

    @cached_property
    def start(self) -> Blocks:
        """x0."""
        return tuple(b.clone() for b in self.layout.pack(self.x0))

    @cached_property
    def value(self) -> Blocks:
        """f(x0), without gradient."""
        with torch.no_grad():
            return tuple(b.clone() for b in self.evaluate(self.start))

    @cached_property
    def probe(self) -> Blocks:
        """A point that is special in no way, and in the domain of f if iterates are: beside f(x0), or x0."""
        finite = torch.isfinite(linalg.norm(self.value))
        return self.beside(linalg.where(finite, self.value, self.start), _ASIDE)

    @cached_property
    def value_at_probe(self) -> Blocks:
        """The value of f at `probe`, without gradient."""
        with torch.no_grad():
            return tuple(b.clone() for b in self.evaluate(self.probe))

    def draw(self) -> Blocks:
        """A random direction, standard normal."""
        return tuple(
            torch.randn(b.shape, dtype=b.dtype, device=self.device, generator=self._generator) for b in self.start
        )

    def direction(self, length: float) -> Blocks:
        """A random direction, ``length`` times as large as the state, leaf by leaf, or as 1 where that is zero."""
        sizes = [b[torch.isfinite(b)] for b in self.value]
        scales = [float(s.square().mean().sqrt()) if s.numel() else 0.0 for s in sizes]
        return tuple(length * (scale or 1.0) * b for scale, b in zip(scales, self.draw(), strict=True))

    def beside(self, x: Blocks, length: float) -> Blocks:
        """A random point ``length`` away from ``x``, in units of the state."""
        return self.moved(x, self.direction(length))

    def moved(self, x: Blocks, by: Blocks, times: float = 1.0) -> Blocks:
        """``x`` plus ``times`` times ``by``, as the state's dtype has it."""
        return self.layout.round(tuple(torch.add(a, b, alpha=times) for a, b in zip(x, by, strict=True)))

    def clock(self) -> float:
        """Seconds, at which the device has done all that it was asked."""
        if self.device.type not in ("cpu", "meta"):
            torch.get_device_module(self.device).synchronize(self.device)
        return time.perf_counter()

    def names(self, samples: Tensor, limit: int = 5) -> str:
        """For example "samples 0, 3 and 7 more"; ``samples`` is bool (B,)."""
        found = samples.nonzero().flatten().tolist()
        if len(self.layout.batch_shape) > 1:
            found = [
                tuple(int(i) for i in torch.unravel_index(torch.tensor(k), self.layout.batch_shape)) for k in found
            ]
        shown = ", ".join(str(k) for k in found[:limit])
        more = f" and {len(found) - limit} more" if len(found) > limit else ""
        return f"sample{'s' if len(found) > 1 else ''} {shown}{more}"


def relative_change(a: Blocks, b: Blocks) -> Tensor:
    """|b - a| / |a| per sample, (B,), where NaN is like NaN; infinite where only one of both is finite."""
    parts, sizes = [], []
    for left, right in zip(a, b, strict=True):
        same = (left == right) | (left.isnan() & right.isnan())
        parts.append(torch.where(same, 0.0, right - left).nan_to_num(nan=torch.inf))
        sizes.append(left.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    change, size = linalg.norm(tuple(parts)), linalg.norm(tuple(sizes))
    return torch.where(change == 0, 0.0, change / torch.where(size > 0, size, 1.0))


def largest(values: Tensor) -> float:
    """The largest, as a number; 0 of none."""
    return float(values.max()) if values.numel() else 0.0
