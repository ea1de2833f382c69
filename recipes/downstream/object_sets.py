"""Images with objects, for detection, from COCO, VOC, boxes.json or scenes.

`from downstream.object_sets import Objects, read`. The layouts: docs/recipes/detect.md.

Crowds and difficult objects are ignored here: the readers only mark them.
"""

import os
from pathlib import Path
from typing import Any

import harness
import torch
from faster_coco_eval import COCO
from harness import UserError
from torch import Tensor
from torchvision.ops import box_convert
from downstream import cityscapes, coco, folders, voc
from downstream.fields import list_of
from downstream.label_files import read_json, reading
from downstream.records import (
    LabeledObject,
    LabeledSet,
    Mask,
    Record,
    clip_box,
    has_area,
    image_size,
)
from downstream.scene_sets import sample_set

__all__ = ["Objects", "boxes_of", "object_classes", "read", "sample_set"]

IGNORED_AREA = 1e12  # beyond the largest range of COCO's evaluation, which then ignores it


# ---- reading -------------------------------------------------------------------------------------
def read(data: Path, annotations: tuple[str, ...]) -> LabeledSet:
    """What the annotations say: a .json of COCO; splits of Cityscapes, of splits.json or of VOC."""
    if not annotations:
        raise UserError("Name what to train on with --annotations, to test on: --val-annotations.")
    first = data / annotations[0]
    if first.suffix == ".json":
        if len(annotations) > 1:
            raise UserError(f"{annotations[1]} is one file too many: name one .json of COCO alone.")
        content = read_json(first)
        with reading(first):
            rows = list_of(content, "annotations")
            is_panoptic = any(isinstance(x, dict) and "segments_info" in x for x in rows[:1])
        if is_panoptic:
            return coco.read_panoptic(data, first, content)
        return coco.read_instances(data, first, content)
    if (data / "gtFine").is_dir():
        return cityscapes.read_objects(data, annotations)
    if (data / "boxes.json").is_file():
        return folders.read_folder(data, annotations)
    return voc.read_main(data, annotations)


def object_classes(found: LabeledSet) -> list[str]:
    """The classes that a detector learns: all but the background and the stuff."""
    others = {found.background, *found.stuff}
    return [name for number, name in enumerate(found.classes) if number not in others]


def image_source(found: LabeledSet, data: Path | None) -> Any:
    """The images, as a source of the harness gives them."""
    if data is None:  # scenes: nothing is unreadable
        return [(record.image, ()) for record in found.records]
    files = [os.path.relpath(record.image, data) for record in found.records]
    return harness.FolderImages(data, files)


# ---- the data set --------------------------------------------------------------------------------
class Objects:
    """Images with boxes, labels and masks of their objects; for training, flipped at random.

    Args:
        found: The labeled set.
        classes: The names of the classes to find, which count from 1.
        config: The configuration of the recipe.
        train: Whether to leave out images without an object to train on, and to flip.
    """

    def __init__(self, found: LabeledSet, classes: list[str], config: Any, *, train: bool):
        strange = [name for name in object_classes(found) if name not in classes]
        if strange:
            raise UserError(f"The training annotations lack the class {strange[0]}.")

        self.images = image_source(found, config.data)
        self.infos = [image_info(i, x, config.data) for i, x in enumerate(found.records)]
        self.classes = classes
        self.masks = config.detector.startswith("mask")
        self.train = train
        self.seed = config.seed

        annotations = []
        self.mask_of: dict[int, Mask] = {}  # by the id of the annotation
        dropped = 0
        for info, record in zip(self.infos, found.records, strict=True):
            if record.objects is None:
                raise UserError(f"The annotations say nothing of the objects in {record.name}.")
            own = [x for x in record.objects if found.classes[x.number] in classes]  # no stuff
            size = (info["height"], info["width"])
            in_image = [x for x in own if has_area(x.box, size)]
            dropped += len(own) - len(in_image)
            for x in in_image:
                label = classes.index(found.classes[x.number]) + 1
                row = {"id": len(annotations) + 1, **coco_annotation(x, label, info)}
                if self.masks:
                    if x.mask is None:
                        raise UserError(
                            "Some objects have no mask: take a faster-rcnn as --detector."
                        )
                    self.mask_of[row["id"]] = x.mask
                    if not train:  # COCO's program scores by them
                        row["segmentation"] = x.mask.coco_form()
                annotations.append(row)
        if dropped and harness.is_main_process():
            kind = "training" if train else "test"
            harness.tell(
                f"{dropped} objects are left out: their boxes have no area in the {kind} images."
            )

        categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
        self.coco = COCO(
            {"images": self.infos, "annotations": annotations, "categories": categories}
        )
        self.objects = []  # of each image, those to train on: difficult ones too
        for number in range(len(self.infos)):
            self.objects.append([x for x in self.coco.imgToAnns[number] if not x["iscrowd"]])
        self.order = [i for i, x in enumerate(self.objects) if x or not train]
        wanted = [
            x for objects in self.objects for x in objects if train or x["area"] < IGNORED_AREA
        ]
        if not wanted:
            raise UserError("The annotations have no object to find.")

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        """Lists of one image, its target in torchvision's form, its index and what is unreadable.

        The key is (epoch, index).
        """
        epoch, index = key
        number = self.order[index]
        image, unreadable = self.images[number]
        number = (number + len(unreadable)) % len(self.infos)  # the next one, if unreadable

        target = self.target(number, image)
        flip = torch.rand((), generator=harness.generator(self.seed, epoch, index)) < 0.5
        if self.train and flip:
            image, target = flip_sample(image, target)
        return [image], [target], torch.tensor(index), list(unreadable)

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
                mask.copy_(torch.from_numpy(self.mask_of[x["id"]].draw()))
            # An outline between the centers of the pixels has none: it would teach an empty mask.
            has_pixels = target["masks"].amax((1, 2)) > 0
            for key in ("boxes", "labels", "masks"):
                target[key] = target[key][has_pixels]
        return target


def image_info(number: int, record: Record, data: Path | None) -> dict:
    """An image in COCO's form; its size is read from the file where the set does not say it."""
    size = record.size or image_size(record.image)
    name = record.name if data is None else os.path.relpath(record.image, data)
    return {"id": number, "file_name": name, "height": size[0], "width": size[1]}


def coco_annotation(x: LabeledObject, label: int, info: dict) -> dict:
    """An object in COCO's form, its box clipped to the image.

    In a test, COCO's program ignores crowds, and by their area objects that are difficult.
    """
    x0, y0, x1, y1 = clip_box(x.box, (info["height"], info["width"]))
    area = x.area if x.area and x.area > 0 else (x1 - x0) * (y1 - y0)
    if x.difficult:
        area = IGNORED_AREA
    return {
        "image_id": info["id"],
        "category_id": label,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": area,
        "iscrowd": int(x.crowd),
    }


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
