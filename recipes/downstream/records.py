"""What a labeled set says of its images: the form that every reader makes of its files.

This module is no command. A record leaves nothing out and decides nothing: crowds and difficult
objects are marked in it. What they mean is for the two users of the records to say, image_sets.py
for evaluation and object_sets.py for detection. More: docs/recipes/labeled_images.md.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval import mask as coco_masks
from harness import UserError
from torch import Tensor
from downstream.fields import list_of, named_fields, short, whole
from downstream.label_files import (
    by_stem,
    check_files,
    list_images,
    read_mask,
    read_small_json,
    reading,
    translate,
    upright_size,
)

IGNORED = -1  # in the label map of a record: no class
BACKGROUNDS = ("background", "other")  # names of a class 0 that is none
SMALLEST = 0.01  # side of a box, in pixels: what is smaller has no area


# ---- objects -------------------------------------------------------------------------------------
class Mask(NamedTuple):
    """The pixels of an object, drawn when they are wanted."""

    shape: Any  # COCO's polygons or run lengths, of `fields.segmentation`; or `read`, a function
    size: tuple[int, int]  # height and width

    def draw(self) -> np.ndarray:
        """True inside, bool (height, width)."""
        runs = self.shape
        if callable(runs):
            return np.asarray(runs())
        if isinstance(self.shape, list):
            runs = coco_masks.merge(coco_masks.frPyObjects(self.shape, *self.size))
        elif isinstance(self.shape["counts"], list):
            runs = coco_masks.frPyObjects(self.shape, *self.size)
        return coco_masks.decode(runs) > 0

    def coco_form(self) -> list | dict:
        """COCO's polygons or run lengths."""
        if callable(self.shape):
            return coco_masks.encode(np.asfortranarray(self.shape(), dtype=np.uint8))
        return self.shape


class LabeledObject(NamedTuple):
    box: tuple[float, float, float, float]  # x0 y0 x1 y1 in pixels, half-open
    number: int  # its class, an index into the classes of the set
    crowd: bool = False  # many objects in one box, or what is to be ignored like them
    difficult: bool = False  # hard to recognize, in PASCAL VOC
    mask: Mask | None = None
    area: float | None = None  # in pixels, where the file says it


Box = Sequence[float]  # x0 y0 x1 y1


def clip_box(box: Box, size: Sequence[float]) -> list[float]:
    """The part of a box in an image of this height and width."""
    height, width = size
    x0, y0, x1, y1 = box
    return [max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height)]


def has_area(box: Box, size: Sequence[float]) -> bool:
    """Whether a box has an area in an image of this height and width; else it is no object."""
    x0, y0, x1, y1 = clip_box(box, size)
    return min(x1 - x0, y1 - y0) > SMALLEST


# ---- images --------------------------------------------------------------------------------------
class Record(NamedTuple):
    """One image. What is None, the set does not say of it."""

    name: str  # of the file, below the folder of the images; each name stands for one image
    image: Path | Tensor  # the file, or the image itself: uint8 (3, H, W)
    size: tuple[int, int] | None = None  # height and width, as the annotation says
    objects: list[LabeledObject] | None = None
    # `label_map(crowd)` draws the class of each pixel, int64 (H, W), IGNORED where there is none;
    # `crowd` is the number that the pixels of crowds get, and None leaves them their class.
    label_map: Callable[[int | None], Tensor] | None = None
    label_file: Path | None = None  # that the label map comes from
    classes: tuple[int, ...] | None = None  # those that the set gives to the whole image


def image_size(image: Path | Tensor) -> Sequence[int]:
    """Height and width of the `image` of a record; those of a file stand in its header."""
    return image.shape[1:] if isinstance(image, Tensor) else upright_size(image)


@dataclass
class LabeledSet:
    classes: list[str]
    records: list[Record]
    background: int | None = None  # the class that stands for no object
    stuff: frozenset[int] = frozenset()  # classes of surfaces: they have no objects
    layout: str = ""
    things: int = 0  # of a mapping: how many of the classes, the first ones, are things
    label_folder: Path | None = None  # where the label maps lie, if the layout can do without them

    def __post_init__(self) -> None:
        if not self.records or not self.classes:
            count = len(self.records)
            raise UserError(f"The set has {count} images and {len(self.classes)} classes.")
        counts = Counter(record.name for record in self.records)
        name, count = counts.most_common(1)[0]
        if count > 1:
            raise UserError(f"{count} images of the set are named {name}: each needs its own name.")
        images = [record.image for record in self.records]
        check_files(x for x in images if isinstance(x, Path))

    def check_labels(self) -> None:
        """A UserError where a label map is missing. Those who use the images alone don't ask."""
        label_files = dict.fromkeys(record.label_file for record in self.records)
        check_files(x for x in label_files if x is not None)

        unlabeled = [x for x in self.records if x.label_map is None and x.objects is None]
        if self.label_folder is not None and len(unlabeled) == len(self.records):
            raise UserError(
                f"{self.label_folder} has no label map of the {len(unlabeled)} images, such as "
                f"{Path(unlabeled[0].name).stem}."
            )


def read_label_map(path: Path, table: dict[int, int], crowd: int | None) -> Tensor:
    """The `label_map` of a record whose map is a PNG without crowds: numbers, and their classes."""
    return translate(read_mask(path), table, path)


def pair_maps(folder: Path, folder_of_maps: Path, table: dict[int, int]) -> list[Record]:
    """The images of a folder with the label maps of the same names; an image may have none."""
    images = by_stem(list_images(folder))
    maps = by_stem(list_images(folder_of_maps))
    records = []
    for stem in sorted({**images, **maps}):
        image = images.get(stem, folder / f"{stem}.jpg")  # or the file that is missed
        record = Record(image.name, image)
        if stem in maps:
            label_map = partial(read_label_map, maps[stem], table)
            record = record._replace(label_map=label_map, label_file=maps[stem])
        records.append(record)
    return records


def class_table(classes: int, ignored: int | None = None) -> dict[int, int]:
    """A table for numbers that are the classes themselves.

    No class are `ignored`, and 255; or 65535, where 255 is a class.
    """
    table = {number: number for number in range(classes)}
    table[255 if classes <= 255 else 65535] = IGNORED
    if ignored is not None:
        table[ignored] = IGNORED
    return table


# ---- classes -------------------------------------------------------------------------------------
def distinct_names(names: Sequence[Any], marks: Sequence[Any]) -> list[str]:
    """Names of classes, as text; those that occur twice get their marks: `bat (5)`, `bat (9)`.

    A ValueError, unless each is a text or a whole number.
    """
    for name in names:
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise ValueError(f"it names a class {short(name)}: a text is needed")
    texts = [str(name) for name in names]
    counts = Counter(texts)
    found = []
    for text, mark in zip(texts, marks, strict=True):
        if counts[text] > 1:
            text = f"{text} ({mark})"
        found.append(text)
    is_distinct = len(set(found)) == len(found)  # else a name was what another one has become
    return found if is_distinct else distinct_names(found, range(len(found)))


def with_background(names: list[str], marks: Sequence[Any]) -> list[str]:
    """The background and the classes; one of these that has its name gets its mark."""
    classes = ["background"]
    for name, mark in zip(names, marks, strict=True):
        is_taken = name == "background"
        own_name = f"{name} ({mark})" if is_taken else name
        classes.append(own_name)
    return classes


def find_background(classes: list[str]) -> int | None:
    """Class 0, if its name says that it is none."""
    return 0 if classes and classes[0].lower() in BACKGROUNDS else None


class Mapping(NamedTuple):
    names: list[str]  # of the new classes
    new_of_old: dict[int, int]
    things: int


def read_mapping(path: Path, classes: int) -> Mapping:
    """Other classes of a set that has this many: {"names": [...], "map": {"OLD": NEW, ...}}."""
    content = read_small_json(path)
    new_of_old = {}
    with reading(path):
        listed = list_of(content, "names")
        names = distinct_names(listed, range(len(listed)))
        for key, value in named_fields(content["map"], "it has the map").items():
            old = whole(key, "old class")
            new = whole(value, "new class")
            if old >= classes or new >= len(names):
                raise ValueError(
                    f"it maps {key} to {value}: the old classes are 0 to {classes - 1}, the new "
                    f"ones 0 to {len(names) - 1}"
                )
            if old in new_of_old:
                raise ValueError(f"it maps the class {old} twice")
            new_of_old[old] = new

        things = whole(content.get("things", 0), "number of things")
        if things > len(names):
            raise ValueError(f"it has {things} things: give at most {len(names)}, its classes")
    return Mapping(names, new_of_old, things)


def change_classes(found: LabeledSet, path: Path) -> LabeledSet:
    """The set with the classes of a mapping; all others are no classes any more."""
    mapping = read_mapping(path, len(found.classes))
    new_of_old = mapping.new_of_old
    table = {number: new_of_old.get(number, IGNORED) for number in range(len(found.classes))}
    table[IGNORED] = IGNORED

    records = []
    for record in found.records:
        objects = record.objects
        if objects is not None:
            known = [x for x in objects if x.number in new_of_old]
            objects = [x._replace(number=new_of_old[x.number]) for x in known]
        label_map = record.label_map
        if label_map is not None:
            label_map = partial(draw_changed, label_map, table, record.name)
        classes = record.classes
        if classes is not None:
            classes = tuple(new_of_old[x] for x in classes if x in new_of_old)
        records.append(record._replace(objects=objects, label_map=label_map, classes=classes))

    of_stuff = {new for old, new in new_of_old.items() if old in found.stuff}
    of_things = {new for old, new in new_of_old.items() if old not in found.stuff}
    return replace(
        found,
        classes=mapping.names,
        records=records,
        background=new_of_old.get(found.background),
        stuff=frozenset(of_stuff - of_things),
        things=mapping.things,
    )


def draw_changed(
    draw: Callable[[int | None], Tensor], table: dict[int, int], name: str, crowd: int | None
) -> Tensor:
    """The `label_map` of a record in the classes of a mapping."""
    return translate(draw(crowd), table, name)
