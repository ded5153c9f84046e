"""L6. The equilibrium layer: `deqkit.solve` with its settings, as a module."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from deqkit.adjoints import Adjoint
from deqkit.api import solve
from deqkit.nn.module_check import check_module, describe
from deqkit.nn.parametrization import hold_parametrizations
from deqkit.nn.warm_start import trustworthy
from deqkit.solution import Solution
from deqkit.solvers import Solver


class FixedPoint(nn.Module):
    """A layer whose output is the fixed point of another module: ``layer(x0, *args) -> x* = module(x*, *args)``.

    The settings are those of `deqkit.solve`; they are attributes and may be changed between calls.

    Args:
        module: f, called as ``module(x, *args)``.
        solver: see `deqkit.solve`, as are the others.
        adjoint: see there.
        rtol: see there.
        atol: see there.
        max_steps: limit of solver steps.
        eval_max_steps: the limit in eval mode; None takes ``max_steps``.
        norm: see there.
        batch_dims: see there.
        on_failure: see there.
        trace: see there.
        keep: steps whose states are returned too, for a loss on the trajectory.
        has_aux: whether the module returns a pair ``(f(x), aux)``.
        warm_start: start from the fixed points of the last call, for data that change little from call to call (the
            frames of a video, the same batch again). Where shapes, dtype or device have changed, and for samples that
            did not converge (or, in a fixed number of steps, did not stay finite), x0 is used. `reset` forgets them.
        sample_args: see `deqkit.solve`; positions in ``*args`` of `forward`.
        check: whether to look once, at the first call in training mode, for modules inside that leave f without a fixed
            point, such as BatchNorm and dropout, and to warn of them: see `check_module`.

    Attributes:
        last_solution: the `Solution` of the last call, detached; None before the first. Copies and pickles start
            without it.
        num_monitors: how many a `deqkit.Monitor` report this layer's failures. If any, `on_failure` "warn" does not
            warn.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: a setting unknown or out of range.

    Example:
        >>> class Cell(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(8, 8)
        ...     def forward(self, x, inputs):
        ...         return torch.tanh(0.5 * self.linear(x) + inputs)
        >>> layer = FixedPoint(Cell(), max_steps=30)
        >>> x = layer(torch.zeros(4, 8), torch.randn(4, 8))
        >>> print(layer.last_solution)
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        solver: str | Solver = "anderson",
        adjoint: str | Adjoint = "implicit",
        rtol: float = 1e-4,
        atol: float = 0.0,
        max_steps: int = 50,
        eval_max_steps: int | None = None,
        norm: str | Callable[[Any], Tensor] | None = None,
        batch_dims: int = 1,
        on_failure: Literal["warn", "raise", "ignore"] = "warn",
        trace: bool = False,
        keep: Iterable[int] = (),
        has_aux: bool = False,
        warm_start: bool = False,
        check: bool = True,
        sample_args: Iterable[int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        for name, flag in (("warm_start", warm_start), ("check", check)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r}")
        self.module = module
        self.solver, self.adjoint, self.norm = solver, adjoint, norm
        self.rtol, self.atol = rtol, atol
        self.max_steps, self.eval_max_steps = max_steps, eval_max_steps
        self.batch_dims, self.on_failure, self.trace = batch_dims, on_failure, trace
        self.keep = tuple(keep) if isinstance(keep, Iterable) else keep
        self.has_aux, self.warm_start = has_aux, warm_start
        self.sample_args = tuple(sample_args) if isinstance(sample_args, Iterable) else sample_args
        self.num_monitors = 0
        self._listeners: dict[int, Callable[[tuple[Any, ...]], None]] = OrderedDict()  # told the args of every solve
        self._is_checked = not check
        hold_parametrizations(module)
        self._check_settings()
        self._last_solution: Solution | None = None

    @property
    def last_solution(self) -> Solution | None:
        """See the class."""
        return self._last_solution

    @property
    def settings(self) -> dict[str, Any]:
        """What a call in the present mode hands to `deqkit.solve`."""
        names = (
            "solver", "adjoint", "rtol", "atol", "norm", "batch_dims", "on_failure", "trace", "keep", "has_aux",
            "sample_args",
        )  # fmt: skip
        limit = self.max_steps if self.training or self.eval_max_steps is None else self.eval_max_steps
        settings = {name: getattr(self, name) for name in names} | {"max_steps": limit}
        if self.num_monitors and self.on_failure == "warn":
            settings["on_failure"] = "ignore"
        return settings

    def forward(self, x0: Any, *args: Any) -> Any:
        """The fixed point.

        Args:
            x0: where to start, a tensor or pytree of tensors (*batch, ...).
            *args: further arguments of the module.

        Returns:
            The fixed point, of x0's structure. With ``keep``: a list of the states asked for, by rising step, and the
            fixed point last. With ``has_aux``: a pair of that and the auxiliary output.

        Raises:
            ConvergenceError: some samples did not converge, under ``on_failure="raise"``.
        """
        if self.training and not (self._is_checked or torch.compiler.is_compiling()):
            self._check_module()
        start = self._start(x0) if self.warm_start else x0
        solution = solve(self.module, start, args=args, **self.settings)
        self._last_solution = solution.detach()
        for listener in self._listeners.values():
            listener(args)
        out = [*solution.states.values(), solution.value] if self.keep else solution.value
        return (out, solution.aux) if self.has_aux else out

    def listen(self, listener: Callable[[tuple[Any, ...]], None]) -> RemovableHandle:
        """Have a function told what ``args`` the module was called with, after every solve.

        A subclass may call it with others than its own forward method gets. Copies and pickles know no listeners.

        Args:
            listener: called as ``listener(args)``.

        Returns:
            A handle, whose ``remove()`` ends it.
        """
        handle = RemovableHandle(self._listeners)
        self._listeners[handle.id] = listener
        return handle

    def reset(self) -> None:
        """Forget the last solution, and with it the warm start."""
        self._last_solution = None

    def _check_module(self) -> None:
        """Warn of what `check_module` finds, once: by the first call the module is as it is going to be used."""
        self._is_checked = True
        hold_parametrizations(self.module)
        findings = check_module(self.module)
        if findings:
            warnings.warn(f"{describe(findings)}\n(check=False silences this.)", UserWarning, stacklevel=5)

    def _start(self, x0: Any) -> Any:
        if self._last_solution is None:
            return x0
        given, spec = tree_flatten(x0)
        last, last_spec = tree_flatten(self._last_solution.value)
        if spec != last_spec or not all(_alike(a, b) for a, b in zip(given, last, strict=True)):
            return x0
        good = trustworthy(self._last_solution)
        mask = [good.reshape(good.shape + (1,) * (leaf.dim() - good.dim())) for leaf in given]
        leaves = [torch.where(m, b, a) for m, a, b in zip(mask, given, last, strict=True)]
        return tree_unflatten(leaves, spec)

    def _check_settings(self) -> None:
        """Let `solve` judge the settings now and not at the first call."""
        nothing = torch.zeros((1,) * self.batch_dims if isinstance(self.batch_dims, int) else 1, device="cpu")
        settings: dict[str, Any] = self.settings | {"sample_args": None}  # positions in arguments not known yet
        if callable(self.norm):  # meant for the state's structure, which is not known yet
            settings["norm"] = None
        for limit in (self.max_steps, self.eval_max_steps):
            settings["max_steps"] = self.max_steps if limit is None else limit
            with torch.device("cpu"):  # the layer may be made on the meta device
                solve((lambda x: (x, None)) if self.has_aux else (lambda x: x), nothing, **settings)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last solution out of copies and pickles: it reports on a batch, it is not the model."""
        return self.__dict__ | {"_last_solution": None, "num_monitors": 0, "_listeners": OrderedDict()}

    def extra_repr(self) -> str:
        """Settings shown by print()."""
        shown = {k: v for k, v in self.settings.items() if v not in (None, (), False)}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _alike(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
