"""DenseSiam's unsupervised semantic segmentation: pseudo-classes on which two views agree.

    python recipes/densesiam_segment.py      # the demo: CPU, minutes; --data SET: labeled images
    torchrun --nproc-per-node 8 -- recipes/densesiam_segment.py --preset paper --data coco

Labels are for the score alone. The same command run again resumes. Logged values, lists, deviations
from the paper (ECCV 2022), time and results: docs/recipes/densesiam_segment.md.
"""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any, Literal

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Config:
    preset: Literal["demo", "paper"] = "demo"  # Where the defaults come from.
    data: Path | None = None  # A labeled image set; the demo also runs without.
    layout: str = "auto"  # Of the data, such as coco-stuff or folder.
    mapping: Path | None = None  # JSON of classes, such as recipes/coco_stuff_27.json.
    train_split: str = "train"
    train_list: Path | None = None  # Text file of the names to train on, one a line; else all.
    val_split: str = "val"  # The split that is scored.
    val_list: Path | None = None  # Text file of the names to score.
    run: Path | None = None  # Run folder; else runs/densesiam-segment-PRESET, with the data's name.
    arch: str = "resnet18"  # A ResNet of timm, or "tiny" (64 channels).
    weights: str | None = None  # FILE, timm:NAME, torchvision:NAME: encoder to start from.
    aux: int = 128  # Pseudo-classes of the auxiliary head.
    weighting: Literal["frequency", "balanced", "plain"] = "frequency"  # Of the classes in L_seg.
    region: float = 0.1  # Weight of L_region.
    region_start: float = 0.8  # Share of the training after which L_region begins.
    image: int = 640  # Side to which the center square of an image is resized first.
    size: int = 320  # Side of both views, in pixels; scored images have it as their short side.
    hue: float = 0.1  # Strength of the hue jitter; 0.5 goes all around.
    blur: tuple[float, float] = (0.1, 2.0)  # Standard deviation of the blur, in pixels.
    frozen_views: bool = False  # One crop and flip of an image for the whole run.
    batch: int = 256  # Images a step, over all processes.
    epochs: int = 10
    lr: float = 0.05  # For a batch of 256: scaled with the batch. Constant.
    weight_decay: float = 1e-4
    seed: int = 0
    workers: int = 8  # Loader processes of each training process.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    log_every: int = 20  # Steps between two rows of the log.
    save_every: int = 200  # Steps between two checkpoints, each with its score and pictures.


PRESETS = {
    "demo": Config(
        arch="tiny", aux=64, image=64, size=96, hue=0.5, blur=(0.1, 1.0), batch=32, lr=0.2,
        workers=1, precision="fp32", save_every=20,
    ),
    "paper": Config("paper"),
}  # fmt: skip


if __name__ == "__main__":  # the arguments before torch: --help answers at once
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=list(PRESETS), default="demo")
    default = PRESETS[first.parse_known_args()[0].preset]
    CONFIG = tyro.cli(Config, default=default, description=__doc__)

import harness
import timm
import torch
from downstream import encoders, image_sets
from downstream.published import row_permuted_group_scores
from PIL.ImageFilter import GaussianBlur
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, grid_sample, interpolate
from torch.utils.data import Subset
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2.functional import resize
from torchvision.utils import save_image
from tqdm import tqdm
import densekit as dk


# ==== data ========================================================================================
def open_split(config: Config, split: str, names: Path | None) -> Any:
    images = image_sets.open_images(config.data, config.layout, split, config.mapping)
    if names is None:
        return Subset(images, range(len(images)))
    rows = {Path(name).name: row for row, name in enumerate(images.names)}
    lines = names.read_text().splitlines() if names.is_file() else []
    listed = [x if x in rows else Path(x).stem for x in map(str.strip, lines) if x]
    if (unknown := [x for x in listed if x not in rows][:1]) or not listed:
        why = unknown or "it is empty or missing"
        raise harness.UserError(f"The list {names} has to name images of {split}: {why}.")
    return Subset(images, [rows[x] for x in listed])


class TwoViews:  # a square crop of each image, the whole square, and what the crop is of it
    def __init__(self, source: Any, config: Config):
        self.source, self.config, self.epoch = source, config, 0
        size, jitter = config.image, transforms.ColorJitter
        self.square = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
        colors = [jitter(0.3), jitter(0, 0.3), jitter(0, 0, 0.3), jitter(0, 0, 0, config.hue)]
        std = torch.distributions.Uniform(*map(torch.tensor, config.blur))
        self.photometric = transforms.Compose([
            transforms.ToPILImage(),  # the quickest on a CPU
            *(transforms.RandomApply([x], p=0.8) for x in colors), transforms.RandomGrayscale(0.2),
            transforms.RandomApply([lambda x: x.filter(GaussianBlur(float(std.sample())))], p=0.5),
            transforms.ToImage(), transforms.ToDtype(torch.float32, scale=True),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: list[int]):
        key = (self.config.seed, 0 if self.config.frozen_views else self.epoch)
        draws = torch.stack([torch.rand(4, generator=harness.generator(*key, i)) for i in indices])
        side = 0.5 + 0.5 * draws[:, :1]
        corner = draws[:, 1:3] * (1 - side)
        view = dk.View(torch.cat([corner, corner + side], 1), draws[:, 3] < 0.5)
        images = torch.stack([self.square(self.source[i].image) for i in indices]) / 255
        near = dk.View(view.box * images.shape[-1], view.flip)
        crops = [dk.crop_views(images, near, self.config.size), resize(images, [self.config.size])]
        with harness.seeded(self.config.seed, self.epoch, indices[0], 1):  # not the view's numbers
            crops = [torch.stack([*map(self.photometric, x)]) for x in crops]
        return crops, view


# ==== model =======================================================================================
def head(*widths: int, projector: bool) -> nn.Module:  # of cells; a projector ends in BN
    modules = [Conv2dNormActivation(d, out, 1) for d, out in pairwise(widths[:-1])]
    modules.append(nn.Conv2d(*widths[-2:], 1, bias=not projector))
    return nn.Sequential(*modules, *([nn.BatchNorm2d(widths[-1], affine=False)] * projector))


def replay(maps: Tensor, view: dk.View) -> Tensor:  # what a view of the unit square shows of it
    grid = 2 * dk.coordinate_map(view, maps.shape[-2:]) - 1  # which grid_sample counts from -1 to 1
    return grid_sample(maps.to(grid.dtype), grid, padding_mode="border", align_corners=False)


def segment_loss(logits: Tensor, weighting: str) -> Tensor:
    labels = logits.argmax(-1)  # of each pixel (n, k) the class that wins
    counts = torch.bincount(labels, minlength=logits.shape[-1])
    weights = {"frequency": counts / len(labels), "plain": torch.ones_like(counts)}
    weights["balanced"] = len(labels) / counts.clamp(min=1) / (counts > 0).sum()
    losses = cross_entropy(logits, labels, reduction="none")
    return (weights[weighting][labels] * losses).mean()


class Segmenter(nn.Module):  # a network with a simplified FPN at stride 4, and the heads (Sec 4)
    def __init__(self, config: Config, classes: int):
        super().__init__()
        self.config, d = config, 128
        encoder = encoders.load_encoder(config.weights or f"random:{config.arch}", seed=config.seed)
        levels = encoder.levels(torch.zeros(1, 3, 64, 64))
        self.encoder = encoder.train().requires_grad_()  # it came frozen
        self.laterals = nn.ModuleList(nn.Conv2d(level.shape[1], d, 1) for level in levels)
        k = {"dense": [classes], "aux": [config.aux], "region": [d] * 3}  # widths
        self.projectors = nn.ModuleDict({x: head(d, *k[x], projector=True) for x in k})
        k = {x: [k[x][-1], d, k[x][-1]] for x in k}
        self.predictors = nn.ModuleDict({x: head(*k[x], projector=False) for x in k})
        self.share = log(config.aux) / (log(classes) + log(config.aux))  # fewer classes weigh more
        self.register_buffer("names", torch.full((classes,), -1))  # the class of each pseudo-class

    def features(self, images: Tensor) -> Tensor:
        maps = [f(x) for f, x in zip(self.laterals, self.encoder.levels(images), strict=True)]
        top = maps.pop()
        for finer in reversed(maps):
            top = finer + interpolate(top, finer.shape[-2:], mode="bilinear")
        return top

    def segment(self, image: Tensor, size: torch.Size) -> Tensor:  # pseudo-classes of its pixels
        maps = self.features(resize(image, [self.config.size])[None])
        return interpolate(self.projectors["dense"](maps), size, mode="bilinear").argmax(1)[0]

    def predict(self, name: str, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        z = [*map(self.projectors[name], maps)]
        p = [*map(self.predictors[name], z)]
        return [x.flatten(2).mT for x in p], [x.flatten(2).mT for x in z]

    def forward(self, images: list[Tensor], view: dk.View, with_region: bool):
        near, whole = map(self.features, images)
        maps, terms = [near, replay(whole, view)], {}
        for name in ("aux", "dense"):
            p, z = self.predict(name, maps)
            terms[name] = dk.symmetric_loss(dk.cross_entropy_similarity, p, z)
        weighting, pairs = self.config.weighting, zip(maps, z, strict=True)
        terms["segment"] = sum(segment_loss(x.flatten(0, 1), weighting) for x in z) / 2
        loss = self.share * terms["dense"] + (1 - self.share) * terms["aux"] + terms["segment"]
        if with_region:
            e = [dk.pool_masks(f.flatten(2).mT, x.softmax(-1)).mT[..., None] for f, x in pairs]
            info_nce = partial(dk.info_nce, temperature=0.1)
            terms["region"] = dk.symmetric_loss(info_nce, *self.predict("region", e))
            loss = loss + self.config.region * terms["region"]
        return loss, terms


# ==== evaluation ==================================================================================
@torch.no_grad()
def match(val: Any, segment: Any, classes: int, run: harness.Run) -> tuple[Any, ...]:
    total, shown = torch.zeros(classes, classes, dtype=torch.long, device=run.world.device), {}
    for index in range(run.world.rank, len(val), run.world.size):
        image, labels, *_, name = val[index]
        if labels is None:
            raise harness.UserError(f"The image {name} has no label map to score with.")
        found = segment(image.to(total.device) / 255, labels.shape)
        total += dk.confusion_matrix(labels.to(total.device), found, classes=classes)
        shown[6 * index // len(val)] = image, labels, found.cpu()
    torch.distributed.all_reduce(total)
    return total, dk.match_clusters(total), shown.values()  # the class of each pseudo-class, images


def evaluate(model: Segmenter, val: Any, things: int, run: harness.Run, step: int) -> None:
    model.eval()
    classes, device = len(model.names), run.world.device
    confusion, names, shown = match(val, model.segment, classes, run)
    model.names.copy_(names)
    merged = dk.merge_clusters(confusion, names)
    row, thing = {"miou": dk.mean_iou(merged)}, torch.arange(classes, device=device) < things
    for name, group in {"things": thing, "stuff": ~thing}.items() if things else ():
        wrong = row_permuted_group_scores(confusion, names, group)
        row |= {f"{name}_miou": dk.group_scores(merged, group).miou, f"{name}_wrong": wrong.miou}
    if step == 0:  # what a segmenter has to beat: k-means on the colors of the same images
        colors = torch.cat([sample.image.flatten(1)[:, ::17].T / 255 for sample in val])
        centers = dk.minibatch_kmeans(colors, classes, generator=harness.generator(0)).to(device)
        nearest = partial(dk.nearest_centroids, centroids=centers)
        of_colors = match(val, lambda x, size: nearest(x.flatten(1).T).view(size), classes, run)
        row["color_miou"] = dk.mean_iou(dk.merge_clusters(*of_colors[:2]))
    run.log(step, **row)
    if run.world.is_main:
        palette, names, tiles = torch.rand(256, 3, generator=harness.generator(0)), names.cpu(), []
        for image, labels, found in shown:
            maps = [palette[x].movedim(-1, 0) for x in (labels, names[found])]
            tiles += [interpolate(x[None], (224, 224)) for x in (image / 255, *maps)]
        (path := run.folder / f"pictures/step-{step:06d}.png").parent.mkdir(exist_ok=True)
        save_image(torch.cat(tiles), path, nrow=3)
    model.train()


# ==== loop ========================================================================================
def train(config: Config) -> None:
    if config.data is None and config.preset != "demo":
        raise harness.UserError("This preset trains on your images: name their folder with --data.")
    name = "-".join([config.preset, *([config.data.resolve().name] if config.data else [])])
    folder = config.run or Path("runs", f"densesiam-segment-{name}")
    with harness.process_group(config.device) as world, harness.Run(folder, config, world) as run:
        dataset = TwoViews(open_split(config, config.train_split, config.train_list), config)
        val = open_split(config, config.val_split, config.val_list)
        things = json.loads(config.mapping.read_text()).get("things", 0) if config.mapping else 0
        steps = config.epochs * harness.batches_per_epoch(len(dataset), config.batch, world)
        torch.manual_seed(config.seed)
        model, device = Segmenter(config, len(val.dataset.classes)), world.device
        model = timm.layers.convert_sync_batchnorm(model) if device.type == "cuda" else model
        model.to(device, memory_format=torch.channels_last)
        # L_region's heads have no gradient, and no weight decay, before it begins.
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        lr, decay = config.lr * config.batch / 256, config.weight_decay
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=decay)
        step = run.resume(model, optimizer)
        if step == 0:
            evaluate(model, val, things, run, step)
        options = {"seed": config.seed, "start": step, "stop": steps, "workers": config.workers}
        batches = harness.batches(dataset, config.batch, world, **options)
        bar = tqdm(batches, total=steps, initial=step, disable=not world.is_main, unit="step")
        for images, view in bar:
            with_region = step >= config.region_start * steps
            with torch.autocast(device.type, torch.bfloat16, config.precision == "bf16"):
                loss, terms = ddp(images, view, with_region)
            optimizer.zero_grad()
            loss.backward()
            values = run.reduce(step, {"loss": loss, **terms})  # ends if not finite
            optimizer.step()
            step += 1
            bar.set_postfix(values, refresh=False)
            if step % config.log_every == 0:
                run.log(step, **values)
            due, stop = step % config.save_every == 0 or step == steps, run.stop_requested()
            if due:
                evaluate(model, val, things, run, step)
            if due or stop:
                run.save(step, model, optimizer)
            if stop:
                return
        if world.is_main:
            encoder: Any = model.encoder
            facts = {"architecture": encoder.architecture, "mean": encoder.mean, "std": encoder.std}
            facts |= {"method": "densesiam-segment", "step": step, "classes": val.dataset.classes}
            harness.save_encoder(folder / "encoder.safetensors", encoder.network, **facts)
            harness.save_encoder(folder / "segmenter.safetensors", model, **facts)
            for row in run.rows("miou"):  # at step 0 the weights are random
                print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))


if __name__ == "__main__":
    harness.main(train, CONFIG)  # pyright: ignore[reportPossiblyUnboundVariable]
