"""Score frozen encoders by the protocols of the four papers, side by side.

    python recipes/evaluate.py runs/croc-coco timm:vit_small_patch16_224 random:resnet50
        --protocol linear-seg,kmeans-seg --data VOCdevkit --size 448 448

An encoder is a run folder or its encoder.safetensors, timm:NAME, torchvision:NAME or random:NAME.
Without --data it takes procedural scenes. It writes results.json, report.md (one table for each
protocol, with figures) and figures/. The protocols, one by one: docs/recipes/evaluate.md.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Iterable
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
    size: tuple[int, int] = (224, 224)  # Height and width that images are resized to.
    limit: int = 0  # At most this many images of a split, randomly selected; 0 takes all.
    out: Path = Path("runs/evaluate")  # Folder to write to.
    seeds: int = 1  # Repetitions with other seeds of random encoders, fits and k-means.
    clusters: int = 0  # Clusters of kmeans-seg; 0 takes one for each class.
    neighbors: int = 20  # Nearest neighbors that vote; video has its own number.
    epochs: int = 25  # Epochs of the linear layers.
    lr: float = 0.1  # Learning rate of the linear layers.
    objects: int = 10  # At most this many objects of an image, randomly selected.
    cost: float = 1.0  # C of the SVM.
    draws: int = 1000  # Draws of the bootstrap over the images.
    batch: int = 32  # Images that are encoded at a time.
    workers: int = 2  # Processes that read images; 0 reads in the main process.
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
from downstream.diagnose import DIAGNOSTICS, retrieval
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
from downstream.protocols import FITTED, Features, position_prior, video
from downstream.report import mean_over_seeds, report_text, write_results
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

    disturbs = any(name in FITTED and FITTED[name].disturbed for name in protocols)
    harness.check(
        config.batch >= 2 or not disturbs,
        f"--batch is {config.batch}: to disturb an object takes another image, give 2 or more.",
    )
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
        config.clusters >= 0, f"--clusters is {config.clusters}: give 0 (the classes) or more."
    )
    harness.check(config.neighbors >= 1, f"--neighbors is {config.neighbors}: give 1 or more.")
    harness.check(config.epochs >= 1, f"--epochs is {config.epochs}: give 1 or more.")
    harness.check_finite("--lr", config.lr)
    harness.check(config.objects >= 1, f"--objects is {config.objects}: give 1 or more.")
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
    image: Tensor  # float (c, h, w), resized; a picture is RGB in [0, 1]
    labels: Tensor | None  # the class map at its own size
    boxes: Tensor  # (n, 4) in [0, 1]
    classes: Tensor  # (n,): the class of each box
    area: Tensor  # (classes,): the share of each class in the image


class Samples:
    """A labeled set at one size, as a DataLoader reads it."""

    def __init__(self, images: image_sets.ImageSet, config: Config):
        self.images = images
        self.classes = images.classes
        self.size = config.size
        self.objects = config.objects
        count = min(config.limit or len(images), len(images))
        order = torch.randperm(len(images), generator=harness.generator(0))
        self.rows = order[:count].sort().values.tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        item = self.images[row]
        h, w = item.image.shape[-2:]
        white = 255 if item.image.dtype == torch.uint8 else 1
        image = transforms.resize(item.image / white, self.size, antialias=True)

        order = torch.randperm(len(item.boxes), generator=harness.generator(1, row))
        chosen = order[: self.objects].sort().values
        boxes = item.boxes[chosen] / torch.tensor([w, h, w, h])
        area = class_areas(item, len(self.classes))
        return Sample(image, item.labels, boxes, item.box_classes[chosen], area)


def class_areas(item: image_sets.Labeled, classes: int) -> Tensor:
    """The share of each class in an image: of its pixels, or without labels of its largest box.

    Without boxes too, a class that the set gives to the whole image has all of it.
    """
    h, w = item.image.shape[-2:]
    if item.labels is not None:
        numbers = item.labels.long()
        known = numbers[(numbers >= 0) & (numbers < classes)]
        return torch.bincount(known, minlength=classes) / (h * w)
    if item.classes is not None and not len(item.boxes):
        return (item.classes == 1).float()

    of_boxes = dk.box_area(item.boxes)[:, None] / (h * w)
    of_classes = torch.nn.functional.one_hot(item.box_classes, classes) * of_boxes
    nothing = torch.zeros(1, classes)
    return torch.cat([nothing, of_classes]).amax(0)


def load_batches(samples: Samples, config: Config, title: str) -> Iterable[list[Sample]]:
    """All samples in order, in batches of nearly the same size, with a progress bar."""
    count = math.ceil(len(samples) / config.batch)
    parts = torch.arange(len(samples)).tensor_split(count)
    context = "fork" if config.workers else None
    loader = DataLoader(
        samples,
        batch_sampler=[part.tolist() for part in parts],
        collate_fn=harness.share_batch,
        num_workers=config.workers,
        worker_init_fn=harness.start_worker,
        multiprocessing_context=context,
    )
    patience = harness.Patience(config.warn_after, config.give_up_after)
    loaded = harness.load(loader, patience)
    return tqdm(loaded, desc=harness.printable(title), total=count, unit="batch", leave=False)


def open_samples(config: Config) -> tuple[Samples, Samples]:
    """The split to fit on, and the split to score."""
    fit = open_split("--fit", config.fit, config)
    test = open_split("--split", config.split, config)
    if fit.classes != test.classes:
        raise harness.UserError("The two splits name different classes.")
    return fit, test


def open_split(option: str, split: str, config: Config) -> Samples:
    try:
        images = image_sets.open_images(config.data, config.layout, split, config.mapping)
    except image_sets.UnknownNameError as error:
        raise harness.UserError(f"{option} is {split}: {error}") from error
    images.value_range = config.value_range
    return Samples(images, config)


def open_videos(config: Config) -> list[image_sets.Video]:
    try:
        return image_sets.open_videos(config.data, config.split)
    except image_sets.UnknownNameError as error:
        raise harness.UserError(f"--split is {config.split}: {error}") from error


# ==== features ====================================================================================
@torch.no_grad()
def encode(
    encoder: Encoder, samples: Samples, config: Config, *, disturb: bool = False
) -> Features:
    """All features of a split; `disturb` puts another image around the box of each object."""
    maps = []
    pooled = []  # of each batch, the levels
    labels = []
    area = []
    objects = []
    object_classes = []
    object_images = []

    first = 0
    title = f"{encoder.name} (disturbed)" if disturb else encoder.name
    for batch in load_batches(samples, config, title):
        images = torch.stack([x.image for x in batch])
        if disturb and len(images) < 2:
            raise harness.UserError(
                f"--batch is {config.batch}: it leaves an image alone, and to disturb an object "
                "takes another, give 2 or another number."
            )
        levels = encoder.levels(images.to(device_of(encoder)))
        last = levels[-1]

        owners = torch.cat([torch.full((len(x.boxes),), i) for i, x in enumerate(batch)]).long()
        boxes = torch.cat([x.boxes for x in batch])
        numbers = torch.arange(len(owners))
        for start in range(0, len(owners), config.batch):
            part = slice(start, start + config.batch)
            if disturb:
                disturbed = disturb_objects(images, owners[part], boxes[part], numbers[part])
                own_maps = encoder(disturbed.to(device_of(encoder)))
            else:
                own_maps = last[owners[part].to(last.device)]
            objects.append(pool_boxes(own_maps, boxes[part]).cpu())

        maps.append(last.half().cpu())
        pooled.append([x.float().mean((-2, -1)).cpu() for x in levels])
        labels += [x.labels for x in batch]
        area += [x.area for x in batch]
        object_classes += [x.classes for x in batch]
        object_images.append(owners + first)
        first += len(batch)

    no_object = torch.zeros(0, maps[0].shape[1])
    return Features(
        maps=torch.cat(maps),
        pooled=[torch.cat(level) for level in zip(*pooled, strict=True)],
        labels=labels,
        area=torch.stack(area),
        objects=torch.cat([no_object, *objects]),
        object_classes=torch.cat(object_classes),
        object_images=torch.cat(object_images),
        classes=list(samples.classes),
    )


def disturb_objects(images: Tensor, owners: Tensor, boxes: Tensor, numbers: Tensor) -> Tensor:
    """Each object's image with another image of the batch around its box.

    Args:
        images: The batch (b, 3, h, w).
        owners: The number of each object's image in the batch.
        boxes: The box of each object, in [0, 1].
        numbers: The number of each object in the batch, which chooses the other image.
    """
    count = len(images)
    others = (owners + 1 + numbers % max(1, count - 1)) % count  # never the owner
    h, w = images.shape[-2:]
    pixel_boxes = boxes * torch.tensor([w, h, w, h])
    inside = dk.boxes_to_mask(pixel_boxes[:, None], (h, w))
    return dk.composite(images[owners], images[others], inside)


def pool_boxes(maps: Tensor, boxes: Tensor) -> Tensor:
    """RoIAlign of 7 x 7 cells, averaged: one row for each box, of a map of its own."""
    rois = dk.roi_align(maps.float(), boxes[:, None].to(maps.device), 7).features
    return rois.mean((-2, -1))[:, 0]


# ==== evaluation ==================================================================================
class Evaluation:
    """One encoder on the data. Its features are made once, when a protocol asks for them."""

    def __init__(self, encoder: Encoder, samples: Any, videos: Any, config: Config, seed: int):
        self.encoder = encoder
        self.samples = samples  # the split to fit on and the split to score; None for video alone
        self.videos = videos
        self.config = config
        self.seed = seed
        self.made: dict[bool, tuple[Features, Features]] = {}  # disturbed or not
        for split in samples or ():
            split.images.bands = encoder.bands

    def features(self, *, disturb: bool) -> tuple[Features, Features]:
        """The features of the split to fit on and of the split to score."""
        if disturb not in self.made:
            fit, test = self.samples
            fit_features = encode(self.encoder, fit, self.config, disturb=disturb)
            test_features = encode(self.encoder, test, self.config, disturb=disturb)
            self.made[disturb] = fit_features, test_features
        return self.made[disturb]

    def score(self, protocol: str) -> dict:
        """The figures of a protocol."""
        folder = self.config.out / "figures"
        if protocol == "video":
            return video(self.encoder, self.videos, self.config)
        if protocol == "retrieval":
            test = self.samples[1]
            features = self.features(disturb=False)[1]
            return retrieval(self.encoder, lambda i: self.picture(test[i].image), features, folder)
        if protocol in DIAGNOSTICS:
            title = f"{self.encoder.name} {protocol}"
            batches = load_batches(self.samples[1], self.config, title)
            return DIAGNOSTICS[protocol](self.encoder, batches, self.config, folder)
        chosen = FITTED[protocol]
        fit, test = self.features(disturb=chosen.disturbed)
        return chosen.score(fit, test, self.config, self.seed)

    def picture(self, image: Tensor) -> Tensor:
        """An image to look at, RGB in [0, 1]."""
        return image if self.encoder.bands is None else bands.to_pictures(image)

    def score_prior(self) -> dict:
        """The figures of the position prior, which looks at no image."""
        fit, test = self.features(disturb=False)
        return position_prior(fit, test, self.config)


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
    """Images must consist of whole cells of the encoder."""
    harness.check(
        all(side % encoder.stride == 0 for side in config.size),
        f"--size is {harness.as_typed(config.size)}: {encoder.name} takes multiples of "
        f"{encoder.stride}.",
    )


# ==== loop ========================================================================================
def evaluate(config: Config) -> None:
    check_options(config)
    make_folder(config.out)
    protocols = wanted_protocols(config)
    use_cuda = config.device != "cpu" and torch.cuda.is_available()
    videos = open_videos(config) if "video" in protocols else None
    samples = open_samples(config) if protocols != ["video"] else None

    prior: dict[str, dict] = {}
    results = {"position prior": prior}
    seeds = {}

    for name in config.encoders:
        found = defaultdict(list)  # by protocol, the figures of each seed
        for seed in range(config.seeds):
            encoder = open_encoder(name, seed, samples, config).to("cuda" if use_cuda else "cpu")
            check_size(encoder, config)
            evaluation = Evaluation(encoder, samples, videos, config, seed)
            for protocol in protocols:
                found[protocol].append(dk.as_dict(evaluation.score(protocol)))
                has_prior = protocol in FITTED and FITTED[protocol].has_prior
                if has_prior and protocol not in prior:  # in the cells of the first encoder
                    prior[protocol] = dk.as_dict(evaluation.score_prior())

        results[name] = {protocol: mean_over_seeds(figures) for protocol, figures in found.items()}
        seeds[name] = found
        # Files are written after each encoder, so that nothing is lost.
        write_results(results, seeds, report_text(results, PROTOCOLS, config), config)
    harness.tell(*report_text(results, PROTOCOLS, config).splitlines())
