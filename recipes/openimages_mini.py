"""OpenImage-MINI of D3SSL: the OpenImages that follow COCO's counts of objects, as an image list.

    python recipes/openimages_mini.py --boxes train-annotations-bbox.csv
        --classes class-descriptions-boxable.csv --coco instances_train2017.json
        --prefix train/ --out openimages-mini.txt

An image is taken if it has an object of a class that COCO has too, and if no such class then has
more objects than in COCO. No image is read. More: docs/recipes/openimages_mini.md.
"""

import csv
import gzip
import hashlib
import io
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro


@dataclass(frozen=True)
class Config:
    boxes: Path  # The boxes of OpenImages: (oidv6-)train-annotations-bbox.csv; .gz may follow.
    classes: Path  # Their classes' names: class-descriptions-boxable.csv, of any version.
    coco: Path  # The instances of COCO: instances_train2017.json.
    out: Path  # The list to write, a .txt; its figures are written to OUT.json.
    images: Path | None = None  # Folder of images: only those that lie in it are taken.
    prefix: str = ""  # The images' folder as seen from the list's own, such as train/.
    groups: bool = True  # A box of a group is one object, as is a crowd of COCO; else neither is.
    mapping: Path | None = None  # Other counterparts, a JSON {COCO class: [OpenImages classes]}.
    seed: int = 0  # Fixes the order in which the images are visited.


# What OpenImages names otherwise or divides further; every other class has the same name in both.
COUNTERPARTS = {
    "person": ["Person", "Man", "Woman", "Boy", "Girl"],
    "car": ["Car", "Taxi", "Limousine", "Van"],
    "boat": ["Boat", "Canoe", "Gondola", "Barge"],
    "bird": [
        "Bird", "Magpie", "Woodpecker", "Blue jay", "Ostrich", "Penguin", "Raven", "Chicken",
        "Eagle", "Owl", "Duck", "Canary", "Goose", "Swan", "Falcon", "Parrot", "Sparrow", "Turkey",
    ],
    "cow": ["Cattle", "Bull"], "bear": ["Bear", "Brown bear", "Polar bear", "Panda"],
    "frisbee": ["Flying disc"], "skis": ["Ski"],
    "sports ball": [
        "Ball", "Football", "Cricket ball", "Golf ball", "Rugby ball", "Tennis ball",
        "Volleyball", "Volleyball (Ball)",  # in V4 and later
    ],
    "cup": ["Coffee cup", "Mug"], "bowl": ["Bowl", "Mixing bowl"],
    "knife": ["Knife", "Kitchen knife"], "donut": ["Doughnut"],
    "sandwich": ["Sandwich", "Submarine sandwich", "Hamburger"],
    "couch": ["Couch", "Sofa bed", "Loveseat", "Studio couch"], "bed": ["Bed", "Infant bed"],
    "dining table": ["Kitchen & dining room table", "Table"], "potted plant": ["Houseplant"],
    "tv": ["Television", "Computer monitor"], "remote": ["Remote control"],
    "mouse": ["Computer mouse"], "keyboard": ["Computer keyboard"],  # Mouse is the animal
    "cell phone": ["Mobile phone"], "microwave": ["Microwave oven"], "hair drier": ["Hair dryer"],
    "clock": ["Clock", "Alarm clock", "Digital clock", "Wall clock"],
}  # fmt: skip


if __name__ == "__main__":  # the arguments before torch: --help answers at once
    CONFIG = tyro.cli(Config, description=__doc__)

import harness
import numpy as np
from tqdm import tqdm


# ==== files =======================================================================================
@contextmanager
def opened(path: Path, what: str) -> Iterator[tuple[Any, Any]]:
    """The file and its text, unpacked if it is a .gz; whatever is wrong in it is a UserError."""
    try:
        with path.open("rb") as raw, ExitStack() as stack:
            file: Any = stack.enter_context(gzip.open(raw)) if path.suffix == ".gz" else raw
            yield raw, stack.enter_context(io.TextIOWrapper(file, "utf-8-sig", newline=""))
    except OSError as error:
        raise harness.UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # wrong content raises nearly anything
        reason = f"{type(error).__name__}: {error}"
        raise harness.UserError(f"{path} is not {what} ({reason}).") from error


def read_coco(path: Path, groups: bool) -> dict[str, int]:
    """How many objects each of COCO's classes has."""
    keep = "categories", "annotations", "id", "name", "category_id", "iscrowd"  # not the outlines
    with opened(path, "an instances file of COCO") as (_, text):
        content = json.load(text, object_hook=lambda x: {k: x[k] for k in keep if k in x})
        names = {x["id"]: x["name"] for x in content["categories"]}
        found = [x for x in content["annotations"] if groups or not x.get("iscrowd")]
        counts = Counter(names[x["category_id"]] for x in found)
        return {name: counts[name] for name in names.values()}


def read_classes(path: Path) -> dict[str, str]:
    """The display name of each of OpenImages' labels, such as /m/01g317."""
    with opened(path, "a list of OpenImages' classes") as (_, text):
        return dict(row for row in csv.reader(text) if row)  # V7's header is a class without boxes


def read_mapping(path: Path) -> dict[str, list[str]]:
    """The user's own counterparts."""
    with opened(path, "a mapping {COCO class: [OpenImages classes]}") as (_, text):
        content = json.load(text).items()  # a TypeError for all but lists of strings:
        return {name: [*map(str.casefold, list.copy(others))] for name, others in content}


def read_boxes(path: Path, groups: bool) -> tuple[list[str], list[str], np.ndarray]:
    """The images, the labels, and each box as `image << 32 | label`; rows come in any order."""
    images, labels, boxes = {}, {}, array("q")
    with opened(path, "a file of OpenImages' boxes") as (raw, text):
        rows = csv.reader(text)
        header = next(rows, [])
        i, j, k = (header.index(x) for x in ("ImageID", "LabelName", "IsGroupOf"))
        with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name) as bar:
            for number, row in enumerate(filter(None, rows)):
                if len(row) != len(header):
                    raise ValueError(f"line {rows.line_num} has {len(row)} columns")
                if groups or row[k] != "1":
                    image = images.setdefault(row[i], len(images))
                    boxes.append(image << 32 | labels.setdefault(row[j], len(labels)))
                if not number % 65536:
                    bar.update(raw.tell() - bar.n)
            bar.update(raw.tell() - bar.n)
    if not boxes:
        raise harness.UserError(f"{path} names no object.")
    return [*images], [*labels], np.frombuffer(boxes, np.int64)


# ==== the rule ====================================================================================
def counterparts(classes: dict, coco: dict, mapping: dict) -> dict[str, str]:
    """COCO's class of each of OpenImages' labels that has one."""
    if unknown := mapping.keys() - coco:
        raise harness.UserError(f"--mapping names {sorted(unknown)}, which COCO lacks.")
    owner: dict[str, str] = {}
    for name in coco:
        for other in mapping.get(name, COUNTERPARTS.get(name, [name])):
            if (first := owner.setdefault(other.casefold(), name)) != name:
                both = f"of both {first!r} and {name!r}"
                raise harness.UserError(f"{other!r} is a counterpart {both}: change --mapping.")
    shared = {label: owner.get(name.casefold()) for label, name in classes.items()}
    return {label: name for label, name in shared.items() if name is not None}


def tally(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each `image << 32 | second` once, sorted: image, second, how often."""
    pairs, counts = np.unique(pairs, return_counts=True)
    return pairs >> 32, pairs & 0xFFFFFFFF, counts


def choose(order: list[int], image: Any, which: Any, count: Any, limits: list[int]) -> list[int]:
    """The images of `order` that can be taken when their turn comes, no class of theirs too full.

    `image[i]` has `count[i]` objects of the shared class `which[i]`; `image` is sorted.
    """
    free, taken = np.array(limits), []
    starts = np.searchsorted(image, np.arange(max(order) + 2)).tolist()
    for i in order:
        a, b = starts[i], starts[i + 1]
        if a < b and (count[a:b] <= free[which[a:b]]).all():
            free[which[a:b]] -= count[a:b]
            taken.append(i)
    return taken  # `free` only shrinks: whatever did not fit in its turn fits no more


def select(config: Config) -> None:
    """Write the list and its figures."""
    if config.out.suffix != ".txt" or not config.out.parent.is_dir():
        raise harness.UserError(f"--out {config.out} must be a .txt in a folder that exists.")
    if config.images and not config.images.is_dir():
        raise harness.UserError(f"The image folder {config.images} does not exist.")
    classes, coco = read_classes(config.classes), read_coco(config.coco, config.groups)
    mapping = read_mapping(config.mapping) if config.mapping else {}
    owner = counterparts(classes, coco, mapping)
    lacking = [name for name in coco if name not in owner.values()]
    for name in lacking:
        print(f"warning: no class of OpenImages is a counterpart of COCO's {name!r}.")
    if not owner:
        raise harness.UserError(f"{config.classes} has no class of {config.coco}.")

    ids, labels, boxes = read_boxes(config.boxes, config.groups)
    numbers = {name: i for i, name in enumerate(coco)}
    which = np.array([numbers.get(owner.get(x, ""), -1) for x in labels])[boxes & 0xFFFFFFFF]
    image, which, count = tally((boxes >> 32 << 32 | which)[which >= 0])
    # A turn by the image's own hash depends neither on the order of the rows nor on other images.
    turns = [hashlib.blake2b(f"{config.seed} {x}".encode(), digest_size=16).digest() for x in ids]
    there = {*os.listdir(config.images)} if config.images else None
    order = [i for i, x in enumerate(ids) if there is None or f"{x}.jpg" in there]
    if not order:
        raise harness.UserError(f"No image of {config.boxes} lies in {config.images}.")
    taken = choose(sorted(order, key=turns.__getitem__), image, which, count, [*coco.values()])
    if not taken:
        raise harness.UserError(f"No image of {config.boxes} fits the rule.")

    mine = np.isin(image, taken)
    used = np.bincount(which[mine], count[mine], len(coco)).astype(int).tolist()
    image, label, count = tally(boxes)  # of all classes
    mine = np.isin(image, taken)
    figures = {
        "images": len(taken),
        "objects_per_image": count[mine].sum().item() / len(taken),
        "categories_per_image": mine.sum().item() / len(taken),
        "categories": len(np.unique(label[mine])),
        "shared": {
            name: {
                "taken": used[i], "coco": coco[name],
                "openimages": sorted(classes[x] for x in owner if owner[x] == name),
            } for name, i in numbers.items() if name not in lacking
        },
        "without_counterpart": lacking,
        "settings": asdict(config),
    }  # fmt: skip
    lines = sorted(os.path.join(config.prefix, f"{ids[i]}.jpg") for i in taken)
    text = json.dumps(figures, indent=2, default=str) + "\n"
    try:
        harness.write(Path(f"{config.out}.json"), text.encode())
        harness.write(config.out, "\n".join([*lines, ""]).encode())
    except OSError as error:
        raise harness.UserError(f"{config.out} cannot be written: {error.strerror}.") from error
    row = "{:26}{:>9}{:>12}{:>12}{:>9}".format
    print(row("", "#Imgs", "#Obj/Img", "#Cat/Img", "#Cat"))
    print(row(config.out.name, *(f"{x:.4g}" if x % 1 else x for x in [*figures.values()][:4])))
    print(row("OpenImage-MINI (Table 2)", "146K", "9.1", "3.20", "569"))


if __name__ == "__main__":
    harness.main(select, CONFIG)  # pyright: ignore[reportPossiblyUnboundVariable]
