"""Images found and read, detections drawn and written, feature maps: as functions and as commands."""

import json
import os

import numpy as np
import pytest
import torch
from checkpoints import CATEGORIES, write_checkpoint, write_image
from matplotlib.figure import Figure
from PIL import Image

from adapters.detection.__main__ import COMMANDS, main
from adapters.detection.data import DataError
from adapters.detection.evaluation import coco_results
from adapters.detection.images import batched, find_images, read_image
from adapters.detection.levels import choose_levels, level_names, strengths
from adapters.detection.predict import class_names, picture_names
from adapters.detection.training import load_checkpoint
from adapters.detection.visualize import draw_boxes

SURE = {"score_thresh": 0.0, "detections_per_img": 5}  # untrained detectors are not


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "ifpn.ckpt"
    return write_checkpoint(path, data={"categories": CATEGORIES}, options=SURE)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for i, name in enumerate(("b.png", "a.jpg", "more/a.png")):
        write_image(folder / name, i)
    return folder


def predict(checkpoint, images, out, *more):
    return main(["predict", "--checkpoint", str(checkpoint), "--images", *map(str, images), "--out", str(out), *more])


def test_predictions_are_those_of_the_model(checkpoint, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(checkpoint, [photos], out, "--min_score", "0.0", "--device", "cpu") == 0
    found = json.loads((out / "predictions.json").read_text())
    assert {path.name for path in out.iterdir()} == {"predictions.json", "a.png", "b.png", "a_2.png"}
    model, number = load_checkpoint(checkpoint).model, 0
    for path, picture in ((photos / "a.jpg", "a.png"), (photos / "b.png", "b.png"), (photos / "more/a.png", "a_2.png")):
        number += 1
        with torch.no_grad():
            expected = coco_results(model([read_image(path)]), [number], (0, *CATEGORIES))
        mine = [entry for entry in found if entry["file_name"] == str(path)]
        assert len(mine) == 5
        for entry, other in zip(mine, expected, strict=True):
            assert entry == other | {
                "category": CATEGORIES[other["category_id"]], "file_name": str(path), "picture": picture
            }  # fmt: skip
    output = capsys.readouterr().out
    assert "15 detections" in output and "fixed points: " in output


def test_batches_and_scores(checkpoint, photos, tmp_path):
    for batch_size in (1, 2):  # all images are of one size: nothing is padded
        out = tmp_path / f"{batch_size}"
        assert (
            predict(checkpoint, [photos], out, "--min_score=0.0", f"--batch_size={batch_size}", "--pictures=false") == 0
        )
    one, two = (json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("1", "2"))
    assert len(one) == len(two) == 15 and [path.name for path in (tmp_path / "1").iterdir()] == ["predictions.json"]
    for a, b in zip(one, two, strict=True):
        assert a["file_name"] == b["file_name"] and a["score"] == pytest.approx(b["score"], rel=1e-3)
    middle = sorted(entry["score"] for entry in one)[7]
    assert predict(checkpoint, [photos], tmp_path / "some", f"--min_score={middle}", "--pictures=false") == 0
    some = json.loads((tmp_path / "some" / "predictions.json").read_text())
    assert some == [entry for entry in one if entry["score"] >= middle] and 0 < len(some) < 15


def test_bad_images_are_named_and_left_out(checkpoint, photos, tmp_path, capsys):
    (photos / "words.jpg").write_text("no image")
    (photos / "cut.jpg").write_bytes((photos / "a.jpg").read_bytes()[:900])
    assert predict(checkpoint, [photos], tmp_path / "out", "--min_score=0") == 0
    output = capsys.readouterr().out
    assert "words.jpg" in output and "cut.jpg" in output and "2 of 5 images cannot be used" in output
    bad = [photos / "words.jpg", photos / "cut.jpg"]
    assert predict(checkpoint, bad, tmp_path / "none") == 2
    assert "none of the 2 images can be used" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_images_too_thin_for_the_detector_are_named_and_left_out(checkpoint, photos, tmp_path, capsys):
    """The shorter side of 200 x 1 pixels is nothing once the longer is 96."""
    thin = write_image(tmp_path / "thin.png", size=(200, 1))
    assert predict(checkpoint, [photos, thin], tmp_path / "out", "--pictures=false") == 0
    output = capsys.readouterr().out
    assert f"image {thin} of 200x1 is too thin" in output and "1 of 4 images cannot be used" in output
    words = ["features", "--checkpoints", str(checkpoint), "--images", str(thin), "--out", str(tmp_path / "maps.png")]
    assert main(words) == 2 and "none of the 1 images can be used" in capsys.readouterr().err
    assert main(["cost", "--checkpoint", str(checkpoint), "--height=1", "--width=200"]) == 2
    assert "1 x 200 pixels are too thin" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError("too large")])
@pytest.mark.parametrize("folder_is_there", [False, True])
def test_a_stopped_prediction_leaves_nothing(checkpoint, photos, tmp_path, monkeypatch, error, folder_is_there):
    import adapters.detection.predict as module

    calls, draw = [], module.draw_boxes

    def draw_once(path, *args, **kwargs):
        calls.append(draw(path, *args, **kwargs))
        if len(calls) == 2:
            raise error

    out = tmp_path / "out"
    if folder_is_there:
        out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(module, "draw_boxes", draw_once)
        assert predict(checkpoint, [photos], out) == (130 if error is KeyboardInterrupt else 2)
    assert len(calls) == 2 and out.exists() == folder_is_there and not list(out.glob("*"))
    assert predict(checkpoint, [photos], out) == 0 and (out / "predictions.json").exists()
    assert not list(out.glob(".*"))


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(photos, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    assert predict("nowhere.ckpt", [photos], tmp_path / "file" / "out") == 2
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests may write anywhere
    assert predict("nowhere.ckpt", [photos], tmp_path / "new" / "out") == 2
    assert f"no permission to write in {tmp_path}" in capsys.readouterr().err


def test_an_unknown_command_names_all(capsys):
    assert main(["detect"]) == 2
    error = capsys.readouterr().err
    assert "unknown command 'detect'" in error and all(f"'{name}'" in error for name in ("fit", *COMMANDS))


def test_pictures_of_large_images_are_smaller(tmp_path):
    image = torch.zeros(3, 100, 3000)
    box, one = torch.tensor([[1500.0, 30.0, 2400.0, 90.0]]), torch.ones(1)
    path = draw_boxes(tmp_path / "p.png", image, box, one.long(), one, ["background", "a"])
    with Image.open(path) as file:
        assert file.size == (2000, 67)
        columns = np.asarray(file.convert("RGB")).max(2)[45] > 60
    assert abs(columns.nonzero()[0].min() - 1000) < 5 and abs(columns.nonzero()[0].max() - 1600) < 5


def test_nothing_is_written_over(checkpoint, photos, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png").write_text("mine")
    assert predict(checkpoint, [photos], out) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["a.png"] and (out / "a.png").read_text() == "mine"
    assert predict(checkpoint, [photos], out / "a.png") == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--min_score=2"], "min_score must be between 0 and 1"),
        (["--batch_size=0"], "batch_size must be at least 1"),
        (["--device=abacus"], "abacus"),
        (["--checkpoint=nowhere.ckpt"], "checkpoint not found: nowhere.ckpt"),
        (["--images=nowhere.jpg"], "no such file or folder: nowhere.jpg"),
        (["--score=1"], "score"),
    ],
)
def test_unusable_settings_end_in_one_line(checkpoint, photos, tmp_path, capsys, words, message):
    try:
        status = predict(checkpoint, [photos], tmp_path / "out", *words)
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_foreign_file_is_no_checkpoint(photos, tmp_path, capsys):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "foreign.ckpt")
    assert predict(tmp_path / "foreign.ckpt", [photos], tmp_path / "out") == 2
    assert "not a checkpoint of a DetectionModule" in capsys.readouterr().err


def test_settings_come_from_a_config_file_as_well(checkpoint, photos, tmp_path):
    config = tmp_path / "predict.yaml"
    config.write_text(
        f"checkpoint: {checkpoint}\nimages: [{photos / 'a.jpg'}]\nout: {tmp_path / 'out'}\nmin_score: 0.0\n"
    )
    assert main(["predict", "--config", str(config)]) == 0
    assert (tmp_path / "out" / "a.png").exists()


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"\n  {name} " in output for name in ("fit", "validate", "test", *COMMANDS))
    assert main([]) == 2
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0 and "--out" in capsys.readouterr().out


def test_images_are_found_in_order_and_once(photos):
    (photos / "notes.txt").write_text("no image")
    for hidden in ("._a.jpg", ".thumbnails/a.jpg", "more/.b.png"):
        write_image(photos / hidden)
    names = [photos / "a.jpg", photos / "b.png", photos / "more" / "a.png"]
    assert find_images([photos]) == names
    assert find_images([photos / "b.png", photos, photos / "notes.txt"]) == [
        names[1],
        names[0],
        names[2],
        photos / "notes.txt",
    ]
    empty = photos / "empty"
    empty.mkdir()
    for places, message in (([], "no images given"), ([empty], "no image in folder")):
        with pytest.raises(DataError, match=message):
            find_images(places)


def test_pictures_of_images_with_one_name_do_not_meet(tmp_path):
    paths = [tmp_path / name for name in ("x/a.jpg", "y/A.png", "y/a_2.jpg", "z/a.bmp")]
    assert list(picture_names(paths).values()) == ["a.png", "A_2.png", "a_2_2.png", "a_3.png"]


def test_images_are_read_upright_and_in_colour(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    turned = write_image(tmp_path / "turned.jpg", exif=exif)
    plain = write_image(tmp_path / "plain.jpg")
    torch.testing.assert_close(read_image(turned), read_image(plain).rot90(-1, (1, 2)), rtol=0, atol=0)
    Image.fromarray((torch.arange(6).reshape(2, 3) * 257 * 51).to(torch.uint16).numpy()).save(tmp_path / "deep.png")
    grey = read_image(tmp_path / "deep.png")
    torch.testing.assert_close(grey, (torch.arange(6).reshape(1, 2, 3) / 5).expand(3, 2, 3))
    Image.fromarray(torch.zeros(4, 4).numpy()).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match=r"float.tiff: 32-bit pixels"):
        read_image(tmp_path / "float.tiff")


def test_batches_keep_the_order():
    items = [(f"{i}", i) for i in range(5)]
    assert list(batched(items, 2)) == [(["0", "1"], [0, 1]), (["2", "3"], [2, 3]), (["4"], [4])]


def test_names_of_classes(checkpoint, tmp_path):
    assert class_names(load_checkpoint(checkpoint)) == (["background", "cat", "dog"], [0, 3, 7])
    nameless = load_checkpoint(write_checkpoint(tmp_path / "n.ckpt", "fpn"))
    assert class_names(nameless) == (["background", "class 1", "class 2"], [0, 1, 2])


def test_boxes_are_drawn_where_they_are(tmp_path):
    box = torch.tensor([[40.0, 20.0, 80.0, 50.0]])
    path = draw_boxes(
        tmp_path / "p.png",
        torch.zeros(3, 60, 100),
        box,
        torch.tensor([2]),
        torch.tensor([0.5]),
        ("background", "a", "b"),
    )
    with Image.open(path) as file:
        assert file.size == (1000, 600)  # ten times the image
        pixels = torch.from_numpy(np.array(file.convert("RGB"))).int()
    orange = torch.tensor([255, 127, 14])
    for row, column in ((350, 400), (350, 800), (200, 700), (500, 600)):  # the four sides
        patch = pixels[row - 3 : row + 4, column - 3 : column + 4].reshape(-1, 3)
        assert (patch - orange).abs().sum(1).min() < 30, (row, column)
    assert pixels[230:480, 430:780].max() == 0 and pixels[:100].max() == 0 and pixels[520:].max() == 0


def test_the_surest_of_many_boxes_are_labelled(tmp_path, monkeypatch):
    """All are drawn, the surest on top; 60 have a label."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (figures.append(self), save(self, *args, **how)))
    corners = torch.rand(75, 2, generator=torch.Generator().manual_seed(0)) * 80
    scores = torch.linspace(0.99, 0.25, 75)
    boxes, labels = torch.cat([corners, corners + 10], 1), torch.ones(75, dtype=torch.long)
    draw_boxes(tmp_path / "p.png", torch.zeros(3, 90, 90), boxes, labels, scores, ("background", "a"))
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.texts] == [f"a {score:.2f}" for score in scores[:60]]
    heights = [patch.get_zorder() for patch in axes.patches]
    assert len(heights) == 75 and heights == sorted(heights, reverse=True) and len(set(heights)) == 75
    for patch, (x, y) in zip(axes.patches, corners.tolist(), strict=True):
        assert patch.get_xy() == pytest.approx((x, y))


def test_thin_images_take_no_more_than_a_page(checkpoint, tmp_path):
    """Neither is their row a line, nor the picture of them metres high."""
    sides = []
    for size in ((960, 20), (20, 960)):
        image = write_image(tmp_path / "thin.png", size=size)
        words = ["features", "--checkpoints", str(checkpoint), "--images", str(image), "--levels", "P5"]
        assert main([*words, "--out", str(tmp_path / f"{size[0]}.png")]) == 0
        with Image.open(tmp_path / f"{size[0]}.png") as file:
            sides.append(file.height)
    assert 450 < sides[0] < sides[1] < 1000


def test_maps_cover_the_image_in_its_own_pixels(checkpoint):
    model = load_checkpoint(checkpoint).model
    image = torch.rand(3, 128, 150, generator=torch.Generator().manual_seed(0))  # scaled to 64 x 75, padded to 96
    maps = strengths(model, image)
    assert [tuple(level.shape) for level, _, _ in maps] == [(8, 10), (4, 5), (2, 3), (1, 2), (1, 1)]
    assert [(height, width) for _, height, width in maps][:3] == [(128, 160), (128, 160), (128, 192)]
    names = level_names(model, len(maps))
    assert choose_levels(names, ["P7", "P5"]) == [2, 4] and choose_levels(names, None) == list(range(5))


def test_features_are_written_to_a_picture(checkpoint, photos, tmp_path, capsys):
    words = ["features", "--checkpoints", str(checkpoint), "--images", str(photos), "--out", str(tmp_path / "maps")]
    assert main(words) == 2
    assert "is no picture's name: it must end in .png, .jpg, .pdf, .svg" in capsys.readouterr().err
    assert not (tmp_path / "maps").exists()


def test_features(checkpoint, photos, tmp_path, capsys):
    explicit = write_checkpoint(tmp_path / "fpn.ckpt", "fpn")
    words = ["features", "--checkpoints", str(explicit), str(checkpoint), "--images", str(photos)]
    widths = []
    for name, more in (("all.png", []), ("some.png", ["--levels", "P5", "P6", "--num_images", "2"])):
        assert main([*words, "--out", str(tmp_path / name), *more]) == 0
        widths.append(Image.open(tmp_path / name).width)
    assert widths[1] < widths[0]
    for more, message in ((["--levels", "P2"], "unknown level 'P2'"), (["--num_images=0"], "at least 1")):
        assert main([*words, "--out", str(tmp_path / "new.png"), *more]) == 2
        assert message in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "all.png")]) == 2
    assert not (tmp_path / "new.png").exists()
