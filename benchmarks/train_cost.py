"""What an implicit FPN costs beside the explicit one: seconds, MACs and memory of training steps and inferences.

    python benchmarks/train_cost.py                                 # RetinaNet, ResNet-50, 256 x 256 pixels
    python benchmarks/train_cost.py --all --image-size 320 --image-size 512
    python benchmarks/train_cost.py --checkpoint runs/retinanet/checkpoints/best.ckpt --pictures photos/

The detectors are those of the recipes `t1_*`: as in training from ImageNet's weights, the norms of the backbone are
frozen, and so are its first layers. Weights are random, drawn as the builders do, and the frozen norms get the
statistics of the images, which are noise. How many steps a tolerance takes depends on the weights: a trained detector
(``--checkpoint``) may need others, and every verdict says which weights it is for. Rounds go through all necks,
forwards and backwards in turn; ratios are to the explicit FPN of the same round, medians over the rounds. On a CPU
those of processor time are given, too: where others use the machine, they are the ones to trust.

    fpn        explicit
    unroll-2   P <- G(P + B) twice, differentiated through
    phantom    the solve of "accurate", 5 damped steps differentiated
    neumann    the solve of "accurate", 3 terms of Neumann's series
    fast       the default preset: Anderson to 0.15, 2 terms of Neumann's series
    accurate   Anderson to 1e-2, forward and backward
    anderson   the same to 1e-3
    paper      Broyden, 15 steps forward and backward, 7 in inference

``--channels-last``, ``--autocast`` and ``--compile`` run all of them so; with the first the explicit FPN, too.
``--neck`` also takes what "fast" could be: `CANDIDATES` of `detector_cost.py`, by forward tolerance and adjoint.
MACs are those of convolutions and matrix products as carried out. Memory is that of tensors, weights and momentum
included (`peak_memory.py`), and, on a CPU, what the process grows by.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

import peak_memory  # noqa: F401  before torch: it quietens the profiler
import torch
from cost_report import cost_tables, memory_table, plot_cost, verdicts
from detector_cost import ALL_VARIANTS, EXPLICIT, VARIANTS, Calls, Lap, Setting, Subject
from options import parse_steps
from reporting import DetectorError, describe, run_record, write_csv, write_json
from sizing import SOLVES, settings_of, size_recipe
from torch import Tensor
from tqdm import tqdm

from adapters.detection.cost import noise
from adapters.detection.images import find_images, read_images
from adapters.detection.training import DetectorConfig, load_checkpoint

DETECTORS = ("retinanet", "fasterrcnn", "fcos", "atss", "autoassign")
STEPPED = ("unroll-2", "fast", "accurate", "paper")
RECIPES_CALLS = sum(SOLVES["paper"]) + 1  # of G, that `sizing` counts for the training step of an implicit recipe


@dataclass(frozen=True)
class Row:
    """One detector with one neck, on images of one size.

    Attributes:
        detector: its name.
        backbone: of the detector.
        neck: a name in `ALL_VARIANTS`.
        image_size: shorter side, pixels.
        images: in a batch.
        device: where it ran.
        weights: "random weights" or the checkpoint's.
        setting: how all necks were run, in words; empty for float32 in NCHW, not compiled.
        train_seconds: of a training step: forward, losses, backward, optimiser.
        train_ratio: to the explicit FPN's.
        train_processor_ratio: of the processor time, to the explicit FPN's; NaN on CUDA.
        train_gmacs: multiply-accumulates of a training step per image, 1e9.
        train_mac_ratio: to the explicit FPN's.
        full_mac_ratio: the same for 800 x 1344 pixels and the calls of G counted here; NaN where it is not known.
        train_neck_share: time inside the neck, forward and backward, over that of the step.
        infer_seconds: of an inference, from images to detections.
        infer_ratio: to the explicit FPN's.
        infer_processor_ratio: of the processor time, to the explicit FPN's; NaN on CUDA.
        infer_gmacs: per image.
        infer_mac_ratio: to the explicit FPN's.
        infer_neck_share: time inside the neck over that of the inference.
        steps: solver steps in training, mean over images.
        converged: share of the images whose solve met its tolerance in training; NaN without a tolerance.
        forward_calls: evaluations of G in a training step.
        adjoint_steps: steps of the adjoint solve, mean over images.
        adjoint_converged: share of the images whose adjoint solve met its tolerance.
        backward_calls: vector-Jacobian products of G.
        weight_calls: those of them that go on to the weights.
        infer_steps: solver steps in inference, mean over images.
        infer_converged: share of the images whose solve met its tolerance in inference.
        infer_calls: evaluations of G in inference.
        train_memory: bytes in tensors at the peak of a training step.
        memory_ratio: to the explicit FPN's.
        infer_memory: bytes in tensors at the peak of an inference.
        process_memory: bytes that the process grows by in a training step; None where it is not known.
    """

    detector: str
    backbone: str
    neck: str
    image_size: int
    images: int
    device: str
    weights: str
    setting: str
    train_seconds: float
    train_ratio: float
    train_processor_ratio: float
    train_gmacs: float
    train_mac_ratio: float
    full_mac_ratio: float
    train_neck_share: float
    infer_seconds: float
    infer_ratio: float
    infer_processor_ratio: float
    infer_gmacs: float
    infer_mac_ratio: float
    infer_neck_share: float
    steps: float
    converged: float
    forward_calls: int
    adjoint_steps: float
    adjoint_converged: float
    backward_calls: int
    weight_calls: int
    infer_steps: float
    infer_converged: float
    infer_calls: int
    train_memory: int
    memory_ratio: float
    infer_memory: int
    process_memory: int | None

    @property
    def equivalents(self) -> int:
        """What a training step calls G for, in evaluations of it; see `Calls`."""
        return self.forward_calls + self.backward_calls + self.weight_calls


@dataclass(frozen=True)
class StepRow:
    """Peak memory of a training step with a given number of steps of the neck.

    Attributes:
        detector: its name.
        neck: a name in `VARIANTS`, whose number of steps is changed.
        image_size: shorter side, pixels.
        device: where it ran.
        steps: of the neck, forward and backward.
        train_memory: bytes in tensors.
        memory_ratio: to the explicit FPN's.
    """

    detector: str
    neck: str
    image_size: int
    device: str
    steps: int
    train_memory: int
    memory_ratio: float


@dataclass(frozen=True)
class Counted:
    """Calls and MACs per image of a training step and of an inference."""

    train: Calls
    train_macs: Mapping[str, float]
    infer: Calls
    infer_macs: Mapping[str, float]


def compare(subjects: Mapping[str, Subject], rounds: int, tick: Callable[[], Any]) -> dict[str, dict[str, list[Lap]]]:
    """Time all subjects, in rounds through all of them; by action, name and round."""
    laps: dict[str, dict[str, list[Lap]]] = {
        action: {name: [] for name in subjects} for action in ("train_step", "infer")
    }
    for round_ in range(rounds):
        # The other way round every other time: nobody should always run first.
        for name in subjects if round_ % 2 == 0 else reversed(list(subjects)):
            for action, found in laps.items():
                found[name].append(subjects[name].lap(action))
                tick()
    return laps


def measure(
    detector: str, size: int, subjects: Mapping[str, Subject], rounds: int, recipe: str | None,
    tick: Callable[[], Any], weights: str,
) -> list[Row]:  # fmt: skip
    """All figures of all subjects; the explicit one comes first.

    Args:
        detector: its name.
        size: of the images.
        subjects: by variant.
        rounds: of timing.
        recipe: name of the recipe for the MACs at full size, without neck; None for none.
        tick: called after every training step and every inference.
        weights: what they are called.
    """
    counted, memory, process, setting = {}, {}, {}, str(subjects[EXPLICIT].setting)
    for name, subject in subjects.items():
        counted[name] = Counted(*subject.count("train_step"), *subject.count("infer"))
        memory[name] = subject.peak_memory()
        process[name] = subject.process_memory()
        subject.compile()
        tick()
    laps = compare(subjects, rounds, tick)
    full = {} if recipe is None else full_mac_ratios(recipe, counted)
    explicit, rows = counted[EXPLICIT], []
    for name, subject in subjects.items():
        train, infer = laps["train_step"], laps["infer"]
        own = counted[name]
        rows.append(Row(
            detector, subject.config.backbone, name, size, len(subject.images), str(subject.device), weights,
            setting, *_times(train[name], train[EXPLICIT], subject.device), own.train_macs[""] / 1e9,
            own.train_macs[""] / explicit.train_macs[""], full.get(name, float("nan")), _share(train[name]),
            *_times(infer[name], infer[EXPLICIT], subject.device), own.infer_macs[""] / 1e9,
            own.infer_macs[""] / explicit.infer_macs[""], _share(infer[name]),
            own.train.steps, own.train.converged, own.train.forward, own.train.adjoint_steps,
            own.train.adjoint_converged, own.train.backward, own.train.weights,
            own.infer.steps, own.infer.converged, own.infer.forward,
            memory[name][0], memory[name][0] / memory[EXPLICIT][0], memory[name][1], process[name],
        ))  # fmt: skip
    return rows


def _times(own: Sequence[Lap], explicit: Sequence[Lap], device: torch.device) -> tuple[float, float, float]:
    """Median seconds, and medians of the ratios within a round, of wall and of processor time."""
    pairs = list(zip(own, explicit, strict=True))
    wall = statistics.median(a.seconds / b.seconds for a, b in pairs)
    on_cpu = device.type == "cpu"
    processor = statistics.median(a.processor / b.processor for a, b in pairs) if on_cpu else float("nan")
    return statistics.median(lap.seconds for lap in own), wall, processor


def _share(laps: Sequence[Lap]) -> float:
    return statistics.median(lap.neck / lap.seconds for lap in laps)


def full_mac_ratios(recipe: str, counted: Mapping[str, Counted]) -> dict[str, float]:
    """MACs of a training step over those of the explicit FPN at 800 x 1344 pixels, for the calls counted here."""
    explicit, implicit = (size_recipe(f"{recipe}_{neck}", images=1) for neck in ("fpn", "ifpn"))
    ratios = {EXPLICIT: 1.0}
    for name, own in counted.items():
        if name != EXPLICIT:
            more = own.train.equivalents - RECIPES_CALLS
            ratios[name] = (implicit.step_macs + more * implicit.g_macs) / explicit.step_macs
    return ratios


def sweep(
    detector: str, size: int, subjects: Mapping[str, Subject], steps: Sequence[int], explicit: int,
    tick: Callable[[], Any],
) -> list[StepRow]:  # fmt: skip
    """Peak memory of a training step against the number of steps, one row per step count and neck that has them."""
    rows = []
    for name in STEPPED:
        if name not in subjects:
            continue
        for k in steps:
            peak = subjects[name].peak_of_training(k)
            device = str(subjects[name].device)
            rows.append(StepRow(detector, name, size, device, k, peak, peak / explicit))
            tick()
    return rows


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", choices=DETECTORS, action="append", help="repeatable; default: retinanet")
    parser.add_argument("--all", action="store_true", help="all five detectors")
    parser.add_argument(
        "--neck", choices=list(ALL_VARIANTS), action="append", metavar="NAME",
        help=f"beside fpn; repeatable; {', '.join(ALL_VARIANTS)}; default: {', '.join(VARIANTS)}",
    )  # fmt: skip
    parser.add_argument("--image-size", type=int, action="append", help="pixels; repeatable; default: 256")
    parser.add_argument("--images", type=int, default=2, help="in a batch; default: 2, as in the recipes")
    parser.add_argument("--channels-last", action="store_true", help="weights and maps in channels_last")
    parser.add_argument("--autocast", choices=("bfloat16", "float16"), help="precision of G; default: float32")
    parser.add_argument("--compile", action="store_true", help="G compiled, as it is timed (takes a minute per neck)")
    parser.add_argument("--device", choices=("cpu", "cuda"), action="append", help="default: both, where present")
    parser.add_argument("--rounds", type=int, default=3, help="of timing; default: 3")
    parser.add_argument(
        "--steps", type=parse_steps, default=[1, 2, 4, 8, 16], metavar="LIST",
        help="step counts for the memory against steps, of the first detector and size; default: 1,2,4,8,16",
    )  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, help="trained detector in place of random weights")
    parser.add_argument("--pictures", nargs="+", help="files and folders to take the images from; default: noise")
    parser.add_argument("--quick", action="store_true", help="a small detector and small images, for tests")
    parser.add_argument("--seed", type=int, default=0, help="of weights, boxes and noise; default: 0")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's")
    parser.add_argument("--out", type=Path, default=Path("runs/train_cost"), help="folder of CSV, JSON and plot")
    args = parser.parse_args(argv)
    for name in ("images", "rounds", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    for size in args.image_size or ():
        if size < 32:
            parser.error(f"--image-size must be at least 32, got {size}")
    if args.steps[0] < 1:
        parser.error("--steps: a neck without steps has no G; the least is 1")
    if args.device and "cuda" in args.device and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    if args.all and args.detector:
        parser.error("give either --all or --detector")
    if args.checkpoint and (args.all or args.detector or args.quick):
        parser.error("--checkpoint brings its own detector: leave out --detector, --all and --quick")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is no folder")
    try:
        args.plan, args.weights = _plan(args)
        args.batch = _pictures(args)
    except (DetectorError, OSError, ValueError) as error:
        parser.error(str(error).splitlines()[0])
    return args


def _plan(args: argparse.Namespace) -> tuple[list[tuple[str, DetectorConfig]], Mapping[str, Tensor] | None]:
    """Detector and size of every comparison, and the weights of the one that is trained."""
    if args.checkpoint:
        module = load_checkpoint(args.checkpoint)
        if module.config.neck != "ifpn":
            raise DetectorError(f"{args.checkpoint} holds a detector with the neck {module.config.neck!r}")
        sizes = args.image_size or [module.config.sizes[-1]]
        named = module.config.detector
        return [(named, replace(module.config, image_size=k)) for k in sizes], module.model.state_dict()
    plan = []
    for detector in DETECTORS if args.all else dict.fromkeys(args.detector or DETECTORS[:1]):
        config, _ = settings_of(f"t1_{detector}_fpn")
        if args.quick:
            config = replace(config, num_classes=4, backbone="resnet18", neck_channels=32)
        for size in args.image_size or [64 if args.quick else 256]:
            plan.append((detector, replace(config, image_size=size, max_size=None)))
    return plan, None


def _pictures(args: argparse.Namespace) -> list[Tensor] | None:
    if not args.pictures:
        return None
    files = find_images(args.pictures)[: args.images]
    found = [image for _, image in read_images(files)]
    if len(found) < args.images:
        raise DetectorError(f"--pictures has {len(found)} images that can be read, --images asks for {args.images}")
    return found


def run(args: argparse.Namespace, devices: Sequence[torch.device]) -> tuple[list[Row], list[StepRow]]:
    """All comparisons."""
    necks = [name for name in ALL_VARIANTS if name == EXPLICIT or name in (args.neck or VARIANTS)]
    weights = f"weights of {args.checkpoint.name}" if args.checkpoint else "random weights"
    setting = Setting(args.channels_last, args.autocast, args.compile)
    each = len(necks) * (1 + 2 * args.rounds)
    total = len(devices) * (len(args.plan) * each + len(args.steps) * len(set(STEPPED) & set(necks)))
    rows: list[Row] = []
    by_steps: list[StepRow] = []
    with tqdm(total=total, unit="run", disable=None) as bar:
        for device in devices:
            for i, (detector, config) in enumerate(args.plan):
                size = config.sizes[-1]
                bar.set_description(f"{detector}, {size} px, {device}")
                images = [image.to(device) for image in args.batch or noise(args.images, size, size, "cpu", args.seed)]
                subjects = {name: Subject(config, name, images, args.seed, args.weights, setting) for name in necks}
                recipe = None if args.checkpoint or args.quick else f"t1_{detector}"
                found = measure(detector, size, subjects, args.rounds, recipe, bar.update, weights)
                rows += found
                if i == 0:
                    by_steps += sweep(detector, size, subjects, args.steps, found[0].train_memory, bar.update)
    return rows, by_steps


def main(argv: Sequence[str] | None = None) -> tuple[list[Row], list[StepRow]]:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    names = args.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    devices = [torch.device(name) for name in dict.fromkeys(names)]
    settings = {
        "detectors": {f"{name}, {config.sizes[-1]} px": vars(config) for name, config in args.plan},
        "necks": dict(VARIANTS), "images": args.images, "rounds": args.rounds, "quick": args.quick,
        "checkpoint": args.checkpoint, "pictures": args.pictures, "channels_last": args.channels_last,
        "autocast": args.autocast, "compiled": args.compile,
    }  # fmt: skip
    record = run_record(devices[-1], args.seed, settings)
    print(describe(record) + "\n", flush=True)
    rows, by_steps = run(args, devices)
    print("\n\n".join(cost_tables(rows)) + "\n")
    if by_steps:
        print("Peak memory of a training step against the steps of the neck, GiB in tensors (and over the FPN's)")
        print(memory_table(by_steps) + "\n")
    lines = verdicts(rows, by_steps)
    print("\n".join(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "train_cost.csv", rows)
    if by_steps:
        write_csv(args.out / "memory.csv", by_steps)
    write_json(args.out / "train_cost.json", record | {"verdicts": lines})
    plot_cost(args.out / "train_cost.png", rows, by_steps)
    print(f"written: {args.out}/train_cost.csv, .json, .png" + (" and memory.csv" if by_steps else ""))
    return rows, by_steps


if __name__ == "__main__":
    main()
