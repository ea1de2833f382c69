"""Files and command lines that are wrong in every way, against all that reads them.

    python tests/fuzz.py --cases 10000

A case makes a small valid input, spoils it, and reads it. The reader either returns checked values
or raises a UserError, whose sentence is one printable line. A case may take `--seconds` and
`--megabytes` of memory. What Hypothesis finds is printed with the input, as small as possible.

tests/recipes/test_fuzz.py runs a few cases of each target.
"""

import argparse
import contextlib
import copy
import importlib
import io
import json
import math
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes"), str(ROOT / "tests")]

import harness
import hypothesis
import numpy as np
import proposals
import safetensors.torch
import torch
from downstream import encoders, image_sets, object_sets, weights
from downstream.object_sets import Objects, object_classes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

CLASSES = ["other", "cat", "dog"]
SIDE = 6


class LimitError(Exception):
    """A case takes too long."""


# ---- wrong JSON ----------------------------------------------------------------------------------
WRONG = [
    *(None, True, False, 0, 1, -1, 2, 3, 0.7, -0.5, 5, 255, 256, 65536, 1e9, 2**31, 2**63, 10**30),
    *(1e300, 1e30, math.nan, math.inf, -math.inf, "", "abc", "7", "0.7", "nan", "1e999", "a.png"),
    *("../a.png", "/", "a\x1b[2J\n", "\ud800", "true", [], {}, [1, 2, 3], [[]], {"a": 1}),
    *([None] * 4, [math.nan] * 4, [0, 0, 1e9, 1e9], ["a", "b"], [[0, 0, 1, 1, 2, 2]]),
    *({"size": [SIDE, SIDE], "counts": [1, 1]}, {"size": [9**9, 9**9], "counts": "1"}),
]  # fmt: skip


def places(content: Any, place: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to each value of a JSON tree, the root among them."""
    yield place
    items = content.items() if isinstance(content, dict) else ()
    items = enumerate(content) if isinstance(content, list) else items
    for key, value in items:
        yield from places(value, (*place, key))


@st.composite
def spoiled(draw, content: Any) -> Any:
    """A JSON tree in which one value or a few are replaced, dropped, doubled or moved."""
    root = [copy.deepcopy(content)]
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(places(root[0]))))
        holder = root
        key = 0
        for step in place:
            holder = holder[key]
            key = step
        kind = draw(st.sampled_from(["replace", "replace", "replace", "drop", "double"]))
        if kind == "replace" or not place:
            holder[key] = draw(st.sampled_from(WRONG).map(copy.deepcopy))
        elif kind == "drop":
            del holder[key]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[draw(st.sampled_from(["a", "ignore", "iscrowd", "crowd", "area"]))] = holder[key]
    return root[0]


@st.composite
def broken(draw, content: bytes) -> bytes:
    """Bytes of which some are changed, cut off, doubled or put in."""
    data = bytearray(content)
    anywhere = draw(st.randoms(use_true_random=False))  # an integer of Hypothesis is often small
    for _ in range(draw(st.integers(1, 4))):
        place = anywhere.randrange(max(1, len(data)))
        kind = draw(st.sampled_from(["change", "change", "cut", "insert", "double"]))
        if kind == "change" and data:
            data[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[place:]
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=8))
        else:
            data[place:place] = data[place : place + 64]
    return bytes(data)


def write_json(draw: Callable, path: Path, content: Any) -> None:
    """The spoiled JSON, or at times the broken bytes of the valid one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if draw(st.integers(0, 5)):
        path.write_text(json.dumps(draw(spoiled(content))))
    else:
        path.write_bytes(draw(broken(json.dumps(content).encode())))


# ---- valid files ---------------------------------------------------------------------------------
def pixels(seed: int = 0, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, channels), np.uint8)
    return Image.fromarray(values)


def save_image(path: Path, image: Image.Image | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or pixels()).save(path)


def label_map() -> Image.Image:
    return Image.fromarray((np.arange(SIDE * SIDE) % 3).astype(np.uint8).reshape(SIDE, SIDE))


FOLDER = {
    "classes.json": {"labels": CLASSES, "ignore": 9, "background": 0},
    "splits.json": {"train": ["a.png"], "val": ["a.png", "b"]},
    "boxes.json": [
        {"id": "a.png", "h": SIDE, "w": SIDE, "objects": [{"cat": 1, "box": [0, 1, 3, 4]}]},
        {"id": "b.png", "objects": [{"cat": 2, "box": [1.5, 0, 6, 6], "crowd": 0, "area": 4}]},
    ],
}
POLYGON = [[0, 0, 4, 0, 4, 4, 0, 4]]
RUNS = {"size": [SIDE, SIDE], "counts": [6, 12, 18]}
COCO = {
    "images": [
        {"id": 1, "file_name": "a.png", "height": SIDE, "width": SIDE},
        {"id": 2, "file_name": "b.png", "height": SIDE, "width": SIDE},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 4, 4], "area": 16,
         "iscrowd": 0, "segmentation": POLYGON},
        {"id": 2, "image_id": 2, "category_id": 7, "bbox": [0, 1, 6, 2], "iscrowd": 1,
         "segmentation": RUNS},
    ],
}  # fmt: skip
PANOPTIC = {
    "images": COCO["images"],
    "categories": [{"id": 3, "name": "cat", "isthing": 1}, {"id": 7, "name": "sky", "isthing": 0}],
    "annotations": [
        {"image_id": k, "file_name": f"{name}.png", "segments_info": [
            {"id": 1, "category_id": 3, "bbox": [0, 0, 6, 3], "iscrowd": 0},
            {"id": 2, "category_id": 7}]}
        for k, name in ((1, "a"), (2, "b"))
    ],
}  # fmt: skip
MAPPING = {"names": ["thing", "rest"], "map": {"1": 0, "2": 1}, "things": 1}
XML = (
    "<annotation><size><width>6</width><height>6</height></size><object><name>cat</name>"
    "<difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>5</ymax>"
    "</bndbox></object></annotation>"
)


def make_folder(draw: Callable, root: Path, spoil: str) -> None:
    for name, content in FOLDER.items():
        (root / name).write_text(json.dumps(content))
    if spoil in FOLDER:
        write_json(draw, root / spoil, FOLDER[spoil])
    for name in ("a", "b"):
        save_image(root / "images" / f"{name}.png", pixels(ord(name)))
        save_image(root / "labels" / f"{name}.png", label_map())


def image_bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    """The bytes of an image file of this format of Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


# ---- readers -------------------------------------------------------------------------------------
def read_all(images: image_sets.ImageSet) -> None:
    """Read every image, and check the values."""
    classes = len(images.classes)
    assert all(isinstance(name, str) for name in images.classes)
    for index in range(len(images)):
        item = images[index]
        height, width = item.image.shape[1:]
        assert item.image.dtype == torch.uint8
        assert item.boxes.isfinite().all()
        corner = torch.tensor([width, height])
        assert ((item.boxes >= 0) & (item.boxes <= corner.repeat(2))).all()
        assert (item.boxes[:, 2:] > item.boxes[:, :2]).all()
        assert ((item.box_classes >= 0) & (item.box_classes < classes)).all()
        if item.labels is not None:
            known = item.labels != images.ignored
            assert item.labels.shape == (height, width)
            assert ((item.labels[known] >= 0) & (item.labels[known] < classes)).all()


def read_objects(root: Path, annotations: tuple[str, ...], detector: str) -> None:
    """As `detect` reads them."""
    found = object_sets.read(root, annotations)
    config = argparse.Namespace(data=root, detector=detector, seed=0)
    data = Objects(found, object_classes(found), config, train=True)
    for index in range(len(data)):
        _, (target,), *_ = data[0, index]
        assert target["boxes"].isfinite().all()
        assert ((target["labels"] >= 1) & (target["labels"] <= len(data.classes))).all()


def folder(draw: Callable, root: Path) -> None:
    make_folder(draw, root, draw(st.sampled_from(list(FOLDER))))
    if draw(st.booleans()):
        read_all(image_sets.open_images(root, "folder"))
    else:
        read_objects(root, ("val",), "faster-rcnn-c4")


def coco(draw: Callable, root: Path) -> None:
    write_json(draw, root / "annotations/instances_val2017.json", COCO)
    for name in ("a", "b"):
        save_image(root / "val2017" / f"{name}.png")
    if draw(st.booleans()):
        read_all(image_sets.open_images(root, "coco"))
    else:
        read_objects(root, ("annotations/instances_val2017.json",), "mask-rcnn-c4")


def panoptic(draw: Callable, root: Path) -> None:
    write_json(draw, root / "annotations/panoptic_val2017.json", PANOPTIC)
    ids = np.zeros((SIDE, SIDE, 3), np.uint8)
    ids[:3, :, 0] = 1
    ids[3:, :, 0] = 2
    for name in ("a", "b"):
        save_image(root / "val2017" / f"{name}.png")
        save_image(root / "annotations/panoptic_val2017" / f"{name}.png", Image.fromarray(ids))
    if draw(st.booleans()):
        read_all(image_sets.open_images(root, "coco-panoptic"))
    else:
        read_objects(root, ("annotations/panoptic_val2017.json",), "mask-rcnn-c4")


def mapping(draw: Callable, root: Path) -> None:
    make_folder(draw, root, "")
    write_json(draw, root / "mapping.json", MAPPING)
    read_all(image_sets.open_images(root, "folder", mapping=root / "mapping.json"))


def voc(draw: Callable, root: Path) -> None:
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "Annotations").mkdir()
    (root / "ImageSets/Main/val.txt").write_text("a\nb\n")
    for name in ("a", "b"):
        save_image(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(XML)
    (root / "Annotations/a.xml").write_bytes(draw(broken(XML.encode()) | words(XML)))
    if draw(st.integers(0, 3)) == 0:
        (root / "ImageSets/Main/val.txt").write_bytes(draw(list_lines()))
    if draw(st.booleans()):
        read_all(image_sets.open_images(root, "voc-main"))
    else:
        read_objects(root, ("val",), "faster-rcnn-c4")


def words(text: str) -> st.SearchStrategy[bytes]:
    """The text with another number or word somewhere."""
    new = ["nan", "inf", "-1", "1e99", "9" * 400, "cat", "", "0.5", "<a/>", "&lt;", "\x00", "7"]
    parts = [part for part in ("6", "1", "4", "5", "0", "cat", "width", "bndbox") if part in text]
    return st.builds(
        lambda old, other, count: text.replace(old, other, count).encode(),
        st.sampled_from(parts), st.sampled_from(new), st.integers(1, 3),
    )  # fmt: skip


def list_lines() -> st.SearchStrategy[bytes]:
    """Lines of a list of names."""
    known = [
        b"a", b"b", b"a.png", b"images/a.png", b"./a.png", b"", b" ", b"\xff", b"\x00", b"../x",
        b"a 1", b"b -1", b"a\x1b[2J", b"\xef\xbb\xbfa", b"\xff\xfea\x00", b"/etc/passwd", b".",
    ]  # fmt: skip
    ends = st.sampled_from([b"\n", b"\r\n", b"\r", b""])
    lines = st.lists(st.sampled_from(known) | st.binary(max_size=6), max_size=5)
    return st.builds(lambda parts, end: end.join(parts), lines, ends)


def lists(draw: Callable, root: Path) -> None:
    """A list as --data, as FolderImages reads it."""
    for name in ("a.png", "b.png"):
        save_image(root / name)
    (root / "list.txt").write_bytes(draw(list_lines()))
    images = harness.FolderImages(root / "list.txt")
    for index in range(len(images)):
        image, unreadable = images[index]
        assert image.shape[0] == 3
        assert all(len(harness.printable(line).splitlines()) == 1 for line in unreadable)


MODES = {
    "PNG": ("RGB", "L", "P", "RGBA", "I;16"),
    "JPEG": ("RGB", "L"),
    "TIFF": ("RGB", "L", "P", "RGBA", "I;16", "F"),
    "BMP": ("RGB", "L", "P"),
    "GIF": ("P", "L"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("RGB", "L"),
}


def images(draw: Callable, root: Path) -> None:
    """Image files of all formats, whose bytes are broken."""
    kind = draw(st.sampled_from(list(MODES)))
    mode = draw(st.sampled_from(MODES[kind]))
    if mode == "I;16":
        image = Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 999)
    else:
        image = pixels().convert(mode)
    path = root / f"a.{kind.lower()}"
    path.write_bytes(draw(broken(image_bytes(image, kind))))
    save_image(root / "b.png")
    read, unreadable = harness.FolderImages(root, [path.name, "b.png"])[0]
    assert read.dtype == torch.uint8
    assert read.shape[0] == 3
    assert all(line.isprintable() for line in map(harness.printable, unreadable))
    image_sets.read_frame(path)


def masks(draw: Callable, root: Path) -> None:
    """Label maps whose bytes are broken, or that are of another kind."""
    make_folder(draw, root, "")
    other = [
        label_map().convert("P"),
        label_map().convert("RGB"),
        pixels(),
        label_map().resize((9, 5)),
    ]
    content = image_bytes(draw(st.sampled_from([label_map(), *other])))
    if draw(st.booleans()):
        content = draw(broken(content))
    (root / "labels/a.png").write_bytes(content)
    read_all(image_sets.open_images(root, "folder"))


def side_car(draw: Callable, root: Path) -> None:
    """encoder.json beside its weights; the network itself is not built."""
    facts = {
        "architecture": "tiny",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.2],
        "color_order": "RGB",
        "method": "croc",
        "step": 3,
    }
    path = root / harness.ENCODER
    own = json.dumps(draw(spoiled(facts)) if draw(st.booleans()) else facts)
    safetensors.torch.save_file({"a": torch.zeros(2)}, path, {"facts": own})
    write_json(draw, path.with_suffix(".json"), facts)

    def fit(source: str, architecture: str, tensors: dict, found: dict, **_: Any) -> encoders.Start:
        assert isinstance(architecture, str)
        return encoders.Start(source, architecture, tensors, found)

    with mock.patch.object(encoders, "fit", fit):
        start = encoders.read_checkpoint(path)
    assert all(math.isfinite(x) for x in (*start.mean, *start.std))
    assert min(start.std) > 0
    assert start.architecture


TENSORS = {"conv.weight": torch.arange(6.0).view(2, 3), "conv.bias": torch.zeros(2)}


def weight_bytes() -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save({"model": TENSORS, "epoch": 3}, buffer)
    return {"a.pth": buffer.getvalue(), "a.safetensors": safetensors.torch.save(TENSORS)}


def checkpoints(draw: Callable, root: Path) -> None:
    """Weights of others, whose bytes are broken."""
    name, content = draw(st.sampled_from(list(weight_bytes().items())))
    path = root / name
    path.write_bytes(draw(broken(content)))
    tensors = weights.read_tensors(path)
    assert tensors
    assert all(isinstance(x, torch.Tensor) for x in tensors.values())


def proposal_files(draw: Callable, root: Path) -> None:
    """A file of proposals, and what a killed search leaves."""
    path = root / "a.npz"
    settings_of = {"schema": proposals.SCHEMA}
    fields = {
        "names": np.array([b"a.png", b"b.png"]),
        "sizes": np.array([[SIDE, SIDE]] * 2, np.int32),
        "offsets": np.array([0, 1, 2]),
        "boxes": np.array([[0, 0, 3, 3], [1, 1, 5, 6]], np.int32),
    }
    if draw(st.booleans()):
        key = draw(st.sampled_from(list(fields)))
        wrong = draw(st.sampled_from(
            [np.array([]), np.array(5), np.array([[9, 9, 1, 1]] * 2), np.array([-1, 0, 2]),
             np.array([math.nan, 0, 2]), np.array(["a", "b"]), np.array([2**62] * 3),
             fields[key].astype(float) if key != "names" else np.array([1, 2])]))  # fmt: skip
        fields[key] = wrong
    buffer = io.BytesIO()
    text = json.dumps(draw(spoiled(settings_of)) if draw(st.booleans()) else settings_of)
    np.savez_compressed(buffer, settings=text, **fields)
    content = buffer.getvalue()
    path.write_bytes(draw(broken(content)) if draw(st.booleans()) else content)
    partial = root / "a.npz.partial"
    row = ["a.png", [SIDE, SIDE], [[0, 0, 3, 3]]]
    lines = [json.dumps(settings_of), json.dumps(draw(spoiled(row)))]
    partial.write_text("\n".join(lines))
    for name in ("a.png", "b.png"):
        save_image(root / name)
    with contextlib.suppress(harness.UserError):
        proposals.read_earlier(root / "none.npz", partial, settings_of)
    source = proposals.ImagesWithProposals(root, path)
    for boxes in source.boxes:
        assert ((boxes >= 0) & (boxes <= 1)).all()


def openimages(draw: Callable, root: Path) -> None:
    """The files that the list of OpenImage-MINI is made of."""
    import openimages_mini

    write_json(draw, root / "coco.json", COCO)
    write_json(draw, root / "mapping.json", {"cat": ["Cat", "Lion"]})
    header = "ImageID,Source,LabelName,IsGroupOf\n"
    boxes = header + "a,x,/m/1,0\nb,x,/m/2,1\n"
    classes = "/m/1,Cat\n/m/2,Dog\n"
    (root / "boxes.csv").write_bytes(draw(st.just(boxes.encode()) | broken(boxes.encode())))
    (root / "classes.csv").write_bytes(draw(st.just(classes.encode()) | broken(classes.encode())))
    config = openimages_mini.Config(
        root / "boxes.csv", root / "classes.csv", root / "coco.json", root / "out.txt",
        mapping=draw(st.sampled_from([None, root / "mapping.json"])), images=None,
    )  # fmt: skip
    openimages_mini.select(config)


COMMANDS = (
    "minimal", "densesiam", "croc", "dupr", "d3ssl", "adapt", "densesiam_segment", "detect",
    "evaluate", "export", "proposals",
)  # fmt: skip
NUMBERS = ["0", "1", "-1", "2", "3", "7", "1000000"]
POSITIONAL = {
    "export": ["random:tiny", "--to", "timm", "--out", "a.pth"],
    "evaluate": ["random:tiny"],
    "proposals": ["."],
}
VALUES = [
    "", "0", "1", "-1", "2", "0.5", "nan", "inf", "-inf", "1e400", "abc", "None", "True", "7.5",
    "tiny", "/", ".", "--", "-", "a\x1b[2J", "é", "9" * 30, "random:tiny", "x.onnx", "onnx",
]  # fmt: skip


def command_lines(draw: Callable, root: Path) -> None:
    """Options of the recipes, whose values are wrong; nothing is trained."""
    name = draw(st.sampled_from(COMMANDS))
    recipe = importlib.import_module(name)
    options = OPTIONS.get(name) or OPTIONS.setdefault(name, options_of(recipe))
    few = st.lists(st.sampled_from(NUMBERS) | st.sampled_from(VALUES), min_size=1, max_size=2)
    pairs = st.tuples(st.sampled_from(options), few.map(lambda x: x[:1]) | few)
    arguments = list(POSITIONAL.get(name, []))
    for option, values in draw(st.lists(pairs, min_size=1, max_size=2)):
        arguments += [option, *values]
    if draw(st.integers(0, 9)) == 0:
        arguments += draw(few)
    with mock.patch.object(sys, "argv", [f"{name}.py", *arguments]):
        try:
            config = recipe.read_options()
        except SystemExit as end:
            assert end.code in (0, 2), arguments
            return
    getattr(recipe, "check_options", lambda _: None)(config)


OPTIONS: dict[str, list[str]] = {}


def options_of(recipe: Any) -> list[str]:
    """The options of a recipe, with two dashes."""
    found = []

    def collect(kind: Any, start: str) -> None:
        for name, field in kind.__dataclass_fields__.items():
            inner = getattr(field.type, "__dataclass_fields__", None)
            if inner:
                collect(field.type, f"{start}{name}.")
            found.append(f"--{start}{name}".replace("_", "-"))

    collect(recipe.Config, "")
    return found


TARGETS = {
    "folder": folder, "coco": coco, "panoptic": panoptic, "mapping": mapping, "voc": voc,
    "lists": lists, "images": images, "masks": masks, "side-car": side_car,
    "checkpoints": checkpoints, "proposals": proposal_files, "openimages": openimages,
    "command-lines": command_lines,
}  # fmt: skip


# ---- a case --------------------------------------------------------------------------------------
def run_case(target: str, draw: Callable, seconds: float, megabytes: int) -> None:
    """One case of a target; an error is a fault of the reader."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    alarm = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    streams = io.StringIO()
    folder_of_case = Path(tempfile.mkdtemp())
    try:
        with contextlib.redirect_stdout(streams), contextlib.redirect_stderr(streams):
            TARGETS[target](draw, folder_of_case)
    except harness.UserError as error:
        assert str(error).isprintable()
        assert len(str(error)) > 10
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        shutil.rmtree(folder_of_case)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < megabytes, f"a case has taken {grown:.0f} MB"


def out_of_time(*_: object) -> None:
    raise LimitError("a case does not end in its time")


def fuzz(target: str, cases: int, *, seed: int | None, seconds: float, megabytes: int) -> None:
    """So many cases of a target; `seed=None` draws the same ones every time."""

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=seed is None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data: Any) -> None:
        run_case(target, data.draw, seconds, megabytes)

    if seed is not None:
        check = hypothesis.seed(seed)(check)
    check()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="of all targets together")
    parser.add_argument("--target", choices=list(TARGETS), help="one of them alone")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--seconds", type=float, default=20.0, help="limit of a case")
    parser.add_argument("--megabytes", type=int, default=500, help="limit of a case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    targets = [options.target] if options.target else list(TARGETS)
    failed = []
    for target in targets:
        began = time.monotonic()
        count = math.ceil(options.cases / len(targets))
        try:
            fuzz(
                target, count, seed=options.seed, seconds=options.seconds,
                megabytes=options.megabytes,
            )  # fmt: skip
        except Exception as error:
            failed.append(target)
            traceback.print_exception(error)
        print(f"{target}: {count} cases, {time.monotonic() - began:.0f} s", flush=True)
    print(f"seed {options.seed}: {', '.join(failed) or 'nothing'} found")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
