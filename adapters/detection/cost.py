"""What a detector costs: parameters, multiply-accumulates, time, memory.

MACs are half the FLOPs that PyTorch's `FlopCounterMode` counts: those of convolutions and matrix products as they are
carried out, so that G counts as often as the solver evaluates it, with gradients or without, and the solver's own
products count too. Additions, norms, activations, interpolation and pooling are not counted; that is the custom.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FrozenBatchNorm2d

from adapters.detection.memory import PeakMemory
from adapters.detection.necks import ImplicitFPN, last_solution
from adapters.detection.training.schedule import Schedule, make_optimizer

__all__ = ["Cost", "Part", "Timing", "calibrate_", "count_macs", "measure_cost", "noise"]

_NECK = "backbone.fpn"
_BOXES = 8  # per image, in the training step


@dataclass(frozen=True)
class Part:
    """A part of a detector.

    Attributes:
        name: What it is.
        parameters: Numbers in its weights, the frozen ones included.
        macs: Multiply-accumulates of one evaluation, per image.
        evaluations: How often it is evaluated in a forward pass.
    """

    name: str
    parameters: int
    macs: float
    evaluations: int = 1

    @property
    def total_macs(self) -> float:
        """Multiply-accumulates of a forward pass, per image."""
        return self.macs * self.evaluations


@dataclass(frozen=True)
class Timing:
    """Time and memory of something that is repeated.

    Attributes:
        seconds: Per repetition, median.
        images_per_second: Images over that.
        macs: Multiply-accumulates per image, all that is carried out.
        peak_memory: Largest memory in use, bytes; None where it cannot be known. On an accelerator that of tensors;
            on a CPU what the process grew by since before the model was built.
    """

    seconds: float
    images_per_second: float
    macs: float
    peak_memory: int | None


@dataclass(frozen=True)
class Cost:
    """What a detector costs.

    Attributes:
        parts: Its parts in inference; their MACs add up to those of `inference`.
        parameters: All numbers in its weights.
        trainable: Those of them that are trained.
        input_size: Height and width of the network's input, padding included, pixels.
        batch_size: Images at a time.
        inference: A forward pass in eval mode, from images to detections.
        training: A training step: forward, backward, optimiser; None if not asked for.
        backward_evaluations: Vector-Jacobian products with G in the adjoint solve of the step.
        training_evaluations: Evaluations of G in its forward pass.
        device: Where it was measured.
    """

    parts: list[Part]
    parameters: int
    trainable: int
    input_size: tuple[int, int]
    batch_size: int
    inference: Timing
    training: Timing | None
    training_evaluations: int
    backward_evaluations: int
    device: str


def count_macs(run: Callable[[], Any]) -> dict[str, float]:
    """Multiply-accumulates of a call, by module: "" is all of them, other names are those of submodules.

    Args:
        run: Calls one model (or a part of it) once; on the meta device nothing is computed.
    """
    deform: Any = torch.ops.torchvision
    formulas = {
        torch.ops.aten.convolution_backward: _convolution_backward,  # PyTorch's own is wrong for groups
        deform.deform_conv2d: _deform_conv,
        deform._deform_conv2d_backward: lambda *args, **kwargs: 2 * _deform_conv(*args[1:], **kwargs),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    counts = {name: sum(by_operator.values()) / 2 for name, by_operator in counter.get_flop_counts().items()}
    total = counts.pop("Global")
    return {"": total} | {name.partition(".")[2]: macs for name, macs in counts.items() if "." in name}


def _deform_conv(x: Any, weight: Any, offset: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """FLOPs of the products; interpolating between pixels is not counted, as it is not elsewhere."""
    batch, _, height, width = offset  # of the output's height and width
    out, per_group, rows, columns = weight
    return 2 * batch * height * width * out * per_group * rows * columns


def _convolution_backward(
    grad_shape: Any, x_shape: Any, w_shape: Any, _bias: Any, _stride: Any, _padding: Any, _dilation: Any,
    transposed: bool, _output_padding: Any, _groups: int, output_mask: Sequence[bool], out_shape: Any = None, **_: Any,
) -> int:  # fmt: skip
    """As many FLOPs as the convolution for the input's gradient, and as many for the weight's."""
    pixels = x_shape if transposed else grad_shape
    forward = 2 * pixels[0] * pixels[2:].numel() * w_shape.numel()
    return forward * (int(output_mask[0]) + int(output_mask[1]))


def split(model: nn.Module, macs: dict[str, float], batch_size: int = 1) -> list[Part]:
    """The parts of a detector, with G by the evaluation.

    Args:
        model: A detector after the forward pass that was counted.
        macs: What `count_macs` returned.
        batch_size: Images in that pass.
    """
    neck = model.get_submodule(_NECK)
    per_image = {name: count / batch_size for name, count in macs.items()}

    def part(name: str, *modules: str) -> Part:
        found = [model.get_submodule(module) for module in modules]
        return Part(name, sum(map(_parameters, found)), sum(per_image.get(module, 0.0) for module in modules))

    parts = [part("backbone", "backbone.body")]
    if isinstance(neck, ImplicitFPN):
        whole, g = part("neck", _NECK), part("G", f"{_NECK}.module")
        inside = [f"{_NECK}.{name}.{i}" for name in ("inner_blocks", "layer_blocks") for i in _children(neck, name)]
        if neck.extra_blocks is not None:
            inside.append(f"{_NECK}.extra_blocks")
        basis = part("neck: laterals, extra levels", *inside)
        evaluations = neck.unroll if neck.unroll is not None else neck.last_solution.num_fn_evals  # pyright: ignore
        parts.append(Part(basis.name, whole.parameters - g.parameters, basis.macs))
        if evaluations:
            parts.append(Part("neck: G, per evaluation", g.parameters, g.macs / evaluations, evaluations))
        parts.append(Part("neck: solver", 0, whole.macs - basis.macs - g.macs))
    else:
        parts.append(part("neck: FPN", _NECK))
    heads = [name for name, module in model.named_children() if name not in ("backbone", "transform")]
    parts += [part(name.replace("_", " "), name) for name in heads]
    rest = per_image[""] - sum(p.total_macs for p in parts)
    if abs(rest) > 1e-9 * per_image[""]:
        parts.append(Part("other", 0, rest))
    return [p for p in parts if p.parameters or p.macs]


def _children(neck: nn.Module, name: str) -> range:
    modules: Any = getattr(neck, name)
    return range(len(modules) if modules is not None else 0)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def noise(count: int, height: int, width: int, device: torch.device | str, seed: int = 0) -> list[Tensor]:
    """Random images (3, H, W) in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, height, width, generator=generator).to(device) for _ in range(count)]


@torch.no_grad()
def calibrate_(model: Any, images: Sequence[Tensor]) -> None:
    """Gives frozen norms that nobody has trained the statistics of these images, in place.

    With those that they are made with, mean 0 and variance 1, the activations of a deep backbone grow beyond reason,
    and with them the number of steps that a solver takes.
    """

    def take_statistics(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0].float(), dim=(0, 2, 3))
        norm.running_mean.copy_(mean)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        norm.running_var.copy_(variance)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]

    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(take_statistics) for norm in norms]
    if norms:
        batch, _ = model.transform(list(images))
        model.backbone.body(batch.tensors)
    for hook in hooks:
        hook.remove()


def measure_cost(
    build: Callable[[], Any],
    images: Sequence[Tensor],
    *,
    repeats: int = 5,
    training: bool = True,
    memory: PeakMemory | None = None,
) -> Cost:
    """Counts and measures a detector on a batch of images.

    Args:
        build: Makes the detector, on the device to measure on.
        images: A batch of images (3, H, W) in 0..1, on that device.
        repeats: Repetitions that the median time is taken over, after one that warms up.
        training: Whether to measure a training step as well. The learning rate is zero.
        memory: Made before the memory to be measured was taken. Default: made before ``build`` is called.

    Raises:
        ValueError: ``repeats`` is not positive, or there is no image.
    """
    if repeats < 1 or not images:
        raise ValueError(f"repeats must be at least 1 and a batch have an image, got {repeats} and {len(images)}")
    device = images[0].device
    memory = memory or PeakMemory(device)
    model = build()
    sizes: list[tuple[int, int]] = []
    watch = model.transform.register_forward_hook(lambda m, i, out: sizes.append(tuple(out[0].tensors.shape[-2:])))
    neck = model.get_submodule(_NECK)

    model.eval()
    infer = torch.no_grad()(lambda: model(list(images)))
    macs = count_macs(infer)
    parts = split(model, macs, len(images))
    memory.reset()
    seconds = _median_seconds(infer, repeats, device)
    inference = Timing(seconds, len(images) / seconds, macs[""] / len(images), memory.peak())
    watch.remove()

    step_timing, forward, backward = None, 0, 0
    if training:
        step = _training_step(model.train(), images)
        macs = count_macs(step)
        solution = last_solution(neck)
        forward = getattr(neck, "unroll", None) or 0
        if solution is not None:
            forward, backward = solution.num_fn_evals, solution.adjoint_stats.num_fn_evals
        memory.reset()
        seconds = _median_seconds(step, repeats, device)
        step_timing = Timing(seconds, len(images) / seconds, macs[""] / len(images), memory.peak())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    where = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, threads: {torch.get_num_threads()}"
    )
    return Cost(
        parts, _parameters(model), trainable, sizes[0], len(images), inference, step_timing, forward, backward, where
    )


def _training_step(model: Any, images: Sequence[Tensor]) -> Callable[[], None]:
    optimizer = make_optimizer(model, Schedule(1, lr=0.0, warmup_steps=0))["optimizer"]
    generator = torch.Generator().manual_seed(0)
    targets = []
    for image in images:
        size = torch.tensor([image.shape[2], image.shape[1]])
        corners = torch.rand(_BOXES, 2, generator=generator) * 0.6
        sides = 0.1 + 0.3 * torch.rand(_BOXES, 2, generator=generator)
        boxes = torch.cat([corners * size, (corners + sides) * size], dim=1)
        targets.append(
            {"boxes": boxes.to(image.device), "labels": torch.ones(_BOXES, dtype=torch.long, device=image.device)}
        )

    def step() -> None:
        torch.stack(list(model(list(images), targets).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _median_seconds(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    def timed() -> float:
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    timed()
    return statistics.median(timed() for _ in range(repeats))
