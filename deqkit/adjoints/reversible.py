"""L4. Differentiate through the steps of a reversible iteration, in a memory that does not grow with their number.

The loop runs with gradients, as for the unrolled adjoint, and each evaluation of f is checkpointed: its backward pass
evaluates it again. But where a checkpoint keeps the point x_k that it starts from, this one keeps its number, and x_k
is rebuilt when the backward pass comes to it, from the two points after it (see `deqkit.solvers.reversible`):

    x_k = (x_{k+2} - (1 - damping) f(x_{k+1})) / damping

The value f(x_{k+1}) has just been computed, so that a step back costs no further call of f. All else is autograd's:
gradients reach whatever f depends on, x0 included, samples that have ended included, and so do second derivatives.

Source: McCallum, Arora & Foster, "Reversible Deep Equilibrium Models", arXiv 2509.12917, sec. 3.

Deliberate deviation: where rounding errors have grown to a tenth of a point's distance from the last one, the way back
is left, sample by sample, and f is differentiated at the last good point for all steps before. Points further back
differ from it the more, the less they matter, because gradients fade on the way back as the residual had: the error is
of the order of the residual that the solve ended with, where points made of noise would make it anything.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

from deqkit import levels, linalg
from deqkit.adjoints.base import Adjoint, Problem
from deqkit.adjoints.dependencies import Dependencies, check_same_function
from deqkit.errors import ConvergenceError, ConvergenceWarning
from deqkit.solvers.reversible import Trajectory
from deqkit.state import Blocks, Evaluator

_SETTLED = 1e-4  # relative movement in the last step, below which the error of a gradient does not matter


@dataclass(frozen=True)
class ReversibleAdjoint(Adjoint):
    """Exact gradients of the steps that `deqkit.ReversibleIteration` took, without storing them.

    A few states and the records of autograd, which hold no tensors, are all that is kept until the backward pass. That
    calls f once per step, beside its derivatives; `Solution.num_fn_evals` does not count those evaluations.

    The gradient is the unrolled one for as many steps as can be taken back, some 16 to 32 at the damping of 0.2, and
    twice as many at 0.5 (`deqkit.ReversibleIteration` says why): to the last digit where f works in float32, and in
    float64 to the rounding errors that the steps back multiply. With more steps than that, it has an error of the order
    of the residual of the answer. That is within the tolerance of a solve to a tolerance; after a fixed number of steps
    (``rtol=0, atol=0``) that did not come to rest, it is reported like an adjoint solve that falls short.

    Not for an f that itself solves: rebuilt points differ by rounding from those of the forward pass, and where that
    changes what an inner solve does, the backward pass ends in an error.
    """

    name: ClassVar[str] = "reversible"
    unrolls: ClassVar[bool] = True
    needs: ClassVar[type | None] = Trajectory

    def prepare(self, f: Evaluator) -> Evaluator:
        """The map that the loop evaluates: f, whose evaluations leave their numbers behind.

        Raises:
            NotImplementedError: inside a transform of `torch.func`.
        """
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return f
        if levels.any_running():
            raise NotImplementedError(
                "torch.func does not go through adjoint='reversible': use adjoint='implicit' or 'unrolled' there, or "
                "torch.autograd in place of torch.func"
            )
        # All steps lie in one graph, which need not hold a cast of the same parameter for each of them.
        return Evaluator(_Rebuilding(f), f.layout, f.args, shares_casts=True)

    def attach(self, problem: Problem, x: Blocks) -> Blocks:
        """``x`` itself: its graph is the solve."""
        f, trajectory = problem.f.f, problem.record
        assert isinstance(f, _Rebuilding) and isinstance(trajectory, Trajectory)
        expects_exact = problem.rtol == 0 and problem.atol == 0
        f.path.close(trajectory, x, problem.on_failure if expects_exact else "ignore")
        return x


@dataclass(frozen=True)
class _Place:
    """Stands in the graph for one leaf of x_k."""

    path: _Path
    step: int
    leaf: int


def _find(packed: Any) -> Any:
    return packed.path.point(packed.step)[packed.leaf] if isinstance(packed, _Place) else packed


class _Rebuilding:
    """The function that ``f`` evaluates, checkpointed without its points."""

    def __init__(self, f: Evaluator) -> None:
        self.inner, self.path = f.f, _Path(f)

    def __call__(self, x: Any, *args: Any) -> Any:
        inner, path = self.inner, self.path
        if not torch.is_grad_enabled():
            return inner(x, *args)
        leaves, spec = tree_flatten(x)
        step = path.next_step()
        places = {(leaf.data_ptr(), leaf.shape): _Place(path, step, i) for i, leaf in enumerate(leaves)}

        def evaluate(*leaves: Tensor) -> Any:
            out = inner(tree_unflatten(leaves, spec), *args)
            path.note(step, out)
            return out

        def pack(t: Tensor) -> Any:
            return places.get((t.data_ptr(), t.shape), t)

        with torch.autograd.graph.saved_tensors_hooks(pack, _find):
            return checkpoint(evaluate, *leaves, use_reentrant=False, preserve_rng_state=False, early_stop=False)


class _Path:
    """The points of a solve, which can be asked for from the last one to the first.

    Asked for a later one than before, as by a second backward pass, it starts over from the end.
    """

    def __init__(self, f: Evaluator) -> None:
        self.f = f
        self.num_steps = 0
        self.seen: dict[int, Blocks] = {}  # f at the last two points of the forward pass, by step
        self.values: dict[int, Blocks] = {}  # f at the points evaluated last
        self.is_same = False  # whether f has been compared with what was seen of it, in this backward pass
        self.trajectory: Trajectory | None = None
        self.rest: Blocks  # where samples are after they have ended
        self.step = -1  # that the walk has come to
        self.top: Tensor  # (B,), the step of the later one of the two points that each sample has come to
        self.later: Blocks
        self.earlier: Blocks
        self.lost: Tensor  # (B,), for which samples the way further back is lost
        self.has_reported = False  # in this backward pass
        self.on_failure = "ignore"

    def next_step(self) -> int:
        """The number of the evaluation that is about to be made."""
        self.num_steps += 1
        return self.num_steps - 1

    def close(self, trajectory: Trajectory, x: Blocks, on_failure: str) -> None:
        """The solve has ended with ``x``."""
        if self.trajectory is None:
            self.trajectory, self.rest, self.on_failure = trajectory, tuple(b.detach() for b in x), on_failure

    def note(self, step: int, out: Any) -> None:
        """What f has returned at the point of ``step``; in the backward pass it must be what it was.

        Raises:
            RuntimeError: it is not.
        """
        fx = tuple(b.detach() for b in self.f.layout.pack_output(out))
        if self.trajectory is None:
            self.seen = {k: v for k, v in self.seen.items() if k == step - 1} | {step: fx}
            return
        self._compare(step, fx)
        self.values[step] = fx

    def _compare(self, step: int, fx: Blocks) -> None:
        if step in self.seen:
            unknown = Dependencies([], complete=False)
            check_same_function(self.f, self.seen[step], unknown, fx, unknown)
            self.is_same = True

    def point(self, step: int) -> list[Tensor]:
        """The leaves of the point that f saw at ``step``."""
        trajectory = self.trajectory
        assert trajectory is not None, "backward inside of a solve"
        if step > self.step:
            self.step = max(step, int(trajectory.steps.max()))
            self.top, self.later, self.earlier = trajectory.steps, trajectory.last, trajectory.before
            self.lost = torch.zeros_like(self.top, dtype=torch.bool)
            self.values, self.is_same, self.has_reported = dict(self.seen), False, False
        while self.step > step:
            self._back(trajectory)
        return tree_leaves(self.f.layout.unpack(self._here()))

    def _here(self) -> Blocks:
        x = linalg.where(self.top == self.step, self.later, self.earlier)
        x = self.f.layout.round(tuple(b.to(r.dtype) for b, r in zip(x, self.rest, strict=True)))
        return linalg.where(self.top < self.step, self.rest, x)

    @torch.no_grad()
    def _back(self, trajectory: Trajectory) -> None:
        going = self.top == self.step + 1  # the others have not moved yet
        if bool(going.any()):
            before = trajectory.back(self.later, self._value())
            self._lose(going & ~trajectory.holds(before, self.step - 1), trajectory)
            before = linalg.where(self.lost, self.earlier, before)
            self.later = linalg.where(going, self.earlier, self.later)
            self.earlier = linalg.where(going, before, self.earlier)
            self.top = torch.where(going, self.step, self.top)
        self.values = {k: v for k, v in self.values.items() if k < self.step}
        self.step -= 1

    def _value(self) -> Blocks:
        """The value of f where the walk has come to."""
        if self.is_same and self.step in self.values:
            return self.values[self.step]
        fx = self.f(self._here())
        self._compare(self.step, fx)
        return fx

    def _lose(self, lost: Tensor, trajectory: Trajectory) -> None:
        """Leave the way back for the samples in ``lost``.

        Raises:
            ConvergenceError: the gradient of one of them is not exact, the first time, under ``on_failure="raise"``.
        """
        if self.on_failure != "ignore" and not self.has_reported:
            inexact = lost & ~trajectory.is_settled(_SETTLED)
            self.has_reported = bool(inexact.any())
            if self.has_reported:
                _report(self.on_failure, self.step, int(trajectory.steps[inexact].max()), trajectory.damping)
        self.lost = self.lost | lost


def _report(policy: str, step: int, num_steps: int, damping: float) -> None:
    message = (
        f"adjoint: the gradient of {num_steps} steps is not exact: rounding errors hide the points before that of step "
        f"{step}, in its place. Use a larger damping (it is {damping:g}), fewer steps, or "
        f"adjoint=deqkit.UnrolledAdjoint(checkpoint=True)."
    )
    if policy == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=2)
