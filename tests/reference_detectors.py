"""ATSS and AutoAssign once more, slowly: Python floats, one loop per image, object, point and class.

Written from the papers (arXiv 1912.02424, 2007.03496) without a look at the tensors of adapters/detection. An image is
a dict of `logits` [point][class], `distances` [point][side] in strides, `quality` [point], `boxes` [object][side] and
`labels` [object]; points are tuples (x, y, stride), grouped by level.
"""

from __future__ import annotations

import math
from statistics import mean, stdev


def points_of(sizes, strides):
    """Per level the points of a grid of (height, width) cells."""
    return [
        [(float(column * stride), float(row * stride), stride) for row in range(height) for column in range(width)]
        for (height, width), stride in zip(sizes, strides, strict=True)
    ]


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def area(box):
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def overlap(a, b):
    return area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))


def iou(a, b):
    union = area(a) + area(b) - overlap(a, b)
    return overlap(a, b) / union if union else 0.0


def giou(a, b):
    union = area(a) + area(b) - overlap(a, b)
    hull = area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    return overlap(a, b) / union - (hull - union) / hull


def contains(box, point):
    return box[0] < point[0] < box[2] and box[1] < point[1] < box[3]


def middle(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def predicted_box(point, distances):
    x, y, stride = point
    left, top, right, bottom = (stride * d for d in distances)
    return x - left, y - top, x + right, y + bottom


def centerness(point, box):
    left, top, right, bottom = point[0] - box[0], point[1] - box[1], box[2] - point[0], box[3] - point[1]
    return math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))


def atss_assignment(levels, boxes, topk=9, scale=8):
    """Per point the index of its object, or -1."""
    claims = {}
    for n, box in enumerate(boxes):
        cx, cy = middle(box)
        candidates, first = [], 0
        for level in levels:
            near = sorted(range(len(level)), key=lambda i: math.hypot(level[i][0] - cx, level[i][1] - cy))
            candidates += [(first + i, level[i]) for i in near[:topk]]
            first += len(level)
        ious = []
        for _, (x, y, stride) in candidates:
            half = scale * stride / 2
            ious.append(iou(box, (x - half, y - half, x + half, y + half)))
        threshold = mean(ious) + (stdev(ious) if len(ious) > 1 else 0.0)
        for (i, point), value in zip(candidates, ious, strict=True):
            if value >= threshold and contains(box, point):
                claims.setdefault(i, []).append((value, n))
    winner = {i: max(found, key=lambda claim: (claim[0], -claim[1]))[1] for i, found in claims.items()}
    return [winner.get(i, -1) for i in range(sum(len(level) for level in levels))]


def cross_entropy(logit, target):
    p = sigmoid(logit)
    return -(target * math.log(p) + (1 - target) * math.log(1 - p))


def focal(logit, target):
    p = sigmoid(logit)
    if target:
        return -0.25 * (1 - p) ** 2 * math.log(p)
    return -0.75 * p**2 * math.log(1 - p)


def centerness_losses(levels, images, assignments, regression_weight, weighted=True):
    """The losses of FCOS and ATSS."""
    points = [point for level in levels for point in level]
    classification = box_loss = entropy = total_weight = num_positive = 0.0
    for image, assignment in zip(images, assignments, strict=True):
        for i, point in enumerate(points):
            n = assignment[i]
            for c, logit in enumerate(image["logits"][i]):
                classification += focal(logit, n >= 0 and image["labels"][n] == c)
            if n < 0:
                continue
            box = image["boxes"][n]
            quality = centerness(point, box)
            weight = quality if weighted else 1.0
            box_loss += weight * (1 - giou(predicted_box(point, image["distances"][i]), box))
            entropy += cross_entropy(image["quality"][i], quality)
            total_weight += weight
            num_positive += 1
    return {
        "classification": classification / max(1, num_positive),
        "bbox_regression": regression_weight * box_loss / max(1, total_weight),
        "bbox_ctrness": entropy / max(1, num_positive),
    }


def center_prior(point, box, mu, sigma):
    cx, cy = middle(box)
    u, v = (point[0] - cx) / point[2], (point[1] - cy) / point[2]
    return math.exp(-((u - mu[0]) ** 2) / (2 * sigma[0] ** 2)) * math.exp(-((v - mu[1]) ** 2) / (2 * sigma[1] ** 2))


def autoassign_assigned(points, image):
    """A [point][class]: how far a point is assigned to a class."""
    num_classes = len(image["logits"][0])
    assigned = [[0.0] * num_classes for _ in points]
    best = [
        max((iou(predicted_box(point, image["distances"][i]), box) for box in image["boxes"]), default=0.0)
        for i, point in enumerate(points)
    ]
    for box, label in zip(image["boxes"], image["labels"], strict=True):
        inside = [i for i, point in enumerate(points) if contains(box, point)]
        fits = {i: 1 / max(1 - best[i], 1e-12) for i in inside}
        for i in inside:
            low, high = min(fits.values()), max(fits.values())
            share = (fits[i] - low + 1e-12) / (high - low + 1e-12)
            assigned[i][label] = max(assigned[i][label], share)
    return assigned


def autoassign_total_prior(levels, images, mu, sigma):
    points = [point for level in levels for point in level]
    return sum(
        center_prior(point, box, mu[label], sigma[label])
        for image in images
        for box, label in zip(image["boxes"], image["labels"], strict=True)
        for point in points
        if contains(box, point)
    )


def autoassign_losses(levels, images, mu, sigma, regression_weight=5.0, assigned=None, total_prior=None):
    """The losses of AutoAssign. What has no gradient can be given: `assigned` per image, and `total_prior`."""
    points = [point for level in levels for point in level]
    positive = negative = prior_loss = 0.0
    num_objects = sum(len(image["boxes"]) for image in images)
    if total_prior is None:
        total_prior = autoassign_total_prior(levels, images, mu, sigma)
    for number, image in enumerate(images):
        joint = [
            [sigmoid(logit) * sigmoid(image["quality"][i]) for logit in image["logits"][i]] for i in range(len(points))
        ]
        prior_of_image = 0.0
        for box, label in zip(image["boxes"], image["labels"], strict=True):
            weights, confidences = [], []
            for i, point in enumerate(points):
                if not contains(box, point):
                    continue
                loss = 1 - giou(predicted_box(point, image["distances"][i]), box)
                confidence = joint[i][label] * math.exp(-regression_weight * loss)
                prior = center_prior(point, box, mu[label], sigma[label])
                prior_of_image += prior
                weights.append(math.exp(3 * confidence) * prior)
                confidences.append(confidence)
            if weights:
                weighted = sum(w * p for w, p in zip(weights, confidences, strict=True)) / sum(weights)
                positive -= math.log(weighted)
        share = autoassign_assigned(points, image) if assigned is None else assigned[number]
        for i in range(len(points)):
            for c, probability in enumerate(joint[i]):
                confusion = probability * (1 - share[i][c])
                negative -= confusion**2 * math.log(1 - confusion)
        if prior_of_image:
            prior_loss += len(image["boxes"]) / prior_of_image
    return {
        "positive": 0.25 * positive / max(1, num_objects),
        "negative": 0.75 * negative / max(1, total_prior),
        "center_prior": 0.75 * prior_loss / len(images),
    }


def fcos_assignment(levels, boxes, radius=1.5):
    """Per point the index of its object, or -1: within the radius, in the level's range of sizes, the smallest."""
    assignment = []
    for number, level in enumerate(levels):
        for x, y, stride in level:
            low = 0.0 if number == 0 else 4.0 * stride
            high = math.inf if number == len(levels) - 1 else 8.0 * stride
            found = []
            for n, box in enumerate(boxes):
                cx, cy = middle(box)
                reach = max(x - box[0], y - box[1], box[2] - x, box[3] - y)
                near = max(abs(x - cx), abs(y - cy)) < radius * stride
                if near and contains(box, (x, y)) and low < reach < high:
                    found.append((area(box), n))
            assignment.append(min(found)[1] if found else -1)
    return assignment


def detections(levels, image, shape, threshold=0.05, topk=1000, nms=0.6, limit=100, joint=False):
    """Boxes, scores and labels of an image, best first; `joint`: AutoAssign's score, else that of FCOS and ATSS."""
    height, width = shape
    candidates, first = [], 0
    for level in levels:
        of_level = []
        for i, point in enumerate(level, start=first):
            quality = sigmoid(image["quality"][i])
            for label, logit in enumerate(image["logits"][i]):
                rank = sigmoid(logit) * (quality if joint else 1.0)
                if rank > threshold:
                    x1, y1, x2, y2 = (max(side, 0.0) for side in predicted_box(point, image["distances"][i]))
                    box = min(x1, width), min(y1, height), min(x2, width), min(y2, height)
                    of_level.append((rank, rank if joint else math.sqrt(rank * quality), label, box))
        candidates += sorted(of_level, key=lambda entry: -entry[0])[:topk]
        first += len(level)
    kept = []
    for _, score, label, box in sorted(candidates, key=lambda entry: -entry[1]):
        if all(label != other or iou(box, rival) <= nms for _, other, rival in kept):
            kept.append((score, label, box))
    return kept[:limit]
