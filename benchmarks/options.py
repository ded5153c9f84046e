"""Command-line values that benchmarks share: solver settings and lists of step counts."""

from __future__ import annotations

import argparse
import ast
import re
from dataclasses import dataclass, fields

import deqkit

SOLVERS: dict[str, type[deqkit.Solver]] = {
    cls.name: cls for cls in (deqkit.FixedPointIteration, deqkit.Anderson, deqkit.Broyden)
}
# Those that a detector may use besides.
_OTHERS: dict[str, type[deqkit.Solver]] = {cls.name: cls for cls in (deqkit.NewtonKrylov, deqkit.GMRES, deqkit.Auto)}


@dataclass(frozen=True)
class NamedSolver:
    """A solver and what it is called in tables: the words it was asked for with."""

    label: str
    solver: deqkit.Solver


def default_solvers() -> list[NamedSolver]:
    """Every solver with its default settings."""
    return [NamedSolver(name, cls()) for name, cls in SOLVERS.items()]


def named(solver: str | deqkit.Solver) -> NamedSolver:
    """A solver under the words that `parse_solver` would take for it."""
    if isinstance(solver, str):
        if solver not in SOLVERS | _OTHERS:
            raise ValueError(f"unknown solver {solver!r}")
        return NamedSolver(solver, (SOLVERS | _OTHERS)[solver]())
    values = ((field, getattr(solver, field.name)) for field in fields(solver))
    changed = ",".join(f"{field.name}={value}" for field, value in values if value != field.default)
    return NamedSolver(f"{solver.name}:{changed}" if changed else solver.name, solver)


def parse_solver(text: str) -> NamedSolver:
    """A solver from ``NAME`` or ``NAME:setting=value,setting=value``.

    Raises:
        argparse.ArgumentTypeError: an unknown name or setting, or a value that the solver refuses.
    """
    name, _, rest = text.partition(":")
    if name not in SOLVERS:
        raise argparse.ArgumentTypeError(f"unknown solver {name!r}: choose from {', '.join(SOLVERS)}")
    known = [field.name for field in fields(SOLVERS[name])]
    settings = {}
    for item in filter(None, rest.split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in known:
            raise argparse.ArgumentTypeError(f"{name} has no setting {key!r}: choose from {', '.join(known)}")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise argparse.ArgumentTypeError(f"{item!r} is not of the form setting=number") from None
    try:
        return NamedSolver(text, SOLVERS[name](**settings))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_steps(text: str) -> list[int]:
    """Step counts from a list of numbers and ranges, such as ``0-20,30,50``: sorted, each once.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    steps: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", item)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of step counts such as 0-20,30,50")
        first = int(match[1])
        steps.update(range(first, int(match[2] or first) + 1))
    if not steps:
        raise argparse.ArgumentTypeError(f"{text!r} names no step count")
    return sorted(steps)
