"""docs/recipes/tables.md: its commands are read, and each of them starts on a few small images."""

import functools
import re
import shlex
import shutil
import sys
from dataclasses import replace
from unittest import mock

import croc
import d3ssl
import densesiam
import densesiam_segment
import detect
import dupr
import evaluate
import fcn
import harness
import openimages_mini
import picie
import pytest
import soco
import test_croc
import test_d3ssl
import test_densesiam
import test_densesiam_segment
import test_detect
import test_dupr
import test_fcn
import test_openimages_mini
import test_picie
import test_soco
import timm
import torch
import torchvision
from files import ROOT
from PIL import Image
from test_evaluate import davis, write_set
from densekit.scenes import sample_scenes

PAGE = (ROOT / "docs" / "recipes" / "tables.md").read_text()
FOUND = sorted(set(re.findall(r"python recipes/(\w+)\.py ([^`\n]*)", PAGE)))
# What makes a run small; the rest of the options are those of the row.
SMALL = {
    "croc": (croc, test_croc.SMALL, ("arch", "head", "views")),
    "d3ssl": (d3ssl, test_d3ssl.SMALL, ("arch", "head", "views", "bins", "bank", "proposals")),
    "densesiam": (densesiam, test_densesiam.SMALL, ("arch", "hidden", "categories", "views")),
    "dupr": (dupr, test_dupr.SMALL, ("arch", "outputs", "bank", "views")),
    "soco": (soco, test_soco.SMALL, ("arch", "head", "views", "bins", "proposals")),
    "densesiam_segment": (
        densesiam_segment, test_densesiam_segment.SMALL, ("arch", "image", "size"),
    ),
    "picie": (picie, test_picie.SMALL, ("arch", "image", "size", "radius")),
    "detect": (
        detect,
        test_detect.SMALL,
        *[("data", "encoder", "scenes", "steps", "milestones", "warmup", "sides", "width", "rois",
           "anchors", "proposals", "annotations", "val_annotations")],
    ),
    "fcn": (
        fcn, test_fcn.SMALL, ("encoder", "steps", "milestones", "crop", "window", "draws"),
    ),
}  # fmt: skip
OTHERS = {"evaluate": evaluate, "openimages_mini": openimages_mini}  # which train nothing
COMMANDS = [x for x in FOUND if x[0] in (*SMALL, *OTHERS)]  # not what makes data
SHARED = ("batch", "epochs", "workers", "log_every", "save_every", "device", "precision")


def parsed(recipe, arguments):
    """The configuration of a command."""
    module = OTHERS[recipe] if recipe in OTHERS else SMALL[recipe][0]
    with mock.patch.object(sys, "argv", [f"{recipe}.py", *shlex.split(arguments)]):
        return module.read_options()


def test_the_page_has_every_table_of_the_four_papers():
    headings = re.findall(r"^### Table (\w+):", PAGE, re.MULTILINE)
    tables = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    papers = {
        x.split("\n")[0]: re.findall(r"^### Table (\d+|A\d)", x, re.MULTILINE) for x in tables
    }
    assert set(papers["DenseSiam"]) == {"1", "2", "3", "4", "5", "A1", "A2"}
    assert set(papers["CrOC"]) == {str(x) for x in range(1, 7)}
    assert set(papers["D3SSL"]) == {str(x) for x in range(1, 8)}
    assert set(papers["DUPR"]) == {str(x) for x in range(1, 12)}
    assert len(headings) == sum(map(len, papers.values()))
    rows = [x for x in PAGE.splitlines() if x.startswith("| ") and x.count("|") == 5]
    states = {x.split(" | ")[-1].removesuffix(" |") for x in rows}
    assert states == {"status", "started", "no figures"}  # none is missing
    for row in rows:
        assert row.split(" | ")[-1] != "started |" or "`" in row


@pytest.mark.parametrize("recipe", [*SMALL, *OTHERS])
def test_the_commands_of_the_page_are_read(recipe):
    own = [arguments for name, arguments in COMMANDS if name == recipe]
    assert own
    for arguments in own[:: max(1, len(own) // 3)]:  # a few of them; the slow test reads all
        parsed(recipe, arguments)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A few images with proposals, labels and boxes, and a video."""
    folder = tmp_path_factory.mktemp("small")
    boxes, sizes = {}, {}
    (folder / "photos").mkdir()
    draws = torch.Generator().manual_seed(0)
    for number, image in enumerate(sample_scenes(8, (48, 48), generator=draws).images):
        name = f"{number}.png"
        pixels = (image * 255).byte().movedim(0, -1).numpy()
        Image.fromarray(pixels).save(folder / "photos" / name)
        sizes[name] = (48, 48)
        boxes[name] = torch.tensor([[4, 4, 30, 34], [12, 8, 40, 44]]).numpy()
    test_d3ssl.write_proposals(folder / "photos", boxes, sizes)
    write_set(folder / "set")
    davis(folder / "davis")
    classes = folder / "classes"
    for split in ("train", "val"):
        for kind in ("a", "b"):
            (classes / split / kind).mkdir(parents=True)
            for number in range(4):
                color = (200, 30, number) if kind == "a" else (10, 220, number)
                path = classes / split / kind / f"{number}.png"
                Image.new("RGB", (32, 32), color).save(path)
    return folder


@functools.cache
def run_once(recipe, arguments, small, run, encoder="random:tiny"):
    """The exit code of a command on a few small images."""
    config = parsed(recipe, arguments)
    if recipe == "evaluate":
        data = small / "set"
        layout = "folder"
        if config.layout == "class-folders":
            data, layout = small / "classes", config.layout
        if config.protocol == "video":
            data, layout = small / "davis", "auto"
        config = replace(
            config, encoders=(encoder,), data=data, layout=layout, mapping=None, fit="train",
            split="val", size=(64, 64), out=run, workers=0, draws=9, device="cpu", epochs=2,
            year=None,
        )  # fmt: skip
        return harness.main(evaluate.evaluate, config)
    if recipe == "openimages_mini":
        run.mkdir()
        files = test_openimages_mini.write(run, {"a": [("Dog", False), ("Tree", False)]})
        own = {x: getattr(files, x) for x in ("boxes", "classes", "out") if getattr(config, x)}
        return harness.main(openimages_mini.select, replace(config, coco=files.coco, **own))

    module, smaller, own = SMALL[recipe]
    kept = {x: getattr(smaller, x) for x in (*SHARED, *own) if hasattr(smaller, x)}
    if recipe in ("densesiam_segment", "picie"):
        kept |= {"data": small / "set", "layout": "folder", "mapping": None, "weights": None}
    elif recipe == "fcn":
        kept |= {"data": small / "set", "layout": "folder", "mapping": None}
    elif recipe != "detect":
        kept |= {"data": small / "photos", "epochs": 1, "batch": 4}
    if "bank" in own:
        kept["bank"] = 8
    if recipe in ("detect", "fcn"):
        kept["encoder"] = encoder
        if encoder != "random:tiny":
            kept |= {"steps": 1, "batch": 2, "save_every": 1}
    if recipe == "detect":
        kept["preset"] = "demo"  # the others ask for --data
    return harness.main(module.train, replace(config, run=run, **kept))


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "arguments"), COMMANDS)
def test_every_command_starts_and_ends_with_0(recipe, arguments, small, tmp_path):
    assert run_once(recipe, arguments, small, tmp_path / "run") == 0


def rows_of_others():
    """The encoders of the rows that train nothing, each with the commands that score it.

    Of those that differ in the data and the length of the training alone, it is the first one.
    """
    found = {}
    for section in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        encoders = re.findall(r"\| `((?:random|torchvision|timm):[^`]+)` \| started", section)
        for recipe, arguments in re.findall(r"^python recipes/(\w+)\.py (.*RUN.*)$", section, re.M):
            kind = re.findall(r"--(?:preset|detector|protocol|layout class\S+) \S+", arguments)
            for encoder in encoders:
                found.setdefault((encoder, recipe, *kind), (encoder, recipe, arguments))
    return sorted(found.values())


@pytest.fixture(scope="module")
def files_of_others(tmp_path_factory):
    """The weights of a network of timm in a file, as other people publish them."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("resnet50", "vit_small_patch16_224"):
        torch.manual_seed(0)
        torch.save(timm.create_model(name).state_dict(), folder / f"{name}.pth")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "recipe", "arguments"), rows_of_others())
def test_every_encoder_of_others_is_scored(
    encoder, recipe, arguments, small, files_of_others, tmp_path, monkeypatch
):
    """What timm and torchvision download has random weights here; a FILE is a file."""
    get_model = torchvision.models.get_model
    create_model = timm.create_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: get_model(name))
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, pretrained=False, **options: create_model(name, **options),
    )
    kind, name, *file = encoder.split(":")
    if file:
        encoder = f"{kind}:{name}:{files_of_others / f'{name}.pth'}"
    assert run_once(recipe, arguments, small, tmp_path / "run", encoder) == 0
    shutil.rmtree(tmp_path)  # checkpoints of half a gigabyte
