"""SoCo pre-training: a region predicts itself in another view, without negatives (2021).

    python recipes/soco.py                     # the demo: minutes on a CPU
    python recipes/soco.py --data FOLDER       # the demo's model on your images
    torchrun --nproc-per-node 8 -- recipes/soco.py --preset paper --data imagenet/train

Run the same command again to resume. Before a run with --data, run proposals.py with the same
--data. `--preset aug` has D3SSL's augmentations in place of SoCo's (its Table 6).
Logged values, deviations from the paper, time and results: docs/recipes/soco.md.
"""

import argparse
import copy
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Views:
    size: int = 224  # Side of views 1 and 2, in pixels: a multiple of 32, of 16 for tiny.
    scale: tuple[float, float] = (0.5, 1.0)  # Share of the image's area that view 2 covers.
    hue: float = 0.1  # Strength of the hue jitter; 0.5 allows every hue.
    blur: tuple[float, float] = (0.1, 2.0)  # Standard deviation of the blur, in pixels.


@dataclass(frozen=True)
class Config:
    # Set of defaults; each option below overrides one of them.
    preset: Literal["demo", "paper", "aug"] = "demo"
    data: Path | None = None  # Folder of images, also in its subfolders; the demo can run without.
    proposals: Path | None = None  # File of proposals; by default DATA.proposals.npz.
    # How often an object of the demo's scenes stands beside its partner: see `dk.sample_scenes`.
    co_occurrence: float = 0.0
    run: Path | None = None  # Run folder; by default runs/soco-PRESET[-NAME OF DATA].
    arch: str = "resnet50"  # A ResNet of timm, or "tiny" (64 channels, stride 8).
    # Weights to start from: timm:NAME, torchvision:NAME, lite0, a file, a run folder; without them
    # the network is random.
    weights: str | None = None
    freeze: int = 0  # Keep the stem and this many stages, or blocks of a ViT, as they start.
    regions: int = 4  # Proposals K per image and step, of those inside view 2.
    soco_cutout: tuple[float, float] = (0.1, 0.3)  # SoCo's cutout: share of its area; 0 0: none.
    soco_jitter: float = 0.1  # SoCo's box jitter: share of its sides; 0: none.
    cut: tuple[float, float] = (0, 0)  # D3SSL's PRC: share of a proposal to cut out; 0 0: nothing.
    mask: tuple[float, float] = (0, 0)  # PRM: mask beside it, share of its area; 0 0: none.
    jitter: tuple[float, float] = (1, 1)  # RBJ: shares of its sides that stay; 1 1: no jitter.
    view3: float = 1.0  # Weight of view 3, which has half the size; 0 leaves it out.
    bins: int = 14  # Bins of RoIAlign along each axis; half as many in view 3.
    head: tuple[int, int] = (4096, 256)  # Widths of projector and predictor: hidden, outputs.
    momentum: float = 0.99  # Momentum of the target network at the start; it rises to 1.
    batch: int = 2048  # Images per step, over all processes.
    epochs: int = 100  # Passes over the images.
    optimizer: Literal["lars", "sgd"] = "lars"  # sgd is for batches of some hundred images or less.
    lr: float = 1.0  # Learning rate for a batch of 256; it is scaled with the batch.
    warmup: float = 10.0  # Epochs in which the learning rate rises.
    weight_decay: float = 1e-5  # Weight decay; biases and normalizations have none.
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
    views: Views = field(default_factory=Views)  # The views of each image.


PRESETS = {
    "demo": Config(
        arch="tiny", bins=6, head=(256, 64), batch=40, epochs=8, optimizer="sgd", lr=0.8,
        warmup=1.0, weight_decay=1e-4, workers=1, precision="fp32", save_every=204,
        views=Views(size=64, hue=0.5, blur=(0.1, 1.0)),
    ),
    "paper": Config("paper"),  # the defaults of Config
    # The second row of D3SSL's Table 6.
    "aug": Config(
        "aug", epochs=200, soco_cutout=(0, 0), soco_jitter=0.0, cut=(0.2, 0.5), mask=(0.2, 0.6),
        jitter=(0.8, 1.0),
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
from d3ssl import (
    BESIDE,
    CUT,
    JITTER,
    SOCO_CUTOUT,
    SOCO_JITTER,
    Input,
    check_region_options,
    check_regions,
    cut_masks,
    draw_boxes,
    draw_layers,
    fill_places,
    measure_layers,
    soco_jitter,
    soco_masks,
)
from downstream import colors, encoders, health, scene_probe
from downstream.crops import as_bytes, as_picture, crop_bytes
from einops import rearrange
from proposals import default_path, image_source
from timm.optim import Lars
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms
from torchvision.utils import save_image
import densekit as dk


def check_options(config: Config) -> None:
    """Raise a UserError of one sentence for a wrong option, before any data is read."""
    harness.check_training(config)
    check_region_options(config)
    harness.check_finite("--view3", config.view3)
    harness.check_finite("--warmup", config.warmup)


# ==== views =======================================================================================
def photometric(
    view_config: Views, *, blur_probability: float, solarize_probability: float
) -> transforms.Compose:
    """BYOL's random changes of a crop's colors and sharpness."""
    jitter = colors.ColorJitter(0.4, 0.4, 0.2, view_config.hue)
    blur = colors.RandomBlur(view_config.blur)

    return transforms.Compose(
        [
            as_picture,  # PIL is the quickest on a CPU, and SoCo blurs with it
            transforms.RandomApply([jitter], p=0.8),
            colors.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=blur_probability),
            transforms.RandomSolarize(128, p=solarize_probability),
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
        self.photometric = [  # one for each view, as in BYOL
            photometric(config.views, blur_probability=1.0, solarize_probability=0.0),
            photometric(config.views, blur_probability=0.1, solarize_probability=0.2),
        ]

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
            augments_and_crops = zip(self.photometric, crops, strict=True)
            augmented = tuple(augment(crop) for augment, crop in augments_and_crops)
        return augmented, views, boxes, valid, torch.tensor(index), list(unreadable)


def draw(seeds: Tensor, count: int, config: Config) -> dict[int, Tensor]:
    """Uniform numbers for each image: for `count` proposals in several views."""
    shapes = {CUT: (2, count, 3), BESIDE: (2, count, 3), JITTER: (3, count, 4)}
    if any(config.soco_cutout):
        shapes[SOCO_CUTOUT] = (2, count, 4)
    if config.soco_jitter:
        shapes[SOCO_JITTER] = (1, count, 5)
    return harness.noises(seeds, shapes)


def augment(
    images: list[Tensor],
    views: list[dk.View],
    boxes: Tensor,
    valid: Tensor,
    seeds: Tensor,
    config: Config,
) -> list[Input]:
    """View 1, view 2 and the small view 3, each with its boxes.

    What is drawn for an image follows from its seed. The views are on the second axis of tensors
    (b, v, K, 4), so that each function is called once for all of them.
    """
    images1, images2 = images
    side = images1.shape[-1]
    half = side // 2
    images3 = nn.functional.avg_pool2d(images2, 2)
    in_views = dk.boxes_in_view(dk.stack_views(views), torch.stack([boxes, boxes]))
    boxes1, boxes2 = in_views.boxes * side
    boxes3 = boxes2 / 2
    noises = draw(seeds, boxes.shape[1], config)

    # D3SSL's cuts (PRC) and masks (PRM) are in views 1 and 3, and view 2 is without them (its Eq
    # 2). View 3 lies in a corner of its mask, whose other pixels nobody uses.
    changed = torch.stack([boxes1, boxes3], 1)
    used = valid[:, None].expand(changed.shape[:-1])
    cut = cut_masks(changed, side, used, noises, config)
    beside = dk.sample_surrounding_boxes(changed, ratio=config.mask, noise=noises[BESIDE])
    covered1, covered3 = (cut | dk.boxes_to_mask(beside, (side, side), used)).unbind(1)

    # SoCo's cutout is in views 2 and 3. They are covered with 0, which is the mean of the data.
    if any(config.soco_cutout):
        cropped = torch.stack([boxes2, boxes3], 1)
        soco2, soco3 = soco_masks(cropped, side, used, noises, config).unbind(1)
        images2 = dk.fill_mask(images2, soco2)
        covered3 = covered3 | soco3
    images1 = dk.fill_mask(images1, covered1)
    images3 = dk.fill_mask(images3, covered3[:, :half, :half])

    # SoCo jitters the boxes of view 1; D3SSL's jitter (RBJ) is in each view.
    if config.soco_jitter:
        boxes1 = soco_jitter(boxes1[:, None], side, noises, config).squeeze(1)
    all_boxes = torch.stack([boxes1, boxes2, boxes2], 1)
    inner = dk.sample_inner_boxes(all_boxes, scale=config.jitter, noise=noises[JITTER]) / side
    inner1, inner2, inner3 = inner.unbind(1)
    return [
        Input(images1, inner1, valid),
        Input(images2, inner2, valid),
        Input(images3, inner3, valid),
    ]


# ==== model =======================================================================================
def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """BYOL's projector and predictor."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


def embed(network: Any, view: Input, bins: int, predictor: nn.Module | None = None) -> Tensor:
    """The projection or prediction of each region, (b, K, d); only valid ones have a meaning."""
    encoder = network["encoder"]
    (c4,) = encoder.forward_intermediates(
        view.images, indices=[3], stop_early=True, intermediates_only=True
    )
    regions = dk.roi_align(c4, view.boxes, bins).features.flatten(0, 1)
    source, place = fill_places(view.valid.flatten())
    c5 = encoder.layer4(regions[source])
    cells = dk.map_to_rows(c5)  # (regions, cells, d)
    rows = cells.mean(1)
    outputs = network["projector"](rows)
    if predictor is not None:
        outputs = predictor(outputs)
    return outputs[place].unflatten(0, view.boxes.shape[:2])


class SoCo(nn.Module):
    """Online network (student) with a predictor, and target network (teacher)."""

    def __init__(self, config: Config, initial: encoders.Start | None = None):
        super().__init__()
        initial = initial or encoders.read_start(config)
        self.mean = initial.mean
        self.std = initial.std
        self.config = config
        hidden, outputs = config.head
        encoder = encoders.build_start(initial)
        projector = mlp(encoder.num_features, hidden, outputs)
        self.student = nn.ModuleDict({"encoder": encoder, "projector": projector})
        self.predictor = mlp(outputs, hidden, outputs)
        self.teacher = copy.deepcopy(self.student)
        self.teacher.requires_grad_(False)

    # ==== loss ====================================================================================
    def forward(
        self,
        images: list[Tensor],
        views: list[dk.View],
        boxes: Tensor,
        valid: Tensor,
        seeds: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, and the terms that are logged.

        The augmentation of the regions of each image follows from its seed.
        """
        config = self.config
        group = torch.distributed.group.WORLD
        view1, view2, small = augment(images, views, boxes, valid, seeds, config)
        prediction1, key1 = self.compare(view1, config.bins)
        prediction2, key2 = self.compare(view2, config.bins)

        # The means are over the valid regions of all processes.
        mean = partial(dk.masked_mean, valid=valid, group=group)
        terms = {
            "view2": mean(pair_losses(prediction1, key1, prediction2, key2)),
            "valid": valid.double().mean(),
        }
        loss = terms["view2"]

        if config.view3:
            prediction3, key3 = self.compare(small, config.bins // 2)
            terms["view3"] = mean(pair_losses(prediction1, key1, prediction3, key3))
            loss = loss + config.view3 * terms["view3"]
        return loss, terms

    def compare(self, view: Input, bins: int) -> tuple[Tensor, Tensor]:
        """The student's prediction and the teacher's projection of each region, (b, K, d) both."""
        prediction = embed(self.student, view, bins, self.predictor)
        with torch.no_grad():
            key = embed(self.teacher, view, bins)
        return prediction, key


def pair_losses(prediction1: Tensor, key1: Tensor, prediction2: Tensor, key2: Tensor) -> Tensor:
    """-2 cos of each region, the sum of both directions, (b, K)."""
    forth = dk.negative_cosine(prediction1, key2, reduction="none")
    back = dk.negative_cosine(prediction2, key1, reduction="none")
    return 2 * (forth + back)


# ==== evaluation ==================================================================================
@torch.no_grad()
def evaluate(
    model: SoCo, source, preview: tuple, config: Config, run: harness.Run, step: int
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


def draw_inputs(model: SoCo, preview: tuple, config: Config, path: Path) -> None:
    """A row per image: view 1, view 2 and the small view 3, with their boxes."""
    images, views, boxes, valid, indices, _ = preview
    seeds = harness.image_seeds(config.seed, 0, indices)  # the same augmentations each time
    inputs = augment(images, views, boxes, valid, seeds, config)
    panels = [draw_boxes(view, model) for view in inputs]
    save_image(rearrange(panels, "p b c h w -> (b p) c h w"), path, nrow=len(panels))


def method_of(config: Config) -> str:
    """The name of the method that these options make."""
    has_d3ssl = any(config.cut) or any(config.mask) or config.jitter[0] < 1
    return "soco-aug" if has_d3ssl else "soco"


# ==== loop ========================================================================================
def build_optimizer(
    parameters: list[nn.Parameter], peak_lr: float, config: Config
) -> torch.optim.Optimizer:
    """LARS, or SGD; biases and normalizations have neither weight decay nor LARS's adaptation."""
    decayed = [x for x in parameters if x.ndim >= 2]
    not_decayed = [x for x in parameters if x.ndim < 2]
    if config.optimizer == "lars":
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay, "always_adapt": True},
            {"params": not_decayed, "weight_decay": 0.0},
        ]
        return Lars(groups, peak_lr, momentum=0.9)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, peak_lr, momentum=0.9)


def train(config: Config) -> None:
    check_options(config)
    initial = encoders.read_start(config)
    folder = harness.run_folder("soco", config)
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
        steps_per_epoch = harness.batches_per_epoch(len(source), config.batch, world)
        steps = config.epochs * steps_per_epoch
        peak_lr = config.lr * config.batch / 256
        warmup_steps = min(config.warmup, config.epochs) * steps_per_epoch

        torch.manual_seed(config.seed)
        model = SoCo(config, initial)
        if device.type == "cuda":
            timm.layers.convert_sync_batchnorm(model)  # in place
        encoders.freeze(model.student["encoder"], config.freeze)
        encoders.freeze(model.teacher["encoder"], config.freeze)
        model.to(device, memory_format=torch.channels_last)
        model.compile(disable=not config.compile)
        ddp = nn.parallel.DistributedDataParallel(model)

        parameters = [*model.student.parameters(), *model.predictor.parameters()]
        optimizer = build_optimizer(parameters, peak_lr, config)
        step = run.resume(model, optimizer)

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
            lr = dk.warmup_cosine(step, steps, peak=peak_lr, warmup=warmup_steps)
            for parameter_group in optimizer.param_groups:
                parameter_group.update(lr=lr)
            # The target network keeps batch statistics of its own.
            momentum = dk.cosine_schedule(step, steps, start=config.momentum, end=1.0)
            dk.ema_update(model.teacher, model.student, momentum=momentum, buffers="keep")

            # For the augmentation of the regions.
            seeds = harness.image_seeds(config.seed, step, indices)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, terms = ddp(images, views, boxes, valid, seeds)

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
                harness.show(bar, values, ("view2", "view3"))
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
                )
            if stop:
                return

        if world.is_main:
            measures = "coupling {coupling_rate_layer4:.3f}, cosine {mean_cosine_layer4:.3f}"
            harness.print_probes(run, f"; C5: {measures}")
