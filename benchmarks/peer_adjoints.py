"""The ways to differentiate through a fixed point, of all libraries behind one call.

Each takes a layer (`peer_gradients.Layer`), a module from packed states (B, D) to packed states, solves by a solver of
its library and hands out the fixed point with its graph. Tolerances of the adjoint solve are those of the forward one
where a library lets them be set. torchdeq and deqkit stop by the rule of `deqkit.solve`; the others are given the
nearest that they have: xitorch a norm of the whole batch that implies the rule, deepinv the mean over the batch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import deqkit

BACKWARD_SOLVERS = ("anderson", "fixed_point", "broyden", "gmres", "bicgstab", "newton_krylov", "auto")

Attach = Callable[[Any, Tensor, float, int], Tensor]


@dataclass(frozen=True)
class PeerAdjoint:
    """A way to differentiate.

    Attributes:
        library: where it comes from.
        name: its name there, with the solver of the backward pass in brackets.
        run: ``run(layer, x0, rtol, max_calls)``, the fixed point with its graph.
        exact: whether it is meant to be exact; the others say in their names that they are not.
    """

    library: str
    name: str
    run: Attach
    exact: bool

    @property
    def label(self) -> str:
        """Library and name."""
        return f"{self.library} {self.name}"


def all_adjoints() -> list[PeerAdjoint]:
    """Those of deqkit, and those of every other library that is installed."""
    adjoints = _deqkit_adjoints()
    for library, make in (
        ("torchdeq", _torchdeq_adjoints),
        ("xitorch", _xitorch_adjoints),
        ("deepinv", _deepinv_adjoints),
    ):
        if importlib.util.find_spec(library) is not None:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(library)
            adjoints += make()
    return adjoints


def _deqkit_adjoints() -> list[PeerAdjoint]:
    def make(name: str, adjoint: Any, solver: str = "anderson", exact: bool = True) -> PeerAdjoint:
        def run(layer: Any, x0: Tensor, rtol: float, max_calls: int) -> Tensor:
            return deqkit.solve(layer, x0, solver=solver, adjoint=adjoint, rtol=rtol, max_steps=max_calls - 1).value

        return PeerAdjoint("deqkit", name, run, exact)

    return [
        *(make(f"implicit ({solver})", deqkit.ImplicitAdjoint(solver)) for solver in BACKWARD_SOLVERS),
        make("unrolled", deqkit.UnrolledAdjoint()),
        make("unrolled, checkpoints", deqkit.UnrolledAdjoint(checkpoint=True)),
        make("reversible", deqkit.ReversibleAdjoint(), solver="reversible"),
        make("shine", deqkit.ShineAdjoint(), exact=False),
        make("shine, 5 refinements", deqkit.ShineAdjoint(refine_steps=5), exact=False),
        make("neumann, 5 terms", deqkit.NeumannAdjoint(num_terms=5), exact=False),
        make("phantom, 5 steps", deqkit.PhantomAdjoint(num_steps=5), exact=False),
        make("jfb", deqkit.JFB(), exact=False),
    ]


def _torchdeq_adjoints() -> list[PeerAdjoint]:
    def make(name: str, exact: bool, f_solver: str = "anderson", **settings: Any) -> PeerAdjoint:
        def run(layer: Any, x0: Tensor, rtol: float, max_calls: int) -> Tensor:
            limits = {"f_max_iter": max_calls - 1, "b_max_iter": max_calls - 1, "f_tol": rtol, "b_tol": rtol}
            modes = {"f_solver": f_solver, "f_stop_mode": "rel", "b_stop_mode": "rel"}
            deq = importlib.import_module("torchdeq").get_deq(**limits, **modes, **settings)
            return deq(layer, x0)[0][-1]

        return PeerAdjoint("torchdeq", name, run, exact)

    # The forward solve is that of its solver which needs the fewest calls.
    return [
        *(
            make(f"IFT ({solver})", True, "broyden", ift=True, b_solver=solver)
            for solver in ("fixed_point_iter", "anderson", "broyden")
        ),
        make("IFT by hook (broyden)", True, "broyden", hook_ift=True, b_solver="broyden"),
        make("phantom, 5 steps", False, "broyden", grad=5, tau=0.5),
        make("phantom, 1 step", False, "broyden", grad=1),
    ]


def _xitorch_adjoints() -> list[PeerAdjoint]:
    def make(method: str) -> PeerAdjoint:
        def run(layer: Any, x0: Tensor, rtol: float, max_calls: int) -> Tensor:
            optimize = importlib.import_module("xitorch.optimize")
            options = {"f_tol": rtol * layer.state_size, "x_tol": float("inf"), "maxiter": max_calls}
            backward = {"method": method, "rtol": rtol, "max_niter": max_calls}
            return optimize.equilibrium(layer.forward, x0, method="anderson_acc", bck_options=backward, **options)

        return PeerAdjoint("xitorch", f"implicit ({method})", run, True)

    return [make("bicgstab"), make("gmres")]


def _deepinv_adjoints() -> list[PeerAdjoint]:
    def make(name: str, exact: bool, **settings: Any) -> PeerAdjoint:
        def run(layer: Any, x0: Tensor, rtol: float, max_calls: int) -> Tensor:
            optim = importlib.import_module("deepinv.optim")

            class Step(optim.OptimIterator):
                def forward(self, X: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
                    return {"est": (layer(X["est"][0]),), "cost": None}

            config = optim.DEQConfig(max_iter_backward=max_calls, **settings)
            solver = optim.BaseOptim(
                Step(), max_iter=max_calls, thres_conv=rtol, early_stop=True, DEQ=config, anderson_acceleration=True,
                trainable_params=[],
            )  # fmt: skip
            return solver(x0, None, init=x0)

        return PeerAdjoint("deepinv", name, run, exact)

    return [
        make("DEQ (fixed point)", True),
        make("DEQ (anderson)", True, anderson_acceleration_backward=True),
        make("DEQ, jacobian_free", False, jacobian_free=True),
    ]
