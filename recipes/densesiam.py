"""DenseSiam pre-training: pixels and regions of two views agree, by location (ECCV 2022).

    python recipes/densesiam.py                 # the demo: minutes on a CPU
    python recipes/densesiam.py --data FOLDER   # the demo's model on your images
    torchrun --nproc-per-node 8 -- recipes/densesiam.py --preset paper --data coco/train2017

Run the same command again to resume. `--preset simsiam` is the baseline, without the dense
losses.
Logged values, deviations from the paper, time and results: docs/recipes/densesiam.md.
"""

import argparse
import math
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Views:
    size: int = 224  # Side of the square views, in pixels.
    scale: tuple[float, float] = (0.2, 1.0)  # Share of the image's area that a view covers.
    hue: float = 0.1  # Strength of the hue jitter; 0.5 allows every hue.
    blur: tuple[float, float] = (0.1, 2.0)  # Standard deviation of the blur, in pixels.


@dataclass(frozen=True)
class Loss:
    dense: float = 1.0  # Weight of PixSim.
    region: float = 0.1  # Weight of RegionSim.
    region_start: float = 0.5  # Share of the training after which RegionSim begins.
    grid: int = 7  # PixSim compares grid x grid points of the region that both views share.
    distance: Literal["cross_entropy_similarity", "negative_cosine"] = "cross_entropy_similarity"
    temperature: float = 0.1  # Temperature of RegionSim's InfoNCE.


@dataclass(frozen=True)
class Config:
    # Set of defaults; each option below overrides one of them.
    preset: Literal["demo", "paper", "simsiam"] = "demo"
    data: Path | None = None  # Folder of images, also in its subfolders; the demo can run without.
    run: Path | None = None  # Run folder; by default runs/densesiam-PRESET[-NAME OF DATA].
    arch: str = "resnet50"  # A ResNet of timm, or "tiny" (64 channels, stride 8).
    hidden: int = 2048  # Width of the global projector; its predictor narrows to a quarter.
    categories: int = 512  # Channels of PixSim: its pseudo-categories, the regions of RegionSim.
    batch: int = 512  # Images per step, over all processes.
    epochs: int = 800  # The paper trains 800 epochs on COCO and 200 on ImageNet.
    lr: float = 0.05  # Learning rate for a batch of 256; it is scaled with the batch.
    weight_decay: float = 1e-4
    seed: int = 0
    workers: int = 8  # Loader processes of each training process.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False  # Compile the model with torch.compile.
    log_every: int = 20  # Steps between two rows of the log.
    save_every: int = 1000  # Steps between two checkpoints, each with a picture and a probe.
    views: Views = field(default_factory=Views)
    loss: Loss = field(default_factory=Loss)


PRESETS = {
    "demo": Config(
        arch="tiny", hidden=256, categories=64, batch=40, epochs=12, lr=0.8, workers=1,
        precision="fp32", save_every=204, views=Views(size=48, hue=0.5, blur=(0.1, 1.0)),
    ),
    "paper": Config("paper"),  # the defaults of Config
    "simsiam": Config("simsiam", loss=Loss(dense=0.0, region=0.0)),
}  # fmt: skip


def read_options() -> Config:
    """Read the command line. The preset is read first, because it sets the other defaults."""
    # This parser reads --preset alone. tyro answers --help, and reads all the rest.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=list(PRESETS), default="demo")
    preset = parser.parse_known_args()[0].preset
    return tyro.cli(Config, default=PRESETS[preset], description=__doc__)


if __name__ == "__main__":
    # The options are read before torch is imported, so that --help answers at once.
    # `import densesiam` runs this file a second time, as a module, and that time also the part
    # below. The script itself ends at sys.exit.
    config = read_options()
    import densesiam
    import harness

    sys.exit(harness.main(densesiam.train, config))

import harness
import timm
import torch
from einops import rearrange
from PIL.ImageFilter import GaussianBlur
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms
from torchvision.utils import save_image
import densekit as dk


def check_options(config: Config) -> None:
    """Raise a UserError of one sentence for a wrong option, before any data is read."""
    harness.check_training(config)
    decay = config.weight_decay
    harness.check(
        0 <= decay < math.inf, f"--weight-decay is {decay}: give a finite number, 0 or more."
    )
    named_resnet = "resn" in config.arch  # such as resnet50, resnext50_32x4d, resnest50d
    harness.check(
        config.arch == "tiny" or (named_resnet and timm.is_model(config.arch)),
        f"--arch is {config.arch}: give a ResNet of timm, such as resnet50, or tiny.",
    )
    harness.check(
        config.hidden >= 4,
        f"--hidden is {config.hidden}: give 4 or more, since the predictor narrows to a quarter.",
    )
    categories = config.categories
    harness.check(categories >= 2, f"--categories is {categories}: give 2 or more.")

    loss = config.loss
    harness.check(
        0 <= loss.dense < math.inf,
        f"--loss.dense is {loss.dense}: give a finite number, 0 or more.",
    )
    harness.check(
        0 <= loss.region < math.inf,
        f"--loss.region is {loss.region}: give a finite number, 0 or more.",
    )
    harness.check(
        0 <= loss.region_start <= 1,
        f"--loss.region-start is {loss.region_start}: give a share from 0 to 1.",
    )
    harness.check(loss.grid >= 1, f"--loss.grid is {loss.grid}: give 1 or more.")
    harness.check(
        0 < loss.temperature < math.inf,
        f"--loss.temperature is {loss.temperature}: give a finite number above 0.",
    )


# ==== views =======================================================================================
def photometric(view_config: Views) -> transforms.Compose:
    """SimSiam's random changes of a crop's colors and sharpness, and the normalization."""
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, view_config.hue)
    sigma = torch.distributions.Uniform(*view_config.blur)

    def blur(image):
        return image.filter(GaussianBlur(float(sigma.sample())))

    return transforms.Compose(
        [
            transforms.ToPILImage(),  # PIL is the quickest on a CPU, and SimSiam blurs with it
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=0.5),
            transforms.ToImage(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(MEAN, STD),
        ]
    )


class TwoViews:
    """Batches of images: two augmented crops of each image, and the `View` of each crop.

    `source` is from `harness.image_source`. `dataset[indices]` is the batch of these images: the
    crops, their views, and the files that could not be read.
    """

    def __init__(self, source, config: Config):
        self.source = source
        self.seed = config.seed
        self.view_config = config.views
        self.epoch = 0  # `harness.batches` sets it
        self.photometric = photometric(config.views)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: list[int]):
        images, unreadable = harness.read_batch(self.source, indices)
        # The first index tells this batch from the others of the epoch.
        batch_key = (self.seed, self.epoch, indices[0])

        sizes = torch.tensor([image.shape[-2:] for image in images])
        generator = harness.generator(*batch_key)
        pairs = dk.sample_view_pairs(sizes, scale=self.view_config.scale, generator=generator)
        views = [pairs.view1, pairs.view2]
        if self.epoch == 0:
            dk.check_views(dk.stack_views(views), sizes)

        pixels = [image / 255 for image in images]
        crops = [dk.crop_views(pixels, view, self.view_config.size) for view in views]
        augmented = []
        # The colors need other random numbers than the views.
        with harness.seeded(*batch_key, harness.COLORS):
            for view_crops in crops:
                changed = [self.photometric(crop) for crop in view_crops]
                augmented.append(torch.stack(changed))
        return augmented, views, unreadable


# ==== model =======================================================================================
def build_encoder(arch: str) -> nn.Module:
    """A network that returns its last feature map; a ResNet's weights have torchvision's names."""
    if arch == "tiny":
        return timm.create_model(
            "resnet18",
            layers=(1, 1, 1, 1),
            channels=(16, 32, 64, 64),
            stem_type="deep",
            stem_width=8,
            output_stride=8,
            num_classes=0,
            global_pool="",
        )
    return timm.create_model(arch, num_classes=0, global_pool="")


conv1x1 = partial(nn.Conv2d, kernel_size=1)


def build_projector(layer, norm, inputs: int, width: int) -> nn.Sequential:
    """Three layers. The last normalization has no affine parameters and no ReLU after it."""
    return nn.Sequential(
        layer(inputs, width, bias=False),
        norm(width),
        nn.ReLU(inplace=True),
        layer(width, width, bias=False),
        norm(width),
        nn.ReLU(inplace=True),
        layer(width, width, bias=False),
        norm(width, affine=False),
    )


def build_predictor(layer, norm, width: int, hidden: int) -> nn.Sequential:
    """Two layers, from a projection to a prediction of the other view's projection."""
    return nn.Sequential(
        layer(width, hidden, bias=False),
        norm(hidden),
        nn.ReLU(inplace=True),
        layer(hidden, width),
    )


def sample_maps(maps: list[Tensor], pairs: dk.PairedPoints) -> list[Tensor]:
    """Features of both views at the same points of the image, (b, points, channels) each."""
    return [dk.gridsample(maps[0], pairs.points1), dk.gridsample(maps[1], pairs.points2)]


class DenseSiam(nn.Module):
    """Encoder f with global, dense (g, h) and region (g', h') projectors and predictors (Fig 2)."""

    def __init__(self, config: Config):
        super().__init__()
        self.loss = config.loss
        self.encoder = build_encoder(config.arch)
        channels = self.encoder.num_features
        hidden = config.hidden
        regions = config.categories

        self.projector = build_projector(nn.Linear, nn.BatchNorm1d, channels, hidden)
        self.predictor = build_predictor(nn.Linear, nn.BatchNorm1d, hidden, hidden // 4)
        if self.loss.dense or self.loss.region:
            self.dense_projector = build_projector(conv1x1, nn.BatchNorm2d, channels, regions)
            self.dense_predictor = build_predictor(conv1x1, nn.BatchNorm2d, regions, regions)
        if self.loss.region:
            self.region_projector = build_projector(nn.Linear, nn.BatchNorm1d, channels, regions)
            self.region_predictor = build_predictor(nn.Linear, nn.BatchNorm1d, regions, regions)

    # ==== loss ====================================================================================
    def forward(
        self, images: list[Tensor], views: list[dk.View], with_region: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, and the terms that are logged; `with_region` adds RegionSim."""
        maps = [self.encoder(x) for x in images]
        loss, terms = self.global_loss(maps)
        if not (self.loss.dense or self.loss.region):
            return loss, terms

        pairs = dk.grid_pairs(*views, self.loss.grid)
        terms["dense"], projections = self.dense_loss(maps, pairs)
        terms["overlap"] = pairs.valid.float().mean()  # share of the pairs of views that overlap
        loss = loss + self.loss.dense * terms["dense"]

        if with_region:
            terms["region"] = self.region_loss(maps, projections, pairs)
            loss = loss + self.loss.region * terms["region"]
        return loss, terms

    def global_loss(self, maps: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """SimSiam: negative cosine of the pooled features of the whole views (Table 4e)."""
        projections = [self.projector(x.mean((-2, -1))) for x in maps]
        predictions = [self.predictor(z) for z in projections]
        loss = dk.symmetric_loss(dk.negative_cosine, predictions, projections)

        # A spread near 1 is normal, and a spread near 0 is collapse.
        deviation = dk.l2_normalize(projections[0].detach()).std(0).mean()
        spread = deviation * projections[0].shape[1] ** 0.5
        return loss, {"sim": loss, "spread": spread}

    def dense_loss(self, maps: list[Tensor], pairs: dk.PairedPoints) -> tuple[Tensor, list[Tensor]]:
        """PixSim: the views agree at the same points (Eq 1 and 3). Also returns the projections."""
        projected_maps = [self.dense_projector(x) for x in maps]
        predicted_maps = [self.dense_predictor(x) for x in projected_maps]
        # The maps are sampled last, after the projection and the prediction (Table 4d).
        projections = sample_maps(projected_maps, pairs)
        predictions = sample_maps(predicted_maps, pairs)

        distance = getattr(dk, self.loss.distance)
        return dk.symmetric_loss(distance, predictions, projections, pairs.valid), projections

    def region_loss(
        self, maps: list[Tensor], logits: list[Tensor], pairs: dk.PairedPoints
    ) -> Tensor:
        """RegionSim: InfoNCE of soft regions, whose masks are the softmax of `logits` (Eq 4-6)."""
        # Eq 4 is linear in the features. So the first layer of the projector may act before the
        # sum over the points. The result is the same, and there are fewer points than regions.
        first_layer = self.region_projector[0]
        other_layers = self.region_projector[1:]
        features = [first_layer(x) for x in sample_maps(maps, pairs)]
        masks = [x.softmax(-1) for x in logits]
        regions = [dk.pool_masks(x, mask) for x, mask in zip(features, masks, strict=True)]

        # For the heads and their batch normalization every region of every image is a row.
        shape = regions[0].shape[:2]
        projected_rows = [other_layers(x.flatten(0, 1)) for x in regions]
        predicted_rows = [self.region_predictor(x) for x in projected_rows]
        projections = [x.unflatten(0, shape) for x in projected_rows]
        predictions = [x.unflatten(0, shape) for x in predicted_rows]

        valid = pairs.valid[:, :1]  # the regions of two views are valid if their points are
        temperature = self.loss.temperature
        info_nce = partial(dk.info_nce, valid=valid, temperature=temperature)
        return dk.symmetric_loss(info_nce, predictions, projections)


# ==== evaluation ==================================================================================
PANEL_SIDE = 224  # Side of a panel of the picture, in pixels.


@torch.no_grad()
def evaluate(model: DenseSiam, preview: tuple, config: Config, run: harness.Run, step: int) -> None:
    """Save a picture of the preview's images. Without --data, also probe the encoder."""
    images, views, _ = preview
    model.eval()
    draw(model, images, views, run.picture_path(step))

    if config.data is None:
        normalize = transforms.Normalize(MEAN, STD)
        device = images[0].device

        def features(scenes: Tensor) -> Tensor:
            return model.encoder(normalize(scenes).to(device))

        score = dk.probe_scenes(features)
        run.log(step, probe_miou=score.miou, prior_miou=score.prior_miou)
    model.train()


def draw(model: DenseSiam, images: list[Tensor], views: list[dk.View], path: Path) -> None:
    """A row per image: for each of its views the matched points, pseudo-categories, PCA colors."""
    pixels = torch.cat(images)
    maps = model.encoder(pixels)
    palette = torch.rand(2**14, 3, generator=harness.generator(0))

    panels = [harness.unnormalize(pixels, MEAN, STD)]
    if model.loss.dense:
        categories = model.dense_projector(maps).argmax(1).cpu()
        panels.append(palette[categories].movedim(-1, 1))
    panels.append(dk.pca_colors(maps).cpu())
    tiles = [nn.functional.interpolate(x, PANEL_SIDE) for x in panels]

    pairs = dk.grid_pairs(*views, model.loss.grid)
    points = torch.cat([pairs.points1, pairs.points2])
    valid = pairs.valid.all(1).repeat(2)  # once for each view
    for tile, places, overlap in zip(tiles[0], points, valid, strict=True):
        if overlap:
            mark(tile, places, palette[: len(places)])

    rows = rearrange(tiles, "p (v b) c h w -> (b v p) c h w", v=2)
    save_image(rows, path, nrow=2 * len(panels))


def mark(tile: Tensor, points: Tensor, colors: Tensor) -> None:
    """Mark each point, in [0, 1], by a square of 7 x 7 pixels in its color; the tile changes."""
    places = (points * tile.shape[-1]).int().tolist()
    for (x, y), color in zip(places, colors, strict=True):
        tile[:, max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4] = color[:, None, None]


# ==== loop ========================================================================================
def train(config: Config) -> None:
    check_options(config)
    folder = harness.run_folder("densesiam", config)
    with harness.process_group(config.device) as world, harness.Run(folder, config, world) as run:
        device = world.device
        scenes = 4096 if config.preset == "demo" else 0  # the other presets need --data
        source = harness.image_source(config.data, scenes=scenes)
        dataset = TwoViews(source, config)
        steps_per_epoch = harness.batches_per_epoch(len(source), config.batch, world)
        steps = config.epochs * steps_per_epoch
        peak_lr = config.lr * config.batch / 256

        torch.manual_seed(config.seed)
        model = DenseSiam(config)
        if device.type == "cuda":
            model = timm.layers.convert_sync_batchnorm(model)
        model.to(device, memory_format=torch.channels_last)
        model.compile(disable=not config.compile)
        # The heads of RegionSim have no gradient, and no weight decay, before it begins.
        has_region = config.loss.region > 0
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=has_region)

        predictors = []  # their learning rate stays constant
        others = []
        for name, parameter in model.named_parameters():
            if "predictor" in name:
                predictors.append(parameter)
            else:
                others.append(parameter)
        groups = [{"params": others}, {"params": predictors}]
        optimizer = torch.optim.SGD(groups, peak_lr, momentum=0.9, weight_decay=config.weight_decay)
        step = run.resume(model, optimizer)

        batches = partial(
            harness.batches, dataset, world=world, seed=config.seed, workers=config.workers
        )
        # The pictures show six images of the main process.
        preview_batch = min(6 * world.size, config.batch)
        preview = next(batches(preview_batch, start=0, stop=1))
        if step == 0 and world.is_main:
            evaluate(model, preview, config, run, step)

        training_batches = batches(config.batch, start=step, stop=steps)
        bar = harness.progress(training_batches, start=step, stop=steps, world=world)
        for images, views, unreadable in bar:
            lr = dk.cosine_schedule(step, steps, start=peak_lr)
            optimizer.param_groups[0].update(lr=lr)

            with_region = has_region and step >= config.loss.region_start * steps
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, terms = ddp(images, views, with_region)

            optimizer.zero_grad()
            loss.backward()
            # An infinite norm clips nothing; the gradient norm is only measured.
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
            # The run ends here when a value is not finite, before the weights are touched.
            values = run.reduce(step, {"loss": loss, "grad_norm": grad_norm, **terms})
            optimizer.step()
            step += 1

            run.note_unreadable(unreadable)
            harness.show(bar, values, ("sim", "dense", "region"))
            if step % config.log_every == 0:
                run.log(step, **values, lr=lr, unreadable=run.unreadable)

            due = step % config.save_every == 0 or step == steps
            stop = run.stop_requested()
            if due and world.is_main:
                evaluate(model, preview, config, run, step)
            if due or stop:
                run.save(step, model, optimizer)
            if stop:
                return

        if world.is_main:
            method = "densesiam" if config.loss.dense else "simsiam"
            harness.save_encoder(
                folder / "encoder.safetensors",
                model.encoder,
                architecture=config.arch,
                mean=MEAN,
                std=STD,
                method=method,
                step=step,
            )
            line = (
                "step {step:4}: probe mIoU {probe_miou:.3f}, most frequent class {prior_miou:.3f}"
            )
            if config.data is None:
                print("At step 0 the network is random.")
            for row in run.rows("probe_miou"):
                print(line.format(**row))
