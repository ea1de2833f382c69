"""Readers of COCO's files: instances, panoptic and COCO-Stuff.

This module is no command. Each reader makes the records of records.py.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import UserError
from torch import Tensor
from downstream.fields import (
    FieldError,
    corners,
    crowd_and_difficult,
    flags,
    get,
    is_in_image,
    items,
    list_of,
    number_or_none,
    segmentation,
    short,
    whole,
)
from downstream.label_files import (
    choose,
    choose_file,
    folder_names,
    read_json,
    read_panoptic_mask,
    reading,
    translate,
)
from downstream.records import (
    IGNORED,
    LabeledObject,
    LabeledSet,
    Mask,
    Record,
    class_table,
    distinct_names,
    pair_maps,
    with_background,
)

STUFF_CLASSES = 182  # of COCO-Stuff


# ---- what the files share ------------------------------------------------------------------------
class Info(NamedTuple):
    """An image in a file of COCO."""

    name: str  # file_name
    size: tuple[int, int]


def read_rows(rows: list, kind: str, key: str, read: Callable[[dict], None]) -> None:
    """Read each row; a FieldError becomes a sentence that names the row by its `key`."""
    for place, row in enumerate(rows):
        try:
            read(row)
        except FieldError as error:
            known = isinstance(row, dict) and key in row
            name = short(row[key]) if known else f"number {place} of the list"
            raise ValueError(f"{kind} {name} {error}") from None


def read_id(row: dict, key: str) -> Any:
    """An id is a whole number or a text; 1 and 1.0 are one, 1 and "1" are two."""
    value = get(row, key)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise FieldError(f"has the {key} {short(value)}: a whole number is needed")
    return value


def read_name(row: dict) -> str:
    """The name of a file; `./a.jpg` and `a.jpg` are one."""
    name = get(row, "file_name")
    if not isinstance(name, str) or not name:
        raise FieldError(f"has the file_name {short(name)}: a text is needed")
    return os.path.normpath(name)


def read_infos(data: dict) -> dict[Any, Info]:
    """The images by their ids, in the order of their names."""
    infos: dict[Any, Info] = {}
    id_of_name: dict[str, Any] = {}

    def read(row: dict) -> None:
        image_id = read_id(row, "id")
        name = read_name(row)
        size = (whole(get(row, "height"), "height", 1), whole(get(row, "width"), "width", 1))
        if image_id in infos:
            raise FieldError(f"stands twice: it is {infos[image_id].name} and {name}")
        if name in id_of_name:
            raise FieldError(f"is {name}, and so is the image {id_of_name[name]!r}")
        infos[image_id] = Info(name, size)
        id_of_name[name] = image_id

    read_rows(list_of(data, "images"), "the image", "id", read)
    return dict(sorted(infos.items(), key=lambda item: item[1].name))


class Categories(NamedTuple):
    names: list[str]
    number_of_id: dict[Any, int]  # the class of each category
    stuff: frozenset[int]


def read_categories(data: dict, first: int, *, is_thing: bool) -> Categories:
    """The categories in the order of their ids; their classes count from `first`.

    `is_thing` holds where a category does not say `isthing`.
    """
    found: dict[Any, tuple[Any, bool]] = {}

    def read(row: dict) -> None:
        category_id = read_id(row, "id")
        if category_id in found:
            raise FieldError("stands twice")
        thing = flags(row, ("thing",)).get("thing", is_thing)
        found[category_id] = (get(row, "name"), thing)

    read_rows(list_of(data, "categories"), "the category", "id", read)
    ids = sorted(found, key=lambda x: (isinstance(x, str), x))  # numbers, then texts
    number_of_id = {category_id: first + place for place, category_id in enumerate(ids)}
    names = distinct_names([found[x][0] for x in ids], ids)
    stuff = frozenset(number_of_id[x] for x in ids if not found[x][1])
    return Categories(names, number_of_id, stuff)


def find_by_id(row: dict, key: str, known: dict[Any, Any], kind: str) -> Any:
    """What a row refers to by an id."""
    value = read_id(row, key)
    if value not in known:
        raise FieldError(f"has the {key} {short(value)}, which no {kind} of the file has")
    return known[value]


def find_images(root: Path, path: Path, infos: dict[Any, Info]) -> Path:
    """The folder that the images of an annotation file lie in.

    It is the first of the known ones that has the first image: for instances_val2017.json
    ROOT/val2017, ROOT/images/val2017, ROOT/images and ROOT itself.
    """
    whole_split = path.stem.removeprefix("instances_").removeprefix("panoptic_")
    splits = dict.fromkeys([whole_split, path.stem.split("_")[-1]])
    places = [parent / split for split in splits for parent in (root, root / "images")]
    places += [root / "images", root]
    first = next(iter(infos.values())).name if infos else ""
    for place in places:
        if (place / first).is_file():
            return place
    return next(place for place in places if place.is_dir())


# ---- instances -----------------------------------------------------------------------------------
def open_instances(root: Path, split: str) -> LabeledSet:
    path = choose_file(split, root / "annotations", "instances_", ".json")
    return read_instances(root, path, read_json(path))


def read_instances(root: Path, path: Path, data: dict) -> LabeledSet:
    """Objects with masks: class 0 is the background."""
    with reading(path):
        infos = read_infos(data)
        categories = read_categories(data, first=1, is_thing=True)
        objects: dict[Any, list[LabeledObject]] = {image_id: [] for image_id in infos}

        def read(row: dict) -> None:
            info = find_by_id(row, "image_id", infos, "image")
            objects[read_id(row, "image_id")].append(read_object(row, info, categories))

        read_rows(list_of(data, "annotations"), "the annotation", "id", read)

    folder = find_images(root, path, infos)
    records = []
    for image_id, info in infos.items():
        own = objects[image_id]
        label_map = None
        if all(x.mask for x in own):  # else some pixels have no class
            label_map = partial(draw_objects, own, info.size)
        records.append(
            Record(info.name, folder / info.name, info.size, own, label_map, label_file=path)
        )
    classes = with_background(categories.names, list(categories.number_of_id))
    return LabeledSet(classes, records, 0, categories.stuff)


def read_object(row: dict, info: Info, categories: Categories) -> LabeledObject:
    class_number = find_by_id(row, "category_id", categories.number_of_id, "category")
    box = corners(get(row, "bbox"), "bbox")
    crowd, difficult = crowd_and_difficult(row)
    area = number_or_none(row.get("area"), "area")
    mask = None
    shape = segmentation(row.get("segmentation"), info.size)
    if shape is not None and is_in_image(shape, info.size):  # else there is nothing to learn
        mask = Mask(shape, info.size)
    return LabeledObject(box, class_number, crowd, difficult, mask, area)


def draw_objects(objects: list[LabeledObject], size: tuple[int, int], crowd: int | None) -> Tensor:
    """The class of each pixel, 0 where no object is.

    What is drawn later hides what is below: crowds first, then from large to small.
    """
    masks = []
    for x in objects:
        if x.mask is None:
            continue
        mask = torch.from_numpy(x.mask.draw())
        is_hidden = x.crowd and crowd is not None
        masks.append((x.crowd, int(mask.sum()), mask, crowd if is_hidden else x.number))
    masks.sort(key=lambda x: (not x[0], -x[1]))

    canvas = torch.zeros(size, dtype=torch.int64)
    for _, _, mask, class_number in masks:
        canvas[mask] = class_number
    return canvas


# ---- panoptic ------------------------------------------------------------------------------------
class Segments(NamedTuple):
    """The segments of an image, whose ids stand in a PNG."""

    file: Path
    number_of_id: dict[int, int]  # the class of each segment
    crowds: frozenset[int]  # ids
    things: list[LabeledObject]


def open_panoptic(root: Path, split: str) -> LabeledSet:
    path = choose_file(split, root / "annotations", "panoptic_", ".json")
    return read_panoptic(root, path, read_json(path))


def read_panoptic(root: Path, path: Path, data: dict) -> LabeledSet:
    """Things and stuff."""
    maps = path.with_suffix("")
    if not maps.is_dir():
        maps = root / path.stem
    with reading(path):
        infos = read_infos(data)
        categories = read_categories(data, first=0, is_thing=False)
        segments: dict[Any, Segments] = {}  # by the id of the image
        image_of_map: dict[str, Any] = {}

        def read(row: dict) -> None:
            info = find_by_id(row, "image_id", infos, "image")
            image_id = read_id(row, "image_id")
            name = read_name(row)
            if image_id in segments:
                raise FieldError(f"stands twice: in {segments[image_id].file.name} and {name}")
            if name in image_of_map:
                raise FieldError(f"has the map {name}, and so has the image {image_of_map[name]!r}")
            image_of_map[name] = image_id
            segments[image_id] = read_segments(row, maps / name, info, categories)

        read_rows(list_of(data, "annotations"), "the annotation of the image", "image_id", read)

    folder = find_images(root, path, infos)
    records = []
    for image_id, info in infos.items():
        record = Record(info.name, folder / info.name, info.size)
        if image_id in segments:
            own = segments[image_id]
            record = record._replace(
                objects=own.things, label_map=partial(draw_segments, own), label_file=own.file
            )
        records.append(record)
    return LabeledSet(categories.names, records, None, categories.stuff)


def read_segments(row: dict, file: Path, info: Info, categories: Categories) -> Segments:
    number_of_id = {0: IGNORED}
    crowds = set()
    things = []
    for segment in items(get(row, "segments_info"), "segments_info"):
        segment_id = whole(get(segment, "id"), "segment id", 1)
        if segment_id in number_of_id:
            raise FieldError(f"has the segment {segment_id} twice")
        class_number = find_by_id(segment, "category_id", categories.number_of_id, "category")
        number_of_id[segment_id] = class_number

        crowd, difficult = crowd_and_difficult(segment)
        if crowd:
            crowds.add(segment_id)
        if class_number not in categories.stuff:
            box = corners(get(segment, "bbox"), "bbox")
            mask = Mask(partial(draw_segment, file, segment_id, number_of_id), info.size)
            things.append(LabeledObject(box, class_number, crowd, difficult, mask))
    return Segments(file, number_of_id, frozenset(crowds), things)


def draw_segments(segments: Segments, crowd: int | None) -> Tensor:
    table = dict(segments.number_of_id)
    if crowd is not None:
        table |= dict.fromkeys(segments.crowds, crowd)
    return translate(read_panoptic_mask(segments.file), table, segments.file)


def draw_segment(file: Path, segment_id: int, known: dict[int, int]) -> np.ndarray:
    """The mask of a segment, whose ids are all `known`; one without a pixel is an error."""
    ids = read_panoptic_mask(file)
    translate(ids, known, file)
    mask = ids == segment_id
    if not mask.any():
        raise UserError(
            f"{file} has no pixel of the segment {segment_id}, which is listed: it has no mask. "
            "Take a faster-rcnn as --detector."
        )
    return mask.numpy()


# ---- COCO-Stuff ----------------------------------------------------------------------------------
def open_stuff(root: Path, split: str) -> LabeledSet:
    """The numbers of a PNG are the classes. An image without a PNG has no label map."""
    all_maps = root / "stuffthingmaps"
    splits = folder_names(all_maps)
    if not any(name.startswith(split) for name in splits):  # it may have images alone
        others = {"annotations", "images", "stuffthingmaps"}
        splits |= folder_names(root, root / "images") - others
    split = choose(split, splits, root)

    folder = root / split
    if not folder.is_dir():
        folder = root / "images" / split
    records = pair_maps(folder, all_maps / split, class_table(STUFF_CLASSES))
    classes = [str(number) for number in range(STUFF_CLASSES)]
    return LabeledSet(classes, records, label_folder=all_maps / split)
