"""Reader of ADE20K, the 150 classes of its scene parsing challenge.

This module is no command. It makes the records of records.py.
"""

from functools import partial
from pathlib import Path

from downstream.label_files import by_stem, choose_folder, list_images, read_list
from downstream.records import IGNORED, LabeledSet, Record, distinct_names, read_label_map


def open_set(root: Path, split: str) -> LabeledSet:
    """The numbers of a PNG are the classes, counted from 1; 0 is none of them."""
    split, folder_of_maps = choose_folder(split, root / "annotations")
    folder = root / "images" / split
    images = by_stem(list_images(folder))
    maps = by_stem(list_images(folder_of_maps))
    rows = read_list(root / "objectInfo150.txt")[1:]  # columns Idx ... Name, without their titles
    names = [row.split("\t")[-1] for row in rows]
    classes = distinct_names(names, range(1, len(names) + 1))
    table = {number + 1: number for number in range(len(classes))}
    table |= {0: IGNORED, 255: IGNORED}

    records = []
    for stem in sorted({**images, **maps}):
        image = images.get(stem, folder / f"{stem}.jpg")  # or the file that is missed
        record = Record(image.name, image)
        if stem in maps:
            label_map = partial(read_label_map, maps[stem], table)
            record = record._replace(label_map=label_map, label_file=maps[stem])
        records.append(record)
    return LabeledSet(classes, records)
