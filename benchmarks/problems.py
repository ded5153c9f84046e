"""Fixed-point problems whose solution is known: f, a starting point, and x* to about 1e-12.

Every problem is a module drawn in float32 from a seed. Its solution belongs to exactly these weights: it is computed in
float64 by other means than the solvers that are measured (a direct solve, Newton with the dense Jacobian, or bare
iteration where f contracts), and `build` refuses to hand out a problem whose solution does not hold: the residual is
recomputed, and for nonlinear maps a second starting point has to lead to the same x*.

Legend: B samples, n size of a dense problem.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

MAX_RESIDUAL = 1e-12  # relative, of a reference solution
MAX_DISAGREEMENT = 1e-8  # relative, of two reference solutions reached from different starting points


class ProblemError(RuntimeError):
    """A problem's reference solution does not hold, or the problem cannot be built here."""


@dataclass(frozen=True)
class Problem:
    """A map, where to start, and where it has to end.

    Attributes:
        name: the key in `PROBLEMS` or `LARGE_PROBLEMS`.
        title: one line for tables and plots, with the sizes.
        seed: what the weights were drawn from.
        f: the map, in the working dtype.
        x0: the starting point: a pytree of tensors (B, ...).
        exact_f: the same map with the same weights in float64.
        solution: x* in float64, of x0's structure.
        radius: spectral radius of df/dx at the solution, of the sample where it is largest; an estimate from below
            for maps too large for a dense Jacobian.
    """

    name: str
    title: str
    seed: int
    f: Callable[[Any], Any]
    x0: Any
    exact_f: Callable[[Any], Any]
    solution: Any
    radius: float

    @property
    def num_samples(self) -> int:
        """B."""
        return tree_leaves(self.x0)[0].shape[0]

    def astype(self, dtype: torch.dtype) -> Problem:
        """The same problem, weights and solution, with f and x0 in another working dtype."""
        f = copy.deepcopy(self.f)
        if isinstance(f, nn.Module):
            f = f.to(dtype=dtype)
        return replace(self, f=f, x0=tree_map(lambda leaf: leaf.to(dtype), self.x0))

    def relative_error(self, x: Any) -> Tensor:
        """|x - x*| / |x*| per sample, (B,), in float64."""
        return distance(to_float64(x), self.solution) / size(self.solution)

    def relative_residual(self, x: Any) -> Tensor:
        """|f(x) - x| / |f(x)| per sample, (B,), recomputed in float64."""
        x = to_float64(x)
        with torch.no_grad():
            fx = self.exact_f(x)
        return distance(fx, x) / size(fx)


def size(x: Any) -> Tensor:
    """Euclidean norm of a state per sample, (B,)."""
    return torch.stack([leaf.flatten(1).norm(dim=1) for leaf in tree_leaves(x)]).norm(dim=0)


def distance(x: Any, y: Any) -> Tensor:
    """Euclidean distance of two states per sample, (B,)."""
    return size(tree_map(torch.sub, x, y))


def to_float64(x: Any) -> Any:
    """The state in double precision, without gradient."""
    return tree_map(lambda leaf: leaf.detach().double(), x)


# ---------------------------------------------------------------------------------------------------------------------
# The maps


class DenseMap(nn.Module):
    """x -> activation(scale * W x + b), with one scale per sample."""

    weight: Tensor
    bias: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, scale: Tensor, *, tanh: bool) -> None:
        super().__init__()
        self.tanh = tanh
        self.register_buffer("weight", weight)  # (n, n)
        self.register_buffer("bias", bias)  # (B, n)
        self.register_buffer("scale", scale)  # (B, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bias + self.scale * (x @ self.weight.T)
        return torch.tanh(y) if self.tanh else y

    def jacobian(self, x: Tensor) -> Tensor:
        """df/dx at x, (B, n, n)."""
        slope = 1 - self(x) ** 2 if self.tanh else torch.ones_like(x)
        return (slope * self.scale).unsqueeze(2) * self.weight


class ConvBlock(nn.Module):
    """A residual block with group normalisation and an injected input, as deep-equilibrium networks for images use.

    Source: the ResNet layer of the tutorial of Kolter, Duvenaud & Johnson, "Deep Implicit Layers", NeurIPS 2020, ch. 4.
    """

    injection: Tensor

    def __init__(self, channels: int, injection: Tensor) -> None:
        super().__init__()
        groups = max(channels // 4, 1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(groups, channels) for _ in range(3))
        self.register_buffer("injection", injection)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(F.relu(self.conv1(x)))
        return self.norm3(F.relu(x + self.norm2(self.injection + self.conv2(y))))


class PyramidMap(nn.Module):
    """P -> G(P + B), the map that the i-FPN neck solves, for a given basis B."""

    def __init__(self, transform: nn.Module, basis: list[Tensor]) -> None:
        super().__init__()
        self.transform = transform
        self.names = [f"basis{j}" for j in range(len(basis))]
        for name, level in zip(self.names, basis, strict=True):
            self.register_buffer(name, level)

    def forward(self, pyramid: list[Tensor]) -> list[Tensor]:
        basis = [getattr(self, name) for name in self.names]
        return self.transform([p + b for p, b in zip(pyramid, basis, strict=True)])


# ---------------------------------------------------------------------------------------------------------------------
# Reference solutions, in float64


def solve_linear(f: DenseMap) -> Tensor:
    """x* of a linear map by an LU solve per sample, refined once."""
    identity = torch.eye(f.weight.shape[0], dtype=f.weight.dtype)
    parts = []
    for scale, bias in zip(f.scale.split(16), f.bias.split(16), strict=True):  # a matrix per sample takes memory
        system = identity - scale.unsqueeze(2) * f.weight
        x = torch.linalg.solve(system, bias)
        parts.append(x + torch.linalg.solve(system, bias + scale * (x @ f.weight.T) - x))
    return torch.cat(parts)


def solve_newton(f: DenseMap, x: Tensor, *, warmup: int = 200, max_steps: int = 50) -> Tensor:
    """x* by Newton with the dense Jacobian, from where a heavily damped iteration has led."""
    for _ in range(warmup):
        x = 0.7 * x + 0.3 * f(x)
    identity = torch.eye(x.shape[1], dtype=x.dtype)
    for _ in range(max_steps):
        r = f(x) - x
        if (size(r) < 1e-15 * size(x)).all():
            break
        step = torch.linalg.solve(identity - f.jacobian(x), r)
        shrink = torch.ones(len(x), 1, dtype=x.dtype)
        for _ in range(10):  # halve the step of a sample until its residual falls
            worse = distance(f(x + shrink * step), x + shrink * step) >= size(r)
            shrink = torch.where(worse.unsqueeze(1), shrink / 2, shrink)
        x = x + shrink * step
    return x


def iterate_to_rest(f: Callable[[Any], Any], x: Any, *, max_steps: int = 2000) -> Any:
    """x* of a contracting map: iterate until the residual has reached rounding and falls no further."""
    best, best_residual, idle = x, math.inf, 0
    for _ in range(max_steps):
        fx = f(x)
        residual = (distance(fx, x) / size(fx)).max().item()
        if residual < best_residual:
            best, best_residual, idle = x, residual, 0
        else:
            idle += 1
        if not math.isfinite(residual) or best_residual < 1e-15 or idle >= 20:
            break
        x = fx
    return best


def estimate_radius(f: Callable[[Any], Any], x: Any, *, num_steps: int) -> float:
    """Spectral radius of df/dx at x by the power method, with the geometric mean of the growth (complex pairs)."""
    v = tree_map(torch.randn_like, x)
    tail, growth = num_steps // 2, []
    for _ in range(num_steps):
        v = torch.func.jvp(f, (x,), (v,))[1]
        factor = size(v)
        v = tree_map(lambda leaf, s=factor: leaf / s.view(-1, *[1] * (leaf.dim() - 1)), v)
        growth.append(factor)
    return torch.stack(growth[-tail:]).log().mean(0).exp().max().item()


# ---------------------------------------------------------------------------------------------------------------------
# The problems


@dataclass(frozen=True)
class _Draft:
    """A problem before it has been solved and checked."""

    title: str
    module: nn.Module
    x0: Any
    solve: Callable[[Any, Any], Any]  # (module in float64, starting point) -> x*
    linear: bool = False


def _weight(n: int, *, symmetric: bool = False) -> Tensor:
    """A Gaussian matrix of spectral radius 1."""
    w = torch.randn(n, n, dtype=torch.float64)
    if symmetric:
        w = (w + w.T) / 2
        return (w / torch.linalg.eigvalsh(w).abs().max()).float()
    return (w / torch.linalg.eigvals(w).abs().max()).float()


def _dense(
    label: str,
    radius: float,
    *,
    small: bool,
    tanh: bool,
    bias: float = 1.0,
    symmetric: bool = False,
    newton: bool = False,
) -> _Draft:
    n, batch = (96, 4) if small else (512, 32)
    weight = radius * _weight(n, symmetric=symmetric)
    module = DenseMap(weight, bias * torch.randn(batch, n), torch.ones(batch, 1), tanh=tanh)
    title = f"{label} (n={n}, B={batch})"
    if not tanh:
        return _Draft(title, module, torch.zeros(batch, n), lambda f, x: solve_linear(f), linear=True)
    return _Draft(title, module, torch.zeros(batch, n), solve_newton if newton else iterate_to_rest)


def _mixed(batch: int, small: bool) -> _Draft:
    n, batch = (96, 4) if small else (512, batch)
    scale = 1 - torch.logspace(math.log10(0.9), -3, batch).unsqueeze(1)
    module = DenseMap(_weight(n), torch.randn(batch, n), scale, tanh=False)
    title = f"mixed batch, linear, radii 0.1 to 0.999 (n={n}, B={batch})"
    return _Draft(title, module, torch.zeros(batch, n), lambda f, x: solve_linear(f), linear=True)


def _conv(small: bool) -> _Draft:
    channels, side, batch = (8, 8, 2) if small else (32, 32, 4)
    injection = torch.randn(batch, channels, side, side)
    block = ConvBlock(channels, injection)
    for conv in (block.conv1, block.conv2):
        nn.init.normal_(conv.weight, std=0.01)
    title = f"residual conv block with GroupNorm ({channels}x{side}x{side}, B={batch})"
    return _Draft(title, block, torch.zeros_like(injection), iterate_to_rest)


def _ifpn(label: str, std: float, small: bool, channels: int = 64, image: int = 160) -> _Draft:
    try:
        from adapters.detection import NonlinearTransform
    except ImportError as error:
        raise ProblemError(f"the i-FPN problems need the detection extra: {error}") from error
    channels, image, batch = (16, 128, 2) if small else (channels, image, 2)
    sides = [image // stride for stride in (8, 16, 32)]
    sides += [math.ceil(sides[-1] / 2), math.ceil(sides[-1] / 4)]
    transform = NonlinearTransform(channels, len(sides))
    for name, parameter in transform.cross_scale.named_parameters():
        if name.endswith("weight"):
            nn.init.normal_(parameter, std=std)
    basis = [torch.randn(batch, channels, side, side) for side in sides]
    title = f"i-FPN, {label} ({channels} ch., P3-P7 of {image} px, B={batch})"
    return _Draft(title, PyramidMap(transform, basis), [torch.zeros_like(b) for b in basis], iterate_to_rest)


PROBLEMS: dict[str, Callable[[bool], _Draft]] = {
    "tanh_easy": lambda small: _dense("tanh(Wx+b), radius of W 0.95", 0.95, small=small, tanh=True),
    "tanh_hard": lambda small: _dense("tanh(Wx+b), radius of W 1.5", 1.5, small=small, tanh=True),
    # A weaker bias saturates fewer units: df/dx has a radius above 1 at x*, which plain iteration runs away from.
    "tanh_expanding": lambda small: _dense(
        "tanh(Wx+b), radius of W 1.5, weak bias", 1.5, small=small, tanh=True, bias=0.6, newton=True
    ),
    "linear": lambda small: _dense("linear, general W, radius 0.99", 0.99, small=small, tanh=False),
    "linear_symmetric": lambda small: _dense(
        "linear, symmetric W, radius 0.99", 0.99, small=small, tanh=False, symmetric=True
    ),
    "mixed": lambda small: _mixed(16, small),
    "conv": _conv,
    # 64 channels with weights from N(0, 0.02) mix as strongly as 256 with the paper's N(0, 0.01). Training makes them
    # grow.
    "ifpn": lambda small: _ifpn("weights as at the start of training", 0.02, small),
    "ifpn_grown": lambda small: _ifpn("weights grown by half", 0.03, small),
}
"""The problems by name: functions of ``small`` that draw one from the global generator."""

LARGE_PROBLEMS: dict[str, Callable[[bool], _Draft]] = {
    "mixed_batch": lambda small: _mixed(256, small),
    "ifpn_wide": lambda small: _ifpn("weights as at the start of training", 0.01, small, channels=256, image=128),
    "ifpn_large": lambda small: _ifpn("weights as at the start of training", 0.01, small, channels=256, image=256),
}
"""More of them, too large to be solved over and over again."""


def build(
    name: str,
    *,
    seed: int = 0,
    small: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Problem:
    """Draw a problem, solve it in float64 and check the solution.

    Args:
        name: a key of `PROBLEMS` or `LARGE_PROBLEMS`.
        seed: the same seed gives the same problem, whatever the dtype and device.
        small: smaller sizes, for tests.
        dtype: working dtype of f and x0.
        device: where f, x0 and the solution are put; the reference is computed on the CPU.

    Raises:
        ValueError: an unknown name.
        ProblemError: the solution found does not hold, or a package is missing.
    """
    drafts = PROBLEMS | LARGE_PROBLEMS
    if name not in drafts:
        raise ValueError(f"unknown problem {name!r}: choose from {', '.join(drafts)}")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        draft = drafts[name](small)
        exact = copy.deepcopy(draft.module).double().requires_grad_(False)
        solution = _checked_solution(name, draft, exact)
        cheap = isinstance(exact, DenseMap)
        radius = estimate_radius(exact, solution, num_steps=600 if cheap else 24)
    return Problem(
        name=name,
        title=draft.title,
        seed=seed,
        f=draft.module.to(device=device, dtype=dtype).requires_grad_(False),
        x0=tree_map(lambda leaf: leaf.to(device=device, dtype=dtype), draft.x0),
        exact_f=exact.to(device),
        solution=tree_map(lambda leaf: leaf.to(device), solution),
        radius=radius,
    )


def _checked_solution(name: str, draft: _Draft, exact: nn.Module) -> Any:
    solution = draft.solve(exact, to_float64(draft.x0))
    fx = exact(solution)
    residual = (distance(fx, solution) / size(fx)).max().item()
    if not residual <= MAX_RESIDUAL:  # catches NaN as well
        raise ProblemError(f"problem {name}: the reference solution has a relative residual of {residual:.1e}")
    if not draft.linear:
        elsewhere = tree_map(lambda leaf: 0.5 * torch.randn_like(leaf), solution)
        other = draft.solve(exact, elsewhere)
        gap = (distance(other, solution) / size(solution)).max().item()
        if not gap <= MAX_DISAGREEMENT:
            raise ProblemError(
                f"problem {name}: two starting points lead to solutions {gap:.1e} apart, so an error has no meaning"
            )
    return solution
