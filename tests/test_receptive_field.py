"""Effective receptive fields: against cases that are known, dense inverses, and the same neck unrolled."""

import copy
import csv

import pytest
import torch
from checkpoints import write_checkpoint, write_image
from PIL import Image
from torch.nn import functional as F

import deqkit
from adapters.detection.__main__ import main
from adapters.detection.receptive_field import ENERGY, gradient_maps, measure, receptive_fields, square_side
from adapters.detection.training import load_checkpoint


def box_filters(num_layers):
    """Layers that sum 3x3 neighbourhoods, after one that sums the colours."""

    def pyramid(x):
        x = x.sum(1, keepdim=True)
        for _ in range(num_layers):
            x = F.conv2d(x, x.new_ones(1, 1, 3, 3), padding=1)
        return [x]

    return pyramid


def images(count=2, size=33, dtype=torch.float64, seed=0):
    return torch.rand(count, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_layers", [1, 4])
def test_a_stack_of_convolutions_has_binomial_gradients_inside_its_theoretical_field(num_layers):
    (energy,) = gradient_maps(box_filters(num_layers), [images()])
    line = torch.ones(1, dtype=torch.float64)
    for _ in range(num_layers):
        line = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64).outer(line)  # the product of two polynomials
        line = sum(F.pad(row, (i, 2 - i)) for i, row in enumerate(line))
    expected = line.outer(line).square()
    middle, reach = 16, num_layers
    inside = energy[middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]
    torch.testing.assert_close(inside, expected / expected.sum())
    assert energy.sum() == pytest.approx(1.0) and inside.sum() == pytest.approx(1.0)
    field = measure("P3", energy)
    above = int((line.outer(line) >= 0.0455 * line.max() ** 2).sum())
    assert field.area == pytest.approx(above / 33**2) and field.side == pytest.approx(above**0.5)
    assert field.side <= 2 * num_layers + 1
    if num_layers == 1:  # nine equal pixels: nine hold 95 %, eight do not
        assert field.energy_side == pytest.approx(3.0)


def test_the_implicit_gradient_is_that_of_the_dense_inverse_and_wider_than_one_evaluation():
    size, damping = 9, 0.09

    def step(x, b):
        return damping * F.conv2d(x, x.new_ones(1, 1, 3, 3), padding=1) + b

    def implicit(x):
        b = x.sum(1, keepdim=True)
        exact = deqkit.ImplicitAdjoint(rtol=1e-10, max_steps=200)
        return [deqkit.solve(step, torch.zeros_like(b), args=(b,), rtol=1e-10, max_steps=200, adjoint=exact).value]

    (energy,) = gradient_maps(implicit, [images(size=size)])
    basis = torch.eye(size * size, dtype=torch.float64).reshape(-1, 1, size, size)
    convolution = step(basis, torch.zeros_like(basis)).reshape(size * size, -1)
    inverse = torch.linalg.inv(torch.eye(size * size, dtype=torch.float64) - convolution)
    expected = inverse[size * size // 2].reshape(size, size).square()
    torch.testing.assert_close(energy, expected / expected.sum(), rtol=1e-6, atol=1e-12)
    assert measure("", energy).area > measure("", gradient_maps(box_filters(1), [images(size=size)])[0]).area
    assert energy[0, 0] > 0  # the corner lies far outside of what one evaluation sees


@pytest.fixture(scope="module")
def implicit(tmp_path_factory):
    return load_checkpoint(write_checkpoint(tmp_path_factory.mktemp("c") / "ifpn.ckpt")).model


def photos(count=2):
    return [torch.rand(3, 70, 90, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def test_through_the_neck_it_is_the_gradient_of_many_unrolled_steps(implicit, tmp_path):
    before = (implicit.backbone.fpn.rtol, implicit.backbone.fpn.adjoint, implicit.backbone.fpn.on_failure)
    found = receptive_fields(implicit, photos(), size=65, batch_size=2)
    after = (implicit.backbone.fpn.rtol, implicit.backbone.fpn.adjoint, implicit.backbone.fpn.on_failure)
    assert before == after and not any(p.grad is not None for p in implicit.parameters())
    twins = {}
    for steps in (1, 40):
        path = write_checkpoint(tmp_path / f"{steps}.ckpt", neck_settings={"unroll": steps})
        twins[steps] = load_checkpoint(path).model
        twins[steps].load_state_dict(implicit.state_dict())
    unrolled = receptive_fields(twins[40], photos(), size=65)
    once = receptive_fields(twins[1], photos(), size=65)
    assert [field.level for field in found] == ["P3", "P4", "P5", "P6", "P7"]
    for exact, many, one in zip(found, unrolled, once, strict=True):
        torch.testing.assert_close(exact.map, many.map, rtol=0.02, atol=2e-3)
        assert (exact.map - one.map).abs().max() > 0.02
        assert 0 < exact.area <= 1 and 0 < exact.energy_area <= 1


def test_signs_estimate_the_sum_over_channels():
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (energy,) = gradient_maps(lambda x: [F.conv2d(x, weight, padding=1)], [images(1, 5)], num_probes=2000)
    expected = weight.square().sum((0, 1))
    torch.testing.assert_close(energy[1:4, 1:4], expected / expected.sum(), rtol=0.1, atol=0.0)


def test_every_image_counts_alike_whatever_the_size_of_its_gradient():
    left, right = torch.zeros(2, 1, 3, 5, 5, dtype=torch.float64)
    left[..., 0], right[..., 4] = 1000.0, 1.0
    pyramid = lambda x: [x.square().sum((1, 2, 3), keepdim=True)]  # noqa: E731
    (energy,) = gradient_maps(pyramid, [left, right])
    assert energy[:, 0].sum() == pytest.approx(0.5) and energy[:, 4].sum() == pytest.approx(0.5)


def test_the_centre_cells_of_all_levels_lie_on_the_centre_pixel():
    assert [square_side(side) for side in (64, 257, 300, 640, 800)] == [257, 257, 257, 513, 769]

    def pyramid(x):
        levels = [x.sum(1, keepdim=True)]
        for _ in range(7):
            levels.append(F.conv2d(levels[-1], x.new_ones(1, 1, 3, 3), stride=2, padding=1))
        return levels[3:]

    for energy in gradient_maps(pyramid, [images(1, 257)]):
        torch.testing.assert_close(energy, energy.flip(0, 1))
        torch.testing.assert_close(energy, energy.T)


def test_measures_of_a_known_map():
    energy = torch.zeros(10, 10, dtype=torch.float64)
    energy[5, 5], energy[5, 6], energy[0, 0] = 1.0, 0.0455**2, 0.045**2
    field = measure("P4", energy)
    assert field.area == 0.02 and field.energy_area == 0.01 and field.map.max() == 1.0 and ENERGY == 0.95
    assert measure("P4", torch.ones(4, 5)).energy_area == 0.95
    nothing = measure("P4", torch.zeros(3, 3))
    assert (nothing.area, nothing.energy_area) == (0.0, 0.0) and torch.isfinite(nothing.map).all()


def test_what_cannot_be_measured_is_refused(implicit):
    with pytest.raises(ValueError, match="no images"):
        gradient_maps(box_filters(1), [])
    with pytest.raises(ValueError, match="different size"):
        gradient_maps(box_filters(1), [images(1, 5), images(1, 7)])
    with pytest.raises(ValueError, match="not finite"):
        gradient_maps(lambda x: [(x - x).sqrt()], [images(1, 5)])
    with pytest.raises(ValueError, match="size, batch_size and num_probes must be positive"):
        receptive_fields(implicit, photos(), size=0)


def test_a_failed_solve_is_reported(implicit):
    spoilt = copy.deepcopy(implicit)
    with torch.no_grad():
        for parameter in spoilt.backbone.fpn.transform.parameters():
            parameter.mul_(20.0)
    with pytest.warns(deqkit.ConvergenceWarning, match="solves of fixed points and of their adjoints") as caught:
        receptive_fields(spoilt, photos(2), size=65)
    assert len(caught) == 1


def test_the_command(tmp_path, capsys):
    checkpoints = [str(write_checkpoint(tmp_path / f"{neck}.ckpt", neck)) for neck in ("fpn", "ifpn")]
    for i in range(2):
        write_image(tmp_path / "in" / f"{i}.png", i)
    words = ["receptive-field", "--checkpoints", *checkpoints, "--images", str(tmp_path / "in"), "--size", "65"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "receptive_field.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["detector"], row["level"]) for row in rows] == [
        (name, f"P{k}") for name in ("FPN", "i-FPN") for k in range(3, 8)
    ]
    assert all(0 < float(row["area"]) <= 1 and row["input"] == "65" for row in rows)
    assert Image.open(tmp_path / "out" / "receptive_field.png").width > 1000
    assert "95 % of the squared gradients" in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    rcnn = str(write_checkpoint(tmp_path / "rcnn.ckpt", "fpn", "fasterrcnn"))
    words = ["receptive-field", "--checkpoints", rcnn, checkpoints[1], "--images", str(tmp_path / "in"), "--size=65"]
    assert main([*words, "--out", str(tmp_path / "mixed")]) == 2
    assert "have different levels" in capsys.readouterr().err
