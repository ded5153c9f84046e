"""The designs of G, each against its formula written out, and what they cost."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from pyramids import (
    ODD,
    SMALL,
    bilinear,
    conv,
    deformed,
    group_norm,
    largest_of_cells,
    nearest,
    pointwise,
    pyramid,
    randomised,
    residual_block,
)
from torch import nn
from torch.nn import functional as F

import deqkit
from adapters.detection import (
    BiFPNConnection,
    DenseConnection,
    ImplicitFPN,
    MDEQTransform,
    NASFPNConnection,
    NonlinearTransform,
    PyramidConv,
)
from adapters.detection.necks.blocks import DeformableConv
from adapters.detection.necks.norms import padding_masks

DESIGNS = {
    "a": {"cross_scale": "dense", "rbl": False},
    "b": {"cross_scale": "dense"},
    "b_shared": {"cross_scale": "dense", "share_csc": True, "share_rbl": True},
    "c": {},
    "c_own_weights": {"share_csc": False},
    "c_no_rbl": {"rbl": False},
    "c_gn_relu": {"out_norm": "gn", "out_act": "relu"},
    "c_integrated_gn": {"out_norm": "integrated_gn"},
    "c_ibn": {"out_norm": "ibn"},
    "c_deformable": {"deformable": True},
    "c_weight_norm": {"weight_norm": True},
    "none_gn": {"cross_scale": "none", "out_norm": "gn"},
    "bifpn": {"cross_scale": "bifpn"},
    "bifpn_shared": {"cross_scale": "bifpn", "share_csc": True},
    "nas_fpn": {"cross_scale": "nas_fpn"},
    "nas_fpn_shared": {"cross_scale": "nas_fpn", "share_csc": True},
    "mdeq": {"transform": "mdeq", "expansion": 2},
    "mdeq_rliter": {"transform": "mdeq", "expansion": 2, "injection": False},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(name: str, channels: int = 8, levels: int = 5, **settings) -> ImplicitFPN:
    """A neck whose laterals pass on maps that are B already."""
    neck = ImplicitFPN([channels] * levels, channels, **DESIGNS[name], **settings)
    for block in neck.inner_blocks:
        nn.init.dirac_(block[0].weight)
    return neck


def named(levels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {str(j): x for j, x in enumerate(levels)}


# --- formulas --------------------------------------------------------------------------------------------


def test_dense_connection() -> None:
    csc = randomised(DenseConnection(4, 4).double())
    r = pyramid(4, ODD[:4])
    out = csc(r)
    for i in range(4):
        total = 0
        for j in range(4):
            convs = csc.convs[f"{i}_{j}"]
            assert len(convs) == max(1, i - j)
            if j >= i:
                total = total + nearest(pointwise(r[j], convs[0]), ODD[i])
            else:
                x = conv(r[j], convs[0], stride=2)
                for further in convs[1:]:
                    x = conv(x.clamp(min=0), further, stride=2)
                total = total + x
        torch.testing.assert_close(out[i], total)


def test_dense_connection_shares_by_distance() -> None:
    own, shared = DenseConnection(4, 4).double(), randomised(DenseConnection(4, 4, share=True).double())
    for i in range(4):
        for j in range(4):
            own.convs[f"{i}_{j}"].load_state_dict(shared.convs[str(i - j)].state_dict())
    r = pyramid(4, ODD[:4])
    torch.testing.assert_close(shared(r), own(r))
    assert len(shared.convs) == 7


def _pyramid_reference(csc, r, convolve, share):
    index = (lambda i: 0) if share else (lambda i: i)
    out = []
    for i, x in enumerate(r):
        total = convolve(i, x, csc.same[index(i)], 1)
        if i + 1 < len(r):
            total = total + bilinear(convolve(i, r[i + 1], csc.up[index(i)], 1), x.shape[-2:])
        if i > 0:
            total = total + convolve(i, r[i - 1], csc.down[index(i - 1)], 2)
        out.append(total)
    return out


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("deformable", [True, False])
def test_pyramid_conv_is_eq_8(share: bool, deformable: bool) -> None:
    csc = randomised(PyramidConv(4, 3, share=share, deformable=deformable).double())
    convs = [m for m in csc.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 4]
    assert len(convs) == (3 if share else 7)
    assert sum(isinstance(m, DeformableConv) for m in convs) == ((3 if share else 5) if deformable else 0)
    r = pyramid(4, ODD[:3])

    def convolve(i, x, module, stride):
        return deformed(x, module, stride) if deformable and i > 0 else conv(x, module, stride)

    torch.testing.assert_close(csc(r), _pyramid_reference(csc, r, convolve, share))


@pytest.mark.parametrize("share", [True, False])
def test_deformable_pyramid_conv_starts_as_the_ordinary_one(share: bool) -> None:
    csc = PyramidConv(4, 3, share=share, deformable=True).double()
    r = pyramid(4, ODD[:3])
    torch.testing.assert_close(csc(r), _pyramid_reference(csc, r, lambda i, x, m, s: conv(x, m, s), share))
    sum(x.square().sum() for x in csc(r)).backward()
    assert all(m.offset.weight.grad.any() for m in csc.modules() if isinstance(m, DeformableConv))


def _separable(x, convs):
    return pointwise(F.conv2d(x, convs[0].weight, padding=1, groups=x.shape[1]), convs[1])


@pytest.mark.parametrize("share", [True, False])
def test_bifpn(share: bool) -> None:
    csc = randomised(BiFPNConnection(4, 4, share=share).double())
    with torch.no_grad():
        csc.top_down[1].weights.copy_(torch.tensor([0.7, -0.2]))  # relu takes the second out
        csc.bottom_up[0].weights.copy_(torch.tensor([0.1, 0.5, 0.9]))
    r = pyramid(4, ODD[:4])

    def node(fusion, convs, *inputs):
        w = fusion.weights.clamp(min=0)
        x = sum(wi * xi for wi, xi in zip(w / (w.sum() + 1e-4), inputs, strict=True))
        return group_norm(_separable(x * torch.sigmoid(x), convs), fusion.norm)

    def down(x):
        return F.max_pool2d(x, 3, 2, 1)

    td, bu = ((c[0],) * 3 if share else tuple(c) for c in (csc.top_down_convs, csc.bottom_up_convs))
    t2 = node(csc.top_down[2], td[2], r[2], nearest(r[3], ODD[2]))
    t1 = node(csc.top_down[1], td[1], r[1], nearest(t2, ODD[1]))
    o0 = node(csc.top_down[0], td[0], r[0], nearest(t1, ODD[0]))
    o1 = node(csc.bottom_up[0], bu[0], r[1], t1, down(o0))
    o2 = node(csc.bottom_up[1], bu[1], r[2], t2, down(o1))
    o3 = node(csc.bottom_up[2], bu[2], r[3], down(o2))
    torch.testing.assert_close(csc(r), [o0, o1, o2, o3])


@pytest.mark.parametrize("share", [True, False])
def test_nas_fpn(share: bool) -> None:
    csc = randomised(NASFPNConnection(4, 5, share=share).double())
    order = ["p4a", "p4b", "p3", "p4", "p5", "p7", "p6"]
    p3, p4, p5, p6, p7 = r = pyramid(4)

    def cell(name, x):
        module = csc.convs[0 if share else order.index(name)]
        return group_norm(conv(x.clamp(min=0), module), csc.norms[name])

    def gp(x, y):
        return y + torch.sigmoid(y.mean((2, 3), keepdim=True)) * x

    p4a = cell("p4a", gp(nearest(p6, ODD[1]), p4))
    p4b = cell("p4b", p4a + p4)
    q3 = cell("p3", nearest(p4b, ODD[0]) + p3)
    q4 = cell("p4", largest_of_cells(q3, ODD[1]) + p4b)
    q5 = cell("p5", p5 + gp(largest_of_cells(q4, ODD[2]), largest_of_cells(q3, ODD[2])))
    q7 = cell("p7", p7 + gp(largest_of_cells(q5, ODD[4]), largest_of_cells(p4b, ODD[4])))
    q6 = cell("p6", gp(nearest(q7, ODD[3]), largest_of_cells(q5, ODD[3])))
    torch.testing.assert_close(csc(r), [q3, q4, q5, q6, q7])


@pytest.mark.parametrize("injection", [True, False])
def test_mdeq_block(injection: bool) -> None:
    g = randomised(MDEQTransform(4, 3, injection=injection, expansion=3).double())
    x, b = pyramid(4, ODD[:3]), pyramid(4, ODD[:3])
    hidden = []
    for branch, xj, bj in zip(g.branches, x, b, strict=True):
        assert branch.conv1.weight.shape == (12, 4, 3, 3)
        y = conv(group_norm(conv(xj, branch.conv1), branch.norm1).clamp(min=0), branch.conv2)
        y = group_norm(y + bj if injection else y, branch.norm2)
        hidden.append(group_norm((y + xj).clamp(min=0), branch.norm3))
    out = []
    for i in range(3):
        total = hidden[i]
        for j in range(3):
            way = g.fuse[f"{i}_{j}"] if i != j else None
            if j > i:
                total = total + nearest(group_norm(pointwise(hidden[j], way[0].conv), way[0].norm), ODD[i])
            elif j < i:
                y = group_norm(conv(hidden[j], way[0].conv, 2), way[0].norm)
                for further in way[1:]:
                    y = group_norm(conv(y.clamp(min=0), further.conv, 2), further.norm)
                total = total + y
        out.append(group_norm(pointwise(total.clamp(min=0), g.post[i].conv), g.post[i].norm))
    torch.testing.assert_close(g(x, None, b if injection else None), out)


@pytest.mark.parametrize("cross_scale", ["dense", "pyramid"])
@pytest.mark.parametrize("rbl", [True, False])
@pytest.mark.parametrize("out_act", [None, "relu"])
def test_transform_is_rbl_then_csc(cross_scale: str, rbl: bool, out_act: str | None) -> None:
    g = randomised(NonlinearTransform(4, 3, cross_scale=cross_scale, rbl=rbl, out_act=out_act).double())
    z = pyramid(4, ODD[:3])
    refined = [residual_block(x, block) for x, block in zip(z, g.residual_blocks, strict=True)] if rbl else z
    out = g.cross_scale(refined)
    torch.testing.assert_close(g(z), [x.clamp(min=0) for x in out] if out_act else out)


# --- the number of parameters ------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_number_of_parameters() -> None:
    c, levels = 16, 5
    rbl = 2 * 9 * c * c + 4 * c
    conv3, conv1, sep = 9 * c * c + c, c * c + c, 9 * c + c * c
    pairs = levels * (levels - 1) // 2
    strided = sum(i - j for i in range(levels) for j in range(i))
    offsets = 9 * c * 18 + 18
    mdeq = 2 * 9 * 5 * c * c + 2 * 5 * c + 4 * c  # of a branch
    expected = {
        "a": levels * conv1 + pairs * conv1 + strided * conv3,
        "b": levels * rbl + levels * conv1 + pairs * conv1 + strided * conv3,
        "b_shared": rbl + conv1 + (levels - 1) * conv1 + (1 + 2 + 3 + 4) * conv3,
        "c": levels * rbl + 3 * conv3,
        "c_own_weights": levels * rbl + (levels + 2 * (levels - 1)) * conv3,
        "c_no_rbl": 3 * conv3,
        "c_gn_relu": levels * rbl + 3 * conv3 + levels * 2 * c,
        "c_integrated_gn": levels * rbl + 3 * conv3 + 2 * c,
        "c_ibn": levels * rbl + 3 * conv3 + 2 * c,
        "c_deformable": levels * rbl + 3 * (conv3 + offsets),
        "c_weight_norm": levels * (rbl + 2 * c) + 3 * (conv3 + c),
        "none_gn": levels * rbl + levels * 2 * c,
        "bifpn": levels * rbl + 8 * (sep + 2 * c) + 4 * 2 + 3 * 3 + 2,
        "bifpn_shared": levels * rbl + 2 * sep + 8 * 2 * c + 4 * 2 + 3 * 3 + 2,
        "nas_fpn": levels * rbl + 7 * (9 * c * c + 2 * c),
        "nas_fpn_shared": levels * rbl + 9 * c * c + 7 * 2 * c,
    }
    for name, number in expected.items():
        assert count(NonlinearTransform(c, levels, **DESIGNS[name])) == number, name
    fuse = pairs * (c * c + 2 * c) + strided * (9 * c * c + 2 * c)
    assert count(MDEQTransform(c, levels)) == levels * mdeq + fuse + levels * (c * c + 2 * c)


def test_every_parameter_is_used() -> None:
    for name in DESIGNS:
        neck = make(name, on_failure="ignore", max_steps=3)
        randomised(neck.transform)
        for key, p in neck.transform.named_parameters():
            p.data = p.abs() if key.endswith(".weights") else p  # BiFPN's ReLU would take an input out
        sum(x.square().sum() for x in neck(named(pyramid(8, dtype=torch.float32))).values()).backward()
        unused = [key for key, p in neck.transform.named_parameters() if p.grad is None or not p.grad.any()]
        assert not unused, (name, unused)


# --- the fixed point and its gradient ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [ODD, [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)], [(9, 20), (5, 5), (3, 1), (1, 1), (1, 1)]],
)
@pytest.mark.parametrize("name", DESIGNS)
def test_shapes_and_dtypes(name: str, sizes: list[tuple[int, int]]) -> None:
    neck = make(name, on_failure="ignore", max_steps=2)
    for dtype in (torch.float32, torch.bfloat16):
        x = named(pyramid(8, sizes, batch=3, dtype=dtype))
        out = neck.to(dtype)(x)
        assert [(v.shape, v.dtype) for v in out.values()] == [(v.shape, dtype) for v in x.values()]
        assert all(v.isfinite().all() for v in out.values())
        assert neck.last_solution.leaf_residuals.shape == ((5,) if name == "c_ibn" else (5, 3))


@pytest.mark.parametrize("name", [name for name in DESIGNS if name != "c_ibn"])
def test_a_sample_that_is_lost_costs_the_others_nothing(name: str) -> None:
    neck = make(name, on_failure="ignore", max_steps=4)
    x = named(pyramid(8, batch=3, dtype=torch.float32))
    x["1"][1, 3, 2, 2] = torch.nan
    together = neck(x)
    assert neck.last_solution.status[1] == deqkit.Status.NONFINITE
    for i in (0, 2):
        alone = neck({k: v[i : i + 1] for k, v in x.items()})
        for key, v in alone.items():
            torch.testing.assert_close(v[0], together[key][i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DESIGNS)
def test_training_under_autocast(name: str) -> None:
    neck = make(name, on_failure="ignore")
    x = named(pyramid(8, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = neck(x)
    sum(v.square().sum() for v in out.values()).backward()
    assert all(v.dtype == torch.float32 for v in out.values())
    for key, p in neck.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["c_deformable", "c_ibn", "c_weight_norm", "bifpn", "nas_fpn", "mdeq"])
def test_g_compiles_as_one_graph(name: str) -> None:
    g, z = make(name).transform, pyramid(8, dtype=torch.float32)
    masks = padding_masks([ODD[0], (9, 11)], ODD[0], z)
    args = (z, masks, z) if name == "mdeq" else (z, masks)
    torch._dynamo.reset()
    compiled = torch.compile(g, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), g(*args))


FIXED_STEPS = [{"unroll": 2}, {"rtol": 0.0, "max_steps": 2}]


@pytest.mark.parametrize("settings", FIXED_STEPS, ids=str)
def test_the_neck_compiles_as_one_graph_with_a_fixed_number_of_steps(settings) -> None:
    neck = make("c", **settings)
    x = named(pyramid(8, dtype=torch.float32))
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(neck, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(list(out.values()), list(neck(x).values()))


@pytest.mark.parametrize("settings", FIXED_STEPS, ids=str)
def test_export_with_a_fixed_number_of_steps(settings) -> None:
    neck = make("c", **settings).eval()
    x = named(pyramid(8, dtype=torch.float32))
    with torch.no_grad():
        exported = torch.export.export(neck, (x,)).module()
        torch.testing.assert_close(list(exported(x).values()), list(neck(x).values()))


@pytest.mark.parametrize("name", DESIGNS)
def test_copies_and_pickles(name: str) -> None:
    neck = make(name, on_failure="ignore", max_steps=3, dropout=0.0 if name in ("a", "c_no_rbl") else 0.3)
    x = named(pyramid(8, dtype=torch.float32))
    sum(v.square().sum() for v in neck(x).values()).backward()
    neck.eval()
    other = make(name, on_failure="ignore", max_steps=3).eval()
    other.load_state_dict(neck.state_dict())
    for twin in (copy.deepcopy(neck), pickle.loads(pickle.dumps(neck)), other):
        assert list(twin.state_dict()) == list(neck.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(twin(x).values(), neck(x).values(), strict=True))


def _flat(levels):
    return torch.cat([x.flatten() for x in levels])


def _like(vector, levels):
    return [part.view_as(x) for part, x in zip(vector.split([x.numel() for x in levels]), levels, strict=True)]


def _widened(neck: ImplicitFPN) -> ImplicitFPN:
    """Give the convolutions that N(0, 0.01) is for the gain that they have with 256 channels."""
    for m in neck.transform.modules():
        if isinstance(m, nn.Conv2d) and m.bias is not None and m.out_channels != 18:
            m.weight = nn.Parameter(m.weight * (256 / m.in_channels) ** 0.5)
    return neck


@pytest.mark.parametrize("name", DESIGNS)
def test_gradient_is_the_dense_formula(name: str) -> None:
    """dL/dtheta = u^T dG/dtheta with u = (I - J^T)^-1 g, and dL/dB = u - g, without a solver."""
    tight = deqkit.ImplicitAdjoint("gmres", rtol=1e-13, max_steps=400)
    settings = {"solver": "anderson", "adjoint": tight, "rtol": 1e-13, "max_steps": 400, "norm": None}
    neck = make(name, channels=4, **settings).double()
    if name != "c_weight_norm":
        _widened(neck)
    x = [v.requires_grad_() for v in pyramid(4, SMALL, batch=2 if name == "c_ibn" else 1)]
    levels = list(neck(named(x)).values())
    g = [torch.randn_like(v) for v in levels]
    parameters = list(neck.transform.parameters())
    implicit = torch.autograd.grad(levels, x + parameters, g)

    basis, star = [v.detach().requires_grad_() for v in x], [v.detach() for v in levels]
    step = lambda p: _flat(neck.module(_like(p, star), basis))  # noqa: E731
    j = torch.autograd.functional.jacobian(step, _flat(star))
    u = torch.linalg.solve(torch.eye(len(j), dtype=j.dtype) - j.T, _flat(g))
    expected = torch.autograd.grad(neck.module(star, basis), basis + parameters, _like(u, star))
    for a, b in zip(implicit, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9 * max(1.0, b.abs().max().item()))
    if not getattr(neck.transform, "injects", False):  # G sees P + B alone
        torch.testing.assert_close(_flat(implicit[: len(x)]), u - _flat(g), rtol=1e-6, atol=1e-8)


def test_no_further_product_for_the_gradient_of_b() -> None:
    """The gradients of B and of G come out of one vector-Jacobian product, beyond those of the adjoint solve."""
    calls = []

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            calls.append(1)
            return grad

    neck = make("c")
    inner = neck.transform.forward
    neck.transform.forward = lambda levels: [Counting.apply(x) for x in inner(levels)]
    x = named([v.requires_grad_() for v in pyramid(8, dtype=torch.float32)])
    sum(v.square().sum() for v in neck(x).values()).backward()
    assert len(calls) == 5 * neck.adjoint.num_terms
    assert all(v.grad.any() for v in x.values())


RADII = {
    "a": (0.2, 0.8),
    "b": (0.2, 0.8),
    "c": (0.4, 0.8),
    "c_no_rbl": (0.4, 0.9),
    "c_gn_relu": (0.2, 0.9),
    "none_gn": (0.4, 0.98),
    "bifpn": (0.4, 0.95),
    "nas_fpn": (0.4, 0.95),
}


def _largest_ritz_value(step, star: list[torch.Tensor], size: int = 30) -> float:
    """Of the transposed Jacobian, by Arnoldi's method."""
    star = [v.detach().requires_grad_() for v in star]
    out = step(star)
    basis = [_flat(torch.randn_like(v) for v in star)]
    basis[0] /= basis[0].norm()
    h = torch.zeros(size + 1, size, dtype=basis[0].dtype)
    for k in range(size):
        w = _flat(torch.autograd.grad(out, star, _like(basis[k], star), retain_graph=True))
        for _ in range(2):
            against = torch.stack(basis) @ w
            h[: k + 1, k] += against
            w = w - against @ torch.stack(basis)
        h[k + 1, k] = w.norm()
        basis.append(w / h[k + 1, k])
    return torch.linalg.eigvals(h[:size]).abs().max().item()


@pytest.mark.parametrize("name", RADII)
def test_contraction_at_initialisation(name: str) -> None:
    """A narrow neck whose convolutions have the gain of 256 channels contracts at its fixed point."""
    neck = _widened(make(name, channels=32, solver="anderson", rtol=1e-6, max_steps=200, norm=None).double())
    x = pyramid(32, [(16, 20), (8, 10), (4, 5), (2, 3), (2, 2)], batch=1)
    star = list(neck(named(x)).values())
    radius = _largest_ritz_value(lambda p: neck.module(p, x), star)
    low, high = RADII[name]
    assert low < radius < high, radius


def test_without_connection_and_norm_nothing_contracts() -> None:
    neck = ImplicitFPN([8] * 3, 8, cross_scale="none", max_steps=15, preset="accurate")
    with pytest.warns(deqkit.ConvergenceWarning):
        neck(named(pyramid(8, ODD[:3], dtype=torch.float32)))
