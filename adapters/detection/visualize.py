"""Pictures of detectors: detections on images, feature maps of necks side by side, receptive fields, residual traces.

Everything is drawn on matplotlib figures that are never shown, so no display is needed, and written in one piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torchvision.transforms.v2.functional import resize

import deqkit
from adapters.detection.files import written_whole
from adapters.detection.levels import choose_levels, level_names, strengths
from adapters.detection.receptive_field import THRESHOLD, ReceptiveField

_DPI = 150
_IMAGE_INCHES = 3.2  # width of an image in `draw_detections`
_PICTURE_PIXELS = 1000, 2000  # least and greatest length of the longer side of a picture by `draw_boxes`
_LABELLED = 60  # boxes of a picture by `draw_boxes` that have a label: with more, labels are all that is to be seen


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=_DPI, format=path.suffix[1:] or "png")
    return path


def _draw_boxes(
    axes: Axes,
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    names: Sequence[str],
    scores: Tensor | None,
    *,
    inches: float = _IMAGE_INCHES,
    size: float | None = None,
    labelled: int | None = None,
) -> None:
    """One image with its boxes; the colour tells the class."""
    # Pixel i covers i to i + 1, as the corners of boxes count.
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), extent=(0, image.shape[2], image.shape[1], 0))
    axes.set_xticks([])
    axes.set_yticks([])
    palette = colormaps["tab10"]
    size = size or (6.0 if len(boxes) <= 12 else 4.0)
    line_width = 1.4 * max(1.0, size / 8)
    pixels_per_point = image.shape[2] / (72 * inches)
    taken: list[tuple[float, float, float]] = []
    for i, ((x1, y1, x2, y2), label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        colour = palette((label - 1) % 10)
        box = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=line_width)
        axes.add_patch(box).set_zorder(2 - 1e-4 * i)  # the surest come first, and lie on top
        if labelled is not None and i >= labelled:
            continue
        text = names[int(label)] + ("" if scores is None else f" {scores[i]:.2f}")
        style: dict[str, Any] = {"facecolor": colour, "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
        line, width = 1.5 * size * pixels_per_point, 0.65 * size * len(text) * pixels_per_point
        x = max(0.0, min(x1, image.shape[2] - width))  # not beyond the right border
        y = _free_line(taken, x, width, y1 - line if y1 > line else y1, line)
        axes.text(
            x,
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
    models: Mapping[str, Any],
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
    columns, aspects = 1 + len(models), _aspects(images)
    figure = Figure(figsize=(_IMAGE_INCHES * columns, _IMAGE_INCHES * sum(aspects)), layout="constrained")
    grid = figure.subplots(len(images), columns, squeeze=False, height_ratios=aspects)
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


def draw_boxes(
    path: str | Path, image: Tensor, boxes: Tensor, labels: Tensor, scores: Tensor, class_names: Sequence[str]
) -> Path:
    """Draws detections on one image, in the size of the image, but between 1000 and 2000 pixels on the longer side.

    Of many boxes only the surest have a label, and they lie on top.

    Args:
        path: Picture to write.
        image: Image of shape (3, H, W) in 0..1.
        boxes: Corners x1, y1, x2, y2 in pixels, shape (N, 4).
        labels: Shape (N,).
        scores: Shape (N,).
        class_names: Name per label, the background's first.

    Returns:
        The path.
    """
    height, width = image.shape[1:]
    longest = max(height, width)
    if longest > _PICTURE_PIXELS[1]:  # matplotlib would take the minutes and gigabytes of the whole photograph
        scale = _PICTURE_PIXELS[1] / longest
        image = resize(image, [max(1, round(height * scale)), max(1, round(width * scale))], antialias=True)
        boxes = boxes * torch.tensor([image.shape[2] / width, image.shape[1] / height] * 2)
        height, width = image.shape[1:]
        longest = max(height, width)
    inches = width * max(1.0, _PICTURE_PIXELS[0] / longest) / _DPI
    figure = Figure(figsize=(inches, inches * height / width))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    # As legible on a large photograph as on a small one.
    size = (8.0 if len(boxes) <= 30 else 6.0) * max(1.0, longest / _PICTURE_PIXELS[0])
    _draw_boxes(axes, image, boxes, labels, class_names, scores, inches=inches, size=size, labelled=_LABELLED)
    axes.set_axis_off()
    return _save(figure, path)


def _aspects(images: Sequence[Tensor]) -> list[float]:
    """Height over width of every image's row; of a very thin image's, what is still to be seen on one page."""
    return [min(max(image.shape[1] / image.shape[2], 0.4), 2.5) for image in images]


def draw_feature_maps(
    path: str | Path, models: Mapping[str, Any], images: Sequence[Tensor], levels: Sequence[str] | None = None
) -> Path:
    """Draws the pyramid levels of several models below one another, for each image (Fig. 5 of arXiv 2012.13563).

    Necks give features of different size, and so do levels: every map is shown relative to its own maximum.

    Args:
        path: Picture to write.
        models: Detectors by name, in eval mode, all with the same levels.
        images: Images of shape (3, H, W) in 0..1.
        levels: Which of the levels to draw, such as ``["P5", "P6", "P7"]``. Default: all.

    Returns:
        The path.

    Raises:
        ValueError: A level is unknown, or the models have different ones.
    """
    maps = {name: [strengths(model, image) for image in images] for name, model in models.items()}
    names = {tuple(level_names(model, len(maps[name][0]))) for name, model in models.items()}
    if len(names) > 1:
        raise ValueError(f"the detectors have different levels: {' and '.join(map(str, sorted(names)))}")
    titles = list(names.pop())
    shown_levels = choose_levels(titles, levels)
    num_levels = len(shown_levels)
    heights = [1.9 * aspect for aspect in _aspects(images) for _ in models]
    # The bar beside the maps has a label of three inches.
    figure = Figure(figsize=(1.9 * (1 + num_levels) + 0.8, max(sum(heights) + 0.5, 3.2)), layout="constrained")
    grid = figure.subplots(len(heights), 1 + num_levels, squeeze=False, height_ratios=heights)
    shown = None
    for i, image in enumerate(images):
        for j, name in enumerate(models):
            line = grid[i * len(models) + j]
            line[0].imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
            line[0].set_ylabel(name, fontsize=11)
            for axes, k in zip(line[1:], shown_levels, strict=True):
                level, height, width = maps[name][i][k]
                relative = (level / level.max().clamp(min=1e-12)).numpy()
                shown = axes.imshow(relative, cmap="viridis", vmin=0, vmax=1, extent=(0, width, height, 0))
                axes.set_xlim(0, image.shape[2])  # the last cells reach beyond the image
                axes.set_ylim(image.shape[1], 0)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for axes, title in zip(grid[0], ("image", *(titles[k] for k in shown_levels)), strict=True):
        axes.set_title(title, fontsize=11)
    if shown is not None:
        bar = figure.colorbar(shown, ax=grid, fraction=0.02, pad=0.01)
        bar.set_label("norm over channels / maximum of the map", fontsize=9)
    return _save(figure, path)


def draw_receptive_fields(path: str | Path, fields: Mapping[str, Sequence[ReceptiveField]]) -> Path:
    """Draws the effective receptive fields of several detectors below one another, a column per level.

    Args:
        path: Picture to write.
        fields: Per detector those of its levels; the same levels for all.

    Returns:
        The path.
    """
    columns = len(next(iter(fields.values())))
    figure = Figure(figsize=(2.0 * columns + 1.1, 2.1 * len(fields) + 0.2), layout="constrained")
    grid = figure.subplots(len(fields), columns, squeeze=False)
    shown = None
    for line, (name, levels) in zip(grid, fields.items(), strict=True):
        line[0].set_ylabel(name, fontsize=11)
        for axes, field in zip(line, levels, strict=True):
            # Colours by decades: on a linear scale all but the middle would be black.
            shown = axes.imshow(field.map.clamp(min=1e-4).numpy(), norm=LogNorm(1e-3, 1), cmap="magma")
            # Smoothed: the line would otherwise go around single pixels.
            smooth = avg_pool2d(field.map[None], 2 * (min(field.map.shape) // 50) + 1, 1, min(field.map.shape) // 50)[0]
            if smooth.min() < THRESHOLD <= smooth.max():
                axes.contour(smooth.numpy(), levels=[THRESHOLD], colors="white", linewidths=0.8)
            axes.set_title(f"{field.level}: {field.side:.0f} px ({field.area:.0%})", fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
    if shown is not None:
        bar = figure.colorbar(shown, ax=grid, fraction=0.03, pad=0.01, extend="min")
        bar.set_label(f"gradient of the centre cell / its maximum\n(white line: {THRESHOLD:.2%})", fontsize=8)
        bar.ax.axhline(THRESHOLD, color="white", linewidth=0.8)
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
