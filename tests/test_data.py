"""Detection data: the drawn set, the COCO reader, and what is said about bad input."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou
from torchvision.transforms import v2

from adapters.detection.data import (
    CocoDataModule,
    CocoDetection,
    DataError,
    SyntheticSettings,
    find_splits,
    generate_dataset,
    read_annotations,
    verify_images,
)
from adapters.detection.data.synthetic import CLASS_NAMES, _background, draw_scene
from adapters.detection.evaluation import coco_results, evaluate_coco, format_metric


def box(image_id, category_id, bbox, **more):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 7, "name": "train"}, {"id": 18, "name": "dog"}]
ANNOTATIONS = [
    box(10, 7, [5, 5, 20, 10], id=0, area=150.0, iscrowd=0),
    box(10, 90, [-4, 30, 14, 15]),  # leaves the image on the left
    box(10, 18, [0, 0, 40, 40], iscrowd=1),
    box(10, 18, [1, 1, 0, 5]),  # no width
    box(10, 18, [1, 1, 5, -2]),
    box(10, 18, [1, 1, math.nan, 5]),
    box(10, 18, [100, 1, 5, 5]),  # outside
    box(20, 18, [10, 10, 8, 8]),
    box(99, 18, [1, 1, 5, 5]),  # of no listed image
]


@pytest.fixture
def root(tmp_path):
    """A hand-made set: sparse category ids, a crowd box, bad boxes, an image without objects."""
    folder = tmp_path / "set"
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 50} for i in (10, 20, 30)]
    content = {"images": images, "annotations": ANNOTATIONS, "categories": CATEGORIES}
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        rng = np.random.default_rng(0)
        for image in images:
            pixels = rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / image["file_name"])
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def dataset_of(root, **kwargs):
    return CocoDetection(
        read_annotations(root / "annotations" / "instances_train2017.json"), root / "train2017", **kwargs
    )


DRAWN = SyntheticSettings(train_images=70, val_images=3, image_size=192, seed=5)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return generate_dataset(tmp_path_factory.mktemp("drawn") / "set", DRAWN, progress=False)


class TestSynthetic:
    def test_same_settings_same_bytes(self, tmp_path):
        settings = SyntheticSettings(train_images=3, val_images=2, image_size=64, seed=1)
        first, second = (generate_dataset(tmp_path / name, settings, progress=False) for name in "ab")
        names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
        assert len(names) == 3 + 2 + 2 + 1
        assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)

    def test_seed_and_split_change_the_images(self, tmp_path):
        roots = [
            generate_dataset(tmp_path / str(seed), SyntheticSettings(1, 1, 64, seed=seed), progress=False)
            for seed in (1, 2)
        ]
        files = [root / split / "000000000001.jpg" for root in roots for split in ("train2017", "val2017")]
        assert len({file.read_bytes() for file in files}) == 4

    def test_loads_in_pycocotools(self, drawn, capsys):
        coco = COCO(str(drawn / "annotations" / "instances_train2017.json"))
        assert len(coco.getImgIds()) == 70
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASS_NAMES)
        entries = coco.loadAnns(coco.getAnnIds())
        assert all(entry["id"] > 0 for entry in entries)
        for x, y, w, h in (entry["bbox"] for entry in entries):
            assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= 192 and y + h <= 192
        assert all(0 < entry["area"] <= entry["bbox"][2] * entry["bbox"][3] for entry in entries)

    def test_sizes_classes_and_empty_images(self, drawn):
        content = json.loads((drawn / "annotations" / "instances_train2017.json").read_text())
        areas = np.array([entry["area"] for entry in content["annotations"]])
        sizes = [(areas < 32**2).sum(), ((areas >= 32**2) & (areas < 96**2)).sum(), (areas >= 96**2).sum()]
        assert min(sizes) >= 8
        per_class = Counter(entry["category_id"] for entry in content["annotations"])
        assert set(per_class) == set(range(1, 5))
        assert max(per_class.values()) <= 2.5 * min(per_class.values())
        assert len({entry["image_id"] for entry in content["annotations"]}) < 70

    def test_boxes_are_tight(self):
        """Against the difference from the background, which draws from the same seed."""
        overlaps = []
        for seed in range(20):
            pixels, objects = draw_scene(np.random.default_rng(seed), 160, 1)
            background = _background(np.random.default_rng(seed), 160).clip(0, 1)
            changed = np.abs(pixels / 255.0 - background).max(axis=2) > 0.1  # the noise stays below
            ys, xs = np.nonzero(changed)
            seen = torch.tensor([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]], dtype=torch.float)
            x, y, w, h = objects[0][1]
            given = torch.tensor([[x, y, x + w, y + h]])
            # A shaded edge may be half a pixel wider than the mask.
            assert (seen[0, :2] >= given[0, :2] - 1).all() and (seen[0, 2:] <= given[0, 2:] + 1).all()
            overlaps.append(box_iou(seen, given).item())
        assert np.median(overlaps) > 0.93

    def test_kept_or_refused(self, drawn):
        before = (drawn / "annotations" / "instances_val2017.json").stat().st_mtime_ns
        assert generate_dataset(drawn, DRAWN, progress=False) == drawn
        assert (drawn / "annotations" / "instances_val2017.json").stat().st_mtime_ns == before
        with pytest.raises(FileExistsError, match="does not hold the synthetic set"):
            generate_dataset(drawn, SyntheticSettings(seed=6), progress=False)

    def test_only_an_unfinished_set_is_drawn_over(self, tmp_path):
        partial, settings = tmp_path / "set.partial", SyntheticSettings(1, 1, 64)
        partial.mkdir()
        (partial / "thesis.txt").write_text("years of work")
        with pytest.raises(FileExistsError, match="set.partial is in the way"):
            generate_dataset(tmp_path / "set", settings, progress=False)
        (partial / "thesis.txt").rename(partial / "annotations")
        generate_dataset(tmp_path / "set", settings, progress=False)
        assert not partial.exists()

    @pytest.mark.parametrize("setting", [{"train_images": 0}, {"image_size": 20}, {"seed": -1}])
    def test_settings_are_checked(self, setting):
        with pytest.raises(ValueError, match=next(iter(setting))):
            SyntheticSettings(**setting)


class TestReader:
    def test_labels_and_back(self, root):
        dataset = dataset_of(root)
        assert dataset.class_names == ("background", "train", "dog", "toothbrush")
        assert dataset.num_classes == 4
        for category, label in dataset.label_of_category.items():
            assert 1 <= label < dataset.num_classes
            assert dataset.category_of_label[label] == category

    def test_targets(self, root):
        dataset = dataset_of(root)
        image, target = dataset[0]
        assert image.shape == (3, 50, 60) and image.dtype == torch.float32 and 0 <= image.min() <= image.max() <= 1
        assert type(target["boxes"]) is torch.Tensor and target["image_id"] == 10
        assert target["boxes"].tolist() == [[5, 5, 25, 15], [0, 30, 10, 45]]
        assert target["labels"].tolist() == [1, 3]

    def test_image_without_objects_is_a_negative(self, root):
        _, target = dataset_of(root)[2]
        assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
        assert target["labels"].dtype == torch.int64

    def test_report(self, root):
        report = dataset_of(root).box_report
        assert (report.used, report.clipped, report.degenerate, report.crowd) == (3, 1, 4, 1)
        assert (report.orphans, report.empty_images) == (1, 1)
        assert "4 degenerate and skipped" in str(report)

    def test_ground_truth_keeps_what_the_file_says(self, root):
        entries = dataset_of(root).ground_truth()["annotations"]
        # Never 0: pycocotools takes it for "none". The box with a NaN is left out, those without area are not.
        assert [entry["id"] for entry in entries] == [1, 2, 3, 4, 5, 6, 7]
        assert sum(entry["iscrowd"] for entry in entries) == 1
        assert [-4, 30, 14, 15] in [entry["bbox"] for entry in entries]
        assert entries[0]["area"] == 150 and entries[1]["area"] == 14 * 15

    @pytest.mark.parametrize(("mode", "mean"), [("I;16", 0.5), ("L", 0.5), ("RGBA", 0.5), ("1", 1.0)])
    def test_modes_of_pixels(self, root, mode, mean):
        values = np.linspace(0, 1, 50 * 60).reshape(50, 60)
        if mode == "I;16":
            image = Image.fromarray((values * 65535).astype(np.uint16))
        else:
            image = Image.fromarray((values * 255).astype(np.uint8)).convert("RGBA" if mode == "RGBA" else "L")
            image = image.point(lambda value: 255).convert("1") if mode == "1" else image
        assert image.mode == mode
        image.save(root / "train2017" / "10.png")
        edit(root, lambda content: content["images"][0].update(file_name="10.png"))
        pixels, _ = dataset_of(root)[0]
        assert pixels.shape == (3, 50, 60) and pixels.mean().item() == pytest.approx(mean, abs=0.01)

    def test_odd_areas_and_crowd_flags(self, root):
        odd = [{"area": None, "iscrowd": None}, {"area": -1.0}, {"area": math.nan}]
        annotations = [box(10, 7, [5, 5, 20, 10], **more) for more in odd]
        edit(root, lambda content: content.update(annotations=annotations))
        entries = dataset_of(root).ground_truth()["annotations"]
        assert [(entry["area"], entry["iscrowd"]) for entry in entries] == [(200.0, 0)] * 3

    def test_flip_moves_boxes_with_the_image(self, root):
        plain, flipped = dataset_of(root)[0], dataset_of(root, transforms=v2.RandomHorizontalFlip(1.0))[0]
        assert torch.equal(plain[0].flip(-1), flipped[0])
        x1, y1, x2, y2 = plain[1]["boxes"].unbind(1)
        assert torch.equal(flipped[1]["boxes"], torch.stack([60 - x2, y1, 60 - x1, y2], dim=1))

    def test_one_split_serves_for_both(self, root):
        (root / "annotations" / "instances_train2017.json").unlink()
        assert find_splits(root) == ("val2017", "val2017")
        data = CocoDataModule(root, progress=False)
        data.setup()
        assert data.single_split == "val2017" and len(data.train_dataset) == len(data.val_dataset) == 3

    def test_limits(self, root):
        data = CocoDataModule(root, limit_train_images=1, limit_val_images=2, progress=False)
        data.setup()
        assert (len(data.train_dataset), len(data.val_dataset)) == (1, 2)
        with pytest.raises(ValueError, match="batch_size"):
            CocoDataModule(root, batch_size=0)

    def test_order_depends_on_seed_alone(self, root):
        def order(seed):
            data = CocoDataModule(root, batch_size=3, seed=seed, flip_probability=0.0, progress=False)
            data.setup()
            (_, targets), *_ = data.train_dataloader()
            return [target["image_id"] for target in targets]

        assert order(1) == order(1)
        assert len({tuple(order(seed)) for seed in range(6)}) > 1


def edit(root, change):
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


class TestBadInput:
    """Every message names the file, in one line."""

    @staticmethod
    def refuse(root, *words):
        with pytest.raises(DataError) as caught:
            CocoDataModule(root, progress=False).setup()
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert str(word) in message

    def test_missing(self, root, tmp_path):
        self.refuse(tmp_path / "nowhere", tmp_path / "nowhere")
        (root / "train2017" / "20.jpg").unlink()
        self.refuse(root, "missing", root / "train2017" / "20.jpg")
        for split in ("train2017", "val2017"):
            (root / "annotations" / f"instances_{split}.json").unlink()
        self.refuse(root, "instances_train2017.json", "instances_val2017.json")

    def test_image_folder_missing(self, root):
        (root / "val2017").rename(root / "elsewhere")
        self.refuse(root, root / "val2017")

    @pytest.mark.parametrize("text", ["{", "\x00\x01", '{"images": 3}', "[]", "[1, 2]"])
    def test_json(self, root, text):
        path = root / "annotations" / "instances_train2017.json"
        path.write_text(text)
        self.refuse(root, path)

    @pytest.mark.parametrize("key", ["images", "annotations", "categories"])
    def test_key_missing(self, root, key):
        self.refuse(root, edit(root, lambda content: content.pop(key)), key)

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: c["annotations"][0].pop("bbox"),
            lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
            lambda c: c["annotations"][0].update(category_id=4),
            lambda c: c["images"][0].pop("file_name"),
            lambda c: c["images"][0].update(width=0),
            lambda c: c["annotations"][0].update(category_id=[7]),
            lambda c: c["annotations"][0].update(image_id=[10]),
            lambda c: c["annotations"][0].update(area="large"),
            lambda c: c["annotations"][0].update(iscrowd=[]),
            lambda c: c["images"][0].update(file_name=10),
            lambda c: c["images"][0].update(id=20),
            lambda c: c["images"][0].update(id="20"),
            lambda c: c["images"][0].update(id=None),
            lambda c: c["categories"][0].update(id=7),
            lambda c: c["categories"][0].update(id=[7]),
            lambda c: c.update(categories=[]),
            lambda c: c.update(annotations=[]),
            lambda c: c["categories"][0].update(name="brush"),  # val2017 says otherwise
        ],
    )
    def test_unusable_content(self, root, change):
        edit(root, change)
        self.refuse(root, "instances_")

    def test_images(self, root):
        path = root / "train2017" / "10.jpg"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        self.refuse(root, path)
        path.write_text("not an image")
        self.refuse(root, path)
        Image.new("RGB", (50, 60)).save(path)
        self.refuse(root, path, "50x60", "60x50")

    def test_image_turned_by_its_exif_tag(self, root):
        path, exif = root / "train2017" / "10.jpg", Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (50, 60)).save(path, exif=exif)
        self.refuse(root, path, "EXIF")

    def test_pixels_of_32_bits(self, root):
        path = root / "train2017" / "10.tiff"
        Image.new("F", (60, 50)).save(path)
        edit(root, lambda content: content["images"][0].update(file_name=path.name))
        self.refuse(root, path, "32-bit")

    def test_several_bad_images_are_counted(self, root):
        for name in ("10.jpg", "20.jpg"):
            (root / "train2017" / name).unlink()
        annotations = read_annotations(root / "annotations" / "instances_train2017.json")
        with pytest.raises(DataError, match="and 1 more"):
            verify_images(annotations, root / "train2017", progress=False)


class TestEvaluation:
    @staticmethod
    def output(boxes, scores, labels):
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "scores": torch.tensor(scores, dtype=torch.float32),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }

    def test_perfect_detections(self, root):
        dataset = dataset_of(root)
        truth = dataset.ground_truth()
        outputs = []
        for image in truth["images"]:
            mine = [a for a in truth["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
            mine = [a for a in mine if a["bbox"][0] < 60 and min(a["bbox"][2:]) > 0]
            corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)]
            labels = [dataset.label_of_category[a["category_id"]] for a in mine]
            outputs.append(self.output(corners, [0.9] * len(mine), labels))
        truth["annotations"] = [a for a in truth["annotations"] if a["bbox"][0] < 60 and min(a["bbox"][2:]) > 0]
        results = coco_results(outputs, [10, 20, 30], dataset.category_of_label)
        assert {entry["category_id"] for entry in results} == {7, 18, 90}
        figures = evaluate_coco(truth, results)
        assert [figures[name] for name in ("AP", "AP50", "APs")] == pytest.approx([1.0] * 3)
        assert figures["APm"] is None and figures["APl"] is None and format_metric(figures["APl"]) == "n/a"

    def test_no_detections(self, root, capsys):
        figures = evaluate_coco(dataset_of(root).ground_truth(), [])
        assert figures["AP"] == figures["AR100"] == 0.0
        assert capsys.readouterr().out == ""

    def test_figures_are_those_of_pycocotools_on_the_file(self, root, capsys):
        """A box without area can never be found: pycocotools counts it as missed."""
        annotations = [box(i, 7, [5, 5, 20, 10], id=i, area=200, iscrowd=0) for i in (10, 20)]
        annotations.append(box(10, 7, [30, 5, 0, 10], id=30, area=0, iscrowd=0))
        path = edit(root, lambda content: content.update(annotations=annotations))
        found = self.output([[5, 5, 25, 15]], [0.9], [1])
        nothing = self.output([], [], [])
        results = coco_results([found, found, nothing], [10, 20, 30], dataset_of(root).category_of_label)
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes([dict(entry) for entry in results]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        figures = evaluate_coco(dataset_of(root).ground_truth(), results)
        assert [-1 if value is None else value for value in figures.values()] == evaluation.stats.tolist()
        assert figures["AP"] == pytest.approx(67 / 101)  # 2 of 3 objects: precision 1 up to recall 2/3

    def test_background_is_no_category(self):
        """Label 0 must not become category 0, an id that many sets use."""
        output = self.output([[0, 0, 5, 5], [0, 0, 9, 9]], [0.9, 0.8], [0, 1])
        (entry,) = coco_results([output], [1], (0, 0, 3))
        assert entry["category_id"] == 0 and entry["bbox"] == [0, 0, 9, 9]

    def test_what_is_not_finite_is_no_detection(self):
        """It would be no json either, and the results file is for a server."""
        boxes = [[0, 0, math.nan, 5], [0, 0, math.inf, 9], [0, 0, 9, 9], [1, 1, 2, 2]]
        output = self.output(boxes, [0.9, 0.8, 0.7, math.nan], [1, 1, 1, 1])
        (entry,) = coco_results([output], [1], (0, 5))
        assert entry["bbox"] == [0, 0, 9, 9]

    def two_objects(self, second):
        """One image of 200 by 200 pixels with an object in a corner and a second one."""
        return {
            "info": {},
            "images": [{"id": 1, "file_name": "a", "width": 200, "height": 200}],
            "annotations": [box(1, 5, [0, 0, 50, 50], id=1, area=2500, iscrowd=0), second],
            "categories": [{"id": 5, "name": "a"}],
        }

    def test_known_case(self):
        """Two objects of one class. The better-scored detection is wrong, one of the others has an IoU of 0.62.

        By hand, at IoU 0.5: hits at ranks 2 and 3, precisions 1/2 and 2/3, made monotone 2/3 at every recall, AP 2/3.
        At IoU 0.75 only rank 2 is a hit: precision 1/2 up to recall 1/2, which are 51 of 101 points.
        Among medium objects the wrong detection, a small one, does not count: 1 at the three thresholds up to 0.6.
        """
        truth = self.two_objects(box(1, 5, [100, 100, 50, 50], id=2, area=2500, iscrowd=0))
        boxes = [[60, 0, 90, 30], [0, 0, 50, 50], [100, 100, 131, 150]]
        results = coco_results([self.output(boxes, [0.9, 0.8, 0.7], [1, 1, 1])], [1], (0, 5))
        figures = evaluate_coco(truth, results)
        assert figures["AP50"] == pytest.approx(2 / 3)
        assert figures["AP75"] == pytest.approx(0.5 * 51 / 101)
        assert figures["APm"] == pytest.approx((3 + 7 * 51 / 101) / 10)

    def test_crowd_box_is_ignored(self):
        truth = self.two_objects(box(1, 5, [100, 100, 80, 80], id=2, area=6400, iscrowd=1))
        boxes = [[110, 110, 150, 150], [0, 0, 50, 50]]  # the first lies in the crowd: neither hit nor miss
        figures = evaluate_coco(truth, coco_results([self.output(boxes, [0.9, 0.8], [1, 1])], [1], (0, 5)))
        assert figures["AP"] == pytest.approx(1.0)
