"""What a training on COCO takes on 8 GPUs, by arithmetic: nothing here runs on a GPU, or on data.

    python benchmarks/sizing.py [--recipes t1_atss_ifpn ...] [--images 2] [--rate 6.7] [--markdown]

A recipe's detector is made without memory for its numbers for images of 800 x 1344 pixels, and its parts are counted:

    MACs     multiply-accumulates of convolutions and matrix products (PyTorch's FLOP counter, and the deformable
             convolutions, which it does not know) of backbone, explicit parts of the neck, one evaluation of G, head.
             A step takes 3 times those of a trained part, once those of a frozen one, and of G: that of one evaluation
             times the number of evaluations and vector-Jacobian products (each as much as one), plus one for the
             gradients of its weights. Losses are not counted.
    seconds  per step = images x MACs / rate. The rate is that of Detectron2's RetinaNet with ResNet-50, published with
             0.200 s per step of 2 images on each of 8 V100 in float32 (MODEL_ZOO.md, 2019): its MACs counted as above
             over that time. This takes G to run at the rate of a detector. The paper (arXiv 2012.13563, section 5)
             measured about 6 times the time of training with an FPN: the other figure given.
    memory   GiB per GPU = 12 bytes per trained parameter (weight, gradient, momentum) and 4 per frozen one; what
             autograd keeps for the backward pass (its tensors counted by storage; one evaluation of G), and the states
             that the solver keeps. Losses, cuDNN's workspaces, the allocator's fragments and the CUDA context (about
             0.5) come on top.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from reporting import format_table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import deqkit
from adapters.detection import ImplicitFPN
from adapters.detection.training import DetectorConfig

RECIPES = Path(__file__).parent.parent / "adapters" / "detection" / "recipes"
SHOWN = (
    "t1_retinanet_fpn", "t1_retinanet_ifpn", "t1_fasterrcnn_fpn", "t1_fasterrcnn_ifpn", "t1_fcos_fpn", "t1_fcos_ifpn",
    "t1_atss_fpn", "t1_atss_ifpn", "t1_autoassign_fpn", "t1_autoassign_ifpn", "t2_autoassign_unroll2",
    "t5_retinanet_mdeq", "t6_atss_x101_64x4d_dcn_fpn", "t6_atss_x101_64x4d_dcn_ifpn",
    "t6_autoassign_x152_32x8d_dcn_ifpn",
)  # fmt: skip
CLASSES, HEIGHT, WIDTH = 81, 800, 1344
REFERENCE, REFERENCE_SECONDS = "t1_retinanet_fpn", 0.200
PAPERS_FACTOR = 6.0
ROIS = 512  # Faster R-CNN trains on as many per image
# Evaluations and vector-Jacobian products of a training step, the product that goes on to the weights included, as
# `train_cost.py` counts them; those that have a tolerance with random weights.
SOLVES = {"fast": (5, 2), "accurate": (10, 12), "paper": (17, 17)}


@dataclass(frozen=True)
class Sizing:
    """What a recipe takes on every GPU.

    Attributes:
        step_macs: Multiply-accumulates of a training step, per image.
        g_macs: Those of one evaluation of G; 0 without.
        memory: Bytes.
        steps: Length of the schedule.
    """

    step_macs: float
    g_macs: float
    memory: float
    steps: int


def settings_of(recipe: str) -> tuple[DetectorConfig, int]:
    """A recipe's detector and the length of its schedule.

    Raises:
        ValueError: There is no such recipe.
    """
    path = RECIPES / f"{recipe}.yaml"
    if recipe == "defaults" or not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("t*.yaml")))
        raise ValueError(f"unknown recipe {recipe!r}: choose from {known}")
    defaults, own = (yaml.safe_load(p.read_text()) for p in (RECIPES / "defaults.yaml", path))
    merged = _merged(defaults, own)
    return DetectorConfig(num_classes=CLASSES, **merged["model"]["detector"]), merged["trainer"]["max_steps"]


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], own[key]) for key in base.keys() & own.keys() if isinstance(own[key], Mapping)}
    return {**base, **own, **both}


def size_recipe(recipe: str, images: int = 2) -> Sizing:
    """Count what a recipe takes with so many images on every GPU."""
    config, steps = settings_of(recipe)
    with torch.device("meta"):
        model: Any = config.build(weights_backbone=None)
    with FakeTensorMode(allow_non_fake_inputs=True):  # has shapes alone, too, but on a device that autocast knows
        return _count(model.to_empty(device="cpu"), config, images, steps)


def _count(model: Any, config: DetectorConfig, images: int, steps: int) -> Sizing:
    body, neck = model.backbone.body, model.backbone.fpn
    frozen = [body.conv1, *(getattr(body, f"layer{i}") for i in range(1, 5 - (config.trainable_backbone_layers or 3)))]
    for module in frozen:
        module.requires_grad_(False)
    x = torch.empty(images, 3, HEIGHT, WIDTH)
    with Counter() as frozen_macs, torch.no_grad():
        y = body.maxpool(body.relu(body.bn1(body.conv1(x))))
        for module in frozen[1:]:
            y = module(y)
    with Counter() as explicit_macs, KeptForBackward(model) as kept:
        levels, g = _explicit_levels(neck, body(x))
        _head(model, levels)
    times, unrolled, states = _solve(config, neck)
    with Counter() as g_macs, KeptForBackward(model) as kept_of_g:
        state = 0 if g is None else sum(p.numel() * p.element_size() for p in g())
    macs = 3 * explicit_macs.total - 2 * frozen_macs.total + times * g_macs.total
    parameters = sum(p.numel() * (12 if p.requires_grad else 4) for p in model.parameters())
    memory = parameters + kept.bytes + unrolled * kept_of_g.bytes + states * state
    return Sizing(macs / images, g_macs.total / images, memory, steps)


def _explicit_levels(neck: Any, features: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], Any] | None]:
    """The levels without G, and one evaluation of G where there is one."""
    if not isinstance(neck, ImplicitFPN):
        return neck(features), None
    names, maps = list(features), list(features.values())
    levels = [block(c) for block, c in zip(neck.inner_blocks, maps, strict=True)]
    solved = len(levels)
    if neck.extra_blocks is not None:
        levels, names = neck.extra_blocks(list(levels), maps, names)
        solved = len(levels) if neck.extra_in_state else solved
    basis = [level.detach().requires_grad_() for level in levels[:solved]]
    g = None if neck.unroll == 0 else lambda: neck.module([torch.zeros_like(b) for b in basis], basis)
    return dict(zip(names, levels, strict=True)), g


def _head(model: Any, levels: Mapping[str, Tensor]) -> None:
    """What follows the neck, but for losses."""
    if not hasattr(model, "roi_heads"):
        model.head(list(levels.values()))
        return
    model.rpn.head(list(levels.values()))
    first, heads = next(iter(levels.values())), model.roi_heads
    pooled = first.new_empty(first.shape[0] * ROIS, first.shape[1], *heads.box_roi_pool.output_size)
    heads.box_predictor(heads.box_head(pooled.requires_grad_()))


def _solve(config: DetectorConfig, neck: Any) -> tuple[int, int, int]:
    """Of a training step: evaluations of G and products with it, evaluations that are kept, states that are."""
    if not isinstance(neck, ImplicitFPN):
        return 0, 0, 0
    if neck.unroll is not None:
        return 3 * neck.unroll, neck.unroll, 2
    evaluations, products = SOLVES[config.neck_settings.get("preset", "fast")]
    # The history holds two states per step; besides, the iterate, f of it, residual, best, and two on their way.
    history = neck.solver.history if isinstance(neck.solver, deqkit.Anderson | deqkit.Broyden) else 0
    return evaluations + products + 1, 1, 2 * history + 6


class Counter:
    """Counts multiply-accumulates, those of deformable convolutions too."""

    def __enter__(self) -> Counter:
        counted: dict[Any, Any] = {torch.ops.torchvision.deform_conv2d: _deformable_flops}
        self._mode = FlopCounterMode(display=False, custom_mapping=counted)
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)

    @property
    def total(self) -> float:
        return self._mode.get_total_flops() / 2


def _deformable_flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


class KeptForBackward:
    """Adds up what autograd keeps, every storage once and parameters never."""

    def __init__(self, model: nn.Module) -> None:
        self._storages: dict[int, Any] = {}
        self._known = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self._known:
            self._storages[storage._cdata] = storage  # held, so that its number is not given to another
        return x

    def __enter__(self) -> KeptForBackward:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def reference_rate() -> float:
    """MACs per second and GPU of the published training: see the top of the file."""
    return 2 * size_recipe(REFERENCE).step_macs / REFERENCE_SECONDS


HEADER = ("recipe", "GMACs G", "GMACs step", "GiB", "s/step", "hours", "hours at the paper's 6x")


def row(recipe: str, images: int, rate: float) -> list[str]:
    """A line of the table."""
    sizing = size_recipe(recipe, images)
    seconds = images * sizing.step_macs / rate
    hours = seconds * sizing.steps / 3600
    upper = "-"
    if recipe.endswith("_ifpn"):
        twin = (
            size_recipe(recipe.replace("_ifpn", "_fpn"), images) if _exists(recipe.replace("_ifpn", "_fpn")) else None
        )
        upper = "-" if twin is None else f"{PAPERS_FACTOR * images * twin.step_macs / rate * sizing.steps / 3600:.0f}"
    return [
        recipe, f"{sizing.g_macs / 1e9:.1f}" if sizing.g_macs else "-", f"{sizing.step_macs / 1e9:.0f}",
        f"{sizing.memory / 2**30:.1f}", f"{seconds:.2f}", f"{hours:.0f}", upper,
    ]  # fmt: skip


def _exists(recipe: str) -> bool:
    return (RECIPES / f"{recipe}.yaml").is_file()


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The table as it stands in the README."""
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a training on COCO takes on 8 GPUs, by arithmetic.")
    parser.add_argument("--recipes", nargs="+", default=list(SHOWN))
    parser.add_argument("--images", type=int, default=2, help="images per GPU and step")
    parser.add_argument("--rate", type=float, help="tera-MACs per second and GPU; default: the published one")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    if options.images < 1 or (options.rate is not None and options.rate <= 0):
        parser.error("--images and --rate must be positive")
    try:
        rate = options.rate * 1e12 if options.rate else reference_rate()
        rows = [row(recipe, options.images, rate) for recipe in options.recipes]
    except ValueError as error:
        parser.error(str(error))
    print(f"{rate / 1e12:.2f} tera-MACs per second and GPU, {options.images} images each, {HEIGHT} x {WIDTH} pixels")
    print(markdown(rows) if options.markdown else format_table(HEADER, rows))


if __name__ == "__main__":
    main()
