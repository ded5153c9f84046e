"""L6. The Monitor: what a training's solves cost and how they end, from hooks on the layers that solve.

A solve costs the training a few references to tensors that exist anyway; they are summed up on the device, and the
host reads the sums only when figures are asked for. The adjoint of a solve is known after its backward pass: its
report, empty at first, waits until it has been filled in.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn

from deqkit import arrays
from deqkit.errors import ConvergenceWarning
from deqkit.monitor.hooks import Hook, find_layers
from deqkit.monitor.loggers import make_loggers
from deqkit.monitor.record import ADJOINT, Record, Window
from deqkit.monitor.tally import Totals
from deqkit.nn import FixedPoint, hold
from deqkit.solution import Solution
from deqkit.solvers.base import as_int
from deqkit.spectral import spectral_radius


class Monitor:
    """Collects how the solves of a model go over a training: steps, residuals, failures, adjoint, spectral radius.

    It finds the layers by itself, costs a few microseconds per solve, never makes the host wait for the device between
    two flushes, and changes nothing about the training. Call `step` at the end of every training step:

        >>> monitor = deqkit.Monitor(model, logger="runs/solver.csv", every=50)
        >>> for batch in batches:
        ...     loss(model(batch)).backward()
        ...     optimizer.step()
        ...     monitor.step()
        >>> print(monitor)

    With Lightning: ``Monitor(module, logger=trainer.loggers)`` and then ``monitor.step(trainer.global_step)``.

    Layers are all modules with a ``last_solution``: `deqkit.nn.FixedPoint` and others that keep to that name. What they
    solve in eval mode is kept apart, under ``<layer>.eval``.

    Warnings. From the first `step` (with ``every``) or `flush` on, or within ``with Monitor(model):``, the layers' own
    `ConvergenceWarning` of every single solve is held back; instead the Monitor warns when a kind of failure first
    occurs in a layer, and sums up when it is detached, or at the end of the program. That takes a layer with an
    attribute ``num_monitors``, as `FixedPoint` has one; others go on warning. ``on_failure="raise"`` is not held back.

    Copies and pickles of the model are not monitored. Under distributed training every rank has figures of its own:
    give a logger to rank 0 alone, or a file to each. A solve of a fixed number of steps that `torch.compile` has made
    part of a graph is not seen; other solves of compiled models are.

    Args:
        model: where the layers are; None if solutions are handed to `record` only.
        logger: where figures go: the path of a CSV file, a TensorBoard ``SummaryWriter``, a Lightning logger (or
            anything else with ``log_metrics(figures, step)``), or a list of those.
        every: training steps from one flush to the next; None leaves it to calls of `flush`.
        on_failure: "warn" as described, or "ignore": then the layers warn as they did.
        radius_every: measure the spectral radius of df/dx at the fixed point of every so many-th solve of a layer, to
            about 1 %, see `deqkit.spectral_radius`; None for never. Unlike everything else that costs calls of f (one,
            and up to 100 vector-Jacobian products) and makes the host wait. Only for `FixedPoint` layers, and not in
            inference mode; a layer that cannot be differentiated is warned of and left out from then on.

    Attributes:
        history: what was flushed: one dict per flush, with "step" and the figures by "<layer>/<figure>". See
            `deqkit.plots.history`.
        layers: names of the layers found.

    Figures (a name with "adjoint_" before it is that of the backward solves; means and shares are over samples):
        solves, failed_solves: how many, and how many with a sample that failed.
        calls_mean: evaluations of f per solve; of the adjoint: vector-Jacobian products.
        steps_mean, steps_max: solver steps.
        relative_residual_median, relative_residual_worst: of the points returned; the median over the latest 65536.
        failed: share of samples that did not converge, 0 to 1; failed_max_steps and so on: by `Status`.
        spectral_radius_mean, spectral_radius_max: where it was measured.

    Raises:
        ValueError: no layer in the model, or a setting out of range.
        TypeError: a setting of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        logger: Any = None,
        every: int | None = 50,
        on_failure: Literal["warn", "ignore"] = "warn",
        radius_every: int | None = None,
    ) -> None:
        if on_failure not in ("warn", "ignore"):
            raise ValueError(f"unknown on_failure {on_failure!r}: choose one of ['warn', 'ignore']")
        self.every = None if every is None else _positive("every", every)
        self.radius_every = None if radius_every is None else _positive("radius_every", radius_every)
        self.on_failure = on_failure
        self.history: list[dict[str, float]] = []
        self._loggers = make_loggers(logger)
        self._records: dict[str, Record] = {}
        self._last_step: int | None = None
        self._lock = threading.RLock()
        self._measuring: set[int] = set()  # threads that measure a spectral radius
        self._without_radius: set[str] = set()  # records for which that has failed
        self._latest: dict[str, weakref.ref[Solution]] = {}
        self._holds_back: weakref.finalize[..., Monitor] | None = None
        self._modules = {} if model is None else find_layers(model)
        if model is not None and not self._modules:
            raise ValueError(
                f"{type(model).__name__} holds no deqkit.nn.FixedPoint and no other module with a last_solution; to "
                f"monitor calls of deqkit.solve, hand their solutions to Monitor().record"
            )
        self.layers = list(self._modules)
        hooks = {name: Hook(self._record_call, name) for name in self.layers}
        self._handles = [module.register_forward_hook(hooks[name]) for name, module in self._modules.items()]
        solved = [(name, module) for name, module in self._modules.items() if isinstance(module, FixedPoint)]
        self._handles += [module.listen(hooks[name].listen) for name, module in solved]

    def record(self, solution: Solution, name: str = "solve") -> None:
        """Enter a solve by hand, for calls of `deqkit.solve` outside a layer.

        Args:
            solution: what the solve returned. Only its report is kept, nothing of its graph.
            name: what to call it among the figures.

        Raises:
            TypeError: not a `Solution`.
        """
        if not isinstance(solution, Solution):
            raise TypeError(f"solution must be a deqkit.Solution, got {type(solution).__name__}")
        if arrays.is_capturing(solution.status.device):
            return
        with self._lock:
            if name not in self._records:
                self._records[name] = Record()
            self._records[name].add(solution)

    def compute(self) -> dict[str, float]:
        """The figures since the last flush, by "<layer>/<figure>". The host waits for the device."""
        with self._lock:
            return _by_layer({name: record.read() for name, record in self._records.items()})

    def step(self, step: int | None = None) -> dict[str, float] | None:
        """End a training step; flushes after every `every` of them.

        Args:
            step: its number; None counts on from the last one. Several calls with the same number are one step.

        Returns:
            The figures where it flushed, else None.
        """
        if self.every is not None:
            self._hold_back()
        last = self._last_step
        step = (last or 0) + 1 if step is None else as_int("step", step)
        if last is None:
            last = step - 1
        self._last_step = step
        due = self.every is not None and step // self.every > last // self.every
        return self._flush(step) if due else None

    def flush(self, step: int | None = None) -> dict[str, float]:
        """Write the figures since the last flush, warn of failures that are new, and start anew.

        Args:
            step: the training step that the figures belong to; None takes that of the last `step`.

        Returns:
            The figures by "<layer>/<figure>"; none where nothing was solved.
        """
        self._hold_back()
        return self._flush(self._last_step or 0 if step is None else as_int("step", step))

    def detach(self) -> None:
        """Flush what is left, leave the model as it was, and sum up the failures."""
        self._end(warn=True)

    def __enter__(self) -> Monitor:
        self._hold_back()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._end(warn=kind is None)

    def __str__(self) -> str:
        with self._lock:
            totals = {name: record.totals_with(record.read()) for name, record in self._records.items()}
        lines = [_summary(name, kind, part) for name, parts in totals.items() for kind, part in parts.items()]
        return "\n".join(["Monitor:" if totals else "Monitor: nothing solved yet", *filter(None, lines)])

    # ------------------------------------------------------------------------------------------------------------------

    @torch.compiler.disable(reason="a Monitor keeps its records outside compiled graphs")
    def _record_call(self, name: str, module: nn.Module, args: tuple[Any, ...] | None, solution: Solution) -> None:
        if threading.get_ident() in self._measuring:  # an inner layer, solved for the radius of an outer one
            return
        if (latest := self._latest.get(name)) is not None and latest() is solution:  # a call without a solve
            return
        self._latest[name] = weakref.ref(solution)
        name = name if module.training else f"{name}.eval"
        self.record(solution, name)
        record, device = self._records.get(name), solution.status.device
        if self.radius_every is None or record is None or (record.num_solves - 1) % self.radius_every:
            return
        if name in self._without_radius or torch.is_inference_mode_enabled() or arrays.is_capturing(device):
            return
        if not isinstance(module, FixedPoint) or args is None:
            return
        try:
            with _generators_kept(device):
                radius = self._measure_radius(module, args, solution)
        except Exception as error:  # the training can do without
            self._without_radius.add(name)
            warnings.warn(f"{name}: no spectral radius: {type(error).__name__}: {error}", UserWarning, stacklevel=2)
            return
        with self._lock:
            record.add_radius(radius)

    def _measure_radius(self, layer: FixedPoint, args: Any, solution: Solution) -> torch.Tensor:
        f = (lambda x, *rest: layer.module(x, *rest)[0]) if layer.has_aux else layer.module
        self._measuring.add(threading.get_ident())
        try:
            with hold(solution=solution):
                return spectral_radius(
                    f, solution.value, args, batch_dims=layer.batch_dims, rtol=1e-2, max_products=100, return_error=True
                ).value
        finally:
            self._measuring.discard(threading.get_ident())

    def _hold_back(self) -> None:
        """Take over the warnings of the layers."""
        if self._holds_back or self.on_failure == "ignore" or not self._modules:
            return
        # Whoever forgets `detach` is told all the same, at the latest when Python ends.
        self._holds_back = weakref.finalize(self, _warn_of_the_rest, self._records)
        for module in self._modules.values():
            if hasattr(module, "num_monitors"):
                module.num_monitors += 1  # pyright: ignore[reportOperatorIssue, reportAttributeAccessIssue]

    def _flush(self, step: int) -> dict[str, float]:
        figures = self._write(step)
        self._warn(final=False)
        return figures

    def _write(self, step: int) -> dict[str, float]:
        """End the window of every layer, and hand its figures on."""
        with self._lock:
            windows = {name: record.read() for name, record in self._records.items()}
            for name, window in windows.items():
                self._records[name].end(window)
        figures = _by_layer(windows)
        if figures:
            self.history.append({"step": step, **figures})
            for logger in self._loggers:
                logger.log_metrics(figures, step)
        return figures

    def _warn(self, final: bool) -> None:
        if self.on_failure == "warn":
            _warn(self._records, final, stacklevel=5)  # the caller of a public method

    def _end(self, warn: bool) -> None:
        for handle in self._handles:
            handle.remove()
        if self._holds_back:
            self._holds_back.detach()
            self._holds_back = None
            for module in self._modules.values():
                if hasattr(module, "num_monitors"):
                    module.num_monitors -= 1  # pyright: ignore[reportOperatorIssue, reportAttributeAccessIssue]
        self._handles, self._modules = [], {}
        self._write(self._last_step or 0)
        if warn:
            self._warn(final=True)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the figures and the settings; it is attached to nothing and writes nowhere."""
        left_out = {"_handles": [], "_modules": {}, "_loggers": [], "_holds_back": None, "_lock": None}
        return self.__dict__ | left_out | {"_latest": {}, "_measuring": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()


def _generators_kept(device: torch.device) -> AbstractContextManager[None]:
    """Leaves the generators that f may draw from as they were: the training is to draw the same numbers after it."""
    accelerators = [] if device.type == "cpu" else [device]
    return torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda")


def _warn(records: dict[str, Record], final: bool, stacklevel: int) -> None:
    for name, record in list(records.items()):
        for kind in record.news(final):
            totals = record.totals[kind]
            what = f"adjoint of {name}" if kind == ADJOINT else name
            message = f"{what}: {totals.failures()}. {totals.advice()}"
            warnings.warn(message, ConvergenceWarning, stacklevel=stacklevel)


def _warn_of_the_rest(records: dict[str, Record]) -> None:
    for record in records.values():
        record.end(record.read())
    _warn(records, final=True, stacklevel=2)


def _by_layer(windows: dict[str, Window]) -> dict[str, float]:
    return {f"{name}/{figure}": value for name, window in windows.items() for figure, value in window.figures().items()}


def _summary(name: str, kind: str, totals: Totals) -> str:
    """One line on all solves of a layer, or on their adjoint solves; empty where there were none."""
    if not totals.samples:
        return ""
    what, calls = ("  adjoint", "vector-Jacobian products") if kind == ADJOINT else (name, "calls of f")
    outcome = totals.failures() if totals.failed else f"all {totals.solves} solves converged"
    return (
        f"  {what}: {outcome}; {totals.steps / totals.samples:.1f} steps on average, {totals.most_steps} at most, "
        f"{totals.calls / totals.solves:.1f} {calls} per solve"
    )


def _positive(name: str, value: Any) -> int:
    value = as_int(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
