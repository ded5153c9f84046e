"""Command-line values that benchmarks share: solver settings and lists of step counts."""

from __future__ import annotations

import argparse
import ast
import re
from dataclasses import dataclass, fields

import deqkit

DEFAULTS = (deqkit.FixedPointIteration, deqkit.Anderson, deqkit.Broyden)
_OTHERS = (deqkit.NewtonKrylov, deqkit.ReversibleIteration, deqkit.Auto, deqkit.MixedPrecision)
_FOR_AFFINE = (deqkit.GMRES, deqkit.BiCGSTAB)
SOLVERS: dict[str, type[deqkit.Solver]] = {cls.name: cls for cls in (*DEFAULTS, *_OTHERS, *_FOR_AFFINE)}


@dataclass(frozen=True)
class NamedSolver:
    """A solver and what it is called in tables: the words it was asked for with."""

    label: str
    solver: deqkit.Solver


UNROLL = "unroll"
# Plain steps of an i-FPN neck, without a look at the residual at the end: no solver of deqkit.
UNROLLED = NamedSolver(UNROLL, deqkit.FixedPointIteration())


def default_solvers() -> list[NamedSolver]:
    """Those that are measured unless others are asked for, with their default settings."""
    return [NamedSolver(cls.name, cls()) for cls in DEFAULTS]


def named(solver: str | deqkit.Solver) -> NamedSolver:
    """A solver under the words that `parse_solver` would take for it."""
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}")
        return NamedSolver(solver, SOLVERS[solver]())
    values = ((field, getattr(solver, field.name)) for field in fields(solver))
    changed = ",".join(f"{field.name}={value}" for field, value in values if value != field.default)
    return NamedSolver(f"{solver.name}:{changed}" if changed else solver.name, solver)


def parse_solver(text: str, *, affine: bool = False) -> NamedSolver:
    """A solver from ``NAME`` or ``NAME:setting=value,setting=value``.

    Args:
        text: the words.
        affine: whether solvers are accepted that solve equations affine in x and no others.

    Raises:
        argparse.ArgumentTypeError: an unknown name or setting, or a value that the solver refuses.
    """
    name, _, rest = text.partition(":")
    accepted = [key for key, cls in SOLVERS.items() if affine or not cls.for_affine]
    if name not in accepted:
        reason = f"{name} solves equations affine in x alone" if name in SOLVERS else f"unknown solver {name!r}"
        raise argparse.ArgumentTypeError(f"{reason}: choose from {', '.join(accepted)}")
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


def positive_int(text: str) -> int:
    """A number of things of which there must be one.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
