"""L6. Terms of a training loss that keep the fixed point well-behaved, and schedules for their weights.

Jacobian penalty      E |J^T v|^2 / D = |J|_F^2 / D, J = df/dx and v of mean 0 and variance 1 (Hutchinson). Source: Bai,
                      Koltun & Kolter, "Stabilizing equilibrium models by Jacobian regularization", arXiv 2106.14342.
                      Deliberate deviation: v has random signs, not Gaussian entries; the mean is the same, the variance
                      smaller.
Spectral norm penalty max(0, |J|_2 - target). Source: Yoshida & Miyato, "Spectral norm regularization", arXiv
                      1705.10941; Miyato et al., arXiv 1802.05957, for the gradient through the last product alone.
                      Deliberate deviations: that of the whole f instead of each weight, a hinge, and the singular
                      vector from a Krylov space instead of a power iteration with as many products.
Correction loss       sum_i gamma^(n-1-i) L(x_i) over points of the trajectory. Source: Bai, Geng, Savani & Kolter,
                      "Deep equilibrium optical flow estimation", arXiv 2204.08442.

Random numbers come from the global generator unless one is given, as those of dropout do: a training run draws anew in
every step, and `torch.manual_seed` makes it repeatable.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from deqkit import linalg
from deqkit.solvers.base import require_float, require_int
from deqkit.spectral.arnoldi import Arnoldi
from deqkit.spectral.estimates import as_number, at_least, check_flag
from deqkit.spectral.jacobian import Gram, Jacobian, check_generator, exact_arithmetic, random_signs
from deqkit.state import Blocks, without_autocast


def jacobian_penalty(
    f: Callable[..., Any],
    x: Any,
    args: tuple[Any, ...] = (),
    num_probes: int = 1,
    *,
    batch_dims: int = 1,
    through_x: bool = False,
    reduction: Literal["mean", "none"] = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """An unbiased estimate of |df/dx|_F^2 / D at x, as a term of the loss.

    One more call of f, and per probe one vector-Jacobian product that is differentiated in turn: f must be
    differentiable twice in reverse mode, which compiled functions and fused attention are not (the backward pass fails;
    `torch.nn.attention.sdpa_kernel` chooses an attention that is).

    Args:
        f: called as ``f(x, *args)``, as in `deqkit.solve`.
        x: where: `Solution.value`, or a point of the way there, one of `Solution.states`.
        args: further arguments of f. Tensors in it get their gradients, as do parameters that f closes over.
        num_probes: random vectors to average over; each costs as much memory as the first.
        batch_dims: leading dims that index independent samples; 0 for one system.
        through_x: whether the gradient takes account of x, too, by whatever way x was computed (the backward pass of a
            solve, say). By default x is a constant, as in the paper.
        reduction: "mean" over samples, or "none" for one value per sample.
        generator: draws the probes; None for the global generator of x's device.

    Returns:
        A scalar, or (*batch); zero for an empty batch. Without a graph where gradients are disabled.

    Raises:
        TypeError: f, args, x or a setting has the wrong type.
        ValueError: a setting is unknown or out of range, or f does not keep the shape of x.
        NotImplementedError: called inside a transform of `torch.func`.

    Example:
        >>> sol = deqkit.solve(f, x0, args=args)
        >>> loss = task(sol.value) + 0.1 * deqkit.jacobian_penalty(f, sol.value, args)
    """
    num_probes = at_least("num_probes", num_probes, 1)
    jacobian = _jacobian(f, x, args, batch_dims, through_x, reduction, generator)
    with without_autocast(jacobian.layout.device):
        total = torch.zeros((), dtype=jacobian.layout.dtype, device=jacobian.layout.device)
        for _ in range(num_probes):
            v = jacobian.draw(random_signs, generator, jacobian.layout.num_samples)
            image = jacobian.transposed(v, create_graph=torch.is_grad_enabled())
            total = total + linalg.dot(image, image)
        return _reduce(jacobian, total / (num_probes * max(jacobian.num_reals, 1)), reduction)


def spectral_norm_penalty(
    f: Callable[..., Any],
    x: Any,
    args: tuple[Any, ...] = (),
    target: float = 1.0,
    *,
    num_steps: int = 5,
    batch_dims: int = 1,
    through_x: bool = False,
    reduction: Literal["mean", "none"] = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """By how much the largest singular value of df/dx exceeds a target, as a term of the loss.

    The left singular vector u is found without a graph; |J^T u| with u held constant has the value and, where u is
    right, the gradient of the singular value. Too few steps give too small a value.

    Args:
        f: see `jacobian_penalty`, as are the others.
        x: see there.
        args: see there.
        target: where the penalty begins; below 1 makes f a contraction near x, 0 penalises the norm itself.
        num_steps: products with J J^T that u is found with.
        batch_dims: see there.
        through_x: see there.
        reduction: see there.
        generator: draws the vector to start from; None for the global generator of x's device.

    Returns:
        See `jacobian_penalty`.

    Raises:
        TypeError: see there.
        ValueError: see there.
    """
    num_steps = at_least("num_steps", num_steps, 1)
    target = as_number("target", target)
    jacobian = _jacobian(f, x, args, batch_dims, through_x, reduction, generator)
    u = _left_singular_vector(jacobian, num_steps, generator)
    with without_autocast(jacobian.layout.device):
        image = jacobian.transposed(u, create_graph=torch.is_grad_enabled())
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(b, dim=1) for b in image]), dim=0)
        return _reduce(jacobian, torch.relu(norm - target), reduction)


def _left_singular_vector(jacobian: Jacobian, num_steps: int, generator: torch.Generator | None) -> Blocks:
    """That of the largest singular value of J, as well as ``num_steps`` products with J J^T tell."""
    num_samples, size = jacobian.layout.num_samples, jacobian.num_reals
    with exact_arithmetic(jacobian.layout.device, gradients=False):
        start = jacobian.draw(torch.randn, generator, 1)
        if num_samples == 0 or size == 0:
            return tuple(torch.zeros_like(b) for b in jacobian.x)
        num_steps = min(num_steps, size)
        arnoldi = Arnoldi(Gram(jacobian), start, num_samples, num_steps, jacobian.resolution)
        for _ in range(num_steps):
            arnoldi.extend()
        return arnoldi.symmetric_vector()


def correction_loss(
    states: Mapping[int, Any] | Iterable[Any],
    loss_fn: Callable[[Any], Tensor],
    *,
    discount: float = 0.8,
    weights: Iterable[float] | None = None,
) -> Tensor:
    """Fixed-point correction: the task's loss at points of the trajectory, the early ones counting less.

    It is meant to have f lead straight to a good answer, so that a solve cut short does little harm. The last point
    counts in full, each earlier one ``discount`` times as much as the one after it.

    Args:
        states: points in the order in which they were passed: the list that `deqkit.nn.FixedPoint` returns under
            ``keep=``, ``[*sol.states.values(), sol.value]``, or `Solution.states`, taken by rising step.
        loss_fn: the loss at one point.
        discount: gamma, in [0, 1].
        weights: one per point, in place of the powers of ``discount``.

    Returns:
        The weighted sum, of the shape that ``loss_fn`` gives.

    Raises:
        TypeError: ``loss_fn`` is not callable, or a setting is no number.
        ValueError: no points, or as many weights as there are not points, or the discount is out of range.

    Example:
        >>> layer = deqkit.nn.FixedPoint(cell, keep=(2, 5))
        >>> loss = deqkit.correction_loss(layer(x0, inputs), task)
    """
    points = [states[step] for step in sorted(states)] if isinstance(states, Mapping) else list(states)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    if not points:
        raise ValueError("no states to correct: ask the solve for some with keep=, such as keep=(2, 5)")
    if not 0 <= as_number("discount", discount) <= 1:
        raise ValueError(f"discount must be in [0, 1], got {discount}")
    if weights is None:
        factors = [discount**i for i in reversed(range(len(points)))]
    else:
        factors = [as_number("every weight", w) for w in weights]
    if len(factors) != len(points):
        raise ValueError(f"there must be one weight for each of the {len(points)} states, got {len(factors)}")
    terms = [factor * loss_fn(point) for factor, point in zip(factors, points, strict=True)]
    return sum(terms[1:], start=terms[0])


@dataclass(frozen=True)
class Schedule(ABC):
    """A weight as a function of the training step: ``weight = schedule(step)``.

    The schedulers of `torch.optim` set what an optimizer holds; the weight of a term of the loss is none of that.
    """

    def __call__(self, step: float) -> float:
        """The weight in a step, counted from 0.

        Raises:
            TypeError: not a number.
        """
        return float(self.at(as_number("step", step)))

    @abstractmethod
    def at(self, step: float) -> float:
        """The weight in a step."""


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """The same weight all the time."""

    value: float

    def __post_init__(self) -> None:
        require_float(self, "value", -math.inf, math.inf, ends="()")

    def at(self, step: float) -> float:
        """See `Schedule`."""
        return self.value


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """From one weight to another in a straight line.

    Args:
        start: the weight until step ``begin``.
        stop: the weight from step ``begin + steps`` on.
        steps: how long it takes.
        begin: when it begins.

    Raises:
        TypeError: a setting is no number.
        ValueError: ``steps`` is not positive, or ``begin`` is negative.
    """

    start: float
    stop: float
    steps: int
    begin: int = 0

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            require_float(self, name, -math.inf, math.inf, ends="()")
        require_int(self, "steps", minimum=1)
        require_int(self, "begin", minimum=0)

    def at(self, step: float) -> float:
        """See `Schedule`."""
        return self.start + (self.stop - self.start) * self._share(step)

    def _share(self, step: float) -> float:
        """How much of the way lies behind, from 0 to 1."""
        return min(max((step - self.begin) / self.steps, 0.0), 1.0)


@dataclass(frozen=True)
class CosineSchedule(LinearSchedule):
    """From one weight to another along half a cosine: slow at both ends. Settings as in `LinearSchedule`."""

    def _share(self, step: float) -> float:
        return (1 - math.cos(math.pi * super()._share(step))) / 2


@dataclass(frozen=True)
class StepSchedule(Schedule):
    """Weights that change at once.

    Args:
        values: the weights, one more than milestones.
        milestones: the steps from which on the second and later weights hold, rising.

    Raises:
        TypeError: something is no number.
        ValueError: numbers that do not fit, or milestones that do not rise.
    """

    values: tuple[float, ...]
    milestones: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("values", "milestones"):
            object.__setattr__(self, name, tuple(as_number(f"StepSchedule: {name}", v) for v in getattr(self, name)))
        if len(self.values) != len(self.milestones) + 1:
            raise ValueError(
                f"StepSchedule: there must be one value more than milestones, got {len(self.values)} and "
                f"{len(self.milestones)}"
            )
        if any(a >= b for a, b in itertools.pairwise(self.milestones)):
            raise ValueError(f"StepSchedule: milestones must rise, got {self.milestones}")

    def at(self, step: float) -> float:
        """See `Schedule`."""
        return self.values[sum(step >= m for m in self.milestones)]


def _jacobian(
    f: Callable[..., Any], x: Any, args: Any, batch_dims: int, through_x: bool, reduction: str, generator: Any
) -> Jacobian:
    check_flag("through_x", through_x)
    check_generator(generator)
    if reduction not in ("mean", "none"):
        raise ValueError(f"unknown reduction {reduction!r}: choose one of ['mean', 'none']")
    return Jacobian(f, x, args, batch_dims, through_x=through_x and torch.is_grad_enabled())


def _reduce(jacobian: Jacobian, values: Tensor, reduction: str) -> Tensor:
    """Values (B,) as the caller wants them; the mean of none is zero."""
    if reduction == "none":
        return jacobian.layout.per_sample(values)
    return values.sum() / max(values.numel(), 1)
