"""An i-FPN in channels_last: same results, and no map that goes back to NCHW inside G."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from checkpoints import small_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deqkit
from adapters.detection import ImplicitFPN, convert_fpn_

DESIGNS: dict[str, dict[str, Any]] = {
    "dense_alone": {"cross_scale": "dense", "rbl": False},
    "dense": {"cross_scale": "dense"},
    "pyramid": {},
    "pyramid_gn_relu": {"out_norm": "gn", "out_act": "relu"},
    "pyramid_integrated_gn": {"out_norm": "integrated_gn"},
    "pyramid_ibn": {"out_norm": "ibn"},
    "pyramid_deformable": {"deformable": True},
    "pyramid_weight_norm": {"weight_norm": True},
    "pyramid_dropout": {"dropout": 0.1},
    "pyramid_basis_norm": {"basis_norm": "gn"},
    "none": {"cross_scale": "none", "out_norm": "gn"},
    "bifpn": {"cross_scale": "bifpn"},
    "nas_fpn": {"cross_scale": "nas_fpn"},
    "mdeq": {"transform": "mdeq", "expansion": 2},
    "rliter": {"transform": "mdeq", "expansion": 2, "injection": False},
}
SIZES = [(20, 22), (10, 11), (5, 6), (3, 3), (2, 2)]
BATCH, CHANNELS = 3, 16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def channels_last(x: Any) -> Any:
    return x.to(memory_format=torch.channels_last)


def in_order(x: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side; between samples there may be room."""
    _, channels, height, width = x.shape
    beside, wide = x.stride(1) == 1 or channels == 1, x.stride(3) == channels or width == 1
    return beside and wide and (x.stride(2) == channels * width or height == 1)


class Formats(TorchDispatchMode):
    """Notes what is computed in another order, of maps of the width of the neck, and counts what is copied of them."""

    COMPUTED = ("convolution", "norm", "upsample", "pool", "relu", "threshold", "add.Tensor", "silu")
    COPIES = ("aten.clone", "aten.copy_", "aten._to_copy")

    def __init__(self) -> None:
        super().__init__()
        self.strayed: list[str] = []
        self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if any(part in name for part in self.COMPUTED):
            made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.dim() == 4 and t.shape[1] == CHANNELS]
            self.strayed += [f"{name} {tuple(t.shape)}" for t in made if not in_order(t)]
        if name.startswith(self.COPIES) and out.dim() > 1 and out.shape[0] == BATCH:
            self.copied += CHANNELS in out.shape  # a mask is none
        return out


def features(format: torch.memory_format) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(BATCH, CHANNELS, *size, generator=generator) for size in SIZES]
    return {str(j): x.to(memory_format=format).requires_grad_() for j, x in enumerate(maps)}


def run(neck: ImplicitFPN, x: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The pyramid, and all gradients."""
    tensors = [*x.values(), *neck.parameters()]
    for t in tensors:
        t.grad = None
    if neck.mask_padding:
        neck.set_image_sizes([(160, 176), (120, 100), (160, 20)], (160, 176))
    torch.manual_seed(2)
    out = list(neck(x).values())
    sum((o.square().mean() for o in out), start=torch.zeros(())).backward()
    return out, [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]


CASES = [(name, False) for name in DESIGNS]
CASES += [(name, True) for name in ("dense", "pyramid", "pyramid_integrated_gn", "bifpn", "nas_fpn", "mdeq")]


@pytest.mark.parametrize(("name", "masked"), CASES)
def test_designs(name: str, masked: bool) -> None:
    """Results are those of NCHW; no map goes back to it, and no step of either solve copies one."""
    settings = {"solver": "fixed_point", "adjoint": deqkit.ImplicitAdjoint("fixed_point"), "rtol": 0.0}
    neck = ImplicitFPN([CHANNELS] * 5, CHANNELS, max_steps=4, mask_padding=masked, **settings, **DESIGNS[name])
    other = channels_last(copy.deepcopy(neck))
    x, inputs = features(torch.channels_last), []
    other.module.register_forward_pre_hook(lambda m, args: inputs.extend(map(in_order, args[0])))
    copies = []
    for other.max_steps in (2, 4):
        with Formats() as formats:
            out, gradients = run(other, x)
        copies.append(formats.copied)
    assert all(map(in_order, out)) and len(inputs) >= 10 * len(SIZES) and all(inputs)
    expected, expected_gradients = run(neck, features(torch.contiguous_format))
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-5  # a bias before iBN has rounding for gradient
    if name == "pyramid_deformable":  # torchvision's kernel knows NCHW alone
        assert formats.strayed and copies[1] > copies[0]
        return
    assert not formats.strayed
    # iBN makes one system of the batch, which is one vector, and hands out pieces of all levels' pixels.
    assert copies[1] == copies[0] + (2 * len(SIZES) if name == "pyramid_ibn" else 0)


@pytest.mark.parametrize("keep_fpn", [False, True])
def test_a_detector_that_is_converted_stays_in_it(keep_fpn: bool) -> None:
    """`model.to(memory_format=...)` is enough: images reach the backbone in NCHW, and its first layer turns them."""
    torch.manual_seed(0)
    config = small_config("fpn")
    images = [torch.rand(3, 64, 80), torch.rand(3, 60, 64)]
    model = channels_last(config.build().eval())
    convert_fpn_(model, keep_fpn=keep_fpn)
    neck = model.backbone.fpn
    weights = [p for p in neck.transform.parameters() if p.dim() == 4 and p.shape[2] > 1]
    assert weights and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    formats: list[bool] = []
    model.head.register_forward_pre_hook(lambda m, args: formats.extend(map(in_order, args[0])))
    with torch.no_grad():
        found = model(images)
        expected = copy.deepcopy(model).to(memory_format=torch.contiguous_format)(images)
    assert len(formats) == 2 * 5 and all(formats[:5]) and not all(formats[5:])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
