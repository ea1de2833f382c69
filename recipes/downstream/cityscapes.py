"""Reader of Cityscapes, its fine annotations.

This module is no command. It makes the records of records.py.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import mask as coco_masks
from torchvision.datasets import Cityscapes
from downstream.label_files import choose_folder, read_mask
from downstream.records import (
    IGNORED,
    LabeledObject,
    LabeledSet,
    Mask,
    Record,
    read_label_map,
)

IMAGE_END = "_leftImg8bit.png"
# The ids of the classes that have objects: person, rider, car, truck, bus, train and two-wheelers.
OBJECT_IDS = [x.id for x in Cityscapes.classes if x.has_instances and not x.ignore_in_eval]


def open_set(root: Path, split: str) -> LabeledSet:
    """The 19 classes that count, by their train ids."""
    split, cities = choose_folder(split, root / "leftImg8bit")
    classes = [x.name for x in Cityscapes.classes if x.train_id in range(19)]
    table = {255: IGNORED}  # license plates, whose id is -1
    for x in Cityscapes.classes:
        if x.id >= 0:
            table[x.id] = x.train_id if x.train_id in range(19) else IGNORED

    records = []
    for image in sorted(cities.glob(f"[!.]*/[!.]*{IMAGE_END}")):
        name = image.relative_to(cities).as_posix()
        label_file = annotation(root, split, name, "labelIds")
        label_map = partial(read_label_map, label_file, table)
        records.append(Record(name, image, label_map=label_map, label_file=label_file))
    return LabeledSet(classes, records)


def annotation(root: Path, split: str, name: str, kind: str) -> Path:
    """The PNG of this kind that belongs to an image."""
    return root / "gtFine" / split / f"{name.removesuffix(IMAGE_END)}_gtFine_{kind}.png"


# ---- objects -------------------------------------------------------------------------------------
def read_objects(root: Path, splits: tuple[str, ...]) -> LabeledSet:
    """The objects of the eight classes that have some, with their masks."""
    classes = [x.name for x in Cityscapes.classes if x.id in OBJECT_IDS]
    records = []
    for wanted in dict.fromkeys(splits):
        split, cities = choose_folder(wanted, root / "leftImg8bit")
        for image in sorted(cities.glob(f"[!.]*/[!.]*{IMAGE_END}")):
            name = image.relative_to(cities).as_posix()
            numbers = read_mask(annotation(root, split, name, "instanceIds")).numpy()
            objects = list(objects_of(numbers))
            records.append(Record(f"{split}/{name}", image, numbers.shape, objects))
    return LabeledSet(classes, records)


def objects_of(numbers: np.ndarray) -> Iterator[LabeledObject]:
    """The objects in a map of instance ids: 26003 is the car 3, and 26 is a crowd of cars.

    The runs of equal ids, column after column, are found once. They are the objects' masks.
    """
    height, width = numbers.shape
    column_by_column = numbers.T.ravel()
    is_start = np.ones(len(column_by_column), dtype=bool)
    is_start[1:] = column_by_column[1:] != column_by_column[:-1]
    is_start[::height] = True  # each run lies in one column
    starts = np.flatnonzero(is_start)
    stops = np.append(starts[1:], len(column_by_column))
    ids = column_by_column[starts]

    for instance in np.unique(ids).tolist():
        is_crowd = instance < 1000
        class_id = instance if is_crowd else instance // 1000
        if class_id not in OBJECT_IDS:
            continue
        own_starts = starts[ids == instance]
        own_stops = stops[ids == instance]
        columns = own_starts // height
        tops = own_starts - columns * height
        bottoms = own_stops - columns * height
        yield LabeledObject(
            box=(
                float(columns.min()),
                float(tops.min()),
                float(columns.max() + 1),
                float(bottoms.max()),
            ),
            number=OBJECT_IDS.index(class_id),
            crowd=is_crowd,
            mask=Mask(run_lengths(own_starts, own_stops, (height, width)), (height, width)),
        )


def run_lengths(starts: np.ndarray, stops: np.ndarray, size: tuple[int, int]) -> Any:
    """COCO's compressed run lengths of the pixels from each start to its stop."""
    height, width = size
    edges = np.stack([starts, stops], 1).ravel()
    counts = np.diff(edges, prepend=0, append=height * width)
    return coco_masks.frPyObjects({"size": list(size), "counts": counts.tolist()}, *size)
