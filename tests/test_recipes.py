"""Every recipe is a row of the paper's tables, loads, and trains for one step on a tiny set."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from adapters.detection import ImplicitFPN
from adapters.detection.data import SyntheticSettings, generate_dataset
from adapters.detection.training import load_checkpoint
from adapters.detection.training.cli import PACKAGE, run

RECIPES = sorted(path.stem for path in (PACKAGE / "recipes").glob("t*.yaml"))
# Sizes alone are made small. No weights can be downloaded here, and frozen statistics need them.
TINY = [
    "--model.weights_backbone=null", "--model.detector.frozen_norm=false", "--model.detector.image_size=[64]",
    "--model.detector.max_size=64", "--data.batch_size=1", "--data.num_workers=0", "--data.verify=false",
    "--data.progress=false", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_steps=1",
    "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes") / "data"
    return generate_dataset(folder, SyntheticSettings(train_images=1, val_images=1, image_size=64), progress=False)


def test_every_row_has_its_recipe():
    rows = {
        f"t1_{name}_{neck}"
        for name in ("retinanet", "fasterrcnn", "fcos", "atss", "autoassign")
        for neck in ("fpn", "ifpn")
    }
    rows |= {f"t2_autoassign_{row}" for row in ("unroll0", "unroll1", "unroll2", "unroll4", "broyden")}
    rows |= {f"t3_atss_{row}" for row in ("neither", "rbl", "csc", "rbl_csc")}
    rows |= {f"t4_atss_{row}" for row in ("none", "bifpn", "nas_fpn", "dense", "pyramid")}
    rows |= {f"t5_retinanet_{row}" for row in ("mdeq", "rliter")}
    rows |= {f"t6_{name}_x101_64x4d_dcn_{neck}" for name in ("atss", "autoassign") for neck in ("fpn", "ifpn")}
    rows |= {f"t6_{name}_x152_32x8d_dcn_ifpn" for name in ("atss", "autoassign")}
    assert set(RECIPES) == rows


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_trains(recipe, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a recipe is found from any folder
    assert run(["fit", f"--config=recipes/{recipe}.yaml", f"--data.root={root}", "--out=out", *TINY]) == 0
    module = load_checkpoint("out/checkpoints/last.ckpt")
    assert torch.load("out/checkpoints/last.ckpt", weights_only=True)["skipped_steps"] == 0
    neck = module.neck
    asked = yaml.safe_load((PACKAGE / "recipes" / f"{recipe}.yaml").read_text())["model"]["detector"]
    assert isinstance(neck, ImplicitFPN) == (asked["neck"] == "ifpn")
    if isinstance(neck, ImplicitFPN):
        settings = asked["neck_settings"]
        assert neck.unroll == settings.get("unroll")
        if neck.unroll is None:
            assert (neck.max_steps, neck.eval_max_steps, neck.rtol) == (15, 7, 0.0)
    config = yaml.safe_load(Path("out/config.yaml").read_text())
    twice = recipe.startswith("t6")
    assert config["model"]["schedule"]["milestones"] == ([120000, 160000] if twice else [60000, 80000])
    assert config["model"]["schedule"]["optimizer"] == "sgd"
    assert module.config.deformable_stages == (["c4", "c5"] if twice else [])


def test_readme_lists_every_recipe_with_the_papers_ap():
    """The table of the README, the heads of the recipes and their names agree."""
    readme = (PACKAGE.parent.parent / "README.md").read_text()
    for recipe in RECIPES:
        head = (PACKAGE / "recipes" / f"{recipe}.yaml").read_text().splitlines()[0]
        ap = re.search(r"The paper: ([\d.]+) AP", head)
        assert ap, head
        assert f"`{recipe}` {ap[1]}" in readme
