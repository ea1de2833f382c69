"""OpenImage-MINI of D3SSL: a list of the images of OpenImages that follow the counts of COCO.

    python recipes/openimages_mini.py --boxes train-annotations-bbox.csv
        --classes class-descriptions-boxable.csv --coco instances_train2017.json
        --prefix train/ --out openimages-mini.txt

An image is taken if it has an object of a class that COCO has too, and if no such class then has
more objects than in COCO. No image is read. At its end the command prints the columns of the
paper's Table 2 for both sets; with --coco alone, it counts COCO and writes nothing.
More: docs/recipes/openimages_mini.md.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import sys
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Config:
    coco: Path  # Instances of COCO: instances_train2017.json.
    # Boxes of OpenImages: (oidv6-)train-annotations-bbox.csv, or the same as .csv.gz. Without them,
    # the classes and a list to write, the objects of COCO are counted.
    boxes: Path | None = None
    classes: Path | None = None  # Names of their classes: class-descriptions-boxable.csv.
    out: Path | None = None  # List to write, a .txt; its figures are written to OUT.json.
    images: Path | None = None  # Folder of images: only images that lie in it are taken.
    prefix: str = ""  # Folder of the images as seen from the list's own folder, such as train/.
    groups: bool = True  # Whether a box of a group, and a crowd of COCO, counts as one object.
    mapping: Path | None = None  # Other counterparts, as JSON {COCO class: [OpenImages classes]}.
    seed: int = 0  # Seed of the order in which the images are visited.


# The classes of COCO that OpenImages names otherwise or divides further. Every other class has the
# same name in both.
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


def read_options() -> Config:
    """Read the command line."""
    return tyro.cli(Config, description=__doc__)


if __name__ == "__main__":
    # The options are read before torch is imported, so that --help answers at once. This file then
    # runs a second time, as a module, and that time also the part below. The script itself ends at
    # sys.exit.
    config = read_options()
    import harness

    recipe = harness.module_of(__file__)
    sys.exit(harness.main(recipe.select, config))

import harness
import numpy as np
from tqdm import tqdm


def check_options(config: Config) -> None:
    """Raise a UserError of one sentence for a wrong option, before any data is read."""
    together = {"--boxes": config.boxes, "--classes": config.classes, "--out": config.out}
    missing = [option for option, path in together.items() if path is None]
    if 0 < len(missing) < len(together):
        raise harness.UserError(
            f"{missing[0]} is missing: give --boxes, --classes and --out together, or none of them "
            "to count COCO alone."
        )
    if config.out is not None:
        harness.check(config.out.suffix == ".txt", f"--out is {config.out}: give a .txt file.")
        harness.check(
            config.out.parent.is_dir(),
            f"--out is {config.out}: give a file in a folder that exists.",
        )
        for path in (config.out, figures_path(config.out)):
            harness.check_output("--out", path)
    else:  # what only a list needs would count for nothing
        for option, value in (
            ("--images", config.images),
            ("--prefix", config.prefix or None),
            ("--mapping", config.mapping),
        ):
            harness.check(
                value is None,
                f"{option} is {value}: leave it out, or give --boxes, --classes and --out too.",
            )
    harness.check(
        config.images is None or config.images.is_dir(),
        f"--images is {config.images}: give a folder that exists.",
    )
    harness.check(config.seed >= 0, f"--seed is {config.seed}: give 0 or more.")


# ==== files =======================================================================================
class Coco(NamedTuple):
    """The objects of COCO: how many of each class, and the columns of the paper's Table 2."""

    counts: dict[str, int]
    figures: dict[str, Any]


class Boxes(NamedTuple):
    """The boxes of OpenImages: two numbers of each, which index the two lists of names."""

    images: list[str]  # each ImageID
    labels: list[str]  # each LabelName, such as /m/01g317
    image: np.ndarray  # int32 (n,)
    label: np.ndarray  # int32 (n,)


@contextmanager
def opened(path: Path, what: str) -> Iterator[tuple[Any, Any]]:
    """The file and its text, unpacked if it is a .gz; whatever is wrong in it is a UserError."""
    try:
        with path.open("rb") as raw, ExitStack() as stack:
            unpacked: Any = raw
            if path.suffix == ".gz":
                unpacked = stack.enter_context(gzip.open(raw))
            text = io.TextIOWrapper(unpacked, "utf-8-sig", newline="")
            yield raw, stack.enter_context(text)
    except OSError as error:
        raise harness.UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # wrong content raises nearly anything
        reason = f"{type(error).__name__}: {error}"
        raise harness.UserError(f"{path} is not {what} ({reason}).") from error


def read_coco(path: Path, groups: bool) -> Coco:
    """The objects of an instances file of COCO; without `groups`, those that are no crowd."""
    wanted = {"categories", "annotations", "images"}
    wanted |= {"id", "name", "category_id", "image_id", "iscrowd"}

    def drop_the_rest(fields: dict) -> dict:  # outlines, which fill most of the file
        return {name: value for name, value in fields.items() if name in wanted}

    with opened(path, "an instances file of COCO") as (_, text):
        content = json.load(text, object_hook=drop_the_rest)
        names = {x["id"]: text_of(x["name"]) for x in content["categories"]}
        counts = dict.fromkeys(names.values(), 0)
        pairs = set()  # each image with each of its classes
        for annotation in content["annotations"]:
            if groups or not annotation.get("iscrowd"):
                name = names[annotation["category_id"]]
                counts[name] += 1
                pairs.add((annotation["image_id"], name))
        images = {x["id"] for x in content["images"]}
        with_object = {image for image, _ in pairs}
        if not with_object <= images:
            raise KeyError(min(with_object - images))

    if not images:
        raise harness.UserError(f"{path} names no image.")
    figures = {
        "images": len(images),
        "objects_per_image": sum(counts.values()) / len(images),
        "categories_per_image": len(pairs) / len(images),
        "categories": len({name for _, name in pairs}),
        "images_without_object": len(images - with_object),
    }
    return Coco(counts, figures)


def text_of(value: Any) -> str:
    """A name, which must be a text."""
    if not isinstance(value, str):
        raise TypeError(f"the name {value!r} is no text")
    return value


def read_classes(path: Path) -> dict[str, str]:
    """The display name of each of OpenImages' labels, such as /m/01g317."""
    with opened(path, "a list of OpenImages' classes") as (_, text):
        rows = [row for row in csv.reader(text) if row]
        return dict(rows)  # the header of V7 becomes a class that has no boxes


def read_mapping(path: Path) -> dict[str, list[str]]:
    """The user's own counterparts."""
    with opened(path, "a mapping {COCO class: [OpenImages classes]}") as (_, text):
        mapping = {}
        for name, others in json.load(text).items():
            if not isinstance(others, list):
                raise TypeError(f"{name!r} has no list of classes")
            mapping[name] = [str.casefold(other) for other in others]
        return mapping


def read_boxes(path: Path, groups: bool) -> Boxes:
    """The boxes of OpenImages, in any order; without `groups`, those of single objects alone."""
    images: dict[str, int] = {}
    labels: dict[str, int] = {}
    image_of_box = array("i")  # 4 bytes a box: OpenImages has 15 million
    label_of_box = array("i")
    with opened(path, "a file of OpenImages' boxes") as (raw, text):
        rows = csv.reader(text)
        header = next(rows, [])
        image_column = header.index("ImageID")
        label_column = header.index("LabelName")
        group_column = header.index("IsGroupOf")

        with tqdm(
            total=path.stat().st_size, unit="B", unit_scale=True, desc=harness.printable(path.name)
        ) as bar:
            for number, row in enumerate(filter(None, rows)):
                if len(row) != len(header):
                    raise ValueError(f"line {rows.line_num} has {len(row)} columns")
                if groups or row[group_column] != "1":
                    image_of_box.append(images.setdefault(row[image_column], len(images)))
                    label_of_box.append(labels.setdefault(row[label_column], len(labels)))
                if number % 65536 == 0:
                    bar.update(raw.tell() - bar.n)
            bar.update(raw.tell() - bar.n)

    if not image_of_box:
        raise harness.UserError(f"{path} names no object.")
    return Boxes(
        images=list(images),
        labels=list(labels),
        image=np.frombuffer(image_of_box, np.int32),
        label=np.frombuffer(label_of_box, np.int32),
    )


# ==== the rule ====================================================================================
def counterparts(classes: dict, coco: dict, mapping: dict) -> dict[str, str]:
    """The class of COCO of each label of OpenImages that has one."""
    unknown = mapping.keys() - coco
    if unknown:
        raise harness.UserError(f"--mapping names {sorted(unknown)}, which COCO lacks.")

    coco_class: dict[str, str] = {}  # of each name of OpenImages, in lower case
    for name in coco:
        others = COUNTERPARTS.get(name, [name])
        others = mapping.get(name, others)
        for other in others:
            first = coco_class.setdefault(other.casefold(), name)
            if first != name:
                raise harness.UserError(
                    f"{other!r} is a counterpart of both {first!r} and {name!r}: change --mapping."
                )

    found = {}
    for label, name in classes.items():
        if name.casefold() in coco_class:
            found[label] = coco_class[name.casefold()]
    return found


def tally(image: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each pair of image and kind that occurs, sorted, and how often: image, kind, count."""
    pairs = image.astype(np.int64) << 32 | kind
    pairs, count = np.unique(pairs, return_counts=True)
    return pairs >> 32, pairs & 0xFFFFFFFF, count


def visiting_order(images: list[str], config: Config) -> list[int]:
    """The numbers of the images in the order of their hashes; with --images, of those in it.

    The hash of an image depends neither on the order of the rows nor on other images.
    """
    numbers = list(range(len(images)))
    if config.images:
        files = set(os.listdir(config.images))
        numbers = [number for number in numbers if f"{images[number]}.jpg" in files]

    def turn(number: int) -> bytes:
        text = f"{config.seed} {images[number]}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    return sorted(numbers, key=turn)


def choose(order: list[int], image: Any, which: Any, count: Any, limits: list[int]) -> list[int]:
    """Visits the images in their order, and takes each one that fits into what is still free.

    `image[i]` has `count[i]` objects of the shared class `which[i]`; `image` is sorted. An image
    that does not fit in its turn does not fit later either, since the free numbers only shrink.
    """
    free = np.array(limits)
    taken = []
    starts = np.searchsorted(image, np.arange(max(order) + 2)).tolist()
    for number in order:
        rows = slice(starts[number], starts[number + 1])
        has_shared = rows.start < rows.stop
        if has_shared and (count[rows] <= free[which[rows]]).all():
            free[which[rows]] -= count[rows]
            taken.append(number)
    return taken


# ==== the list ====================================================================================
PAPER = {
    "OpenImage-MINI": {
        "images": "146K", "objects_per_image": 9.1, "categories_per_image": 3.20, "categories": 569,
    },
    "COCO": {
        "images": "118K", "objects_per_image": 7.4, "categories_per_image": 2.95, "categories": 80,
    },
}  # fmt: skip


def select(config: Config) -> None:
    """Write the list and its figures, or count the objects of COCO alone."""
    check_options(config)
    if config.boxes is None or config.classes is None or config.out is None:
        coco_figures = read_coco(config.coco, config.groups).figures
        print_table({config.coco.name: coco_figures, "COCO (Table 2)": PAPER["COCO"]})
        return

    classes = read_classes(config.classes)
    coco, coco_figures = read_coco(config.coco, config.groups)
    mapping = read_mapping(config.mapping) if config.mapping else {}
    coco_class = counterparts(classes, coco, mapping)  # of a label
    if not coco_class:
        raise harness.UserError(f"{config.classes} has no class of {config.coco}.")
    shared = [name for name in coco if name in coco_class.values()]
    lacking = [name for name in coco if name not in shared]
    for name in lacking:
        harness.tell(f"warning: no class of OpenImages is a counterpart of COCO's {name!r}.")

    boxes = read_boxes(config.boxes, config.groups)
    order = visiting_order(boxes.images, config)
    if not order:
        raise harness.UserError(f"No image of {config.boxes} lies in {config.images}.")

    class_numbers = {name: number for number, name in enumerate(coco)}
    number_of_label = [class_numbers.get(coco_class.get(label), -1) for label in boxes.labels]
    which = np.array(number_of_label)[boxes.label]
    is_shared = which >= 0
    image, which, count = tally(boxes.image[is_shared], which[is_shared])
    taken = choose(order, image, which, count, list(coco.values()))
    if not taken:
        raise harness.UserError(f"No image of {config.boxes} fits the rule.")

    in_list = np.isin(image, taken)
    used = np.bincount(which[in_list], count[in_list], len(coco)).astype(int).tolist()
    shared_figures = {}
    for name in shared:
        labels = [label for label in coco_class if coco_class[label] == name]
        shared_figures[name] = {
            "taken": used[class_numbers[name]],
            "coco": coco[name],
            "openimages": sorted(classes[label] for label in labels),
        }
    figures = {
        **table_row(boxes, taken),
        "shared": shared_figures,
        "without_counterpart": lacking,
        "coco": coco_figures,
        "settings": asdict(config),
    }

    names = [os.path.join(config.prefix, f"{boxes.images[number]}.jpg") for number in taken]
    write_list(config.out, sorted(names), figures)
    rows = {config.out.name: figures, config.coco.name: coco_figures}
    for name, row in PAPER.items():
        rows[f"{name} (Table 2)"] = row
    print_table(rows)


def table_row(boxes: Boxes, taken: list[int]) -> dict[str, Any]:
    """The columns of the paper's Table 2, which count the objects of all classes."""
    image, label, count = tally(boxes.image, boxes.label)
    in_list = np.isin(image, taken)
    return {
        "images": len(taken),
        "objects_per_image": count[in_list].sum().item() / len(taken),
        "categories_per_image": in_list.sum().item() / len(taken),
        "categories": len(np.unique(label[in_list])),
    }


def figures_path(out: Path) -> Path:
    return Path(f"{out}.json")


def write_list(out: Path, names: list[str], figures: dict[str, Any]) -> None:
    """Write the figures and the list; each file is there whole or not at all."""
    content = json.dumps(figures, indent=2, default=str)
    lines = "".join(f"{name}\n" for name in names)
    try:
        harness.write(figures_path(out), f"{content}\n".encode())
        harness.write(out, lines.encode())
    except OSError as error:
        raise harness.UserError(f"{out} cannot be written: {error.strerror}.") from error


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """Show the columns of Table 2 for each set, by its name."""
    line = "{:26}{:>9}{:>12}{:>12}{:>9}".format
    harness.tell(line("", "#Imgs", "#Obj/Img", "#Cat/Img", "#Cat"))
    for name, figures in rows.items():
        objects = f"{figures['objects_per_image']:.4g}"
        categories = f"{figures['categories_per_image']:.4g}"
        harness.tell(line(name, figures["images"], objects, categories, figures["categories"]))
