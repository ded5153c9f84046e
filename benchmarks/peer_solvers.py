"""The solvers of other libraries behind one call, so that all can be given the same f, start and stopping rule.

A state is packed as (B, D) here, samples by numbers, which is what every library can take. The rule is that of
`deqkit.solve`: every sample at |f(x) - x| <= rtol * |f(x)|. torchdeq and deqkit have it themselves. The others test
something else, over the whole batch: they are stopped from within f as soon as the point that f is asked for meets the
rule, and have no criterion of their own. Those that compute with NumPy or JAX call back into f; jaxopt's loops are
compiled, once per solver and shape, before they are timed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import deqkit

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a solver came back with.

    Attributes:
        x: (B, D).
        claims: whether it says that all samples converged; None where it says nothing.
    """

    x: Tensor
    claims: bool | None


@dataclass(frozen=True)
class Peer:
    """A solver.

    Attributes:
        library: where it comes from.
        solver: its name there.
        run: ``run(f, x0, rtol, max_calls)``.
        joint: whether the batch is one system to it.
        keeps: what it keeps its numbers in: "torch", "numpy", or "jax", whose memory cannot be seen.
    """

    library: str
    solver: str
    run: Callable[[Map, Tensor, float, int], Outcome]
    joint: bool = False
    keeps: str = "torch"

    @property
    def label(self) -> str:
        """Library and solver."""
        return f"{self.library} {self.solver}"


class Counted:
    """f, counting its calls."""

    def __init__(self, f: Map) -> None:
        self.f, self.calls = f, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.f(x)


class _Solved(Exception):
    """Carries the point out of a solver that does not know when to stop."""


class _Watched:
    """f, which ends the solve when it is asked for a point that meets the rule, or too often."""

    def __init__(self, f: Map, rtol: float, max_calls: int) -> None:
        self.f, self.rtol, self.max_calls = f, rtol, max_calls
        self.calls, self.best, self.best_ratio = 0, torch.empty(0), torch.inf

    def __call__(self, x: Tensor) -> Tensor:
        fx = self.f(x)
        self.calls += 1
        ratio = ((fx - x).norm(dim=1) / fx.norm(dim=1)).max().item()
        if ratio < self.best_ratio or self.calls == 1:  # also where the first is not a number
            self.best, self.best_ratio = x.clone(), ratio
        if ratio <= self.rtol or self.calls >= self.max_calls:
            raise _Solved
        return fx


def all_peers() -> list[Peer]:
    """Those of deqkit, and those of every other library that is installed."""
    peers = [Peer("deqkit", name, _deqkit(name)) for name in ("fixed_point", "anderson", "broyden", "auto")]
    for library, make in (
        ("torchdeq", _torchdeq_peers),
        ("scipy", _scipy_peers),
        ("xitorch", _xitorch_peers),
        ("deepinv", _deepinv_peers),
        ("jaxopt", _jaxopt_peers),
    ):
        if importlib.util.find_spec(library) is not None:
            peers += make()
    return peers


def _deqkit(name: str) -> Callable[[Map, Tensor, float, int], Outcome]:
    def run(f: Map, x0: Tensor, rtol: float, max_calls: int) -> Outcome:
        solution = deqkit.solve(f, x0, solver=name, rtol=rtol, max_steps=max_calls - 1, on_failure="ignore")
        return Outcome(solution.value, bool(solution.converged.all()))

    return run


def _torchdeq_peers() -> list[Peer]:
    def peer(name: str) -> Callable[[Map, Tensor, float, int], Outcome]:
        def run(f: Map, x0: Tensor, rtol: float, max_calls: int) -> Outcome:
            from torchdeq.solver import get_solver

            x, _, info = get_solver(name)(f, x0, max_iter=max_calls - 1, tol=rtol, stop_mode="rel")
            return Outcome(x, bool((info["rel_lowest"] <= rtol).all()))

        return run

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torchdeq")
    return [Peer("torchdeq", name, peer(name)) for name in ("fixed_point_iter", "anderson", "broyden")]


def _stopped(solve: Callable[[Map], Any]) -> Callable[[Map, Tensor, float, int], Outcome]:
    """A solver without the rule, given an f that has it."""

    def run(f: Map, x0: Tensor, rtol: float, max_calls: int) -> Outcome:
        watched = _Watched(f, rtol, max_calls)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                solve(_Start(watched, x0))
            except Exception:  # a library may wrap what comes out of f, or give up by itself
                if not watched.calls:
                    raise
        return Outcome(watched.best, None)

    return run


class _Start:
    """f with the start at its side, for solvers that take both."""

    def __init__(self, f: Map, x0: Tensor) -> None:
        self.f, self.x0 = f, x0

    def __call__(self, x: Tensor) -> Tensor:
        return self.f(x)


def _scipy_peers() -> list[Peer]:
    def peer(name: str, **options: Any) -> Callable[[Any], Any]:
        def solve(f: Any) -> None:
            import numpy as np
            from scipy import optimize

            shape, dtype = f.x0.shape, f.x0.dtype

            def residual(flat: Any) -> Any:
                x = torch.as_tensor(np.asarray(flat), dtype=dtype, device=f.x0.device).reshape(shape)
                return (f(x) - x).double().reshape(-1).cpu().numpy()

            start = f.x0.double().reshape(-1).cpu().numpy()
            getattr(optimize, name)(residual, start, maxiter=10**6, f_tol=1e-300, **options)

        return solve

    kinds = {"anderson": {"M": 5}, "broyden1": {}, "newton_krylov": {}}
    return [
        Peer("scipy", name, _stopped(peer(name, **options)), joint=True, keeps="numpy")
        for name, options in kinds.items()
    ]


def _xitorch_peers() -> list[Peer]:
    def peer(method: str) -> Callable[[Any], Any]:
        def solve(f: Any) -> None:
            optimize = importlib.import_module("xitorch.optimize")
            optimize.equilibrium(lambda x: f(x), f.x0, method=method, maxiter=10**6, f_tol=0.0, x_tol=0.0)

        return solve

    return [Peer("xitorch", name, _stopped(peer(name)), joint=True) for name in ("broyden1", "anderson_acc")]


def _deepinv_peers() -> list[Peer]:
    def solve(f: Any) -> None:
        optim = importlib.import_module("deepinv.optim")
        fixed_point = importlib.import_module("deepinv.optim.fixed_point")

        class Step(torch.nn.Module):
            has_cost, cost_fn = False, None

            def forward(self, X: dict[str, Any], *_: Any) -> dict[str, Any]:
                return {"est": (f(X["est"][0]),), "cost": None}

        solver = fixed_point.FixedPoint(
            Step(),
            init_iterate_fn=lambda *_, **__: {"est": (f.x0,), "cost": None},
            max_iter=10**6,
            early_stop=False,
            anderson_acceleration_config=optim.AndersonAccelerationConfig(),
        )
        solver(None, None)

    return [Peer("deepinv", "anderson", _stopped(solve))]


class _Compiled:
    """A solver of jaxopt, compiled with a callback in the place of f; the f of the solve under way is put in there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.f: Any = None
        self.loops: dict[Any, Callable[[Any], Any]] = {}

    def __call__(self, f: Any) -> None:
        import numpy as np

        jax = importlib.import_module("jax")
        start = f.x0.cpu().numpy()
        key = (start.shape, start.dtype)
        self.f, log = f, logging.getLogger("jax._src.callback")
        level = log.level
        log.setLevel(logging.CRITICAL + 1)  # the end of the solve, raised from within f, is no failure
        try:
            with jax.enable_x64(start.dtype == np.float64):
                if key not in self.loops:
                    self.loops[key] = self._compile(start)
                jax.block_until_ready(self.loops[key](start))
        finally:
            log.setLevel(level)

    def _compile(self, start: Any) -> Callable[[Any], Any]:
        import numpy as np

        jax, jaxopt = importlib.import_module("jax"), importlib.import_module("jaxopt")
        shape = jax.ShapeDtypeStruct(start.shape, start.dtype)

        def call(x: Any) -> Any:
            with torch.no_grad():  # a thread of its own
                return self.f(torch.from_numpy(np.array(x)).to(self.f.x0.device)).cpu().numpy()

        solver = getattr(jaxopt, self.name)(
            lambda x: jax.pure_callback(call, shape, x), maxiter=10**6, tol=0.0, implicit_diff=False, jit=True
        )
        return jax.jit(lambda x: solver.run(x).params).lower(start).compile()


def _jaxopt_peers() -> list[Peer]:
    names = ("FixedPointIteration", "AndersonAcceleration")  # its Broyden differentiates f, which a callback does not
    return [Peer("jaxopt", name, _stopped(_Compiled(name)), joint=True, keeps="jax") for name in names]
