"""ATSS and the paper's FCOS: assignment, losses and detections against slow loops, and the cases that break others."""

import pytest
import reference_detectors as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from point_batches import (
    HEIGHT,
    KINDS,
    LEVEL_SIZES,
    NUM_CLASSES,
    SIZES,
    STRIDES,
    WIDTH,
    as_lists,
    close_to,
    compute_losses,
    make_batch,
    make_detector,
    random_boxes,
    squares_of,
)

from adapters.detection import ATSS, PaperFCOS
from adapters.detection.atss import assign

LEVELS = reference.points_of(SIZES, STRIDES)
kinds = st.lists(st.sampled_from(KINDS), max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(kinds, st.integers(0, 10**6), st.sampled_from([1, 4, 9, 20]), st.sampled_from([2.0, 8.0]))
def test_assignment_is_that_of_the_loops(kinds, seed, topk, scale):
    boxes = random_boxes(kinds, seed)
    matched = assign(squares_of(), torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4), LEVEL_SIZES, topk, scale)
    assert matched.tolist() == reference.atss_assignment(LEVELS, boxes, topk, scale)


def test_assignment_in_single_precision_and_of_many_objects(monkeypatch):
    boxes = random_boxes(["any"] * 300, 1)
    matched = assign(squares_of(), torch.tensor(boxes), LEVEL_SIZES)
    assert matched.tolist() == reference.atss_assignment(LEVELS, boxes)
    assert len(matched.unique()) > 50
    monkeypatch.setattr("adapters.detection.atss._OBJECTS_AT_ONCE", 7)
    assert torch.equal(assign(squares_of(), torch.tensor(boxes), LEVEL_SIZES), matched)


def test_levels_with_fewer_points_than_candidates():
    """P7 of a small image has one point; the published code asks for nine of them."""
    sizes, strides = [(1, 1)], (64,)
    box = [[-30.0, -30.0, 33.0, 31.0]]
    matched = assign(squares_of(sizes, strides), torch.tensor(box), [1])
    # One candidate: its deviation is 0, not NaN, and its IoU reaches the mean.
    assert matched.tolist() == [0] == reference.atss_assignment(reference.points_of(sizes, strides), box)


def test_equal_ious_reach_their_mean():
    """A box inside all of its candidates' anchors has the same IoU with them: rounding must not refuse them."""
    squares = squares_of([(5, 5)], (8,))
    for half in torch.linspace(8.1, 15.9, 40).tolist():
        boxes = torch.tensor([[16 - half, 16 - half, 16 + half, 16 + half]])
        assert (assign(squares, boxes, [25]) == 0).sum() == 9


def test_a_point_that_several_objects_claim_goes_to_the_highest_iou():
    inner, outer = [20.0, 20.0, 76.3, 75.1], [18.0, 18.0, 79.3, 78.1]
    squares = squares_of()
    alone = [assign(squares, torch.tensor([box]), LEVEL_SIZES) == 0 for box in (inner, outer)]
    claimed_twice = alone[0] & alone[1]
    assert claimed_twice.any()
    both = assign(squares, torch.tensor([inner, outer]), LEVEL_SIZES)
    swapped = assign(squares, torch.tensor([outer, inner]), LEVEL_SIZES)
    assert torch.equal(both[claimed_twice], 1 - swapped[claimed_twice])  # whatever the order
    assert both.tolist() == reference.atss_assignment(LEVELS, [inner, outer])
    twins = assign(squares, torch.tensor([inner, inner]), LEVEL_SIZES)
    assert torch.equal(twins == 0, alone[0]) and not (twins == 1).any()


def assignments(model, images):
    if isinstance(model, ATSS):
        return [reference.atss_assignment(LEVELS, image["boxes"], model.topk, model.anchor_scale) for image in images]
    return [reference.fcos_assignment(LEVELS, image["boxes"], model.center_sampling_radius) for image in images]


@pytest.mark.parametrize("model", [ATSS, PaperFCOS])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(kinds, min_size=1, max_size=3), st.integers(0, 10**6))
def test_losses_are_those_of_the_loops(model, kinds_of_images, seed):
    detector = make_detector(model)
    outputs, targets = make_batch(kinds_of_images, seed)
    images = as_lists(outputs, targets)
    weight = 2.0 if model is ATSS else 1.0
    expected = reference.centerness_losses(LEVELS, images, assignments(detector, images), weight)
    close_to(compute_losses(detector, outputs, targets), expected, 1e-6)  # torchvision's GIoU has an epsilon of 1e-7


def test_the_switches_of_the_paper():
    outputs, targets = make_batch([["any"] * 6, ["large", "tiny"]], 5)
    images = as_lists(outputs, targets)
    plain = make_detector(PaperFCOS, weight_by_centerness=False, level_scales=False, center_sampling_radius=2.5)
    expected = reference.centerness_losses(LEVELS, images, assignments(plain, images), 1.0, weighted=False)
    close_to(compute_losses(plain, outputs, targets), expected, 1e-6)
    assert plain.head.regression_head.scales is None
    assert make_detector(PaperFCOS).head.regression_head.scales.shape == (len(STRIDES),)
    weighted = make_detector(ATSS, regression_weight=3.0)
    expected = reference.centerness_losses(LEVELS, images, assignments(weighted, images), 3.0)
    close_to(compute_losses(weighted, outputs, targets), expected, 1e-6)


def test_losses_in_single_precision():
    detector = make_detector(ATSS, torch.float32)
    outputs, targets = make_batch([["any"] * 8, ["any", "twin", "large"]], 2, torch.float32)
    images = as_lists(outputs, targets)
    expected = reference.centerness_losses(LEVELS, images, assignments(detector, images), 2.0)
    close_to(compute_losses(detector, outputs, targets), expected, 1e-4)


def test_gradients_are_right():
    detector = make_detector(ATSS)
    outputs, targets = make_batch([["any", "large"], []], 8)
    values = list(outputs.values())
    directions = [torch.randn_like(value) for value in values]

    def loss(step):
        moved = {n: v + step * d for (n, v), d in zip(outputs.items(), directions, strict=True)}
        moved["bbox_regression"] = moved["bbox_regression"].abs()
        return sum(compute_losses(detector, moved, targets).values())

    analytic = torch.autograd.grad(loss(0.0), values)
    expected = (loss(1e-6) - loss(-1e-6)) / 2e-6
    slope = sum((g * d).sum() for g, d in zip(analytic, directions, strict=True))
    torch.testing.assert_close(slope, expected.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("model", [ATSS, PaperFCOS])
def test_detections_are_those_of_the_loops(model):
    detector = make_detector(model, topk_candidates=30, detections_per_img=40)
    outputs, targets = make_batch([[], []], 4, spread=1.5)
    shapes = [(HEIGHT, WIDTH), (70, 101)]
    levels = {name: list(value.detach().split(LEVEL_SIZES, dim=1)) for name, value in outputs.items()}
    squares = list(squares_of().split(LEVEL_SIZES))
    found = detector.postprocess_detections(levels, [squares, squares], shapes)
    for detection, image, shape in zip(found, as_lists(outputs, targets), shapes, strict=True):
        expected = reference.detections(LEVELS, image, shape, topk=30, limit=40)
        assert len(expected) == 40
        torch.testing.assert_close(detection["scores"].tolist(), [score for score, _, _ in expected])
        assert detection["labels"].tolist() == [label for _, label, _ in expected]
        torch.testing.assert_close(detection["boxes"], torch.tensor([b for *_, b in expected], dtype=torch.float64))


def test_a_class_must_exceed_the_threshold_before_centerness():
    detector = make_detector(ATSS)
    outputs, _ = make_batch([[]], 0)
    levels = {name: torch.ones_like(value) for name, value in outputs.items()}
    levels["cls_logits"][:] = -20
    levels["cls_logits"][0, 40, 2], levels["cls_logits"][0, 45, 3] = -2.5, -3.5  # probabilities of 0.076 and 0.029
    levels["bbox_ctrness"][0, 40] = -4.0  # 0.018: sqrt(0.076 * 0.018) = 0.037 is below the threshold, and still there
    split = {name: list(value.split(LEVEL_SIZES, dim=1)) for name, value in levels.items()}
    (found,) = detector.postprocess_detections(split, [list(squares_of().split(LEVEL_SIZES))], [(HEIGHT, WIDTH)])
    assert found["labels"].tolist() == [2]
    assert found["scores"].item() == pytest.approx((0.07586 * 0.01799) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("model", [ATSS, PaperFCOS])
def test_a_batch_without_positives_touches_every_output(model):
    detector = make_detector(model)
    for kinds_of_images in ([[], []], [["outside"]]):
        outputs, targets = make_batch(kinds_of_images, 1)
        if kinds_of_images != [[], []]:
            targets[0]["boxes"] = torch.tensor([[1000.0, 1000, 1010, 1010]], dtype=torch.float64)
        losses = compute_losses(detector, outputs, targets)
        assert losses["bbox_regression"].item() == losses["bbox_ctrness"].item() == 0
        sum(losses.values()).backward()
        assert outputs["cls_logits"].grad.any()
        for name in ("bbox_regression", "bbox_ctrness"):
            assert outputs[name].grad is not None and not outputs[name].grad.any(), name


def test_unusable_settings_are_named():
    with pytest.raises(ValueError, match="topk and anchor_scale must be positive, got 0"):
        make_detector(ATSS, topk=0)
    with pytest.raises(TypeError, match="center_sampling_radius"):
        make_detector(ATSS, center_sampling_radius=1.5)
    assert NUM_CLASSES == make_detector(ATSS).num_classes
