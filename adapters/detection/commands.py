"""The commands of ``python -m adapters.detection`` beside those of training: each a function with typed arguments.

Their command line comes from jsonargparse, as that of training does: every argument is an option, ``--help`` shows
them, ``--config FILE`` reads them from YAML. What cannot be used ends in one line and exit status 2.
"""

from __future__ import annotations

import csv
import inspect
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jsonargparse import ActionConfigFile, ArgumentParser
from torch import nn

from adapters.detection.data import DataError
from adapters.detection.data.image_files import is_too_thin
from adapters.detection.files import folder_written_whole, written_whole
from adapters.detection.images import find_images, read_images
from adapters.detection.training import DetectionModule, DetectorConfig, load_checkpoint

__all__ = ["cost", "features", "new_file", "predict", "receptive_field", "run_command"]


def run_command(name: str, function: Callable[..., None], words: Sequence[str]) -> int:
    """Runs a command with the words of its command line.

    Returns:
        Exit status: 0, or 2 for what cannot be used.
    """
    summary = (inspect.getdoc(function) or "").split("\n\nArgs:")[0]
    parser = ArgumentParser(prog=f"python -m adapters.detection {name}", description=summary)
    own_config = "config" in inspect.signature(function).parameters
    if not own_config:
        parser.add_argument("--config", action=ActionConfigFile, help="Path of a YAML file with these options.")
    parser.add_function_arguments(function, as_group=False, as_positional=False)
    options = parser.parse_args(_one_by_one(function, words))
    if not own_config:
        options.pop("config")
    try:
        function(**options.as_dict())
    except (DataError, OSError, ModuleNotFoundError, torch.OutOfMemoryError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


def _one_by_one(function: Callable[..., None], words: Sequence[str]) -> list[str]:
    """``--images a b`` as ``--images+=a --images+=b``, which is how jsonargparse takes a list."""
    lists = {f"--{name}" for name, hint in typing.get_type_hints(function).items() if "list" in str(hint)}
    out: list[str] = []
    option = ""
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            option = name if name in lists else ""
            if not option:
                out.append(word)
            elif equals:
                out.append(word if value.startswith("[") else f"{option}+={value}")
        elif option:
            out.append(f"{option}={word}" if word.startswith("[") else f"{option}+={word}")
        else:
            out.append(word)
    return out


def predict(
    checkpoint: str,
    images: list[str],
    out: str,
    min_score: float = 0.3,
    batch_size: int = 1,
    device: str = "auto",
    pictures: bool = True,
) -> None:
    """Detects objects on images: pictures with boxes, and one file with all detections.

    Args:
        checkpoint: Checkpoint of a training.
        images: Files, and folders that are searched with their subfolders.
        out: Folder to write to; it must be new or empty.
        min_score: Detections below this score are left out.
        batch_size: Images per forward pass. Those of a batch are padded to a common size.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        pictures: Whether to draw pictures; without, there is predictions.json alone.
    """
    from adapters.detection.predict import PREDICTIONS, picture_names, predict_images

    _check(0 <= min_score <= 1, f"min_score must be between 0 and 1, got {min_score}")
    _check(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}")
    folder = Path(out)
    _check(not folder.exists() or folder.is_dir(), f"{folder} is a file, not a folder")
    _check(
        not folder.exists() or not any(folder.iterdir()),
        f"{folder} is not empty, and nothing is written over: empty it, or give another --out",
    )
    _check_writable(folder)
    paths = find_images(images)
    module = _load(checkpoint, device)
    shown = read_images(paths, module.config.longest_side)
    names = picture_names(paths) if pictures else {}
    with folder_written_whole(folder) as partial:
        entries, solves = predict_images(module, shown, partial, names, min_score=min_score, batch_size=batch_size)
    print(f"{len(entries)} detections with a score of at least {min_score:g}: {folder / PREDICTIONS}")
    if solves is not None:
        print(
            f"fixed points: {solves.converged:.1%} of the images met the tolerance, {solves.mean_steps:.1f} steps on "
            f"average, relative residual {solves.median_residual:.1e} (median), {solves.worst_residual:.1e} (worst)"
        )


def features(
    checkpoints: list[str],
    images: list[str],
    out: str,
    levels: list[str] | None = None,
    num_images: int = 4,
    device: str = "auto",
) -> None:
    """Draws the feature maps of several detectors below one another, as in Fig. 5 of arXiv 2012.13563.

    Args:
        checkpoints: Checkpoints of trainings, such as one with FPN and one with i-FPN.
        images: Files, and folders that are searched with their subfolders.
        out: Picture to write, by its name a PNG, JPG, PDF or SVG; it must not exist.
        levels: Levels to draw, such as P5 P6 P7. Default: all.
        num_images: How many of the images to draw at most, the first ones.
        device: "auto", "cpu", "cuda", "cuda:1", ...
    """
    from adapters.detection.visualize import draw_feature_maps

    path = new_file(out)
    kinds = (".png", ".jpg", ".pdf", ".svg")
    _check(path.suffix.lower() in kinds, f"--out {path} is no picture's name: it must end in {', '.join(kinds)}")
    _check(num_images >= 1, f"num_images must be at least 1, got {num_images}")
    paths = find_images(images)[:num_images]
    modules = _load_all(checkpoints, device)
    models = {name: module.model for name, module in modules.items()}
    longest = min(module.config.longest_side for module in modules.values())
    shown = [image for _, image in read_images(paths, longest)]
    try:
        draw_feature_maps(path, models, shown, levels)
    except ValueError as error:
        raise DataError(str(error)) from error
    print(f"picture: {path}")


def receptive_field(
    checkpoints: list[str],
    images: list[str],
    out: str,
    size: int | None = None,
    num_images: int = 16,
    num_probes: int = 1,
    batch_size: int = 1,
    device: str = "auto",
) -> None:
    """Measures the effective receptive field of every pyramid level (arXiv 1701.04128), averaged over images.

    Area and side are those of the pixels whose gradient is at least 4.55 % of the largest, and of those that hold 95 %
    of the squared gradients. The gradient of an i-FPN is the exact one, through its fixed point.

    Args:
        checkpoints: Checkpoints of trainings, such as one with FPN and one with i-FPN.
        images: Files, and folders that are searched with their subfolders.
        out: Folder for receptive_field.csv and receptive_field.png, which must not exist.
        size: Side of the square of the network's input, pixels. Default: the number 256 k + 1 next to the size that
            the first detector was trained for; the centre cells of all levels then lie on the centre pixel.
        num_images: How many of the images to average over at most, the first ones.
        num_probes: Draws of random signs over the channels per image; more make the average smoother.
        batch_size: Images per forward pass.
        device: "auto", "cpu", "cuda", "cuda:1", ...
    """
    from adapters.detection.receptive_field import receptive_fields, square_side
    from adapters.detection.visualize import draw_receptive_fields

    table, picture = (new_file(Path(out) / f"receptive_field.{suffix}") for suffix in ("csv", "png"))
    for name, value in {
        "size": size,
        "num_images": num_images,
        "num_probes": num_probes,
        "batch_size": batch_size,
    }.items():
        _check(value is None or value >= 1, f"{name} must be at least 1, got {value}")
    paths = find_images(images)[:num_images]
    modules = _load_all(checkpoints, device)
    side = size or square_side(next(iter(modules.values())).config.sizes[-1])
    fields = {}
    for name, module in modules.items():
        print(f"{name}:")
        shown = (image for _, image in read_images(paths))
        try:
            fields[name] = receptive_fields(
                module.model, shown, size=side, batch_size=batch_size, num_probes=num_probes
            )
        except ValueError as error:
            raise DataError(f"{name}: {error}") from error
    levels = {tuple(f.level for f in found) for found in fields.values()}
    _check(len(levels) == 1, f"the detectors have different levels: {' and '.join(map(str, sorted(levels)))}")
    columns = ("area", "side", "energy_area", "energy_side")
    rows = [
        {"detector": name, "level": field.level, "input": side} | {key: getattr(field, key) for key in columns}
        for name, found in fields.items()
        for field in found
    ]
    with written_whole(table) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw_receptive_fields(picture, fields)
    print(f"\ninput {side} x {side} pixels; gradient >= 4.55 % of its maximum | 95 % of the squared gradients")
    width = max(map(len, fields))
    for row in rows:
        print(
            f"{row['detector']:{width}}  {row['level']}  {row['side']:6.0f} px {row['area']:7.1%}  |  "
            f"{row['energy_side']:6.0f} px {row['energy_area']:7.1%}"
        )
    print(f"table: {table}\npicture: {picture}")


def cost(
    config: str | None = None,
    checkpoint: str | None = None,
    images: list[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
    num_classes: int = 91,
    repeats: int = 5,
    training: bool = True,
    device: str = "auto",
    out: str | None = None,
) -> None:
    """Reports parameters, MACs, images per second, seconds per training step and peak memory of a detector.

    MACs are those of convolutions and matrix products; of an i-FPN, those of G count as often as the solver evaluates
    it. That number depends on the weights and the images, unless the preset fixes it.

    Args:
        config: Config file of a training, such as recipes/t1_retinanet_ifpn.yaml. The weights are then random.
        checkpoint: Checkpoint of a training, in place of a config file.
        images: Files and folders to take the images from. Default: noise.
        height: Height of the noise, pixels. Default: the detector's shorter side.
        width: Its width. Default: 1333/800 of the shorter side, at most the detector's longest.
        batch_size: Images at a time.
        num_classes: With a config file, the number of classes, the background included; COCO's by default.
        repeats: Repetitions that the median time is taken over, after one that warms up.
        training: Whether to measure a training step as well.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        out: File to write the figures to as json; it must not exist.
    """
    from adapters.detection.cost import calibrate_, measure_cost, noise
    from adapters.detection.cost_report import as_trained, format_cost, read_detector, to_json
    from adapters.detection.memory import PeakMemory

    _check((config is None) != (checkpoint is None), "give either --config or --checkpoint")
    for name, value in {"height": height, "width": width, "batch_size": batch_size, "repeats": repeats}.items():
        _check(value is None or value >= 1, f"{name} must be at least 1, got {value}")
    path = new_file(out) if out is not None else None
    where = as_device(device)
    memory = PeakMemory(where)
    module = None if checkpoint is None else _load(checkpoint, "cpu")
    detector = read_detector(str(config), num_classes) if module is None else module.config
    if images:
        batch = [image.to(where) for _, image in read_images(find_images(images)[:batch_size], detector.longest_side)]
    else:
        size = height or detector.sizes[-1], width or _default_width(detector)
        _check(not is_too_thin(*size, detector.longest_side), f"images of {size[0]} x {size[1]} pixels are too thin")
        batch = noise(batch_size, *size, where)

    def build() -> nn.Module:
        model = as_trained(detector.build() if module is None else module.model, detector).to(where)
        if module is None:
            calibrate_(model, batch)
        return model

    found = measure_cost(build, batch, repeats=repeats, training=training, memory=memory)
    print(format_cost(found, random_weights=module is None))
    if path is not None:
        with written_whole(path) as partial:
            partial.write_text(to_json(found, detector))
        print(f"figures: {path}")


def _default_width(detector: DetectorConfig) -> int:
    return min(detector.longest_side, round(detector.sizes[-1] * 1333 / 800))


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise DataError(message)


def new_file(path: str | Path) -> Path:
    """The path of a file that is to be written.

    Raises:
        DataError: It is there already, or cannot be made.
    """
    path = Path(path)
    _check(not path.exists(), f"{path} exists already, and nothing is written over: give another --out")
    _check_writable(path)
    return path


def _check_writable(path: Path) -> None:
    """Refuses a file or a folder that cannot be made, before any work is done for it."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    _check(there.is_dir(), f"--out {path}: {there} is a file, not a folder")
    _check(os.access(there, os.W_OK | os.X_OK), f"--out {path}: no permission to write in {there}")


def _load(checkpoint: str, device: str) -> DetectionModule:
    """The module of a checkpoint on a device; what is wrong with either is said in a line."""
    try:
        module = load_checkpoint(checkpoint)
    except ValueError as error:
        raise DataError(str(error)) from error
    return module.to(as_device(device))


def as_device(name: str) -> torch.device:
    """The device of a name; "auto" is the first accelerator, or the CPU.

    Raises:
        DataError: There is no such device here.
    """
    try:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = torch.device(name) if name != "auto" else accelerator or torch.device("cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DataError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _load_all(checkpoints: Sequence[str], device: str) -> dict[str, DetectionModule]:
    """Modules by name: that of the neck, and of the run where several have the same."""
    _check(bool(checkpoints), "no checkpoints given")
    modules: dict[str, DetectionModule] = {}
    for checkpoint in checkpoints:
        module = _load(checkpoint, device)
        name = {"fpn": "FPN", "ifpn": "i-FPN"}[module.config.neck]
        if name in modules:
            path = Path(checkpoint).resolve()
            name = f"{name}, {path.parent.parent.name if path.parent.name == 'checkpoints' else path.stem}"
        while name in modules:
            name += "'"
        modules[name] = module
    return modules
