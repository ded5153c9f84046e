"""L4. SHINE: the inverse Jacobian that the forward solve has built is used once more in the backward pass.

    u = -H^T g,   H ~ (J - I)^-1 after the last step of the forward solve

It costs no vector-Jacobian product, and it is approximate: H fits J in the directions that the forward solve went, and
g points elsewhere. Refinement solves u = J^T u + g from there, with H^T in the place of the first inverse Jacobian:

    u <- u - H^T (J^T u + g - u)

is the map whose fixed point the refining solver seeks. Broyden's method on it is the same as Broyden's method on the
equation itself that starts with the inverse Jacobian H^T, and goes on learning.

Source: Ramzi et al., "SHINE: SHaring the INverse Estimate from the forward pass for bi-level optimization and implicit
models", ICLR 2022, arXiv 2106.00553, sec. 2 and 3 (refinement and fallback).

Deliberate deviations:
* Any multisecant method's inverse will do: that of Anderson acceleration is often the better one.
* The fallback to u = g (JFB) is decided for every sample, by |H^T g| > ratio |g|, as in the paper, but with a ratio of
  3 in the place of 1.3. Where f hardly contracts, |u| is several times |g|, and with 1.3 next to nothing is left of
  SHINE; a runaway inverse has a ratio of tens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from deqkit import linalg
from deqkit.adjoints.approximate import ApproximateAdjoint, Product
from deqkit.adjoints.base import Problem
from deqkit.adjoints.implicit import ImplicitAdjoint
from deqkit.arrays import Array
from deqkit.norms import StateNorm
from deqkit.solvers import Solver, make_backward_solver
from deqkit.solvers.base import require_float, require_int
from deqkit.solvers.inverse_jacobian import InverseJacobian
from deqkit.state import Blocks


@dataclass(frozen=True)
class ShineAdjoint(ApproximateAdjoint):
    """Approximate gradients from the inverse Jacobian of the forward solve.

    Anderson's and Broyden's methods have one. Its two states per pair of the history are kept until the backward pass.

    Args:
        refine_steps: steps of the refinement, each a vector-Jacobian product, and one more at its start; 0 for none.
            With enough of them the gradient is exact, to the relative tolerance of the forward solve. What they reached
            is told by `Solution.adjoint_stats`; that it was less than the tolerance is no failure.
        fallback_ratio: a sample whose |H^T g| exceeds this multiple of |g| falls back to u = g, from which refinement
            then starts as an ordinary solve; infinity for never. Where H^T g is not finite, it always does.
        solver: name or settings of the refining solver.

    Raises:
        ValueError: an unknown solver, one in mixed precision, or a setting out of range.
    """

    name: ClassVar[str] = "shine"
    needs: ClassVar[type | None] = InverseJacobian
    refine_steps: int = 0
    fallback_ratio: float = 3.0
    solver: str | Solver = "broyden"

    def __post_init__(self) -> None:
        require_int(self, "refine_steps", minimum=0)
        require_float(self, "fallback_ratio", 0.0, float("inf"), ends="(]")
        make_backward_solver(self.solver)

    def kept(self, problem: Problem) -> tuple[Tensor, ...]:
        """The inverse Jacobian."""
        return problem.record.tensors

    def cotangent(
        self, problem: Problem, product: Callable[[], Product], g: Blocks, kept: tuple[Tensor, ...]
    ) -> Blocks:
        """-H^T g, or g; refined."""
        inverse = InverseJacobian.from_tensors(kept)
        u = tuple(-b for b in inverse.transposed(g))
        size = linalg.norm(u)
        trusted = (size <= self.fallback_ratio * linalg.norm(g)) & torch.isfinite(size)
        u = linalg.where(trusted, u, g)
        if self.refine_steps == 0:
            return u
        refinement = _Refinement(problem.norm, product(), g, inverse, trusted)
        # Falling short of the tolerance is what an approximation may do.
        problem = replace(problem, norm=refinement.norm, on_failure="ignore")
        refining = ImplicitAdjoint(self.solver, max_steps=self.refine_steps)
        return refining.solve_linear(problem, refinement.map, u, "refinement")


class _Refinement:
    """The map u -> u - H^T r for the residual r = J^T u + g - u, whose size is still that of r.

    Samples in ``trusted`` have an H, the others have the identity in its place.
    """

    def __init__(self, norm: StateNorm, product: Product, g: Blocks, inverse: InverseJacobian, trusted: Tensor) -> None:
        self.norm_of_equation, self.product, self.g = norm, product, g
        self.inverse, self.trusted = inverse, trusted
        self.r, self.image = g, g  # of the last u

    def map(self, u: Blocks) -> Blocks:
        self.image = tuple(torch.add(a, b) for a, b in zip(self.product(u), self.g, strict=True))
        self.r = tuple(torch.sub(a, b) for a, b in zip(self.image, u, strict=True))
        step = linalg.where(self.trusted, tuple(-b for b in self.inverse.transposed(self.r)), self.r)
        return tuple(torch.add(a, b) for a, b in zip(u, step, strict=True))

    def norm(self, r: Blocks, fx: Blocks) -> tuple[Array, Array]:
        """The loop measures each u just after it has been mapped."""
        return self.norm_of_equation(self.r, self.image)
