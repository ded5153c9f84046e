"""Average precision of a trained detector with the i-FPN neck against the steps of the neck's solver."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from options import UNROLL, NamedSolver
from reporting import DetectorError, synchronize
from torch import Tensor, nn
from torch.utils.data import DataLoader

import deqkit
from adapters.detection import ImplicitFPN
from adapters.detection.data import CocoDataModule, DataError, verify_images
from adapters.detection.evaluation import coco_results, evaluate_coco
from adapters.detection.training import load_checkpoint, median_of

Batches = Collection[tuple[list[Tensor], list[dict[str, Any]]]] | DataLoader
AT_REST, OWN = "at rest", "own settings"
# The pyramid at rest; the histories are short, as a pyramid is large.
TO_REST = deqkit.Auto((deqkit.Anderson(history=5), deqkit.Broyden(history=15)))
REST_RTOL, REST_STEPS = 1e-9, 200


@dataclass(frozen=True)
class DetectorRow:
    """One evaluation of the detector.

    Attributes:
        solver: label of the solver, `AT_REST` or `OWN`.
        steps: steps of every solve; None for `AT_REST` and for `OWN`, the neck's own tolerance and limit.
        images: number of images evaluated.
        ap: COCO's AP, 0 to 1; None where the set has no objects.
        ap50: AP at an overlap of 0.5.
        mean_steps: solver steps that were taken, mean over images.
        residual_median: relative residual of the pyramid in the neck's norm, as reported: median over images; None
            where no solver looks at it (`UNROLL`, and without a step).
        residual_worst: the same of the worst image.
        error_median: relative distance of the pyramid from that at rest, on the level where it is largest: median over
            images. None at rest.
        error_worst: the same of the worst image.
        seconds_per_image: wall time of the whole detector per image, median over batches; None at rest, where the neck
            runs in double precision.
    """

    solver: str
    steps: int | None
    images: int
    ap: float | None
    ap50: float | None
    mean_steps: float | None
    residual_median: float | None
    residual_worst: float | None
    error_median: float | None
    error_worst: float | None
    seconds_per_image: float | None


@dataclass(frozen=True)
class Detector:
    """A trained detector and the images to judge it by.

    Attributes:
        model: torchvision's detector with an `ImplicitFPN` neck, on the device to use.
        loader: batches of images and targets with ``image_id``.
        ground_truth: the images' annotations in COCO's format.
        category_of_label: COCO category id per label.
        data_root: where the images come from.
        title: what kind of detector it is, in a few words.
        trained: the settings that it was trained with.
    """

    model: nn.Module
    loader: Batches
    ground_truth: dict[str, Any]
    category_of_label: Sequence[int]
    data_root: Path
    title: str
    trained: dict[str, Any]

    @property
    def neck(self) -> ImplicitFPN:
        """The implicit FPN."""
        return next(module for module in self.model.modules() if isinstance(module, ImplicitFPN))

    @property
    def num_images(self) -> int:
        """Images evaluated."""
        return len(self.ground_truth["images"])

    @property
    def num_batches(self) -> int:
        """Batches they come in."""
        return len(self.loader)


def load(checkpoint: Path, data_root: Path | None, images: int | None, device: str) -> Detector:
    """A detector from a checkpoint of examples/retinanet_ifpn.py, with the validation images of its data.

    Args:
        checkpoint: the file.
        data_root: folder in the COCO layout; None for the one that the checkpoint remembers, under the same limit on
            the number of images as in the training.
        images: use the first images only.
        device: where the detector runs.

    Raises:
        DetectorError: checkpoint or data cannot be used, do not belong together, or the neck is not implicit.
    """
    try:
        module = load_checkpoint(checkpoint)
    except (OSError, ValueError) as error:
        raise DetectorError(str(error)) from error
    if not isinstance(module.neck, ImplicitFPN):
        raise DetectorError(f"{checkpoint} holds a detector with the neck {module.config.neck!r}: nothing to solve")
    remembered: dict[str, Any] = module.data
    if data_root is None:
        if "root" not in remembered:
            raise DetectorError(f"{checkpoint} does not say what data it was trained on: give --data")
        data_root = Path(remembered["root"])
        images = images or remembered.get("limit_val_images")
    data = CocoDataModule(data_root, limit_val_images=images, batch_size=remembered.get("batch_size", 4), verify=False)
    try:
        data.setup()
        # Only the images that are used are decoded, not those of the training.
        verify_images(data.val_dataset.annotations, data.val_dataset.folder, progress=sys.stderr.isatty())
    except DataError as error:
        raise DetectorError(str(error)) from error
    dataset = data.val_dataset
    if dataset.num_classes != module.config.num_classes:
        raise DetectorError(
            f"{checkpoint} was trained for {module.config.num_classes - 1} categories, {data_root} has "
            f"{dataset.num_classes - 1}"
        )
    if remembered.get("categories", dataset.categories) != dataset.categories:
        raise DetectorError(f"{checkpoint} was trained for other categories than those of {data_root}")
    model = module.model.to(device).eval()
    config, schedule = module.config, module.schedule
    return Detector(
        model,
        data.val_dataloader(),
        dataset.ground_truth(),
        dataset.category_of_label,
        data_root,
        f"{config.detector} with {config.backbone} and {config.neck_channels} channels",
        asdict(config) | asdict(schedule),
    )


@dataclass(frozen=True)
class Case:
    """How the neck is to be solved: `steps` of `solver`; None for its own way."""

    label: str
    steps: int | None
    solver: deqkit.Solver | None = None


class Tally:
    """What one case comes to, batch by batch."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.results: list[dict[str, Any]] = []
        self.figures: dict[str, list[Tensor]] = {"steps": [], "residual": [], "error": []}
        self.seconds: list[float] = []

    def add(self, name: str, values: Tensor | None) -> None:
        if values is not None:
            self.figures[name].append(values.double().cpu())

    def row(self, ground_truth: dict[str, Any]) -> DetectorRow:
        aps = evaluate_coco(ground_truth, self.results)
        known = {name: torch.cat(values) for name, values in self.figures.items() if values}
        middle = {name: median_of(values) for name, values in known.items()}
        worst = {name: values.max().item() for name, values in known.items()}
        return DetectorRow(
            solver=self.case.label,
            steps=self.case.steps,
            images=len(ground_truth["images"]),
            ap=aps["AP"],
            ap50=aps["AP50"],
            mean_steps=known["steps"].mean().item() if "steps" in known else self.case.steps,
            residual_median=middle.get("residual"),
            residual_worst=worst.get("residual"),
            error_median=middle.get("error"),
            error_worst=worst.get("error"),
            seconds_per_image=statistics.median(self.seconds) if self.seconds else None,
        )


def sweep(
    detector: Detector, solvers: Sequence[NamedSolver], steps: Sequence[int], tick: Callable[[], Any]
) -> list[DetectorRow]:
    """Evaluate the detector at rest, as it is, and with every solver and number of steps; its neck is left as it was.

    Every batch goes through all cases, in an order of its own, so that a disturbance of the machine does not fall on
    one of them alone. Without a step there is nothing to choose between solvers: that is evaluated once.

    Args:
        detector: what to evaluate.
        solvers: the solvers; those labelled `UNROLL` are plain steps without a look at the residual.
        steps: numbers of solver steps.
        tick: called after every batch of every case.
    """
    cases = [Case(OWN, None)] + [Case(UNROLL, 0)] * (0 in steps)
    cases += [Case(named.label, k, named.solver) for named in solvers for k in steps if k > 0]
    rest, tallies = Tally(Case(AT_REST, None)), [Tally(case) for case in cases]
    with _evaluation(detector), torch.no_grad():
        detector.model(_on_device(detector, next(iter(detector.loader))[0]))  # nothing is to warm up on the clock
        for i, (batch, targets) in enumerate(detector.loader):
            ids = [target["image_id"] for target in targets]
            images = _on_device(detector, batch)
            with at_rest(detector.neck):
                pyramid = _measure(detector, rest, images, ids, None)
            tick()
            for tally in random.Random(i).sample(tallies, len(tallies)):
                with _solved_by(detector.neck, tally.case):
                    _measure(detector, tally, images, ids, pyramid)
                tick()
    truth = detector.ground_truth
    rows = {(tally.case.label, tally.case.steps): tally.row(truth) for tally in (rest, *tallies)}
    found = [rows[AT_REST, None], rows[OWN, None]]
    for named in solvers:
        found += [replace(rows[named.label if k else UNROLL, k], solver=named.label) for k in steps]
    return found


def num_cases(solvers: Sequence[NamedSolver], steps: Sequence[int]) -> int:
    """How often `sweep` will tick per batch."""
    return 2 + (0 in steps) + len(solvers) * sum(k > 0 for k in steps)


def _measure(
    detector: Detector, tally: Tally, images: list[Tensor], ids: Sequence[Any], reference: list[Tensor] | None
) -> list[Tensor]:
    """Run the detector and keep what it finds; returns its pyramid in double precision."""
    neck, device = detector.neck, images[0].device
    neck.reset()
    with _seen(neck) as seen:
        synchronize(device)
        start = time.perf_counter()
        outputs = detector.model(images)
        synchronize(device)
        seconds = (time.perf_counter() - start) / len(images)
    pyramid = [level.double() for level in seen[-1].values()]
    tally.results += coco_results(outputs, ids, detector.category_of_label)
    solution = neck.last_solution
    if solution is not None:
        tally.add("residual", solution.relative_residual)
        tally.add("steps", solution.num_steps)
    if reference is not None:
        tally.seconds.append(seconds)
        sizes = ((_size(a - b), _size(b)) for a, b in zip(pyramid, reference, strict=True))
        tally.add("error", torch.stack([error / size for error, size in sizes]).amax(dim=0))
    return pyramid


def _size(level: Tensor) -> Tensor:
    return level.flatten(1).norm(dim=1)


def _on_device(detector: Detector, images: Sequence[Tensor]) -> list[Tensor]:
    device = next(detector.model.parameters()).device
    return [image.to(device) for image in images]


@contextmanager
def _seen(module: nn.Module) -> Iterator[list[Any]]:
    """What the module returns meanwhile."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output), prepend=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _evaluation(detector: Detector) -> Iterator[None]:
    """Eval mode, and no warnings: the rows say how far each solve came."""
    was_training = detector.model.training
    detector.model.eval()
    try:
        with _changed(detector.neck, on_failure="ignore"):
            yield
    finally:
        detector.model.train(was_training)


@contextmanager
def _changed(target: Any, **values: Any) -> Iterator[None]:
    """The attributes, for a while."""
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def _solved_by(neck: ImplicitFPN, case: Case) -> AbstractContextManager[None]:
    if case.steps is None:
        return nullcontext()
    if case.label == UNROLL:
        return _changed(neck, unroll=case.steps)
    return _changed(neck, solver=case.solver, rtol=0.0, atol=0.0, eval_max_steps=case.steps)


@contextmanager
def at_rest(neck: ImplicitFPN) -> Iterator[None]:
    """The neck in double precision, solved until nothing moves; what comes in and goes out keeps its precision."""
    weight = next(neck.parameters())
    dtype = weight.dtype

    def widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (OrderedDict((name, level.double()) for name, level in inputs[0].items()), *inputs[1:])

    def narrow(module: nn.Module, inputs: Any, output: Any) -> Any:
        return OrderedDict((name, level.to(dtype)) for name, level in output.items())

    handles = [neck.register_forward_pre_hook(widen), neck.register_forward_hook(narrow)]
    solved = {"solver": TO_REST, "rtol": REST_RTOL, "atol": 0.0, "eval_max_steps": REST_STEPS, "warm_start": False}
    try:
        neck.double()
        with _changed(neck, **solved), _changed(neck.module, autocast=None):
            yield
    finally:
        neck.to(dtype)
        for handle in handles:
            handle.remove()


def spectral_radii(detector: Detector, images: int = 8) -> Tensor:
    """The spectral radius of dG/dP at the pyramid at rest, of some images: how an error shrinks per plain step.

    Args:
        detector: whose neck.
        images: of how many images at least, if there are as many.

    Returns:
        One radius per image.
    """
    neck, radii, calls = detector.neck, [], []
    handle = neck.module.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    try:
        with _evaluation(detector), at_rest(neck):
            for batch, _ in detector.loader:
                calls.clear()
                with torch.no_grad():
                    detector.model(_on_device(detector, batch))
                solution, (_, *args) = neck.last_solution, calls[-1]
                assert solution is not None
                estimate = deqkit.spectral_radius(
                    neck.module, solution.value, tuple(args), rtol=1e-2, history=16, return_error=True
                )
                radii.append(estimate.value.cpu())
                if sum(map(len, radii)) >= images:
                    break
    finally:
        handle.remove()
    return torch.cat(radii)
