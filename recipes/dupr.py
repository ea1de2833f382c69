"""DUPR pre-training: patches of two views are found again, at several levels (2021).

    python recipes/dupr.py                      # the demo: CPU, minutes; --data FOLDER: your images
    torchrun --nproc-per-node 8 -- recipes/dupr.py --preset paper --data imagenet/train

The same command run again resumes; `mocov2` is the baseline. More: docs/recipes/dupr.md.
"""

import argparse
import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Views:
    size: int = 224  # Side of the square views, in pixels.
    scale: tuple[float, float] = (0.2, 1.0)  # Share of the image's area that a view covers.
    hue: float = 0.1  # Strength of the hue jitter; 0.5 goes all around.
    blur: tuple[float, float] = (0.1, 2.0)  # Standard deviation of the blur, in pixels.


@dataclass(frozen=True)
class Config:
    preset: Literal["demo", "paper", "coco", "mocov2"] = "demo"  # Where the defaults come from.
    data: Path | None = None  # Folder of images, any tree; the demo also runs without.
    run: Path | None = None  # Run folder; else runs/dupr-PRESET, with the data's name.
    arch: str = "resnet50"  # A ResNet of timm, or "tiny" (64 channels, stride 8).
    alpha: tuple[float, float, float, float] = (0.1, 0.4, 0.7, 1.0)  # Image losses, C2 to C5.
    beta: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # Patch losses, C2 to C5.
    patches: tuple[int, int, int, int] = (14, 14, 14, 7)  # S of each level: S x S patches.
    outputs: int = 128  # Of every head.
    bank: int = 65536  # Keys of each level and kind.
    keys: int = 4  # Patches of an image that enter the bank, at each level.
    temperature: float = 0.2
    momentum: float = 0.999  # Of the key encoder and its heads.
    norm: Literal["shuffled", "sync"] = "shuffled"  # Batch statistics of the keys; sync on GPUs.
    batch: int = 256  # Images a step, over all processes.
    epochs: int = 200
    lr: float = 0.06  # For a batch of 256: scaled with the batch.
    weight_decay: float = 1e-4
    seed: int = 0
    workers: int = 8  # Loader processes of each training process.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False  # Compile the model with torch.compile.
    log_every: int = 20  # Steps between two rows of the log.
    save_every: int = 1000  # Steps between two checkpoints, each with its probe and pictures.
    views: Views = field(default_factory=Views)


PRESETS = {
    "demo": Config(
        arch="tiny", patches=(7, 7, 7, 7), outputs=64, bank=512, momentum=0.99, batch=40,
        epochs=10, lr=0.8, workers=1, precision="fp32", save_every=170,
        views=Views(48, hue=0.5, blur=(0.1, 1.0)),
    ),
    "paper": Config("paper"),
    "coco": Config("coco", epochs=2000),
    "mocov2": Config("mocov2", alpha=(0.0, 0.0, 0.0, 1.0), beta=(0.0, 0.0, 0.0, 0.0)),
}  # fmt: skip


if __name__ == "__main__":  # the arguments before torch: --help answers at once
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=list(PRESETS), default="demo")
    default = PRESETS[first.parse_known_args()[0].preset]
    CONFIG = tyro.cli(Config, default=default, description=__doc__)

import harness
import timm
import torch
from matplotlib.figure import Figure
from PIL.ImageFilter import GaussianBlur
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms
from torchvision.utils import save_image
from tqdm import tqdm
import densekit as dk


# ==== views =======================================================================================
class TwoViews:  # two augmented crops of each image, and the views they are
    def __init__(self, source, config: Config):
        self.source, self.seed, self.config, self.epoch = source, config.seed, config.views, 0
        jitter = transforms.ColorJitter(0.4, 0.4, 0.4, config.views.hue)
        std = torch.distributions.Uniform(*map(torch.tensor, config.views.blur))
        self.photometric = transforms.Compose([
            transforms.ToPILImage(),  # the quickest on a CPU, and the blur of MoCo v2
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
        crop = partial(dk.crop_views, [image / 255 for image in images], size=self.config.size)
        crops = [(crop(view) * 255).round().byte() for view in views]
        with harness.seeded(*key, 1):  # other numbers than the views have
            crops = [torch.stack([*map(self.photometric, crop)]) for crop in crops]
        return crops, views, [name for names in unreadable for name in names]


# ==== model =======================================================================================
def build_encoder(arch: str) -> Any:
    """A ResNet without its head; the weights have torchvision's names."""
    small = {"layers": (1,) * 4, "channels": (16, 32, 64, 64), "stem_type": "deep", "stem_width": 8}
    tiny = ("resnet18", {**small, "output_stride": 8})
    name, options = tiny if arch == "tiny" else (arch, {})
    if "resn" not in name or not timm.is_model(name):
        raise harness.UserError(f"There is no ResNet {arch} in timm: try resnet50, or tiny.")
    return timm.create_model(name, num_classes=0, global_pool="", **options)


def levels(encoder: Any, images: Tensor) -> list[Tensor]:  # the maps C2 to C5
    return encoder.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)


class DUPR(nn.Module):  # query (student) and key (teacher): each an encoder f and its heads (Fig 3)
    def __init__(self, config: Config):
        super().__init__()
        self.config, heads, encoder = config, nn.ModuleDict(), build_encoder(config.arch)
        for kind, weights in (("image", config.alpha), ("patch", config.beta)):
            for level, weight in enumerate(weights):
                if weight:
                    d = encoder.feature_info[level + 1]["num_chs"]
                    layers = nn.Linear(d, d), nn.ReLU(inplace=True), nn.Linear(d, config.outputs)
                    heads[f"{kind}{level + 2}"] = nn.Sequential(*layers)  # on rows: conv1x1
        numbers = config.bank, config.outputs, config.keys, config.temperature
        few = [
            x for x, b in zip(config.patches, config.beta, strict=True) if b and x * x < config.keys
        ]
        if few or min(numbers) <= 0 or not (config.alpha[3] or config.beta[3]):
            what = (
                "--bank, --outputs, --temperature: above 0; --keys: 1 to S x S; C5 needs a weight"
            )
            raise harness.UserError(f"{what} in --alpha or --beta.")
        self.student = nn.ModuleDict({"encoder": encoder, "heads": heads})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def init_banks(self, device: torch.device) -> dict[str, dk.Bank]:
        new = partial(dk.init_bank, self.config.bank, self.config.outputs, device=device)
        return {name: new() for name, _ in self.student["heads"].named_children()}

    # ==== loss ====================================================================================
    def forward(self, images: list[Tensor], views: list[dk.View], banks: dict, order: Tensor):
        config, group, (x, y) = self.config, torch.distributed.group.WORLD, images
        queries, keys, loss, terms, new = levels(self.student["encoder"], x), [], 0.0, {}, {}
        with torch.no_grad():  # dealt out anew: batch statistics then give no key away
            y = dk.shuffle_batch(y, order, group) if (deal := config.norm == "shuffled") else y
            for f, beta in zip(levels(self.teacher["encoder"], y), config.beta, strict=True):
                f = f if beta else f.mean((-2, -1), keepdim=True)  # less to send
                keys.append(dk.unshuffle_batch(f, order, group) if deal else f)  # before its boxes
        for name, head in self.student["heads"].items():
            level, is_patch = int(name[-1]) - 2, name.startswith("patch")
            maps, weight = (queries[level], keys[level]), (config.alpha, config.beta)[is_patch]
            if is_patch:
                *pair, valid = dk.patch_pairs(*maps, *views, config.patches[level])
            else:
                pair = [f.flatten(2).mT.mean(1, keepdim=True) for f in maps]  # channels stay last
                valid = torch.ones(len(x), dtype=torch.bool, device=x.device)
            q, k, use = head(pair[0]), self.teacher["heads"][name](pair[1]), valid[:, None]
            info_nce = partial(dk.info_nce, temperature=config.temperature, reduction="none")
            mean = partial(dk.masked_mean, valid=use, group=group)  # over all processes' valid ones
            terms[name] = mean(info_nce(q, k, dk.bank_negatives(banks[name]), use))
            terms[f"{name}_cosine"] = -mean(dk.negative_cosine(q.detach(), k, reduction="none"))
            terms[f"{name[:5]}_filled"] = banks[name].filled
            loss = loss + weight[level] * terms[name]
            k = dk.sample_keys(dk.l2_normalize(k), config.keys if is_patch else 1)
            k, valid = (dk.all_gather(rows, group) for rows in (k, valid))  # one order everywhere
            new[name] = dk.push_to_bank(banks[name], k, valid[:, None])
        terms["overlap"] = dk.intersect_views(*views).valid.double().mean()
        return loss, terms, new


# ==== evaluation ==================================================================================
@torch.no_grad()
def evaluate(model: DUPR, preview: tuple, config: Config, run: harness.Run, step: int) -> None:
    """Draw matched patches, their affinity and similarity against IoU, on C4; on scenes, probe."""
    model.eval()
    maps = [levels(model.student["encoder"], x)[2].cpu() for x in preview[0]]
    images = [nn.functional.interpolate(x.cpu(), 224) for x in preview[0]]
    views, side = [dk.View(*(x.cpu() for x in view)) for view in preview[1]], config.patches[2]
    *rows, valid = dk.patch_pairs(*maps, *views, side)
    affinity, own = dk.affinity_matrix(*rows), torch.arange(side**2).expand(len(valid), -1)
    found = affinity.argmax(-2)  # the patch of view 1 that is the nearest to each of view 2
    x, y = dk.grid_points(torch.tensor([0.0, 0.0, 1.0, 1.0]), side).T
    colors, panels = torch.stack([x, y, 1 - x], 1), []  # a patch's color tells its place
    shared = dk.View(dk.intersect_views(*views).box, torch.zeros_like(valid))
    for i, patch in ((0, own), (1, own), (1, found)):
        pixels = dk.coordinate_map(views[i], (224, 224)).flatten(1, 2)
        column, row = (dk.image_to_view(shared, pixels) * side).floor().long().unbind(-1)
        inside = (column >= 0) & (column < side) & (row >= 0) & (row < side) & valid[:, None]
        paint = colors[patch.gather(1, torch.where(inside, row * side + column, 0))]
        paint, inside = paint.mT.unflatten(-1, (224, 224)), inside.view(-1, 1, 224, 224)
        x = images[i] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        paint = 0.4 * x.mean(1, keepdim=True) + 0.6 * paint
        panels.append(torch.where(inside, paint, x))
    panels.append(nn.functional.interpolate(affinity[:, None], 224).expand(-1, 3, -1, -1))
    (path := run.folder / f"pictures/step-{step:06d}.png").parent.mkdir(exist_ok=True)
    save_image(torch.stack(panels, 1).flatten(0, 1), path, nrow=len(panels))
    ious, moves = [i / 10 for i in range(11)], harness.generator(config.seed)
    boxes = torch.tensor([1 / 3, 1 / 3, 2 / 3, 2 / 3]).expand(2 * len(valid), 1, 4)
    curve, _ = dk.similarity_iou_curve(torch.cat(maps), boxes, ious=ious, generator=moves)
    names = [f"similarity_iou_{iou}" for iou in ious]
    matched = dk.masked_mean((found == own).float(), valid[:, None])
    run.log(step, matched=matched, **dict(zip(names, curve, strict=True)))
    axes = (figure := Figure()).subplots(subplot_kw={"xlabel": "IoU", "ylabel": "cosine (C4)"})
    for row in run.rows("matched"):
        axes.plot(ious, [row[name] for name in names], label=f"step {row['step']}")
    axes.legend()
    figure.savefig(path.with_name("similarity-iou.png"))
    if config.data is None:
        normalize = transforms.Normalize(MEAN, STD)
        score = dk.probe_scenes(
            lambda x: model.student["encoder"](normalize(x).to(run.world.device))
        )
        run.log(step, probe_miou=score.miou, prior_miou=score.prior_miou)
    model.train()


# ==== loop ========================================================================================
def train(config: Config) -> None:
    name = "-".join([config.preset, *([config.data.resolve().name] if config.data else [])])
    folder = config.run or Path("runs", f"dupr-{name}")
    with harness.process_group(config.device) as world, harness.Run(folder, config, world) as run:
        source = harness.image_source(config.data, scenes=4096 if config.preset == "demo" else 0)
        device = world.device
        if config.bank > len(source):  # and negatives are of other images
            raise harness.UserError(f"--bank: at most as many as there are images, {len(source)}.")
        steps = config.epochs * harness.batches_per_epoch(len(source), config.batch, world)
        lr = config.lr * config.batch / 256
        if config.norm == "sync" and device.type == "cpu":
            raise harness.UserError("--norm sync needs GPUs: use --norm shuffled.")
        torch.manual_seed(config.seed)
        model: Any = DUPR(config)
        model = timm.layers.convert_sync_batchnorm(model) if config.norm == "sync" else model
        model.to(device, memory_format=torch.channels_last).compile(disable=not config.compile)
        ddp = nn.parallel.DistributedDataParallel(model)
        parameters, decay = model.student.parameters(), config.weight_decay
        optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=decay)
        banks = model.init_banks(device)
        step = run.resume(model, optimizer, banks=banks)
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
            dk.ema_update(model.teacher, model.student, momentum=config.momentum, buffers="keep")
            order = torch.randperm(config.batch, generator=harness.generator(config.seed, step, 3))
            torch.manual_seed(harness.generator(config.seed, step, world.rank, 2).initial_seed())
            with torch.autocast(device.type, torch.bfloat16, config.precision == "bf16"):
                loss, terms, banks = ddp(images, views, banks, order.to(device))
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
                run.save(step, model, optimizer, banks=banks)
            if stop:
                return
        if world.is_main:
            method = "dupr" if any((*config.alpha[:3], *config.beta)) else "mocov2"
            facts = {"method": method, "architecture": config.arch, "mean": MEAN, "std": STD}
            path = folder / "encoder.safetensors"
            harness.save_encoder(path, model.student["encoder"], **facts, step=step)
            line = "step {step:4} (0: random): probe mIoU {probe_miou:.3f}, prior {prior_miou:.3f}"
            print(*(line.format(**row) for row in run.rows("probe_miou")), sep="\n")


if __name__ == "__main__":
    harness.main(train, CONFIG)  # pyright: ignore[reportPossiblyUnboundVariable]
