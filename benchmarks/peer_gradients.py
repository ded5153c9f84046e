"""Adjoints of all libraries on one problem: how wrong the gradient is, what it costs, and whether anything warned.

The loss is linear in the fixed point, with a random cotangent g, so that the exact gradient u^T df/dtheta with
u = (I - J^T)^-1 g belongs to the problem alone. It is computed in float64 at the known solution: by a dense solve where
the Jacobian is at hand, else by GMRES, and either way u is checked in the equation. It is taken towards everything that
f depends on: weights, and what is injected.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peak_memory import peak_bytes
from peer_adjoints import PeerAdjoint
from peer_solves import MAX_CALLS, Packed, median, repeat
from problems import DenseMap, Problem, ProblemError, size
from reporting import timed
from torch import Tensor, nn

import deqkit

WRONG = 0.05  # relative error from which on a gradient that is meant to be exact is called wrong
MAX_RESIDUAL = 1e-10  # relative, of u in its equation


@dataclass(frozen=True)
class GradientRow:
    """One gradient of one problem by one adjoint.

    Attributes:
        problem: its name.
        library: where the adjoint comes from.
        adjoint: its name there.
        dtype: of the state.
        rtol: the tolerance of the forward solve, and of the adjoint solve where it can be set.
        exact: whether it is meant to be exact.
        cosine: of the angle to the exact gradient, over all tensors together; NaN where a number in it is not finite.
        relative_error: |gradient - exact| / |exact|; likewise.
        residual: of the fixed point that it belongs to, worst sample, in float64.
        warned: whether the library warned that something did not converge, or failed.
        calls: of f, forward and backward.
        calls_backward: of f in the backward pass.
        passes: backward passes through f, each a vector-Jacobian product or a gradient of the weights.
        seconds: wall time forward and backward, median of the repeats; NaN without a clock.
        ratio: wall time / time of as many bare calls of f and vector-Jacobian products, median of the repeats.
        memory: the most that is held at once, in multiples of the state, gradients and f's temporaries included.
        failure: the error that ended it; empty where there was none.
    """

    problem: str
    library: str
    adjoint: str
    dtype: str
    rtol: float
    exact: bool
    cosine: float
    relative_error: float
    residual: float
    warned: bool
    calls: int
    calls_backward: int
    passes: int
    seconds: float
    ratio: float
    memory: float
    failure: str

    @property
    def is_wrong(self) -> bool:
        """Whether a gradient that is meant to be exact is wrong, and nothing has warned."""
        return self.exact and not self.warned and not self.relative_error <= WRONG


class Layer(nn.Module):
    """A map on packed states, with all that it depends on as parameters; it counts calls and backward passes.

    Attributes:
        counts: "calls" and "passes", while ``counting``.
        state_size: norm of the smallest sample at the solution, for those whose tolerance is absolute.
    """

    def __init__(self, packed: Packed, f: nn.Module) -> None:
        super().__init__()
        self.f = copy.deepcopy(f)
        for module in self.f.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_floating_point():
                    delattr(module, name)
                    module.register_parameter(name, nn.Parameter(buffer))
        self.requires_grad_()
        self.counts = {"calls": 0, "passes": 0}
        self.counting = False
        self.state_size = size(packed.problem.solution).min().item()
        self._packed = packed

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        if not self.counting:
            return self._packed.map(self.f, x)
        self.counts["calls"] += (
            1  # before: checkpoints break a second evaluation off as soon as they have what they need
        )
        return _CountPasses.apply(self._packed.map(self.f, x), self.counts)


class _CountPasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: dict[str, int]) -> Tensor:
        ctx.counts = counts
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.counts["passes"] += 1
        return gradients[0], None


class Task:
    """A problem, what is differentiated, and the right answer.

    Args:
        problem: the problem.
        seed: of the cotangent.

    Raises:
        ProblemError: the exact gradient cannot be had.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem, self.packed = problem, Packed(problem)
        generator = torch.Generator().manual_seed(seed)
        x = self.packed.pack(problem.solution)
        g = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        self.layer = Layer(self.packed, _module(problem.f))
        self.tensors = list(self.layer.parameters())
        self.cotangent = g.to(self.packed.x0.dtype)
        self.exact = self._exact_gradient(Layer(self.packed, _module(problem.exact_f)), x, g)

    def _exact_gradient(self, layer: Layer, x: Tensor, g: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            fx = layer(x)

        def adjoint_map(u: Tensor) -> Tensor:
            return torch.autograd.grad(fx, x, u, retain_graph=True)[0] + g

        if isinstance(layer.f, DenseMap):
            with torch.no_grad():
                scale, weight = layer.f.scale, layer.f.weight
                slopes = scale * (1 - fx**2) if layer.f.tanh else scale.expand_as(x)
                identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
                systems = (identity - (slope.unsqueeze(1) * weight).T for slope in slopes)
                u = torch.stack([torch.linalg.solve(system, b) for system, b in zip(systems, g, strict=True)])
        else:
            limits = {"rtol": 0.01 * MAX_RESIDUAL, "max_steps": 2000, "on_failure": "ignore"}
            with torch.no_grad():
                u = deqkit.solve(adjoint_map, g, solver="gmres", **limits).value
        residual = ((adjoint_map(u) - u).norm() / u.norm()).item()
        if not residual <= MAX_RESIDUAL:
            raise ProblemError(f"problem {self.problem.name}: the exact adjoint has a residual of {residual:.1e}")
        return flat(torch.autograd.grad(fx, list(layer.parameters()), u))

    def run(self, adjoint: PeerAdjoint, rtol: float) -> tuple[Tensor, Tensor, int]:
        """The fixed point, its gradient in float64, and the calls of f before the backward pass."""
        with torch.enable_grad():
            x = adjoint.run(self.layer, self.packed.x0, rtol, MAX_CALLS)
            calls = self.layer.counts["calls"]
            found = torch.autograd.grad(x, self.tensors, self.cotangent.view_as(x), allow_unused=True)
        missing = [torch.zeros_like(t) if g is None else g for g, t in zip(found, self.tensors, strict=True)]
        return x.detach(), flat(missing), calls

    def bare_seconds(self) -> tuple[float, float]:
        """Time of a bare call of f, and of a vector-Jacobian product."""
        device = self.packed.x0.device
        with torch.no_grad():
            call = timed(lambda: repeat(self.layer, self.packed.x0, 20), device) / 20
        x = self.packed.x0.detach().requires_grad_()
        with torch.enable_grad():
            fx = self.layer(x)

        def products() -> None:
            u = self.cotangent
            for _ in range(10):
                u = torch.autograd.grad(fx, x, u, retain_graph=True)[0]

        return call, timed(products, device) / 10


def compare_gradients(
    task: Task, dtype: torch.dtype, rtol: float, adjoints: Sequence[PeerAdjoint], repeats: int,
    tick: Callable[[int], Any],
) -> list[GradientRow]:  # fmt: skip
    """Every adjoint on one problem; the repeats are rounds through all of them, forwards and backwards in turn."""
    rows = {}
    for adjoint in adjoints:
        rows[adjoint] = _judge(task, dtype, rtol, adjoint)
        tick(1)
    able = [adjoint for adjoint in adjoints if not rows[adjoint].failure]
    seconds: dict[PeerAdjoint, list[float]] = {adjoint: [] for adjoint in adjoints}
    ratios: dict[PeerAdjoint, list[float]] = {adjoint: [] for adjoint in adjoints}
    for round_ in range(repeats):
        call, product = task.bare_seconds()
        for adjoint in able if round_ % 2 == 0 else reversed(able):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                duration = timed(lambda adjoint=adjoint: task.run(adjoint, rtol), task.packed.x0.device)
            seconds[adjoint].append(duration)
            ratios[adjoint].append(duration / (call * rows[adjoint].calls + product * rows[adjoint].passes))
        tick(len(adjoints))
    return [replace(rows[a], seconds=median(seconds[a]), ratio=median(ratios[a])) for a in adjoints]


def _judge(task: Task, dtype: torch.dtype, rtol: float, adjoint: PeerAdjoint) -> GradientRow:
    layer, failure, memory = task.layer, "", math.nan
    layer.counts.update(calls=0, passes=0)
    x, gradient, forward = task.packed.x0, torch.full_like(task.exact, math.nan), 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            layer.counting = True
            x, gradient, forward = task.run(adjoint, rtol)
            layer.counting = False
            memory = peak_bytes(lambda: task.run(adjoint, rtol), x.device) / task.packed.state_bytes
        except Exception as error:  # of any library; a row of its own tells
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            layer.counting = False
    warned = bool(failure) or any(_tells_failure(warning) for warning in caught)
    length = task.exact.norm()
    cosine = torch.dot(gradient, task.exact) / (length * gradient.norm()).clamp(min=torch.finfo(length.dtype).tiny)
    return GradientRow(
        task.problem.name, adjoint.library, adjoint.name, str(dtype).removeprefix("torch."), rtol, adjoint.exact,
        cosine.item(), ((gradient - task.exact).norm() / length).item(), task.packed.residual(x), warned,
        layer.counts["calls"], layer.counts["calls"] - forward, layer.counts["passes"],
        math.nan, math.nan, memory, failure,
    )  # fmt: skip


def _tells_failure(warning: warnings.WarningMessage) -> bool:
    return "converge" in f"{warning.category.__name__} {warning.message}".lower()


def _module(f: Callable[[Any], Any]) -> nn.Module:
    if not isinstance(f, nn.Module):
        raise TypeError(f"the map of a problem must be a module to be differentiated, got {f!r}")
    return f


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers as one float64 vector."""
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])
