"""L4. What every adjoint is: a way to give the answer of a solve its gradient, without moving its value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deqkit import levels
from deqkit.adjoints.dependencies import (
    Aliases,
    Dependencies,
    check_same_function,
    find_dependencies,
    grad_of_present,
)
from deqkit.adjoints.once import refuse_double_backward
from deqkit.adjoints.traced import attach_traced
from deqkit.norms import StateNorm
from deqkit.solution import AdjointStats
from deqkit.state import Blocks, Evaluator


@dataclass
class Problem:
    """The solve whose answer is to be differentiated.

    Attributes:
        f: the map.
        norm: residual and scale per sample.
        rtol: relative tolerance of the forward solve.
        atol: absolute tolerance of the forward solve.
        max_steps: step limit of the forward solve.
        on_failure: what to do about samples whose adjoint solve falls short.
        stats: where a backward pass writes how it went.
        record: what the solver tells of the solve, of the type that the adjoint needs.
    """

    f: Evaluator
    norm: StateNorm
    rtol: float
    atol: float
    max_steps: int
    on_failure: str
    stats: AdjointStats
    record: Any = None


@dataclass(frozen=True)
class Adjoint(ABC):
    """Settings of an adjoint; one object serves any number of solves."""

    name: ClassVar[str]
    #: Whether the solver's own steps carry the gradient, so that the loop must run with gradients enabled.
    unrolls: ClassVar[bool] = False
    #: The type of the record that the solver must hand over, see `deqkit.solvers.base.Solver.record`; None: none.
    needs: ClassVar[type | None] = None
    #: Whether `attach` works at the levels of `torch.func`: by `cut`, `levels.apply` and `once`.
    has_levels: ClassVar[bool] = False

    @property
    def traceable(self) -> bool:
        """Whether a solve of a fixed number of steps can be compiled as one graph, with its gradient."""
        return False

    def prepare(self, f: Evaluator) -> Evaluator:
        """The map that the loop evaluates."""
        return f

    @abstractmethod
    def attach(self, problem: Problem, x: Blocks) -> Blocks:
        """``x``, bit for bit, with a gradient, unless nothing needs one. Called with gradients enabled."""

    def with_tangent(self, problem: Problem, x: Blocks) -> Blocks:
        """``x`` with the tangent of forward-mode differentiation. Called inside a dual level only.

        Raises:
            NotImplementedError: the adjoint has none.
        """
        raise NotImplementedError(
            f"forward-mode automatic differentiation does not go through adjoint={self.name!r}: use adjoint='implicit' "
            f"or 'unrolled'"
        )


class _Cut(torch.autograd.Function):
    """Identity through which no gradient passes, and which still lets its output be differentiated towards."""

    cuts = True  # for `find_dependencies`: nothing depends on what lies behind

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return levels.passed_on(x, by=levels.view)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return None


def cut(x: Blocks) -> Blocks:
    """``x`` as a point to differentiate f at: it requires grad, and no gradient accumulates in it."""
    return tuple(levels.apply(_Cut, levels.fresh_leaf(b)) for b in x)


class _StraightThrough(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        if levels.active():
            ctx.save_for_backward(carrier)
        return levels.passed_on(value)

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return None, *refuse_double_backward(grad_outputs, ctx.saved_tensors or grad_outputs)


def straight_through(value: Blocks, carrier: Blocks) -> Blocks:
    """``value``, bit for bit, with the gradient of ``carrier``."""
    if torch.compiler.is_compiling():
        return attach_traced(value, carrier, lambda x, g: g)
    return tuple(levels.apply(_StraightThrough, v, c) for v, c in zip(value, carrier, strict=True))


def vjp(fx: Blocks, x: Blocks, u: Blocks, create_graph: bool = False) -> Blocks:
    """J^T u for J = df/dx, along the graph from ``x`` to ``fx``, which is kept; zero where f does not depend on x."""
    grads = grad_of_present(fx, x, u, create_graph=create_graph)
    return tuple(torch.zeros_like(b) if g is None else g for g, b in zip(grads, x, strict=True))


@dataclass
class Evaluation:
    """One evaluation of f with a graph.

    Attributes:
        x: the point, cut off from whatever it came from.
        fx: f at the point.
        dependencies: what fx depends on besides x.
    """

    x: Blocks
    fx: Blocks
    dependencies: Dependencies

    @classmethod
    def of(cls, f: Evaluator, x: Blocks) -> Evaluation:
        """Evaluate f at ``x``, counted among the calls of ``f``."""
        aliases = Aliases.of(f.args)
        x_in, aliased = cut(x), f.with_args(aliases.args)
        fx = aliased(x_in)
        f.num_calls += aliased.num_calls
        return cls(x_in, fx, find_dependencies(fx, x_in, aliases))


class ProductGraph:
    """Which graph a backward pass takes its vector-Jacobian products along; made in the forward pass.

    Usually that is the graph of the evaluation that carries the gradient. But where saved tensors are packed away
    (activation checkpointing, offloading), every product would unpack them anew, at worst by running the whole solve
    again. Then f is evaluated once more instead, in the backward pass.
    """

    def __init__(self, dependencies: Dependencies) -> None:
        self.dependencies = dependencies
        self.packed = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore

    def graph(self, problem: Problem, x: Blocks, fx: Blocks) -> tuple[Blocks, Blocks]:
        """A point and f at that point, with the graph between them in memory.

        Raises:
            RuntimeError: f, evaluated once more, is not the function it was.
        """
        if not self.packed:
            return x, fx
        with torch.enable_grad():
            again = Evaluation.of(problem.f, x)
        check_same_function(problem.f, fx, self.dependencies, again.fx, again.dependencies)
        return again.x, again.fx
