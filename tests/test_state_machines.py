"""What changes from step to step, against models that are slow and plain: histories, small systems, the ledger."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import deqkit
from deqkit import Status, arrays, linalg
from deqkit.ledger import Ledger, LoopResult
from deqkit.linalg import History, Scaling
from deqkit.solvers.base import Measured, Point
from deqkit.solvers.inverse_jacobian import InverseJacobian
from deqkit.termination import Termination

B, WIDTHS = 2, (3, 2)  # samples, and the numbers of each leaf
SEEDS = st.integers(0, 2**31 - 1)
MACHINE = settings(max_examples=40, stateful_step_count=25, deadline=None, derandomize=True)


def random_state(seed: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, d, dtype=torch.float64, generator=g) for d in WIDTHS)


def joined(blocks: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(blocks, dim=1)


class HistoryMachine(RuleBasedStateMachine):
    """`History` against a list of all vectors ever pushed, of which the last m count."""

    @initialize(size=st.integers(1, 7), small=st.booleans())
    def begin(self, size: int, small: bool) -> None:
        self.size, self.pushed = size, []
        self.history = History(size)
        # A limit of nothing makes every buffer a large one, beside which the next is put.
        self.limits = linalg._SMALL_BUFFER, linalg._LARGE_BUFFER
        linalg._SMALL_BUFFER, linalg._LARGE_BUFFER = self.limits if small else (0, 0)

    def teardown(self) -> None:
        linalg._SMALL_BUFFER, linalg._LARGE_BUFFER = self.limits

    @rule(
        seed=SEEDS,
        good=st.tuples(st.booleans(), st.booleans()),
        with_grad=st.booleans(),
        bad=st.sampled_from([math.nan, math.inf, 1.0]),
    )
    def push(self, seed: int, good: tuple[bool, bool], with_grad: bool, bad: float) -> None:
        vector, mask = random_state(seed), torch.tensor(good)
        factor = torch.tensor([2.0, 0.5], dtype=torch.float64).masked_fill(~mask, 0.0)
        given = tuple(torch.where(mask.unsqueeze(1), v, bad * v) for v in vector)
        with torch.set_grad_enabled(with_grad):
            self.history.push(given, Scaling(factor.unsqueeze(1), None if all(good) else mask))
        self.pushed.append(joined(vector) * factor.unsqueeze(1))

    @rule(seed=SEEDS)
    def push_unscaled(self, seed: int) -> None:
        self.history.push(random_state(seed))
        self.pushed.append(joined(random_state(seed)))

    @precondition(lambda self: self.pushed)
    @rule(seed=SEEDS)
    def multiply(self, seed: int) -> None:
        n = min(len(self.pushed), self.size)
        columns = [None] * n
        for index, vector in enumerate(self.pushed):  # the ring
            columns[index % self.size] = vector
        matrix = torch.stack(columns, dim=1)  # pyright: ignore[reportArgumentType]  # (B, n, D)
        x = random_state(seed)
        torch.testing.assert_close(self.history.dot(x), (matrix @ joined(x).unsqueeze(2)).squeeze(2))
        weights = torch.randn(B, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
        expected = joined(x) - (weights.unsqueeze(1) @ matrix).squeeze(1)
        torch.testing.assert_close(joined(self.history.subtract_combination(x, weights)), expected)

    @invariant()
    def memory_is_bounded(self) -> None:
        if hasattr(self, "history"):
            assert self.history.num_columns <= self.history.capacity <= self.size


class MultisecantMachine(RuleBasedStateMachine):
    """Anderson and Broyden, with restarts per sample, against dense formulas over the pairs that a sample still has.

    A recording state keeps the pairs of samples that have ended, whatever points are shown of them afterwards.
    """

    @initialize(
        solver=st.sampled_from(
            [
                deqkit.Anderson(history=3, ridge=0.0, restart_factor=10.0),
                deqkit.Anderson(history=4, ridge=0.0, mixing=0.6, type=1),
                deqkit.Broyden(history=3, restart_factor=10.0),
                deqkit.Broyden(history=4, restart_factor=10.0, variant="bad"),
            ]
        ),
        seed=SEEDS,
        recording=st.booleans(),
    )
    def begin(self, solver: Any, seed: int, recording: bool) -> None:
        self.solver, self.state = solver, solver.start_recording() if recording else solver.start()
        self.active = torch.ones(B, dtype=torch.bool)
        self.points: list[tuple[Tensor, Tensor]] = []
        self.pairs: list[list[tuple[Tensor, Tensor] | None]] = [[] for _ in range(B)]
        self.visit(seed, (1.0, 1.0), (False, False))

    @precondition(lambda self: self.state.recording)
    @rule(sample=st.integers(0, B - 1))
    def end(self, sample: int) -> None:
        self.active[sample] = False

    @rule(
        seed=SEEDS,
        distance=st.tuples(*[st.sampled_from([1.0, 5.0, 11.0])] * B),
        still=st.tuples(*[st.booleans()] * B),
    )
    def visit(self, seed: int, distance: tuple[float, ...], still: tuple[bool, ...]) -> None:
        """A point at so many times the best distance; a sample that stands still brings no pair."""
        seed = 2 * (seed % 2**20) + 2**21 * len(self.points)  # no point comes twice
        x, r = random_state(seed), random_state(seed + 1)
        if self.points:
            last_x, last_r = self.points[-1]
            keep = torch.tensor(still).unsqueeze(1)
            x = tuple(torch.where(keep, old, new) for old, new in zip(last_x.split(WIDTHS, 1), x, strict=True))
            r = tuple(torch.where(keep, old, new) for old, new in zip(last_r.split(WIDTHS, 1), r, strict=True))
        given, one = torch.tensor(distance).double().masked_fill(~self.active, 1.0), torch.ones(B).double()
        fx = tuple(a + b for a, b in zip(x, r, strict=True))
        point = Point(x, fx, r, Measured(one, given, one, self.active.clone()), 100, 1e-16)
        with arrays.quiet():  # as the loop does
            record = copy.deepcopy(self.state).conclude(point) if self.state.recording else None
            new = joined(self.state.step(point))
        at, residual = joined(x), joined(r)
        for i in range(B):
            if not self.active[i]:
                continue
            if self.points:
                if distance[i] > self.solver.restart_factor:
                    self.pairs[i] = [None] * len(self.pairs[i])
                pair = (at[i] - self.points[-1][0][i], residual[i] - self.points[-1][1][i])
                self.pairs[i].append(None if still[i] else pair)
            self.pairs[i] = self.pairs[i][-self.solver.history :]
            expected = self.dense_step(at[i], residual[i], [p for p in self.pairs[i] if p is not None])
            torch.testing.assert_close(new[i], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
        if record is not None:
            self.check(record)
        self.points.append((at, residual))

    def check(self, record: InverseJacobian) -> None:
        g = random_state(0)
        found = joined(record.transposed(g))
        for i in range(B):
            identity = torch.eye(sum(WIDTHS), dtype=torch.float64)
            pairs = [p for p in self.pairs[i] if p is not None]
            inverse = torch.stack([-self.dense_step(0 * row, row, pairs) for row in identity], dim=1)
            expected = joined(g)[i] @ inverse
            torch.testing.assert_close(found[i], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))

    def dense_step(self, x: Tensor, r: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        beta = getattr(self.solver, "mixing", 1.0)
        if not pairs:
            return x + beta * r
        if isinstance(self.solver, deqkit.Broyden):
            inverse = -torch.eye(len(x), dtype=x.dtype)
            for s, y in pairs:
                left = s if self.solver.variant == "good" else y
                row = left @ inverse if self.solver.variant == "good" else y
                inverse = inverse + torch.outer(s - inverse @ y, row) / (row @ y)
            return x - inverse @ r
        s, y = (torch.stack(c, dim=1) for c in zip(*pairs, strict=True))
        left = y if self.solver.type == 2 else s
        gamma = torch.linalg.solve(left.T @ y, left.T @ r)
        return x + beta * r - (s + beta * y) @ gamma


TestHistory = HistoryMachine.TestCase
TestHistory.settings = MACHINE
TestMultisecant = MultisecantMachine.TestCase
TestMultisecant.settings = MACHINE


def one_sample(distances: list[float], termination: Termination) -> tuple[int, int, float]:
    """Status, steps and best distance of one sample, by the rules of `deqkit.termination` read aloud.

    Args:
        distances: at every step, while the scale is 1: residuals in units of rtol.
        termination: the rules.
    """
    best, bests, start, retreats = math.inf, [], distances[0], 0
    for step, distance in enumerate(distances):
        finite = math.isfinite(distance)
        best = distance if finite and distance < best else best
        bests.append(best)
        residual, first = distance * termination.rtol, start * termination.rtol + 1
        long_ago = bests[-1 - termination.patience] if step >= termination.patience else math.inf
        stagnated = best > (1 - termination.min_progress) * long_ago
        if not finite:
            if math.isfinite(best) and retreats < 4:
                retreats += 1
                continue
            return Status.NONFINITE, step, best
        retreats = 0
        if distance <= 1:
            return Status.CONVERGED, step, best
        if residual > termination.divergence_factor * first:
            return Status.DIVERGED, step, best
        if stagnated:
            far = residual > math.sqrt(termination.divergence_factor) * first
            return Status.DIVERGED if far else Status.STAGNATED, step, best
    return Status.MAX_STEPS, len(distances) - 1, best


TABLES = st.lists(
    st.tuples(*[st.sampled_from([0.0, 0.5, 2.0, 3.0, 10.0, 1e3, 2e6, math.nan, math.inf])] * 3), min_size=1, max_size=16
)


@given(TABLES, st.booleans(), st.sampled_from([2, 4, 100]))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_ledger_keeps_the_rules_on_the_host_and_on_the_device(
    table: list[tuple[float, ...]], on_host: bool, patience: int
) -> None:
    termination = Termination(1e-3, patience=patience, divergence_factor=1e4)
    num_samples = len(table[0])
    points = [torch.full((num_samples, 1), float(k)) for k in range(len(table))]
    ledger = Ledger((points[0],), (points[0],), on_host, termination, True, None)
    for step, distances in enumerate(table):
        residual = termination.rtol * torch.tensor([distances], dtype=torch.float64)
        point = ledger.freeze((points[step],)) if step else (points[step],)
        ledger.record(step, residual, torch.ones_like(residual))
        ledger.look(step, point, point, 1)
    result: LoopResult = ledger.result({})
    for i in range(num_samples):
        column = [row[i] for row in table]
        status, steps, best = one_sample(column, termination)
        assert (result.status[i].item(), result.num_steps[i].item()) == (status, steps), column
        if math.isfinite(best):
            torch.testing.assert_close(result.residual[i].item(), best * termination.rtol, rtol=1e-6, atol=0.0)
            assert column[int(result.x[0][i].item())] == best
        assert result.trace is not None and result.trace[steps + 1 :, i].isnan().all()


def test_fixed_steps_only_end_at_zero_or_nowhere() -> None:
    """With rtol = 0 there is no tolerance: nothing ends a sample but an exact zero and what is not finite."""
    table = torch.tensor([[3.0, 3.0, 3.0], [2.0, math.nan, 0.0], [9.0, 1.0, 7.0]], dtype=torch.float64)
    for on_host in (True, False):
        ledger = Ledger((table[:1].T,), (table[:1].T,), on_host, replace(Termination(1.0), rtol=0.0), False, None)
        for step, row in enumerate(table):
            point = ledger.freeze((row.unsqueeze(1),)) if step else (row.unsqueeze(1),)
            ledger.record(step, row.unsqueeze(0), torch.ones(1, 3, dtype=torch.float64))
            ledger.look(step, point, point, 1)
        result = ledger.result({})
        assert result.status.tolist() == [Status.MAX_STEPS, Status.NONFINITE, Status.CONVERGED]
        assert result.num_steps.tolist() == [2, 1, 1] and result.x[0].flatten().tolist() == [2.0, 3.0, 0.0]
