"""Files and command lines that are wrong in every way, against all that reads them.

    python tests/fuzz.py --cases 10000

A case makes a small valid input, spoils it, and reads it as a command does. It either gets checked
values, or one printable line that says what is wrong. A case may take `--seconds` and `--megabytes`
of memory. What Hypothesis finds is printed with the input, as small as possible.

tests/recipes/test_fuzz.py runs a few cases of each target.
"""

import argparse
import atexit
import contextlib
import copy
import dataclasses
import faulthandler
import functools
import importlib
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
import tifffile
import torch
from downstream import bands, encoders, image_sets, object_sets, weights
from downstream.object_sets import Objects, object_classes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

CLASSES = ["other", "cat", "dog"]
SIDE = 6


class LimitError(BaseException):
    """A case takes too long. Readers that heed any exception of broken bytes do not heed this."""


# ---- wrong JSON ----------------------------------------------------------------------------------
WRONG = [
    *(None, True, False, 0, 1, -1, 2, 3, 0.7, -0.5, 5, 255, 256, 65536, 1e9, 2**31, 2**63, 10**30),
    *(1e300, 1e30, math.nan, math.inf, -math.inf, "", "abc", "7", "0.7", "nan", "1e999", "a.png"),
    *("../a.png", "/", "a\x1b[2J\n", "\ud800", "a\0b", "b" * 300, "true", [], {}, [1, 2, 3], [[]]),
    *({"a": 1}, [None] * 4, [math.nan] * 4, [0, 0, 1e9, 1e9], ["a", "b"], [[0, 0, 1, 1, 2, 2]]),
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
    if draw(st.booleans()):
        facts |= {"channels": 5, "mean": [0.5] * 5, "std": [0.2] * 5, "color_order": "file"}
        facts |= {"value_range": [0, 4095], "clip": True, "channel_init": "mean"}
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
    known = bands.bands_of(start.facts)
    assert known is None or len(known.mean) == len(known.std) == start.channels


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


@functools.cache
def tiny() -> Any:
    """A small network; it is built once, which takes longer than a case."""
    with harness.seeded(0):
        return encoders.build("tiny")


PREFIXES = ["", "module.", "backbone.", "encoder_q.", "teacher.backbone.", "_orig_mod.", "a.b.c."]
STRANGE = [
    torch.zeros(0), torch.tensor(1.0), torch.full((2, 3), math.nan), torch.zeros([1] * 9),
    torch.zeros(3, dtype=torch.int), torch.zeros(2, 2, dtype=torch.complex64),
    torch.zeros(4, dtype=torch.bool), torch.zeros(3, dtype=torch.bfloat16),
    torch.eye(3).to_sparse(), torch.zeros(1).expand(9, 9), torch.zeros(2, device="meta"),
    None, 5, "text", [torch.zeros(2)], {}, {"a": [1]}, math.nan, b"\xff", (1, 2),
    {7: torch.ones(1)},
]  # fmt: skip


def layouts_of_weights(draw: Callable, root: Path) -> None:
    """Weights under other names, in other wrappers, of other shapes and types."""
    own = tiny().state_dict()
    tensors: dict[Any, Any] = dict(own)
    names = list(tensors)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(names))
        kind = draw(st.sampled_from(["drop", "replace", "rename", "type", "shape", "bad"]))
        x = tensors.pop(name, None)
        if x is None or kind == "drop":
            continue
        if kind == "replace":
            tensors[name] = draw(st.sampled_from(STRANGE))
        elif kind == "rename":
            new = ["", ".", "..", 5, None, "a\x1b[2J", f"{name}.", f".{name}", "layer9.0.weight"]
            tensors[draw(st.sampled_from(new))] = x
        elif not isinstance(x, torch.Tensor):
            continue
        elif kind == "type":
            types = [torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64]
            tensors[name] = x.to(draw(st.sampled_from([*types, torch.float8_e4m3fn])))
        elif kind == "shape":
            tensors[name] = draw(
                st.sampled_from([x[None], x.flatten(), x[..., None], x.flatten()[:0]])
            )
        else:
            tensors[name] = x.double() * draw(st.sampled_from([math.nan, math.inf, 1e300]))
    prefix = draw(st.sampled_from(PREFIXES))
    content: Any = {f"{prefix}{k}" if prefix else k: x for k, x in tensors.items()}
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from(["state_dict", "model", "teacher", "student", "", 0]))
        content = {key: content, "epoch": 3, "args": draw(st.sampled_from(STRANGE))}
    if draw(st.integers(0, 9)) == 0:
        content = draw(st.sampled_from(STRANGE))
    path = root / draw(st.sampled_from(["a.pth", "a.pt", "a.bin", "a.safetensors", "a"]))
    if path.suffix == ".safetensors":
        flat = {str(k): x for k, x in weights.flatten(content).items() if not x.is_sparse}
        flat = {k: x.contiguous().clone() for k, x in flat.items() if not x.is_meta}
        path.write_bytes(safetensors.torch.save(flat))
    else:
        torch.save(content, path)
    with mock.patch.object(encoders, "build", return_value=tiny()):
        start = encoders.find_start(str(path), "tiny")
    assert all(x.isfinite().all() for x in start.weights.values())
    assert {k: x.dtype for k, x in start.weights.items()} == {k: x.dtype for k, x in own.items()}


# ---- images of any channels ----------------------------------------------------------------------
TYPES = ["u1", "i1", "u2", "i2", "u4", "f2", "f4", "f8", ">u2", ">f4", "?", "c8", "U1", "V3", "i8"]
SHAPES = [
    (5, SIDE, SIDE), (SIDE, SIDE, 5), (SIDE, SIDE), (3, SIDE, SIDE), (SIDE, SIDE, 3), (1, 1, 1),
    (0, SIDE, SIDE), (2, 5, SIDE, SIDE), (SIDE,), (), (33, 33, 33), (40, 7, 50), (5, 40, 1),
]  # fmt: skip
HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 5, 5), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-5, 5, 5), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (10**30, 5), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (5, 6, 6), }",
    "{'descr': [('a', '<f4'), ('b', '|O')], 'fortran_order': False, 'shape': (6, 6), }",
    "{'descr': '<f4', 'fortran_order': 5, 'shape': [5, 6, 6], }",
    "{'descr': '<f4', 'shape': (5, 6, 6), }", "[" * 900, "__import__('os').getcwd()", "",
]  # fmt: skip


def array_bytes(draw: Callable, name: str) -> bytes:
    """An array as npy or TIFF, of any shape and type."""
    shape = draw(st.sampled_from(SHAPES))
    values = np.random.default_rng(0).integers(0, 2, shape).astype(draw(st.sampled_from(TYPES)))
    if values.dtype.kind == "f" and draw(st.integers(0, 3)) == 0 and values.size:
        values.flat[:: draw(st.integers(1, 5))] = draw(st.sampled_from([np.nan, np.inf, 1e30]))
    buffer = io.BytesIO()
    if name.endswith(".npy"):
        np.save(buffer, values)
        if draw(st.integers(0, 4)) == 0:
            header = draw(st.sampled_from(HEADERS)).encode() + b"\n"
            size = len(header).to_bytes(2, "little")
            return b"\x93NUMPY\x01\x00" + size + header + bytes(draw(st.sampled_from([0, 720])))
        return buffer.getvalue()
    more: dict[str, Any] = draw(st.sampled_from([
        {}, {"compression": "zlib"}, {"planarconfig": "separate"}, {"tile": (16, 16)},
        {"imagej": True}, {"byteorder": ">"}, {"bigtiff": True},
        {"extratags": [(harness.NO_DATA, "s", 0, "nan", True)]},
        {"extratags": [(harness.NO_DATA, "s", 0, "\xff" * 9, True)]},
        {"extratags": [(bands.ORIENTATION, "H", 1, 9, True)]},
        {"extratags": [(bands.ORIENTATION, "s", 0, "six", True)]},
    ]))  # fmt: skip
    with contextlib.suppress(Exception):  # what tifffile does not write
        tifffile.imwrite(buffer, values, photometric="minisblack", **more)
    return buffer.getvalue()


def band_files(draw: Callable, root: Path) -> None:
    """Folders of arrays and TIFFs with any channels, as `adapt` reads them."""
    ends = [".npy", ".tif", ".TIFF", ".png", ".jpg"]
    for number in range(draw(st.integers(1, 3))):
        name = f"{number}{draw(st.sampled_from(ends))}"
        content = (
            array_bytes(draw, name.lower()) if draw(st.integers(0, 5)) else image_bytes(pixels())
        )
        (root / name).write_bytes(draw(broken(content)) if draw(st.booleans()) else content)
    channels = draw(st.sampled_from(["auto", "auto", "rgb", 1, 3, 5, 6]))
    limits = draw(st.sampled_from([None, None, (0.0, 1.0), (-5.0, 1e9)]))
    told = bands.Bands(5, (0.0, 1.0), False, (0.5,) * 5, (0.2,) * 5)
    known = draw(st.sampled_from([None, None, told]))
    source = bands.open_folder(root, channels, limits, known, harness.PATIENCE)
    if not isinstance(source, bands.BandImages):
        for index in range(len(source)):
            assert source[index][0].shape[0] == 3
        return
    bands.complete(source, None, None)
    assert all(map(math.isfinite, (*source.bands.mean, *source.bands.std)))
    assert min(source.bands.std) > 0
    for index in range(len(source)):
        stored, _ = source[index]
        image = bands.to_floats(stored, source.bands)
        assert image.shape[0] == source.channels
        assert image.isfinite().all()
        assert bands.to_pictures(image).isfinite().all()


# ---- run folders ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class RunConfig:
    data: Path
    lr: float = 0.1
    keep: tuple[int, ...] = ()
    changed_data: bool = False


STEPS = (2, 4)  # of its checkpoints


def build_model() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    for x in net.parameters():
        x.data.fill_(0.1)
    return net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)


def use_run(folder: Path, config: RunConfig, last: int) -> dict[int, torch.Tensor]:
    """Resume a run and make its steps up to the last; the weights at each of its checkpoints."""
    found = {}
    net, optimizer = build_model()
    bank = {"keys": torch.zeros(5, 2), "position": torch.tensor(0)}
    facts = {"architecture": "tiny", "mean": [0.5] * 3, "std": [0.2] * 3, "method": "fuzz"}
    with harness.process_group("cpu") as world, harness.Run(folder, config, world) as run:
        step = run.resume(net, optimizer, bank=bank)
        found[step] = net[0].weight.detach().clone()
        while step < last:
            loss = net(torch.arange(6.0).view(2, 3)).sum()
            loss.backward()
            run.record(step, {"loss": loss})
            optimizer.step()
            step += 1
            run.note_unreadable([f"{step}.png: broken"])
            run.log(step, **run.take_means(), unreadable=run.unreadable)
            if step in STEPS:
                run.picture_path(step).touch()
                run.save(step, net, optimizer, encoder=net, facts=facts, bank=bank)
                found[step] = net[0].weight.detach().clone()
        assert all(type(row["step"]) is int for row in run.rows("loss"))
    return found


WEIGHTS: dict[int, torch.Tensor] = {}  # of the run, by step


@functools.cache
def made_run() -> Path:
    """A run folder with two checkpoints, made once; its images lie beside it."""
    home = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, home)
    save_image(home / "images/a.png")
    WEIGHTS.update(use_run(home / "run", RunConfig(home / "images"), max(STEPS)))
    return home / "run"


class Strange:
    """What pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@functools.cache
def strange_metadata() -> st.SearchStrategy[bytes]:
    """Pickles in place of the metadata of a checkpoint."""
    checkpoint = made_run() / "checkpoints" / "step-00000004"
    metadata = harness.PlainReader(checkpoint).read_metadata()
    loop: list = []
    loop.append(loop)
    others = [None, 5, {}, [], loop, "a", b"a" * 99, metadata.state_dict_metadata]
    for field in dataclasses.fields(metadata):
        for value in (None, {}, {"a": 1}, {5: metadata}, [1], Strange(os.getcwd), math.nan):
            other = copy.copy(metadata)
            setattr(other, field.name, value)
            others.append(other)
    for index, part in metadata.storage_data.items():
        for name, value in [
            ("offset", -5), ("offset", 2**40), ("length", 2**40), ("length", -1), ("offset", "a"),
            ("relative_path", "../../config.json"), ("relative_path", "/etc/passwd"),
            ("relative_path", 5), ("relative_path", "."),
        ]:  # fmt: skip
            changed = copy.copy(part)
            setattr(changed, name, value)
            other = copy.copy(metadata)
            other.storage_data = {**metadata.storage_data, index: changed}
            others.append(other)
    for name, entry in metadata.state_dict_metadata.items():
        if hasattr(entry, "size"):
            for size in (torch.Size([2**40]), torch.Size([]), (3, "a"), None):
                changed = copy.copy(entry)
                changed.size = size
                other = copy.copy(metadata)
                other.state_dict_metadata = {**metadata.state_dict_metadata, name: changed}
                others.append(other)
    contents = [pickle.dumps(x) for x in (*others, Strange(os.system, "true"), Strange(eval, "1"))]
    return st.sampled_from(contents)


def spoil_run(draw: Callable, folder: Path) -> bool:
    """Spoil one thing in a run folder; whether what is there may be other weights."""
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    if not paths:
        return False
    path = folder / draw(st.sampled_from(paths))
    kinds = ["empty", "remove", "rename", "folder", "file", "link", "loop", "move"]
    if path.is_file():
        kinds += ["break"] * 4
        if path.suffix in (".json", ".jsonl"):
            kinds += ["spoil"] * 6
        if path.name == ".metadata":
            kinds += ["pickle"] * 12
    kind = draw(st.sampled_from(kinds))
    if kind == "break":
        path.write_bytes(draw(broken(path.read_bytes())))
    elif kind == "spoil":
        lines = path.read_bytes().splitlines() if path.suffix == ".jsonl" else [path.read_bytes()]
        place = draw(st.integers(0, max(0, len(lines) - 1)))
        with contextlib.suppress(ValueError, IndexError):  # it is broken already
            lines[place] = json.dumps(draw(spoiled(json.loads(lines[place])))).encode()
        path.write_bytes(b"\n".join(lines))
    elif kind == "pickle":
        path.write_bytes(draw(strange_metadata()))
    else:
        aside = path.with_name(
            draw(st.sampled_from(["a\x1b[2J", "step-00000009", "b" * 200, ".x", "step-", "é"]))
        )
        if not aside.exists() and not aside.is_symlink():
            path.rename(aside)
        if kind == "empty" and aside.is_file():
            path.touch()
        elif kind in ("folder", "empty"):
            path.mkdir()
        elif kind == "file":
            path.write_bytes(draw(st.binary(max_size=9)))
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "link":
            targets = [".", "..", "../nowhere", "../../nowhere", "/dev/null", aside.name]
            path.symlink_to(draw(st.sampled_from(targets)))
    forged = draw(st.sampled_from(["no", "no", "forged", "without"]))
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if forged == "without":
            (checkpoint / harness.CHECKSUMS).unlink(missing_ok=True)
        elif forged == "forged" and (checkpoint / harness.CHECKSUMS).is_file():
            with contextlib.suppress(OSError):
                harness.write_checksums(checkpoint)
    return forged != "no" or path.name == harness.CHECKSUMS


def run_folders(draw: Callable, root: Path) -> None:
    """A run folder of which something is spoiled, resumed and trained on."""
    whole = made_run()
    folder = root / "run"
    shutil.copytree(whole, folder)
    is_forged = False
    for _ in range(draw(st.integers(1, 3))):
        is_forged |= spoil_run(draw, folder)
    config = RunConfig(whole.parent / "images", changed_data=draw(st.booleans()))
    try:
        with contextlib.suppress(harness.UserError), mock.patch.object(encoders, "fit"):
            encoders.read_checkpoint(folder)
        found = use_run(folder, config, max(STEPS))
    except FileNotFoundError:  # what fell is the folder itself
        assert not folder.exists()
        return
    if not is_forged:
        for step, weight in found.items():
            assert step == 0 or torch.equal(weight, WEIGHTS[step])
    assert use_run(folder, config, max(STEPS))  # and what is left is a run


def run_configurations(draw: Callable, root: Path) -> None:
    """Configurations and data that have changed since a run began."""
    whole = made_run()
    folder = root / "run"
    shutil.copytree(whole, folder)
    content = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(draw(spoiled(content))))
    config = RunConfig(whole.parent / "images", changed_data=draw(st.booleans()))
    use_run(folder, config, max(STEPS))


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
    lines = [json.dumps(draw(spoiled(settings_of))) if draw(st.integers(0, 3)) == 0 else "{}"]
    lines += [json.dumps(settings_of), json.dumps(draw(spoiled(row)))]
    text = "\n".join(lines).encode()
    partial.write_bytes(draw(broken(text)) if draw(st.booleans()) else text)
    for name in ("a.png", "b.png"):
        save_image(root / name)
    for out in (root / "none.npz", path):
        with contextlib.suppress(harness.UserError):
            proposals.read_earlier(out, partial, settings_of)
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
        root / "coco.json", root / "boxes.csv", root / "classes.csv", root / "out.txt",
        mapping=draw(st.sampled_from([None, root / "mapping.json"])), images=None,
    )  # fmt: skip
    openimages_mini.select(config)


COMMANDS = (
    "minimal", "densesiam", "croc", "dupr", "d3ssl", "soco", "adapt", "densesiam_segment",
    "picie", "detect", "fcn", "evaluate", "export", "proposals", "openimages_mini",
)  # fmt: skip
NUMBERS = ["0", "1", "-1", "2", "3", "7", "1000000"]
POSITIONAL = {
    "export": ["random:tiny", "--to", "timm", "--out", "a.pth"],
    "evaluate": ["random:tiny"],
    "proposals": ["."],
    "openimages_mini": ["--boxes", "b", "--classes", "c", "--coco", "d", "--out", "e.txt"],
}
VALUES = [
    "", "0", "1", "-1", "2", "0.5", "nan", "inf", "-inf", "1e400", "abc", "None", "True", "7.5",
    "tiny", "/", ".", "--", "-", "a\x1b[2J", "é", "9" * 30, "random:tiny", "x.onnx", "onnx",
    "9" * 5000, "1e308", "-0.0", "\u0663", "1_000", "0x10", "\udcff", "\ud800", "a" * 300, "~",
    "b/" * 3000, "/dev/null", "/proc/self/mem", "random:", "timm:", "torchvision:", "a:b:c", "\n",
    "random:nowhere", "timm:a/b", "timm:hf-hub:", "lite0", "[1]", "{}", "1,2", "=", "*", "%s",
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
    os.chdir(root)
    with (
        mock.patch.object(sys, "argv", [f"{name}.py", *arguments]),
        contextlib.redirect_stderr(io.StringIO()),  # tyro repeats what it does not know
    ):
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
    "checkpoints": checkpoints, "weights": layouts_of_weights, "bands": band_files,
    "run-folders": run_folders, "configurations": run_configurations,
    "proposals": proposal_files, "openimages": openimages, "command-lines": command_lines,
}  # fmt: skip


# ---- a case --------------------------------------------------------------------------------------
RUN = {"cases": 0}


def run_case(target: str, draw: Callable, seconds: float, megabytes: int) -> None:
    """One case of a target, as a command; an error is a fault of the reader."""
    RUN["cases"] += 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    alarm = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(10 * seconds, exit=True)  # in what does not come back
    errors = io.StringIO()
    here = os.getcwd()
    folder_of_case = Path(tempfile.mkdtemp())
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            code = harness.main(lambda _: TARGETS[target](draw, folder_of_case), None)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        os.chdir(here)
        shutil.rmtree(folder_of_case)
    assert time.process_time() - began < seconds, "a case does not end in its time"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < megabytes, f"a case has taken {grown:.0f} MB"
    lines = errors.getvalue().replace("\r", "\n").split("\n")  # \r is of progress bars
    assert all(line.isprintable() for line in lines), lines
    assert code in (0, 2)
    if code:
        assert lines[-1] == ""
        assert lines[-2].startswith("error: ")
        assert len(lines[-2]) > 18


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
    # What a case asks for beyond this fails at once, before the machine has to swap.
    limit = 2**36  # address space; torch alone maps gigabytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    targets = [options.target] if options.target else list(TARGETS)
    failed = []
    for target in targets:
        began = time.monotonic()
        before = RUN["cases"]
        count = math.ceil(options.cases / len(targets))
        try:
            fuzz(
                target, count, seed=options.seed, seconds=options.seconds,
                megabytes=options.megabytes,
            )  # fmt: skip
        except Exception as error:
            failed.append(target)
            traceback.print_exception(error)
        done = RUN["cases"] - before
        print(f"{target}: {done} cases, {time.monotonic() - began:.0f} s", flush=True)
    taken = time.process_time()
    found = ", ".join(failed) or "nothing"
    print(f"seed {options.seed}: {RUN['cases']} cases, {taken:.0f} s of CPU time, {found} found")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
