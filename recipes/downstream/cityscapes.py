"""Reader of Cityscapes, its fine annotations.

This module is no command. It makes the records of records.py.
"""

from functools import partial
from pathlib import Path

from torchvision.datasets import Cityscapes
from downstream.label_files import choose_folder
from downstream.records import IGNORED, LabeledSet, Record, read_label_map


def open_set(root: Path, split: str) -> LabeledSet:
    """The 19 classes that count, by their train ids."""
    split, cities = choose_folder(split, root / "leftImg8bit")
    end = "_leftImg8bit.png"
    classes = [x.name for x in Cityscapes.classes if x.train_id in range(19)]
    table = {255: IGNORED}  # license plates, whose id is -1
    for x in Cityscapes.classes:
        if x.id >= 0:
            table[x.id] = x.train_id if x.train_id in range(19) else IGNORED

    records = []
    for image in sorted(cities.glob(f"*/*{end}")):
        name = image.relative_to(cities).as_posix()
        label_file = root / "gtFine" / split / f"{name.removesuffix(end)}_gtFine_labelIds.png"
        label_map = partial(read_label_map, label_file, table)
        records.append(Record(name, image, label_map=label_map, label_file=label_file))
    return LabeledSet(classes, records)
