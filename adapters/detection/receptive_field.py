"""Effective receptive fields: how far the pixels lie that a cell of the feature pyramid depends on.

Source: Luo, Li, Urtasun, Zemel, "Understanding the effective receptive field in deep convolutional neural networks"
(arXiv 1701.04128): the gradient of the centre cell with respect to the input image, dP_l[centre] / dx, averaged over
images; a pixel belongs to the field if its gradient is at least 4.55 % (1 - 95.45 %, two standard deviations of a
Gaussian) of the largest.

Deliberate deviations. The cell has C channels: in place of one channel the squares of all their gradients are summed,
|d(s . P_l[centre]) / dx|^2 with random signs s being an unbiased estimate of that sum (Hutchinson). Images, probes
and colours are averaged as squares too, so that opposite signs do not cancel, and "gradient" above is the root of that
mean; the squares of an image are first divided by their sum, so that every image counts alike. Besides the area above
the threshold, which one bright pixel can shrink, there is the area that holds 95 % of the squares, which it cannot. For
an implicit neck the gradient is the implicit one, through the fixed point; both solves are made accurate for the
purpose.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

import deqkit
from adapters.detection.data.order import seed_of
from adapters.detection.levels import level_names
from adapters.detection.necks import ImplicitFPN

__all__ = ["ENERGY", "THRESHOLD", "ReceptiveField", "gradient_maps", "measure", "receptive_fields", "square_side"]

THRESHOLD = 0.0455
"""Share of the largest gradient from which on a pixel belongs to the field."""

ENERGY = 0.95
"""Share of the squared gradients that the second measure of the area holds."""

_RTOL, _MAX_STEPS = 1e-4, 100  # of the solve and of its adjoint, for an implicit neck


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """The effective receptive field of one level.

    Attributes:
        level: Its name, such as "P5".
        map: Root mean square gradient of the centre cell with respect to every pixel, over its maximum; (H, W).
        area: Share of the pixels whose gradient is at least `THRESHOLD` of the largest, 0 to 1.
        side: Side of a square of that area, pixels.
        energy_area: Share of the pixels, as few as will do, that hold `ENERGY` of the squared gradients, 0 to 1.
        energy_side: Side of a square of that area, pixels.
    """

    level: str
    map: Tensor
    area: float
    side: float
    energy_area: float
    energy_side: float


def gradient_maps(
    pyramid: Callable[[Tensor], Sequence[Tensor]], batches: Iterable[Tensor], *, num_probes: int = 1, seed: int = 0
) -> list[Tensor]:
    """Squared gradient of the centre cell of every level with respect to every pixel, averaged over images.

    The centre of n cells is cell n // 2. Samples of a batch must not depend on one another.

    Args:
        pyramid: Takes images (B, 3, H, W) to maps (B, C, H_l, W_l), differentiably.
        batches: Images of one size, (B, 3, H, W) each.
        num_probes: Draws of random signs over channels, per image and level.
        seed: Of the signs.

    Returns:
        One map (H, W) per level in float64, of sum 1 (0 if the cell depends on no pixel of any image): the sum over
        channels, colours and draws of an image's squared gradients over their total, mean over images.

    Raises:
        ValueError: There is no image, the sizes differ, or a gradient is not finite.
    """
    energy: list[Tensor] = []
    count = 0
    for batch in batches:
        images = batch.detach().requires_grad_()
        levels = pyramid(images)
        # By image: the outcome does not depend on how they are batched.
        generators = [torch.Generator().manual_seed(seed_of(seed, count + i)) for i in range(len(images))]
        count += len(images)
        shape = images.shape[-2:]
        energy = energy or [torch.zeros(shape, dtype=torch.float64) for _ in levels]
        if energy[0].shape != shape:
            raise ValueError(f"images of different size: {tuple(energy[0].shape)} and {tuple(shape)}")
        for total, level in zip(energy, levels, strict=True):
            cell = level[:, :, level.shape[2] // 2, level.shape[3] // 2]
            squares = torch.zeros(len(images), *shape, dtype=torch.float64)
            for _ in range(num_probes):
                signs = torch.stack([torch.randint(0, 2, cell.shape[1:], generator=g) for g in generators])
                signs = signs.mul(2).sub(1).to(cell)
                (gradient,) = torch.autograd.grad((cell * signs).sum(), images, retain_graph=True)
                squares += gradient.double().square().sum(1).cpu()
            sums = squares.sum((1, 2), keepdim=True)
            total += torch.where(sums == 0, squares, squares / sums).sum(0)
    if not energy:
        raise ValueError("no images to average over")
    if not all(torch.isfinite(total).all() for total in energy):
        raise ValueError("the gradient is not finite: the detector's weights or its fixed points are not")
    return [total / total.sum().clamp(min=torch.finfo(total.dtype).tiny) for total in energy]


def measure(level: str, energy: Tensor) -> ReceptiveField:
    """Area and side of a field.

    Args:
        level: Name of the level.
        energy: Squared gradient of every pixel, (H, W), in any unit.
    """
    relative = (energy / energy.max().clamp(min=torch.finfo(energy.dtype).tiny)).sqrt()
    inside = int((relative >= THRESHOLD).sum())
    share = energy.flatten().sort(descending=True).values.cumsum(0) / energy.sum()
    needed = min(int((share < ENERGY).sum()) + 1, energy.numel()) if energy.sum() > 0 else 0
    pixels = energy.numel()
    return ReceptiveField(level, relative, inside / pixels, math.sqrt(inside), needed / pixels, math.sqrt(needed))


def receptive_fields(
    model: Any, images: Iterable[Tensor], *, size: int, batch_size: int = 1, num_probes: int = 1, seed: int = 0
) -> list[ReceptiveField]:
    """The effective receptive fields of a detector's levels.

    The middle square of an image is cut out and scaled to ``size`` pixels: all fields are of the same square, in pixels
    of the network's input.

    Args:
        model: A detector in eval mode.
        images: Images of shape (3, H, W) in 0..1.
        size: Side of the square, pixels; see `square_side`.
        batch_size: Images per forward pass.
        num_probes: See `gradient_maps`.
        seed: See `gradient_maps`.

    Returns:
        One per level, finest first. Of an i-FPN's fixed points and adjoints that are not accurate a warning tells.

    Raises:
        ValueError: ``size`` is not positive, there is no image, or a gradient is not finite.
    """
    if size < 1 or batch_size < 1 or num_probes < 1:
        raise ValueError(f"size, batch_size and num_probes must be positive, got {size}, {batch_size}, {num_probes}")
    parameter = next(model.parameters())
    neck = model.backbone.fpn

    def pyramid(batch: Tensor) -> list[Tensor]:
        batch = batch.to(parameter.device, parameter.dtype)
        normalised = torch.stack([model.transform.normalize(image) for image in batch])
        if getattr(neck, "mask_padding", False):  # nothing is padded
            neck.set_image_sizes([(size, size)] * len(batch), (size, size))
        return list(model.backbone(normalised).values())

    with _accurate(neck):
        maps = gradient_maps(pyramid, _batches(images, size, batch_size), num_probes=num_probes, seed=seed)
    return [measure(name, energy) for name, energy in zip(level_names(model, len(maps)), maps, strict=True)]


def square_side(shorter_side: int) -> int:
    """The side 256 k + 1 next to ``shorter_side``, k >= 1.

    Convolutions of stride 2 take it down to odd numbers of cells on every level up to P7, so that the centre cells of
    all levels lie on the centre pixel.
    """
    return 256 * max(1, round((shorter_side - 1) / 256)) + 1


def _batches(images: Iterable[Tensor], size: int, batch_size: int) -> Iterator[Tensor]:
    group: list[Tensor] = []
    for image in images:
        side = min(image.shape[1:])
        group.append(functional.resize(functional.center_crop(image, [side, side]), [size, size], antialias=True))
        if len(group) == batch_size:
            yield torch.stack(group)
            group = []
    if group:
        yield torch.stack(group)


@contextmanager
def _accurate(neck: Any) -> Iterator[None]:
    """Lets an implicit neck solve forward and adjoint accurately, and say where it could not."""
    if not isinstance(neck, ImplicitFPN) or neck.unroll is not None:
        yield
        return
    changed = {
        "rtol": _RTOL,
        "max_steps": _MAX_STEPS,
        "eval_max_steps": _MAX_STEPS,
        "adjoint": deqkit.ImplicitAdjoint(rtol=_RTOL, max_steps=_MAX_STEPS),
        "on_failure": "warn",
    }
    before = {name: getattr(neck, name) for name in changed}
    try:
        for name, value in changed.items():
            setattr(neck, name, value)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", deqkit.ConvergenceWarning)
            yield
    finally:
        for name, value in before.items():
            setattr(neck, name, value)
    failed = [warning for warning in caught if issubclass(warning.category, deqkit.ConvergenceWarning)]
    for warning in caught:
        if warning not in failed:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if failed:
        warnings.warn(
            f"{len(failed)} solves of fixed points and of their adjoints fell short of a relative residual of "
            f"{_RTOL:g}: the receptive fields are rougher than that. The first: {failed[0].message}",
            deqkit.ConvergenceWarning,
            stacklevel=4,
        )
