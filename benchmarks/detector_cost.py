"""Training steps and inferences of one detector with one neck: the clock, the calls of G, the MACs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peak_memory import peak_tensor_bytes
from reporting import synchronize
from torch import Tensor

import deqkit
from adapters.detection import ImplicitFPN
from adapters.detection.cost import calibrate_, count_macs
from adapters.detection.cost_report import as_trained
from adapters.detection.memory import PeakMemory
from adapters.detection.training import DetectorConfig

EXPLICIT = "fpn"
_SHORT = deqkit.Anderson(history=3)
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    EXPLICIT: {},
    "unroll-2": {"unroll": 2},
    "phantom": {"preset": "accurate", "adjoint": "phantom"},
    "neumann": {"preset": "accurate", "adjoint": deqkit.NeumannAdjoint(num_terms=3)},
    "fast": {"preset": "fast"},
    "accurate": {"preset": "accurate"},
    "anderson": {
        "solver": _SHORT, "rtol": 1e-3, "max_steps": 50, "adjoint": deqkit.ImplicitAdjoint(_SHORT, rtol=1e-3),
    },
    "paper": {"preset": "paper"},
}  # fmt: skip
"""Settings of the neck by name: G is the same, and how its fixed point is found and differentiated differs."""


def _loose(rtol: float, adjoint: Any) -> dict[str, Any]:
    """The preset "fast" to another tolerance with another adjoint."""
    return {"preset": "fast", "rtol": rtol, "adjoint": adjoint}


CANDIDATES: Mapping[str, Mapping[str, Any]] = {
    "3e-2/1e-1": _loose(3e-2, deqkit.ImplicitAdjoint(_SHORT, rtol=1e-1)),
    "1e-1/1e-1": _loose(1e-1, deqkit.ImplicitAdjoint(_SHORT, rtol=1e-1)),
    "3e-2/neumann-3": _loose(3e-2, deqkit.NeumannAdjoint(num_terms=3)),
    "1e-1/neumann-3": _loose(1e-1, deqkit.NeumannAdjoint(num_terms=3)),
    "1e-1/neumann-2": _loose(1e-1, deqkit.NeumannAdjoint(num_terms=2)),
    "1e-1/jfb": _loose(1e-1, "jfb"),
}
"""What "fast" could be: its solver to a looser tolerance, with a looser or a cheaper adjoint."""
ALL_VARIANTS: Mapping[str, Mapping[str, Any]] = {**VARIANTS, **CANDIDATES}

SOLVE_SETTINGS = ("unroll", "preset", "solver", "adjoint", "rtol", "max_steps", "eval_max_steps")
BOXES = 8  # per image


@dataclass(frozen=True)
class Setting:
    """How all detectors of a comparison are run.

    Attributes:
        channels_last: weights, and with them all maps, in that memory format.
        autocast: precision that G is computed in, of the implicit necks alone; None for float32.
        compiled: G is compiled where it is timed; the explicit FPN is not.
    """

    channels_last: bool = False
    autocast: str | None = None
    compiled: bool = False

    def __str__(self) -> str:
        parts = (
            "channels_last" if self.channels_last else "", f"G in {self.autocast}" if self.autocast else "",
            "G compiled" if self.compiled else "",
        )  # fmt: skip
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Calls:
    """What G was called for, in a training step or an inference.

    Attributes:
        steps: solver steps, mean over images; NaN without a solver.
        converged: share of the images whose solve met its tolerance; NaN without a tolerance.
        forward: evaluations of G.
        adjoint_steps: steps of the adjoint solve, mean over images; NaN without one.
        adjoint_converged: share of the images whose adjoint solve met its tolerance; NaN without one.
        backward: vector-Jacobian products of G, the last one included, which goes on to its weights.
        weights: those that go on to its weights.
    """

    steps: float = float("nan")
    converged: float = float("nan")
    forward: int = 0
    adjoint_steps: float = float("nan")
    adjoint_converged: float = float("nan")
    backward: int = 0
    weights: int = 0

    @property
    def equivalents(self) -> int:
        """The cost in evaluations of G: a product costs one, and so do the gradients of the weights."""
        return self.forward + self.backward + self.weights


@dataclass(frozen=True)
class Lap:
    """Seconds of a training step or an inference, those of its neck, forward and backward, and processor time.

    The processor time, of all threads, hardly knows what else runs on the machine. On CUDA it means nothing.
    """

    seconds: float
    neck: float
    processor: float


class Subject:
    """A detector, images to feed it with, and an optimiser that leaves the weights as they are (its rate is zero).

    Args:
        config: the detector; settings of the neck that say how to solve are those of the variant.
        variant: a name in `ALL_VARIANTS`.
        images: maps (3, H, W) in 0..1, on the device to run on.
        seed: of the weights, of the boxes to find, and of what a detector draws in training.
        weights: state dict of a trained detector; the explicit FPN takes what fits.
        setting: how it is run.
    """

    def __init__(
        self, config: DetectorConfig, variant: str, images: Sequence[Tensor], seed: int,
        weights: Mapping[str, Tensor] | None = None, setting: Setting = Setting(),
    ) -> None:  # fmt: skip
        self.variant, self.images, self.seed, self.device = variant, list(images), seed, images[0].device
        design = {name: value for name, value in config.neck_settings.items() if name not in SOLVE_SETTINGS}
        if setting.autocast:
            design["autocast"] = setting.autocast
        neck = {} if variant == EXPLICIT else {**design, **ALL_VARIANTS[variant]}
        config = replace(config, neck="fpn" if variant == EXPLICIT else "ifpn", neck_settings=neck)
        self.config, self.setting = config, setting
        torch.manual_seed(seed)
        self.model: Any = as_trained(config.build(), config).to(self.device)
        if weights is None:
            calibrate_(self.model, self.images)
        else:
            known = {name: w for name, w in weights.items() if variant != EXPLICIT or "backbone.fpn." not in name}
            self.model.load_state_dict(known, strict=variant != EXPLICIT)
        if setting.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.targets = [_boxes(image, seed + i) for i, image in enumerate(self.images)]
        self.optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9, weight_decay=1e-4)
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer.step()  # makes the momentum, which a training has from its second step on
        optimizer.zero_grad(set_to_none=True)
        return optimizer

    @property
    def neck(self) -> Any:
        return self.model.backbone.fpn

    def train_step(self, after_backward: Callable[[], None] = lambda: None) -> None:
        """Forward, losses, backward, optimiser."""
        torch.manual_seed(self.seed)  # an R-CNN draws the proposals that it learns from
        self.model.train()
        torch.stack(list(self.model(self.images, self.targets).values())).sum().backward()
        after_backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def infer(self, after: Callable[[], None] = lambda: None) -> None:
        """From images to detections."""
        self.model.eval()
        self.model(self.images)
        after()

    def compile(self) -> None:
        """Compile G where the setting says so, for training and for inference; copies are not compiled."""
        if self.setting.compiled and self.variant != EXPLICIT:
            self.neck.transform.compile()
            self.train_step()
            self.infer()

    def lap(self, action: str) -> Lap:
        """Time "train_step" or "infer" once."""
        watch = NeckWatch(self.neck, self.device)
        with watch.attached():
            synchronize(self.device)
            start, used = time.perf_counter(), time.process_time()
            getattr(self, action)(lambda: watch.mark("end"))
            synchronize(self.device)
            seconds, used = time.perf_counter() - start, time.process_time() - used
        return Lap(seconds, watch.seconds(backward=action == "train_step"), used)

    def count(self, action: str) -> tuple[Calls, dict[str, float]]:
        """What "train_step" or "infer" calls G for, and its MACs per image by module ("" is all of them)."""
        with counted_calls(self.neck) as counted:
            macs = count_macs(getattr(self, action))
        return self._calls(counted), {name: value / len(self.images) for name, value in macs.items()}

    def _calls(self, counted: Counted) -> Calls:
        calls = counted.calls
        solution = getattr(self.neck, "last_solution", None)
        if solution is None:
            return calls
        calls = replace(calls, steps=_mean(solution.num_steps))
        if solution.rtol > 0:
            calls = replace(calls, converged=_mean(solution.converged))
        stats = solution.adjoint_stats
        if self.model.training and stats is not None and stats.status is not None:
            calls = replace(calls, adjoint_steps=_mean(stats.num_steps))
            if stats.rtol > 0:
                calls = replace(calls, adjoint_converged=_mean(stats.converged))
        return calls

    def copy(self, steps: int | None = None) -> Subject:
        """The same with tensors of its own, and on request so many steps, forward and backward."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        other.optimizer = other._make_optimizer()
        if steps is not None:
            set_steps(other.neck, steps)
        return other

    def peak_memory(self, steps: int | None = None) -> tuple[int, int]:
        """Bytes in tensors at the peak of a training step and of an inference, weights and momentum included."""
        first, second = peak_tensor_bytes(
            self.device, lambda: self.copy(steps), lambda subject: subject.train_step(), lambda subject: subject.infer()
        )
        return first, second

    def peak_of_training(self, steps: int) -> int:
        """Bytes in tensors at the peak of a training step with so many steps of the neck."""
        return peak_tensor_bytes(self.device, lambda: self.copy(steps), lambda subject: subject.train_step())[0]

    def process_memory(self) -> int | None:
        """Bytes that the process grows by in a training step, the copy of the detector that it is taken with included.

        What C's allocator keeps in reserve and the scratch of oneDNN count. None on CUDA and where it is not known.
        """
        if self.device.type != "cpu":
            return None
        memory = PeakMemory(self.device)
        subject = self.copy()
        memory.reset()
        subject.train_step()
        return memory.peak()


def set_steps(neck: ImplicitFPN, steps: int) -> None:
    """Let a neck take exactly so many steps, forward and, where its adjoint is a solve, backward."""
    if neck.unroll is not None:
        neck.unroll = steps
        return
    neck.rtol, neck.max_steps, neck.eval_max_steps = 0.0, steps, steps
    if isinstance(neck.adjoint, deqkit.ImplicitAdjoint):
        neck.adjoint = replace(neck.adjoint, rtol=0.0, max_steps=steps)


def _boxes(image: Tensor, seed: int) -> dict[str, Tensor]:
    """Random boxes to find in an image."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([image.shape[2], image.shape[1]])
    corner = 0.6 * torch.rand(BOXES, 2, generator=generator)
    sides = 0.1 + 0.3 * torch.rand(BOXES, 2, generator=generator)
    boxes = torch.cat([corner * size, (corner + sides) * size], dim=1)
    return {"boxes": boxes.to(image.device), "labels": torch.ones(BOXES, dtype=torch.long, device=image.device)}


def _mean(x: Tensor) -> float:
    return x.double().mean().item()


@dataclass
class Counted:
    """Evaluations of G; for those with a graph, the products that were taken with it."""

    forward: int = 0
    products: list[int] = field(default_factory=list)

    @property
    def calls(self) -> Calls:
        """All of them."""
        return Calls(forward=self.forward, backward=sum(self.products), weights=sum(map(bool, self.products)))


@contextmanager
def counted_calls(neck: Any, counted: Counted | None = None) -> Any:
    """Counts evaluations of G and gradients that pass through them, from outside; on request in what is there."""
    counted = Counted() if counted is None else counted

    def evaluated(module: Any, args: Any, output: Any) -> None:
        counted.forward += 1
        if output[0].requires_grad:
            index = len(counted.products)
            counted.products.append(0)

            def passed(gradient: Tensor) -> None:
                counted.products[index] += 1

            output[0].register_hook(passed)

    if not isinstance(neck, ImplicitFPN):
        yield counted
        return
    handle = neck.module.register_forward_hook(evaluated)
    try:
        yield counted
    finally:
        handle.remove()


class NeckWatch:
    """Times a neck inside a step.

    Backward it runs from the first gradient of its outputs to the first that leaves it: autograd goes back in the order
    of the forward pass, so that the head is then done, and the backbone has not begun. On CUDA the marks are events,
    which do not hold the stream up.
    """

    def __init__(self, neck: Any, device: torch.device) -> None:
        self.neck, self.device = neck, device
        self._marks: dict[str, Any] = {}

    def mark(self, name: str, once: bool = False) -> None:
        """Remember when this happened; ``once``: the first time alone."""
        if once and name in self._marks:
            return
        if self.device.type == "cuda":
            self._marks[name] = torch.cuda.Event(enable_timing=True)
            self._marks[name].record()
        else:
            self._marks[name] = time.perf_counter()

    @contextmanager
    def attached(self) -> Any:
        """Listen to the neck."""

        def enter(module: Any, args: Any) -> None:
            self.mark("in")
            self._on_gradient(args[0].values(), "left")

        def leave(module: Any, args: Any, output: Any) -> None:
            self.mark("out")
            self._on_gradient(output.values(), "arrived")

        handles = [self.neck.register_forward_pre_hook(enter), self.neck.register_forward_hook(leave)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _on_gradient(self, tensors: Any, name: str) -> None:
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self.mark(name, once=True))

    def seconds(self, backward: bool) -> float:
        """Time inside the neck; call it when the device has done everything."""
        total = self._between("in", "out")
        if backward:
            total += self._between("arrived", "left" if "left" in self._marks else "end")
        return total

    def _between(self, first: str, second: str) -> float:
        a, b = self._marks[first], self._marks[second]
        return a.elapsed_time(b) / 1e3 if self.device.type == "cuda" else b - a
