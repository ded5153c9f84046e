"""L2. The inverse Jacobian that a multisecant method ends with, sample by sample.

    H = -beta I + (S + beta Y) M^-1 W^T,   about (df/dx - I)^-1

See `deqkit.solvers.multisecant` for the matrices.

Legend: B samples, d numbers of a leaf, n pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deqkit.state import Blocks


@dataclass(frozen=True)
class InverseJacobian:
    """H, in the memory of 2 n states.

    Attributes:
        left: W, (B, n, d) per leaf; none where there are no pairs.
        move: S + beta Y, likewise.
        system: M, (B, n, n), zero between a pair that is usable and one that is not.
        usable: which pairs count for which sample, (B, n).
        mixing: beta, ().
    """

    left: Blocks
    move: Blocks
    system: Tensor
    usable: Tensor
    mixing: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All there is, for `from_tensors`."""
        return (*self.left, *self.move, self.system, self.usable, self.mixing)

    @classmethod
    def from_tensors(cls, tensors: tuple[Tensor, ...]) -> InverseJacobian:
        """The one with these `tensors`."""
        *columns, system, usable, mixing = tensors
        half = len(columns) // 2
        return cls(tuple(columns[:half]), tuple(columns[half:]), system, usable, mixing)

    def transposed(self, g: Blocks) -> Blocks:
        """H^T g; a sample whose system cannot be solved gets -beta g."""
        base = tuple(-self.mixing * b for b in g)
        if not self.left:
            return base
        products = [torch.bmm(b.unsqueeze(1), h.transpose(1, 2)).squeeze(1) for h, b in zip(self.move, g, strict=True)]
        right = torch.where(self.usable, sum(products[1:], start=products[0]).to(self.system.dtype), 0.0)
        gamma, info = torch.linalg.solve_ex(self.system.transpose(1, 2), right.unsqueeze(2))
        gamma = gamma.squeeze(2)
        good = (info == 0) & torch.isfinite(gamma).all(dim=1)
        weights = torch.where(good.unsqueeze(1), gamma, 0.0).to(base[0].dtype).unsqueeze(1)
        rows = (torch.baddbmm(b.unsqueeze(1), weights, h) for h, b in zip(self.left, base, strict=True))
        return tuple(row.squeeze(1) for row in rows)
