"""Pictures of detectors: detections on images, feature maps of necks side by side, residual traces.

Everything is drawn on matplotlib figures that are never shown, so no display is needed, and written in one piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torchvision.models.detection import RetinaNet

import deqkit
from adapters.detection.files import written_whole

_IMAGE_INCHES = 3.2  # width of an image in `draw_detections`


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=150, format=path.suffix[1:] or "png")
    return path


def _draw_boxes(
    axes: Axes, image: Tensor, boxes: Tensor, labels: Tensor, names: Sequence[str], scores: Tensor | None
) -> None:
    """One image with its boxes; the colour tells the class."""
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
    axes.set_xticks([])
    axes.set_yticks([])
    palette = colormaps["tab10"]
    size = 6.0 if len(boxes) <= 12 else 4.0
    pixels_per_point = image.shape[2] / (72 * _IMAGE_INCHES)
    taken: list[tuple[float, float, float]] = []
    for i, ((x1, y1, x2, y2), label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        colour = palette((label - 1) % 10)
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.4))
        text = names[int(label)] + ("" if scores is None else f" {scores[i]:.2f}")
        style: dict[str, Any] = {"facecolor": colour, "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
        line, width = 1.5 * size * pixels_per_point, 0.65 * size * len(text) * pixels_per_point
        y = _free_line(taken, x1, width, y1 - line if y1 > line else y1, line)
        axes.text(
            x1,
            y,
            text,
            fontsize=size,
            color="white",
            va="top",
            bbox=style,
            clip_on=True,
            parse_math=False,  # a "$" in a name is no formula
        )


def _free_line(taken: list[tuple[float, float, float]], x: float, width: float, y: float, line: float) -> float:
    """The first line from ``y`` downwards on which a label from ``x`` covers none of those there, and enters it."""
    while any(abs(y - other) < line and x < right and left < x + width for left, right, other in taken):
        y += line
    taken.append((x, x + width, y))
    return y


@torch.no_grad()
def draw_detections(
    path: str | Path,
    models: Mapping[str, RetinaNet],
    images: Sequence[Tensor],
    targets: Sequence[Mapping[str, Tensor]],
    class_names: Sequence[str],
    *,
    min_score: float = 0.4,
) -> Path:
    """Draws images in rows: the true boxes, then the detections of each model.

    Args:
        path: Picture to write.
        models: Detectors by the name to print above their column, in eval mode.
        images: Images of shape (3, H, W) in 0..1.
        targets: Their ``boxes`` and ``labels``.
        class_names: Name per label, the background's first.
        min_score: Detections below this score are left out.

    Returns:
        The path.
    """
    columns = 1 + len(models)
    figure = Figure(
        figsize=(_IMAGE_INCHES * columns, _IMAGE_INCHES * len(images) * _aspect(images)), layout="constrained"
    )
    grid = figure.subplots(len(images), columns, squeeze=False)
    for row, (image, target) in enumerate(zip(images, targets, strict=True)):
        _draw_boxes(grid[row][0], image, target["boxes"], target["labels"], class_names, None)
        for column, model in enumerate(models.values(), start=1):
            device = next(model.parameters()).device
            found = {key: value.cpu() for key, value in model([image.to(device)])[0].items()}
            keep = found["scores"] >= min_score
            boxes, labels, scores = (found[key][keep] for key in ("boxes", "labels", "scores"))
            _draw_boxes(grid[row][column], image, boxes, labels, class_names, scores)
    for axes, title in zip(
        grid[0], ("ground truth", *(f"{name}, score >= {min_score:g}" for name in models)), strict=True
    ):
        axes.set_title(title, fontsize=10)
    return _save(figure, path)


def _aspect(images: Sequence[Tensor]) -> float:
    """Height over width, mean over images."""
    return sum(image.shape[1] / image.shape[2] for image in images) / len(images)


@torch.no_grad()
def pyramid(model: RetinaNet, image: Tensor) -> list[Tensor]:
    """Strength of every pyramid level at every position, the norm over channels: maps (H_l, W_l).

    Args:
        model: A detector in eval mode.
        image: Image of shape (3, H, W) in 0..1.
    """
    device = next(model.parameters()).device
    batch, _ = model.transform([image.to(device)])
    height, width = batch.image_sizes[0]
    levels = []
    for level in model.backbone(batch.tensors).values():
        # The transform pads to a multiple of 32: what lies beyond the image is not shown.
        rows = max(1, round(level.shape[2] * height / batch.tensors.shape[2]))
        columns = max(1, round(level.shape[3] * width / batch.tensors.shape[3]))
        levels.append(torch.linalg.vector_norm(level[0, :, :rows, :columns], dim=0).cpu())
    return levels


def draw_feature_maps(path: str | Path, models: Mapping[str, RetinaNet], images: Sequence[Tensor]) -> Path:
    """Draws the pyramid levels of several models below one another, for each image (Fig. 5 of arXiv 2012.13563).

    Necks give features of different size, and so do levels: every map is shown relative to its own maximum.

    Args:
        path: Picture to write.
        models: Detectors by name, in eval mode.
        images: Images of shape (3, H, W) in 0..1.

    Returns:
        The path.
    """
    maps = {name: [pyramid(model, image) for image in images] for name, model in models.items()}
    num_levels = len(next(iter(maps.values()))[0])
    rows = len(images) * len(models)
    figure = Figure(figsize=(1.9 * (1 + num_levels) + 0.8, 1.9 * rows * _aspect(images) + 0.5), layout="constrained")
    grid = figure.subplots(rows, 1 + num_levels, squeeze=False)
    shown = None
    for i, image in enumerate(images):
        for j, name in enumerate(models):
            line = grid[i * len(models) + j]
            line[0].imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
            line[0].set_ylabel(name, fontsize=11)
            for axes, level in zip(line[1:], maps[name][i], strict=True):
                shown = axes.imshow((level / level.max().clamp(min=1e-12)).numpy(), cmap="viridis", vmin=0, vmax=1)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for axes, title in zip(grid[0], ("image", *(f"P{3 + k}" for k in range(num_levels))), strict=True):
        axes.set_title(title, fontsize=11)
    if shown is not None:
        bar = figure.colorbar(shown, ax=grid, fraction=0.02, pad=0.01)
        bar.set_label("norm over channels / maximum of the map", fontsize=9)
    return _save(figure, path)


def draw_residual_trace(path: str | Path, solution: deqkit.Solution, *, rtol: float | None = None) -> Path:
    """Draws the relative residual of every sample against the solver's steps.

    Args:
        path: Picture to write.
        solution: A solution with a trace.
        rtol: Tolerance to mark, if any.

    Returns:
        The path.

    Raises:
        ValueError: The solution has no trace.
    """
    if solution.trace is None:
        raise ValueError("the solution has no trace: solve with trace=True")
    trace = solution.trace.double().cpu().reshape(len(solution.trace), -1)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    palette = colormaps["viridis"]
    count = trace.shape[1]
    for i in range(count):
        label = f"image {i + 1}" if count <= 8 else None
        axes.semilogy(trace[:, i].numpy(), marker=".", linewidth=1.2, color=palette(i / max(1, count)), label=label)
    if rtol:
        axes.axhline(rtol, color="tab:red", linestyle="--", linewidth=1.0, label=f"tolerance {rtol:g}")
    axes.set_xlabel("solver steps")
    axes.set_ylabel("relative residual |G(P + B) - P| / |G(P + B)|")
    axes.set_title(f"i-FPN, {solution.solver}: residual of the fixed point, per image", fontsize=11)
    axes.grid(True, which="major", alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    return _save(figure, path)
