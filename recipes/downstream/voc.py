"""Reader of PASCAL VOC, or of sets in its form: `ImageSets/Segmentation` and `ImageSets/Main`.

This module is no command. It makes the records of records.py.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from harness import UserError
from downstream.fields import FieldError, crowd_and_difficult, number, whole
from downstream.label_files import ImageFolder, choose, choose_file, read_list, reading
from downstream.records import (
    LabeledObject,
    LabeledSet,
    Record,
    class_table,
    read_label_map,
    with_background,
)

CLASSES = [
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
]


# ---- an annotation -------------------------------------------------------------------------------
class Described(NamedTuple):
    """An object as an annotation describes it."""

    name: str  # of its class
    box: tuple[float, float, float, float]
    crowd: bool
    difficult: bool


class Annotation(NamedTuple):
    size: tuple[int, int] | None  # height and width
    objects: list[Described]


def read_annotation(path: Path) -> Annotation:
    """Boxes count pixels from 1 and contain the last one; here they begin at 0 and are half-open.

    An annotation of another kind, without a size and without an object, is an error.
    """
    objects = []
    with reading(path):
        tree = ElementTree.fromstring(path.read_bytes())
        size = None
        if tree.find("size") is not None:
            size = read_size(tree)
        items = tree.findall("object")
        if size is None and not items:
            raise ValueError("it has neither a size nor an object")

        for place, item in enumerate(items, 1):
            try:
                objects.append(read_object(item))
            except FieldError as error:
                raise ValueError(f"its object {place} {error}") from None
    return Annotation(size, objects)


def read_size(tree: ElementTree.Element) -> tuple[int, int]:
    try:
        height = whole(tree.findtext("size/height"), "height", 1)
        width = whole(tree.findtext("size/width"), "width", 1)
    except FieldError as error:
        raise ValueError(f"its size {error}") from None
    return height, width


def read_object(item: ElementTree.Element) -> Described:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise FieldError("has no name")
    x0 = number(item.findtext("bndbox/xmin"), "xmin")
    y0 = number(item.findtext("bndbox/ymin"), "ymin")
    x1 = number(item.findtext("bndbox/xmax"), "xmax")
    y1 = number(item.findtext("bndbox/ymax"), "ymax")
    texts = {x.tag: (x.text or "0").strip() for x in item}
    crowd, difficult = crowd_and_difficult(texts)
    return Described(name, (x0 - 1, y0 - 1, x1, y1), crowd, difficult)


def as_objects(path: Path, found: Annotation, classes: list[str]) -> list[LabeledObject]:
    objects = []
    for x in found.objects:
        if x.name not in classes[1:]:
            raise UserError(f"{path} cannot be used ({x.name!r} is none of the classes).")
        number = classes.index(x.name, 1)  # not the background, if a class has its name
        objects.append(LabeledObject(x.box, number, x.crowd, x.difficult))
    return objects


# ---- sets ----------------------------------------------------------------------------------------
def open_segmentation(root: Path, split: str) -> LabeledSet:
    """The images of a list in ImageSets/Segmentation, all of which have a label map.

    Those of a list that ends in `aug` lie in SegmentationClassAug, where they have no void.
    """
    listing = choose_file(split, root / "ImageSets" / "Segmentation", "", ".txt")
    images = ImageFolder(root / "JPEGImages")
    table = class_table(len(CLASSES))
    label_folder = "SegmentationClass"
    if listing.stem.endswith("aug") and (root / "SegmentationClassAug").is_dir():
        label_folder = "SegmentationClassAug"
    records = []
    for name in dict.fromkeys(read_list(listing)):
        path = root / "Annotations" / f"{name}.xml"
        found = read_annotation(path)
        label_file = root / label_folder / f"{name}.png"
        image = images.find(name)
        records.append(
            Record(
                name=image.relative_to(images.folder).as_posix(),
                image=image,
                size=found.size,
                objects=as_objects(path, found, CLASSES),
                label_map=partial(read_label_map, label_file, table),
                label_file=label_file,
            )
        )
    return LabeledSet(CLASSES, records, background=0)


def open_main(root: Path, split: str) -> LabeledSet:
    """The images of a list in ImageSets/Main. The classes are VOC's, or else those of the objects.

    A list of one class, such as cat_train, is taken by its whole name alone.
    """
    folder = root / "ImageSets" / "Main"
    lists = [path.stem for path in folder.glob("*.txt")]
    if split not in lists:
        of_all_classes = [x for x in lists if x.rpartition("_")[0] not in CLASSES]
        split = choose(split, of_all_classes, folder)
    found = read_main(root, (split,))
    if set(found.classes[1:]) <= set(CLASSES[1:]):
        found = read_main(root, (split,), CLASSES)
    return found


def read_main(data: Path, lists: tuple[str, ...], classes: list[str] | None = None) -> LabeledSet:
    """The images of lists such as VOC2007/trainval, each once, with objects and no label map.

    Args:
        data: The folder that the names of the lists begin in.
        lists: Names of files in the folder ImageSets/Main of a year, without their .txt.
        classes: The background and the classes; by default those of the objects, sorted.
    """
    annotations = {}
    images = {}
    for listed in lists:
        root = data / Path(listed).parent
        folder = ImageFolder(root / "JPEGImages")
        for line in read_list(root / "ImageSets" / "Main" / f"{Path(listed).name}.txt"):
            path = find_annotation(root / "Annotations", line)
            if path not in annotations:
                annotations[path] = read_annotation(path)
                images[path] = folder.find(path.name.removesuffix(".xml"))

    if classes is None:
        names = {x.name for found in annotations.values() for x in found.objects}
        classes = ["background", *sorted(names)]
    records = []
    for path, found in annotations.items():
        name = images[path].relative_to(data).as_posix()
        objects = as_objects(path, found, classes)
        records.append(Record(name, images[path], found.size, objects))
    names = with_background(classes[1:], ["object"] * len(classes[1:]))
    return LabeledSet(names, records, background=0)


def find_annotation(folder: Path, line: str) -> Path:
    """The annotation of a line, which may end in 1, 0 or -1: whether the image has a class."""
    path = folder / f"{line}.xml"
    words = line.split()
    if len(words) == 2 and not path.is_file():
        return folder / f"{words[0]}.xml"
    return path
