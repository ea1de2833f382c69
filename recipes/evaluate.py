"""Score frozen encoders by the protocols of the four papers, side by side.

    python recipes/evaluate.py runs/croc-coco timm:vit_small_patch16_224 random:resnet50
        --protocol linear-seg,kmeans-seg --data VOCdevkit --size 448 448

An encoder is a run folder or its encoder.safetensors, timm:NAME, torchvision:NAME or random:NAME.
Without --data it takes procedural scenes. It writes results.json, report.md (one table for each
protocol, with figures) and figures/. On several GPUs the images are shared out:

    torchrun --nproc-per-node 8 -- recipes/evaluate.py ...

The protocols, one by one: docs/recipes/evaluate.md. The rows of the papers' tables:
docs/recipes/tables.md.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Config:
    # Run folders, timm:NAME, torchvision:NAME or random:NAME.
    encoders: Annotated[tuple[str, ...], tyro.conf.Positional]
    protocol: str = "linear-seg,kmeans-seg,object-knn"  # Some of the protocols, or all.
    data: Path | None = None  # A labeled set (docs/recipes/labeled_images.md), or DAVIS.
    layout: str = "auto"  # Layout of the data: folder, coco, coco-stuff, voc, voc-main, ...
    mapping: Path | None = None  # JSON file that gives the set other classes.
    fit: str = "train"  # Split to fit on, and the gallery of the nearest neighbors.
    split: str = "val"  # Split to score.
    year: Literal["2017", "2016"] | None = None  # Of DAVIS, where the folder has both.
    size: tuple[int, int] = (224, 224)  # Height and width that images are resized to.
    limit: int = 0  # At most this many images of a split, randomly selected; 0 takes all.
    out: Path = Path("runs/evaluate")  # Folder to write to.
    seeds: int = 1  # Repetitions with other seeds of random encoders and of fits.
    kmeans_seeds: int = 5  # Repetitions of k-means, for each of the seeds.
    clusters: int = 0  # Clusters of kmeans-seg; 0 takes one for each class.
    neighbors: int = 20  # Nearest neighbors that vote; video has its own number.
    epochs: int = 25  # Epochs of the linear layers.
    lr: float = 0.1  # Learning rate of the linear layers.
    objects: int = 10  # At most this many objects of an image to fit on, randomly selected.
    cost: float | None = None  # C of the SVM; by default chosen for each class, of powers of 10.
    level: int = 0  # Level of the encoder, from 1, that dense protocols read; 0 is the last one.
    draws: int = 1000  # Draws of the bootstrap over the images.
    batch: int = 32  # Images that each process encodes at a time.
    workers: int = 2  # Processes that read images, for each process; 0 reads in the main one.
    # Range of values that is mapped to black ... white, for images whose file tells none.
    value_range: tuple[float, float] | None = None
    # Encoders of pictures get all channels of the images as stored: what the weights of new
    # channels start from, the mean of the old ones, 0, or at random.
    channel_init: Literal["mean", "zero", "random"] | None = None
    warn_after: float = 60.0  # Seconds without a new batch or listed file, then a warning.
    give_up_after: float = 600.0  # Seconds without a new batch or listed file, then the end.
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU, where there is one.


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
    sys.exit(harness.main(recipe.evaluate, config))

import harness
import torch
from downstream import bands, image_sets
from downstream.davis import find_lists
from downstream.diagnose import DIAGNOSTICS, Task, retrieval
from downstream.encoders import (
    Encoder,
    Start,
    change_channels,
    device_of,
    encoder_of,
    find_start,
    load_encoder,
)
from downstream.layouts import find_places
from downstream.protocols import FITTED, Features, position_prior
from downstream.report import mean_over_seeds, picture_name, report_text, write_results
from downstream.shards import ALONE, DAY, Shards, shards_of
from downstream.video import video
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm
import densekit as dk

PROTOCOLS = (*FITTED, *DIAGNOSTICS, "retrieval", "video")


def wanted_protocols(config: Config) -> list[str]:
    if config.protocol != "all":
        return config.protocol.split(",")
    if config.data is None or not find_lists(config.data):  # no DAVIS
        return [name for name in PROTOCOLS if name != "video"]
    if config.layout == "auto" and not find_places(config.data):  # DAVIS alone
        return ["video"]
    return list(PROTOCOLS)


def check_options(config: Config) -> None:
    """Raise a UserError of one sentence for a wrong option."""
    harness.check(
        len(config.encoders) > 0,
        "No encoder is named: give run folders, timm:NAME, torchvision:NAME or random:NAME.",
    )
    by_picture: dict[str, str] = {}
    for encoder in config.encoders:
        other = by_picture.setdefault(picture_name(encoder), encoder)
        harness.check(
            encoder == other,
            f"The encoders {other} and {encoder} would have pictures of the same name: evaluate "
            "them one by one, each with an --out of its own.",
        )
    protocols = wanted_protocols(config)
    known = ", ".join(PROTOCOLS)
    for name in protocols:
        harness.check(
            name in PROTOCOLS,
            f"--protocol is {config.protocol}: there is no protocol {name!r}, give all or some of "
            f"{known}.",
        )
    harness.check(
        len(protocols) == len(set(protocols)),
        f"--protocol is {config.protocol}: name each protocol once.",
    )
    check_data(config, protocols)
    check_numbers(config)
    harness.check(
        config.device != "cuda" or torch.cuda.is_available(),
        "--device is cuda: no GPU is visible, give cpu.",
    )


def check_numbers(config: Config) -> None:
    harness.check(
        min(config.size) >= 1,
        f"--size is {harness.as_typed(config.size)}: give a height and a width of 1 pixel or more.",
    )
    harness.check(config.limit >= 0, f"--limit is {config.limit}: give 0 (all images) or more.")
    harness.check(config.seeds >= 1, f"--seeds is {config.seeds}: give 1 or more.")
    harness.check(
        config.kmeans_seeds >= 1, f"--kmeans-seeds is {config.kmeans_seeds}: give 1 or more."
    )
    harness.check(config.level >= 0, f"--level is {config.level}: give 0 (the last) or more.")

    harness.check(
        config.clusters >= 0, f"--clusters is {config.clusters}: give 0 (the classes) or more."
    )
    harness.check(config.neighbors >= 1, f"--neighbors is {config.neighbors}: give 1 or more.")
    harness.check(config.epochs >= 1, f"--epochs is {config.epochs}: give 1 or more.")
    harness.check_finite("--lr", config.lr)
    harness.check(config.objects >= 1, f"--objects is {config.objects}: give 1 or more.")
    if config.cost is not None:
        harness.check_above_zero("--cost", config.cost)

    harness.check(config.draws >= 1, f"--draws is {config.draws}: give 1 or more.")
    harness.check(config.batch >= 1, f"--batch is {config.batch}: give 1 image or more.")
    harness.check(config.workers >= 0, f"--workers is {config.workers}: give 0 or more.")
    harness.check_value_range(config.value_range)
    harness.check_patience(config)


def check_data(config: Config, protocols: list[str]) -> None:
    harness.check(
        config.data is None or config.data.is_dir(),
        f"--data is {config.data}: give a folder that exists.",
    )
    harness.check(
        "video" not in protocols or (config.data is not None and bool(find_lists(config.data))),
        f"--data is {config.data}: the protocol video needs the folder of DAVIS.",
    )

    layouts = ["auto", "scenes"] if config.data is None else ["auto", *image_sets.LAYOUTS]
    harness.check(
        config.layout in layouts,
        f"--layout is {config.layout}: give one of {', '.join(layouts)}.",
    )
    harness.check(
        config.mapping is None or config.mapping.is_file(),
        f"--mapping is {config.mapping}: give a JSON file that exists.",
    )


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"it cannot be made a folder ({error.strerror}), give another"
        raise harness.UserError(f"--out is {out}: {problem}.") from error
    for name in ("results.json", "report.md", "figures/example.png"):
        path = out / name
        has_folder = path.parent.exists()  # that of the figures is made with the first one
        if has_folder:
            harness.check_output("--out", path)


# ==== samples =====================================================================================
class Sample(NamedTuple):
    """An image as an encoder takes it. What no protocol needs is empty."""

    image: Tensor  # resized: uint8 (3, h, w); of bands, float (c, h, w)
    boxes: Tensor  # (n, 4) in [0, 1]
    classes: Tensor  # (n,): the class of each box
    area: Tensor  # (classes,): the share of each class in the image
    presence: Tensor  # int8 (classes,): 1 of the image, 0 not, -1 unsure


ALL_PARTS = frozenset({"objects", "classes"})  # what an image may need to be read for


class Samples:
    """A labeled set at one size. `samples.read(index, parts)` reads what some protocols need.

    Of a `gallery`, the boxes are at most --objects of each image; else they are all.
    """

    def __init__(self, images: image_sets.ImageSet, config: Config, *, gallery: bool = False):
        self.images = images
        self.classes = images.classes
        self.size = config.size
        self.objects = config.objects if gallery else None
        count = min(config.limit or len(images), len(images))
        order = torch.randperm(len(images), generator=harness.generator(0))
        self.rows = order[:count].sort().values.tolist()
        self.labels = LabelMaps(images, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.read(index, ALL_PARTS)

    def with_parts(self, parts: frozenset[str]) -> "Images":
        """The same images as a DataLoader reads them, with some parts alone."""
        return Images(self, parts)

    def read(self, index: int, parts: frozenset[str]) -> Sample:
        row = self.rows[index]
        image = self.images.read_image(row)
        size = (image.shape[-2], image.shape[-1])
        boxes = torch.zeros(0, 4)
        classes = torch.zeros(0, dtype=torch.long)
        area = torch.zeros(len(self.classes))
        presence = torch.full((len(self.classes),), -1, dtype=torch.int8)

        if "objects" in parts:
            self.images.check_size(row, size)
            numbers = self.object_numbers(index)
            boxes, classes = self.images.read_boxes(row, size)
            height, width = size
            boxes = boxes[numbers] / torch.tensor([width, height, width, height])
            classes = classes[numbers]
        if "classes" in parts:
            area = self.class_areas(row, size)
            known = self.images.image_classes(row, size)
            if known is not None:
                presence = known
            elif area.any():
                presence = (area > 0).to(torch.int8)
        return Sample(resize(image, self.size), boxes, classes, area, presence)

    def object_numbers(self, index: int) -> list[int]:
        """The numbers of the boxes that count, of those of an image."""
        row = self.rows[index]
        boxes, _ = self.images.read_boxes(row)
        order = torch.randperm(len(boxes), generator=harness.generator(1, row))
        return order[: self.objects].sort().values.tolist()

    def class_areas(self, row: int, size: tuple[int, int]) -> Tensor:
        """The share of each class in an image: of its pixels, or without labels of its largest box.

        Without boxes too, a class that the set gives to the whole image has all of it.
        """
        count = len(self.classes)
        pixels = size[0] * size[1]
        labels = self.images.draw_labels(row, size)
        if labels is not None:
            numbers = labels.flatten().long()
            known = numbers[(numbers >= 0) & (numbers < count)]
            return torch.bincount(known, minlength=count) / pixels

        boxes, box_classes = self.images.read_boxes(row, size)
        classes = self.images.image_classes(row, size)
        if classes is not None and not len(boxes):
            return (classes == 1).float()
        of_boxes = dk.box_area(boxes)[:, None] / pixels
        of_classes = torch.nn.functional.one_hot(box_classes, count) * of_boxes
        nothing = torch.zeros(1, count)
        return torch.cat([nothing, of_classes]).amax(0)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    return transforms.resize(image, list(size), antialias=True)


class LabelMaps(Sequence[Any]):
    """The label maps of some images at their own size, each read when it is asked for."""

    def __init__(self, images: image_sets.ImageSet, rows: list[int]):
        self.images = images
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.images.read_labels(self.rows[index])


class Images:
    """The images of a split as a DataLoader reads them, for some parts of the features."""

    def __init__(self, samples: Samples, parts: frozenset[str]):
        self.samples = samples
        self.parts = parts

    def __getitem__(self, index: int) -> Sample:
        return self.samples.read(index, self.parts)


class DisturbedObjects:
    """The objects of a split, each in its image, with another image of the split around its box.

    The other image is drawn for the object, whatever the batch and the process.
    """

    def __init__(self, samples: Samples, own: range):
        self.samples = samples
        self.places = [(index, n) for index in own for n in samples.object_numbers(index)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        place, number = self.places[index]
        samples = self.samples
        row = samples.rows[place]
        image = samples.images.read_image(row)
        size = (image.shape[-2], image.shape[-1])
        samples.images.check_size(row, size)
        boxes, classes = samples.images.read_boxes(row, size)
        height, width = size
        box = boxes[number] / torch.tensor([width, height, width, height])

        draws = harness.generator(6, row, number)
        step = 1 + int(torch.randint(len(samples) - 1, (), generator=draws))
        other_row = samples.rows[(place + step) % len(samples)]  # never the image itself
        other = samples.images.read_image(other_row)
        pasted = disturb(resize(image, samples.size), resize(other, samples.size), box)
        nothing = torch.zeros(0)
        return Sample(pasted, box[None], classes[number : number + 1], nothing, None)


def disturb(image: Tensor, other: Tensor, box: Tensor) -> Tensor:
    """An image with another one around a box in [0, 1]."""
    h, w = image.shape[-2:]
    pixel_box = box * torch.tensor([w, h, w, h])
    inside = dk.boxes_to_mask(pixel_box[None], (h, w))
    return torch.where(inside, image, other)


def load_batches(
    source: Any, config: Config, title: str, numbers: range, *, silent: bool = False
) -> Iterable[list[Any]]:
    """Some items in order, in batches of nearly the same size, with a progress bar."""
    if not len(numbers):
        return []
    count = math.ceil(len(numbers) / config.batch)
    parts = torch.tensor(list(numbers)).tensor_split(count)
    context = "fork" if config.workers else None
    loader = DataLoader(
        source,
        batch_sampler=[part.tolist() for part in parts],
        collate_fn=harness.share_batch,
        num_workers=config.workers,
        worker_init_fn=harness.start_worker,
        multiprocessing_context=context,
    )
    patience = harness.Patience(config.warn_after, config.give_up_after)
    loaded = harness.load(loader, patience)
    return tqdm(
        loaded,
        desc=harness.printable(title),
        total=count,
        unit="batch",
        leave=False,
        disable=silent,
    )


def open_samples(config: Config) -> tuple[Samples, Samples]:
    """The split to fit on, and the split to score."""
    fit = Samples(open_split("--fit", config.fit, config), config, gallery=True)
    test = Samples(open_split("--split", config.split, config), config)
    if fit.classes != test.classes:
        raise harness.UserError("The two splits name different classes.")
    return fit, test


def check_needs(samples: tuple[Samples, Samples], protocols: list[str], config: Config) -> None:
    """A UserError for a protocol that asks for what a split does not have, before hours of work."""
    splits = zip(("--fit", "--split"), (config.fit, config.split), samples, strict=True)
    for option, name, split in splits:
        records = [split.images.records[row] for row in split.rows]
        has_objects = any(record.objects for record in records)
        for protocol in protocols:
            harness.check(
                has_objects or not protocol.endswith("object-knn"),
                f"--protocol {protocol} needs objects, and {option} {name} has none: leave the "
                "protocol out.",
            )


def open_split(option: str, split: str, config: Config) -> image_sets.ImageSet:
    try:
        images = image_sets.open_images(config.data, config.layout, split, config.mapping)
    except image_sets.UnknownNameError as error:
        raise harness.UserError(f"{option} is {split}: {error}") from error
    images.value_range = config.value_range
    return images


def open_videos(config: Config) -> list[image_sets.Video]:
    try:
        return image_sets.open_videos(config.data, config.split, year=config.year)
    except image_sets.UnknownNameError as error:
        raise harness.UserError(f"--split is {config.split}: {error}") from error


# ==== features ====================================================================================
def as_floats(images: list[Tensor], encoder: Encoder) -> Tensor:
    """Images as the encoder takes them, on its device: pictures in [0, 1], bands as they are."""
    return bands.in_unit(torch.stack(images).to(device_of(encoder)))


class Kept:
    """Rows that come batch by batch; what takes much room, in half precision if that holds it.

    It holds no number above 65504, and numbers below 6e-5 badly. Then they stay as they are.
    """

    def __init__(self, encoder: Encoder, count: int | None = None, *, half: bool = False):
        self.encoder = encoder
        self.half = half
        self.count = count  # of all rows, if it is known: then they are written in their place
        self.place: Tensor | None = None
        self.filled = 0
        self.parts: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        largest = rows.abs().amax() if rows.numel() else rows.new_zeros(())
        harness.check(
            bool(largest.isfinite()),
            f"{self.encoder.name} gives features that are not finite: its weights or its "
            "normalization are broken.",
        )
        fits = bool(((largest < 65504) & (largest > 1e-2)) | (largest == 0))
        rows = (rows.half() if fits and self.half else rows.float()).cpu()
        if self.count is None:
            self.parts.append(rows)
            return

        if self.place is None:
            self.place = empty_like(self.count, rows)
        if rows.dtype != self.place.dtype and rows.dtype == torch.float32:
            wider = empty_like(self.count, rows)
            wider[: self.filled] = self.place[: self.filled]
            self.place = wider
        self.place[self.filled : self.filled + len(rows)] = rows
        self.filled += len(rows)

    def all(self) -> Tensor | None:
        """All rows, in the widest precision of any batch; None without a row."""
        if self.count is not None:
            return self.place
        return torch.cat(self.parts) if self.parts else None


def empty_like(count: int, rows: Tensor) -> Tensor:
    """Room for vectors (count, d), or maps (count, d, h, w) with a cell's numbers side by side."""
    d, *size = rows.shape[1:]
    return torch.empty(count, *size, d, dtype=rows.dtype).movedim(-1, 1)


def gather_maps(kept: Kept, shards: Shards) -> Tensor | None:
    """The maps of all processes on the first one; the numbers of a cell stay side by side."""
    maps = kept.all()
    cells_last = None if maps is None else maps.movedim(1, -1)
    gathered = shards.gather(cells_last)
    return None if gathered is None else gathered.movedim(-1, 1)


def pool_boxes(maps: Tensor, boxes: Tensor) -> Tensor:
    """RoIAlign of 7 x 7 cells, averaged: one row for each box, of a map of its own."""
    rois = dk.roi_align(maps.float(), boxes[:, None].to(maps.device), 7).features
    return rois.mean((-2, -1))[:, 0]


def pool_to_vector(maps: Tensor, numbers: int = 9000) -> Tensor:
    """Maps (n, d, h, w), pooled to squares, as rows of about 9,000 numbers (DUPR, Table 1b)."""
    side = max(1, round((numbers / maps.shape[1]) ** 0.5))
    size = [min(side, length) for length in maps.shape[-2:]]
    return torch.nn.functional.adaptive_avg_pool2d(maps.float(), size).flatten(1)


@torch.no_grad()
def encode(
    encoder: Encoder,
    samples: Samples,
    config: Config,
    parts: frozenset[str] = frozenset({"maps", "pooled", "vectors", "objects", "classes"}),
    shards: Shards = ALONE,
) -> Features | None:
    """The features of a split that some protocols need, on the first process; None on the others.

    Without a part it is the label maps alone, and no image is read.
    """
    own = shards.part(len(samples)) if parts else range(0)
    maps = Kept(encoder, len(own), half=True)
    pooled: list[Kept] = []
    vectors: list[Kept] = []
    objects = Kept(encoder)
    area = []
    presence = []
    object_classes = []
    object_images = []

    def keep(batch: list[Sample], first: int) -> None:
        """Keep what the images have; their maps are gone before those of the next ones are made."""
        images = as_floats([x.image for x in batch], encoder)
        levels = encoder.levels(images, stem="vectors" in parts)
        if "maps" in parts:
            maps.add(levels[config.level - 1])  # level 0 is the last one
        if "pooled" in parts:
            last_levels = levels[-4:]
            if not pooled:
                pooled.extend(Kept(encoder, len(own)) for _ in last_levels)
            for kept, level in zip(pooled, last_levels, strict=True):
                kept.add(level.float().mean((-2, -1)))
        if "vectors" in parts:
            if not vectors:
                vectors.extend(Kept(encoder, len(own), half=True) for _ in levels)
            for kept, level in zip(vectors, levels, strict=True):
                kept.add(pool_to_vector(level))
        if "objects" in parts:
            counts = torch.tensor([len(x.boxes) for x in batch])
            owners = torch.arange(len(batch)).repeat_interleave(counts)  # of each box, its image
            boxes = torch.cat([x.boxes for x in batch])
            level = levels[config.level - 1]
            for start in range(0, len(owners), config.batch):
                part = slice(start, start + config.batch)
                own_maps = level[owners[part].to(level.device)]
                objects.add(pool_boxes(own_maps, boxes[part]))
            object_classes.extend(x.classes for x in batch)
            object_images.append(owners + first)
        area.append(torch.stack([x.area for x in batch]))
        presence.append(torch.stack([x.presence for x in batch]))

    source = samples.with_parts(parts)
    first = own.start
    for batch in load_batches(source, config, encoder.name, own, silent=not shards.is_main):
        keep(batch, first)
        first += len(batch)

    together = {
        "maps": gather_maps(maps, shards),
        "area": shards.gather_parts(area),
        "presence": shards.gather_parts(presence),
        **gather_objects(objects, object_classes, object_images, shards),
    }
    levels_of = {}
    for name, kept_levels in {"pooled": pooled, "vectors": vectors}.items():
        levels_of[name] = gather_levels(kept_levels, shards)
    if not shards.is_main:
        return None
    if together["maps"] is None:
        together["maps"] = torch.zeros(0, 1, 1, 1)
    if together["area"] is None:
        together["area"] = torch.zeros(0, 1)
        together["presence"] = torch.zeros(0, 1, dtype=torch.int8)
    features = Features(
        labels=samples.labels,
        classes=list(samples.classes),
        background=samples.images.background,
        **together,
        **levels_of,
    )
    return on_device(features, device_of(encoder))


def gather_levels(kept: list[Kept], shards: Shards) -> list[Tensor]:
    """The rows of each level on the first process, if there are any.

    A process without an image knows no level, and yet has to take part for each of them.
    """
    count = shards.most(len(kept))
    rows = [x.all() for x in kept] or [None] * count
    gathered = [shards.gather(x) for x in rows]
    return [x for x in gathered if x is not None]


def gather_objects(
    objects: Kept, classes: list[Tensor], images: list[Tensor], shards: Shards
) -> dict[str, Tensor]:
    """The objects of all processes on the first one: features, classes, numbers of the images."""
    rows = shards.gather(objects.all())
    of_classes = shards.gather_parts(classes)
    of_images = shards.gather_parts(images)
    nothing = torch.zeros(0, dtype=torch.long)
    return {
        "objects": torch.zeros(0, 1) if rows is None else rows,
        "object_classes": nothing if of_classes is None else of_classes,
        "object_images": nothing if of_images is None else of_images,
    }


@torch.no_grad()
def encode_disturbed(
    encoder: Encoder, samples: Samples, config: Config, shards: Shards = ALONE
) -> Features | None:
    """The features of the objects of a split, each with another image around its box."""
    harness.check(
        len(samples) >= 2, "To disturb an object takes another image: the split has 1 alone."
    )
    source = DisturbedObjects(samples, shards.part(len(samples)))
    objects = Kept(encoder)
    classes = []
    title = f"{encoder.name} (disturbed)"
    numbers = range(len(source))
    for batch in load_batches(source, config, title, numbers, silent=not shards.is_main):
        images = as_floats([x.image for x in batch], encoder)
        level = encoder.levels(images)[config.level - 1]
        objects.add(pool_boxes(level, torch.cat([x.boxes for x in batch])))
        classes += [x.classes for x in batch]
        del images, level  # before there is a next batch of them

    owners = [torch.tensor([place for place, _ in source.places], dtype=torch.long)]
    found = gather_objects(objects, classes, owners, shards)
    if not shards.is_main:
        return None
    features = Features(
        maps=torch.zeros(0, 1, 1, 1),
        pooled=[],
        labels=samples.labels,
        area=torch.zeros(0, len(samples.classes)),
        presence=torch.zeros(0, len(samples.classes), dtype=torch.int8),
        classes=list(samples.classes),
        background=samples.images.background,
        **found,
    )
    return on_device(features, device_of(encoder))


def on_device(features: Features, device: torch.device) -> Features:
    """The features on the GPU, where they fit into half of its free memory."""
    if device.type != "cuda":
        return features
    own = [features.maps, features.objects, *features.pooled, *features.vectors]
    free, _ = torch.cuda.mem_get_info(device)
    if sum(x.nbytes for x in own) > free / 2:
        return features
    return features._replace(
        maps=features.maps.to(device),
        objects=features.objects.to(device),
        pooled=[x.to(device) for x in features.pooled],
        vectors=[x.to(device) for x in features.vectors],
    )


# ==== evaluation ==================================================================================
class Split:
    """The features of one split, made when they are asked for, with all parts that are planned."""

    def __init__(self, samples: Samples, planned: frozenset[str]):
        self.samples = samples
        self.planned = planned
        self.parts: frozenset[str] | None = None  # that were made
        self.made: Features | None = None
        self.disturbed: Features | None = None
        self.is_disturbed_made = False

    def features(
        self, encoder: Encoder, parts: frozenset[str], config: Config, shards: Shards
    ) -> Features | None:
        """The features with some parts; None on other processes than the first one."""
        if self.parts is None or not parts <= self.parts:
            self.parts = parts | self.planned
            self.made = encode(encoder, self.samples, config, self.parts, shards)
        return self.made

    def disturbed_features(
        self, encoder: Encoder, config: Config, shards: Shards
    ) -> Features | None:
        """The features of the disturbed objects; None on other processes than the first one."""
        if not self.is_disturbed_made:
            self.disturbed = encode_disturbed(encoder, self.samples, config, shards)
            self.is_disturbed_made = True
        return self.disturbed


def planned_parts(config: Config, *, of_fit: bool) -> frozenset[str]:
    """What the protocols of the command need of the split to fit on, or of the one to score."""
    parts = frozenset()
    for name in wanted_protocols(config):
        if name == "retrieval" and not of_fit:
            parts |= {"maps", "classes"}
        if name in FITTED and (FITTED[name].needs_fit or not of_fit):
            parts |= FITTED[name].parts
    return parts - {"disturbed"}


class Evaluation:
    """One encoder on the data. Its features are made once, when a protocol asks for them.

    Several processes make the same calls, and share the images out. The first one has the figures.
    """

    def __init__(
        self,
        encoder: Encoder,
        samples: Any,
        videos: Any,
        config: Config,
        shards: Shards = ALONE,
    ):
        self.encoder = encoder
        self.samples = samples  # the split to fit on and the split to score; None for video alone
        self.videos = videos
        self.config = config
        self.shards = shards
        if samples is not None:
            for split in samples:
                split.images.bands = encoder.bands
            self.fit = Split(samples[0], planned_parts(config, of_fit=True))
            self.test = Split(samples[1], planned_parts(config, of_fit=False))

    def features(
        self, parts: frozenset[str] = frozenset({"maps"}), *, needs_fit: bool = True
    ) -> tuple[Any, Any]:
        """The features of the split to fit on and of the split to score, with some parts.

        Without `needs_fit` the split to fit on has its label maps, and maybe more. On other
        processes than the first one both are None.
        """
        if "disturbed" in parts:
            fit = self.fit.disturbed_features(self.encoder, self.config, self.shards)
            test = self.test.disturbed_features(self.encoder, self.config, self.shards)
            return fit, test
        parts_of_fit = parts if needs_fit else frozenset()
        fit = self.fit.features(self.encoder, parts_of_fit, self.config, self.shards)
        test = self.test.features(self.encoder, parts, self.config, self.shards)
        return fit, test

    def score(self, protocol: str, seed: int = 0) -> dict:
        """The figures of a protocol; on other processes than the first one they are empty.

        The seed is that of a fit: what the protocol draws depends on it.
        """
        folder = self.config.out / "figures"
        if protocol == "video":
            return video(self.encoder, self.videos, self.config, self.shards)
        if protocol == "retrieval":
            test = self.features(frozenset({"maps", "classes"}), needs_fit=False)[1]
            if not self.shards.is_main:
                return {}
            return retrieval(self.encoder, self.picture, test, self.config, folder)
        if protocol in DIAGNOSTICS:
            task = Task(self.samples[1], load_batches, self.config, folder, self.shards)
            return DIAGNOSTICS[protocol](self.encoder, task)
        chosen = FITTED[protocol]
        fit, test = self.features(chosen.parts, needs_fit=chosen.needs_fit)
        if not self.shards.is_main:
            return {}
        return chosen.score(fit, test, self.config, seed)

    def picture(self, index: int) -> Tensor:
        """An image of the split to score to look at, RGB in [0, 1]."""
        image = bands.in_unit(self.samples[1].read(index, frozenset()).image)
        return image if self.encoder.bands is None else bands.to_pictures(image)

    def score_prior(self) -> dict:
        """The figures of the position prior, which looks at no image."""
        fit, test = self.features(needs_fit=False)
        return position_prior(fit, test, self.config) if self.shards.is_main else {}


def open_encoder(name: str, seed: int, samples: Any, config: Config) -> Encoder:
    """An encoder, for images as it was trained on, or with --channel-init as they are stored."""
    encoder = load_encoder(name, seed=seed)
    if encoder.bands is not None:
        harness.check(
            "video" not in wanted_protocols(config),
            f"--protocol is {config.protocol}: {name} takes images of "
            f"{bands.named(encoder.bands.channels)}, and the videos of DAVIS are RGB.",
        )
        return encoder
    if samples is None:
        return encoder
    paths = samples[0].images.images
    if config.channel_init is None:
        first = next(iter(paths.values()))
        channels = bands.more_than_picture(first) if isinstance(first, Path) else 0
        harness.check(
            channels == 0,
            f"{first} is no picture, it has {bands.named(channels)} as stored, and {name} takes "
            "RGB: give --channel-init mean, zero or random.",
        )
        return encoder
    return encoder_of(start_for_bands(name, paths, config), seed=seed)


def start_for_bands(name: str, paths: dict[str, Any], config: Config) -> Start:
    """The weights of an encoder of pictures for the channels of images, which are measured."""
    files = [str(path.absolute()) for path in paths.values() if isinstance(path, Path)]
    harness.check(
        len(files) > 0,
        f"--channel-init is {config.channel_init}: leave it out, since scenes are RGB pictures.",
    )
    source = bands.open_files(files, config.value_range)
    bands.complete(source, None, None)
    return change_channels(find_start(name), source.bands, config.channel_init)


def check_size(encoder: Encoder, config: Config) -> None:
    """The encoder must take images of the size, and have the level."""
    reason = encoder.takes(config.size)
    harness.check(
        not reason, f"--size is {harness.as_typed(config.size)}: {encoder.name} {reason}."
    )
    harness.check(
        config.level <= len(encoder.strides),
        f"--level is {config.level}: {encoder.name} has the levels 1 to {len(encoder.strides)}.",
    )


# ==== loop ========================================================================================
def evaluate(config: Config) -> None:
    check_options(config)
    if harness.is_main_process():
        make_folder(config.out)
    threads = torch.get_num_threads()
    with harness.process_group(config.device, DAY) as world:
        if world.size == 1:
            torch.set_num_threads(threads)  # the loader rests while the fits are made
        score_encoders(config, shards_of(world), world.device)


def score_encoders(config: Config, shards: Shards, device: torch.device) -> None:
    """Score all encoders; the first process writes the results."""
    protocols = wanted_protocols(config)
    videos = open_videos(config) if "video" in protocols else None
    samples = open_samples(config) if protocols != ["video"] else None
    if samples is not None:
        check_needs(samples, protocols, config)

    with_prior = [x for x in protocols if x in FITTED and FITTED[x].has_prior]
    prior: dict[str, dict] = {}  # by protocol, the same figures for each
    results = {"position prior": prior}
    seeds = {}

    def keep(name: str, found: dict[str, list]) -> None:
        """Files are written after each protocol, so that nothing is lost."""
        if not shards.is_main:
            return
        results[name] = {protocol: mean_over_seeds(figures) for protocol, figures in found.items()}
        seeds[name] = found
        write_results(results, seeds, report_text(results, PROTOCOLS, config), config)

    for name in config.encoders:
        found = defaultdict(list)  # by protocol, the figures of each seed
        is_random = name.startswith("random:")
        evaluation = None
        for seed in range(config.seeds):
            if evaluation is None or is_random:  # the same weights are encoded once
                encoder = open_encoder(name, seed, samples, config).to(device)
                check_size(encoder, config)
                evaluation = Evaluation(encoder, samples, videos, config, shards)
            for protocol in protocols:
                differs = is_random or (protocol in FITTED and FITTED[protocol].random)
                if seed > 0 and not differs:
                    continue
                for seed_of_fit in seeds_of(protocol, seed, config):
                    figures = evaluation.score(protocol, seed_of_fit)
                    found[protocol].append(dk.as_dict(figures))
                keep(name, found)
            if with_prior and not prior:  # in the cells of the first encoder
                of_places = dk.as_dict(evaluation.score_prior())
                for protocol in with_prior:
                    prior[protocol] = of_places

        keep(name, found)
    if shards.is_main:
        harness.tell(*report_text(results, PROTOCOLS, config).splitlines())


def seeds_of(protocol: str, seed: int, config: Config) -> range:
    """The seeds that a protocol is repeated with, for one of --seeds."""
    if protocol != "kmeans-seg":
        return range(seed, seed + 1)
    return range(seed * config.kmeans_seeds, (seed + 1) * config.kmeans_seeds)
