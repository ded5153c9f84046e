"""L6. Spectral radius, spectral norm and Frobenius norm of df/dx, per sample, each with an error estimate.

Near a fixed point plain iteration multiplies the error by J = df/dx at each step: it converges there if the spectral
radius rho(J) is below 1, in about log(rtol) / log(rho) steps. The spectral norm bounds it, and says by how much an
error may grow in one step. The Frobenius norm bounds both, and is what the Jacobian penalty keeps small.

    rho(J)    largest |eigenvalue|: Arnoldi on J^T, see `arnoldi`
    |J|_2     largest singular value: the same on J J^T, whose largest eigenvalue is its square
    |J|_F     sqrt(E |J^T v|^2) for random signs v: Hutchinson, Commun. Stat. Simul. Comput. 19 (1990)

Every random vector comes from the caller's generator, or from one made here with a fixed seed, never from the global
one: to ask changes nothing about a training run, and the same question gets the same answer.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from deqkit import linalg
from deqkit.errors import ConvergenceWarning
from deqkit.solvers.base import as_int
from deqkit.spectral.arnoldi import Arnoldi, Dominant, find_dominant
from deqkit.spectral.jacobian import Gram, Jacobian, exact_arithmetic, make_generator, random_signs
from deqkit.state import Blocks


class Estimate(NamedTuple):
    """A number per sample, and how well it is known.

    Attributes:
        value: the estimate, batch.
        error: how far it may be off, batch: an estimate of the error where the number comes from a Krylov space, the
            standard error where it is a mean over random probes.
        num_products: products with the Jacobian or its transpose that it took, each over the whole batch.
    """

    value: Tensor
    error: Tensor
    num_products: int


@overload
def spectral_radius(
    f: Callable[..., Any], x: Any, args: tuple[Any, ...] = (), *, batch_dims: int = 1,
    rtol: float = 1e-3, max_products: int = 200, history: int = 32, generator: torch.Generator | None = None,
    return_error: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def spectral_radius(
    f: Callable[..., Any], x: Any, args: tuple[Any, ...] = (), *, batch_dims: int = 1,
    rtol: float = 1e-3, max_products: int = 200, history: int = 32, generator: torch.Generator | None = None,
    return_error: Literal[True],
) -> Estimate: ...  # fmt: skip
def spectral_radius(
    f: Callable[..., Any],
    x: Any,
    args: tuple[Any, ...] = (),
    *,
    batch_dims: int = 1,
    rtol: float = 1e-3,
    max_products: int = 200,
    history: int = 32,
    generator: torch.Generator | None = None,
    return_error: bool = False,
) -> Tensor | Estimate:
    """The largest modulus among the eigenvalues of df/dx, per sample.

    Right for complex pairs, which a power iteration rotates by. f is called once; then all samples share each
    vector-Jacobian product, and stop one by one.

    The error estimate is of first order. Where J is far from normal (`spectral_norm` many times as large), eigenvalues
    move far under perturbations as small as rounding; the value is then that of a matrix close to J.

    Args:
        f: called as ``f(x, *args)``; it must not mix samples.
        x: where to take the Jacobian, such as `Solution.value`: a tensor or pytree of tensors, each (*batch, ...).
        args: further arguments of f.
        batch_dims: leading dims that index independent samples; 0 for one system.
        rtol: error that is tolerated, relative to the radius.
        max_products: limit of vector-Jacobian products.
        history: Krylov vectors kept, at least 3, each as large as x. A state of no more numbers than that is known, to
            the precision of its dtype, after as many products as it has numbers.
        generator: draws the start vector; None for a fixed one.
        return_error: whether to return an `Estimate`, and leave it to the caller to look, instead of the radius alone,
            with a warning where it is not known to ``rtol``.

    Returns:
        The radius, (*batch), real, of x's widest precision, float32 or better; NaN for a sample whose Jacobian is not
        finite. An `Estimate` with ``return_error=True``.

    Raises:
        TypeError: f, args, x or a setting has the wrong type.
        ValueError: a setting is out of range, or f does not keep the shape of x.
        NotImplementedError: called inside a transform of `torch.func`.
    """
    search = _Search("spectral_radius", rtol, max_products, history, generator, return_error)
    jacobian = Jacobian(f, x, args, batch_dims)
    found = search.run(jacobian, jacobian.transposed, cost=1)
    estimate = _estimate(jacobian, found.modulus, found.error)
    return estimate if return_error else estimate.value


@overload
def spectral_norm(
    f: Callable[..., Any], x: Any, args: tuple[Any, ...] = (), *, batch_dims: int = 1,
    rtol: float = 1e-3, max_products: int = 200, history: int = 32, generator: torch.Generator | None = None,
    return_error: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def spectral_norm(
    f: Callable[..., Any], x: Any, args: tuple[Any, ...] = (), *, batch_dims: int = 1,
    rtol: float = 1e-3, max_products: int = 200, history: int = 32, generator: torch.Generator | None = None,
    return_error: Literal[True],
) -> Estimate: ...  # fmt: skip
def spectral_norm(
    f: Callable[..., Any],
    x: Any,
    args: tuple[Any, ...] = (),
    *,
    batch_dims: int = 1,
    rtol: float = 1e-3,
    max_products: int = 200,
    history: int = 32,
    generator: torch.Generator | None = None,
    return_error: bool = False,
) -> Tensor | Estimate:
    """The largest singular value of df/dx, per sample: by how much f stretches small differences at most.

    Below 1, f contracts near x, in the Euclidean norm. Above 1, it may converge all the same: see `spectral_radius`.

    Args:
        f: see `spectral_radius`, as are the others. It must be differentiable twice in reverse mode, which compiled
            functions and fused attention are not.
        x: see there.
        args: see there.
        batch_dims: see there.
        rtol: error that is tolerated, relative to the norm.
        max_products: limit of products with J and with J^T, together; at least 2.
        history: see there.
        generator: see there.
        return_error: see there.

    Returns:
        The norm, (*batch), as `spectral_radius` returns the radius.

    Raises:
        TypeError: see there.
        ValueError: see there.
    """
    search = _Search("spectral_norm", rtol, max_products, history, generator, return_error)
    jacobian = Jacobian(f, x, args, batch_dims)
    gram = Gram(jacobian)
    found = search.run(jacobian, gram, cost=2)
    scale = torch.ones_like(found.modulus) if gram.scale is None else gram.scale.cpu()
    estimate = _estimate(jacobian, *_root(found.modulus * scale, found.error * scale))
    return estimate if return_error else estimate.value


@overload
def frobenius_norm(
    f: Callable[..., Any], x: Any, args: tuple[Any, ...] = (), *, batch_dims: int = 1,
    num_probes: int = 16, generator: torch.Generator | None = None,
    return_error: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def frobenius_norm(
    f: Callable[..., Any], x: Any, args: tuple[Any, ...] = (), *, batch_dims: int = 1,
    num_probes: int = 16, generator: torch.Generator | None = None,
    return_error: Literal[True],
) -> Estimate: ...  # fmt: skip
def frobenius_norm(
    f: Callable[..., Any],
    x: Any,
    args: tuple[Any, ...] = (),
    *,
    batch_dims: int = 1,
    num_probes: int = 16,
    generator: torch.Generator | None = None,
    return_error: bool = False,
) -> Tensor | Estimate:
    """The Frobenius norm of df/dx, per sample, estimated from random probes; each sample has its own.

    Args:
        f: see `spectral_radius`, as are the others.
        x: see there.
        args: see there.
        batch_dims: see there.
        num_probes: vector-Jacobian products to average over. The error falls with their square root.
        generator: draws the probes; None for the same ones in every call.
        return_error: whether to return an `Estimate` with the standard error, NaN for a single probe.

    Returns:
        The norm, (*batch), as `spectral_radius` returns the radius. Its square is unbiased.

    Raises:
        TypeError: see there.
        ValueError: see there.
    """
    num_probes = at_least("num_probes", num_probes, 1)
    check_flag("return_error", return_error)
    jacobian = Jacobian(f, x, args, batch_dims)
    generator = make_generator(generator, jacobian.layout.device)
    with exact_arithmetic(jacobian.layout.device, gradients=False):
        probes = (jacobian.draw(random_signs, generator, jacobian.layout.num_samples) for _ in range(num_probes))
        squares = torch.stack([linalg.norm(jacobian.transposed(v)).square() for v in probes])
        squares = torch.where(torch.isfinite(squares), squares, torch.nan)
        mean = squares.mean(dim=0)
        variance = (squares - mean).square().sum(dim=0) / (num_probes - 1 or math.nan)
        estimate = _estimate(jacobian, *_root(mean, (variance / num_probes).sqrt(), slope=0.5))
    return estimate if return_error else estimate.value


def _root(square: Tensor, error: Tensor, slope: float = 1.0) -> tuple[Tensor, Tensor]:
    """A number and its error from its square and the error of that: |a - b| <= |a^2 - b^2| / b, and <= its root."""
    value, bound = square.sqrt(), error.sqrt()
    return value, torch.where(value > 0, torch.minimum(slope * error / value, bound), bound)


@dataclass(frozen=True)
class _Search:
    """Settings of a search for a dominant eigenvalue; see `spectral_radius`."""

    what: str
    rtol: float
    max_products: int
    history: int
    generator: torch.Generator | None
    return_error: bool

    def __post_init__(self) -> None:
        if not as_number("rtol", self.rtol) >= 0:
            raise ValueError(f"rtol must not be negative, got {self.rtol}")
        at_least("max_products", self.max_products, 2)
        at_least("history", self.history, 3)
        check_flag("return_error", self.return_error)

    def run(self, jacobian: Jacobian, product: Callable[[Blocks], Blocks], *, cost: int) -> Dominant:
        """Search; every ``product`` is made of ``cost`` products with the Jacobian."""
        generator = make_generator(self.generator, jacobian.layout.device)
        num_samples, size = jacobian.layout.num_samples, jacobian.num_reals
        if num_samples == 0 or size == 0:
            nothing = torch.zeros(num_samples, dtype=torch.float64)
            return Dominant(nothing, nothing, nothing == 0, nothing == 0)
        with exact_arithmetic(jacobian.layout.device, gradients=False):
            start = jacobian.draw(torch.randn, generator, 1)
            arnoldi = Arnoldi(product, start, num_samples, min(self.history, size), jacobian.resolution)
            found = find_dominant(arnoldi, rtol=self.rtol, max_steps=self.max_products // cost)
        if not self.return_error:
            self._report(found, jacobian.num_products)
        return found

    def _report(self, found: Dominant, num_products: int) -> None:
        missed = ~found.done & found.modulus.isfinite()
        if not bool(missed.any()):
            return
        worst = float((found.error / found.modulus)[missed].max())
        warnings.warn(
            f"{self.what}: not known to rtol={self.rtol:g} for {int(missed.sum())} of {missed.numel()} samples after "
            f"{num_products} products; worst relative error about {worst:.1e}. Raise max_products or history, loosen "
            f"rtol, or take the estimate with its error: return_error=True.",
            ConvergenceWarning,
            stacklevel=4,
        )


def _estimate(jacobian: Jacobian, value: Tensor, error: Tensor) -> Estimate:
    layout = jacobian.layout
    value, error = (layout.per_sample(t.to(device=layout.device, dtype=layout.dtype)) for t in (value, error))
    return Estimate(value, error, jacobian.num_products)


def at_least(name: str, value: Any, minimum: int) -> int:
    """A setting that is an integer of at least ``minimum``.

    Raises:
        TypeError: not an integer.
        ValueError: too small.
    """
    value = as_int(name, value)
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def as_number(name: str, value: Any) -> float:
    """A setting that is a real number.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def check_flag(name: str, value: Any) -> None:
    """Refuse a flag that is neither True nor False.

    Raises:
        TypeError: see above.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
