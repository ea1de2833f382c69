"""Reader of Cityscapes, its fine annotations.

This module is no command. It makes the records of records.py.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from faster_coco_eval import mask as coco_masks
from torchvision.datasets import Cityscapes
from downstream.label_files import choose_folder, read_mask
from downstream.records import IGNORED, LabeledObject, LabeledSet, Mask, Record, read_label_map

COUNTED = [x for x in Cityscapes.classes if x.train_id in range(19)]  # by their train ids
STUFF = frozenset(x.train_id for x in COUNTED if not x.has_instances)
IMAGE_END = "_leftImg8bit.png"


def open_set(root: Path, split: str) -> LabeledSet:
    """The 19 classes that count, by their train ids."""
    split, cities = choose_folder(split, root / "leftImg8bit")
    table = {255: IGNORED}  # license plates, whose id is -1
    for x in Cityscapes.classes:
        if x.id >= 0:
            table[x.id] = x.train_id if x.train_id in range(19) else IGNORED

    records = []
    for image in sorted(cities.glob(f"*/*{IMAGE_END}")):
        name = image.relative_to(cities).as_posix()
        label_file = label_path(root, split, name, "labelIds")
        label_map = partial(read_label_map, label_file, table)
        records.append(Record(name, image, label_map=label_map, label_file=label_file))
    return LabeledSet([x.name for x in COUNTED], records, stuff=STUFF)


def label_path(root: Path, split: str, name: str, kind: str) -> Path:
    return root / "gtFine" / split / f"{name.removesuffix(IMAGE_END)}_gtFine_{kind}.png"


# ---- objects -------------------------------------------------------------------------------------
def read_instances(root: Path, splits: tuple[str, ...]) -> LabeledSet:
    """The objects of the 8 classes that have some, with masks; every PNG is decoded for it."""
    records = []
    for wanted in splits:
        split, cities = choose_folder(wanted, root / "leftImg8bit")
        for image in sorted(cities.glob(f"*/*{IMAGE_END}")):
            name = image.relative_to(cities).as_posix()
            label_file = label_path(root, split, name, "instanceIds")
            records.append(Record(f"{split}/{name}", image, label_file=label_file))
    found = LabeledSet([x.name for x in COUNTED], records, stuff=STUFF)
    with ThreadPoolExecutor() as pool:
        found.records = list(pool.map(with_objects, records))
    return found


def with_objects(record: Record) -> Record:
    """The record with its objects: 26003 is the third car, and 26 alone are cars in a group."""
    numbers = read_mask(record.label_file).numpy()
    class_of_id = {x.id: x.train_id for x in COUNTED if x.has_instances}
    objects = []
    for number in np.unique(numbers).tolist():
        class_id = number // 1000 if number >= 1000 else number
        if class_id in class_of_id:
            mask = numbers == number
            rows = np.flatnonzero(mask.any(1)).tolist()
            columns = np.flatnonzero(mask.any(0)).tolist()
            objects.append(
                LabeledObject(
                    box=(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1),
                    number=class_of_id[class_id],
                    crowd=number < 1000,
                    mask=Mask(coco_masks.encode(np.asfortranarray(mask, np.uint8)), mask.shape),
                )
            )
    return record._replace(size=numbers.shape, objects=objects)
