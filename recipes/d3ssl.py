"""D3SSL pre-training: regions apart from what is around them and where they are (2023).

    python recipes/d3ssl.py                     # the demo: minutes on a CPU
    python recipes/d3ssl.py --data FOLDER       # the demo's model on your images
    torchrun --nproc-per-node 8 -- recipes/d3ssl.py --preset paper --data coco/train2017

Run the same command again to resume. Before a run with --data, run proposals.py with the same
--data. `--preset region` is the baseline; the other presets are more rows of Table 5.
Logged values, deviations from the paper, time and results: docs/recipes/d3ssl.md.
"""

import argparse
import copy
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Views:
    size: int = 224  # Side of the square views, in pixels: a multiple of 32, of 16 for tiny.
    scale: tuple[float, float] = (0.4, 1.0)  # Share of the image's area that view 2 covers.
    hue: float = 0.1  # Strength of the hue jitter; 0.5 allows every hue.
    blur: tuple[float, float] = (0.1, 2.0)  # Standard deviation of the blur, in pixels.


@dataclass(frozen=True)
class Config:
    # Set of defaults; each option below overrides one of them.
    preset: Literal["demo", "paper", "decoupling", "soco-jitter", "soco-cutout", "region"] = "demo"
    data: Path | None = None  # Folder of images, also in its subfolders; the demo can run without.
    proposals: Path | None = None  # File of proposals; by default DATA.proposals.npz.
    # How often an object of the demo's scenes stands beside its partner: see `dk.sample_scenes`.
    co_occurrence: float = 0.0
    run: Path | None = None  # Run folder; by default runs/d3ssl-PRESET[-NAME OF DATA].
    arch: str = "resnet50"  # A ResNet of timm, or "tiny" (64 channels, stride 8).
    # Weights to start from: timm:NAME, torchvision:NAME, lite0, a file, a run folder; without them
    # the network is random.
    weights: str | None = None
    freeze: int = 0  # Keep the stem and this many stages, or blocks of a ViT, as they start.
    regions: int = 4  # Proposals K per image and step, of those inside view 2.
    cut: tuple[float, float] = (0.2, 0.5)  # PRC: share of a proposal to cut out; 0 0: nothing.
    mask: tuple[float, float] = (0.2, 0.6)  # PRM: mask beside it, share of its area; 0 0: none.
    jitter: tuple[float, float] = (0.8, 1.0)  # RBJ: shares of its sides that stay; 1 1: no jitter.
    soco_cutout: tuple[float, float] = (0, 0)  # SoCo's cutout: share of its area; 0 0: none.
    soco_jitter: float = 0.0  # SoCo's box jitter: share of its sides; 0: none.
    depositioning: float = 1.0  # Weight of L_dp; 0 leaves out its view.
    bins: int = 14  # Bins of RoIAlign along each axis; half as many in the small view.
    head: tuple[int, int] = (2048, 128)  # Widths of the head: hidden, outputs.
    bank: int = 65536  # Keys of earlier batches in the bank.
    temperature: float = 0.2  # Divisor of the cosines in InfoNCE.
    momentum: float = 0.999  # Momentum of the key encoder and its head.
    batch: int = 256  # Images per step, over all processes.
    epochs: int = 800  # Passes over the images.
    lr: float = 0.3  # Learning rate for a batch of 256; it is scaled with the batch.
    weight_decay: float = 1e-4  # Weight decay of all parameters.
    seed: int = 0  # Seed of all random numbers.
    workers: int = 8  # Loader processes of each training process.
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU, where there is one.
    precision: Literal["fp32", "bf16"] = "bf16"  # What the networks compute in; weights are fp32.
    compile: bool = False  # Compile the model with torch.compile.
    log_every: int = 20  # Steps between two rows of the log.
    save_every: int = 1000  # Steps between two checkpoints, each with a picture and a probe.
    keep: tuple[int, ...] = ()  # Epochs whose checkpoints and encoders stay, such as 100 200.
    # Range of values that is mapped to black ... white, for images whose file tells none.
    value_range: tuple[float, float] | None = None
    warn_after: float = 60.0  # Seconds without a new batch or listed file, then a warning.
    give_up_after: float = 600.0  # Seconds without a new batch or listed file, then the end.
    # Seconds that processes wait for each other in a step; None is torch's limit.
    collective_timeout: float | None = None
    changed_data: bool = False  # Go on with a run although its images or other files have changed.
    views: Views = field(default_factory=Views)  # The two views of each image.


PRESETS = {
    "demo": Config(
        arch="tiny", cut=(0.05, 0.2), mask=(0.1, 0.3), bins=6, head=(128, 64), bank=512,
        momentum=0.99, batch=40, epochs=8, lr=0.8, workers=1, precision="fp32", save_every=204,
        views=Views(size=64, scale=(0.5, 1.0), hue=0.5, blur=(0.1, 1.0)),
    ),
    "paper": Config("paper"),  # the defaults of Config
    # The last row of Table 5, then its rows 3, 2 and 1.
    "decoupling": Config("decoupling", epochs=200, depositioning=0.0),
    "soco-jitter": Config(
        "soco-jitter", epochs=200, depositioning=0.0, mask=(0, 0), jitter=(1, 1), soco_jitter=0.1,
    ),
    "soco-cutout": Config(
        "soco-cutout", epochs=200, depositioning=0.0, cut=(0, 0), mask=(0, 0), jitter=(1, 1),
        soco_cutout=(0.1, 0.3),
    ),
    "region": Config(
        "region", epochs=200, depositioning=0.0, cut=(0, 0), mask=(0, 0), jitter=(1, 1),
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
import torch
from downstream import colors, encoders, health, scene_probe
from downstream.crops import as_bytes, as_picture, crop_bytes
from einops import rearrange
from matplotlib.figure import Figure
from proposals import crop_objects, default_path, image_source
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms
from torchvision.utils import draw_bounding_boxes, save_image
import densekit as dk


def check_options(config: Config) -> None:
    """Raise a UserError of one sentence for a wrong option, before any data is read."""
    harness.check_training(config)
    check_region_options(config)
    harness.check_finite("--depositioning", config.depositioning)
    harness.check(config.bank >= 1, f"--bank is {config.bank}: give 1 key or more.")
    harness.check_above_zero("--temperature", config.temperature)


def check_region_options(config: Any) -> None:
    """Raise a UserError for a wrong option of the network, the proposals or their augmentations."""
    harness.check_finite("--weight-decay", config.weight_decay)
    encoders.check_start(config)
    architecture = encoders.architecture_of(config)
    harness.check(
        architecture == "tiny" or encoders.is_resnet(architecture),
        f"{encoders.option_of(config)}: give a ResNet of timm, such as resnet50, or tiny.",
    )
    cell = encoders.probe(architecture).feature_info[3]["reduction"]  # of C4
    meaning = f"two cells of C4 of {architecture}, since one view is halved"
    encoders.check_multiple("--views.size", config.views.size, 2 * cell, meaning)
    harness.check(config.regions >= 1, f"--regions is {config.regions}: give 1 proposal or more.")

    low, high = config.cut
    harness.check(
        0 <= low <= high <= 1,
        f"--cut is {low} {high}: give two shares from 0 to 1, the smaller first.",
    )
    low, high = config.mask
    harness.check(
        0 <= low <= high <= 1,
        f"--mask is {low} {high}: give two shares from 0 to 1, the smaller first.",
    )
    low, high = config.jitter
    harness.check(
        0 < low <= high <= 1,
        f"--jitter is {low} {high}: give two shares above 0, up to 1, the smaller first.",
    )
    low, high = config.soco_cutout
    harness.check(
        0 <= low <= high <= 1,
        f"--soco-cutout is {low} {high}: give two shares from 0 to 1, the smaller first.",
    )
    jitter = config.soco_jitter
    harness.check(
        0 <= jitter < 1, f"--soco-jitter is {jitter}: give a share from 0 to less than 1."
    )

    harness.check(config.bins >= 2, f"--bins is {config.bins}: give 2 or more.")
    harness.check(
        min(config.head) >= 1,
        f"--head is {harness.as_typed(config.head)}: give two widths, 1 or more each.",
    )
    momentum = config.momentum
    harness.check(
        0 <= momentum < 1,
        f"--momentum is {momentum}: give a number from 0 to less than 1.",
    )
    harness.check(
        config.proposals is None or config.data is not None,
        f"--proposals is {config.proposals}: name the folder of its images with --data.",
    )
    together = config.co_occurrence
    harness.check(
        0 <= together <= 1, f"--co-occurrence is {together}: give a share from 0 (none) to 1."
    )
    harness.check(
        together == 0 or config.data is None,
        f"--co-occurrence is {together}: leave it out, since --data has images of its own.",
    )


# ==== views =======================================================================================
def photometric(view_config: Views) -> transforms.Compose:
    """MoCo v2's random changes of a crop's colors and sharpness."""
    jitter = colors.ColorJitter(0.4, 0.4, 0.4, view_config.hue)
    blur = colors.RandomBlur(view_config.blur)

    return transforms.Compose(
        [
            as_picture,  # PIL is the quickest on a CPU, and MoCo v2 blurs with it
            transforms.RandomApply([jitter], p=0.8),
            colors.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=0.5),
            as_bytes,
        ]
    )


class TwoViews:
    """Each image as a whole and a crop, the `View` of both, and K proposals.

    `source` is from `proposals.image_source`. `dataset[epoch, index]` is one image: its crops, of 8
    bits, their views, the proposals (K, 4) in pixels of the image and which of them to use, its
    index, and the files that could not be read.
    """

    def __init__(self, source, config: Config):
        self.source = source
        self.seed = config.seed
        self.view_config = config.views
        self.regions = config.regions
        self.photometric = photometric(config.views)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        image, unreadable = self.source[index]
        size = tuple(image.shape[-2:])
        # The next image that can be read stands in for unreadable ones.
        proposals = self.source.boxes[(index + len(unreadable)) % len(self)]

        generator = harness.generator(self.seed, epoch, index)
        view2 = dk.sample_views(size, scale=self.view_config.scale, generator=generator)
        flip = torch.rand((), generator=generator) < 0.5
        view1 = dk.full_view(size)._replace(flip=flip)
        views = (view1, view2)
        if epoch == 0:
            dk.check_views(dk.stack_views(views), size)

        in_pixels = proposals * view1.box[2:].repeat(2)
        in_view2 = dk.boxes_in_view(view2, in_pixels).valid
        boxes, valid = dk.sample_boxes(in_pixels, self.regions, in_view2, generator=generator)
        # An image without a proposal in view 2 gets the box of view 2, which is not valid.
        has_proposal = valid[:1, None]
        boxes = torch.where(has_proposal, boxes, view2.box)

        side = self.view_config.size
        crops = [crop_bytes(image, view, side) for view in views]
        # The colors need other random numbers than the views.
        with harness.seeded(self.seed, epoch, index, harness.COLORS):
            augmented = tuple(self.photometric(crop) for crop in crops)
        return augmented, views, boxes, valid, torch.tensor(index), list(unreadable)


SOCO_PROBABILITY = 0.5  # That SoCo's program cuts into a proposal, and that it jitters a box.


class Input(NamedTuple):
    """The images of one view, and its regions."""

    images: Tensor  # (b, 3, h, w)
    boxes: Tensor  # (b, K, 4), in [0, 1]
    valid: Tensor  # (b, K): which of the boxes hold a proposal


# What is drawn for an image.
SHIFT = 1
CUT = 2
BESIDE = 3
JITTER = 4
SOCO_CUTOUT = 5
SOCO_JITTER = 6


def draw(seeds: Tensor, count: int, config: Config) -> dict[int, Tensor]:
    """Uniform numbers for each image: for its shift, and for `count` proposals in several views."""
    shapes = {SHIFT: (2,), CUT: (3, count, 3), BESIDE: (2, count, 3), JITTER: (4, count, 4)}
    if any(config.soco_cutout):
        shapes[SOCO_CUTOUT] = (2, count, 4)
    if config.soco_jitter:
        shapes[SOCO_JITTER] = (4, count, 5)
    return harness.noises(seeds, shapes)


def augment(
    images: list[Tensor],
    views: list[dk.View],
    boxes: Tensor,
    valid: Tensor,
    seeds: Tensor,
    config: Config,
) -> list[Input]:
    """View 1, view 2, the small view 2 and view 3, each with jittered boxes (Eq 2 and 6 to 8).

    What is drawn for an image follows from its seed. The views are on the second axis of tensors
    (b, v, K, 4), so that each function is called once for all of them.
    """
    images1, images2 = images
    side = images1.shape[-1]
    in_views = dk.boxes_in_view(dk.stack_views(views), torch.stack([boxes, boxes]))
    boxes1, boxes2 = in_views.boxes * side

    # All proposals of view 3 are moved by one vector.
    noises = draw(seeds, boxes.shape[1], config)
    shift = dk.sample_shift(boxes2, (side, side), valid, noise=noises[SHIFT])
    boxes3 = dk.shift_boxes(boxes2, shift)

    # The small view lies in a corner of its mask, whose other pixels nobody uses.
    changed = torch.stack([boxes1, boxes2 / 2, boxes3], 1)
    used = valid[:, None].expand(changed.shape[:-1])
    cut1, cut_small, cut3 = cut_masks(changed, side, used, noises, config).unbind(1)
    beside1, beside_small, moved = beside_masks(changed, side, used, noises, config).unbind(1)
    covered1 = cut1 | beside1
    covered_small = cut_small | beside_small
    if any(config.soco_cutout):
        soco1, soco_small = soco_masks(changed, side, used, noises, config).unbind(1)
        covered1 = covered1 | soco1
        covered_small = covered_small | soco_small

    half = side // 2
    half_size = nn.functional.avg_pool2d(images2, 2)
    # They are covered with 0, which is the mean of the data.
    images1_covered = dk.fill_mask(images1, covered1)
    small_covered = dk.fill_mask(half_size, covered_small[:, :half, :half])
    images3 = dk.composite(images2, images2.roll(1, 0), moved & ~cut3, shift)

    jittered = torch.stack([boxes1, boxes2, boxes2, boxes3], 1)
    jittered1, jittered2, jittered_small, jittered3 = jitter_boxes(
        jittered, side, noises, config
    ).unbind(1)
    return [
        Input(images1_covered, jittered1, valid),
        Input(images2, jittered2, valid),
        Input(small_covered, jittered_small, valid),
        Input(images3, jittered3, valid),
    ]


def cut_masks(boxes: Tensor, side: int, valid: Tensor, noises: dict, config: Any) -> Tensor:
    """The pixels to cut out of the proposals of each view (PRC)."""
    cutout = dk.sample_cutout(boxes, ratio=config.cut, noise=noises[CUT])
    return dk.proposal_cutout(boxes, cutout, (side, side), valid).mask


def beside_masks(boxes: Tensor, side: int, valid: Tensor, noises: dict, config: Config) -> Tensor:
    """In all views but the last a rectangle beside each proposal (PRM), there the proposals."""
    beside = dk.sample_surrounding_boxes(boxes[:, :-1], ratio=config.mask, noise=noises[BESIDE])
    marked = torch.cat([beside, boxes[:, -1:]], 1)
    return dk.boxes_to_mask(marked, (side, side), valid)


def soco_masks(boxes: Tensor, side: int, valid: Tensor, noises: dict, config: Any) -> Tensor:
    """In views 1 a square at any center in a proposal, for some of them (SoCo's cutout)."""
    low, high = config.soco_cutout
    boxes = boxes[:, :2]
    noise = noises[SOCO_CUTOUT]
    share = low + (high - low) * noise[..., 0]
    half_side = (share * dk.box_area(boxes)).sqrt()[..., None] / 2
    center = dk.sample_points(boxes, 1, noise=noise[..., None, 1:3]).squeeze(-2)
    squares = torch.cat([center - half_side, center + half_side], -1)
    chosen = noise[..., 3] < SOCO_PROBABILITY
    return dk.boxes_to_mask(squares, (side, side), valid[:, :2] & chosen)


def jitter_boxes(boxes: Tensor, side: int, noises: dict, config: Config) -> Tensor:
    """Random boxes inside those in pixels (RBJ), in [0, 1]."""
    if config.soco_jitter:
        boxes = soco_jitter(boxes, side, noises, config)
    return dk.sample_inner_boxes(boxes, scale=config.jitter, noise=noises[JITTER]) / side


def soco_jitter(boxes: Tensor, side: int, noises: dict, config: Any) -> Tensor:
    """Boxes of which some are moved and resized, but not beyond the view (SoCo's box jitter)."""
    share = config.soco_jitter
    noise = noises[SOCO_JITTER]
    moved = dk.sample_jittered_boxes(boxes, center=share, size=share, noise=noise[..., :4])
    chosen = noise[..., 4:] < SOCO_PROBABILITY
    return torch.where(chosen, dk.clip_boxes(moved, (side, side)), boxes)


# ==== model =======================================================================================
# The dtype of the products with the keys of the bank; None is that of the loss.
PRODUCT_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def embed(network: Any, view: Input, bins: int) -> Tensor:
    """The outputs of the head for each region, (b, K, d) (Eq 1); only valid ones have a meaning."""
    encoder = network["encoder"]
    (c4,) = encoder.forward_intermediates(
        view.images, indices=[3], stop_early=True, intermediates_only=True
    )
    regions = dk.roi_align(c4, view.boxes, bins).features.flatten(0, 1)
    source, place = fill_places(view.valid.flatten())
    c5 = encoder.layer4(regions[source])
    cells = dk.map_to_rows(c5)  # (regions, cells, d)
    rows = cells.mean(1)
    outputs = network["head"](rows)
    return outputs[place].unflatten(0, view.boxes.shape[:2])


def fill_places(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Which region to put at each place of block 5, and the place at which to find each region.

    All places hold valid regions, each of them equally often or once more. So the batch statistics
    of block 5 are those of the proposals, and the number of regions is always the same. A region
    that is not valid is found where another one is, and nobody uses it.
    """
    count = valid.sum().clamp(min=1)
    valid_first = valid.int().argsort(descending=True, stable=True)
    places = torch.arange(len(valid), device=valid.device)
    source = valid_first[places % count]
    place = (valid.cumsum(0) - 1).clamp(min=0)
    return source, place


class D3SSL(nn.Module):
    """Query network (student) and key network (teacher). Each is an encoder with a head (Fig 5)."""

    def __init__(self, config: Config, initial: encoders.Start | None = None):
        super().__init__()
        initial = initial or encoders.read_start(config)
        self.mean = initial.mean
        self.std = initial.std
        self.config = config
        hidden, outputs = config.head
        encoder = encoders.build_start(initial)
        head = nn.Sequential(
            nn.Linear(encoder.num_features, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )
        self.student = nn.ModuleDict({"encoder": encoder, "head": head})
        self.teacher = copy.deepcopy(self.student)
        self.teacher.requires_grad_(False)

    @torch.no_grad()
    def embed_keys(self, view: Input, order: Tensor) -> Tensor:
        """The key of each region, (b, K, d).

        The images and their boxes are shuffled over the processes before the encoder, and the keys
        are brought back after it. So the batch statistics of a key come from other images than
        those of its query, and the query cannot recognize its key by them. `order` says how the
        images are shuffled.
        """
        group = torch.distributed.group.WORLD
        images = dk.shuffle_batch(view.images, order, group)
        boxes = dk.shuffle_batch(view.boxes, order, group)
        valid = dk.shuffle_batch(view.valid, order, group)
        keys = embed(self.teacher, Input(images, boxes, valid), self.config.bins)
        return dk.unshuffle_batch(keys, order, group)

    # ==== loss ====================================================================================
    def forward(
        self,
        images: list[Tensor],
        views: list[dk.View],
        boxes: Tensor,
        valid: Tensor,
        bank: dk.Bank,
        order: Tensor,
        seeds: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor], dk.Bank]:
        """The total loss, the terms that are logged, and the bank with the keys of this batch.

        `order` says how the images of the keys are shuffled. The augmentation of the regions of
        each image follows from its seed.
        """
        config = self.config
        group = torch.distributed.group.WORLD
        view1, view2, small, view3 = augment(images, views, boxes, valid, seeds, config)
        query1 = embed(self.student, view1, config.bins)
        query2 = embed(self.student, small, config.bins // 2)
        # Unit vectors, normalized once: the bank holds the keys as they are.
        query1 = dk.l2_normalize(query1)
        query2 = dk.l2_normalize(query2)
        key1 = dk.l2_normalize(self.embed_keys(view1, order))
        key2 = dk.l2_normalize(self.embed_keys(view2, order))

        # The means are over the valid regions of all processes (Eq 10).
        mean = partial(dk.masked_mean, valid=valid, group=group)
        info_nce = partial(
            dk.info_nce,
            negatives=dk.bank_negatives(bank),
            valid=valid,
            temperature=config.temperature,
            reduction="none",
            normalized=True,
            product_dtype=PRODUCT_DTYPES[config.precision],
        )
        decoupling = mean(info_nce(query1, key2) + info_nce(query2, key1))  # Eq 4
        region_cosines = (query1.detach() * key2).sum(-1)  # logged only
        terms = {
            "decoupling": decoupling,
            "filled": bank.filled,
            "valid": valid.double().mean(),
            "cosine": mean(region_cosines),
        }
        loss = decoupling

        if config.depositioning:
            query3 = dk.l2_normalize(embed(self.student, view3, config.bins))
            depositioning = mean(info_nce(query3, key2) + info_nce(query3, key1))  # Eq 9
            terms["depositioning"] = depositioning
            loss = loss + config.depositioning * depositioning

        # Every process pushes the keys of all processes, so that the banks stay the same.
        all_keys = dk.all_gather(key1, group)
        all_valid = dk.all_gather(valid, group)
        return loss, terms, dk.push_to_bank(bank, all_keys, all_valid)


# ==== evaluation ==================================================================================
PANEL_SIDE = 224  # Side of a panel of the picture, in pixels.
LAYERS = ["layer1", "layer2", "layer3", "layer4"]  # The layers of a ResNet that end in C2 to C5.
MEASURES = ["coupling_rate", "mean_cosine"]  # Of a layer, as `dk.layer_bias` names them.


@torch.no_grad()
def evaluate(
    model: D3SSL, source, preview: tuple, config: Config, run: harness.Run, step: int
) -> None:
    """Save pictures of the inputs and of the bias of each layer. Without --data, also probe."""
    model.eval()
    device = run.world.device
    network = model.student["encoder"]
    normalize = transforms.Normalize(model.mean, model.std)
    encoder = nn.Sequential(normalize, network)
    path = run.picture_path(step)
    draw_inputs(model, preview, config, path)

    measures = measure_layers(encoder, source, config, device)
    terms = dict(measures)
    if config.data is None:

        def features(scenes: Tensor) -> Tensor:
            return encoders.last_map(network, normalize(scenes).to(device))

        terms |= scene_probe.probe(features, run.picture_path(step, "probe"))
    run.log(step, **terms)
    draw_layers(run.rows(*measures), path.with_name("layers.png"))
    model.train()


def draw_inputs(model: D3SSL, preview: tuple, config: Config, path: Path) -> None:
    """A row per image: the student's view 1, small view 2 and view 3, the teacher's two views."""
    images, views, boxes, valid, indices, _ = preview
    seeds = harness.image_seeds(config.seed, 0, indices)  # the same augmentations each time
    view1, view2, small, view3 = augment(images, views, boxes, valid, seeds, config)
    panels = [draw_boxes(view, model) for view in (view1, small, view3, view1, view2)]
    save_image(rearrange(panels, "p b c h w -> (b p) c h w"), path, nrow=len(panels))


def draw_boxes(view: Input, model: Any) -> Tensor:
    """The images of a view, as panels of the picture, with their valid boxes."""
    panels = nn.functional.interpolate(view.images, PANEL_SIDE)
    images = harness.unnormalize(panels, model.mean, model.std)
    boxes = view.boxes.cpu() * PANEL_SIDE
    drawn = []
    for image, own_boxes, own_valid in zip(images, boxes, view.valid.cpu(), strict=True):
        if own_valid.any():  # torchvision warns of an image without any box
            drawn.append(draw_bounding_boxes(image, own_boxes[own_valid], width=2))
        else:
            drawn.append(image)
    return torch.stack(drawn)


def measure_layers(encoder: Any, source, config: Any, device: torch.device) -> dict[str, Tensor]:
    """Coupling rate and mean cosine similarity of each layer, on pictures of 256 objects.

    A picture is a third of a view wide, and takes whole cells of C5: so an object looks the same to
    the encoder at each of the nine places of a picture three times as large.
    """
    stride = encoder[1].feature_info[-1]["reduction"]
    cells = max(1, round(config.views.size / 3 / stride))
    objects = crop_objects(source, 256, cells * stride).to(device)
    bias = dk.layer_bias(encoder, objects, [f"1.{layer}" for layer in LAYERS])
    terms = {}
    for measure in MEASURES:
        for layer, value in zip(LAYERS, getattr(bias, measure), strict=True):
            terms[f"{measure}_{layer}"] = value
    return terms


def draw_layers(rows: list[dict], path: Path) -> None:
    """Both measures against the layer, a curve for the first checkpoint and for the last six."""
    figure = Figure()
    for measure, axes in zip(MEASURES, figure.subplots(2), strict=True):
        for row in rows[:1] + rows[1:][-6:]:
            curve = [row[f"{measure}_{layer}"] for layer in LAYERS]
            axes.plot(LAYERS, curve, label=f"step {row['step']}")
        axes.legend(title=measure.replace("_", " "))
    figure.savefig(path)


def check_regions(regions: Tensor, source) -> None:
    """A UserError on all processes, if an epoch has had no region, which taught nothing."""
    total = dk.all_sum(regions, torch.distributed.group.WORLD)
    harness.check(
        total.item() > 0,
        f"None of the {len(source)} images had a proposal in its views in a whole epoch: the "
        "proposals may belong to other images, make new ones with recipes/proposals.py.",
    )


def method_of(config: Config) -> str:
    """The name of the method that these options make."""
    if config.depositioning:
        return "d3ssl"
    changes_images = any(config.cut) or any(config.mask) or any(config.soco_cutout)
    changes_boxes = config.jitter[0] < 1 or config.soco_jitter > 0
    return "decoupling" if changes_images or changes_boxes else "region"


# ==== loop ========================================================================================
def train(config: Config) -> None:
    check_options(config)
    initial = encoders.read_start(config)
    folder = harness.run_folder("d3ssl", config)
    group = harness.process_group(config.device, config.collective_timeout, fixed_shapes=True)
    files = {}  # which the run reads, although no option names them
    if config.data is not None and config.proposals is None:
        files["proposals"] = default_path(config.data)
    with group as world, harness.Run(folder, config, world, files=files) as run:
        device = world.device
        patience = harness.Patience(config.warn_after, config.give_up_after)
        scenes = 4096 if config.preset == "demo" else 0  # the other presets need --data
        source = image_source(
            config.data,
            config.proposals,
            scenes=scenes,
            co_occurrence=config.co_occurrence,
            value_range=config.value_range,
            patience=patience,
        )
        dataset = TwoViews(source, config)
        # With more keys than images, an image would often meet its own earlier key as a negative.
        harness.check(
            config.bank <= len(source),
            f"--bank is {config.bank}: give at most {len(source)}, the number of images.",
        )
        steps_per_epoch = harness.batches_per_epoch(len(source), config.batch, world)
        steps = config.epochs * steps_per_epoch
        peak_lr = config.lr * config.batch / 256

        torch.manual_seed(config.seed)
        model = D3SSL(config, initial)
        encoders.freeze(model.student["encoder"], config.freeze)
        encoders.freeze(model.teacher["encoder"], config.freeze)
        model.to(device, memory_format=torch.channels_last)
        model.compile(disable=not config.compile)
        ddp = nn.parallel.DistributedDataParallel(model)
        harness.warn_of_norm("the shuffle of the keys", initial.architecture, model, world)

        parameters = list(model.student.parameters())
        optimizer = torch.optim.SGD(
            parameters, peak_lr, momentum=0.9, weight_decay=config.weight_decay
        )
        bank = dk.init_bank(config.bank, config.head[1], device=device)
        step = run.resume(model, optimizer, bank=bank)
        bank = bank._replace(features=harness.unit_rows(bank.features))

        batches = partial(
            harness.batches,
            dataset,
            world=world,
            seed=config.seed,
            workers=config.workers,
            normalize=(initial.mean, initial.std),
            patience=patience,
        )
        # The pictures show six images of the main process.
        preview_batch = min(6 * world.size, config.batch)
        preview = next(batches(preview_batch, start=0, stop=1))
        monitor = health.Monitor(model.student["encoder"], preview[0], run)
        if step == 0 and world.is_main:
            run.log(step, **monitor.measure_all())
            evaluate(model, source, preview, config, run, step)
        run.wait()

        method = method_of(config)
        facts = {**initial.side_car(), "method": method}
        kept = harness.kept_epochs(config, steps_per_epoch)

        training_batches = batches(config.batch, start=step, stop=steps)
        bar = harness.progress(training_batches, start=step, stop=steps, world=world)
        # The regions of an epoch; one that is resumed has had some.
        regions = torch.tensor(float(step % steps_per_epoch), device=device)
        for images, views, boxes, valid, indices, unreadable in bar:
            lr = dk.cosine_schedule(step, steps, start=peak_lr)
            optimizer.param_groups[0].update(lr=lr)
            # The key encoder keeps batch statistics of its own.
            dk.ema_update(model.teacher, model.student, momentum=config.momentum, buffers="keep")

            # All processes shuffle the images of the keys in the same order.
            shuffler = harness.generator(config.seed, step, harness.SHUFFLE)
            order = torch.randperm(config.batch, generator=shuffler)
            order = order.to(device, non_blocking=True)
            # For the augmentation of the regions.
            seeds = harness.image_seeds(config.seed, step, indices)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, terms, bank = ddp(images, views, boxes, valid, bank, order, seeds)

            optimizer.zero_grad()
            loss.backward()
            # An infinite norm clips nothing; the gradient norm is only measured.
            grad_norm = nn.utils.clip_grad_norm_(parameters, torch.inf)
            run.record(step, {"loss": loss, "grad_norm": grad_norm, **terms})
            optimizer.step()
            step += 1

            regions += valid.sum()
            if step % steps_per_epoch == 0:
                check_regions(regions, source)
                regions.zero_()

            run.note_unreadable(unreadable)
            # The device is waited for here alone. The run ends if a value was not finite.
            if step % config.log_every == 0:
                values = run.take_means()
                harness.show(bar, values, ("decoupling", "depositioning"))
                run.log(step, **values, **monitor.measure(), lr=lr, unreadable=run.unreadable)
                monitor.warn(step)

            due = step % config.save_every == 0 or step in kept or step == steps
            if due:
                run.check()  # what follows a bad value is neither shown nor saved
                run.log(step, **monitor.measure_all())
                monitor.warn(step)
            stop = run.stop_requested()
            if due and world.is_main:
                evaluate(model, source, preview, config, run, step)
            if due or stop:
                run.save(
                    step,
                    model,
                    optimizer,
                    encoder=model.student["encoder"],
                    facts=facts,
                    epoch=kept.get(step),
                    bank=bank,
                )
            if stop:
                return

        if world.is_main:
            measures = "coupling {coupling_rate_layer4:.3f}, cosine {mean_cosine_layer4:.3f}"
            harness.print_probes(run, f"; C5: {measures}")
