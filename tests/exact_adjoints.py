"""The exact adjoints at tolerances fit for finite differences, and a small solve to differentiate."""

from __future__ import annotations

from typing import Any

import torch
from equations import tanh, tanh_layer

import deqkit

EXACT = {
    "implicit_fixed_point": deqkit.ImplicitAdjoint("fixed_point", rtol=1e-13, max_steps=400),
    "implicit_anderson": deqkit.ImplicitAdjoint("anderson", rtol=1e-13, max_steps=100),
    "implicit_broyden": deqkit.ImplicitAdjoint("broyden", rtol=1e-13, max_steps=100),
    "implicit_newton_krylov": deqkit.ImplicitAdjoint("newton_krylov", rtol=1e-13, max_steps=100),
    "implicit_gmres": deqkit.ImplicitAdjoint("gmres", rtol=1e-13, max_steps=100),
    "implicit_bicgstab": deqkit.ImplicitAdjoint("bicgstab", rtol=1e-13, max_steps=100),
    "unrolled": deqkit.UnrolledAdjoint(),
    "unrolled_checkpointed": deqkit.UnrolledAdjoint(checkpoint=True),
}
TIGHT = {"rtol": 1e-13, "max_steps": 200, "on_failure": "ignore"}


def inputs(n: int = 3, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = tanh(n, batch, radius=0.6).args
    return a.clone().requires_grad_(), b.clone().requires_grad_()


def value(a: torch.Tensor, b: torch.Tensor, adjoint: Any, solver: str = "anderson") -> torch.Tensor:
    return deqkit.solve(tanh_layer, torch.zeros_like(b), args=(a, b), adjoint=adjoint, solver=solver, **TIGHT).value
