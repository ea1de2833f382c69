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
from functools import partial
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
VOC = "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
VOC = (VOC + "motorbike person pottedplant sheep sofa train tvmonitor").split()


# ---- files ---------------------------------------------------------------------------------------
@contextmanager
def reading(path: Path) -> Iterator[None]:  # says in one sentence which file is broken
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # broken bytes raise nearly anything
        reason = "it has no " * isinstance(error, KeyError) + (str(error) or type(error).__name__)
        raise UserError(f"{path} cannot be used ({' '.join(reason.split())}).") from None


def read(decode: Callable[[Path], Any], path: Path) -> Any:
    with reading(path):
        return decode(path)


read_frame = partial(read, harness.read_image)  # upright RGB, uint8 (3, H, W)
read_json = partial(read, lambda path: json.loads(path.read_bytes()))
read_list = partial(read, lambda path: [*map(str.strip, path.read_text().strip().split("\n"))])


def read_mask(path: Path, modes: tuple[str, ...] = ("L", "P", "1", "I", "I;16")) -> Tensor:
    """The numbers in a gray or palette PNG, int64 (H, W), or in one of COCO panoptic (RGB)."""
    with reading(path), Image.open(path) as file:
        if file.mode not in modes:
            raise UserError(f"{path} is no label map: its mode is {file.mode}, not {modes[0]}.")
        ids = torch.from_numpy(np.asarray(file).astype(np.int64))
    return ids if ids.ndim == 2 else (ids * torch.tensor([1, 256, 65536])).sum(-1)


def translate(ids: Tensor, table: dict[int, int], where: Any) -> Tensor:  # class of each id
    keys = torch.tensor(sorted(table))
    places = torch.searchsorted(keys, ids).clamp_(max=len(keys) - 1)
    if len(unknown := ids[keys[places] != ids]):
        raise UserError(f"{where} has the id {unknown[0]}, which is none of the set's classes.")
    return torch.tensor([table[key] for key in sorted(table)])[places]


def choose(wanted: str, found: Iterable[str], where: Any) -> str:  # val, else val2017
    names = sorted(found)
    fits = [x for x in names if x == wanted] or [x for x in names if x.startswith(wanted)]
    if len(fits) != 1:
        raise UserError(f"{where} has {len(fits) or 'no'} {wanted!r}: choose one of {names}.")
    return fits[0]


def choose_path(wanted: str, where: Path, pattern: str) -> tuple[str, Path]:
    start, _, end = pattern.rstrip("/").partition("*")
    paths = {x.name.removeprefix(start).removesuffix(end): x for x in where.glob(pattern)}
    return (name := choose(wanted, paths, where)), paths[name]


def by_stem(folder: Path, names: Iterable[str] | None = None) -> dict[str, Path]:
    """The image files of a folder by their names without the extension: all, or those."""
    paths = sorted(folder.glob("[!.]*.*"))
    files = {path.stem: path for path in paths if path.suffix.lower() in harness.EXTENSIONS}
    return files if names is None else {x: files.get(x, folder / f"{x}.jpg") for x in names}


class Labeled(NamedTuple):
    image: Tensor  # uint8 (3, H, W), upright RGB
    labels: Tensor | None  # int64 (H, W), the class of each pixel or 255: ignored; None: no map
    boxes: Tensor  # float32 (n, 4), x0 y0 x1 y1 in pixels, half-open
    box_classes: Tensor  # int64 (n,)
    name: str


@dataclass
class ImageSet:
    classes: list[str]
    images: dict[str, Any]  # by name, in order: its file, or the image itself
    labels: dict[str, Any]  # the file with its label map; images without a map have none
    boxes: dict[str, list] = field(default_factory=dict)  # x0, y0, x1, y1, class of each object
    table: dict[int, int] = field(default_factory=dict)  # numbers in a PNG that are no classes
    draw: Callable[[str], Tensor] | None = None  # the label map, where it is no plain PNG

    def __post_init__(self) -> None:
        self.names, self.layout = [*self.images], ""
        self.table = {**{i: i for i in range(len(self.classes))}, IGNORED: IGNORED, **self.table}
        files = dict.fromkeys([*self.images.values(), *self.labels.values()])
        if missing := [x for x in files if isinstance(x, Path) and not x.is_file()]:
            raise UserError(f"{len(missing)} files are missing, such as {missing[0]}.")
        if not self.names or len(self.classes) > IGNORED:
            raise UserError(f"The set has {len(self)} images and {len(self.classes)} classes.")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Labeled:
        name = self.names[index]
        file, source, labels = self.images[name], self.labels.get(name), None
        image = file if isinstance(file, Tensor) else read_frame(file)
        if source is not None:
            labels = self.draw(name) if self.draw else read_mask(source)
            if (a := [*image.shape[1:]]) != (b := [*labels.shape]):
                raise UserError(f"{file} is {a} pixels, upright, but {source} has labels of {b}.")
            labels = translate(labels, self.table, source)
        rows = torch.tensor(self.boxes.get(name, []), dtype=torch.float32).view(-1, 5)
        kinds = translate(rows[:, 4].long(), self.table, f"A box of {file}")
        keep = (rows[:, :2] < rows[:, 2:4]).all(1) & (kinds != IGNORED)
        return Labeled(image, labels, rows[keep, :4], kinds[keep], name)


# ---- layouts -------------------------------------------------------------------------------------
def folder(root: Path, split: str) -> ImageSet:
    content = read_json(path := root / "classes.json")
    with reading(path):
        classes, table = content["labels"], {content.get("ignore", IGNORED): IGNORED}
    with reading(path := root / "splits.json"):
        names, boxes = (splits := read_json(path))[choose(split, splits, path)], {}
    with reading(path := root / "boxes.json"):
        for row in read_json(path) if path.exists() else ():
            boxes[row["id"]] = [(*x["box"], x["cat"]) for x in row["objects"] if not x.get("crowd")]
    maps = root / "labels"  # of an image with a row of boxes it may be missing
    labels = {x: maps / f"{x}.png" for x in names if x not in boxes or (maps / f"{x}.png").exists()}
    return ImageSet(classes, by_stem(root / "images", names), labels, boxes, table)


def coco(root: Path, split: str, kind: str = "instances") -> ImageSet:
    split, path = choose_path(split, root / "annotations", f"{kind}_*.json")
    folders = root / split, root / "images" / split, root / "images"
    folder = next((x for x in folders if x.is_dir()), folders[0])
    maps = path.with_suffix("") if path.with_suffix("").is_dir() else root / path.stem
    things, objects, boxes = kind == "instances", defaultdict(list), defaultdict(list)
    with reading(path):
        api = COCO({"images": (data := read_json(path))["images"]})
        categories = sorted(data["categories"], key=lambda x: x["id"])
        classes = ["background"] * things + [x["name"] for x in categories]
        index = {x["id"]: i for i, x in enumerate(categories, int(things))}
        stuff = {index[x["id"]] for x in categories if not x.get("isthing", things)}
        infos = {str(Path(x["file_name"]).with_suffix("")): x for x in data["images"]}
        images = {name: folder / infos[name]["file_name"] for name in sorted(infos)}
        labels = dict.fromkeys(infos, path) if things else {}
        names = {x["id"]: name for name, x in infos.items()}
        for row in (x for x in data["annotations"] if x["image_id"] in names):
            name = names[row["image_id"]]
            if not things:
                labels[name] = maps / row["file_name"]
            elif not row.get("segmentation"):  # without a mask of every object there is no map
                labels.pop(name, None)
            for x in row.get("segments_info", [row]):
                x["class"] = IGNORED if x.get("iscrowd") else index[x["category_id"]]
                objects[name].append(x)
                if x["class"] not in stuff:
                    x0, y0, width, height = x["bbox"]
                    boxes[name].append((x0, y0, x0 + width, y0 + height, x["class"]))

    def draw(name: str) -> Tensor:
        if not things:
            table = {0: IGNORED, **{x["id"]: x["class"] for x in objects[name]}}
            return translate(read_mask(labels[name], ("RGB",)), table, labels[name])
        canvas = torch.zeros(infos[name]["height"], infos[name]["width"], dtype=torch.int64)
        with reading(path):
            masks = [(torch.from_numpy(api.annToMask(x)) > 0, x["class"]) for x in objects[name]]
            # What is drawn later hides what is below: crowds first, then from large to small.
            for mask, number in sorted(masks, key=lambda x: (x[1] != IGNORED, -int(x[0].sum()))):
                canvas[mask] = number
        return canvas

    return ImageSet(classes, images, labels, boxes, draw=draw)


def coco_stuff(root: Path, split: str) -> ImageSet:
    split, maps = choose_path(split, root / "stuffthingmaps", "*/")
    folder = root / split if (root / split).is_dir() else root / "images" / split
    return ImageSet([str(i) for i in range(182)], by_stem(folder, labels := by_stem(maps)), labels)


def voc(root: Path, split: str) -> ImageSet:
    names = read_list(choose_path(split, root / "ImageSets" / "Segmentation", "*.txt")[1])
    images = {name: root / "JPEGImages" / f"{name}.jpg" for name in names}
    labels = {name: root / "SegmentationClass" / f"{name}.png" for name in names}
    ends, boxes = [f"bndbox/{x}" for x in ("xmin", "ymin", "xmax", "ymax")], defaultdict(list)
    for name in names:
        with reading(path := root / "Annotations" / f"{name}.xml"):
            for x in ElementTree.parse(path).iterfind("object"):
                if x.findtext("difficult") != "1":  # pixels count from 1, the last one is inside
                    x0, y0, x1, y1 = (float(x.findtext(end, "missing")) for end in ends)
                    boxes[name].append((x0 - 1, y0 - 1, x1, y1, VOC.index(x.findtext("name"))))
    return ImageSet(VOC, images, labels, boxes)


def ade20k(root: Path, split: str) -> ImageSet:
    split, maps = choose_path(split, root / "annotations", "*/")
    rows = read_list(root / "objectInfo150.txt")[1:]  # columns Idx ... Name, Idx from 1
    images = by_stem(root / "images" / split, labels := by_stem(maps))
    table = {0: IGNORED, **{i + 1: i for i in range(len(rows))}}
    return ImageSet([row.split("\t")[-1] for row in rows], images, labels, table=table)


def cityscapes(root: Path, split: str) -> ImageSet:
    split, cities = choose_path(split, root / "leftImg8bit", "*/")
    paths, end = sorted(cities.glob("*/*_leftImg8bit.png")), "_leftImg8bit.png"
    images = {str(x.relative_to(cities)).removesuffix(end): x for x in paths}
    labels = {x: root / "gtFine" / split / f"{x}_gtFine_labelIds.png" for x in images}
    table = {x.id: x.train_id for x in Cityscapes.classes if x.id >= 0}
    classes = [x.name for x in Cityscapes.classes if x.train_id in range(19)]
    return ImageSet(classes, images, labels, table=table)


def draw_scenes(split: str) -> ImageSet:
    splits = ["train", "val", "test"]
    seed = 27, splits.index(split := choose(split, splits, "The set of scenes")), 0
    drawn = sample_scenes(
        256, (64, 64), generator=harness.generator(*seed)
    )  # not those of training
    names = [f"{split}-{i:03d}" for i in range(256)]
    images = dict(zip(names, (drawn.images * 255).round().byte(), strict=True))
    labels = dict(zip(names, drawn.labels, strict=True))
    rows = torch.cat([drawn.boxes, drawn.classes[..., None]], -1)
    boxes = {name: rows[i, drawn.valid[i]].tolist() for i, name in enumerate(names)}
    return ImageSet([*SCENE_CLASSES], images, labels, boxes, draw=labels.__getitem__)


LAYOUTS: dict[str, tuple[Any, str]] = {  # the reader, and what shows that it is the one
    "folder": (folder, "classes.json"),
    "coco": (coco, "annotations/instances_*.json"),
    "coco-panoptic": (partial(coco, kind="panoptic"), "annotations/panoptic_*.json"),
    "coco-stuff": (coco_stuff, "stuffthingmaps"),
    "voc": (voc, "SegmentationClass"),
    "ade20k": (ade20k, "objectInfo150.txt"),
    "cityscapes": (cityscapes, "leftImg8bit"),
}
INNER = ("", "VOC*/", "VOCdevkit/VOC*/", "ADEChallengeData2016/")  # where below the folder it is


def open_images(data: Path | None, layout="auto", split="val", mapping: Any = None) -> ImageSet:
    """The labeled images below a folder; without one, scenes. A `mapping` gives other classes."""
    kind = choose(layout, ["auto", *(LAYOUTS if data else ["scenes"])], "The list of layouts")
    if data is None:
        found, kind = draw_scenes(split), "scenes"
    else:
        looked = LAYOUTS if kind == "auto" else {kind: LAYOUTS[kind]}
        marks = [(x, y + mark, mark.count("/")) for x, (_, mark) in looked.items() for y in INNER]
        places = sorted({(x, y.parents[up]) for x, mark, up in marks for y in data.glob(mark)})
        if len(places) != 1:
            listed = [f"layout {x}: {y}" for x, y in places or ((x, looked[x][1]) for x in looked)]
            raise UserError(f"{data} must hold one set, not {len(places)}: {', '.join(listed)}.")
        ((kind, root),) = places
        found = LAYOUTS[kind][0](root, split)
        if layout == "auto" and os.environ.get("RANK", "0") == "0":
            print(f"{root}: layout {kind}, {len(found)} images, {len(found.classes)} classes")
    found.layout = kind
    if mapping is not None:
        content, old = read_json(mapping), range(len(found.classes))
        with reading(mapping):
            found.classes, new = content["names"], range(len(content["names"]))
            pairs = {old.index(int(x)): new.index(y) for x, y in content["map"].items()}
        found.table = {number: pairs.get(x, IGNORED) for number, x in found.table.items()}
    return found


class Video(NamedTuple):
    name: str
    frames: list[Path]  # for read_frame
    masks: list[Path | None] | None  # of each frame, for read_mask: the number of the object


def open_videos(data: Path, split: str = "val", resolution: str = "480p") -> list[Video]:
    """The videos of DAVIS 2017; in their masks 0 is background, 255 ignored."""
    videos, listing = [], choose_path(split, data / "ImageSets" / "2017", "*.txt")[1]
    resolution = choose_path(resolution, data / "JPEGImages", "*/")[0]
    for name in read_list(listing):
        frames = by_stem(data / "JPEGImages" / resolution / name)
        masks = by_stem(data / "Annotations" / resolution / name)
        if not frames or masks.keys() - frames.keys():
            raise UserError(f"Video {name} of {data} has no frames, or a mask without a frame.")
        videos.append(Video(name, [*frames.values()], [*map(masks.get, frames)] if masks else None))
    return videos
