"""Norms inside G: over the image alone where the batch is padded, over all levels where they are integrated."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from pyramids import ODD, group_norm, pyramid
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from adapters.detection import ImplicitFPN, convert_fpn_
from adapters.detection.necks.blocks import max_pool, resize
from adapters.detection.necks.image_sizes import _SIZES
from adapters.detection.necks.norms import (
    GroupNorm,
    IntegratedBatchNorm,
    IntegratedGroupNorm,
    LevelGroupNorm,
    padding_masks,
)
from adapters.detection.training import Solves, summarize


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def features(*sizes, channels: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {str(j): x for j, x in enumerate(pyramid(channels, list(sizes), dtype=dtype))}


def shuffled(norm: nn.Module) -> nn.Module:
    for p in norm.parameters():
        nn.init.normal_(p)
    return norm.double()


def corner(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return x[..., : size[0], : size[1]]


# --- masks -------------------------------------------------------------------------------------------------


def test_masks_keep_what_an_image_covers() -> None:
    levels = pyramid(1, [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)])
    whole, small = (800, 1344), (600, 801)
    for mask, rows, columns in zip(padding_masks([whole, small], whole, levels), *[
        (75, 38, 19, 10, 6), (101, 51, 26, 13, 7)
    ], strict=True):  # fmt: skip
        assert mask.dtype == torch.bool and mask[0].all()
        assert mask[1].sum() == rows * columns and corner(mask[1], (rows, columns)).all()


def test_masks_never_leave_an_image_without_pixels() -> None:
    (mask,) = padding_masks([(1, 1), (64, 64)], (64, 64), pyramid(1, [(1, 2)]))
    assert mask[0].sum() == 1 and mask[1].all()


@pytest.mark.parametrize(
    ("sizes", "message"), [([(4, 4)], "1 image sizes.*2"), ([(4, 4), (9, 4)], r"fit into \(8, 8\)")]
)
def test_bad_sizes_are_refused(sizes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        padding_masks(sizes, (8, 8), pyramid(1, [(4, 4)]))


# --- norms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masked_group_norm_is_that_of_the_image_alone(dtype: torch.dtype) -> None:
    norm = shuffled(GroupNorm(16))
    x = torch.randn(2, 16, 6, 7, dtype=torch.float64)
    (mask,) = padding_masks([(6, 7), (3, 4)], (6, 7), [x])
    given = x.to(dtype).requires_grad_()
    out = norm.to(dtype)(given, mask)
    assert out.dtype == dtype
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    norm.double()
    torch.testing.assert_close(out[0].double(), norm(x)[0], **tolerance)
    alone = norm(corner(x[1:], (3, 4)))[0]
    torch.testing.assert_close(corner(out[1], (3, 4)).double(), alone, **tolerance)
    assert not out[1][:, 3:].any() and not out[1][:, :, 4:].any()
    out[1].square().sum().backward()
    assert given.grad.isfinite().all() and not given.grad[1][:, 3:].any()


def test_nan_in_the_padding_stays_there() -> None:
    norm = GroupNorm(8)
    x = torch.randn(1, 8, 4, 4)
    (mask,) = padding_masks([(4, 2)], (4, 4), [x])
    expected = norm(x, mask)
    x[..., 3] = torch.nan
    assert torch.equal(norm(x, mask), expected)


def test_level_group_norm() -> None:
    norm = shuffled(LevelGroupNorm(16, 3))
    x = pyramid(16, ODD[:3])
    torch.testing.assert_close(norm(x), [group_norm(v, n) for v, n in zip(x, norm.norms, strict=True)])


def test_integrated_group_norm_pools_the_levels() -> None:
    norm = shuffled(IntegratedGroupNorm(16, 3))
    x = pyramid(16, ODD[:3])
    pixels = torch.cat([v.reshape(2, 2, 8, -1) for v in x], dim=3)  # two groups of eight channels
    mean, std = pixels.mean((2, 3)), (pixels.var((2, 3), correction=0) + 1e-5).sqrt()
    for out, v in zip(norm(x), x, strict=True):
        normed = (v.unflatten(1, (2, 8)) - mean[..., None, None, None]) / std[..., None, None, None]
        expected = normed.flatten(1, 2) * norm.norm.weight[:, None, None] + norm.norm.bias[:, None, None]
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("masked", [True, False])
def test_integrated_batch_norm_pools_levels_and_samples(masked: bool) -> None:
    norm = shuffled(IntegratedBatchNorm(4, 3))
    x = pyramid(4, ODD[:3])
    masks = padding_masks([ODD[0], (5, 6)], ODD[0], x) if masked else None
    everywhere = [torch.ones_like(v, dtype=torch.bool) for v in x]
    inside = [m.expand_as(v) for m, v in zip(masks, x, strict=True)] if masked else everywhere
    pixels = [torch.cat([v[:, c][m[:, c]] for v, m in zip(x, inside, strict=True)]) for c in range(4)]
    mean, var = (torch.stack([f(p) for p in pixels]) for f in (torch.mean, torch.var))
    biased = torch.stack([p.var(correction=0) for p in pixels])
    for out, v, m in zip(norm(x, masks), x, inside, strict=True):
        normed = (v - mean[:, None, None]) / (biased[:, None, None] + 1e-5).sqrt()
        expected = normed * norm.weight[:, None, None] + norm.bias[:, None, None]
        torch.testing.assert_close(out, torch.where(m, expected, 0.0))
    assert not norm.running_mean.any() and norm.num_batches_tracked == 0
    norm.update_running_stats()
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * var)
    norm.update_running_stats()  # nothing new
    assert norm.num_batches_tracked == 1
    norm.eval()
    for out, v, m in zip(norm(x, masks), x, inside, strict=True):
        normed = (v - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
        expected = normed * norm.weight[:, None, None] + norm.bias[:, None, None]
        torch.testing.assert_close(out, torch.where(m, expected, 0.0))


# --- in the neck -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"unroll": 2}])
def test_ibn_counts_every_forward_pass_once_and_at_its_end(settings) -> None:
    neck = ImplicitFPN([8] * 3, 8, out_norm="ibn", on_failure="ignore", **settings)
    norm = neck.transform.out_norm
    x = features(*ODD[:3])
    for count in (1, 2):
        before = norm.running_mean.clone()
        out = neck(x)
        assert norm.num_batches_tracked == count
        basis = [b(v) for b, v in zip(neck.inner_blocks, x.values(), strict=True)]
        with torch.no_grad():
            z = list(out.values()) if not settings else neck.module([torch.zeros_like(b) for b in basis], basis)
            neck.module(z, basis)
        mean = norm._last[0]
        torch.testing.assert_close(norm.running_mean, before + 0.1 * (mean - before))
        norm._last = None
    neck.eval()
    neck(x)
    assert norm.num_batches_tracked == 2


def test_ibn_is_solved_as_one_system_where_it_ties_samples() -> None:
    neck = ImplicitFPN([8] * 3, 8, out_norm="ibn", rtol=1e-4, max_steps=200, solver="anderson")
    x = features(*ODD[:3])
    sum(v.square().sum() for v in neck(x).values()).backward()
    assert neck.last_solution.converged.shape == () and neck.last_solution.adjoint_stats.converged
    assert neck.level_residuals["0"].shape == ()
    assert all(p.grad.isfinite().all() for p in neck.parameters())
    as_one = neck.last_solution
    neck.transform.out_norm.eval()  # as a frozen norm in training
    neck(x)
    assert neck.last_solution.converged.shape == (2,)
    assert summarize([Solves.of(as_one), Solves.of(neck.last_solution)]).converged == 1.0
    neck.eval()
    together = neck(x)
    alone = neck({k: v[1:] for k, v in x.items()})
    for key in x:
        torch.testing.assert_close(alone[key][0], together[key][1], rtol=1e-4, atol=1e-5)


def test_ibn_and_an_empty_batch() -> None:
    neck = ImplicitFPN([8] * 3, 8, out_norm="ibn")
    out = neck({k: v[:0] for k, v in features(*ODD[:3]).items()})
    assert [v.shape for v in out.values()] == [(0, 8, *size) for size in ODD[:3]]
    assert neck.transform.out_norm.num_batches_tracked == 0


def test_ibn_survives_copies_and_half_precision() -> None:
    neck = ImplicitFPN([8] * 3, 8, out_norm="ibn", on_failure="ignore")
    x = features(*ODD[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        neck(x)
    assert neck.transform.out_norm.running_mean.dtype == torch.float32
    for twin in (copy.deepcopy(neck), pickle.loads(pickle.dumps(neck))):
        twin.eval()
        twin(x)


def test_basis_norm() -> None:
    neck = ImplicitFPN([8] * 2, 8, LastLevelP6P7(8, 8), basis_norm="gn")
    assert len(neck.basis_norms) == 4
    x = features((8, 10), (4, 5))
    out = neck(x)
    scaled = neck({k: 100 * v for k, v in x.items()})  # GN takes the scale of B out, but for eps and biases
    for key in list(x):
        torch.testing.assert_close(scaled[key], out[key], rtol=1e-2, atol=1e-2)
    sum(v.square().sum() for v in out.values()).backward()
    assert all(p.grad is not None for p in neck.basis_norms.parameters())


DESIGNS = [
    {},
    {"cross_scale": "dense"},
    {"cross_scale": "bifpn"},
    {"cross_scale": "nas_fpn"},
    {"transform": "mdeq", "expansion": 2},
    {"out_norm": "ibn"},
    {"out_norm": "integrated_gn", "basis_norm": "gn"},
    {"unroll": 2},
]


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_masked_neck_does_not_see_the_padding(design) -> None:
    """What lies in the padding changes nothing; how much of it there is, little more than interpolation does."""
    design = dict(design)
    solve = {} if "unroll" in design else {"rtol": 1e-6, "max_steps": 60, "on_failure": "ignore"}
    neck = ImplicitFPN([8] * 5, 8, mask_padding=True, **design, **solve).double().eval()
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    x = features(*sizes, dtype=torch.float64)
    image_sizes = [(128, 96), (128, 192)]
    valid = [(16, 12), (8, 6), (4, 3), (2, 2), (1, 1)]
    neck.set_image_sizes(image_sizes, (128, 192))
    out = neck(x)
    assert all(not v[0, :, :, w:].any() for v, (_, w) in zip(out.values(), valid, strict=True))
    for v, (_, w) in zip(x.values(), valid, strict=True):
        v[0, :, :, w:] = 1e3
    neck.set_image_sizes(image_sizes, (128, 192))
    again = neck(x)
    for key in x:
        torch.testing.assert_close(again[key], out[key])
    whole = neck_without_masks(neck)(x)  # the second image has no padding
    for key in x:
        torch.testing.assert_close(out[key][1], whole[key][1], rtol=1e-5, atol=1e-7)


def neck_without_masks(neck: ImplicitFPN) -> ImplicitFPN:
    twin = copy.deepcopy(neck)
    twin.mask_padding = False
    return twin


ALONE = [
    {},
    {"deformable": True},
    {"out_norm": "ibn", "share_csc": False},
    {"out_norm": "integrated_gn", "rbl": False},
    {"cross_scale": "bifpn"},
    {"cross_scale": "dense"},
    {"cross_scale": "nas_fpn"},
    {"transform": "mdeq", "expansion": 1},
]


@pytest.mark.parametrize("design", ALONE, ids=str)
def test_masked_neck_solves_for_the_image_alone(design) -> None:
    """The edge of an image inside a padded batch is to it what the border of an image by itself is."""
    sizes = [(32 >> j, 32 >> j) for j in range(5)]
    valid = [(16 >> j, 32 >> j) for j in range(5)]
    neck = ImplicitFPN([16] * 5, 16, mask_padding=True, unroll=4, **design).double()
    for m in neck.transform.modules():
        if isinstance(m, nn.Conv2d) and m.bias is not None:
            m.weight.data *= 4  # the gain of 256 channels
    x = features(*sizes, channels=16, dtype=torch.float64)
    for v, size in zip(x.values(), valid, strict=True):
        v[:, :, size[0] :] = 0
    neck.set_image_sizes([(128, 256)] * 2, (256, 256))
    masked, ordinary = neck(x), neck_without_masks(neck)(x)
    alone = neck_without_masks(neck)({k: corner(v, s) for (k, v), s in zip(x.items(), valid, strict=True)})

    def error(levels):
        pairs = [(corner(v, s), a) for v, s, a in zip(levels.values(), valid, alone.values(), strict=True)]
        return max(((v - a).norm() / a.norm()).item() for v, a in pairs)

    assert error(masked) < 1e-12 and error(ordinary) > 0.2, (error(masked), error(ordinary))


@pytest.mark.parametrize("design", ALONE, ids=str)
def test_convolutions_see_zeros_beyond_the_edge(design) -> None:
    """Where sizes are odd as well, and a pixel of a coarser level covers both sides of the edge."""
    neck = ImplicitFPN([8] * 5, 8, mask_padding=True, unroll=2, **design)
    x = features(*[(32 >> j, 32 >> j) for j in range(5)])
    masks = padding_masks([(160, 72)] * 2, (256, 256), list(x.values()))
    outside = {m.shape[-2:]: ~m for m in masks}
    seen = []

    def look(module, args):
        seen.append(torch.where(outside[args[0].shape[-2:]], args[0], 0).any())

    for m in neck.transform.modules():
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3):
            m.register_forward_pre_hook(look)
    neck.set_image_sizes([(160, 72)] * 2, (256, 256))
    neck(x)
    assert len(seen) > 5 and not any(seen)


@pytest.mark.parametrize(
    "pool", [lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: F.adaptive_max_pool2d(x, ((x.shape[2] + 1) // 2, 1))]
)
def test_masked_max_pooling_is_that_of_the_image_alone(pool) -> None:
    x = (-torch.rand(1, 2, 14, 8)).requires_grad_()
    (mask,) = padding_masks([(9, 8)], (14, 8), [x])
    out, alone = max_pool(x, mask, pool), pool(x[:, :, :9])
    if out.shape[3] > 1:  # the cells of the other are others
        assert torch.equal(out[:, :, :5], alone)
    assert torch.equal(out[:, :, 5:], torch.zeros_like(out[:, :, 5:])) and (out[:, :, :5] < 0).all()
    out.sum().backward()
    assert x.grad.isfinite().all() and not x.grad[:, :, 9:].any()


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_masked_resizing_is_that_of_the_image_alone(mode: str) -> None:
    x = torch.randn(1, 2, 8, 6, requires_grad=True)
    (mask,) = padding_masks([(4, 6)], (8, 6), [x])
    out = resize(x, (16, 12), mode, mask)
    torch.testing.assert_close(out[:, :, :8], resize(x[:, :, :4], (8, 12), mode))
    assert out.isfinite().all()
    out[:, :, :8].square().sum().backward()
    assert x.grad.isfinite().all() and not x.grad[:, :, 4:].any()


def test_sizes_serve_one_batch() -> None:
    neck = ImplicitFPN([8] * 2, 8, mask_padding=True)
    x = features((8, 8), (4, 4))
    with pytest.raises(RuntimeError, match="set_image_sizes"):
        neck(x)
    neck.set_image_sizes([(32, 64), (64, 64)], (64, 64))
    again = [neck(x)["0"], neck(x)["0"]]  # these maps are known now
    torch.testing.assert_close(*again, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="convert_fpn_"):
        neck({name: level.clone() for name, level in x.items()})
    x["0"].mul_(1)  # the next batch may lie in the place of the last
    with pytest.raises(RuntimeError, match="convert_fpn_"):
        neck(x)
    with torch.inference_mode():
        neck.set_image_sizes([(32, 64), (64, 64)], (64, 64))
        neck(features((8, 8), (4, 4)))


def test_the_sizes_of_a_batch_go_with_its_maps() -> None:
    """Nothing is kept of batches that are gone."""
    before = len(_SIZES)
    neck = ImplicitFPN([8] * 2, 8, mask_padding=True, unroll=1)
    for _ in range(3):
        neck.set_image_sizes([(32, 64), (64, 64)], (64, 64))
        neck(features((8, 8), (4, 4)))
    gc.collect()
    assert len(_SIZES) == before


@pytest.mark.parametrize("settings", [{"rtol": 1e-10, "max_steps": 60}, {"unroll": 2}], ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_neck_masks_the_same_padding(use_reentrant, settings) -> None:
    """Two batches of different padding go through before the backward pass of either recomputes them."""
    neck = ImplicitFPN([8] * 3, 8, mask_padding=True, **settings).double()
    names = ("0", "1", "2")
    sizes = [(16, 16), (8, 8), (4, 4)]
    batches = [[x.requires_grad_() for x in pyramid(8, sizes, dtype=torch.float64)] for _ in range(2)]
    padding = [[(128, 64), (96, 128)], [(40, 128), (128, 128)]]

    def run(*maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(neck(dict(zip(names, maps, strict=True))).values())

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        losses = []
        for maps, image_sizes in zip(batches, padding, strict=True):
            maps = [x * 1.0 for x in maps]  # as out of a backbone: not leaves
            neck.set_image_sizes(image_sizes, (128, 128))
            out = checkpoint(run, *maps, use_reentrant=use_reentrant) if checkpointed else run(*maps)
            losses.append(sum(level.square().sum() for level in out))
        inputs = [*(x for maps in batches for x in maps), *neck.parameters()]
        for x in inputs:
            x.grad = None
        for loss in losses:
            loss.backward()
        return [x.grad for x in inputs]

    for mine, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-9)


def test_a_neck_is_checkpointed_with_the_maps_in_their_dict() -> None:
    neck = ImplicitFPN([8] * 2, 8, mask_padding=True, unroll=1)
    x = features((8, 8), (4, 4))
    neck.set_image_sizes([(32, 64), (64, 64)], (64, 64))
    checkpoint(neck, x, use_reentrant=False)["0"].sum().backward()
    assert all(p.grad is not None for p in neck.inner_blocks.parameters())


def backbone(first: int = 1, extra=None) -> BackboneWithFPN:
    layers = {f"layer{j}": str(j - first) for j in range(first, 5)}
    return BackboneWithFPN(resnet18(weights=None), layers, [32 << j for j in range(first, 5)], 16, extra_blocks=extra)


@pytest.mark.parametrize("detector", ["retinanet", "faster"])
@pytest.mark.parametrize("clone", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_detector_tells_the_neck_the_sizes(detector: str, clone) -> None:
    size = {"min_size": 64, "max_size": 128}
    if detector == "retinanet":
        model = RetinaNet(backbone(2, LastLevelP6P7(16, 16)), 3, **size)
    else:
        model = FasterRCNN(backbone(), 3, **size)
    model = clone(convert_fpn_(model, mask_padding=True, on_failure="ignore")).eval()
    seen = []
    neck = model.backbone.fpn
    tell = neck.set_image_sizes
    neck.set_image_sizes = lambda *given: (seen.append(given), tell(*given))
    with torch.no_grad():
        model([torch.rand(3, 64, 128), torch.rand(3, 64, 64)])
    assert seen == [([(64, 128), (64, 64)], (64, 128))]
    level = neck.last_solution.value[0]
    half = level.shape[3] // 2
    assert level[1, :, :, :half].any() and not level[1, :, :, half:].any() and level[0, :, :, half:].any()


def test_masking_needs_something_that_pads() -> None:
    with pytest.raises(ValueError, match="0 modules that pad"):
        convert_fpn_(backbone(), mask_padding=True)
