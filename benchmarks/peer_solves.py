"""Solvers of all libraries on one problem: calls of f, true residual, time, memory, and failures sold as success."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peak_memory import peak_bytes
from peer_solvers import Counted, Map, Outcome, Peer
from problems import Problem
from reporting import timed
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

MAX_CALLS = 200
SLACK = 1.05  # f in the working dtype and f in float64 differ by rounding


@dataclass(frozen=True)
class SolveRow:
    """One solve of one problem by one solver to one tolerance.

    Attributes:
        problem: its name.
        library: where the solver comes from.
        solver: its name there.
        dtype: of the state.
        rtol: the tolerance asked for, of every sample.
        calls: of f, counted.
        residual: of the worst sample, |f(x)-x| / |f(x)| in float64.
        solved: whether that is the tolerance or less.
        claims: whether the library says so; "-" where it says nothing.
        seconds: wall time, median of the repeats; NaN without a clock, and where the problem was not solved.
        ratio: wall time / time of as many bare calls of f, median of the repeats.
        memory: the most that the solve holds at once, in multiples of the state, f's temporaries included; NaN where it
            cannot be seen, or was not asked for.
        call_memory: the same of a single call of f.
    """

    problem: str
    library: str
    solver: str
    dtype: str
    rtol: float
    calls: int
    residual: float
    solved: bool
    claims: str
    seconds: float
    ratio: float
    memory: float
    call_memory: float

    @property
    def is_wrong(self) -> bool:
        """Whether a failure is reported as success."""
        return self.claims == "yes" and not self.solved


class Packed:
    """A problem whose state is one tensor (B, D), which all libraries take."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        leaves, self.spec = tree_flatten(problem.x0)
        self.shapes = [leaf.shape for leaf in leaves]
        self.x0 = self.pack(problem.x0)

    @property
    def state_bytes(self) -> int:
        """The size of the state."""
        return self.x0.numel() * self.x0.element_size()

    def pack(self, x: Any) -> Tensor:
        return torch.cat([leaf.flatten(1) for leaf in tree_flatten(x)[0]], dim=1)

    def unpack(self, x: Tensor) -> Any:
        sizes = [math.prod(shape[1:]) for shape in self.shapes]
        parts = x.split(sizes, dim=1)
        return tree_unflatten([part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)], self.spec)

    def map(self, f: Callable[[Any], Any], x: Tensor) -> Tensor:
        """A map of the problem's states, on a packed one."""
        if len(self.shapes) == 1:
            return f(x.view(self.shapes[0])).flatten(1)
        return self.pack(f(self.unpack(x)))

    def f(self, x: Tensor) -> Tensor:
        """The problem's map on packed states."""
        return self.map(self.problem.f, x)

    def residual(self, x: Tensor) -> float:
        """Relative residual of the worst sample, in float64."""
        return self.problem.relative_residual(self.unpack(x)).max().item()


def compare(
    problem: Problem, dtype: torch.dtype, tolerances: Sequence[float], peers: Sequence[Peer], repeats: int,
    tick: Callable[[int], Any], *, memory: bool = True,
) -> list[SolveRow]:  # fmt: skip
    """Every solver on one problem; the repeats are rounds through those that solve it, there and back in turn.

    Memory takes longer to measure than the solve itself.
    """
    packed = Packed(problem)
    cases = [(peer, rtol) for rtol in tolerances for peer in peers]
    seconds: dict[Any, list[float]] = {case: [] for case in cases}
    ratios: dict[Any, list[float]] = {case: [] for case in cases}
    found: dict[Any, tuple[int, float, bool | None, float]] = {}
    call_memory = math.nan
    if memory:
        call_memory = peak_bytes(lambda: packed.f(packed.x0), packed.x0.device) / packed.state_bytes
    for peer, rtol in cases:
        counted = Counted(packed.f)
        outcome, peak = _watched(packed, peer, memory, lambda: peer.run(counted, packed.x0, rtol, MAX_CALLS))  # noqa: B023
        found[peer, rtol] = (counted.calls, packed.residual(outcome.x), outcome.claims, peak)
        tick(1)
    able = [case for case in cases if found[case][1] <= SLACK * case[1]]
    for round_ in range(repeats):
        bare = timed(lambda: repeat(packed.f, packed.x0, 20), packed.x0.device) / 20
        for peer, rtol in able if round_ % 2 == 0 else reversed(able):
            solve = lambda peer=peer, rtol=rtol: peer.run(packed.f, packed.x0, rtol, MAX_CALLS)  # noqa: E731
            duration = timed(solve, packed.x0.device)
            seconds[peer, rtol].append(duration)
            ratios[peer, rtol].append(duration / (bare * found[peer, rtol][0]))
        tick(len(cases))
    return [
        SolveRow(
            problem.name, peer.library, peer.solver, str(dtype).removeprefix("torch."), rtol, calls, residual,
            residual <= SLACK * rtol, {True: "yes", False: "no", None: "-"}[claims],
            median(seconds[peer, rtol]), median(ratios[peer, rtol]), peak, call_memory,
        )
        for (peer, rtol), (calls, residual, claims, peak) in found.items()
    ]  # fmt: skip


def _watched(packed: Packed, peer: Peer, memory: bool, solve: Callable[[], Outcome]) -> tuple[Outcome, float]:
    """What a solve comes back with, and its peak memory in states, if that is wanted and can be seen."""
    if not memory or peer.keeps == "jax":
        return solve(), math.nan
    outcomes: list[Outcome] = []
    peak = peak_bytes(lambda: outcomes.append(solve()), packed.x0.device, numpy=peer.keeps == "numpy")
    return outcomes[0], peak / packed.state_bytes


def repeat(f: Map, x: Tensor, times: int) -> None:
    for _ in range(times):
        x = f(x)


def median(values: Sequence[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else math.nan
