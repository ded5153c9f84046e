"""L5. `solve`: from a user's words to a loop, an adjoint and a `Solution`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from deqkit import held, levels, stages
from deqkit.adjoints import Adjoint, Problem, check_record, make_adjoint, solve_at_every_level
from deqkit.ledger import LoopResult
from deqkit.loop import StepInfo
from deqkit.norms import make_norm
from deqkit.solution import AdjointStats, Solution, report_failure
from deqkit.solvers import Solver, make_solver
from deqkit.solvers.base import as_int
from deqkit.state import Blocks, Evaluator, StateLayout, without_autocast
from deqkit.termination import Termination

_POLICIES = ("warn", "raise", "ignore")


def solve(
    f: Callable[..., Any],
    x0: Any,
    *,
    args: tuple[Any, ...] = (),
    solver: str | Solver = "anderson",
    adjoint: str | Adjoint = "implicit",
    rtol: float = 1e-4,
    atol: float = 0.0,
    max_steps: int = 50,
    norm: str | Callable[[Any], Tensor] | None = None,
    batch_dims: int = 1,
    on_failure: Literal["warn", "raise", "ignore"] = "warn",
    trace: bool = False,
    keep: Iterable[int] = (),
    has_aux: bool = False,
    callback: Callable[[StepInfo], None] | None = None,
    sample_args: Iterable[int] | None = None,
) -> Solution:
    """Find the fixed point x* = f(x*, *args), sample by sample, and make it differentiable.

    Each sample stops, freezes and is reported by itself, as if it had been solved alone. The value returned is the
    best point that was visited, by the measure of the stopping test; its residual is the true one.

    Under `torch.compile`, a solve to a tolerance runs uncompiled: compile f itself. A fixed number of steps is traced
    as part of the graph, with its gradient by all adjoints but "shine", "reversible", and an implicit one whose own
    ``rtol`` is not zero. A graph warns of nothing, leaves `Solution.adjoint_stats` empty and is differentiated once. An
    exported one (`torch.export`, ONNX) is for inference: there is no gradient through the solve, except by "unrolled"
    and "reversible".

    Under the transforms of `torch.func` every level maps or differentiates as an ordinary one does: by "implicit" any
    but `linearize`, in any order; by "jfb", "neumann" and "phantom" `vmap`, and once `grad`, `vjp` or `jacrev`; by
    "unrolled" all, but none that differentiates inside of `vmap`. A mapped dimension is one more of independent
    samples.

    With ``rtol=0, atol=0`` the solve runs exactly ``max_steps`` steps; with ``on_failure="ignore"`` besides it never
    synchronises with the device. (Otherwise it looks once, at the end, for samples that are not finite.)

    Args:
        f: called as ``f(x, *args)``; returns the structure, shapes, dtypes and device of x. It must be deterministic
            and must not mix samples. It may close over parameters: they get their gradients.
        x0: starting point: a tensor or any pytree of floating or complex tensors, each (*batch, ...).
        args: further arguments of f. Tensors in it get their gradients.
        solver: "fixed_point", "anderson", "broyden", "newton_krylov", "auto" (Anderson, then others for the samples
            that it leaves unsolved), "mixed_precision" (Anderson, in bfloat16 first), "gmres" and "bicgstab" (for an
            affine f), "reversible" (for the adjoint of that name), or a solver object.
        adjoint: "implicit" (exact), "unrolled" (exact for the steps taken), "reversible" (the same in constant memory,
            for the solver of that name), the approximate "jfb", "neumann", "phantom" and "shine" (for the solvers
            "anderson" and "broyden"), or an adjoint object.
        rtol: a sample is done when |f(x) - x| <= atol + rtol |f(x)|.
        atol: see rtol; in the units of the norm.
        max_steps: limit of solver steps; f is evaluated at most once more than that (by "auto": once per solver; by
            "mixed_precision": twice), and once for the gradient.
        norm: per-sample norm over the whole state: None for the Euclidean norm, "leaf_max" for the relatively worst
            leaf, or a function from a state to a tensor of the batch shape.
        batch_dims: leading dims that index independent samples; 0 for one system.
        on_failure: what to do when samples do not converge, here and in the backward pass: "warn" issues a
            `ConvergenceWarning`, "raise" raises a `ConvergenceError`, "ignore" leaves it to the caller to look.
        trace: whether to record the relative residual of every evaluation.
        keep: steps whose points go into `Solution.states`, for a loss on the trajectory. Each has a gradient of its
            own, which costs as much as that of the value; 0 is x0, a step beyond the last gives the value.
        has_aux: f returns a pair ``(f(x), aux)``; the aux of the returned value goes into `Solution.aux`, at the price
            of one more call of f.
        callback: called with a `StepInfo` after every evaluation of the forward solve.
        sample_args: positions in ``args`` of what belongs to samples, tensors or pytrees of tensors (batch, ...);
            ``()`` where nothing does. Once given, f is called on the samples that are still being solved, and on no
            others, from when a quarter have ended, with those arguments cut to the same samples. For an f that is
            costly and samples of unequal difficulty; f must then close over nothing that belongs to samples, and know
            them by ``batch_dims=1``. No effect on solves that are traced, unrolled, or of a fixed number of steps.

    Returns:
        A `Solution`.

    Raises:
        TypeError: x0 or f(x0) hold something else than tensors of a floating or complex dtype, dtypes differ, or a
            setting has the wrong type.
        ValueError: shapes or structure differ, a setting is unknown or out of range, or the adjoint is not one for
            the solver.
        ConvergenceError: some samples did not converge, under ``on_failure="raise"``.
        RuntimeError: f or the callback changed x in place.
        NotImplementedError: the adjoint does not go through a transform of `torch.func`, or through forward mode; or
            ``sample_args`` is given and f draws masks.
    """
    if not callable(f):
        raise TypeError(f"f must be callable, got {type(f).__name__}")
    max_steps, batch_dims = _as_count("max_steps", max_steps), _as_count("batch_dims", batch_dims)
    keep = _as_steps(keep)
    _check_settings(args, on_failure, trace, has_aux, callback)
    sample_args = None if sample_args is None else _as_positions(sample_args, args)
    solver, adjoint = make_solver(solver), make_adjoint(adjoint)
    check_record(adjoint, solver)
    termination = Termination(rtol, atol)
    if torch.compiler.is_dynamo_compiling() and not _is_traceable(termination, adjoint):
        return _solve_uncompiled(
            f, x0, args=args, solver=solver, adjoint=adjoint, rtol=rtol, atol=atol, max_steps=max_steps, norm=norm,
            batch_dims=batch_dims, on_failure=on_failure, trace=trace, keep=keep, has_aux=has_aux, callback=callback,
            sample_args=sample_args,
        )  # fmt: skip
    layout = StateLayout(x0, batch_dims)
    if sample_args is not None:
        _check_samples(sample_args, args, layout)
    state_norm = make_norm(norm, layout)
    scope, num_args = held.opened(), len(args)
    f, args = scope.bind(f, args)
    evaluator = adjoint.prepare(Evaluator(_first_of_two(f) if has_aux else f, layout, args))
    if sample_args is not None:
        evaluator.sample_args = frozenset(i + len(args) - num_args for i in sample_args)  # behind what the scope holds
        evaluator.masks = scope.masks
    tolerances = {"rtol": termination.rtol, "atol": termination.atol}
    settings = {"solver": solver.name, **tolerances}
    if layout.num_samples == 0:
        return _empty_solution(layout, x0, trace, norm == "leaf_max", settings)

    problem = Problem(
        evaluator, state_norm, termination.rtol, termination.atol, max_steps, on_failure, stats=AdjointStats()
    )
    record = adjoint.needs is not None and torch.is_grad_enabled() and not torch.compiler.is_exporting()

    def run(problem: Problem, x0: Blocks) -> LoopResult:
        result = stages.run(
            problem.f,
            x0,
            solver,
            termination,
            max_steps=max_steps,
            norm=problem.norm,
            trace=trace,
            keep=keep,
            callback=callback,
            record=record,
        )
        kept = {step: result.kept.get(step, result.x) for step in sorted(keep)}
        return replace(result, kept={step: tuple(b.clone() for b in x) for step, x in kept.items()})

    with without_autocast(layout.device), scope.around_a_trace():
        result = solve_at_every_level(adjoint, problem, layout.pack(x0), run)
    value = layout.unpack(result.x)
    aux = f(value, *args)[1] if has_aux else None
    solution = Solution(
        value=value,
        status=layout.per_sample(result.status),
        residual=layout.per_sample(result.residual),
        relative_residual=layout.per_sample(result.relative_residual),
        num_steps=layout.per_sample(result.num_steps),
        num_fn_evals=evaluator.num_calls + has_aux,
        trace=None if result.trace is None else layout.per_sample(result.trace),
        leaf_residuals=layout.per_sample(_leaf_residuals(result)) if norm == "leaf_max" else None,
        states={step: layout.unpack(x) for step, x in result.kept.items()},
        aux=aux,
        adjoint_stats=problem.stats,
        masks=scope.masks,
        **settings,
    )
    seen = solution.detach() if levels.active() else solution  # at the ground, where values can be looked at
    report_failure(on_failure, "solve", seen, resolution=layout.resolution, stacklevel=2, **tolerances)
    return solution


# What looks at values breaks a compiled graph at every look: one break around all of it is quicker in every way.
_solve_uncompiled: Any = torch.compiler.disable(solve, reason="a solve that looks at its residuals cannot be one graph")


def _is_traceable(termination: Termination, adjoint: Adjoint) -> bool:
    if not termination.fixed_steps or (levels.any_running() and not adjoint.unrolls):
        return False
    return adjoint.traceable or not torch.is_grad_enabled() or torch.compiler.is_exporting()


def _as_count(name: str, value: Any) -> int:
    value = as_int(name, value)
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def _as_steps(keep: Any) -> frozenset[int]:
    if isinstance(keep, str) or not isinstance(keep, Iterable):
        raise TypeError(f"keep must be the numbers of some steps, such as (2, 5), got {keep!r}")
    return frozenset(_as_count("every step in keep", step) for step in keep)


def _as_positions(sample_args: Any, args: tuple[Any, ...]) -> frozenset[int]:
    if isinstance(sample_args, str) or not isinstance(sample_args, Iterable):
        raise TypeError(f"sample_args must be positions in args, such as (0,), got {sample_args!r}")
    positions = frozenset(_as_count("every position in sample_args", i) for i in sample_args)
    if positions and max(positions) >= len(args):
        raise ValueError(f"sample_args names position {max(positions)}, but args has {len(args)} element(s)")
    return positions


def _check_samples(sample_args: frozenset[int], args: tuple[Any, ...], layout: StateLayout) -> None:
    if layout.batch_dims != 1:
        raise ValueError(f"sample_args needs batch_dims=1, got {layout.batch_dims}")
    for i in sorted(sample_args):
        for path, leaf in tree_flatten_with_path(args[i])[0]:
            got = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            if not isinstance(leaf, Tensor) or leaf.shape[:1] != layout.batch_shape:
                raise ValueError(
                    f"sample_args: args[{i}]{keystr(path)} must be a tensor of {layout.num_samples} samples, got {got}"
                )


def _first_of_two(f: Callable[..., Any]) -> Callable[..., Any]:
    """F without its auxiliary output.

    Raises:
        TypeError: it does not return a pair.
    """

    def first(x: Any, *args: Any) -> Any:
        out = f(x, *args)
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"has_aux=True: f must return a pair (f(x), aux), got {type(out).__name__}")
        return out[0]

    return first


def _check_settings(args: Any, on_failure: Any, trace: Any, has_aux: Any, callback: Any) -> None:
    if not isinstance(args, tuple):
        raise TypeError(
            f"args must be a tuple of further arguments of f, got {type(args).__name__}; for one: args=(b,)"
        )
    if on_failure not in _POLICIES:
        raise ValueError(f"unknown on_failure {on_failure!r}: choose one of {list(_POLICIES)}")
    for name, flag in (("trace", trace), ("has_aux", has_aux)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")


def _leaf_residuals(result: LoopResult) -> Tensor:
    """The parts of a norm by leaves; that of the only leaf is the whole."""
    return result.relative_residual.unsqueeze(0) if result.parts is None else result.parts


def _empty_solution(layout: StateLayout, x0: Any, trace: bool, leafwise: bool, settings: dict[str, Any]) -> Solution:
    """The answer for a batch without samples: f is not called."""
    nothing = layout.per_sample(torch.empty(0, dtype=layout.dtype, device=layout.device))
    codes = nothing.to(torch.int64)
    value = layout.unpack(tuple(b.clone() for b in layout.pack(x0)))
    if torch.is_grad_enabled() and not levels.active():  # so that a training loop may call backward(), to no effect
        value = tree_map(lambda t: t if t.requires_grad else t.requires_grad_(), value)
    return Solution(
        value, codes, nothing, nothing.clone(), codes.clone(), 0,
        trace=nothing.unsqueeze(0)[:0] if trace else None,
        leaf_residuals=nothing.new_empty(len(layout.leaves), *nothing.shape) if leafwise else None, **settings,
    )  # fmt: skip
