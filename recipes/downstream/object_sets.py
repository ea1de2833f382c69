"""Images with objects, for detection: COCO, VOC, boxes.json, procedural scenes, all in COCO's form.

`from downstream.object_sets import Objects, read`. The layouts: docs/recipes/detect.md.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import harness
import torch
from faster_coco_eval import COCO
from faster_coco_eval import mask as rle
from harness import UserError
from torch import Tensor
from torchvision.ops import box_convert
from densekit.scenes import SCENE_CLASSES, sample_scenes

IGNORED = 1e12  # an area beyond the largest range of COCO's evaluation, which then ignores it
BACKGROUNDS = 4  # the first classes of the scenes are no objects


# ---- layouts -------------------------------------------------------------------------------------
def in_coco_form(names: list[str], rows: list[tuple]) -> dict[str, list[dict]]:
    """What COCO's JSON file would hold of these classes and images.

    A row is (file, height, width, objects); an object is (class, x0, y0, x1, y1, more keys).
    """
    images = []
    annotations = []
    for number, (file, height, width, objects) in enumerate(rows):
        images.append({"id": number, "file_name": file, "height": height, "width": width})
        for name, x0, y0, x1, y1, more in objects:
            box = [x0, y0, x1 - x0, y1 - y0]
            category = names.index(name)
            annotations.append({"image_id": number, "category_id": category, "bbox": box, **more})

    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def read_scenes(count: int) -> tuple[list, dict]:
    """Procedural scenes, and the visible parts of their objects."""
    drawn = sample_scenes(count, (64, 64), objects=(1, 4), generator=harness.generator(0))
    pixels = (drawn.images * 255).round().byte()
    images = [(image, ()) for image in pixels]  # as a source gives them: nothing is unreadable

    rows = []
    for i in range(count):
        objects = []
        for k in drawn.valid[i].nonzero()[:, 0].tolist():
            mask = (drawn.instances[i] == k + 1).byte().numpy().copy(order="F")
            name = SCENE_CLASSES[drawn.classes[i, k]]
            box = drawn.boxes[i, k].tolist()
            objects.append((name, *box, {"segmentation": rle.encode(mask)}))
        rows.append((f"scene {i}", 64, 64, objects))
    return images, in_coco_form(list(SCENE_CLASSES[BACKGROUNDS:]), rows)


def read_boxes(data: Path, splits: tuple[str, ...]) -> dict:
    """Lists of splits.json, with boxes.json (xyxy), classes.json and images/ beside it."""
    known_splits = json.loads((data / "splits.json").read_bytes())
    classes = json.loads((data / "classes.json").read_bytes())["labels"]
    rows = {}
    for x in json.loads((data / "boxes.json").read_bytes()):
        objects = [(classes[y["cat"]], *y["box"], {"iscrowd": y["crowd"]}) for y in x["objects"]]
        rows[x["id"]] = (f"images/{x['id']}.jpg", x["h"], x["w"], objects)

    wanted = [name for split in splits for name in known_splits[split]]
    return in_coco_form(classes[1:], [rows[name] for name in wanted])  # the first is "other"


def read_voc(data: Path, splits: tuple[str, ...]) -> dict:
    """Lists such as VOC2007/trainval."""
    rows = []
    classes = set()
    for split in splits:
        year = Path(split).parent
        listing = data / year / f"ImageSets/Main/{Path(split).name}.txt"
        for line in listing.read_text().split("\n"):
            if not line.strip():
                continue
            file = data / year / f"Annotations/{line.split()[0]}.xml"
            height, width, objects = read_voc_annotation(file)
            rows.append((f"{year}/JPEGImages/{file.stem}.jpg", height, width, objects))
            classes |= {x[0] for x in objects}
    return in_coco_form(sorted(classes), rows)


def read_voc_annotation(file: Path) -> tuple[int, int, list[tuple]]:
    """The height, the width and the objects of an image.

    Boxes count pixels from 1 and contain the last one; difficult objects are ignored in scoring.
    """
    objects = []
    try:
        tree = ElementTree.fromstring(file.read_bytes())
        height = int(tree.findtext("size/height", ""))
        width = int(tree.findtext("size/width", ""))
        for item in tree.findall("object"):
            x0 = float(item.findtext("bndbox/xmin", ""))
            y0 = float(item.findtext("bndbox/ymin", ""))
            x1 = float(item.findtext("bndbox/xmax", ""))
            y1 = float(item.findtext("bndbox/ymax", ""))
            more = {"area": IGNORED} if item.findtext("difficult") == "1" else {}
            objects.append((item.findtext("name"), x0 - 1, y0 - 1, x1, y1, more))
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{file} is no annotation in VOC's form: {error}.") from error
    return height, width, objects


def read(data: Path, annotations: tuple[str, ...]) -> tuple[Any, dict]:
    """The images, and what the annotations say of them, of any layout."""
    if not annotations:
        raise UserError("Name what to train on with --annotations, to test on: --val-annotations.")
    where = f"The annotations {' '.join(annotations)} of {data}"

    images = data
    try:
        first = data / annotations[0]
        if first.suffix == ".json" and len(annotations) == 1:
            content = json.loads(first.read_bytes())
            apart = data / first.stem.split("_")[-1]  # of instances_val2017.json: val2017/
            if apart.is_dir():
                images = apart
        elif (data / "boxes.json").is_file():
            content = read_boxes(data, annotations)
        else:
            content = read_voc(data, annotations)
        check_annotations(content, where)
        names = [x["file_name"] for x in content["images"]]
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error}.") from error
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{where} are in no known form: {error!r}.") from error
    return harness.FolderImages(images, names), content


def check_annotations(content: dict, where: str) -> None:
    """Each object has a known image and category, and a box of four numbers."""
    classes = {x["id"]: x["name"] for x in content["categories"]}
    sizes = {x["id"]: (x["height"], x["width"]) for x in content["images"]}
    for x in content["annotations"]:
        x["bbox"] = [float(number) for number in x["bbox"]]
        known = x["image_id"] in sizes and x["category_id"] in classes
        if not known or len(x["bbox"]) != 4:
            raise UserError(f"{where} have no such image or category, or no box of four: {x}.")


# ---- the data set --------------------------------------------------------------------------------
class Objects:
    """Images with boxes, labels and masks of their objects; for training, flipped at random."""

    def __init__(self, images: Any, content: dict, classes: list, config: Any, *, train: bool):
        names = {x["id"]: x["name"] for x in content["categories"]}
        strange = [name for name in names.values() if name not in classes]
        if strange:
            raise UserError(f"The training annotations lack the class {strange[0]}.")

        known = known_objects(content, classes)
        dropped = len(content["annotations"]) - len(known)
        if dropped:
            print(f"{dropped} objects are left out: their boxes have no area.")
        self.masks = config.detector.startswith("mask")
        if self.masks and not all(x.get("segmentation") for x in known):
            raise UserError("Some objects have no mask: take a faster-rcnn as --detector.")

        self.images = images
        self.infos = content["images"]
        self.classes = classes
        self.train = train
        self.seed = config.seed
        self.epoch = 0

        infos = [{**x, "id": number} for number, x in enumerate(self.infos)]
        categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
        self.coco = COCO({"images": infos, "annotations": known, "categories": categories})
        self.objects = [objects_to_find(self.coco.imgToAnns[i]) for i in range(len(infos))]
        self.order = [i for i, x in enumerate(self.objects) if x or not train]
        if not any(self.objects):
            raise UserError("The annotations have no object to find.")

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, indices: list[int]) -> tuple[list[Tensor], list[dict], list[str]]:
        """A batch: images, targets in torchvision's form, and the files that are unreadable."""
        draws = harness.generator(self.seed, self.epoch, indices[0])
        flips = torch.rand(len(indices), generator=draws) < 0.5
        images = []
        targets = []
        unreadable = []

        for index, flip in zip(indices, flips.tolist(), strict=True):
            number = self.order[index]
            image, skipped = self.images[number]
            number = (number + len(skipped)) % len(self.infos)  # the next one, if unreadable

            target = self.target(number, image)
            if self.train and flip:
                image, target = flip_sample(image, target)
            images.append(image)
            targets.append(target)
            unreadable += skipped
        return images, targets, unreadable

    def target(self, number: int, image: Tensor) -> dict:
        info = self.infos[number]
        objects = self.objects[number]
        size = tuple(image.shape[1:])
        said = (info["height"], info["width"])
        if size != said:
            raise UserError(f"{info['file_name']} has height, width {size}, not {said} as said.")

        labels = torch.tensor([x["category_id"] for x in objects], dtype=torch.long)
        target = {"image_id": number, "boxes": boxes_of(objects), "labels": labels}
        if self.masks and self.train:
            target["masks"] = torch.zeros(len(objects), *size, dtype=torch.uint8)
            for mask, x in zip(target["masks"], objects, strict=True):
                mask.copy_(torch.from_numpy(self.coco.annToMask(x)))
        return target


def known_objects(content: dict, classes: list[str]) -> list[dict]:
    """The objects whose box has an area: images count from 0, categories and objects from 1."""
    names = {x["id"]: x["name"] for x in content["categories"]}
    numbers = {x["id"]: number for number, x in enumerate(content["images"])}
    known = []
    for x in content["annotations"]:
        left, top, width, height = x["bbox"]
        has_area = min(width, height) > 0.01
        in_range = abs(left) + abs(top) + width + height < 1e6  # NaN is not
        if has_area and in_range:
            own = {
                "id": len(known) + 1,
                "image_id": numbers[x["image_id"]],
                "category_id": classes.index(names[x["category_id"]]) + 1,
                "area": x.get("area") or width * height,
                "iscrowd": int(bool(x.get("iscrowd"))),
            }
            known.append({**x, **own})
    return known


def objects_to_find(annotations: Iterable[dict]) -> list[dict]:
    """Those that are neither crowds nor ignored in scoring."""
    return [x for x in annotations if not x["iscrowd"] and x["area"] < IGNORED]


def flip_sample(image: Tensor, target: dict) -> tuple[Tensor, dict]:
    """The mirror image of both."""
    boxes = target["boxes"].clone()
    boxes[:, ::2] = image.shape[-1] - boxes[:, [2, 0]]
    flipped = {**target, "boxes": boxes}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(-1)
    return image.flip(-1), flipped


def boxes_of(objects: list[dict]) -> Tensor:
    """The boxes (n, 4) of objects in COCO's form, x0 y0 x1 y1."""
    rows = torch.tensor([x["bbox"] for x in objects]).view(-1, 4)
    return box_convert(rows, "xywh", "xyxy")
