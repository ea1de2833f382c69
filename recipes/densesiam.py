"""DenseSiam pre-training: pixels and regions of two views agree, by location (ECCV 2022).

    python recipes/densesiam.py                 # the demo: CPU, minutes; --data FOLDER: your images
    torchrun --nproc-per-node 8 -- recipes/densesiam.py --preset paper --data coco/train2017

The same command run again resumes. `--preset simsiam` is the baseline: both dense weights are 0.
Logged values, deviations from the paper, time and results: docs/recipes/densesiam.md.
"""

import argparse
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Views:
    size: int = 224  # Side of the square views, in pixels.
    scale: tuple[float, float] = (0.2, 1.0)  # Share of the image's area that a view covers.
    hue: float = 0.1  # Strength of the hue jitter; 0.5 goes all around.
    blur: tuple[float, float] = (0.1, 2.0)  # Standard deviation of the blur, in pixels.


@dataclass(frozen=True)
class Loss:
    dense: float = 1.0  # Weight of PixSim.
    region: float = 0.1  # Weight of RegionSim.
    region_start: float = 0.5  # Share of the training after which RegionSim begins.
    grid: int = 7  # PixSim compares grid x grid points of the region that both views share.
    distance: Literal["cross_entropy_similarity", "negative_cosine"] = "cross_entropy_similarity"
    temperature: float = 0.1  # Of RegionSim's InfoNCE.


@dataclass(frozen=True)
class Config:
    preset: Literal["demo", "paper", "simsiam"] = "demo"  # Where the defaults come from.
    data: Path | None = None  # Folder of images, any tree; the demo also runs without.
    run: Path | None = None  # Run folder; else runs/densesiam-PRESET, with the data's name.
    arch: str = "resnet50"  # A ResNet of timm, or "tiny" (64 channels, stride 8).
    hidden: int = 2048  # Width of the global projector; its predictor narrows to a quarter.
    categories: int = 512  # Channels of PixSim: its pseudo-categories, the regions of RegionSim.
    batch: int = 512  # Images a step, over all processes.
    epochs: int = 800  # 800 for COCO, 200 for ImageNet.
    lr: float = 0.05  # For a batch of 256: scaled with the batch.
    weight_decay: float = 1e-4
    seed: int = 0
    workers: int = 8  # Loader processes of each training process.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False  # Compile the model with torch.compile.
    log_every: int = 20  # Steps between two rows of the log.
    save_every: int = 1000  # Steps between two checkpoints, each with its probe and pictures.
    views: Views = field(default_factory=Views)
    loss: Loss = field(default_factory=Loss)


PRESETS = {
    "demo": Config(
        arch="tiny", hidden=256, categories=64, batch=40, epochs=12, lr=0.8, workers=1,
        precision="fp32", save_every=204, views=Views(size=48, hue=0.5, blur=(0.1, 1.0)),
    ),
    "paper": Config("paper"),
    "simsiam": Config("simsiam", loss=Loss(dense=0.0, region=0.0)),
}  # fmt: skip


if __name__ == "__main__":  # the arguments before torch: --help answers at once
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=list(PRESETS), default="demo")
    default = PRESETS[first.parse_known_args()[0].preset]
    CONFIG = tyro.cli(Config, default=default, description=__doc__)

import harness
import timm
import torch
from PIL.ImageFilter import GaussianBlur
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms
from torchvision.utils import save_image
from tqdm import tqdm
import densekit as dk


# ==== views =======================================================================================
class TwoViews:
    """Two augmented crops of each image, and the views they are."""

    def __init__(self, source, config: Config):
        self.source, self.seed, self.config, self.epoch = source, config.seed, config.views, 0
        jitter = transforms.ColorJitter(0.4, 0.4, 0.4, config.views.hue)
        std = torch.distributions.Uniform(*map(torch.tensor, config.views.blur))
        self.photometric = transforms.Compose([
            transforms.ToPILImage(),  # the quickest on a CPU, and the blur of SimSiam
            transforms.RandomApply([jitter], p=0.8), transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([lambda x: x.filter(GaussianBlur(float(std.sample())))], p=0.5),
            transforms.ToImage(), transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(MEAN, STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: list[int]):
        images, unreadable = zip(*(self.source[i] for i in indices), strict=True)
        key, sizes = (self.seed, self.epoch, indices[0]), [image.shape[-2:] for image in images]
        scale, generator = self.config.scale, harness.generator(*key)
        *views, _ = dk.sample_view_pairs(torch.tensor(sizes), scale=scale, generator=generator)
        pixels = [image / 255 for image in images]
        crops = [dk.crop_views(pixels, view, self.config.size) for view in views]
        with harness.seeded(*key, 1):  # other numbers than the views have
            crops = [torch.stack([*map(self.photometric, crop)]) for crop in crops]
        return crops, views, [name for names in unreadable for name in names]


# ==== model =======================================================================================
def build_encoder(arch: str) -> nn.Module:
    """A network that returns its last feature map; a ResNet's weights have torchvision's names."""
    small = {"layers": (1,) * 4, "channels": (16, 32, 64, 64), "stem_type": "deep", "stem_width": 8}
    tiny = ("resnet18", {**small, "output_stride": 8})
    name, options = tiny if arch == "tiny" else (arch, {})
    if "resn" not in name or not timm.is_model(name):
        raise harness.UserError(f"There is no ResNet {arch} in timm: try resnet50, or tiny.")
    return timm.create_model(name, num_classes=0, global_pool="", **options)


CELLS, VECTORS = (partial(nn.Conv2d, kernel_size=1), nn.BatchNorm2d), (nn.Linear, nn.BatchNorm1d)


def head(kind: tuple, *widths: int, projector: bool) -> nn.Module:  # a projector ends in BN
    (layer, norm), modules = kind, []
    for d, out in pairwise(widths[:-1]):
        modules += [layer(d, out, bias=False), norm(out), nn.ReLU(inplace=True)]
    modules.append(layer(*widths[-2:], bias=not projector))
    return nn.Sequential(*modules, *([norm(widths[-1], affine=False)] if projector else []))


class DenseSiam(nn.Module):
    """Encoder f with global, dense (g, h) and region (g', h') projectors and predictors (Fig 2)."""

    def __init__(self, config: Config):
        super().__init__()
        self.loss, wide, dense = config.loss, config.hidden, config.categories
        self.encoder = build_encoder(config.arch)
        d = self.encoder.num_features
        self.projector = head(VECTORS, d, wide, wide, wide, projector=True)
        self.predictor = head(VECTORS, wide, wide // 4, wide, projector=False)
        if self.loss.dense or self.loss.region:
            self.dense_projector = head(CELLS, d, dense, dense, dense, projector=True)
            self.dense_predictor = head(CELLS, dense, dense, dense, projector=False)
        if self.loss.region:
            self.region_projector = head(VECTORS, d, dense, dense, dense, projector=True)
            self.region_predictor = head(VECTORS, dense, dense, dense, projector=False)

    # ==== loss ====================================================================================
    def forward(self, images: list[Tensor], views: list[dk.View], with_region: bool):
        maps = [self.encoder(x) for x in images]
        z = [self.projector(f.mean((-2, -1))) for f in maps]  # of the whole views (Table 4e)
        p = [self.predictor(x) for x in z]
        loss = dk.symmetric_loss(dk.negative_cosine, p, z)
        spread = dk.l2_normalize(z[0].detach()).std(0).mean() * z[0].shape[1] ** 0.5
        terms = {"sim": loss, "spread": spread}  # a spread near 0 is collapse, near 1 is none
        if self.loss.dense or self.loss.region:
            pairs = dk.grid_pairs(*views, self.loss.grid)
            points, valid = (pairs.points1, pairs.points2), pairs.valid[:, None]
            z = [self.dense_projector(f) for f in maps]
            p = [self.dense_predictor(x) for x in z]  # project, predict, then sample (Table 4d)
            z, p = ([*map(dk.gridsample, x, points)] for x in (z, p))
            distance = getattr(dk, self.loss.distance)
            terms.update(
                dense=dk.symmetric_loss(distance, p, z, valid), overlap=valid.float().mean()
            )
            loss = loss + self.loss.dense * terms["dense"]
            if with_region:
                # Eq 4 is linear in f: the first layer of g' before the sum gives the same for less.
                f = [self.region_projector[0](x) for x in map(dk.gridsample, maps, points)]
                e = [dk.pool_masks(x, masks.softmax(-1)) for x, masks in zip(f, z, strict=True)]
                v = [self.region_projector[1:](x.flatten(0, 1)) for x in e]
                u = [self.region_predictor(x) for x in v]
                v, u = ([x.unflatten(0, e[0].shape[:2]) for x in y] for y in (v, u))
                info_nce = partial(dk.info_nce, valid=valid, temperature=self.loss.temperature)
                terms["region"] = dk.symmetric_loss(info_nce, u, v)
                loss = loss + self.loss.region * terms["region"]
        return loss, terms


# ==== evaluation ==================================================================================
@torch.no_grad()
def evaluate(model: DenseSiam, preview: tuple, config: Config, run: harness.Run, step: int) -> None:
    """Draw views with matched points, pseudo-categories and PCA; on scenes, probe the encoder."""
    model.eval()
    pixels, pairs = torch.cat(preview[0]), dk.grid_pairs(*preview[1], model.loss.grid)
    maps, palette = model.encoder(pixels), torch.rand(2**14, 3, generator=harness.generator(0))
    panels = [pixels.cpu() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)]
    if model.loss.dense:
        panels += [palette[model.dense_projector(maps).argmax(1).cpu()].movedim(-1, 1)]
    panels += [dk.pca_colors(maps).cpu()]
    tiles = torch.stack([nn.functional.interpolate(x.clamp(0, 1), 224) for x in panels], 1)
    points = (torch.cat(pairs[1:3]) * 224).int().where(pairs.valid.repeat(2)[:, None, None], 999)
    for tile, places in zip(tiles[:, 0], points.tolist(), strict=True):
        for (x, y), color in zip(places, palette, strict=False):
            tile[:, max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4] = color[:, None, None]
    (path := run.folder / f"pictures/step-{step:06d}.png").parent.mkdir(exist_ok=True)
    save_image(
        tiles.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 2), path, nrow=2 * len(panels)
    )
    if config.data is None:
        normalize = transforms.Normalize(MEAN, STD)
        score = dk.probe_scenes(lambda x: model.encoder(normalize(x).to(pixels.device)))
        run.log(step, probe_miou=score.miou, prior_miou=score.prior_miou)
    model.train()


# ==== loop ========================================================================================
def train(config: Config) -> None:
    name = "-".join([config.preset, *([config.data.resolve().name] if config.data else [])])
    folder = config.run or Path("runs", f"densesiam-{name}")
    with harness.process_group(config.device) as world, harness.Run(folder, config, world) as run:
        source = harness.image_source(config.data, scenes=4096 if config.preset == "demo" else 0)
        device = world.device
        steps = config.epochs * harness.batches_per_epoch(len(source), config.batch, world)
        lr = config.lr * config.batch / 256

        torch.manual_seed(config.seed)
        model = DenseSiam(config)
        model = timm.layers.convert_sync_batchnorm(model) if device.type == "cuda" else model
        model.to(device, memory_format=torch.channels_last).compile(disable=not config.compile)
        late = config.loss.region > 0  # no gradient, and no weight decay, before RegionSim begins
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=late)
        groups = [{"params": []}, {"params": []}]  # the learning rate of the predictors stays
        for name, parameter in model.named_parameters():
            groups["predictor" in name]["params"].append(parameter)
        optimizer = torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=config.weight_decay)
        step = run.resume(model, optimizer)
        options = {"world": world, "seed": config.seed, "workers": config.workers}
        batches = partial(harness.batches, TwoViews(source, config), **options)
        preview = next(batches(min(6 * world.size, config.batch), start=0, stop=1))
        if step == 0 and world.is_main:
            evaluate(model, preview, config, run, step)
        images_and_views = batches(config.batch, start=step, stop=steps)
        bar = tqdm(
            images_and_views, total=steps, initial=step, disable=not world.is_main, unit="step"
        )
        for images, views, unreadable in bar:
            now = optimizer.param_groups[0]["lr"] = dk.cosine_schedule(step, steps, start=lr)
            with_region = late and step >= config.loss.region_start * steps
            with torch.autocast(device.type, torch.bfloat16, config.precision == "bf16"):
                loss, terms = ddp(images, views, with_region)
            optimizer.zero_grad()
            loss.backward()
            slope = nn.utils.clip_grad_norm_(model.parameters(), torch.inf)  # only measured
            values = run.reduce(
                step, {"loss": loss, "grad_norm": slope, **terms}
            )  # ends if not finite
            optimizer.step()
            step += 1
            run.note_unreadable(unreadable)
            bar.set_postfix(values, refresh=False)
            if step % config.log_every == 0:
                run.log(step, **values, lr=now, unreadable=run.unreadable)
            due, stop = step % config.save_every == 0 or step == steps, run.stop_requested()
            if due and world.is_main:
                evaluate(model, preview, config, run, step)
            if due or stop:
                run.save(step, model, optimizer)
            if stop:
                return
        if world.is_main:
            harness.save_encoder(
                folder / "encoder.safetensors", model.encoder, architecture=config.arch, mean=MEAN,
                std=STD, method="densesiam" if config.loss.dense else "simsiam", step=step,
            )  # fmt: skip
            line = "step {step:4} (0: random): probe mIoU {probe_miou:.3f}, prior {prior_miou:.3f}"
            print(*(line.format(**row) for row in run.rows("probe_miou")), sep="\n")


if __name__ == "__main__":
    harness.main(train, CONFIG)  # pyright: ignore[reportPossiblyUnboundVariable]
