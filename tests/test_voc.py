"""Sets in the layout of Pascal VOC, and what becomes of bad data when it is to be skipped."""

import json
import shutil

import pytest
from PIL import Image

from adapters.detection.data import CocoDataModule, DataError, SyntheticSettings, generate_dataset, read_voc
from adapters.detection.data.splits import read_test_split
from adapters.detection.evaluation import evaluate_coco

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox>"
    "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def write_voc(root, images, lists):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for name, objects in images.items():
        Image.new("RGB", (40, 30)).save(root / "JPEGImages" / f"{name}.jpg")
        content = "".join(OBJECT.format(*entry) for entry in objects)
        size = "<size><width>40</width><height>30</height></size>"
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename>{size}{content}</annotation>"
        )
    for split, names in lists.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
    return root


@pytest.fixture
def voc(tmp_path):
    images = {
        "000001": [("dog", 0, 1, 1, 40, 30), ("cat", 1, 5, 5, 10, 10)],
        "000002": [("person", 0, 3, 4, 12, 20)],
        "000003": [],
    }
    return write_voc(tmp_path / "voc", images, {"train": ["000001", "000003"], "val": ["000002"]})


def test_voc_becomes_coco(voc):
    data = CocoDataModule(voc, progress=False)
    data.setup()
    train, val = data.train_dataset, data.val_dataset
    assert train.class_names[12] == "dog" and train.num_classes == 21 and not data.single_split
    _, target = train[0]
    assert target["boxes"].tolist() in ([[0, 0, 40, 30]], [[0, 0, 40, 30]])  # the whole image, flipped or not
    assert target["labels"].tolist() == [12]
    assert train.box_report.crowd == 1 and train.box_report.empty_images == 1
    assert val[0][1]["boxes"].tolist() == [[2, 3, 12, 20]]
    truth = val.ground_truth()
    entry = truth["annotations"][0]
    assert entry["bbox"] == [2, 3, 10, 17] and entry["area"] == 170
    perfect = [{"image_id": "000002", "category_id": 15, "bbox": [2, 3, 10, 17], "score": 1.0}]
    assert evaluate_coco(truth, perfect)["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("given", "suffix"),
    [
        ("C:\\\\pictures\\\\000001.jpg", ".jpg"),
        ("000001", ".jpg"),
        ("", ".png"),
        ("another.jpg", ".jpg"),
        ("a.bmp", ".bmp"),
    ],
)
def test_the_image_is_found_whatever_the_annotation_calls_it(voc, given, suffix):
    """The name in the list tells, as in VOC; tools write paths, names without a suffix, and stale ones."""
    xml, image = voc / "Annotations" / "000001.xml", voc / "JPEGImages" / "000001.jpg"
    xml.write_text(xml.read_text().replace("000001.jpg", given))
    image.rename(image.with_name("a.bmp" if suffix == ".bmp" else f"000001{suffix}"))
    (voc / "JPEGImages" / "another.jpg").touch()
    data = CocoDataModule(voc, progress=False)
    data.setup()
    assert data.train_dataset[0][0].shape == (3, 30, 40)


def test_other_classes_are_in_alphabetical_order_over_all_splits(tmp_path):
    images = {"a": [("zebra", 0, 1, 1, 9, 9)], "b": [("apple", 0, 1, 1, 9, 9)]}
    root = write_voc(tmp_path / "own", images, {"trainval": ["a"], "test": ["b"]})
    data = CocoDataModule(root, progress=False, verify=False)
    data.setup()
    assert data.train_dataset.class_names == data.val_dataset.class_names == ("background", "apple", "zebra")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("Annotations/000001.xml", None, "annotation file not found: .*000001.xml"),
        ("Annotations/000001.xml", "<annotation>", "000001.xml is not valid xml"),
        ("Annotations/000001.xml", "<annotation/>", "size/width is None"),
        ("ImageSets/Main/train.txt", "", "train.txt is empty"),
        ("ImageSets/Main/train.txt", "000001\n000001", "names an image twice"),
        ("ImageSets/Main/train.txt", "000009", "000009.xml"),
        ("JPEGImages/000001.jpg", None, "missing: .*000001.jpg"),
    ],
)
def test_bad_voc_is_named(voc, file, content, message):
    (voc / file).unlink() if content is None else (voc / file).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        CocoDataModule(voc, progress=False).setup()
    assert "\n" not in str(error.value)


def test_voc_without_splits(voc):
    shutil.rmtree(voc / "ImageSets" / "Main")
    (voc / "ImageSets" / "Main").mkdir()
    with pytest.raises(DataError, match="no split found"):
        CocoDataModule(voc, progress=False).setup()
    with pytest.raises(DataError, match="list of images not found: .*else.txt"):
        read_voc(voc, ["else"])


# ---------------------------------------------------------------------------------------------------------------------
# bad_data="skip"


@pytest.fixture
def coco(tmp_path):
    settings = SyntheticSettings(train_images=4, val_images=3, image_size=64, seed=1)
    return generate_dataset(tmp_path / "coco", settings, progress=False)


def edit(root, split, change):
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return content


def test_bad_images_and_unknown_categories_are_skipped_and_counted(coco):
    content = edit(
        coco, "train2017", lambda c: c["annotations"].append(c["annotations"][0] | {"id": 999, "category_id": 77})
    )
    names = [image["file_name"] for image in content["images"]]
    (coco / "train2017" / names[0]).unlink()
    whole = (coco / "train2017" / names[1]).read_bytes()
    (coco / "train2017" / names[1]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="category_id 77"):
        CocoDataModule(coco, progress=False).setup()
    data = CocoDataModule(coco, progress=False, bad_data="skip")
    with pytest.warns(UserWarning, match="train2017: 2 images are left out; the first: .*missing"):
        data.setup()
    assert len(data.train_dataset) == 2 and len(data.val_dataset) == 3
    assert len(data.skipped) == 2 and names[1] in data.skipped[1]
    assert data.train_dataset.box_report.unknown == 1 and "1 of unknown categories" in str(
        data.train_dataset.box_report
    )


def test_the_images_of_a_test_are_checked_once(coco):
    """The evaluation and the loader each ask for them: a bad one was counted twice."""
    (coco / "test2017").mkdir()
    content = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    (coco / "annotations" / "image_info_test2017.json").write_text(json.dumps(content))
    for image in content["images"][1:]:
        shutil.copy(coco / "val2017" / image["file_name"], coco / "test2017" / image["file_name"])
    data = CocoDataModule(coco, test_split="test2017", progress=False, bad_data="skip")
    with pytest.warns(UserWarning, match="test2017: 1 images are left out"):
        data.test_dataloader()
    assert data.test_dataset is data.test_dataset and len(data.test_dataset) == 2 and len(data.skipped) == 1


def test_entries_without_a_size_are_skipped_and_counted(coco):
    content = edit(coco, "train2017", lambda c: c["images"][1].update(width=0))
    with pytest.raises(DataError, match="has no positive width and height"):
        CocoDataModule(coco, progress=False).setup()
    data = CocoDataModule(coco, progress=False, bad_data="skip", verify=False)
    with pytest.warns(UserWarning, match="train2017: 1 images are left out; the first: .*no positive width"):
        data.setup()
    assert len(data.train_dataset) == 3 and content["images"][1]["file_name"] in data.skipped[0]
    assert "left out: 1 images" in data.report()
    edit(coco, "train2017", lambda c: [image.update(height=None) for image in c["images"]])
    with pytest.raises(DataError, match="no positive width"):
        CocoDataModule(coco, progress=False, bad_data="skip").setup()


@pytest.mark.parametrize("content", ["<annotation>", "<annotation/>", None])
def test_annotations_that_cannot_be_parsed_are_skipped_and_counted(voc, content):
    xml = voc / "Annotations" / "000003.xml"
    xml.unlink() if content is None else xml.write_text(content)
    with pytest.raises(DataError, match="000003.xml"):
        CocoDataModule(voc, progress=False).setup()
    data = CocoDataModule(voc, progress=False, bad_data="skip")
    with pytest.warns(UserWarning, match="train: 1 images are left out; the first: .*000003.xml"):
        data.setup()
    assert len(data.train_dataset) == 1 and len(data.skipped) == 1
    (voc / "Annotations" / "000001.xml").write_text("<")
    with pytest.raises(DataError, match="no annotation can be used; the first: .*000001.xml"):
        CocoDataModule(voc, progress=False, bad_data="skip").setup()


def test_one_process_of_a_machine_verifies(coco, monkeypatch):
    """The others would read the whole set again; to skip the same images all must look."""
    (coco / "train2017" / "000000000001.jpg").unlink()
    monkeypatch.setenv("LOCAL_RANK", "1")
    data = CocoDataModule(coco, progress=False)
    data.setup()
    assert len(data.train_dataset) == 4
    data = CocoDataModule(coco, progress=False, bad_data="skip")
    with pytest.warns(UserWarning, match="1 images are left out"):
        data.setup()
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(DataError, match="000000000001.jpg"):
        CocoDataModule(coco, progress=False).setup()


def test_nothing_left_is_an_error(coco):
    for path in (coco / "val2017").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no image of the split val2017 can be used"):
        CocoDataModule(coco, progress=False, bad_data="skip").setup()


def test_unknown_policy():
    with pytest.raises(ValueError, match="bad_data 'ignore'"):
        CocoDataModule("anywhere", bad_data="ignore")


def test_test_split_needs_no_annotations(coco):
    source = coco / "annotations" / "instances_val2017.json"
    content = json.loads(source.read_text())
    del content["annotations"]
    (coco / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(content))
    (coco / "val2017").rename(coco / "test2017")
    split = read_test_split(coco, "test-dev2017")
    assert split.folder == coco / "test2017" and len(split.annotations.images) == 3
    with pytest.raises(DataError, match="neither .*image_info_test2018.json"):
        read_test_split(coco, "test2018")


@pytest.mark.parametrize("backend", ["pycocotools", "faster_coco_eval"])
def test_backends_agree(coco, backend):
    pytest.importorskip(backend)
    data = CocoDataModule(coco, progress=False, verify=False)
    data.setup()
    truth = data.val_dataset.ground_truth()
    moved = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": 0.9 - 0.1 * i,
         "bbox": [a["bbox"][0] + 2 * i, *a["bbox"][1:]]}
        for i, a in enumerate(truth["annotations"])
    ]  # fmt: skip
    reference, found = evaluate_coco(truth, moved), evaluate_coco(truth, moved, backend=backend)
    assert 0 < reference["AP"] < 1
    assert found == pytest.approx(reference, abs=1e-9, nan_ok=True)
    assert evaluate_coco(truth, [], backend=backend)["AP"] == 0


@pytest.mark.parametrize("backend", ["pycocotools", "faster_coco_eval"])
def test_names_as_image_ids(voc, backend):
    """Those of VOC; some images are not shown."""
    if backend != "pycocotools":
        pytest.importorskip(backend)
    data = CocoDataModule(voc, progress=False)
    data.setup()
    truth = data.train_dataset.ground_truth()
    found = [{"image_id": "000001", "category_id": 12, "bbox": [0, 0, 40, 30], "score": 1.0}]
    for shown in (None, ["000001"]):
        assert evaluate_coco(truth, found, shown, backend)["AP"] == pytest.approx(1.0)
        assert evaluate_coco(truth, [], shown, backend)["AP"] == 0.0
    assert truth["images"][0]["id"] == "000001" and found[0]["image_id"] == "000001"


def test_a_test_split_with_a_class_of_its_own_is_refused(coco):
    path = coco / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 77, "name": "new"})
    content["annotations"][0]["category_id"] = 77
    (coco / "annotations" / "instances_own.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"instances_own\.json has objects of category 77"):
        _ = CocoDataModule(coco, test_split="own", progress=False).test_dataset
