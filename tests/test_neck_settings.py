"""How the neck is solved, regularised and put in the place of a trained FPN."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from pyramids import ODD, pyramid
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import deqkit
from adapters.detection import PRESETS, ImplicitFPN, convert_fpn_

CHANNELS = [6, 10, 14]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def features(batch: int = 2, dtype: torch.dtype = torch.float32) -> OrderedDict[str, torch.Tensor]:
    maps = (torch.randn(batch, c, *s, dtype=dtype) for c, s in zip(CHANNELS, ODD, strict=False))
    return OrderedDict((f"c{j}", x) for j, x in enumerate(maps, start=3))


def strong(neck: ImplicitFPN) -> ImplicitFPN:
    """The gain of 256 channels."""
    for m in neck.transform.cross_scale.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.data *= (256 / m.in_channels) ** 0.5
    return neck


def basis_of(neck: ImplicitFPN, x) -> list[torch.Tensor]:
    return [block(v) for block, v in zip(neck.inner_blocks, x.values(), strict=True)]


def loss(levels) -> torch.Tensor:
    return sum((v * torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view_as(v)).sum() for v in levels.values())


# --- presets -----------------------------------------------------------------------------------------------


def test_paper_preset_is_15_steps_forward_and_backward_and_7_at_test() -> None:
    neck = strong(ImplicitFPN(CHANNELS, 16, preset="paper"))
    sum(v.square().sum() for v in neck(features()).values()).backward()
    solution = neck.last_solution
    assert solution.solver == solution.adjoint_stats.solver == "broyden"
    assert solution.num_steps.tolist() == solution.adjoint_stats.num_steps.tolist() == [15, 15]
    assert solution.relative_residual.max() < 1e-3
    neck.eval()
    neck(features())
    assert neck.last_solution.num_steps.tolist() == [7, 7]


def test_settings_go_before_those_of_the_preset() -> None:
    neck = ImplicitFPN(CHANNELS, 16, preset="paper", solver="fixed_point", eval_max_steps=9)
    assert (neck.solver, neck.max_steps, neck.eval_max_steps, neck.rtol) == ("fixed_point", 15, 9, 0.0)
    default, fast = ImplicitFPN(CHANNELS, 16), ImplicitFPN(CHANNELS, 16, preset="fast")
    assert default.settings == fast.settings and fast.rtol == PRESETS["fast"]["rtol"]


def test_who_gives_a_tolerance_gets_a_gradient_as_good() -> None:
    given, accurate = ImplicitFPN(CHANNELS, 16, rtol=1e-3), ImplicitFPN(CHANNELS, 16, preset="accurate", rtol=1e-3)
    assert given.settings == accurate.settings and isinstance(given.adjoint, deqkit.ImplicitAdjoint)
    named = ImplicitFPN(CHANNELS, 16, preset="fast", rtol=1e-3)
    assert named.rtol == 1e-3 and named.adjoint == PRESETS["fast"]["adjoint"]


@pytest.mark.parametrize(("preset", "least", "most"), [("fast", 0.03, 0.4), ("accurate", 1e-6, 0.03)])
def test_presets_are_good_enough_for_training(preset: str, least: float, most: float) -> None:
    """ "accurate": within some per cent of the fixed point and of its gradient for the parameters of G."""
    neck = strong(ImplicitFPN(CHANNELS, 32, preset=preset)).double()
    exact = copy.deepcopy(neck)
    exact.rtol, exact.max_steps, exact.adjoint = 1e-10, 200, deqkit.ImplicitAdjoint()
    x, outs, grads = features(dtype=torch.float64), [], []
    for which in (neck, exact):
        out = which(x)
        loss(out).backward()
        outs.append(torch.cat([v.detach().flatten() for v in out.values()]))
        grads.append(torch.cat([p.grad.flatten() for p in which.transform.parameters()]))
    for a, b in (outs, grads):
        assert least < (a - b).norm() / b.norm() < most
        assert preset == "accurate" or torch.cosine_similarity(a, b, dim=0) > 0.9


def test_residuals_by_level() -> None:
    neck = strong(ImplicitFPN(CHANNELS, 16, LastLevelP6P7(16, 16)))
    assert neck.level_residuals is None
    out = neck(features())
    assert list(neck.level_residuals) == ["c3", "c4", "c5", "p6", "p7"]
    basis, _ = neck.extra_blocks(basis_of(neck, x := features()), list(x.values()), list(x))
    out, given = list(neck(x).values()), neck.level_residuals
    with torch.no_grad():
        g = neck.transform([p + b for p, b in zip(out, basis, strict=True)])
    for found, gj, p in zip(given.values(), g, out, strict=True):
        torch.testing.assert_close(
            found, (gj - p).flatten(1).norm(dim=1) / gj.flatten(1).norm(dim=1), rtol=0.01, atol=0
        )
    neck.norm = None
    neck(x)
    assert neck.level_residuals is None


# --- unrolled ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_unrolled_is_k_steps_differentiated_through(k: int) -> None:
    neck = strong(ImplicitFPN(CHANNELS, 16, unroll=k)).double()
    x = features(dtype=torch.float64)
    for v in x.values():
        v.requires_grad_()
    inputs = [*x.values(), *neck.parameters()]
    out = neck(x)
    basis = basis_of(neck, x)
    levels = [torch.zeros_like(b) for b in basis]
    for _ in range(k):
        levels = neck.transform([p + b for p, b in zip(levels, basis, strict=True)])
    torch.testing.assert_close(list(out.values()), levels)
    expected = torch.autograd.grad(loss(dict(zip(x, levels, strict=True))), inputs)
    torch.testing.assert_close(torch.autograd.grad(loss(out), inputs), expected)
    assert neck.last_solution is None and f"unroll={k}" in repr(neck)
    neck.eval()
    torch.testing.assert_close(list(neck(x).values()), levels)


@pytest.mark.parametrize("extra", [None, LastLevelMaxPool(), LastLevelP6P7(16, 16)])
def test_unroll_0_is_the_basis_without_a_g(extra) -> None:
    neck = ImplicitFPN(CHANNELS, 16, extra, unroll=0, cross_scale="dense")  # a row of a sweep with the same G
    x = features()
    basis, names = basis_of(neck, x), list(x)
    if extra is not None:
        basis, names = extra(list(basis), list(x.values()), names)
    out = neck(x)
    assert list(out) == names
    assert all(torch.equal(a, b) for a, b in zip(out.values(), basis, strict=True))
    assert not list(neck.transform.parameters())
    assert {key.split(".")[0] for key in neck.state_dict()} <= {"inner_blocks", "extra_blocks"}


def test_unrolled_under_autocast_and_copied() -> None:
    neck = ImplicitFPN(CHANNELS, 16, unroll=2)
    x = features()
    expected = neck(x)
    for twin in (copy.deepcopy(neck), pickle.loads(pickle.dumps(neck))):
        assert all(torch.equal(a, b) for a, b in zip(twin(x).values(), expected.values(), strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = neck(x)
    for key, v in out.items():
        assert v.dtype == torch.float32 and (v - expected[key]).norm() < 0.03 * expected[key].norm()


# --- precision of G ----------------------------------------------------------------------------------------


class Casts(TorchDispatchMode):
    """Counts casts of 3x3 kernels."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.num += func is torch.ops.aten._to_copy.default and out.shape[2:] == (3, 3) and args[0].requires_grad
        return out


@pytest.mark.parametrize("steps", [1, 6])
def test_weights_are_cast_once_in_an_inference(steps) -> None:
    neck = ImplicitFPN(CHANNELS, 16, autocast="bfloat16", rtol=0.0, max_steps=steps)
    with torch.no_grad(), Casts() as casts:
        neck(features())
    kernels = [p for p in neck.transform.parameters() if p.dim() == 4]
    assert casts.num == len(kernels) and all(p.shape[2:] == (3, 3) for p in kernels)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("unroll", [None, 2])
@pytest.mark.parametrize("ambient", [True, False])
def test_weights_that_change_within_an_autocast_block_are_cast_anew(ambient, unroll) -> None:
    neck, x = ImplicitFPN(CHANNELS, 16, autocast="bfloat16", unroll=unroll), features()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=ambient):
        neck(x)
        for p in neck.transform.parameters():
            p.mul_(0.7)
        out, expected = neck(x), copy.deepcopy(neck)(x)
    for key, v in out.items():
        torch.testing.assert_close(v, expected[key])


@pytest.mark.parametrize("unroll", [None, 2])
@pytest.mark.parametrize("ambient", [None, torch.bfloat16, torch.float16])
def test_autocast_of_g_alone(unroll, ambient) -> None:
    settings = {"rtol": 1e-4} if unroll is None else {"unroll": unroll}
    neck = strong(ImplicitFPN(CHANNELS, 16, autocast="bfloat16", **settings))
    exact = copy.deepcopy(neck)
    exact.module.autocast = None
    x = features()
    seen = []
    neck.transform.cross_scale.register_forward_hook(lambda module, args, out: seen.extend(v.dtype for v in out))
    expected = exact(x)
    with torch.autocast("cpu", dtype=ambient or torch.bfloat16, enabled=ambient is not None):
        out = neck(x)
    assert set(seen) == {torch.bfloat16}
    for key, v in out.items():
        assert v.dtype == torch.float32 and 0 < (v - expected[key]).norm() < 0.03 * expected[key].norm()
    if unroll is None:
        assert neck.last_solution.rtol == torch.finfo(torch.bfloat16).eps
    loss(out).backward()
    loss(expected).backward()
    for p, q in zip(neck.parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == torch.float32 and (p.grad - q.grad).norm() < 0.2 * q.grad.norm()


# --- weight normalisation and dropout ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "design", [{}, {"unroll": 3}, {"deformable": True}, {"cross_scale": "dense", "rbl": False}], ids=str
)
def test_weight_norm_leaves_the_function_and_gives_every_filter_a_length(design) -> None:
    torch.manual_seed(1)
    plain = ImplicitFPN(CHANNELS, 16, **design)
    torch.manual_seed(1)
    neck = ImplicitFPN(CHANNELS, 16, weight_norm=True, **design)
    x = features()
    out, expected = neck(x), plain(x)
    for key in out:
        torch.testing.assert_close(out[key], expected[key])
    loss(out).backward()
    loss(expected).backward()
    names = [name for name, m in neck.transform.named_modules() if isinstance(m, nn.Conv2d) and m.out_channels == 16]
    assert names
    offsets = [m for name, m in neck.transform.named_modules() if name.endswith("offset")]
    assert len(offsets) == 3 * ("deformable" in design) and not any(hasattr(m, "parametrizations") for m in offsets)
    for name in names:
        conv, same = neck.transform.get_submodule(name), plain.transform.get_submodule(name)
        lengths, directions = (p for p in conv.parametrizations.weight.parameters())
        assert lengths.shape == (16, 1, 1, 1)
        # dL/dg = dL/dw . v / |v|, by the chain rule from the gradient without weight norm
        along = (same.weight.grad * directions / directions.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).flatten(1).sum(1)
        torch.testing.assert_close(lengths.grad.flatten(), along, rtol=1e-3, atol=1e-5 * along.abs().max().item())


def test_weight_norm_is_computed_once_per_forward_pass() -> None:
    for settings in ({"max_steps": 10, "rtol": 0.0}, {"unroll": 4}):
        neck = ImplicitFPN(CHANNELS, 16, weight_norm=True, **settings)
        conv = neck.transform.cross_scale.same[0]
        calls = []
        conv.parametrizations.weight[0].register_forward_hook(lambda *args, calls=calls: calls.append(1))
        loss(neck(features())).backward()
        assert len(calls) == 1


def test_dropout_drops_whole_channels_the_same_throughout_a_forward_pass() -> None:
    for settings in ({"rtol": 1e-5, "max_steps": 100}, {"unroll": 3}):
        neck = strong(ImplicitFPN(CHANNELS, 16, dropout=0.5, **settings))
        block = neck.transform.residual_blocks[1]
        seen = []
        block.dropout.register_forward_hook(lambda m, args, out, seen=seen: seen.append((out == 0).all((2, 3)).clone()))
        x = features()
        out = neck(x)
        assert len(seen) > 1 and all(torch.equal(dropped, seen[0]) for dropped in seen)
        assert seen[0].shape == (2, 16) and 0 < seen[0].sum() < 32
        loss(out).backward()
        assert all(torch.equal(dropped, seen[0]) for dropped in seen)
        if "rtol" in settings:
            assert neck.last_solution.converged.all() and neck.last_solution.adjoint_stats.converged.all()
        first = seen[0]
        neck(x)
        assert not torch.equal(seen[-1], first)
        neck.eval()
        assert all(torch.equal(a, b) for a, b in zip(neck(x).values(), neck(x).values(), strict=True))


def test_gradient_under_dropout() -> None:
    """That of the fixed point for the masks of the forward pass: compared with many steps under the same masks."""
    tight = {"rtol": 1e-10, "max_steps": 300, "solver": "anderson", "adjoint": "implicit"}
    neck = ImplicitFPN([8, 8], 8, dropout=0.5, **tight).double()
    x = dict(zip("ab", pyramid(8, [(6, 8), (3, 4)]), strict=True))
    parameters = list(neck.parameters())
    with deqkit.nn.hold():
        out = neck(x)
        implicit = torch.autograd.grad(loss(out), parameters)
        basis = basis_of(neck, x)
        steps = [torch.zeros_like(b) for b in basis]
        for _ in range(100):
            steps = neck.module(steps, basis)
    torch.testing.assert_close(list(out.values()), list(steps), rtol=1e-8, atol=1e-9)
    for a, b in zip(implicit, torch.autograd.grad(loss(dict(zip(x, steps, strict=True))), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_dropout_in_mdeq() -> None:
    neck = ImplicitFPN(CHANNELS, 16, transform="mdeq", expansion=1, dropout=0.5, on_failure="ignore")
    seen = [[] for _ in neck.transform.branches]
    for branch, drops in zip(neck.transform.branches, seen, strict=True):
        branch.dropout.register_forward_hook(lambda m, args, out, drops=drops: drops.append((out == 0).all((2, 3))))
    loss(neck(features())).backward()
    for drops in seen:
        drops[:1] = []  # at P = 0 there is nothing to drop
        assert len(drops) > 1 and all(torch.equal(d, drops[0]) for d in drops) and 0 < drops[0].sum() < 32
    assert not torch.equal(seen[0][0], seen[1][0])


# --- in the place of a trained FPN -------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [None, LastLevelMaxPool, lambda: LastLevelP6P7(16, 16)])
@pytest.mark.parametrize("in_state", [None, True, False])
@pytest.mark.parametrize(
    "design",
    [{}, {"cross_scale": "dense"}, {"cross_scale": "bifpn"}, {"transform": "mdeq", "expansion": 2}, {"unroll": 2},
     {"out_norm": "gn"}, {"out_norm": "ibn"}, {"cross_scale": "none", "out_norm": "integrated_gn"},
     {"weight_norm": True}, {"deformable": True, "weight_norm": True}, {"preset": "paper"}],
    ids=str,
)  # fmt: skip
def test_a_kept_fpn_is_reproduced_and_then_learnt_away_from(extra, in_state, design) -> None:
    fpn = FeaturePyramidNetwork(CHANNELS, 16, extra() if extra else None)
    x = features()
    expected = fpn(x)
    kept = {k: v.clone() for k, v in fpn.state_dict().items()}
    neck = ImplicitFPN.from_fpn(fpn, keep_fpn=True, extra_in_state=in_state, **design)
    out = neck(x)
    assert list(out) == list(expected)
    assert all(torch.equal(a, b) for a, b in zip(out.values(), expected.values(), strict=True))
    assert {k for k in neck.state_dict() if not k.startswith("module.")} == set(kept)
    optimizer = torch.optim.SGD(neck.transform.parameters(), lr=1e-3)
    before = target = None
    for _ in range(3):
        optimizer.zero_grad()
        target = sum((v - 1).square().mean() for v in neck(x).values())
        before = target if before is None else before
        target.backward()
        optimizer.step()
    assert target < before
    assert all(torch.equal(v, kept[k]) for k, v in neck.state_dict().items() if k in kept)


@pytest.mark.parametrize("extra", [LastLevelMaxPool, lambda: LastLevelP6P7(16, 16)])
def test_a_kept_fpn_under_autocast(extra) -> None:
    fpn = FeaturePyramidNetwork(CHANNELS, 16, extra())
    x = features()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = fpn(x)
        out = ImplicitFPN.from_fpn(fpn, keep_fpn=True)(x)
    assert all(torch.equal(a, b.float()) for a, b in zip(out.values(), expected.values(), strict=True))


def test_nas_fpn_can_start_at_zero() -> None:
    fpn = FeaturePyramidNetwork(CHANNELS, 16, LastLevelP6P7(16, 16))
    x = features()
    expected = fpn(x)
    neck = ImplicitFPN.from_fpn(fpn, keep_fpn=True, cross_scale="nas_fpn")
    assert all(torch.equal(a, b) for a, b in zip(neck(x).values(), expected.values(), strict=True))


@pytest.mark.parametrize("detector", ["retinanet", "faster"])
def test_a_converted_detector_detects_what_it_did(detector: str) -> None:
    first = 2 if detector == "retinanet" else 1
    layers = {f"layer{j}": str(j - first) for j in range(first, 5)}
    extra = LastLevelP6P7(16, 16) if detector == "retinanet" else None
    widths = [32 << j for j in range(first, 5)]
    backbone = BackboneWithFPN(resnet18(weights=None), layers, widths, 16, extra_blocks=extra)
    size = {"min_size": 64, "max_size": 64}
    model = RetinaNet(backbone, 3, score_thresh=0.0, **size) if extra else FasterRCNN(backbone, 3, **size)
    model.eval()
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    with torch.no_grad():
        expected = model(images)
        keys = set(model.state_dict())
        convert_fpn_(model, keep_fpn=True)
        found = model(images)
    assert sum(len(d["boxes"]) for d in expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in b)
    assert keys < set(model.state_dict())
    for m in model.modules():  # and on from there
        m.training = True
    target = {"boxes": torch.tensor([[6.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    sum(model(images, [target, target]).values()).backward()
    csc = model.backbone.fpn.transform.cross_scale
    assert all(m.weight.grad.any() for m in csc.modules() if isinstance(m, nn.Conv2d))


def test_what_cannot_be_kept_is_refused() -> None:
    class OwnForward(FeaturePyramidNetwork):
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(ValueError, match="OwnForward has a forward pass of its own"):
        ImplicitFPN.from_fpn(OwnForward(CHANNELS, 16), keep_fpn=True)
    with pytest.raises(ValueError, match="no gradient goes through a ReLU of zeros"):
        ImplicitFPN.from_fpn(FeaturePyramidNetwork(CHANNELS, 16), keep_fpn=True, out_act="relu")
    with pytest.raises(ValueError, match="NoConnection cannot start at zero"):
        ImplicitFPN.from_fpn(FeaturePyramidNetwork(CHANNELS, 16), keep_fpn=True, cross_scale="none")
    with pytest.raises(ValueError, match="no zero_init_"):
        ImplicitFPN.from_fpn(
            FeaturePyramidNetwork(CHANNELS, 16), keep_fpn=True, transform=lambda channels, levels: nn.ReLU()
        )


# --- bad settings ------------------------------------------------------------------------------------------

REFUSED = [
    ({"preset": "slow"}, ValueError, "preset 'slow'.*'fast', 'accurate', 'paper'"),
    ({"transform": "densest"}, ValueError, "transform 'densest'.*'ifpn', 'mdeq'"),
    ({"transform": 3}, TypeError, "transform.*3"),
    ({"cross_scale": "fpn"}, ValueError, "cross_scale 'fpn'.*'none', 'dense', 'pyramid', 'bifpn', 'nas_fpn'"),
    ({"cross_scale": "nas_fpn"}, ValueError, "nas_fpn.*5 levels.*got 3"),
    ({"cross_scale": "none", "rbl": False}, ValueError, "rbl=False.*unroll=0"),
    ({"cross_scale": "dense", "deformable": True}, ValueError, "'dense' has no deformable"),
    ({"rbl": False, "dropout": 0.1}, ValueError, "rbl=False leaves out"),
    ({"dropout": 1.5}, ValueError, "1.5"),
    ({"out_norm": "bn"}, ValueError, "out_norm 'bn'.*None, 'gn', 'integrated_gn', 'ibn'"),
    ({"out_act": "gelu"}, ValueError, "out_act 'gelu'.*'relu'"),
    ({"basis_norm": "bn"}, ValueError, "basis_norm 'bn'.*'gn'"),
    ({"autocast": "int8"}, ValueError, "autocast 'int8'.*'bfloat16', 'float16'"),
    ({"autocast": torch.float32}, ValueError, "autocast torch.float32"),
    ({"unroll": -1}, ValueError, "unroll.*-1"),
    ({"unroll": 1.0}, TypeError, "unroll.*1.0"),
    ({"unroll": True}, TypeError, "unroll.*True"),
    ({"unroll": 2, "trace": True}, ValueError, "unroll=2.*leave out trace"),
    ({"unroll": 0, "cross_scale": "fpn"}, ValueError, "cross_scale 'fpn'"),
    ({"unroll": 2, "max_steps": 3, "preset": "paper"}, ValueError, "unroll=2.*leave out max_steps, preset"),
    ({"transform": "mdeq", "cross_scale": "dense"}, TypeError, "'mdeq' has no setting 'cross_scale'.*'injection'"),
    ({"transform": "mdeq", "expansion": 0}, ValueError, "expansion.*0"),
    ({"share": True}, TypeError, "'ifpn' has no setting 'share'.*'share_csc'"),
]


@pytest.mark.parametrize(("settings", "error", "message"), REFUSED, ids=[str(r[0]) for r in REFUSED])
def test_bad_settings_are_refused_by_name(settings, error, message: str) -> None:
    with pytest.raises(error, match=message):
        ImplicitFPN(CHANNELS, 8, **settings)


def test_bifpn_needs_two_levels() -> None:
    with pytest.raises(ValueError, match="2 levels or more"):
        ImplicitFPN([8], 8, cross_scale="bifpn")
