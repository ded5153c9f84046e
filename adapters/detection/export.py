"""Export: a trained detector with a fixed number of solver steps as one program, by `torch.export`, or as ONNX.

A solve to a tolerance looks at its residual to know when to stop, which a program without Python cannot; a fixed number
of steps can be exported. How far that number gets is told by `check_fixed_steps`.

Fixed when exporting: the size of the images, the number of steps, thresholds and limits, dtype and device. The batch
size may vary. Images come in as one tensor (B, 3, H, W), see `TensorDetector.forward` for what comes out. A program of
Faster R-CNN, or with deformable convolutions, holds operators of torchvision: import it before loading the file.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters.detection.files import written_whole
from adapters.detection.necks import ImplicitFPN
from adapters.detection.small_systems import DECOMPOSITIONS
from adapters.detection.tensor_detector import TensorDetector

__all__ = ["FixedSteps", "check_fixed_steps", "check_onnx", "export_detector", "export_onnx"]

_INPUT, _OUTPUTS = "images", ("boxes", "scores", "labels", "num_detections")


@dataclass(frozen=True)
class FixedSteps:
    """How far a fixed number of steps gets, beside the solve that the detector does by itself.

    Attributes:
        num_steps: The fixed number.
        residual: The worst relative residual of the images after it.
        rtol: The tolerance of the detector's own solve; 0 if it takes a fixed number of steps, too.
        own_steps: How many steps the own solve took, at most over the images.
        own_residual: The worst relative residual of the own solve.
    """

    num_steps: int
    residual: float
    rtol: float
    own_steps: int
    own_residual: float

    @property
    def suffices(self) -> bool:
        """Whether the fixed number meets the tolerance, or gets as far as the own solve."""
        return self.residual <= max(self.rtol, self.own_residual)

    def __str__(self) -> str:
        own = f"rtol={self.rtol:g}" if self.rtol else "a fixed number"
        return (
            f"relative residual after {self.num_steps} steps: {self.residual:.1e}; the detector's own solve ({own}): "
            f"{self.own_residual:.1e} in {self.own_steps} steps"
        )


def check_fixed_steps(detector: nn.Module, images: Tensor, num_steps: int | None = None) -> FixedSteps | None:
    """Measure how far a fixed number of solver steps gets.

    Args:
        detector: A detector with an i-FPN; it is left as it is.
        images: Shape (B, 3, H, W), RGB from 0 to 1. Use real ones: noise may be easier or harder to solve for.
        num_steps: The number. Default: as in `export_detector`.

    Returns:
        The residuals; None for a detector whose neck solves nothing.

    Raises:
        ValueError: `num_steps` cannot be used.
    """
    fixed, own = _with_fixed_steps(detector, num_steps), copy.deepcopy(detector).eval()
    neck, own_neck = _solving_neck(fixed), _solving_neck(own)
    if neck is None or own_neck is None:
        return None
    own_neck.on_failure = "ignore"
    with torch.no_grad():
        for model in (fixed, own):
            model(list(images))
    assert neck.last_solution is not None and own_neck.last_solution is not None
    taken = own_neck.last_solution
    return FixedSteps(
        num_steps=neck.max_steps,
        residual=neck.last_solution.relative_residual.max().item(),
        rtol=own_neck.rtol,
        own_steps=int(taken.num_steps.max()),
        own_residual=taken.relative_residual.max().item(),
    )


def export_detector(
    detector: nn.Module, image_size: tuple[int, int], *, num_steps: int | None = None, batch_size: int | None = None
) -> torch.export.ExportedProgram:
    """Export a detector by `torch.export`.

    The program takes images (B, 3, H, W) and gives the padded detections of `TensorDetector.forward`, which are those
    of the detector with the same number of steps. Save it by `torch.export.save`, run it by `program.module()(images)`.

    Args:
        detector: RetinaNet, FCOS, `PaperFCOS`, `ATSS`, `AutoAssign` or Faster R-CNN with either neck, in float32 or
            float64. It is left as it is; what is exported is a copy in eval mode.
        image_size: Height and width of the images that the program takes, pixels. Resizing, as the detector's
            transform does it, is part of the program.
        num_steps: Steps of the i-FPN's solver. Default: its limit in eval mode, `eval_max_steps` or `max_steps`, which
            a solve to a tolerance seldom needs: `check_fixed_steps` tells. Not for a neck that solves nothing.
        batch_size: Number of images that the program takes. Default: any.

    Returns:
        The program, on the device of the detector.

    Raises:
        TypeError: The detector is none of those above, or decodes its predictions in a way of its own.
        ValueError: A setting cannot be used.

    Example:
        >>> program = export_detector(model, (800, 1344), num_steps=10)
        >>> torch.export.save(program, "model.pt2")
        >>> detections = torch.export.load("model.pt2").module()(images)
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be at least 1, or None for any, got {batch_size!r}")
    fixed = _with_fixed_steps(detector, num_steps)
    neck = _solving_neck(fixed)
    if batch_size is None and neck is not None and neck.mask_padding:
        raise ValueError("mask_padding=True needs the number of images: give batch_size")
    module = TensorDetector(fixed, image_size).requires_grad_(False)
    like = next(module.parameters())
    # An example of one image would fix the batch size: torch.export takes 0 and 1 for constants.
    images = like.new_zeros(batch_size or 2, 3, *image_size)
    dynamic = None if batch_size else ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        return torch.export.export(module, (images,), dynamic_shapes=dynamic, strict=False)


def export_onnx(program: torch.export.ExportedProgram, path: str | Path) -> None:
    """Write what `export_detector` gave as an ONNX file, with the input `images` and the outputs by their names.

    Args:
        program: The program.
        path: The file; it is replaced whole or not at all.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing.
        ValueError: An operator has no translation; the message names it.
    """
    check_onnx()
    try:
        translated = torch.onnx.export(
            program.run_decompositions(DECOMPOSITIONS),
            input_names=[_INPUT],
            output_names=list(_OUTPUTS),
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(f"no ONNX for this detector: {_cause(error)}") from error
    assert translated is not None
    with written_whole(path) as partial:
        translated.save(partial)


def check_onnx() -> None:
    """Sees whether what `export_onnx` needs is installed, before an export that takes its time.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; for ONNX: pip install 'deqkit[export]'") from error


def _cause(error: BaseException) -> str:
    """The first line of what lies at the root of an error of the exporter."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__).splitlines()[0]


def _solving_neck(detector: Any) -> ImplicitFPN | None:
    neck = getattr(getattr(detector, "backbone", None), "fpn", None)
    return neck if isinstance(neck, ImplicitFPN) and neck.unroll is None else None


def _with_fixed_steps(detector: nn.Module, num_steps: int | None) -> nn.Module:
    """A copy of the detector in eval mode whose neck takes a fixed number of steps."""
    if num_steps is not None and (isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1):
        raise ValueError(f"num_steps must be at least 1, got {num_steps!r}")
    fixed = copy.deepcopy(detector).eval()
    neck = _solving_neck(fixed)
    if neck is None:
        if num_steps is not None:
            raise ValueError(f"num_steps={num_steps}, but the detector's neck has no solver: leave it out")
        return fixed
    steps = num_steps or neck.eval_max_steps or neck.max_steps
    neck.rtol = neck.atol = 0.0
    neck.max_steps = neck.eval_max_steps = steps
    neck.on_failure, neck.trace = "ignore", False
    return fixed
