"""L4. Approximate adjoints that cut the Neumann series of (I - J^T)^-1 short.

    u = sum_{i<k} (J^T)^i g

k = 1 is Jacobian-free backpropagation, JFB (Fung et al., "JFB: Jacobian-Free Backpropagation for Implicit Networks",
AAAI 2022, arXiv 2103.12803). For a contraction with factor c the error of u is at most c^k |g| / (1 - c).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from deqkit.adjoints.approximate import ApproximateAdjoint, Product
from deqkit.adjoints.base import Problem
from deqkit.solvers.base import require_int
from deqkit.state import Blocks


@dataclass(frozen=True)
class NeumannAdjoint(ApproximateAdjoint):
    """Approximate gradients from the first terms of the Neumann series.

    Args:
        num_terms: k, how many terms; the backward pass takes k - 1 vector-Jacobian products beyond the one that every
            adjoint takes.

    Raises:
        ValueError: num_terms below 1.
    """

    name: ClassVar[str] = "neumann"
    has_levels: ClassVar[bool] = True
    num_terms: int = 5

    def __post_init__(self) -> None:
        require_int(self, "num_terms", minimum=1)

    def cotangent(
        self, problem: Problem, product: Callable[[], Product], g: Blocks, kept: tuple[Tensor, ...]
    ) -> Blocks:
        """The first terms of the series."""
        if self.num_terms == 1:
            return g
        transposed = product()
        u = term = g
        for _ in range(self.num_terms - 1):
            term = transposed(term)
            u = tuple(torch.add(a, b) for a, b in zip(u, term, strict=True))
        return u


@dataclass(frozen=True)
class JFB(NeumannAdjoint):
    """Jacobian-free backpropagation: approximate gradients, u = g. The Neumann adjoint with one term."""

    name: ClassVar[str] = "jfb"
    num_terms: int = field(default=1, init=False)
