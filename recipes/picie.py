"""PiCIE: unsupervised semantic segmentation by clustering the pixels, and two baselines.

    python recipes/picie.py               # the demo: minutes on a CPU
    python recipes/picie.py --data SET    # the demo's model on your labeled images
    torchrun --nproc-per-node 8 -- recipes/picie.py --preset paper --data coco \\
        --layout coco-stuff --mapping recipes/coco_stuff_27.json --weights torchvision:resnet18

The baselines are modified deep clustering, --preset mdc, and invariant information clustering,
--preset iic. Labels are used for the score alone. Run the same command again to resume. Logged
values, deviations from the paper (CVPR 2021), time and results: docs/recipes/picie.md.
"""

import argparse
import copy
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Config:
    # Set of defaults; each option below overrides one of them.
    preset: Literal["demo", "paper", "mdc", "iic"] = "demo"
    data: Path | None = None  # Folder of a labeled image set; the demo can run without.
    layout: str = "auto"  # Layout of the data, such as coco-stuff or folder.
    mapping: Path | None = None  # JSON file of other classes, such as recipes/coco_stuff_27.json.
    train_split: str = "train"  # Split to train on.
    train_list: Path | None = None  # Text file with the images to train on, one name a line.
    val_split: str = "val"  # Split to score.
    val_list: Path | None = None  # Text file with the images to score, one name a line.
    run: Path | None = None  # Run folder; by default runs/picie-PRESET-METHOD[-NAME OF DATA].
    arch: str = "resnet18"  # Convolutional network of timm, or "tiny" (64 channels, stride 8).
    # Weights to start from: lite0, timm:NAME, torchvision:NAME, a file of --arch or a run folder.
    weights: str | None = None
    freeze: int = 0  # Keep the stem and this many stages as they start.
    # Loss: PiCIE's, that of modified deep clustering, or invariant information clustering's.
    method: Literal["picie", "mdc", "iic"] = "picie"
    aux: int = 128  # Clusters of the auxiliary loss; 0 trains without it.
    weighting: Literal["frequency", "balanced", "plain"] = "frequency"  # Weights of the clusters.
    pixels: int = 32  # Pixels of each image from which the clusters of an epoch are made.
    radius: int = 6  # iic alone: cells by which a pixel and its partner may lie apart.
    image: int = 640  # Side in pixels to which the center square of an image is resized first.
    size: int = 320  # Side of both views, and the short side of the scored images, in pixels.
    hue: float = 0.1  # Strength of the hue jitter; 0.5 allows every hue.
    blur: tuple[float, float] = (0.1, 2.0)  # Standard deviation of the blur, in pixels.
    frozen_views: bool = False  # Keep one crop and flip of each image for the whole run.
    batch: int = 128  # Images per step, over all processes.
    epochs: int = 10  # Passes over the images.
    lr: float = 1e-4  # Constant learning rate.
    weight_decay: float = 0.0  # Weight decay of all parameters.
    seed: int = 0  # Seed of all random numbers.
    workers: int = 8  # Loader processes of each training process.
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU, where there is one.
    precision: Literal["fp32", "bf16"] = "bf16"  # What the networks compute in; weights are fp32.
    log_every: int = 20  # Steps between two rows of the log.
    save_every: int = 200  # Steps between two checkpoints, each with a picture and the scores.
    keep: tuple[int, ...] = ()  # Epochs whose checkpoints and encoders stay, such as 100 200.
    # Range of values that is mapped to black ... white, for images whose file tells none.
    value_range: tuple[float, float] | None = None
    warn_after: float = 60.0  # Seconds without a new batch or listed file, then a warning.
    give_up_after: float = 600.0  # Seconds without a new batch or listed file, then the end.
    # Seconds that processes wait for each other in a step; None is torch's limit.
    collective_timeout: float | None = None
    changed_data: bool = False  # Go on with a run although its images or other files have changed.


PRESETS = {
    "demo": Config(
        arch="tiny", aux=64, radius=1, image=64, size=96, hue=0.5, blur=(0.1, 1.0), batch=32,
        workers=1, precision="fp32", save_every=20,
    ),
    "paper": Config("paper"),  # the defaults of Config
    "mdc": Config("mdc", method="mdc", aux=0),
    "iic": Config("iic", method="iic", aux=81),
}  # fmt: skip


def read_options() -> Config:
    """Read the command line. The preset is read first, because it sets the other defaults."""
    # This parser reads --preset alone. tyro answers --help, and reads all the rest.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=list(PRESETS), default="demo")
    preset = parser.parse_known_args()[0].preset
    return tyro.cli(Config, default=PRESETS[preset], description=__doc__)


if __name__ == "__main__":
    # The options are read before torch is imported, so that --help answers at once. This file then
    # runs a second time, as a module, and that time also the part below. The script itself ends at
    # sys.exit.
    config = read_options()
    import harness

    recipe = harness.module_of(__file__)
    sys.exit(harness.main(recipe.train, config))

import harness
import timm
import torch
import torch.distributed as dist
from downstream import colors, encoders, health, segmentation
from downstream.crops import as_bytes, as_picture, crop_bytes
from downstream.segmentation import evaluate, open_split, open_training
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, grid_sample, interpolate
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2.functional import resize
import densekit as dk


def check_options(config: Config) -> None:
    """Raise a UserError of one sentence for a wrong option, before any data is read."""
    harness.check_training(config)
    segmentation.check_data(config)
    encoders.check_start(config)
    encoders.check_maps(config, "--size", config.size, levels=4)
    harness.check(
        not encoders.is_vit(encoders.probe(encoders.architecture_of(config))),
        f"{encoders.option_of(config)}: give a convolutional network of timm, such as resnet18, "
        "since the pyramid needs maps of several sizes.",
    )
    harness.check(
        config.aux == 0 or config.aux >= 2,
        f"--aux is {config.aux}: give 2 clusters or more, or 0 for no auxiliary loss.",
    )
    harness.check(config.pixels >= 1, f"--pixels is {config.pixels}: give 1 pixel or more.")
    harness.check(config.radius >= 0, f"--radius is {config.radius}: give 0 cells or more.")
    harness.check(config.image >= 2, f"--image is {config.image}: give 2 pixels or more.")
    harness.check(config.size >= 1, f"--size is {config.size}: give 1 pixel or more.")
    harness.check(0 <= config.hue <= 0.5, f"--hue is {config.hue}: give a number from 0 to 0.5.")
    low, high = config.blur
    harness.check(
        0 <= low < high <= harness.WIDEST_BLUR,
        f"--blur is {harness.as_typed(config.blur)}: give two standard deviations in pixels, from "
        f"0 to {harness.WIDEST_BLUR}, the smaller first.",
    )
    harness.check_finite("--weight-decay", config.weight_decay)


# ==== views =======================================================================================
# Images in [0, 1]: the encoder normalizes them by the means of its own pre-training.
UNIT_RANGE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def photometric(config: Config) -> transforms.Compose:
    """Random changes of the colors of one view; each of them is drawn on its own."""
    blur = colors.RandomBlur(config.blur)

    return transforms.Compose(
        [
            as_picture,  # PIL is the quickest on a CPU
            transforms.RandomApply([colors.ColorJitter(brightness=0.3)], p=0.8),
            transforms.RandomApply([colors.ColorJitter(contrast=0.3)], p=0.8),
            transforms.RandomApply([colors.ColorJitter(saturation=0.3)], p=0.8),
            transforms.RandomApply([colors.ColorJitter(hue=config.hue)], p=0.8),
            colors.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=0.5),
            as_bytes,
        ]
    )


class TwoViews:
    """A crop of each image's center square, the whole square, and the crop's `View`.

    The box of that view is in units of the square's side. `source` is from `open_training`.
    `dataset[epoch, index]` is one image: its crops, of 8 bits, the view, its index, and the files
    that could not be read.
    """

    def __init__(self, source: Any, config: Config):
        self.source = source
        self.config = config
        self.square = transforms.Compose(
            [transforms.Resize(config.image), transforms.CenterCrop(config.image)]
        )
        self.photometric = photometric(config)

    def __len__(self) -> int:
        return len(self.source)

    def sample_crop(self, epoch: int, index: int) -> dk.View:
        """A random square crop of an image, perhaps mirrored, in units of the square's side."""
        epoch = 0 if self.config.frozen_views else epoch
        numbers = torch.rand(4, generator=harness.generator(self.config.seed, epoch, index))

        side = 0.5 + 0.5 * numbers[:1]
        corner = numbers[1:3] * (1 - side)
        box = torch.cat([corner, corner + side])
        return dk.View(box, flip=numbers[3] < 0.5)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        image, unreadable = self.source[index]
        square = self.square(image)
        view = self.sample_crop(epoch, index)

        in_pixels = view._replace(box=view.box * self.config.image)
        size = (self.config.image, self.config.image)
        if epoch == 0:
            dk.check_views(in_pixels, size)
        near = crop_bytes(square, in_pixels, self.config.size)
        whole = crop_bytes(square, dk.full_view(size), self.config.size)
        # The colors need other random numbers than the views.
        with harness.seeded(self.config.seed, epoch, index, harness.COLORS):
            augmented = (self.photometric(near), self.photometric(whole))
        return augmented, view, torch.tensor(index), list(unreadable)


# ==== model =======================================================================================
WIDTH = 128  # Channels of the pyramid.
KMEANS_SAMPLE = 1024  # Pixels of each cluster that k-means starts with.
KMEANS_BATCH = 4096  # Pixels in each batch that follows.
# Random numbers of one purpose, as harness.COLORS.
CLUSTERS = 3
CLASSIFIERS = 4


conv1x1 = partial(nn.Conv2d, kernel_size=1)


def replay(maps: Tensor, view: dk.View) -> Tensor:
    """What a crop shows of maps of the whole square; the square's side is the view's unit."""
    places = dk.coordinate_map(view, maps.shape[-2:])
    grid = 2 * places - 1  # grid_sample counts from -1 to 1
    return grid_sample(maps.to(grid.dtype), grid, padding_mode="border", align_corners=False)


class Pyramid(nn.Module):
    """A network with a simplified feature pyramid of its four levels."""

    def __init__(self, encoder: encoders.Encoder):
        super().__init__()
        self.encoder = encoder
        channels = [level["num_chs"] for level in encoder.network.feature_info[-4:]]
        self.laterals = nn.ModuleList(conv1x1(x, WIDTH) for x in channels)

    def forward(self, images: Tensor) -> Tensor:
        """The finest map of the pyramid, (b, 128, h, w)."""
        levels = self.encoder.levels(images)
        maps = [lateral(x) for lateral, x in zip(self.laterals, levels, strict=True)]
        pyramid = maps[-1]
        for finer in reversed(maps[:-1]):
            pyramid = finer + interpolate(pyramid, finer.shape[-2:], mode="bilinear")
        return pyramid


class Clusters(nn.Module):
    """The clusters of the pixels of each view: centroids, and the weights that they have in CE."""

    centroids: Tensor  # (views, count, 128)
    weights: Tensor  # (views, count)

    def __init__(self, views: int, count: int):
        super().__init__()
        self.register_buffer("centroids", torch.zeros(views, count, WIDTH))
        self.register_buffer("weights", torch.ones(views, count))


class Segmenter(nn.Module):
    """The pyramid, and the clusters or the classifiers of `dense` and, if wanted, of `aux`."""

    pyramid: Pyramid

    def __init__(self, config: Config, classes: int, initial: encoders.Start | None = None):
        super().__init__()
        self.config = config
        initial = initial or encoders.read_start(config)
        encoder = encoders.encoder_of(initial, seed=config.seed)
        encoder.train()
        unused = encoders.unused_weights(encoder.network, levels=4)
        for name, parameter in encoder.network.named_parameters():
            parameter.requires_grad_(name not in unused)  # encoder_of freezes all of them
        self.pyramid = Pyramid(encoder)
        self.labeler: Any = None  # while it is trained: the pyramid as it was when the epoch began

        counts = {"dense": classes}
        self.shares = {"dense": 1.0}  # the weights of the losses
        if config.aux:
            counts["aux"] = config.aux
            # Of the two losses, the one with fewer clusters weighs more.
            share = math.log(config.aux) / (math.log(classes) + math.log(config.aux))
            self.shares = {"dense": share, "aux": 1 - share}

        self.views = 1 if config.method == "mdc" else 2
        self.clusters = nn.ModuleDict()
        self.classifiers = nn.ModuleDict()
        for name, count in counts.items():
            if config.method != "iic":
                self.clusters[name] = Clusters(self.views, count)
            if config.method != "picie":
                self.classifiers[name] = nn.Linear(WIDTH, count)
        self.register_buffer("names", torch.full((classes,), -1))  # the class of each cluster

    def maps(self, pyramid: nn.Module, images: list[Tensor], view: dk.View) -> list[Tensor]:
        """The map of each view that the method compares; the cells of both lie at the same places.

        Modified deep clustering has the first view alone.
        """
        maps = [pyramid(images[0])]
        if self.views == 2:
            maps.append(replay(pyramid(images[1]), view))
        return maps

    def add_labeler(self) -> None:
        self.labeler = copy.deepcopy(self.pyramid).requires_grad_(requires_grad=False)

    @torch.no_grad()
    def assign(self, images: list[Tensor], view: dk.View) -> dict[str, list[Tensor]]:
        """The cluster of each cell of each view, (b, cells), by the labeler."""
        self.labeler.eval()
        features = [unit_rows(x) for x in self.maps(self.labeler, images, view)]
        labels = {}
        for name, clusters in self.clusters.items():
            found = [nearest(*x) for x in zip(features, clusters.centroids, strict=True)]
            labels[name] = [own_labels for own_labels, _ in found]
        return labels

    def segment(self, image: Tensor, size: torch.Size) -> Tensor:
        """The cluster of each pixel of one image, at the size of its labels."""
        images = resize(image, [self.config.size])[None]
        return segmentation.segment(self.logit_maps, self.pyramid.encoder, images, size)

    def logit_maps(self, images: Tensor) -> Tensor:
        """The logits of the clusters in each cell, (b, k, h, w)."""
        maps = self.pyramid(images)
        if self.config.method == "iic":
            logits = self.classifiers["dense"](dk.map_to_rows(maps))
        else:
            logits = products(unit_rows(maps), self.clusters["dense"].centroids[0])
        return dk.rows_to_map(logits, maps.shape[-2:])

    # ==== loss ====================================================================================
    def forward(self, images: list[Tensor], view: dk.View):
        """The total loss, and the terms that are logged."""
        maps = self.maps(self.pyramid, images, view)
        labels = self.assign(images, view) if self.clusters else {}

        terms = {}
        for name in self.shares:
            if self.config.method == "picie":
                within, cross = self.cluster_losses(name, maps, labels[name])
                terms[name] = (within + cross) / 2
                if name == "dense":
                    terms |= {"within": within, "cross": cross}
            elif self.config.method == "mdc":
                terms[name] = self.classifier_loss(name, maps[0], labels[name][0])
            else:
                terms[name] = self.information_loss(name, maps)
        weighted = [share * terms[name] for name, share in self.shares.items()]
        return torch.stack(weighted).sum(), terms

    def cluster_losses(
        self, name: str, maps: list[Tensor], labels: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The cells of each view in the clusters of that view, and in those of the other view."""
        clusters = self.clusters[name]
        features = [unit_rows(x) for x in maps]
        losses = {}
        for own in range(2):
            for other in range(2):
                logits = products(features[own], clusters.centroids[other])
                losses[own, other] = weighted_cross_entropy(
                    logits, labels[other], clusters.weights[other]
                )
        within = (losses[0, 0] + losses[1, 1]) / 2
        cross = (losses[0, 1] + losses[1, 0]) / 2
        return within, cross

    def classifier_loss(self, name: str, maps: Tensor, labels: Tensor) -> Tensor:
        """Modified deep clustering: a linear classifier learns the clusters of one view."""
        logits = self.classifiers[name](unit_rows(maps))
        return weighted_cross_entropy(logits, labels, self.clusters[name].weights[0])

    def information_loss(self, name: str, maps: list[Tensor]) -> Tensor:
        """IIC: the mean over all displacements of up to `radius` cells along each axis."""
        size = maps[0].shape[-2:]
        logits = [self.classifiers[name](dk.map_to_rows(x)) for x in maps]
        logit_maps = [dk.rows_to_map(x, size) for x in logits]
        # The probabilities of all displacements together would not fit the memory: they are
        # computed again in the backward pass.
        loss_of = partial(
            checkpoint,
            displaced_information,
            *logit_maps,
            use_reentrant=False,
            preserve_rng_state=False,
        )

        radius = min(self.config.radius, min(size) - 1)
        distances = range(-radius, radius + 1)
        losses = [loss_of(down, right) for down in distances for right in distances]
        return torch.stack(losses).mean()


def unit_rows(maps: Tensor) -> Tensor:
    """The features of all cells, (b, cells, d), at length one."""
    return dk.l2_normalize(dk.map_to_rows(maps))


def products(rows: Tensor, table: Tensor) -> Tensor:
    """The inner products of rows (..., d) with those of a table (k, d), exact under autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ table.mT


def nearest(features: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of features of length one, and the squared Euclidean distance to it."""
    scores = products(features, centroids) - centroids.square().sum(-1) / 2
    best = scores.max(-1)
    return best.indices, 1 - 2 * best.values


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The mean over the cells of all processes, each with the weight of its cluster."""
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    own_weights = weights[labels.flatten()]
    sums = torch.stack([(own_weights * losses).sum(), own_weights.sum()])
    total, weight = dk.all_sum(sums, dist.group.WORLD)
    return total / weight.clamp(min=1e-12)


def displaced_information(near: Tensor, whole: Tensor, down: int, right: int) -> Tensor:
    """The loss of each cell of `near` with the cell of `whole` that lies so many cells away."""
    height, width = near.shape[-2:]
    own = near[..., max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
    other = whole[
        ..., max(0, down) : height - max(0, -down), max(0, right) : width - max(0, -right)
    ]
    # All pairs of all images together are one table.
    rows = [dk.map_to_rows(x).flatten(0, 1) for x in (own, other)]
    return dk.mutual_information_loss(*rows, group=dist.group.WORLD)


# ==== clusters ====================================================================================
@torch.no_grad()
def renew_clusters(
    model: Segmenter,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    run: harness.Run,
    epoch: int,
) -> dict[str, Tensor]:
    """Cluster the pixels of an epoch before it begins; returns what is logged.

    The labeler becomes what the pyramid is. The pixels of all processes are in the order of their
    images, so that the clusters depend neither on the number of processes nor on the order.
    """
    run.check()  # of bad values no clusters are made
    harness.share_buffers(model)
    model.labeler.load_state_dict(model.pyramid.state_dict())
    model.labeler.eval()

    pixels, order = take_pixels(model, batches, run, epoch)
    distances = []
    used = []
    for number, (name, clusters) in enumerate(model.clusters.items()):
        for view in range(model.views):
            points = pixels[order, view].flatten(0, 1)
            generator = harness.generator(
                model.config.seed, epoch, number, view, CLUSTERS, device=points.device
            )
            count = len(clusters.centroids[view])
            centroids = dk.minibatch_kmeans(
                points,
                count,
                steps=math.ceil(len(points) / KMEANS_BATCH),  # each pixel once, on average
                batch=KMEANS_BATCH,
                sample=KMEANS_SAMPLE,
                iterations=20,
                generator=generator,
            )
            dist.broadcast(centroids, 0)  # not even their rounding differs
            labels, distance = nearest(points, centroids)
            counts = torch.bincount(labels, minlength=count)
            clusters.centroids[view] = centroids
            clusters.weights[view] = cluster_weights(counts, model.config.weighting)
            if name == "dense":
                distances.append(distance.mean())
                used.append((counts > 0).sum())

    renew_classifiers(model, optimizer, epoch)
    return {"distance": torch.stack(distances).mean(), "used": torch.stack(used).min()}


def take_pixels(
    model: Segmenter, batches: Iterable[Any], run: harness.Run, epoch: int
) -> tuple[Tensor, Tensor]:
    """Features of random pixels (images, views, pixels, 128), and the order of their images."""
    config = model.config
    kept = []
    images_kept = []
    for images, view, indices, unreadable in batches:
        run.note_unreadable(unreadable)
        device = indices.device
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            maps = model.maps(model.labeler, images, view)
        cells = maps[0].shape[-2] * maps[0].shape[-1]
        seeds = harness.image_seeds(config.seed, epoch, indices)
        places = (harness.noise(seeds, (config.pixels,)) * cells).long()
        places = places.clamp(max=cells - 1)  # the product may be rounded up
        kept.append(torch.stack([dk.take_rows(unit_rows(x), places) for x in maps], 1))
        images_kept.append(indices)

    pixels = dk.all_gather(torch.cat(kept), dist.group.WORLD)
    indices = dk.all_gather(torch.cat(images_kept), dist.group.WORLD)
    return pixels, indices.argsort()


def cluster_weights(counts: Tensor, weighting: str) -> Tensor:
    """The weight of each cluster in the cross-entropy, by the number of its pixels."""
    if weighting == "frequency":
        return counts / counts.sum()
    if weighting == "balanced":
        return counts.sum() / counts.clamp(min=1) / (counts > 0).sum()
    return torch.ones_like(counts, dtype=torch.float32)


def renew_classifiers(model: Segmenter, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """The numbers of clusters mean nothing in the next epoch: a classifier of them begins anew."""
    for number, classifier in enumerate(model.classifiers.values()):
        generator = harness.generator(model.config.seed, epoch, number, CLASSIFIERS)
        weight = 0.01 * torch.randn(classifier.weight.shape, generator=generator)
        classifier.weight.copy_(weight)
        classifier.bias.zero_()
        for parameter in classifier.parameters():
            optimizer.state.pop(parameter, None)


# ==== loop ========================================================================================
def train(config: Config) -> None:
    check_options(config)
    initial = encoders.read_start(config)
    folder = harness.run_folder("picie", config, config.method)
    group = harness.process_group(config.device, config.collective_timeout)
    with group as world, harness.Run(folder, config, world) as run:
        device = world.device
        patience = harness.Patience(config.warn_after, config.give_up_after)
        source = open_training(config)
        dataset = TwoViews(source, config)
        val = open_split(config, config.val_split, config.val_list)
        classes = val.dataset.classes
        steps_per_epoch = harness.batches_per_epoch(len(source), config.batch, world)
        steps = config.epochs * steps_per_epoch

        torch.manual_seed(config.seed)
        model = Segmenter(config, len(classes), initial)
        if device.type == "cuda":
            model = timm.layers.convert_sync_batchnorm(model)
        pyramid: Any = model.pyramid
        encoder = pyramid.encoder
        encoders.freeze(encoder.network, config.freeze)
        model.to(device, memory_format=torch.channels_last)
        has_clusters = len(model.clusters) > 0
        if has_clusters:
            model.add_labeler()
        ddp = nn.parallel.DistributedDataParallel(model)

        optimizer = torch.optim.Adam(
            model.parameters(), config.lr, weight_decay=config.weight_decay
        )
        step = run.resume(model, optimizer)

        batches = partial(
            harness.batches,
            dataset,
            world=world,
            seed=config.seed,
            workers=config.workers,
            normalize=UNIT_RANGE,
            patience=patience,
        )

        def begin_epoch(epoch: int) -> None:
            """Make the clusters of an epoch, with its own views; after the last, those to score."""
            start = epoch * steps_per_epoch
            own = batches(config.batch, start=start, stop=start + steps_per_epoch)
            run.log(start, **renew_clusters(model, optimizer, own, run, epoch))

        # The health is measured on six images of the main process.
        preview_batch = min(6 * world.size, config.batch)
        preview = next(batches(preview_batch, start=0, stop=1))
        monitor = health.Monitor(encoder, preview[0], run)
        if step == 0:
            if has_clusters:
                begin_epoch(0)
            run.log(step, **monitor.measure_all())
            evaluate(model, val, run, step)

        facts = {**initial.side_car(), "method": config.method, "classes": classes}
        kept = harness.kept_epochs(config, steps_per_epoch)

        training_batches = batches(config.batch, start=step, stop=steps)
        bar = harness.progress(training_batches, start=step, stop=steps, world=world)
        for images, view, _, unreadable in bar:
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, terms = ddp(images, view)

            optimizer.zero_grad()
            loss.backward()
            # An infinite norm clips nothing; the gradient norm is only measured.
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
            run.record(step, {"loss": loss, "grad_norm": grad_norm, **terms})
            optimizer.step()
            step += 1

            run.note_unreadable(unreadable)
            # The device is waited for here alone. The run ends if a value was not finite.
            if step % config.log_every == 0:
                values = run.take_means()
                harness.show(bar, values, ("dense", "aux"))
                run.log(
                    step, **values, **monitor.measure(), lr=config.lr, unreadable=run.unreadable
                )
                monitor.warn(step)

            # ... and at the end of an epoch.
            if step % steps_per_epoch == 0 and has_clusters:
                begin_epoch(step // steps_per_epoch)

            due = step % config.save_every == 0 or step in kept or step == steps
            if due:
                run.check()  # what follows a bad value is neither shown nor saved
                run.log(step, **monitor.measure_all())
                monitor.warn(step)
            stop = run.stop_requested()
            if due:
                evaluate(model, val, run, step)
            if due or stop:
                run.save(
                    step,
                    model,
                    optimizer,
                    encoder=encoder.network,
                    facts=facts,
                    epoch=kept.get(step),
                )
            if stop:
                return

        if world.is_main:
            model.labeler = None  # the segmenter does without
            harness.save_encoder(folder / "segmenter.safetensors", model, **facts, step=step)
            for row in run.rows("miou"):  # at step 0 the weights are random
                harness.tell(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
