"""AutoAssign: losses, gradients and detections against slow loops, and the cases that break others."""

import copy

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
    squares_of,
)

from adapters.detection import AutoAssign, autoassign

LEVELS = reference.points_of(SIZES, STRIDES)
POINTS = [point for level in LEVELS for point in level]
kinds = st.lists(st.sampled_from(KINDS), max_size=8)


def prior_of(detector):
    return detector.center_prior.mu.tolist(), detector.center_prior.sigma.tolist()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(kinds, min_size=1, max_size=3), st.integers(0, 10**6), st.sampled_from([0.5, 5.0]))
def test_losses_are_those_of_the_loops(kinds_of_images, seed, weight):
    detector = make_detector(AutoAssign, regression_weight=weight)
    outputs, targets = make_batch(kinds_of_images, seed)
    expected = reference.autoassign_losses(LEVELS, as_lists(outputs, targets), *prior_of(detector), weight)
    close_to(compute_losses(detector, outputs, targets), expected, 2e-6)  # torchvision's GIoU has an epsilon of 1e-7


def test_losses_in_single_precision():
    detector = make_detector(AutoAssign, torch.float32)
    outputs, targets = make_batch([["any"] * 8, ["any", "twin", "large"]], 2, torch.float32)
    expected = reference.autoassign_losses(LEVELS, as_lists(outputs, targets), *prior_of(detector))
    close_to(compute_losses(detector, outputs, targets), expected, 1e-4)


def test_gradients_are_right():
    """Against differences of the loops, with what has no gradient held fixed."""
    detector = make_detector(AutoAssign)
    prior = detector.center_prior
    outputs, targets = make_batch([["any", "any", "twin", "large"], ["any"]], 8)
    images = as_lists(outputs, targets)
    assigned = [reference.autoassign_assigned(POINTS, image) for image in images]
    total = reference.autoassign_total_prior(LEVELS, images, *prior_of(detector))
    for name in ("positive", "negative", "center_prior"):
        values = [*outputs.values(), prior.mu, prior.sigma]
        analytic = torch.autograd.grad(
            compute_losses(detector, outputs, targets)[name], values, allow_unused=True, materialize_grads=True
        )
        for index, value in enumerate(values):
            direction = torch.randn_like(value)
            if value is outputs["bbox_regression"]:
                direction *= value != 0  # a distance does not become negative

            ends = []
            for step in (1e-6, -1e-6):
                moved = [v.detach() + step * direction if i == index else v.detach() for i, v in enumerate(values)]
                lists = as_lists(dict(zip(outputs, moved[:3], strict=True)), targets)
                mu, sigma = moved[3].tolist(), moved[4].tolist()
                frozen = {"assigned": assigned, "total_prior": total}
                ends.append(reference.autoassign_losses(LEVELS, lists, mu, sigma, **frozen)[name])
            expected = (ends[0] - ends[1]) / 2e-6
            slope = (analytic[index] * direction).sum().item()
            assert slope == pytest.approx(expected, rel=1e-4, abs=1e-8), (name, index)


def test_detections_are_those_of_the_loops():
    detector = make_detector(AutoAssign, topk_candidates=30, detections_per_img=40)
    outputs, targets = make_batch([[], []], 4, spread=1.5)
    shapes = [(HEIGHT, WIDTH), (70, 101)]
    levels = {name: list(value.detach().split(LEVEL_SIZES, dim=1)) for name, value in outputs.items()}
    squares = list(squares_of().split(LEVEL_SIZES))
    found = detector.postprocess_detections(levels, [squares, squares], shapes)
    for detection, image, shape in zip(found, as_lists(outputs, targets), shapes, strict=True):
        expected = reference.detections(LEVELS, image, shape, topk=30, limit=40, joint=True)
        assert len(expected) == 40
        torch.testing.assert_close(detection["scores"].tolist(), [score for score, _, _ in expected])
        assert detection["labels"].tolist() == [label for _, label, _ in expected]
        torch.testing.assert_close(detection["boxes"], torch.tensor([b for *_, b in expected], dtype=torch.float64))


def test_a_batch_without_objects_touches_everything():
    detector = make_detector(AutoAssign)
    outputs, targets = make_batch([[], []], 1)
    losses = compute_losses(detector, outputs, targets)
    assert losses["positive"].item() == losses["center_prior"].item() == 0 < losses["negative"].item()
    sum(losses.values()).backward()
    assert outputs["cls_logits"].grad.any() and outputs["bbox_ctrness"].grad.any()
    for tensor in (outputs["bbox_regression"], detector.center_prior.mu, detector.center_prior.sigma):
        assert tensor.grad is not None and not tensor.grad.any()


def test_objects_without_a_point_inside_cost_nothing():
    """The published code adds constants of 100 and 1e12 to the losses, without a gradient."""
    detector = make_detector(AutoAssign)
    outputs, _ = make_batch([[]], 1)
    between = {"boxes": torch.tensor([[9.0, 9.0, 15.0, 15.0]], dtype=torch.float64), "labels": torch.tensor([2])}
    losses = compute_losses(detector, outputs, [between])
    assert losses["positive"].item() == losses["center_prior"].item() == 0
    sum(losses.values()).backward()
    assert all(tensor.grad.isfinite().all() for tensor in [*outputs.values(), *detector.center_prior.parameters()])
    # They count among the objects, as they do there.
    outputs, targets = make_batch([["any"]], 2)
    alone = compute_losses(detector, outputs, targets)
    both = {key: torch.cat((targets[0][key], between[key])) for key in between}
    together = compute_losses(detector, outputs, [both])
    torch.testing.assert_close(together["positive"], alone["positive"] / 2)
    torch.testing.assert_close(together["center_prior"], 2 * alone["center_prior"])


def test_points_that_objects_of_a_class_share_have_the_larger_probability():
    detector = make_detector(AutoAssign)
    outputs, targets = make_batch([["large", "any", "any"]], 3)
    targets[0]["labels"][:] = 2
    swapped = [{key: value.flip(0) for key, value in targets[0].items()}]
    squares = squares_of()
    predicted = detector.box_coder.decode(outputs["bbox_regression"].flatten(0, 1), squares)
    found = [
        autoassign.assigned_probability(autoassign.Pairs.find(t, [squares]), predicted, outputs["cls_logits"])
        for t in (targets, swapped)
    ]
    assert torch.equal(*found) and 0 <= found[0].min() and found[0].max() == 1
    shared = len(autoassign.Pairs.find(targets, [squares]).points) - (found[0][..., 2] > 0).sum()
    assert shared > 10
    expected = reference.autoassign_assigned(POINTS, as_lists(outputs, targets)[0])
    torch.testing.assert_close(found[0][0], torch.tensor(expected, dtype=torch.float64))


def test_chunks_of_pairs_change_nothing(monkeypatch):
    outputs, targets = make_batch([["large", "any", "any"], ["any"], []], 3)
    results = []
    for pairs_at_once in (2**18, 50):
        monkeypatch.setattr(autoassign, "_PAIRS_AT_ONCE", pairs_at_once)
        detector = make_detector(AutoAssign)
        losses = compute_losses(detector, outputs, targets)
        values = [*outputs.values(), *detector.center_prior.parameters()]
        results.append([*losses.values(), *torch.autograd.grad(sum(losses.values()), values)])
    assert len(autoassign.Pairs.find(targets, [squares_of()] * 3).points) > 100
    torch.testing.assert_close(*results)


def kept_for_backward(detector, outputs, targets, sizes):
    """Bytes that autograd holds between forward and backward."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = compute_losses(detector, outputs, targets, sizes)
    return sum(kept.values()), losses


def test_memory_per_pair_is_bounded():
    """100 objects that cover all points: what is kept per pair of object and point is what the sums over it need."""
    strides, sizes = (4,), [(60, 60)]
    detector = make_detector(AutoAssign, torch.float32, strides)
    counts = []
    for objects in (100, 200):
        outputs, _ = make_batch([[]], 1, torch.float32, num_points=3600)
        boxes = torch.tensor([[-9.0, -9, 300, 300]]).repeat(objects, 1)
        target = {"boxes": boxes, "labels": torch.ones(objects, dtype=torch.long)}
        counts.append(kept_for_backward(detector, outputs, [target], sizes)[0])
    assert (counts[1] - counts[0]) / (100 * 3600) < 80  # bytes; all that is computed per pair is more than 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_predictions_stay_finite(dtype):
    """Probabilities that round to 0 and 1 and boxes that fit exactly, as late in a training on few images."""
    detector = make_detector(AutoAssign, torch.float32)
    point = 12 * 16 + 20  # on the second level, at (64, 32)
    target = {"boxes": torch.tensor([[48.0, 16, 80, 48]]), "labels": torch.tensor([1])}
    outputs, _ = make_batch([[]], 1, torch.float32)
    with torch.no_grad():
        outputs["cls_logits"].fill_(-200)
        outputs["cls_logits"][0, :, 1] = 200
        outputs["bbox_ctrness"].fill_(200)
        outputs["bbox_regression"][0, point] = 1
    assert squares_of()[point].tolist() == [56, 24, 72, 40]
    given = {name: value.detach().to(dtype).requires_grad_() for name, value in outputs.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = compute_losses(detector, given, [target])
    sum(losses.values()).backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert all(value.grad.isfinite().all() for value in given.values())
    # All points but those of the object are certain of a wrong class: -log of the smallest number each.
    assert losses["negative"] > 100


def test_a_mean_of_certain_confidences_is_not_above_one():
    confidence = torch.full((1000,), 1.0).nextafter(torch.tensor(2.0)).requires_grad_()
    one = torch.ones(1, dtype=torch.long)
    pairs = autoassign.Pairs(torch.zeros(1000, dtype=torch.long), torch.arange(1000), torch.zeros(1, 4), one, one)
    loss = autoassign._positive(pairs, confidence, torch.rand(1000))
    assert loss == 0
    loss.backward()
    assert confidence.grad.isfinite().all()


def test_predictions_that_are_not_finite_give_losses_that_are_not():
    """And no error: training skips the step."""
    detector = make_detector(AutoAssign)
    outputs, targets = make_batch([["any"]], 1)
    poisoned = {name: value * float("nan") for name, value in outputs.items()}
    losses = compute_losses(detector, poisoned, targets)
    assert losses["positive"].isnan() and losses["negative"].isnan()


def test_the_center_prior_is_learnt_and_exempt_from_decay():
    detector = make_detector(AutoAssign)
    prior = detector.center_prior
    assert prior.no_weight_decay() == {name for name, _ in prior.named_parameters()} == {"mu", "sigma"}
    assert prior.mu.shape == prior.sigma.shape == (NUM_CLASSES, 2)
    fresh = autoassign.CenterPrior(3)
    assert not fresh.mu.any() and (fresh.sigma == 1).all()
    torch.testing.assert_close(
        fresh(torch.tensor([[0.0, 0], [1, 0], [3, 4]]), torch.tensor([0, 1, 2])),
        torch.tensor([1.0, -0.5, -12.5]).where(torch.tensor([False, True, True]), torch.tensor(0.0)).exp(),
    )
    twin = copy.deepcopy(prior)
    with torch.no_grad():
        twin.sigma.zero_()
    assert twin(torch.zeros(1, 2) + prior.mu[1], torch.tensor([1])).isfinite().all()
