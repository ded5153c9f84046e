"""L6. The command line of the doctor: ``python -m deqkit.diagnose module:factory``.

``factory()`` returns ``(f, x0)``, ``(f, x0, args)``, or a dict of arguments of `deqkit.diagnose`, such as
``{"f": f, "x0": x0, "args": (b,), "batch_dims": 2}``. The module is found as by ``import``, from the current folder.

The exit status is 0 for an f without a failed check for which a solver converges on every sample, 1 for any other f,
and 2 where nothing could be examined.

The package exports a function of this module's name. It never imports the module; whoever does finds it in the place
of the function, and may call it as such.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Any

from deqkit.diagnosis import diagnose

_HEALTHY, _AILING, _UNUSABLE = 0, 1, 2
_ACCEPTED = tuple(inspect.signature(diagnose).parameters)


class UsageError(Exception):
    """What the user gave cannot be examined; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Examine what the command line names, print the report, and return the exit status.

    Args:
        argv: arguments of the command; None takes those of the process.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        arguments = load(options.target)
        given = {"rtol": options.rtol, "max_steps": options.max_steps}
        arguments |= {name: value for name, value in given.items() if value is not None}
        try:
            found = diagnose(**arguments)
        except (TypeError, ValueError) as error:  # of the arguments: what f raises is a finding
            raise UsageError(f"{options.target}: {error}") from error
        print(found)
        if options.plot:
            _save(found, options.plot)
    except UsageError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return _UNUSABLE
    return _HEALTHY if found.healthy else _AILING


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deqkit.diagnose",
        description="Find out why a fixed point does or does not converge, and what to do about it.",
        epilog="exit status: 0 healthy, 1 not, 2 nothing could be examined",
    )
    parser.add_argument(
        "target",
        metavar="module:factory",
        help="a function that returns f and x0, and args if there are any; or a dict",
    )
    parser.add_argument("--plot", metavar="FILE", help="write the figure there, in the format of its suffix")
    parser.add_argument("--rtol", type=float, help="tolerance of the solves")
    parser.add_argument("--max-steps", type=int, help="limit of solver steps, and of all other work in proportion")
    return parser


def load(target: str) -> dict[str, Any]:
    """Arguments of `deqkit.diagnose` from what ``module:factory`` names.

    Raises:
        UsageError: there is no such module or factory, it fails, or it returns something else.
    """
    path, colon, name = target.partition(":")
    if not (path and colon and name):
        raise UsageError(f"expected module:factory, such as my.models:make_cell, got {target!r}")
    if path.endswith(".py") or "/" in path:
        hint = path.removesuffix(".py").strip("./").replace("/", ".")
        raise UsageError(f"expected a module as `import` names it, not a file: try {hint}:{name}")
    factory: Any = _import(path)
    for part in name.split("."):
        if not hasattr(factory, part):
            there = [key for key, value in vars(factory).items() if callable(value) and not key.startswith("_")]
            raise UsageError(f"{path} has no {name!r}; it has {', '.join(there[:10]) or 'nothing that can be called'}")
        factory = getattr(factory, part)
    if not callable(factory):
        raise UsageError(f"{target} must be a function without arguments, got {type(factory).__name__}")
    try:
        made = factory()
    except Exception as error:
        traceback.print_exc()
        raise UsageError(f"{target}() failed, see above") from error
    return _arguments(target, made)


def _import(path: str) -> Any:
    if "" not in sys.path and "." not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does; a console script does not
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and (path == error.name or path.startswith(f"{error.name}.")):
            raise UsageError(
                f"no module named {error.name!r} is found from here; is its folder the current one?"
            ) from None
        traceback.print_exc()
        raise UsageError(f"{path} cannot be imported, see above") from error
    except Exception as error:
        traceback.print_exc()
        raise UsageError(f"{path} cannot be imported, see above") from error


def _arguments(target: str, made: Any) -> dict[str, Any]:
    if isinstance(made, tuple) and len(made) in (2, 3):
        return dict(zip(("f", "x0", "args"), made, strict=False))
    if isinstance(made, dict):
        unknown = [key for key in made if key not in _ACCEPTED]
        if unknown:
            raise UsageError(f"{target}() returned unknown keys {unknown}: choose from {list(_ACCEPTED)}")
        missing = [key for key in ("f", "x0") if key not in made]
        if missing:
            raise UsageError(f"{target}() returned a dict without {' and '.join(missing)}")
        return dict(made)
    what = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
    raise UsageError(f"{target}() must return (f, x0), (f, x0, args) or a dict of arguments, got {what}")


def _save(found: Any, file: str) -> None:
    try:
        found.plot().savefig(file, dpi=120)
    except (ImportError, OSError, ValueError) as error:  # no matplotlib, no such folder, no such format
        raise UsageError(f"no figure was written to {file}: {error}") from error


class _CallableModule(types.ModuleType):
    """A module that may be called as the function of its name."""

    __call__ = staticmethod(diagnose)


if __name__ == "__main__":
    sys.exit(main())
__wrapped__ = diagnose  # whose signature it then shows
sys.modules[__name__].__class__ = _CallableModule
