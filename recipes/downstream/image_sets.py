"""Labeled images and videos, in the field's layouts on a disk: docs/recipes/labeled_images.md.

image, labels, boxes, box_classes, name = open_images(Path("VOCdevkit"), split="val")[0]
name, frames, masks = open_videos(Path("DAVIS"))[0]
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import harness
import numpy as np
import torch
from faster_coco_eval import COCO
from harness import UserError
from PIL import Image
from torch import Tensor
from torchvision.datasets import Cityscapes
from densekit.scenes import SCENE_CLASSES, sample_scenes

IGNORED = 255
STUFF_CLASSES = 182  # of COCO-Stuff
SCENES = 256  # of a split
VOC = [
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
]


# ---- files ---------------------------------------------------------------------------------------
@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Any error inside says in one sentence that this file is broken."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # broken bytes raise nearly anything
        reason = str(error) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"it has no {reason}"
        raise UserError(f"{path} cannot be used ({' '.join(reason.split())}).") from None


def read_frame(path: Path, value_range: tuple[float, float] | None = None) -> Tensor:
    """An upright RGB image, uint8 (3, H, W)."""
    with reading(path):
        return harness.read_image(path, value_range)


def read_json(path: Path) -> Any:
    with reading(path):
        return json.loads(path.read_bytes())


def read_list(path: Path) -> list[str]:
    """The lines of a text file."""
    with reading(path):
        return [line.strip() for line in path.read_text().strip().split("\n")]


def read_mask(path: Path) -> Tensor:
    """The numbers in a gray or palette PNG, int64 (H, W)."""
    return read_numbers(path, ("L", "P", "1", "I", "I;16"))


def read_panoptic_mask(path: Path) -> Tensor:
    """The ids in a PNG of COCO panoptic, int64 (H, W): red counts 1, green 256, blue 65536."""
    return (read_numbers(path, ("RGB",)) * torch.tensor([1, 256, 65536])).sum(-1)


def read_numbers(path: Path, modes: tuple[str, ...]) -> Tensor:
    """The pixels of an image that has one of these modes."""
    with reading(path), Image.open(path) as file:
        if file.mode not in modes:
            raise UserError(f"{path} is no label map: its mode is {file.mode}, not {modes[0]}.")
        return torch.from_numpy(np.asarray(file).astype(np.int64))


def image_files(folder: Path) -> dict[str, Path]:
    """The image files of a folder, by their names without the extension."""
    paths = sorted(folder.glob("[!.]*.*"))
    return {path.stem: path for path in paths if path.suffix.lower() in harness.EXTENSIONS}


def find_images(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """The files of these images; where there is none, the path that is missed."""
    files = image_files(folder)
    return {name: files.get(name, folder / f"{name}.jpg") for name in names}


# ---- choices -------------------------------------------------------------------------------------
class UnknownNameError(UserError):
    """A name that is none of those to choose from."""


def choose(wanted: str, found: Iterable[str], where: Any) -> str:
    """The name that is wanted, or the only one that begins so: val2017 for val."""
    names = sorted(found)
    if wanted in names:
        return wanted
    fits = [name for name in names if name.startswith(wanted)]
    if len(fits) != 1:
        count = len(fits) or "no"
        raise UnknownNameError(f"{where} has {count} {wanted!r}: choose one of {names}.")
    return fits[0]


def choose_file(wanted: str, folder: Path, before: str, after: str) -> tuple[str, Path]:
    """The file whose name lies between `before` and `after`, as `choose` understands it."""
    paths = {}
    for path in folder.glob(f"{before}*{after}"):
        paths[path.name.removeprefix(before).removesuffix(after)] = path
    name = choose(wanted, paths, folder)
    return name, paths[name]


def choose_folder(wanted: str, parent: Path) -> tuple[str, Path]:
    """The folder below `parent` with this name, as `choose` understands it."""
    paths = {path.name: path for path in parent.glob("*/")}
    name = choose(wanted, paths, parent)
    return name, paths[name]


# ---- a set of labeled images ---------------------------------------------------------------------
class Labeled(NamedTuple):
    image: Tensor  # uint8 (3, H, W), upright RGB
    labels: Tensor | None  # int64 (H, W), the class of each pixel or 255: ignored; None: no map
    boxes: Tensor  # float32 (n, 4), x0 y0 x1 y1 in pixels, half-open
    box_classes: Tensor  # int64 (n,)
    name: str


def translate(ids: Tensor, table: dict[int, int], where: Any) -> Tensor:
    """The class of each id, by a table."""
    keys = torch.tensor(sorted(table))
    classes = torch.tensor([table[key] for key in sorted(table)])
    places = torch.searchsorted(keys, ids).clamp_(max=len(keys) - 1)
    unknown = ids[keys[places] != ids]
    if len(unknown):
        raise UserError(f"{where} has the id {unknown[0]}, which is none of the set's classes.")
    return classes[places]


@dataclass
class ImageSet:
    """Labeled images, read one by one: `images[i]` is a `Labeled`."""

    classes: list[str]
    images: dict[str, Any]  # by name, in order: the file, or the image itself
    labels: dict[str, Any]  # the file of each label map; an image without a map has none
    boxes: dict[str, list] = field(default_factory=dict)  # x0, y0, x1, y1, class of each object
    table: dict[int, int] = field(default_factory=dict)  # numbers in a PNG that are no classes
    draw: Callable[[str], Tensor] | None = None  # makes the label map where it is no plain PNG
    layout: str = ""
    value_range: tuple[float, float] | None = None  # of images whose file does not tell it

    def __post_init__(self) -> None:
        self.names = list(self.images)
        classes = {number: number for number in range(len(self.classes))}
        self.table = {**classes, IGNORED: IGNORED, **self.table}

        sources = dict.fromkeys([*self.images.values(), *self.labels.values()])
        missing = [x for x in sources if isinstance(x, Path) and not x.is_file()]
        if missing:
            raise UserError(f"{len(missing)} files are missing, such as {missing[0]}.")
        if not self.names or len(self.classes) > IGNORED:
            raise UserError(f"The set has {len(self)} images and {len(self.classes)} classes.")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Labeled:
        name = self.names[index]
        source = self.images[name]
        image = source if isinstance(source, Tensor) else read_frame(source, self.value_range)
        labels = self.read_labels(name, image)
        boxes, box_classes = self.read_boxes(name)
        return Labeled(image, labels, boxes, box_classes, name)

    def read_labels(self, name: str, image: Tensor) -> Tensor | None:
        source = self.labels.get(name)
        if source is None:
            return None
        numbers = self.draw(name) if self.draw else read_mask(source)
        image_size = list(image.shape[1:])
        size = list(numbers.shape)
        if image_size != size:
            file = self.images[name]
            raise UserError(
                f"{file} is {image_size} pixels, upright, but {source} has labels of {size}."
            )
        return translate(numbers, self.table, source)

    def read_boxes(self, name: str) -> tuple[Tensor, Tensor]:
        """The boxes that have an area and a class, and their classes."""
        rows = torch.tensor(self.boxes.get(name, []), dtype=torch.float32).view(-1, 5)
        boxes = rows[:, :4]
        classes = translate(rows[:, 4].long(), self.table, f"A box of {self.images[name]}")
        has_area = (boxes[:, :2] < boxes[:, 2:]).all(1)
        keep = has_area & (classes != IGNORED)
        return boxes[keep], classes[keep]


# ---- the layout of a set of your own -------------------------------------------------------------
def open_folder(root: Path, split: str) -> ImageSet:
    path = root / "classes.json"
    content = read_json(path)
    with reading(path):
        classes = content["labels"]
        ignored = content.get("ignore", IGNORED)

    path = root / "splits.json"
    splits = read_json(path)
    with reading(path):
        names = splits[choose(split, splits, path)]

    boxes = {}
    path = root / "boxes.json"
    rows = read_json(path) if path.exists() else []
    with reading(path):
        for row in rows:
            objects = [x for x in row["objects"] if not x.get("crowd")]
            boxes[row["id"]] = [(*x["box"], x["cat"]) for x in objects]

    labels = {}
    for name in names:
        file = root / "labels" / f"{name}.png"
        if name not in boxes or file.exists():  # with boxes the map may be missing
            labels[name] = file
    images = find_images(root / "images", names)
    return ImageSet(classes, images, labels, boxes, {ignored: IGNORED})


# ---- COCO ----------------------------------------------------------------------------------------
def open_coco(root: Path, split: str) -> ImageSet:
    """Objects with masks: class 0 is the background."""
    split, path = choose_file(split, root / "annotations", "instances_", ".json")
    data = read_json(path)
    with reading(path):
        api = COCO({"images": data["images"]})  # it decodes the masks
        categories = sorted(data["categories"], key=lambda x: x["id"])
        class_of_id = {x["id"]: number for number, x in enumerate(categories, 1)}
        classes = ["background", *(x["name"] for x in categories)]
        stuff = {class_of_id[x["id"]] for x in categories if not x.get("isthing", True)}
        infos = infos_by_name(data)
        name_of_id = {x["id"]: name for name, x in infos.items()}
        labels = dict.fromkeys(infos, path)
        objects = defaultdict(list)
        boxes = defaultdict(list)
        for row in data["annotations"]:
            name = name_of_id.get(row["image_id"])
            if name is None:
                continue
            if not row.get("segmentation"):  # there is no map unless every object has a mask
                labels.pop(name, None)
            number = IGNORED if row.get("iscrowd") else class_of_id[row["category_id"]]
            objects[name].append((row, number))
            if number not in stuff:
                boxes[name].append((*corners(row["bbox"]), number))
        images = coco_images(root, split, infos)

    def draw(name: str) -> Tensor:
        canvas = torch.zeros(infos[name]["height"], infos[name]["width"], dtype=torch.int64)
        with reading(path):
            masks = []
            for row, number in objects[name]:
                mask = torch.from_numpy(api.annToMask(row)) > 0
                masks.append((mask, number))
            # What is drawn later hides what is below: crowds first, then from large to small.
            masks.sort(key=lambda x: (x[1] != IGNORED, -int(x[0].sum())))
            for mask, number in masks:
                canvas[mask] = number
        return canvas

    return ImageSet(classes, images, labels, boxes, draw=draw)


def open_coco_panoptic(root: Path, split: str) -> ImageSet:
    """Things and stuff; only things have boxes."""
    split, path = choose_file(split, root / "annotations", "panoptic_", ".json")
    maps = path.with_suffix("")
    if not maps.is_dir():
        maps = root / path.stem
    data = read_json(path)
    with reading(path):
        categories = sorted(data["categories"], key=lambda x: x["id"])
        class_of_id = {x["id"]: number for number, x in enumerate(categories)}
        classes = [x["name"] for x in categories]
        stuff = {class_of_id[x["id"]] for x in categories if not x.get("isthing")}
        infos = infos_by_name(data)
        name_of_id = {x["id"]: name for name, x in infos.items()}
        labels = {}
        tables = {}
        boxes = defaultdict(list)
        for row in data["annotations"]:
            name = name_of_id.get(row["image_id"])
            if name is None:
                continue
            labels[name] = maps / row["file_name"]
            table = tables.setdefault(name, {0: IGNORED})
            for x in row["segments_info"]:
                number = IGNORED if x.get("iscrowd") else class_of_id[x["category_id"]]
                table[x["id"]] = number
                if number not in stuff:
                    boxes[name].append((*corners(x["bbox"]), number))
        images = coco_images(root, split, infos)

    def draw(name: str) -> Tensor:
        return translate(read_panoptic_mask(labels[name]), tables[name], labels[name])

    return ImageSet(classes, images, labels, boxes, draw=draw)


def open_coco_stuff(root: Path, split: str) -> ImageSet:
    split, maps = choose_folder(split, root / "stuffthingmaps")
    labels = image_files(maps)
    images = root / split
    if not images.is_dir():
        images = root / "images" / split
    classes = [str(number) for number in range(STUFF_CLASSES)]
    return ImageSet(classes, find_images(images, labels), labels)


def infos_by_name(data: dict) -> dict[str, dict]:
    """What a file of COCO says of each image, by its name without the extension, sorted."""
    infos = {str(Path(x["file_name"]).with_suffix("")): x for x in data["images"]}
    return {name: infos[name] for name in sorted(infos)}


def coco_images(root: Path, split: str, infos: dict[str, dict]) -> dict[str, Path]:
    places = [root / split, root / "images" / split, root / "images"]
    folders = [x for x in places if x.is_dir()] or places
    return {name: folders[0] / x["file_name"] for name, x in infos.items()}


def corners(box: list[float]) -> tuple[float, float, float, float]:
    """COCO's x, y, width, height as x0, y0, x1, y1."""
    x0, y0, width, height = box
    return x0, y0, x0 + width, y0 + height


# ---- PASCAL VOC ----------------------------------------------------------------------------------
def open_voc(root: Path, split: str) -> ImageSet:
    _, listing = choose_file(split, root / "ImageSets" / "Segmentation", "", ".txt")
    names = read_list(listing)
    images = {name: root / "JPEGImages" / f"{name}.jpg" for name in names}
    labels = {name: root / "SegmentationClass" / f"{name}.png" for name in names}
    boxes = {name: voc_boxes(root / "Annotations" / f"{name}.xml") for name in names}
    return ImageSet(VOC, images, labels, boxes)


def voc_boxes(path: Path) -> list[tuple]:
    """The objects that are not difficult: their corners and classes."""
    boxes = []
    with reading(path):
        for item in ElementTree.parse(path).iterfind("object"):
            if item.findtext("difficult") == "1":
                continue
            x0 = float(item.findtext("bndbox/xmin", "missing"))
            y0 = float(item.findtext("bndbox/ymin", "missing"))
            x1 = float(item.findtext("bndbox/xmax", "missing"))
            y1 = float(item.findtext("bndbox/ymax", "missing"))
            number = VOC.index(item.findtext("name"))
            boxes.append((x0 - 1, y0 - 1, x1, y1, number))  # they count from 1, the last inside
    return boxes


# ---- ADE20K and Cityscapes -----------------------------------------------------------------------
def open_ade20k(root: Path, split: str) -> ImageSet:
    split, maps = choose_folder(split, root / "annotations")
    labels = image_files(maps)
    images = find_images(root / "images" / split, labels)
    rows = read_list(root / "objectInfo150.txt")[1:]  # columns Idx ... Name, without their titles
    classes = [row.split("\t")[-1] for row in rows]
    table = {0: IGNORED}
    for number in range(len(classes)):
        table[number + 1] = number
    return ImageSet(classes, images, labels, table=table)


def open_cityscapes(root: Path, split: str) -> ImageSet:
    split, cities = choose_folder(split, root / "leftImg8bit")
    end = "_leftImg8bit.png"
    images = {}
    labels = {}
    for path in sorted(cities.glob(f"*/*{end}")):
        name = str(path.relative_to(cities)).removesuffix(end)
        images[name] = path
        labels[name] = root / "gtFine" / split / f"{name}_gtFine_labelIds.png"
    classes = [x.name for x in Cityscapes.classes if x.train_id in range(19)]
    table = {x.id: x.train_id for x in Cityscapes.classes if x.id >= 0}
    return ImageSet(classes, images, labels, table=table)


# ---- procedural scenes ---------------------------------------------------------------------------
def open_scenes(split: str) -> ImageSet:
    splits = ["train", "val", "test"]
    split = choose(split, splits, "The set of scenes")
    draws = harness.generator(27, splits.index(split), 0)  # other scenes than those of training
    drawn = sample_scenes(SCENES, (64, 64), generator=draws)
    pixels = (drawn.images * 255).round().byte()

    images = {}
    labels = {}
    boxes = {}
    for i in range(SCENES):
        name = f"{split}-{i:03d}"
        images[name] = pixels[i]
        labels[name] = drawn.labels[i]
        rows = torch.cat([drawn.boxes[i], drawn.classes[i, :, None]], -1)
        boxes[name] = rows[drawn.valid[i]].tolist()
    return ImageSet(list(SCENE_CLASSES), images, labels, boxes, draw=labels.__getitem__)


# ---- opening a set -------------------------------------------------------------------------------
class Layout(NamedTuple):
    open: Callable[[Path, str], ImageSet]
    mark: str  # the file or folder that shows the layout


LAYOUTS = {
    "folder": Layout(open_folder, "classes.json"),
    "coco": Layout(open_coco, "annotations/instances_*.json"),
    "coco-panoptic": Layout(open_coco_panoptic, "annotations/panoptic_*.json"),
    "coco-stuff": Layout(open_coco_stuff, "stuffthingmaps"),
    "voc": Layout(open_voc, "SegmentationClass"),
    "ade20k": Layout(open_ade20k, "objectInfo150.txt"),
    "cityscapes": Layout(open_cityscapes, "leftImg8bit"),
}
INNER = ("", "VOC*/", "VOCdevkit/VOC*/", "ADEChallengeData2016/")  # where below the folder it is


def open_images(
    data: Path | None, layout: str = "auto", split: str = "val", mapping: Path | None = None
) -> ImageSet:
    """The labeled images below a folder; without one, scenes. A `mapping` gives other classes."""
    if data is None:
        choose(layout, ["auto", "scenes"], "The list of layouts")
        found = open_scenes(split)
        found.layout = "scenes"
    else:
        kind, root = find_layout(data, choose(layout, ["auto", *LAYOUTS], "The list of layouts"))
        found = LAYOUTS[kind].open(root, split)
        found.layout = kind
        if layout == "auto" and os.environ.get("RANK", "0") == "0":
            print(f"{root}: layout {kind}, {len(found)} images, {len(found.classes)} classes")
    if mapping is not None:
        change_classes(found, mapping)
    return found


def find_layout(data: Path, layout: str) -> tuple[str, Path]:
    """The layout and the folder of the only set in or below `data`."""
    wanted = list(LAYOUTS) if layout == "auto" else [layout]
    places = set()
    for kind in wanted:
        mark = LAYOUTS[kind].mark
        for inner in INNER:
            for path in data.glob(inner + mark):
                root = path.parents[mark.count("/")]
                places.add((kind, root))
    if len(places) != 1:
        marks = [(kind, LAYOUTS[kind].mark) for kind in wanted]
        listed = [f"layout {kind}: {path}" for kind, path in sorted(places) or marks]
        raise UserError(f"{data} must hold one set, not {len(places)}: {', '.join(listed)}.")
    return places.pop()


def change_classes(found: ImageSet, mapping: Path) -> None:
    """Replace the classes of a set by those of a JSON file: {"names": [...], "map": {...}}."""
    content = read_json(mapping)
    old = range(len(found.classes))
    new_of_old = {}
    with reading(mapping):
        new = range(len(content["names"]))
        for old_class, new_class in content["map"].items():
            new_of_old[old.index(int(old_class))] = new.index(new_class)
        found.classes = content["names"]
    found.table = {number: new_of_old.get(x, IGNORED) for number, x in found.table.items()}


# ---- videos --------------------------------------------------------------------------------------
class Video(NamedTuple):
    name: str
    frames: list[Path]  # for read_frame
    masks: list[Path | None] | None  # of each frame, for read_mask: the number of the object


def open_videos(data: Path, split: str = "val", resolution: str = "480p") -> list[Video]:
    """The videos of DAVIS 2017; in their masks 0 is background, 255 ignored."""
    _, listing = choose_file(split, data / "ImageSets" / "2017", "", ".txt")
    resolution, _ = choose_folder(resolution, data / "JPEGImages")
    videos = []
    for name in read_list(listing):
        frames = image_files(data / "JPEGImages" / resolution / name)
        masks = image_files(data / "Annotations" / resolution / name)
        if not frames or masks.keys() - frames.keys():
            raise UserError(f"Video {name} of {data} has no frames, or a mask without a frame.")
        of_frames = [masks.get(frame) for frame in frames] if masks else None
        videos.append(Video(name, list(frames.values()), of_frames))
    return videos
