"""DUPR pre-training: each patch of a view is found again in the other, at several levels (2021).

    python recipes/dupr.py                      # the demo: minutes on a CPU
    python recipes/dupr.py --data FOLDER        # the demo's model on your images
    torchrun --nproc-per-node 8 -- recipes/dupr.py --preset paper --data imagenet/train

Run the same command again to resume. `--preset mocov2` is the baseline, with the image loss
of C5 alone. Logged values, deviations from the paper, time and results: docs/recipes/dupr.md.
"""

import argparse
import copy
import math
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Views:
    size: int = 224  # Side of the square views, in pixels.
    scale: tuple[float, float] = (0.2, 1.0)  # Share of the image's area that a view covers.
    hue: float = 0.1  # Strength of the hue jitter; 0.5 allows every hue.
    blur: tuple[float, float] = (0.1, 2.0)  # Standard deviation of the blur, in pixels.


@dataclass(frozen=True)
class Config:
    # Set of defaults; each option below overrides one of them.
    preset: Literal["demo", "paper", "coco", "mocov2"] = "demo"
    data: Path | None = None  # Folder of images, also in its subfolders; the demo can run without.
    run: Path | None = None  # Run folder; by default runs/dupr-PRESET[-NAME OF DATA].
    arch: str = "resnet50"  # A network of timm with 4 maps, or "tiny" (64 channels).
    # Weights to start from: timm:NAME, torchvision:NAME, lite0, a file, a run folder; without them
    # the network is random.
    weights: str | None = None
    freeze: int = 0  # Keep the stem and this many stages, or blocks of a ViT, as they start.
    outputs: int = 128  # Outputs of every head.
    # Weights of the image losses, at C2 to C5.
    alpha: tuple[float, float, float, float] = (0.1, 0.4, 0.7, 1.0)
    # Weights of the patch losses, at C2 to C5.
    beta: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    patches: tuple[int, int, int, int] = (14, 14, 14, 7)  # S x S patches, at C2 to C5.
    # Smallest IoU of the two views of an image in the patch losses; up to 10 pairs are drawn.
    min_overlap: float = 0.0
    bank: int = 65536  # Number of keys in the bank of each loss.
    keys: int = 4  # Number of patches of an image that enter the bank of a patch loss.
    temperature: float = 0.2  # Divisor of the cosines in InfoNCE.
    # Batch statistics of the keys: of shuffled images, or synchronized between GPUs (sync).
    norm: Literal["shuffled", "sync"] = "shuffled"
    batch: int = 256  # Images per step, over all processes.
    epochs: int = 200  # Passes over the images.
    lr: float = 0.06  # Learning rate for a batch of 256; it is scaled with the batch.
    weight_decay: float = 1e-4  # Weight decay of all parameters.
    momentum: float = 0.999  # Momentum of the key encoder and its heads.
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
        arch="tiny", outputs=64, patches=(7, 7, 7, 7), bank=512,
        batch=40, epochs=10, lr=0.8, momentum=0.99,
        workers=1, precision="fp32", save_every=170,  # six times in 1,020 steps
        views=Views(size=48, hue=0.5, blur=(0.1, 1.0)),
    ),
    "paper": Config("paper"),  # the defaults of Config
    "coco": Config("coco", epochs=2000),
    "mocov2": Config("mocov2", alpha=(0.0, 0.0, 0.0, 1.0), beta=(0.0, 0.0, 0.0, 0.0)),
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
from downstream import colors, encoders, health, scene_probe
from downstream.crops import as_bytes, as_picture, crop_bytes
from downstream.encoders import last_map, level_maps
from einops import rearrange
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms
from torchvision.utils import save_image
import densekit as dk
from densekit import viz


def check_options(config: Config) -> None:
    """Raise a UserError of one sentence for a wrong option, before any data is read."""
    harness.check_training(config)

    encoders.check_start(config)
    encoders.check_maps(config, "--views.size", config.views.size, levels=4)
    harness.check(config.outputs >= 1, f"--outputs is {config.outputs}: give 1 or more.")

    typed_alpha = harness.as_typed(config.alpha)
    typed_beta = harness.as_typed(config.beta)
    harness.check(
        all(0 <= weight < math.inf for weight in config.alpha),
        f"--alpha is {typed_alpha}: give four finite numbers, 0 or more.",
    )
    harness.check(
        all(0 <= weight < math.inf for weight in config.beta),
        f"--beta is {typed_beta}: give four finite numbers, 0 or more.",
    )
    # Without a loss at C5, the last block of the encoder would have no gradient.
    harness.check(
        config.alpha[3] > 0 or config.beta[3] > 0,
        f"--alpha is {typed_alpha} and --beta is {typed_beta}: give C5, the last of the four, a "
        "weight above 0 in --alpha or --beta.",
    )
    harness.check(
        min(config.patches) >= 1,
        f"--patches is {harness.as_typed(config.patches)}: give four numbers, 1 or more.",
    )
    harness.check(
        0 <= config.min_overlap < 1,
        f"--min-overlap is {config.min_overlap}: give an IoU from 0 to less than 1.",
    )
    harness.check(config.bank >= 1, f"--bank is {config.bank}: give 1 key or more.")
    harness.check(config.keys >= 1, f"--keys is {config.keys}: give 1 or more.")
    for loss in list_losses(config):
        harness.check(
            loss.side == 0 or config.keys <= loss.side**2,
            f"--keys is {config.keys}: give at most {loss.side**2}, the patches of an image at "
            f"C{FIRST_LEVEL + loss.level_index}.",
        )
    harness.check_above_zero("--temperature", config.temperature)
    harness.check(
        config.norm == "shuffled" or harness.uses_cuda(config.device),
        "--norm is sync: give shuffled, since sync needs GPUs.",
    )

    harness.check_finite("--weight-decay", config.weight_decay)
    momentum = config.momentum
    harness.check(
        0 <= momentum < 1, f"--momentum is {momentum}: give a number from 0 to less than 1."
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
    """Two augmented crops of each image, and the `View` of each crop.

    `source` is from `harness.image_source`. `dataset[epoch, index]` is one image: its crops, of 8
    bits, their views, its index, and the files that could not be read.
    """

    def __init__(self, source, config: Config):
        self.source = source
        self.seed = config.seed
        self.view_config = config.views
        self.min_overlap = config.min_overlap
        self.photometric = photometric(config.views)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        image, unreadable = self.source[index]
        size = tuple(image.shape[-2:])

        generator = harness.generator(self.seed, epoch, index)
        pairs = dk.sample_view_pairs(
            size,
            min_overlap=self.min_overlap,
            scale=self.view_config.scale,
            generator=generator,
        )
        views = (pairs.view1, pairs.view2)
        if epoch == 0:
            dk.check_views(dk.stack_views(views), size)

        side = self.view_config.size
        crops = [crop_bytes(image, view, side) for view in views]
        # The colors need other random numbers than the views.
        with harness.seeded(self.seed, epoch, index, harness.COLORS):
            augmented = tuple(self.photometric(crop) for crop in crops)
        return augmented, views, torch.tensor(index), list(unreadable)


# ==== model =======================================================================================
# The dtype of the products with the keys of a bank; None is that of the loss.
PRODUCT_DTYPES = {"fp32": None, "bf16": torch.bfloat16}
FIRST_LEVEL = 2  # The levels are C2 to C5. Lists of all levels begin with C2.


class LevelLoss(NamedTuple):
    """The loss at one level, of whole images or of their patches. It has a head of its own."""

    name: str  # "image2" to "patch5"
    level_index: int  # in a list of all levels: 0 is C2, and 3 is C5
    side: int  # S, for S x S patches; 0 is the whole image
    weight: float  # in the total loss


def list_losses(config: Config) -> list[LevelLoss]:
    """The losses whose weight is not 0. Those of images come before those of patches."""
    losses = []
    for index, weight in enumerate(config.alpha):
        losses.append(LevelLoss(f"image{FIRST_LEVEL + index}", index, side=0, weight=weight))
    for index, weight in enumerate(config.beta):
        side = config.patches[index]
        losses.append(LevelLoss(f"patch{FIRST_LEVEL + index}", index, side=side, weight=weight))
    return [loss for loss in losses if loss.weight]


def pool_cells(maps: Tensor) -> Tensor:
    """Mean over all cells: one row of features for each image, (b, 1, d)."""
    cells = dk.map_to_rows(maps)  # (b, cells, d)
    return cells.mean(1, keepdim=True)


class DUPR(nn.Module):
    """Query network (student) and key network (teacher). Each is an encoder with heads (Fig 3)."""

    def __init__(self, config: Config, initial: encoders.Start | None = None):
        super().__init__()
        initial = initial or encoders.read_start(config)
        self.mean = initial.mean
        self.std = initial.std
        self.config = config
        self.losses = list_losses(config)
        encoder = encoders.build_start(initial)
        heads = nn.ModuleDict()
        for loss in self.losses:
            channels = encoder.feature_info[loss.level_index - 4]["num_chs"]
            # The paper's 1 x 1 convolutions are linear layers on the features of each patch.
            heads[loss.name] = nn.Sequential(
                nn.Linear(channels, channels),
                nn.ReLU(inplace=True),
                nn.Linear(channels, config.outputs),
            )
        self.student = nn.ModuleDict({"encoder": encoder, "heads": heads})
        self.teacher = copy.deepcopy(self.student)
        self.teacher.requires_grad_(False)

    def init_banks(self, device: torch.device) -> dict[str, dk.Bank]:
        """An empty bank of keys for each loss."""
        banks = {}
        for loss in self.losses:
            banks[loss.name] = dk.init_bank(self.config.bank, self.config.outputs, device=device)
        return banks

    @torch.no_grad()
    def encode_keys(self, images: Tensor, order: Tensor) -> list[Tensor]:
        """The maps C2 to C5 of the key encoder.

        The images are shuffled over the processes before the encoder, and its maps are brought
        back after it. So the batch statistics of a key come from other images than those of its
        query, and the query cannot recognize its key by them. `order` says how the images are
        shuffled.
        """
        group = torch.distributed.group.WORLD
        shuffled = self.config.norm == "shuffled"
        if shuffled:
            images = dk.shuffle_batch(images, order, group)
        maps = level_maps(self.teacher["encoder"], images)
        for index, beta in enumerate(self.config.beta):
            if not beta:
                # No patch loss reads this level, so its mean is enough, and quicker to send. It is
                # a map of one cell, which does not change when it is pooled again.
                maps[index] = maps[index].mean((-2, -1), keepdim=True)
        if shuffled:
            maps = [dk.unshuffle_batch(x, order, group) for x in maps]
        return maps

    # ==== loss ====================================================================================
    def forward(
        self,
        images: list[Tensor],
        views: list[dk.View],
        banks: dict[str, dk.Bank],
        order: Tensor,
        seeds: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, dk.Bank]]:
        """The total loss, the terms that are logged, and the banks with the keys of this batch.

        `order` says how the images of the keys are shuffled. The seed of each image says which of
        its keys enter the banks.
        """
        config = self.config
        group = torch.distributed.group.WORLD
        query_maps = level_maps(self.student["encoder"], images[0])
        key_maps = self.encode_keys(images[1], order)
        # A pair of views that shares less than it should has no patch loss.
        iou = dk.box_iou(views[0].box, views[1].box)
        overlap = dk.intersect_views(*views).valid & (iou >= config.min_overlap)

        total_loss = torch.zeros((), device=images[0].device)
        terms = {}
        new_banks = {}
        for stream, loss in enumerate(self.losses):
            query_map = query_maps[loss.level_index]
            key_map = key_maps[loss.level_index]
            # A row is the features of one patch, or of one image.
            if loss.side:
                pairs = dk.patch_pairs(query_map, key_map, *views, loss.side, overlap)
                query_rows = pairs.features1
                key_rows = pairs.features2
                valid = pairs.valid
                filled_name = "patch_filled"
                keys_per_image = config.keys
            else:
                query_rows = pool_cells(query_map)
                key_rows = pool_cells(key_map)
                valid = torch.ones_like(query_rows[..., 0], dtype=torch.bool)
                filled_name = "image_filled"
                keys_per_image = 1
            query = self.student["heads"][loss.name](query_rows)
            key = self.teacher["heads"][loss.name](key_rows)
            query = dk.l2_normalize(query)
            key = dk.l2_normalize(key)  # once: the bank holds it as it is

            # The means are over the valid rows of all processes.
            bank = banks[loss.name]
            mean = partial(dk.masked_mean, valid=valid, group=group)
            row_losses = dk.info_nce(  # 0 while the bank is empty
                query,
                key,
                dk.bank_negatives(bank),
                valid,
                temperature=config.temperature,
                reduction="none",
                normalized=True,
                product_dtype=PRODUCT_DTYPES[config.precision],
            )
            row_cosines = (query.detach() * key).sum(-1)  # logged only
            terms[loss.name] = mean(row_losses)
            terms[f"{loss.name}_cosine"] = mean(row_cosines)
            terms[filled_name] = bank.filled  # the same for all banks of a kind
            total_loss = total_loss + loss.weight * terms[loss.name]

            # Every process pushes the keys of all processes, so that the banks stay the same.
            noise = harness.noise(seeds, (key.shape[1],), stream)
            own_keys = dk.sample_keys(key, keys_per_image, noise=noise)
            all_keys = dk.all_gather(own_keys, group)
            # All rows of an image are valid, or none is.
            all_valid = dk.all_gather(valid[:, :1], group)
            new_banks[loss.name] = dk.push_to_bank(bank, all_keys, all_valid)

        # The share of the pairs of views that overlap enough.
        terms["overlap"] = overlap.double().mean()
        return total_loss, terms, new_banks


# ==== evaluation ==================================================================================
PANEL_SIDE = 224  # Side of a panel of the picture, in pixels.
LEVEL_INDEX = 2  # The pictures are of C4, as in the paper.
IOUS = [i / 10 for i in range(11)]


class Matches(NamedTuple):
    """Similarity of the S x S patches of two views."""

    affinity: Tensor  # (b, S * S, S * S): patches of view 1 by patches of view 2
    nearest: Tensor  # (b, S * S): for each patch of view 2 the most similar patch of view 1
    valid: Tensor  # (b,): whether the views overlap


@torch.no_grad()
def evaluate(model: DUPR, preview: tuple, config: Config, run: harness.Run, step: int) -> None:
    """Save pictures of matches and of similarity against IoU. Without --data, also probe."""
    model.eval()
    encoder = model.student["encoder"]
    images, views, _, _ = preview
    # All pictures are drawn on the CPU.
    maps = [level_maps(encoder, x)[LEVEL_INDEX].cpu() for x in images]
    views = [dk.views_to(view, "cpu") for view in views]

    path = run.picture_path(step)
    matches = match(maps, views, config.patches[LEVEL_INDEX])
    pictures = [harness.unnormalize(x, model.mean, model.std) for x in images]
    draw_matches(pictures, views, matches, path)
    own_index = torch.arange(matches.nearest.shape[1])
    is_own = matches.nearest == own_index
    matched = dk.masked_mean(is_own.float(), matches.valid[:, None])
    similarity = measure_similarity(torch.cat(maps), config.seed)
    run.log(step, matched=matched, **similarity)
    # The rows of all checkpoints so far give a curve each.
    draw_similarity(run.rows(*similarity), path.with_name("similarity-iou.png"))

    if config.data is None:
        normalize = transforms.Normalize(model.mean, model.std)
        device = images[0].device

        def features(scenes: Tensor) -> Tensor:
            return last_map(encoder, normalize(scenes).to(device))

        run.log(step, **scene_probe.probe(features, run.picture_path(step, "probe")))
    model.train()


def match(maps: list[Tensor], views: list[dk.View], side: int) -> Matches:
    """Match each patch of view 2 with the patch of view 1 that has the most similar features."""
    pairs = dk.patch_pairs(*maps, *views, side)
    affinity = dk.affinity_matrix(pairs.features1, pairs.features2)
    return Matches(affinity, affinity.argmax(-2), pairs.valid.all(1))


def draw_matches(
    pictures: list[Tensor], views: list[dk.View], matches: Matches, path: Path
) -> None:
    """A row per image: view 1 and view 2, view 2 in the colors of its matches, affinity (Fig 9).

    In the first two panels the color of a patch tells its place. In the third panel a patch has
    the color of the patch of view 1 that it is matched with.
    """
    count, patches = matches.nearest.shape
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0])
    colors = viz.place_colors(dk.grid_points(whole, math.isqrt(patches)))
    own_colors = colors.expand(count, -1, -1)
    matched_colors = colors[matches.nearest]

    overlap = dk.intersect_views(*views)
    affinity = nn.functional.interpolate(matches.affinity[:, None], PANEL_SIDE)
    panels = [
        tint_patches(pictures[0], views[0], overlap, own_colors),
        tint_patches(pictures[1], views[1], overlap, own_colors),
        tint_patches(pictures[1], views[1], overlap, matched_colors),
        affinity.expand(-1, 3, -1, -1),
    ]
    save_image(rearrange(panels, "p b c h w -> (b p) c h w"), path, nrow=len(panels))


def tint_patches(pictures: Tensor, view: dk.View, overlap: dk.Overlap, colors: Tensor) -> Tensor:
    """The pictures of a view; `colors` (b, S * S, 3) tint the S x S patches of what is shared."""
    side = math.isqrt(colors.shape[1])
    # Where each pixel of the panel lies in the image, and then in the shared region, which is
    # taken as a view that is not mirrored.
    points = dk.coordinate_map(view, (PANEL_SIDE, PANEL_SIDE)).flatten(1, 2)
    region = dk.View(overlap.box, torch.zeros_like(overlap.valid))
    places = dk.image_to_view(region, points) * side
    column, row = places.floor().long().unbind(-1)
    inside = (column >= 0) & (column < side) & (row >= 0) & (row < side) & overlap.valid[:, None]

    patch_index = torch.where(inside, row * side + column, 0)
    tints = torch.stack([x[index] for x, index in zip(colors, patch_index, strict=True)])
    panels = nn.functional.interpolate(pictures, PANEL_SIDE)
    tint_maps = dk.rows_to_map(tints, PANEL_SIDE)
    return viz.tint_images(panels, tint_maps, inside.unflatten(1, (PANEL_SIDE, PANEL_SIDE)))


def measure_similarity(maps: Tensor, seed: int) -> dict[str, Tensor]:
    """Cosine of the features of a box and of moved copies of it, for each IoU (Eq 8)."""
    central_ninth = torch.tensor([1 / 3, 1 / 3, 2 / 3, 2 / 3])
    boxes = central_ninth.expand(len(maps), 1, 4)
    curve = dk.similarity_iou_curve(maps, boxes, ious=IOUS, generator=harness.generator(seed))
    names = [f"similarity_iou_{iou}" for iou in IOUS]
    return dict(zip(names, curve.similarity, strict=True))


def draw_similarity(rows: list[dict], path: Path) -> None:
    """Cosine against IoU, a curve for each checkpoint (Fig 5)."""
    curves = [[row[f"similarity_iou_{iou}"] for iou in IOUS] for row in rows]
    names = [f"step {row['step']}" for row in rows]
    figure = viz.plot_similarity_iou(IOUS, torch.tensor(curves), names=names)
    figure.axes[0].set_ylabel(f"cosine (C{FIRST_LEVEL + LEVEL_INDEX})")
    figure.savefig(path)


# ==== loop ========================================================================================
def train(config: Config) -> None:
    check_options(config)
    initial = encoders.read_start(config)
    folder = harness.run_folder("dupr", config)
    group = harness.process_group(config.device, config.collective_timeout, fixed_shapes=True)
    with group as world, harness.Run(folder, config, world) as run:
        device = world.device
        patience = harness.Patience(config.warn_after, config.give_up_after)
        scenes = 4096 if config.preset == "demo" else 0  # the other presets need --data
        source = harness.image_source(
            config.data, scenes=scenes, value_range=config.value_range, patience=patience
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
        model = DUPR(config, initial)
        if config.norm == "sync":
            timm.layers.convert_sync_batchnorm(model)  # in place
        encoders.freeze(model.student["encoder"], config.freeze)
        encoders.freeze(model.teacher["encoder"], config.freeze)
        model.to(device, memory_format=torch.channels_last)
        model.compile(disable=not config.compile)
        ddp = nn.parallel.DistributedDataParallel(model)
        harness.warn_of_norm(f"--norm {config.norm}", initial.architecture, model, world)

        parameters = list(model.student.parameters())
        optimizer = torch.optim.SGD(
            parameters, peak_lr, momentum=0.9, weight_decay=config.weight_decay
        )
        banks = model.init_banks(device)
        step = run.resume(model, optimizer, banks=banks)
        for name, bank in banks.items():
            banks[name] = bank._replace(features=harness.unit_rows(bank.features))

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
            evaluate(model, preview, config, run, step)
        run.wait()

        loss_names = [loss.name for loss in list_losses(config)]
        method = "mocov2" if loss_names == ["image5"] else "dupr"
        facts = {**initial.side_car(), "method": method}
        kept = harness.kept_epochs(config, steps_per_epoch)

        training_batches = batches(config.batch, start=step, stop=steps)
        bar = harness.progress(training_batches, start=step, stop=steps, world=world)
        for images, views, indices, unreadable in bar:
            lr = dk.cosine_schedule(step, steps, start=peak_lr)
            optimizer.param_groups[0].update(lr=lr)
            # The key encoder keeps batch statistics of its own.
            dk.ema_update(model.teacher, model.student, momentum=config.momentum, buffers="keep")

            # All processes shuffle the images of the keys in the same order.
            shuffler = harness.generator(config.seed, step, harness.SHUFFLE)
            order = torch.randperm(config.batch, generator=shuffler)
            order = order.to(device, non_blocking=True)
            # For the keys that enter the banks.
            seeds = harness.image_seeds(config.seed, step, indices)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, terms, banks = ddp(images, views, banks, order, seeds)

            optimizer.zero_grad()
            loss.backward()
            # An infinite norm clips nothing; the gradient norm is only measured.
            grad_norm = nn.utils.clip_grad_norm_(parameters, torch.inf)
            run.record(step, {"loss": loss, "grad_norm": grad_norm, **terms})
            optimizer.step()
            step += 1

            run.note_unreadable(unreadable)
            # The device is waited for here alone. The run ends if a value was not finite.
            if step % config.log_every == 0:
                values = run.take_means()
                harness.show(bar, values, ("image5", "patch4", "patch5"))
                run.log(step, **values, **monitor.measure(), lr=lr, unreadable=run.unreadable)
                monitor.warn(step)

            due = step % config.save_every == 0 or step in kept or step == steps
            if due:
                run.check()  # what follows a bad value is neither shown nor saved
                run.log(step, **monitor.measure_all())
                monitor.warn(step)
            stop = run.stop_requested()
            if due and world.is_main:
                evaluate(model, preview, config, run, step)
            if due or stop:
                run.save(
                    step,
                    model,
                    optimizer,
                    encoder=model.student["encoder"],
                    facts=facts,
                    epoch=kept.get(step),
                    banks=banks,
                )
            if stop:
                return

        if world.is_main:
            harness.print_probes(run)
