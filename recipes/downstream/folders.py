"""Readers of sets of your own: a folder with classes.json, and a folder for each class.

This module is no command. Each reader makes the records of records.py.
"""

from functools import partial
from pathlib import Path
from typing import Any

import harness
from downstream.fields import (
    FieldError,
    crowd_and_difficult,
    four,
    get,
    items,
    list_of,
    named_fields,
    number_or_none,
    short,
    whole,
)
from downstream.label_files import (
    ImageFolder,
    choose,
    choose_folder,
    list_images,
    missing_files,
    read_json,
    read_small_json,
    reading,
)
from downstream.records import (
    LabeledObject,
    LabeledSet,
    Record,
    class_table,
    distinct_names,
    find_background,
    read_label_map,
)


# ---- classes.json, splits.json, boxes.json -------------------------------------------------------
def open_folder(root: Path, split: str) -> LabeledSet:
    path = root / "splits.json"
    splits = read_small_json(path)
    with reading(path):
        name = choose(split, named_fields(splits), path)
    return read_folder(root, (name,))


def read_folder(root: Path, wanted: tuple[str, ...]) -> LabeledSet:
    """The images of some splits, each once."""
    path = root / "classes.json"
    content = read_small_json(path)
    with reading(path):
        labels = list_of(content, "labels")
        classes = distinct_names(labels, range(len(labels)))
        ignored = content.get("ignore")
        if ignored is not None:
            ignored = whole(ignored, "ignore")
        table = class_table(len(classes), ignored)
        background = find_background(classes)
        if "background" in content:
            background = read_background(content["background"], len(classes))

    path = root / "splits.json"
    splits = read_small_json(path)
    with reading(path):
        names = [name for split in wanted for name in list_of(splits, split)]
        strange = [name for name in names if not isinstance(name, str)]
        if strange:
            raise ValueError(f"it names the image {short(strange[0])}, which is no text")

    images = ImageFolder(root / "images")
    rows = read_boxes(root / "boxes.json", images, len(classes), background)
    with_maps = (root / "labels").is_dir()
    records = {}
    for name in names:
        image = images.find(name)
        record = rows.get(image, Record("", image))
        record = record._replace(name=image.relative_to(root / "images").as_posix())
        label_file = root / "labels" / Path(record.name).with_suffix(".png")
        if with_maps and label_file.is_file():
            label_map = partial(read_label_map, label_file, table)
            record = record._replace(label_map=label_map, label_file=label_file)
        records[image] = record

    label_folder = root / "labels" if with_maps else None
    return LabeledSet(classes, list(records.values()), background, label_folder=label_folder)


def read_background(value: Any, classes: int) -> int | None:
    """Which class stands for no object: its number, or null for none."""
    if value is None:
        return None
    found = whole(value, "background")
    if found >= classes:
        raise ValueError(f"its background is {found}: the classes are 0 to {classes - 1}")
    return found


def read_boxes(
    path: Path, images: ImageFolder, classes: int, background: int | None
) -> dict[Path, Record]:
    """The rows of boxes.json by the file of their image; there are none without such a file."""
    records: dict[Path, Record] = {}
    if not path.exists():
        return records
    rows = read_json(path)
    with reading(path):
        for place, row in enumerate(items(rows, "rows")):
            name = f"the row {place}"
            try:
                name = f"the row {short(get(row, 'id'))}"
                image, record = read_row(row, images, classes, background)
                if image in records:
                    raise FieldError(f"stands twice, for {image.name}")
                records[image] = record
            except FieldError as error:
                raise ValueError(f"{name} {error}") from None
        missing = missing_files(records)
        if missing:
            raise ValueError(f"of its rows {len(missing)} files are missing, such as {missing[0]}")
    return records


def read_row(
    row: dict, images: ImageFolder, classes: int, background: int | None
) -> tuple[Path, Record]:
    if not isinstance(row["id"], str):
        raise FieldError("has no text as its id: give the name of the image")
    image = images.find(row["id"])
    size = None
    if row.get("w") is not None or row.get("h") is not None:
        size = (whole(get(row, "h"), "h", 1), whole(get(row, "w"), "w", 1))

    objects = []
    for x in items(get(row, "objects"), "objects"):
        class_number = whole(get(x, "cat"), "cat")
        if class_number >= classes:
            raise FieldError(
                f"has an object of cat {class_number}: the classes are 0 to {classes - 1}"
            )
        if class_number == background:
            raise FieldError(
                f"has an object of cat {class_number}, which is the background: give another "
                "background, or null, in classes.json"
            )
        x0, y0, x1, y1 = four(get(x, "box"), "box")
        crowd, difficult = crowd_and_difficult(x)
        objects.append(
            LabeledObject(
                box=(x0, y0, x1, y1),
                number=class_number,
                crowd=crowd,
                difficult=difficult,
                area=number_or_none(x.get("area"), "area"),
            )
        )
    return image, Record("", image, size, objects)


# ---- a folder for each class ---------------------------------------------------------------------
def open_class_folders(root: Path, split: str) -> LabeledSet:
    """Each folder of the split is a class, and each image in and below it has that class."""
    _, folder = choose_folder(split, root)
    folders = sorted(x for x in folder.glob("[!.]*/"))
    records = []
    for class_number, class_folder in enumerate(folders):
        for inner in harness.list_images(class_folder):
            name = f"{class_folder.name}/{inner}"
            records.append(Record(name, folder / name, classes=(class_number,)))
    loose = len(list_images(folder))
    if loose and harness.is_main_process():
        harness.tell(
            f"{folder}: {loose} images are left out, since they lie in no folder of a class."
        )
    return LabeledSet([x.name for x in folders], records)
