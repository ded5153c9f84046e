"""L2. Broyden's good method with limited memory.

It seeks the root of F(x) = f(x) - x with an inverse Jacobian H, H_0 = -I (so the first step is the plain one):

    x_{k+1} = x_k - H_k F(x_k)
    H_{k+1} = H_k + (dx - H_k dF) (dx^T H_k) / (dx^T H_k dF)

Kept is not H but the last m pairs (dx_i, dF_i). The updates that they make, oldest first, starting from -I, have the
compact form

    H = -I + (S + Y) (S^T Y + L)^-1 S^T,
    S = [dx_i], Y = [dF_i],  L = strictly lower triangle (younger row, older column) of S^T S,

which follows from the compact form of the direct update with the Sherman-Morrison-Woodbury identity.
Source: Broyden, Math. Comp. 19 (1965); Byrd, Nocedal & Schnabel, "Representations of quasi-Newton matrices and their
use in limited memory methods", Math. Programming 63 (1994), sec. 7.

Deliberate deviations:
* Dropping the oldest pair leaves exactly the matrix that the remaining updates define: the newest secant equation
  H dF = dx always holds. (Overwriting a slot of the usual product form breaks all of them.)
* Pairs are divided by |dx_i|, which leaves H as it is and keeps the small system well scaled.
* Per-sample safeguards as in `deqkit.solvers.anderson`.

Legend: B samples, m history, n <= m columns in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deqkit import linalg
from deqkit.solvers.base import Point, Safeguard, Solver, require_float, require_int
from deqkit.state import Blocks


@dataclass(frozen=True)
class Broyden(Solver):
    """Limited-memory Broyden (good) method.

    Args:
        history: m, how many past pairs define the inverse Jacobian.
        restart_factor: a sample forgets its history when its distance from the tolerance exceeds this multiple of its
            best one. Broyden's residuals rise on the way even where it converges, so this should not be small.
        check_every: see `Solver`.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "broyden"
    history: int = 50
    restart_factor: float = 1000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int(self, "history", minimum=1)
        require_float(self, "restart_factor", 1.0, float("inf"), ends="[]")

    def start(self) -> _State:
        """A fresh state for one solve."""
        return _State(self)


class _State:
    """Last point, and the ring of normalised pairs with the two small matrices."""

    def __init__(self, settings: Broyden) -> None:
        self.settings = settings
        self.last: Point | None = None
        self.s = linalg.History(settings.history)  # dx
        self.z = linalg.History(settings.history)  # dx + dF, the change of f
        self.ss: Tensor  # S^T S
        self.sz: Tensor  # S^T (S + Y)
        self.safeguard: Safeguard

    def step(self, point: Point) -> Blocks:
        if self.last is None:
            self._allocate(point)
        else:
            self.safeguard.restart(point.distance)
            self._remember(point, self.last)
        self.last = point
        if self.s.count == 0:
            return tuple(fx.clone() for fx in point.fx)
        return self.z.subtract_combination(point.fx, self._coefficients(point))

    def _allocate(self, point: Point) -> None:
        m, x = self.settings.history, point.x[0]
        dtype = linalg.small_dtype(x.device)
        self.ss = torch.zeros(x.shape[0], m, m, dtype=dtype, device=x.device)
        self.sz = torch.zeros_like(self.ss)
        self.safeguard = Safeguard(m, self.settings.restart_factor, point.distance)

    def _remember(self, point: Point, last: Point) -> None:
        slot = self.s.next_slot
        dx = tuple(torch.sub(a, b) for a, b in zip(point.x, last.x, strict=True))
        df = tuple(torch.sub(a, b) for a, b in zip(point.fx, last.fx, strict=True))
        factor, good = linalg.inverse_size(linalg.norm(dx), dx[0].dtype)
        good = good & torch.isfinite(point.residual)
        factor = torch.where(good, factor, 0.0)
        s, z = linalg.scale(dx, factor), linalg.scale(df, factor)
        self.s.push(s)
        self.z.push(z)
        dtype = self.ss.dtype
        s_s, s_z, z_s = self.s.dot(s).to(dtype), self.s.dot(z).to(dtype), self.z.dot(s).to(dtype)
        self.ss = linalg.write_column(linalg.write_row(self.ss, slot, s_s), slot, s_s)
        self.sz = linalg.write_column(linalg.write_row(self.sz, slot, z_s), slot, s_z)
        self.safeguard.admit(slot, good)

    def _coefficients(self, point: Point) -> Tensor:
        """(S^T Y + L)^-1 S^T F, (B, n): zero for columns not usable, and for samples whose small system fails."""
        n = self.s.num_columns
        usable = self.safeguard.usable[:, :n]
        right = torch.where(usable, self.s.dot(point.r).to(self.ss.dtype), 0.0)
        # S^T Y + L = S^T Z - (S^T S without its strictly lower triangle by age)
        ss, sz = self.ss[:, :n, :n], self.sz[:, :n, :n]
        system = sz - torch.where(self._not_younger(n, right.device), ss, 0.0)
        both = usable.unsqueeze(1) & usable.unsqueeze(2)
        identity = torch.eye(n, dtype=right.dtype, device=right.device)
        system = torch.where(both, system, identity)
        gamma, info = torch.linalg.solve_ex(system, right.unsqueeze(2))
        gamma = gamma.squeeze(2)
        good = (info == 0) & torch.isfinite(gamma).all(dim=1)
        return torch.where(good.unsqueeze(1), gamma, 0.0)

    def _not_younger(self, n: int, device: torch.device) -> Tensor:
        """(n, n): whether the pair in the row is as old as the one in the column, or older."""
        newest = (self.s.count - 1) % self.s.size
        age = (newest - torch.arange(n, device=device)) % self.s.size
        return age.unsqueeze(1) >= age.unsqueeze(0)
