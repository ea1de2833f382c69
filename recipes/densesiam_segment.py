"""DenseSiam's unsupervised semantic segmentation: pseudo-classes on which two views agree.

    python recipes/densesiam_segment.py               # the demo: minutes on a CPU
    python recipes/densesiam_segment.py --data SET    # the demo's model on your labeled images
    torchrun --nproc-per-node 8 -- recipes/densesiam_segment.py --preset paper --data coco \\
        --layout coco-stuff --mapping recipes/coco_stuff_27.json --weights torchvision:resnet18

Labels are used for the score alone. Run the same command again to resume. Logged values, lists of
images, deviations from the paper (ECCV 2022), time and results: docs/recipes/densesiam_segment.md.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Config:
    # Set of defaults; each option below overrides one of them.
    preset: Literal["demo", "paper"] = "demo"
    data: Path | None = None  # Folder of a labeled image set; the demo can run without.
    layout: str = "auto"  # Layout of the data, such as coco-stuff or folder.
    mapping: Path | None = None  # JSON file of other classes, such as recipes/coco_stuff_27.json.
    train_split: str = "train"  # Split to train on.
    train_list: Path | None = None  # Text file with the images to train on, one name a line.
    val_split: str = "val"  # Split to score.
    val_list: Path | None = None  # Text file with the images to score, one name a line.
    run: Path | None = None  # Run folder; by default runs/densesiam-segment-PRESET[-NAME OF DATA].
    arch: str = "resnet18"  # Convolutional network of timm, or "tiny" (64 channels, stride 8).
    # Weights to start from: lite0, timm:NAME, torchvision:NAME, a file of --arch or a run folder.
    weights: str | None = None
    freeze: int = 0  # Keep the stem and this many stages as they start.
    aux: int = 128  # Pseudo-classes of the auxiliary head; 0 trains without it.
    segment: float = 1.0  # Weight of L_seg.
    weighting: Literal["frequency", "balanced", "plain"] = "frequency"  # Class weights of L_seg.
    region: float = 0.1  # Weight of L_region.
    region_start: float = 0.8  # Share of the training after which L_region begins.
    sim: float = 0.0  # Weight of L_sim, SimSiam's loss on whole views; the paper goes without.
    image: int = 640  # Side in pixels to which the center square of an image is resized first.
    size: int = 320  # Side of both views, and the short side of the scored images, in pixels.
    hue: float = 0.1  # Strength of the hue jitter; 0.5 allows every hue.
    blur: tuple[float, float] = (0.1, 2.0)  # Standard deviation of the blur, in pixels.
    frozen_views: bool = False  # Keep one crop and flip of each image for the whole run.
    batch: int = 256  # Images per step, over all processes.
    epochs: int = 10  # Passes over the images.
    lr: float = 0.05  # Constant learning rate for a batch of 256; it is scaled with the batch.
    weight_decay: float = 1e-4  # Weight decay of all parameters.
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
        arch="tiny", aux=64, image=64, size=96, hue=0.5, blur=(0.1, 1.0), batch=32, lr=0.2,
        workers=1, precision="fp32", save_every=20,
    ),
    "paper": Config("paper"),  # the defaults of Config
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
from downstream import colors, encoders, health, segmentation
from downstream.crops import as_bytes, as_picture, crop_bytes
from downstream.segmentation import evaluate, open_split, open_training
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, grid_sample, interpolate
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
        f"--aux is {config.aux}: give 2 pseudo-classes or more, or 0 for no auxiliary head.",
    )
    harness.check_finite("--segment", config.segment)
    harness.check_finite("--region", config.region)
    harness.check(
        0 <= config.region_start <= 1,
        f"--region-start is {config.region_start}: give a share from 0 to 1.",
    )
    harness.check_finite("--sim", config.sim)
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
WIDTH = 128  # Channels of the pyramid, and hidden channels of the heads (Sec 4).
SIM_WIDTH = 512  # Channels of the heads of L_sim, in the authors' code.


conv1x1 = partial(nn.Conv2d, kernel_size=1)


def build_projector(
    layer, norm, inputs: int, hidden: int, outputs: int, *, bias: bool = False
) -> nn.Sequential:
    """Three layers. The last normalization has no affine parameters and no ReLU after it."""
    return nn.Sequential(
        layer(inputs, hidden, bias=False),
        norm(hidden),
        nn.ReLU(inplace=True),
        layer(hidden, hidden, bias=False),
        norm(hidden),
        nn.ReLU(inplace=True),
        layer(hidden, outputs, bias=bias),
        norm(outputs, affine=False),
    )


def build_predictor(layer, norm, width: int, hidden: int) -> nn.Sequential:
    """Two layers, from a projection to a prediction of the other view's projection."""
    return nn.Sequential(
        layer(width, hidden, bias=False),
        norm(hidden),
        nn.ReLU(inplace=True),
        layer(hidden, width),
    )


def replay(maps: Tensor, view: dk.View) -> Tensor:
    """What a crop shows of maps of the whole square; the square's side is the view's unit."""
    places = dk.coordinate_map(view, maps.shape[-2:])
    grid = 2 * places - 1  # grid_sample counts from -1 to 1
    return grid_sample(maps.to(grid.dtype), grid, padding_mode="border", align_corners=False)


def segment_loss(logits: Tensor, weighting: str) -> Tensor:
    """L_seg: cross-entropy of each row of logits, (n, classes), with the class that wins in it."""
    labels = logits.argmax(-1)
    # `bincount` would wait for the device.
    counts = labels.new_zeros(logits.shape[-1]).scatter_add(0, labels, torch.ones_like(labels))
    if weighting == "frequency":
        weights = counts / len(labels)
    elif weighting == "balanced":
        weights = len(labels) / counts.clamp(min=1) / (counts > 0).sum()
    else:
        weights = torch.ones_like(counts)
    losses = cross_entropy(logits, labels, reduction="none")
    return (weights[labels] * losses).mean()


class Segmenter(nn.Module):
    """A network with a simplified feature pyramid of its four levels, and the heads (Sec 4)."""

    def __init__(self, config: Config, classes: int, initial: encoders.Start | None = None):
        super().__init__()
        self.config = config
        initial = initial or encoders.read_start(config)
        self.encoder = encoders.encoder_of(initial, seed=config.seed)
        self.encoder.train()
        unused = encoders.unused_weights(self.encoder.network, levels=4)
        for name, parameter in self.encoder.network.named_parameters():
            parameter.requires_grad_(name not in unused)  # encoder_of freezes all of them
        channels = [level["num_chs"] for level in self.encoder.network.feature_info[-4:]]
        self.laterals = nn.ModuleList(conv1x1(x, WIDTH) for x in channels)

        # Of these heads, `dense` and `aux` act on pixels, `region` and `sim` on rows of features.
        self.projectors = nn.ModuleDict()
        self.predictors = nn.ModuleDict()
        pixels = (conv1x1, nn.BatchNorm2d)
        rows = (nn.Linear, nn.BatchNorm1d)
        self.projectors["dense"] = build_projector(*pixels, WIDTH, WIDTH, classes, bias=True)
        self.predictors["dense"] = build_predictor(*pixels, classes, WIDTH)
        if config.aux:
            self.projectors["aux"] = build_projector(*pixels, WIDTH, WIDTH, config.aux, bias=True)
            self.predictors["aux"] = build_predictor(*pixels, config.aux, WIDTH)
        if config.region:
            self.projectors["region"] = build_projector(*rows, WIDTH, WIDTH, WIDTH)
            self.predictors["region"] = build_predictor(*rows, WIDTH, WIDTH)
        if config.sim:
            self.projectors["sim"] = build_projector(*rows, channels[-1], SIM_WIDTH, SIM_WIDTH)
            self.predictors["sim"] = build_predictor(*rows, SIM_WIDTH, SIM_WIDTH)

        self.share = 1.0  # the weight of L_dense
        if config.aux:
            # Of the two heads, the one with fewer classes weighs more.
            self.share = math.log(config.aux) / (math.log(classes) + math.log(config.aux))
        self.register_buffer("names", torch.full((classes,), -1))  # the class of each pseudo-class

    def features(self, images: Tensor) -> Tensor:
        """The finest map of the pyramid, (b, 128, h, w)."""
        return self.pyramid(self.encoder.levels(images))

    def pyramid(self, levels: list[Tensor]) -> Tensor:
        """The finest map of the pyramid on the levels C2 to C5."""
        maps = [lateral(x) for lateral, x in zip(self.laterals, levels, strict=True)]
        pyramid = maps[-1]
        for finer in reversed(maps[:-1]):
            pyramid = finer + interpolate(pyramid, finer.shape[-2:], mode="bilinear")
        return pyramid

    def segment(self, image: Tensor, size: torch.Size) -> Tensor:
        """The pseudo-class of each pixel of one image, at the size of its labels."""
        images = resize(image, [self.config.size])[None]

        def logits_of(padded: Tensor) -> Tensor:
            return self.projectors["dense"](self.features(padded))

        return segmentation.segment(logits_of, self.encoder, images, size)

    # ==== loss ====================================================================================
    def forward(self, images: list[Tensor], view: dk.View, with_region: bool):
        """The total loss (Eq 8), and the terms that are logged; `with_region` adds L_region."""
        levels = [self.encoder.levels(x) for x in images]
        near = self.pyramid(levels[0])
        whole = self.pyramid(levels[1])
        maps = [near, replay(whole, view)]  # the cells of both lie at the same places

        terms = {}
        terms["dense"], logits = self.dense_loss("dense", maps)
        loss = self.share * terms["dense"]
        if self.config.aux:
            terms["aux"], _ = self.dense_loss("aux", maps)
            loss = loss + (1 - self.share) * terms["aux"]
        if self.config.segment:
            each_view = [segment_loss(x.flatten(0, 1), self.config.weighting) for x in logits]
            terms["segment"] = (each_view[0] + each_view[1]) / 2
            loss = loss + self.config.segment * terms["segment"]
        if with_region:
            terms["region"] = self.region_loss(maps, logits)
            loss = loss + self.config.region * terms["region"]
        if self.config.sim:
            terms["sim"] = self.global_loss([x[-1] for x in levels])
            loss = loss + self.config.sim * terms["sim"]
        return loss, terms

    def dense_loss(self, head: str, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The views agree cell by cell. Also returns the projections, logits of pseudo-classes."""
        projected_maps = [self.projectors[head](x) for x in maps]
        predicted_maps = [self.predictors[head](x) for x in projected_maps]
        projections = [dk.map_to_rows(x) for x in projected_maps]  # (b, cells, classes)
        predictions = [dk.map_to_rows(x) for x in predicted_maps]
        loss = dk.symmetric_loss(dk.cross_entropy_similarity, predictions, projections)
        return loss, projections

    def global_loss(self, maps: list[Tensor]) -> Tensor:
        """SimSiam: negative cosine of the pooled C5 of the whole views."""
        projections = [self.projectors["sim"](x.mean((-2, -1))) for x in maps]
        predictions = [self.predictors["sim"](x) for x in projections]
        return dk.symmetric_loss(dk.negative_cosine, predictions, projections)

    def region_loss(self, maps: list[Tensor], logits: list[Tensor]) -> Tensor:
        """InfoNCE of the soft regions of an image, whose masks are the softmax of `logits`."""
        features = [dk.map_to_rows(x) for x in maps]
        masks = [x.softmax(-1) for x in logits]
        regions = [dk.pool_masks(x, mask) for x, mask in zip(features, masks, strict=True)]

        # For the heads and their batch normalization every region of every image is a row.
        shape = regions[0].shape[:2]
        projected_rows = [self.projectors["region"](x.flatten(0, 1)) for x in regions]
        predicted_rows = [self.predictors["region"](x) for x in projected_rows]
        projections = [x.unflatten(0, shape) for x in projected_rows]
        predictions = [x.unflatten(0, shape) for x in predicted_rows]

        info_nce = partial(dk.info_nce, temperature=0.1)
        return dk.symmetric_loss(info_nce, predictions, projections)


# ==== loop ========================================================================================
def spread(model: Segmenter, with_region: bool) -> nn.parallel.DistributedDataParallel:
    """The model, whose gradients are averaged over the processes.

    The heads of L_region have no gradient, and no weight decay, before it begins. To find that out
    by itself, DistributedDataParallel would let the host wait for the device in each step.
    """
    for name, parameter in model.named_parameters():
        if "region" in name:
            parameter.requires_grad_(with_region)
    return nn.parallel.DistributedDataParallel(model)


def train(config: Config) -> None:
    check_options(config)
    initial = encoders.read_start(config)
    folder = harness.run_folder("densesiam-segment", config)
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
        lr = config.lr * config.batch / 256

        torch.manual_seed(config.seed)
        model = Segmenter(config, len(classes), initial)
        if device.type == "cuda":
            model = timm.layers.convert_sync_batchnorm(model)
        encoder: Any = model.encoder
        encoders.freeze(encoder.network, config.freeze)
        model.to(device, memory_format=torch.channels_last)
        has_region = config.region > 0
        with_region = False
        ddp = spread(model, with_region)

        optimizer = torch.optim.SGD(
            model.parameters(), lr, momentum=0.9, weight_decay=config.weight_decay
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
        # The health is measured on six images of the main process.
        preview_batch = min(6 * world.size, config.batch)
        preview = next(batches(preview_batch, start=0, stop=1))
        monitor = health.Monitor(encoder, preview[0], run)
        if step == 0:
            run.log(step, **monitor.measure_all())
            evaluate(model, val, run, step)

        facts = {**initial.side_car(), "method": "densesiam-segment", "classes": classes}
        kept = harness.kept_epochs(config, steps_per_epoch)

        training_batches = batches(config.batch, start=step, stop=steps)
        bar = harness.progress(training_batches, start=step, stop=steps, world=world)
        for images, view, _, unreadable in bar:
            has_begun = has_region and step >= config.region_start * steps
            if has_begun and not with_region:
                with_region = True
                ddp = spread(model, with_region)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, terms = ddp(images, view, with_region)

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
                harness.show(bar, values, ("dense", "segment", "region"))
                run.log(step, **values, **monitor.measure(), lr=lr, unreadable=run.unreadable)
                monitor.warn(step)

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
            harness.save_encoder(folder / "segmenter.safetensors", model, **facts, step=step)
            for row in run.rows("miou"):  # at step 0 the weights are random
                harness.tell(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
