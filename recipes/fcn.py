"""Transfer to semantic segmentation: a fully convolutional network (FCN), and its mean IoU.

    python recipes/fcn.py --encoder runs/densesiam-demo     # the demo: a minute on a CPU
    torchrun --nproc-per-node 8 -- recipes/fcn.py --preset densesiam --encoder ... --data cityscapes

Run the same command again to resume. `--encoder` is a ResNet: of a recipe, of timm or of
torchvision. Other data, logged values, deviations from the papers, results: docs/recipes/fcn.md.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Config:
    # Set of defaults; each option below overrides one of them.
    preset: Literal["demo", "densesiam", "dupr"] = "demo"
    encoder: str = "random:tiny"  # A run folder, timm:NAME, torchvision:NAME or random:NAME.
    # One convolution (torchvision's); two, joined with what they see; or two of dilation 6.
    head: Literal["fcn", "fcn-concat", "fcn-dilated"] = "fcn-concat"
    stride: Literal[8, 16, 32] = 8  # Pixels of a cell of the last map; below 32 by dilation.
    aux: float = 0.4  # Weight of the loss of an auxiliary head on C4; 0 is without one.
    data: Path | None = None  # Folder of a labeled image set; the demo needs none.
    layout: str = "auto"  # Layout of the data, such as cityscapes, voc, ade20k or folder.
    mapping: Path | None = None  # JSON file of other classes, such as recipes/coco_stuff_27.json.
    train_split: str = "train"  # Split to train on.
    val_split: str = "val"  # Split to score.
    run: Path | None = None  # Run folder; by default runs/fcn-PRESET-HEAD[-NAME OF DATA].
    norm: Literal["trained", "frozen"] = "trained"  # Train the encoder's batch norms, or keep them.
    steps: int = 40_000  # Steps of the training.
    # Steps after which the rate falls tenfold; without any it falls in each step, to a hundredth.
    milestones: tuple[int, ...] = ()
    batch: int = 16  # Images per step, over all processes.
    lr: float = 0.01  # Learning rate for a batch of 16; it is scaled with the batch.
    weight_decay: float = 5e-4  # Weight decay of all parameters.
    crop: int = 769  # Side of a crop to train on, in pixels.
    scale: tuple[float, float] = (0.5, 2.0)  # Range of the factor by which images are resized.
    max_share: float = 0.75  # Share of a class from which another crop is drawn; 1: any crop.
    distort: bool = True  # Change brightness, contrast, saturation and hue of the crops at random.
    # Side in pixels above which a test cuts an image into windows that overlap.
    window: int = 769
    draws: int = 1000  # Resamplings of the interval of the mean IoU.
    seed: int = 0  # Seed of all random numbers.
    workers: int = 8  # Loader processes of each training process.
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU, where there is one.
    precision: Literal["fp32", "bf16"] = "fp32"  # What the networks compute in; weights are fp32.
    log_every: int = 20  # Steps between two rows of the log.
    save_every: int = 4000  # Steps between two checkpoints, each with a picture and the mean IoU.
    # Range of values that is mapped to black ... white, for images whose file tells none.
    value_range: tuple[float, float] | None = None
    warn_after: float = 60.0  # Seconds without a new batch or listed file, then a warning.
    give_up_after: float = 600.0  # Seconds without a new batch or listed file, then the end.
    # Seconds that processes wait for each other in a step; None is torch's limit.
    collective_timeout: float | None = None
    changed_data: bool = False  # Go on with a run although its images or other files have changed.


PRESETS = {
    "demo": Config(
        steps=600, lr=0.2, weight_decay=1e-4, crop=64, scale=(0.7, 1.4), distort=False, window=64,
        workers=1, save_every=200,
    ),
    "densesiam": Config("densesiam"),  # the defaults of Config
    "dupr": Config(
        "dupr", head="fcn-dilated", stride=16, aux=0.0, steps=90_000, milestones=(63_000, 81_000),
        weight_decay=1e-4, max_share=1.0, distort=False, window=2048,
    ),
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
from downstream import colors, encoders
from downstream.crops import as_bytes, as_picture, crop_bytes
from downstream.image_sets import LAYOUTS, ImageSet, open_images
from downstream.protocols import resize_labels, segmentation_figures
from downstream.shards import Shards, shards_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.transforms import v2 as transforms
from tqdm import tqdm
import densekit as dk
from densekit import viz


def check_options(config: Config) -> None:
    """Raise a UserError of one sentence for a wrong option, before any data is read."""
    harness.check_training(config)
    harness.check(
        config.data is not None or config.preset == "demo",
        f"--data is missing: the preset {config.preset} needs the folder of a labeled image set.",
    )
    harness.check(
        config.data is None or config.data.is_dir(),
        f"--data is {config.data}: give the folder of a labeled image set.",
    )
    layouts = ["auto", "scenes"] if config.data is None else ["auto", *LAYOUTS]
    harness.check(
        config.layout in layouts, f"--layout is {config.layout}: give one of {', '.join(layouts)}."
    )
    harness.check(
        config.mapping is None or config.mapping.is_file(),
        f"--mapping is {config.mapping}: give a JSON file of classes.",
    )
    harness.check(
        ":" in config.encoder or Path(config.encoder).exists(),
        f"--encoder is {config.encoder}: give a run folder or its encoder.safetensors, timm:NAME, "
        "torchvision:NAME or random:NAME.",
    )
    harness.check_finite("--aux", config.aux)

    harness.check(config.steps >= 1, f"--steps is {config.steps}: give 1 step or more.")
    milestones = config.milestones
    harness.check(
        all(x >= 1 for x in milestones) and list(milestones) == sorted(milestones),
        f"--milestones is {harness.as_typed(milestones)}: give steps from 1 in rising order.",
    )
    harness.check_finite("--weight-decay", config.weight_decay)

    harness.check(config.crop >= 2, f"--crop is {config.crop}: give 2 pixels or more.")
    low, high = config.scale
    harness.check(
        0 < low <= high < math.inf,
        f"--scale is {harness.as_typed(config.scale)}: give two factors above 0, the smaller "
        "first.",
    )
    harness.check(
        config.crop <= WIDEST_CUT * low,
        f"--scale is {harness.as_typed(config.scale)}: a crop of {config.crop} pixels would be "
        f"more than {WIDEST_CUT} pixels of the image; give a larger first factor, or a smaller "
        "--crop.",
    )
    harness.check(
        0 < config.max_share <= 1,
        f"--max-share is {config.max_share}: give a share above 0, up to 1.",
    )
    harness.check(config.window >= 1, f"--window is {config.window}: give 1 pixel or more.")
    harness.check(config.draws >= 1, f"--draws is {config.draws}: give 1 or more.")


# ==== data ========================================================================================
WIDEST_CUT = 10_000  # pixels: the side of what becomes a crop; they are in memory
TRIES = 10  # other crops that are drawn of an image, at most


def load(config: Config, mean: Sequence[float]) -> tuple["Crops", ImageSet]:
    """The labeled images: crops to train on, padded with the mean color, and whole ones to test."""
    train_images = open_split(config, config.train_split)
    val_images = open_split(config, config.val_split)
    harness.check(
        train_images.classes == val_images.classes,
        f"The splits {config.train_split} and {config.val_split} have other classes: give a set "
        "whose splits have the same ones.",
    )
    return Crops(train_images, config, mean), val_images


def open_split(config: Config, split: str) -> ImageSet:
    """The labeled images of a split; their files are read when they are needed."""
    images = open_images(config.data, config.layout, split, config.mapping)
    images.value_range = config.value_range
    harness.check(
        any(record.label_map is not None for record in images.records),
        f"The split {split} has no label map: give one whose images have some.",
    )
    return images


def image_source(images: ImageSet, numbers: list[int], config: Config) -> Any:
    """Some of the images, as a source of the harness gives them."""
    sources = [images.records[number].image for number in numbers]
    if config.data is None:  # scenes: nothing is unreadable
        return [(image, ()) for image in sources]
    files = [os.path.relpath(image, config.data) for image in sources]
    return harness.FolderImages(config.data, files, value_range=config.value_range)


class Square(NamedTuple):
    """A square of whole pixels of an image, which may end beyond its right and lower edges."""

    top: int
    left: int
    side: int


class Crops:
    """Random crops of labeled images, with the class of each pixel.

    `dataset[epoch, index]` is one image: its crop, of 8 bits, the labels, its index, and the files
    that could not be read. A pixel beyond the image has the mean color and is ignored.
    """

    def __init__(self, images: ImageSet, config: Config, mean: Sequence[float]):
        self.images = images
        self.config = config
        self.classes = images.classes
        self.color = (255 * torch.tensor(mean)).round().byte()  # beyond the image
        records = images.records
        self.order = [i for i, record in enumerate(records) if record.label_map is not None]
        self.source = image_source(images, self.order, config)
        self.distort = photometric() if config.distort else nn.Identity()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        epoch, index = key
        image, unreadable = self.source[index]
        number = self.order[(index + len(unreadable)) % len(self)]  # the next one, if unreadable
        labels = self.images.draw_labels(number, image.shape[1:])
        if labels is None:
            raise harness.UserError(f"The image {self.images.names[number]} has no label map.")

        draws = harness.generator(self.config.seed, epoch, index)
        flip = torch.rand((), generator=draws) < 0.5
        square, crop_labels = self.choose_square(labels, draws)
        crop = self.crop_image(image, square, flip)
        if flip:
            crop_labels = crop_labels.flip(-1)
        # The colors need other random numbers than the crop.
        with harness.seeded(self.config.seed, epoch, index, harness.COLORS):
            crop = self.distort(crop)
        return (crop,), crop_labels, torch.tensor(index), list(unreadable)

    def choose_square(self, labels: Tensor, draws: torch.Generator) -> tuple[Square, Tensor]:
        """A square of an image, and its labels at the size of a crop."""
        side = sample_side(self.config, draws)
        square = sample_square(labels.shape, side, draws)
        crop_labels = self.crop_labels(labels, square)
        for _ in range(TRIES):
            if self.config.max_share == 1 or self.is_mixed(crop_labels):
                break
            square = sample_square(labels.shape, side, draws)
            crop_labels = self.crop_labels(labels, square)
        return square, crop_labels

    def is_mixed(self, labels: Tensor) -> bool:
        """Whether there are several classes, of which none has more than its share."""
        counts = torch.bincount(labels[labels != self.images.ignored].flatten().long())
        several = int((counts > 0).sum()) > 1
        return several and float(counts.max() / counts.sum()) < self.config.max_share

    def crop_labels(self, labels: Tensor, square: Square) -> Tensor:
        """The class of the pixel under the center of each pixel of the crop, not yet flipped."""
        ignored = torch.full((1,), self.images.ignored, dtype=labels.dtype)
        (inside,) = cut(labels[None], square, ignored)
        return resize_labels(inside, (self.config.crop, self.config.crop))

    def crop_image(self, image: Tensor, square: Square, flip: Tensor) -> Tensor:
        """The image in a square, resized and flipped, uint8 (3, crop, crop)."""
        inside = cut(image, square, self.color)
        whole = dk.full_view((square.side, square.side))
        return crop_bytes(inside, whole._replace(flip=flip), self.config.crop)


def sample_side(config: Config, draws: torch.Generator) -> int:
    """The side of what becomes a crop, if the image is first resized by a random factor."""
    low, high = config.scale
    factor = low + (high - low) * float(torch.rand((), generator=draws))
    return max(1, round(config.crop / factor))


def sample_square(size: torch.Size, side: int, draws: torch.Generator) -> Square:
    """A square anywhere in an image; where the image is smaller, it begins at the edge."""
    height, width = size
    shares = torch.rand(2, generator=draws).tolist()
    top = int(shares[0] * max(1, height - side + 1))
    left = int(shares[1] * max(1, width - side + 1))
    return Square(top, left, side)


def cut(pixels: Tensor, square: Square, fill: Tensor) -> Tensor:
    """The pixels (c, H, W) in a square; beyond them it has the values of `fill`, (c,)."""
    top, left, side = square
    inside = pixels[:, top : top + side, left : left + side]
    filled = fill[:, None, None].repeat(1, side, side)
    filled[:, : inside.shape[1], : inside.shape[2]] = inside
    return filled


def photometric() -> transforms.Compose:
    """Random changes of the colors of a crop; each of them is drawn on its own."""
    return transforms.Compose(
        [
            as_picture,  # PIL is the quickest on a CPU
            transforms.RandomApply([colors.ColorJitter(brightness=0.125)], p=0.5),
            transforms.RandomApply([colors.ColorJitter(contrast=0.5)], p=0.5),
            transforms.RandomApply([colors.ColorJitter(saturation=0.5)], p=0.5),
            transforms.RandomApply([colors.ColorJitter(hue=0.1)], p=0.5),
            as_bytes,
        ]
    )


# ==== model =======================================================================================
DROPPED = 0.1  # share of the channels before the last convolution that a step drops


def find_encoder(config: Config) -> encoders.Start:
    """The weights of the encoder; a UserError, unless it is a ResNet."""
    kind, _, name = config.encoder.partition(":")
    sentence = f"--encoder is {config.encoder}: give a ResNet of timm or torchvision."
    harness.check(kind != "torchvision" or encoders.is_resnet(name), sentence)
    start = encoders.find_start(config.encoder)
    encoders.check_pictures(start)
    network = encoders.probe(start.architecture)
    is_unknown = network is None  # which `build_start` says
    harness.check(is_unknown or isinstance(network, timm.models.ResNet), sentence)
    if start.weights is not None:
        encoders.check_weights(config.encoder, start.weights)
    return start


class Segmenter(nn.Module):
    """An encoder whose last stages are dilated, and one or two heads that score the classes.

    It pads images to whole cells of `stride` pixels, so that a cell covers the same pixels in a
    crop and in an image of any size.
    """

    def __init__(self, config: Config, start: encoders.Start, classes: int):
        super().__init__()
        self.config = config
        self.classes = classes
        self.normalization = (start.mean, start.std)
        self.maps = 2 if config.aux else 1  # C4 has a head of its own, or has none
        with harness.seeded(config.seed):
            network = encoders.build_start(start, levels=self.maps, output_stride=config.stride)
        channels = [level["num_chs"] for level in network.feature_info]
        if config.norm == "frozen":
            network = timm.layers.freeze_batch_norm_2d(network)

        self.network = network
        self.head = build_head(config.head, channels[-1], classes)
        self.aux_head = build_head("fcn", channels[-2], classes) if config.aux else None

    def cell_scores(self, images: Tensor, seeds: Tensor | None = None) -> list[Tensor]:
        """The scores of each cell, (b, classes, h, w): of the head, and of the auxiliary head.

        In training, `seeds` has one for each image, of the channels that are dropped. In a test
        there is no auxiliary head.
        """
        padded = pad_to_cells(images, self.config.stride)
        maps = encoders.level_maps(self.network, padded, self.maps)
        scores = [self.head(maps[-1], seeds)]
        if self.aux_head is not None and self.training:
            scores.append(self.aux_head(maps[0], seeds))
        return scores

    def forward(self, images: Tensor, labels: Tensor, seeds: Tensor) -> tuple[Tensor, dict]:
        """The total loss, and the terms that are logged."""
        scores = self.cell_scores(images, seeds)
        terms = {"main": pixel_loss(scores[0], labels, self.config.stride)}
        loss = terms["main"]
        if self.aux_head is not None:
            terms["aux"] = pixel_loss(scores[1], labels, self.config.stride)
            loss = loss + self.config.aux * terms["aux"]
        return loss, terms


def pad_to_cells(images: Tensor, stride: int) -> Tensor:
    """Normalized images (b, 3, h, w), with the mean color at the right and below to whole cells."""
    height, width = images.shape[-2:]
    return pad(images, (0, -width % stride, 0, -height % stride))


class Head(nn.Module):
    """Convolutions, dropped channels, and a last convolution to the scores of the classes."""

    def __init__(self, body: nn.Module, last: nn.Module, dropped: float):
        super().__init__()
        self.body = body
        self.last = last
        self.dropped = dropped

    def forward(self, maps: Tensor, seeds: Tensor | None) -> Tensor:
        features = self.body(maps)
        if self.training and self.dropped and seeds is not None:
            # The same channels, whatever the other images and the processes are.
            noise = harness.noise(seeds, features.shape[1:2])
            kept = (noise >= self.dropped).to(features.dtype) / (1 - self.dropped)
            features = features * kept[..., None, None]
        return self.last(features)


def build_head(kind: str, channels: int, classes: int) -> Head:
    """A head of one of three kinds, on maps of so many channels."""
    if kind == "fcn":
        convolution, norm, relu, _, last = FCNHead(channels, classes)
        return Head(nn.Sequential(convolution, norm, relu), last, DROPPED)
    if kind == "fcn-concat":
        width = channels // 4
        return Head(JoinedConvolutions(channels, width), nn.Conv2d(width, classes, 1), DROPPED)
    width = channels // 8
    body = nn.Sequential(conv3x3(channels, width, 6), conv3x3(width, width, 6))
    return Head(body, nn.Conv2d(width, classes, 1), 0.0)


def conv3x3(inputs: int, outputs: int, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class JoinedConvolutions(nn.Module):
    """Two convolutions, and a third of what they see and what they make of it."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.two = nn.Sequential(conv3x3(channels, width), conv3x3(width, width))
        self.third = conv3x3(channels + width, width)

    def forward(self, maps: Tensor) -> Tensor:
        return self.third(torch.cat([maps, self.two(maps)], 1))


def pixel_loss(cells: Tensor, labels: Tensor, stride: int) -> Tensor:
    """The cross-entropy of the labeled pixels: the mean over all of them, in all processes."""
    height, width = labels.shape[-2:]
    scores = enlarge(cells, stride)[..., :height, :width]
    numbers = labels.long()
    valid = (numbers >= 0) & (numbers < cells.shape[1])
    losses = cross_entropy(scores, torch.where(valid, numbers, 0), reduction="none")
    return dk.masked_mean(losses, valid, group=torch.distributed.group.WORLD)


def check_labels(labeled: Tensor, dataset: Crops) -> None:
    """A UserError on all processes, if an epoch has had no labeled pixel, which taught nothing."""
    total = dk.all_sum(labeled, torch.distributed.group.WORLD)
    harness.check(
        total.item() > 0,
        f"The crops of all {len(dataset)} images had no labeled pixel in a whole epoch: their "
        "label maps may be void, or of another set of classes (--layout, --mapping).",
    )


def enlarge(cells: Tensor, stride: int) -> Tensor:
    """The scores of each pixel of some cells, in float32 or more: bilinear between the centers."""
    wide = cells.float() if cells.dtype.itemsize < 4 else cells
    return interpolate(wide, scale_factor=stride, mode="bilinear")


# ==== evaluation ==================================================================================
SCORES = 2**25  # scores of pixels that are in memory at a time
EXAMPLES = 6  # images in the picture, from all of the share of the first process
LONGEST = 512  # pixels along the longer side of an image in the picture


@torch.no_grad()
def evaluate(model: Segmenter, val: Any, run: harness.Run, shards: Shards, step: int) -> None:
    """Test a share of the images in each process; the first one scores the counts of all."""
    world = run.world
    counts = []
    examples = []
    unreadable = []
    not_finite = 0
    harness.share_buffers(model)
    model.eval()
    share = shards.part(len(val))
    drawn = share[:: max(1, len(share) // EXAMPLES)][:EXAMPLES]
    for index in tqdm(
        share, "test", leave=False, disable=not world.is_main, ncols=harness.bar_width()
    ):
        image, problem = read_image(val, index)
        if image is None:
            unreadable.append(problem)
            continue
        labels = val.draw_labels(index, image.shape[1:])
        if labels is None:
            continue
        cells = score_cells(model, image.to(world.device))
        if not cells.isfinite().all():
            not_finite += 1
            continue
        found = segment(cells, labels.shape, model.config.stride)
        own = dk.confusion_matrix(labels.to(world.device), found, classes=model.classes)
        counts.append(own[None].cpu())
        if index in drawn:
            examples.append(shrink(image, labels, found.cpu()))
    model.train()

    run.note_unreadable(unreadable)
    run.wait()  # for processes whose images take longer
    pixels = sum(int(x.sum()) for x in counts)
    totals = torch.tensor([pixels, not_finite], device=world.device)
    torch.distributed.all_reduce(totals)
    all_pixels, all_not_finite = totals.tolist()
    if all_not_finite:
        raise harness.NonFiniteError(
            f"Not finite at step {step}: the scores of {all_not_finite} images."
        )
    harness.check(all_pixels > 0, "No scored image is readable and has a labeled pixel.")
    all_counts = shards.gather_parts(counts)
    if all_counts is None:  # the first process has them
        return

    figures = segmentation_figures(all_counts, val, model.config)
    interval = figures["miou"]
    run.log(
        step,
        miou=interval.value,
        miou_low=interval.low,
        miou_high=interval.high,
        pixel_accuracy=figures["pixel_accuracy"],
        mean_accuracy=figures["mean_accuracy"],
    )
    results = {"step": step, "split": model.config.val_split, **dk.as_dict(figures)}
    harness.write(run.folder / "results.json", json.dumps(results, indent=2).encode())
    if examples:
        draw(examples, val, run.picture_path(step))


def read_image(images: ImageSet, index: int) -> tuple[Tensor | None, str]:
    """An image; where its file cannot be read, None and "path: reason"."""
    source = images.records[index].image
    if isinstance(source, Tensor):
        return source, ""
    try:
        return harness.read_image(source, images.value_range), ""
    except Exception as error:  # broken bytes raise nearly anything
        return None, f"{source}: {harness.one_line(error)}"


def score_cells(model: Segmenter, image: Tensor) -> Tensor:
    """The scores of each cell of one image of 8 bits on the device, float32 (classes, h, w)."""
    images = harness.normalize_images(image[None], *model.normalization)
    in_bf16 = model.config.precision == "bf16"
    with torch.autocast(image.device.type, torch.bfloat16, enabled=in_bf16):
        return window_scores(model, images)


def segment(cells: Tensor, size: torch.Size, stride: int) -> Tensor:
    """The class of each pixel of an image of this size, int64 (h, w)."""
    height, width = size
    rows = [scores.argmax(0) for scores in bands(cells, stride)]
    return torch.cat(rows)[:height, :width]


def window_scores(model: Segmenter, images: Tensor) -> Tensor:
    """The scores of each cell of one image, (classes, h, w): the mean over the windows around it.

    The windows begin and end at the edges of cells.
    """
    stride = model.config.stride
    padded = pad_to_cells(images, stride)
    rows, columns = [side // stride for side in padded.shape[-2:]]
    window = math.ceil(model.config.window / stride)
    total = padded.new_zeros(model.classes, rows, columns)
    count = padded.new_zeros(rows, columns)
    for top in window_starts(rows, window):
        for left in window_starts(columns, window):
            cells = (..., slice(top, top + window), slice(left, left + window))
            pixels = padded[
                ...,
                top * stride : (top + window) * stride,
                left * stride : (left + window) * stride,
            ]
            total[cells] += model.cell_scores(pixels)[0][0]
            count[cells] += 1
    return total / count


def window_starts(cells: int, window: int) -> list[int]:
    """Where windows begin that cover a side; each of them shares a third with the one before."""
    last = max(0, cells - window)
    step = max(1, 2 * window // 3)
    return [*range(0, last, step), last]


def bands(cells: Tensor, stride: int) -> Iterator[Tensor]:
    """The scores of the pixels, (classes, rows, columns), a few rows of cells at a time.

    They are those of `enlarge` on all cells: a band is enlarged with the cells beside it.
    """
    classes, height, width = cells.shape
    at_once = max(1, SCORES // (classes * width * stride**2))
    for first in range(0, height, at_once):
        last = min(first + at_once, height)
        start = max(0, first - 1)
        pixels = enlarge(cells[None, :, start : last + 1], stride)[0]
        yield pixels[:, (first - start) * stride : (last - start) * stride]


def shrink(*maps: Tensor) -> tuple[Tensor, ...]:
    """Every so many pixels of an image and its class maps, for the picture."""
    step = math.ceil(max(maps[0].shape[-2:]) / LONGEST)
    return tuple(x[..., ::step, ::step] for x in maps)


def draw(examples: list[tuple[Tensor, ...]], val: ImageSet, path: Path) -> None:
    """A row per example: the image, its labels and the classes found."""
    images, labels, found = zip(*examples, strict=True)
    figure = viz.plot_segmentation(images, labels, found, names=val.classes, ignore=val.ignored)
    figure.savefig(path)


# ==== loop ========================================================================================
POWER = 0.9  # of the polynomial by which the learning rate falls
LAST = 0.01  # share of the learning rate that it falls to


def learning_rate(step: int, config: Config) -> float:
    """A tenth after each milestone; without any, a polynomial of what is left of the training."""
    peak_lr = config.lr * config.batch / 16
    if config.milestones:
        passed = sum(step >= milestone for milestone in config.milestones)
        return peak_lr * 0.1**passed
    left = 1 - step / config.steps
    return peak_lr * (LAST + (1 - LAST) * left**POWER)


def train(config: Config) -> None:
    check_options(config)
    start = find_encoder(config)
    folder = harness.run_folder("fcn", config, config.head)
    group = harness.process_group(config.device, config.collective_timeout)
    with group as world, harness.Run(folder, config, world) as run:
        device = world.device
        patience = harness.Patience(config.warn_after, config.give_up_after)
        dataset, val = load(config, start.mean)
        shards = shards_of(world)
        steps = config.steps

        torch.manual_seed(config.seed)
        model = Segmenter(config, start, len(dataset.classes))
        if device.type == "cuda":
            model = timm.layers.convert_sync_batchnorm(model)
        model.to(device).train()
        ddp = nn.parallel.DistributedDataParallel(model)
        # The loop sets the learning rate of each step.
        optimizer = torch.optim.SGD(
            model.parameters(), config.lr, momentum=0.9, weight_decay=config.weight_decay
        )
        step = run.resume(model, optimizer)

        training_batches = harness.batches(
            dataset,
            config.batch,
            world,
            seed=config.seed,
            start=step,
            stop=steps,
            workers=config.workers,
            normalize=model.normalization,
            patience=patience,
        )
        bar = harness.progress(training_batches, start=step, stop=steps, world=world)
        steps_per_epoch = max(1, len(dataset) // config.batch)
        # The labeled pixels of an epoch; one that is resumed has had some.
        labeled = torch.tensor(float(step % steps_per_epoch), device=device)
        for (images,), labels, indices, unreadable in bar:
            seeds = harness.image_seeds(config.seed, step, indices)  # of the dropped channels
            lr = learning_rate(step, config)
            optimizer.param_groups[0]["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, terms = ddp(images, labels, seeds)

            optimizer.zero_grad()
            loss.backward()
            # An infinite norm clips nothing; the gradient norm is only measured.
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
            run.record(step, {"loss": loss, "grad_norm": grad_norm, **terms})
            optimizer.step()
            step += 1

            labeled += ((labels >= 0) & (labels < model.classes)).sum()
            if step % steps_per_epoch == 0:
                check_labels(labeled, dataset)
                labeled.zero_()

            run.note_unreadable(unreadable)
            # The device is waited for here alone. The run ends if a value was not finite.
            if step % config.log_every == 0:
                values = run.take_means()
                harness.show(bar, values, ("main", "aux"))
                run.log(step, **values, lr=lr, unreadable=run.unreadable)

            due = step % config.save_every == 0 or step == steps
            if due:
                run.check()  # what follows a bad value is neither shown nor saved
            stop = run.stop_requested()
            if due:
                evaluate(model, val, run, shards, step)
            if due or stop:
                run.save(step, model, optimizer)
            if stop:
                return

        if world.is_main:
            torch.save(model.state_dict(), folder / "segmenter.pt")
            line = "step {step}: mIoU {miou:.3f} [{miou_low:.3f}, {miou_high:.3f}]"
            for row in run.rows("miou", "miou_low", "miou_high"):
                harness.tell(line.format(**row))
