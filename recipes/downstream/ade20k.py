"""Reader of ADE20K, the 150 classes of its scene parsing challenge.

This module is no command. It makes the records of records.py.
"""

from pathlib import Path

from downstream.label_files import choose, folder_names, read_list
from downstream.records import IGNORED, LabeledSet, distinct_names, pair_maps


def open_set(root: Path, split: str) -> LabeledSet:
    """The numbers of a PNG are the classes, counted from 1; 0 is none of them.

    An image without a PNG has no label map.
    """
    splits = folder_names(root / "images", root / "annotations")
    split = choose(split, splits, root / "images")
    rows = read_list(root / "objectInfo150.txt")[1:]  # columns Idx ... Name, without their titles
    names = [row.split("\t")[-1] for row in rows]
    classes = distinct_names(names, range(1, len(names) + 1))
    table = {number + 1: number for number in range(len(classes))}
    table |= {0: IGNORED, 255: IGNORED}

    folder_of_maps = root / "annotations" / split
    records = pair_maps(root / "images" / split, folder_of_maps, table)
    return LabeledSet(classes, records, label_folder=folder_of_maps)
