"""Images with objects, for detection: COCO, VOC, boxes.json, procedural scenes, all in COCO's form.

`from downstream.object_sets import Objects, read`. Layouts: docs/recipes/detect.md.
"""

import json
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


def in_coco_form(names: list[str], rows: list[tuple]) -> dict[str, list[dict]]:
    """Of rows (file, height, width, objects); an object: (class, x0, y0, x1, y1, more)."""
    content: dict[str, list[dict]] = {"images": [], "annotations": []}
    for i, (file, height, width, objects) in enumerate(rows):
        content["images"].append({"id": i, "file_name": file, "height": height, "width": width})
        for name, x0, y0, x1, y1, more in objects:
            known = {"category_id": names.index(name), "bbox": [x0, y0, x1 - x0, y1 - y0], **more}
            content["annotations"].append({"image_id": i, **known})
    return {**content, "categories": [{"id": i, "name": name} for i, name in enumerate(names)]}


def read_scenes(count: int) -> tuple[list, dict]:
    """Procedural scenes, and their objects as far as they are seen."""
    drawn = sample_scenes(count, (64, 64), objects=(1, 4), generator=harness.generator(0))
    rows = [(f"scene {i}", 64, 64, []) for i in range(count)]
    for i, k in drawn.valid.nonzero().tolist():
        mask = rle.encode((drawn.instances[i] == k + 1).byte().numpy().copy(order="F"))
        name, box = SCENE_CLASSES[drawn.classes[i, k]], drawn.boxes[i, k].tolist()
        rows[i][-1].append((name, *box, {"segmentation": mask}))
    images = [(image, ()) for image in (drawn.images * 255).round().byte()]
    return images, in_coco_form([*SCENE_CLASSES[4:]], rows)  # the first four are no objects


def read_boxes(data: Path, splits: tuple[str, ...]) -> dict:
    """Lists of splits.json, with boxes.json (xyxy), classes.json and images/ beside it."""
    files = [data / f"{name}.json" for name in ("splits", "classes", "boxes")]
    known, classes, images = (json.loads(file.read_bytes()) for file in files)
    names, rows = classes["labels"], {}
    for x in images:
        objects = [(names[y["cat"]], *y["box"], {"iscrowd": y["crowd"]}) for y in x["objects"]]
        rows[x["id"]] = (f"images/{x['id']}.jpg", x["h"], x["w"], objects)
    rows = [rows[name] for split in splits for name in known[split]]
    return in_coco_form(names[1:], rows)  # the first is "other"


def read_voc(data: Path, splits: tuple[str, ...]) -> dict:
    """Lists such as VOC2007/trainval. Boxes count pixels from 1, and contain the last one."""
    rows, corners = [], ("xmin", "ymin", "xmax", "ymax")
    for folder, name in ((Path(x).parent, Path(x).name) for x in splits):
        for line in (data / folder / f"ImageSets/Main/{name}.txt").read_text().split("\n"):
            if not line.strip():
                continue
            file = data / folder / f"Annotations/{line.split()[0]}.xml"
            try:
                tree, objects = ElementTree.fromstring(file.read_bytes()), []
                size = [int(tree.findtext(f"size/{x}", "")) for x in ("height", "width")]
                for item in tree.findall("object"):
                    x0, y0, *last = [float(item.findtext(f"bndbox/{x}", "")) for x in corners]
                    more = {"area": IGNORED} if item.findtext("difficult") == "1" else {}
                    objects.append((item.findtext("name"), x0 - 1, y0 - 1, *last, more))
            except (ElementTree.ParseError, ValueError) as error:
                raise UserError(f"{file} is no annotation in VOC's form: {error}.") from error
            rows.append((f"{folder}/JPEGImages/{file.stem}.jpg", *size, objects))
    return in_coco_form(sorted({x[0] for row in rows for x in row[-1]}), rows)


def read(data: Path, annotations: tuple[str, ...]) -> tuple[Any, dict]:
    """The images, and what the annotations say of them, of any layout."""
    if not annotations:
        raise UserError("Name what to train on with --annotations, to test on: --val-annotations.")
    where, folder = f"The annotations {' '.join(annotations)} of {data}", data
    try:
        if (path := data / annotations[0]).suffix == ".json" and len(annotations) == 1:
            content, apart = json.loads(path.read_bytes()), data / path.stem.split("_")[-1]
            folder = apart if apart.is_dir() else data  # of instances_val2017.json: val2017/
        elif (data / "boxes.json").is_file():
            content = read_boxes(data, annotations)
        else:
            content = read_voc(data, annotations)
        classes = {x["id"]: x["name"] for x in content["categories"]}
        images = {x["id"]: (x["height"], x["width"]) for x in content["images"]}
        for x in content["annotations"]:
            x["bbox"] = [float(number) for number in x["bbox"]]
            known = x["image_id"] in images and x["category_id"] in classes
            if not known or len(x["bbox"]) != 4:
                raise UserError(f"{where} have no such image or category, or no box of four: {x}.")
        names = [x["file_name"] for x in content["images"]]
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error}.") from error
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{where} are in no known form: {error!r}.") from error
    return harness.FolderImages(folder, names), content


class Objects:
    """Images with boxes, labels and masks of their objects; to train on, at random flipped."""

    def __init__(self, images: Any, content: dict, classes: list, config: Any, *, train: bool):
        names, known = {x["id"]: x["name"] for x in content["categories"]}, []
        numbers = {x["id"]: i for i, x in enumerate(content["images"])}
        if strange := [name for name in names.values() if name not in classes]:
            raise UserError(f"The training annotations lack the class {strange[0]}.")
        for x in content["annotations"]:
            left, top, width, height = x["bbox"]
            if min(width, height) > 0.01 and abs(left) + abs(top) + width + height < 1e6:  # no NaN
                known.append({**x, "id": len(known) + 1, "image_id": numbers[x["image_id"]]})
                label = classes.index(names[x["category_id"]]) + 1
                more = {"iscrowd": int(bool(x.get("iscrowd"))), "category_id": label}
                known[-1] |= {"area": x.get("area") or width * height, **more}
        if dropped := len(content["annotations"]) - len(known):
            print(f"{dropped} objects are left out: their boxes have no area.")
        masks = config.detector.startswith("mask")
        if masks and not all(x.get("segmentation") for x in known):
            raise UserError("Some objects have no mask: take a faster-rcnn as --detector.")
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
        self.images, self.infos, self.classes = images, content["images"], classes
        infos = [{**x, "id": i} for i, x in enumerate(self.infos)]
        self.coco = COCO({"images": infos, "annotations": known, "categories": categories})
        self.train, self.masks, self.seed, self.epoch = train, masks, config.seed, 0
        rows = [self.coco.imgToAnns[i] for i in range(len(infos))]
        self.objects = [[x for x in y if not x["iscrowd"] and x["area"] < IGNORED] for y in rows]
        self.order = [i for i, x in enumerate(self.objects) if x or not train]
        if not any(self.objects):
            raise UserError("The annotations have no object to find.")

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, indices: list[int]) -> tuple[list[Tensor], list[dict], list[str]]:
        draws = harness.generator(self.seed, self.epoch, indices[0])
        images, targets, unreadable = [], [], []
        for index, draw in zip(indices, torch.rand(len(indices), generator=draws), strict=True):
            image, skipped = self.images[i := self.order[index]]  # or the next one, if unreadable
            i, size = (i + len(skipped)) % len(self.infos), tuple(image.shape[1:])
            info, objects, target = self.infos[i], self.objects[i], {}
            if size != (said := (info["height"], info["width"])):
                raise UserError(
                    f"{info['file_name']} has height, width {size}, not {said} as said."
                )
            if self.masks and self.train:
                masks = [torch.from_numpy(self.coco.annToMask(x)) for x in objects]
                target["masks"] = torch.stack([torch.zeros(size).byte(), *masks])[1:]
            boxes = boxes_of(objects)
            if self.train and draw < 0.5:
                image, target = image.flip(-1), {k: x.flip(-1) for k, x in target.items()}
                boxes[:, ::2] = size[1] - boxes[:, [2, 0]]
            labels = torch.tensor([x["category_id"] for x in objects], dtype=torch.long)
            targets.append({"image_id": i, "boxes": boxes, "labels": labels, **target})
            images.append(image)
            unreadable += skipped
        return images, targets, unreadable


def boxes_of(objects: list[dict]) -> Tensor:
    return box_convert(torch.tensor([x["bbox"] for x in objects]).view(-1, 4), "xywh", "xyxy")
