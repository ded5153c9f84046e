import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

import deqkit
from adapters.detection import ImplicitFPN, NonlinearTransform

CHANNELS = [6, 10, 14]
SIZES = [(13, 18), (7, 9), (4, 5)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def features(sizes=SIZES, channels=CHANNELS, batch=2, dtype=torch.float32):
    maps = (torch.randn(batch, c, *s, dtype=dtype) for c, s in zip(channels, sizes, strict=True))
    return OrderedDict((f"c{j}", x) for j, x in enumerate(maps, start=3))


def retina_neck(width=16, **settings):
    return ImplicitFPN(CHANNELS, width, LastLevelP6P7(width, width), **settings)


def strong(neck, gain=0.45):
    """Give a narrow neck the gain per 3x3 convolution that N(0, 0.01) gives one of 256 channels.

    Its own N(0, 0.01) is so small that five plain steps would do, and hardly any level hears of another.
    """
    for conv in neck.transform.cross_scale.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=gain / (9 * conv.in_channels) ** 0.5)
    return neck


def basis_of(neck, x):
    """B, from the parts of the neck: laterals, then the extra block."""
    maps = list(x.values())
    basis = [block(m) for block, m in zip(neck.inner_blocks, maps, strict=True)]
    if neck.extra_in_state:
        basis, _ = neck.extra_blocks(list(basis), list(maps), list(x))
    return basis


def residual(neck, basis, levels):
    """Per level and sample |G(P + B) - P| and |G(P + B)|, shape (L, B)."""
    with torch.no_grad():
        out = neck.transform([p + b for p, b in zip(levels, basis, strict=True)])
        pairs = list(zip(out, levels, strict=True))
        return (
            torch.stack([(g - p).flatten(1).norm(dim=1) for g, p in pairs]),
            torch.stack([g.flatten(1).norm(dim=1) for g, _ in pairs]),
        )


# --- torchvision's contract ------------------------------------------------------------------------------

EXTRA = {"none": lambda: None, "pool": LastLevelMaxPool, "p6p7": lambda: LastLevelP6P7(16, 16)}


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("in_state", [None, True, False])
@pytest.mark.parametrize(
    "sizes",
    [SIZES, [(16, 16), (8, 8), (4, 4)], [(4, 4), (2, 2), (1, 1)], [(1, 1)] * 3, [(9, 20), (5, 5), (3, 1)]],
)
def test_same_keys_and_shapes_as_torchvision(extra, in_state, sizes):
    fpn = FeaturePyramidNetwork(CHANNELS, 16, EXTRA[extra]())
    neck = ImplicitFPN(CHANNELS, 16, EXTRA[extra](), extra_in_state=in_state)
    for batch in (1, 3):
        x = features(sizes, batch=batch)
        given = OrderedDict(x)
        expected, out = fpn(x), neck(x)
        assert isinstance(out, OrderedDict)
        assert [(k, v.shape, v.dtype) for k, v in out.items()] == [(k, v.shape, v.dtype) for k, v in expected.items()]
        assert all(v.isfinite().all() for v in out.values())
        assert all(x[k] is given[k] for k in given) and list(x) == list(given)


def test_one_level():
    neck = ImplicitFPN([5], 8)
    (out,) = neck({"only": torch.randn(2, 5, 6, 7)}).values()
    assert out.shape == (2, 8, 6, 7)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in neck.parameters())


@pytest.mark.parametrize(
    ("extra", "inside"), [(None, False), (LastLevelMaxPool(), False), (LastLevelP6P7(16, 16), True)]
)
def test_which_extra_levels_are_in_the_state(extra, inside):
    neck = ImplicitFPN(CHANNELS, 16, extra)
    out = neck(features())
    assert neck.extra_in_state is inside
    assert len(neck.last_solution.value) == len(neck.transform.residual_blocks) == (5 if inside else 3)
    if isinstance(extra, LastLevelMaxPool):
        torch.testing.assert_close(out["pool"], out["c5"][:, :, ::2, ::2], rtol=0, atol=0)


def test_p6_comes_from_lateral_or_backbone_map():
    """In the state, the extra block sees B_5 as p and C_5 as c; outside it sees P*_5 and C_5."""
    seen = []

    class Spy(ExtraFPNBlock):
        def forward(self, p, c, names):
            seen.append((list(p), list(c), list(names)))
            p.append(p[-1][..., ::2, ::2])
            c.clear()
            names.append("extra")
            return p, names

    x = features()
    for in_state in (True, False):
        neck = ImplicitFPN(CHANNELS, 16, Spy(), extra_in_state=in_state)
        seen.clear()
        out = neck(x)
        ((p, c, names),) = seen
        assert list(out) == ["c3", "c4", "c5", "extra"] and names == ["c3", "c4", "c5"]
        assert all(a is b for a, b in zip(c, x.values(), strict=True))
        expected = neck.inner_blocks[2](x["c5"]) if in_state else neck.last_solution.value[2]
        torch.testing.assert_close(p[2], expected)


def test_cross_scale_by_factory_and_by_name():
    class NoCrossScale(nn.Module):
        def forward(self, levels):
            return [0.1 * x for x in levels]

    def no_cross_scale(channels, num_levels, *, share):
        assert (channels, num_levels, share) == (8, 3, False)
        return NoCrossScale()

    neck = ImplicitFPN(CHANNELS, 8, cross_scale=no_cross_scale, share_csc=False, rtol=1e-5, max_steps=30)
    x = features()
    assert list(neck(x)) == list(x) and bool(neck.last_solution.converged.all())
    with pytest.raises(ValueError, match="'dense'.*'pyramid'"):
        ImplicitFPN(CHANNELS, 8, cross_scale="densest")
    with pytest.raises(ValueError, match="2 levels, got 1"):
        NonlinearTransform(4, 2)([torch.zeros(1, 4, 2, 2)])


def test_lateral_normalisation():
    neck = ImplicitFPN(CHANNELS, 16, norm_layer=lambda c: nn.GroupNorm(4, c))
    fpn = FeaturePyramidNetwork(CHANNELS, 16, norm_layer=lambda c: nn.GroupNorm(4, c))
    names = {k for k in fpn.state_dict() if k.startswith("inner_blocks")}
    assert {k for k in neck.state_dict() if k.startswith("inner_blocks")} == names
    neck(features())
    adopted = ImplicitFPN.from_fpn(fpn)
    adopted(features())


# --- the fixed point -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["leaf_max", None])
@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_output_is_the_fixed_point_and_the_report_is_true(solver, norm):
    neck = strong(retina_neck(solver=solver, rtol=1e-5, max_steps=60, norm=norm))
    x = features()
    out = neck(x)
    basis = basis_of(neck, x)
    err, size = residual(neck, basis, list(out.values()))
    solution = neck.last_solution
    assert bool(solution.converged.all())
    if norm == "leaf_max":
        relative = (err / size).amax(0)
    else:
        relative = err.norm(dim=0) / size.norm(dim=0)
    assert relative.max() <= 1e-5
    torch.testing.assert_close(solution.relative_residual, relative, rtol=0.1, atol=2e-7)
    for returned, reported in zip(out.values(), solution.value, strict=True):
        torch.testing.assert_close(returned, reported, rtol=0, atol=0)


def test_solvers_agree():
    neck = strong(retina_neck(rtol=1e-6, max_steps=60))
    x = features()
    answers = []
    for neck.solver in ("fixed_point", "anderson", "broyden"):
        answers.append(list(neck(x).values()))
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], rtol=1e-4, atol=1e-4)


def test_unsolved_is_said_and_the_evaluation_limit_is_used():
    neck = strong(retina_neck(rtol=1e-7, max_steps=3, eval_max_steps=2, on_failure="ignore"))
    x = features()
    neck(x)
    assert neck.last_solution.num_steps.tolist() == [3, 3]
    assert not neck.last_solution.converged.any()
    neck.eval()
    neck(x)
    assert neck.last_solution.num_steps.tolist() == [2, 2]
    neck.on_failure = "warn"
    with pytest.warns(deqkit.ConvergenceWarning, match="2 of 2 samples"):
        neck(x)
    neck.on_failure = "raise"
    with pytest.raises(deqkit.ConvergenceError):
        neck(x)


def test_same_value_in_every_mode():
    neck = retina_neck()
    x = features()
    reference = list(neck(x).values())
    with torch.no_grad():
        without_grad = list(neck(x).values())
    neck.eval()
    for other in (without_grad, list(neck(x).values())):
        assert all(torch.equal(a, b) for a, b in zip(other, reference, strict=True))


def test_samples_are_independent():
    neck = strong(retina_neck(rtol=1e-5, max_steps=60))
    x = features(batch=3)
    x = OrderedDict((k, v * torch.tensor([0.7, 1.0, 3.0]).view(3, 1, 1, 1)) for k, v in x.items())
    together = neck(x)
    batched = neck.last_solution
    for i in range(3):
        alone = neck(OrderedDict((k, v[i : i + 1]) for k, v in x.items()))
        for key, value in alone.items():
            torch.testing.assert_close(value[0], together[key][i], rtol=1e-4, atol=1e-5)
        assert neck.last_solution.num_steps.item() == batched.num_steps[i].item()
        assert neck.last_solution.status.item() == batched.status[i].item()


# --- gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [None, LastLevelMaxPool, lambda: LastLevelP6P7(8, 8)])
def test_implicit_gradient_is_the_unrolled_gradient(extra):
    tight = deqkit.ImplicitAdjoint(rtol=1e-12, max_steps=200)
    neck = ImplicitFPN(
        CHANNELS, 8, extra() if extra else None, solver="anderson", adjoint=tight, rtol=1e-12, max_steps=200
    ).double()
    strong(neck, gain=0.35)
    x = features([(7, 9), (4, 5), (2, 3)], dtype=torch.float64)
    for v in x.values():
        v.requires_grad_()
    inputs = [*x.values(), *neck.parameters()]

    def loss(levels):
        return sum((v * torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view_as(v)).sum() for v in levels)

    out = neck(x)
    implicit = torch.autograd.grad(loss(out.values()), inputs)

    basis = basis_of(neck, x)
    levels = [torch.zeros_like(b) for b in basis]
    for _ in range(120):
        levels = neck.transform([p + b for p, b in zip(levels, basis, strict=True)])
    if neck.extra_blocks is not None and not neck.extra_in_state:
        levels, _ = neck.extra_blocks(list(levels), list(x.values()), list(x))
    torch.testing.assert_close(list(out.values()), levels, rtol=1e-9, atol=1e-10)
    unrolled = torch.autograd.grad(loss(levels), inputs)
    for a, b in zip(implicit, unrolled, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8 * b.abs().max().item())
    # The levels do matter to each other: one step of G is not enough to get this gradient.
    z = [p + b for p, b in zip(neck.last_solution.value, basis_of(neck, x), strict=True)]
    truncated = torch.autograd.grad(loss(neck.transform(z)), list(x.values()))
    assert any((a - b).norm() > 0.05 * b.norm() for a, b in zip(truncated, unrolled, strict=False))


def test_two_forwards_before_one_backward_and_accumulation():
    neck = strong(retina_neck(width=8, rtol=1e-6, max_steps=60))
    first, second = features(), features()

    def loss(x):
        return sum(v.square().mean() for v in neck(x).values())

    (loss(first) + loss(second)).backward()
    together = [p.grad.clone() for p in neck.parameters()]
    neck.zero_grad()
    loss(first).backward()
    loss(second).backward()
    for a, p in zip(together, neck.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-6)


# --- last_solution and copies ----------------------------------------------------------------------------


def test_last_solution_holds_no_graph_and_gets_the_adjoint_report():
    neck = retina_neck(preset="accurate")
    assert neck.last_solution is None
    out = neck(features())
    solution = neck.last_solution
    assert all(not v.requires_grad and v.grad_fn is None for v in solution.value)
    assert solution.adjoint_stats.status is None
    sum(v.square().sum() for v in out.values()).backward()
    assert solution.adjoint_stats.converged.all()
    with pytest.raises(AttributeError):
        neck.last_solution = None


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda neck: pickle.loads(pickle.dumps(neck))])
def test_copies_after_a_training_step(clone):
    neck = retina_neck(solver=deqkit.Broyden(history=5))
    x = features()
    out = neck(x)
    sum(v.square().sum() for v in out.values()).backward()
    keys = list(neck.state_dict())
    twin = clone(neck)
    assert twin.last_solution is None and neck.last_solution is not None
    assert list(twin.state_dict()) == keys == list(retina_neck().state_dict())
    for a, b in zip(twin(x).values(), out.values(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert all(torch.equal(a, b) for a, b in zip(neck(x).values(), out.values(), strict=True))


def test_state_dict_round_trip():
    neck, other = retina_neck(), retina_neck()
    other.load_state_dict(neck.state_dict())
    x = features()
    assert all(torch.equal(a, b) for a, b in zip(neck(x).values(), other(x).values(), strict=True))


def test_print_shows_the_settings():
    text = repr(retina_neck(solver="broyden", rtol=2e-3, max_steps=17))
    for part in ("[6, 10, 14] -> 16", "3 + 2 extra", "'broyden'", "rtol=0.002", "max_steps=17"):
        assert part in text


# --- memory formats and precisions -----------------------------------------------------------------------


def test_channels_last():
    neck = strong(retina_neck(rtol=1e-5, max_steps=60))
    x = features()
    expected = neck(x)
    neck = neck.to(memory_format=torch.channels_last)
    out = neck(OrderedDict((k, v.to(memory_format=torch.channels_last)) for k, v in x.items()))
    for key in expected:
        torch.testing.assert_close(out[key], expected[key], rtol=1e-4, atol=1e-4)
    sum(v.square().sum() for v in out.values()).backward()
    assert all(p.grad.isfinite().all() for p in neck.parameters())


@pytest.mark.parametrize("extra", [LastLevelMaxPool, lambda: LastLevelP6P7(16, 16)])
@pytest.mark.parametrize("in_state", [True, False])
@pytest.mark.parametrize("norm_layer", [None, lambda c: nn.GroupNorm(2, c)])
def test_bfloat16_autocast(extra, in_state, norm_layer):
    neck = ImplicitFPN(CHANNELS, 16, extra(), norm_layer, extra_in_state=in_state, rtol=1e-3)
    x = features()
    exact = neck(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = neck(x)
    assert all(v.dtype == torch.float32 for v in out.values())
    solution = neck.last_solution
    assert all(v.dtype == torch.float32 for v in solution.value)
    assert solution.rtol == torch.finfo(torch.bfloat16).eps and solution.converged.all()
    for key in exact:
        assert (out[key] - exact[key]).norm() < 0.03 * exact[key].norm()
    sum(v.square().sum() for v in out.values()).backward()
    for parameter in neck.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all() and parameter.grad.any()
    assert solution.adjoint_stats.converged.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_of_the_weights_is_kept(dtype):
    neck = retina_neck(rtol=1e-3).to(dtype)
    out = neck(features(dtype=dtype))
    assert all(v.dtype == dtype for v in out.values())
    assert neck.last_solution.rtol == (torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-3)
    sum(v.square().sum() for v in out.values()).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in neck.parameters())


def test_fixed_number_of_steps_under_autocast():
    neck = retina_neck(rtol=0.0, max_steps=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        neck(features())
    assert neck.last_solution.num_steps.tolist() == [3, 3]


@pytest.mark.parametrize("extra", EXTRA)
def test_empty_batch(extra):
    neck = ImplicitFPN(CHANNELS, 16, EXTRA[extra]())
    expected = FeaturePyramidNetwork(CHANNELS, 16, EXTRA[extra]())(features(batch=0))
    out = neck(features(batch=0))
    assert [(k, v.shape) for k, v in out.items()] == [(k, v.shape) for k, v in expected.items()]


# --- bad input -------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    neck = retina_neck()
    x = features()
    with pytest.raises(ValueError, match="got 0"):
        neck(OrderedDict())
    with pytest.raises(ValueError, match=r"3 feature maps.*got 2.*c3.*c4"):
        neck(OrderedDict(list(x.items())[:2]))
    with pytest.raises(ValueError, match=r"'c4'.*\(B, 10, H, W\).*\(2, 9, 7, 9\)"):
        neck(x | {"c4": torch.randn(2, 9, 7, 9)})
    with pytest.raises(ValueError, match=r"'c5'.*\(14, 4, 5\)"):
        neck(x | {"c5": torch.randn(14, 4, 5)})
    with pytest.raises(ValueError, match="'c5' has batch size 1, 'c3' has 2"):
        neck(x | {"c5": torch.randn(1, 14, 4, 5)})
    with pytest.raises(ValueError, match="list"):
        neck(list(x.values()))


def test_bad_settings_are_refused_at_construction():
    for settings in (
        {"solver": "newton"},
        {"adjoint": "exact"},
        {"rtol": -1.0},
        {"max_steps": 0},
        {"eval_max_steps": 0},
        {"norm": "max"},
        {"on_failure": "log"},
    ):
        (name,) = settings
        with pytest.raises((ValueError, TypeError), match=name.removeprefix("eval_")):
            ImplicitFPN(CHANNELS, 8, **settings)
    with pytest.raises(TypeError, match="tolerance"):
        ImplicitFPN(CHANNELS, 8, tolerance=1e-3)
    with pytest.raises(ValueError, match="empty"):
        ImplicitFPN([], 8)
    with pytest.raises(ValueError, match="positive"):
        ImplicitFPN([3, 0], 8)
    with pytest.raises(TypeError, match="ExtraFPNBlock"):
        ImplicitFPN(CHANNELS, 8, nn.Identity())
    with pytest.raises(ValueError, match="extra_blocks does not fit laterals of 8 channels"):
        ImplicitFPN(CHANNELS, 8, LastLevelP6P7(9, 8))
    with pytest.raises(ValueError, match=r"levels of 8 channels, gave \[8, 8, 8, 12, 12\]"):
        ImplicitFPN(CHANNELS, 8, LastLevelP6P7(CHANNELS[-1], 12))
