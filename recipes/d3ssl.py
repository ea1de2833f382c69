"""D3SSL pre-training: regions apart from what is around them and where they are (2023).

    python recipes/d3ssl.py                     # the demo: CPU, minutes
    torchrun --nproc-per-node 8 -- recipes/d3ssl.py --preset paper --data coco

The same command run again resumes; --data needs proposals.py first. More: docs/recipes/d3ssl.md.
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
    size: int = 224  # Side of the square views, in pixels; even.
    scale: tuple[float, float] = (0.4, 1.0)  # Share of the image's area that view 2 covers.
    hue: float = 0.1  # Strength of the hue jitter; 0.5 goes all around.
    blur: tuple[float, float] = (0.1, 2.0)  # Standard deviation of the blur, in pixels.


@dataclass(frozen=True)
class Config:
    preset: Literal["demo", "paper", "decoupling", "region"] = "demo"  # Where defaults come from.
    data: Path | None = None  # Folder of images, any tree; the demo also runs without.
    proposals: Path | None = None  # What recipes/proposals.py wrote about that folder.
    run: Path | None = None  # Run folder; else runs/d3ssl-PRESET, with the data's name.
    arch: str = "resnet50"  # A ResNet of timm, or "tiny" (64 channels, stride 8).
    regions: int = 4  # Proposals K of an image in a step, of those that view 2 holds.
    cut: tuple[float, float] = (0.2, 0.5)  # PRC: share of a proposal to cut; 0 0 cuts nothing.
    mask: tuple[float, float] = (0.2, 0.6)  # PRM: area of the mask beside it; 0 0 masks nothing.
    jitter: tuple[float, float] = (0.8, 1.0)  # RBJ: sides of its jittered box; 1 1 is no jitter.
    depositioning: float = 1.0  # Weight of L_dp; 0 leaves out its view.
    bins: int = 14  # RoIAlign to bins x bins; half as many in the small view.
    head: tuple[int, int] = (2048, 128)  # Widths of the head: hidden, outputs.
    bank: int = 65536  # Keys of earlier batches.
    temperature: float = 0.2
    momentum: float = 0.999  # Of the key encoder and its head.
    batch: int = 256  # Images a step, over all processes.
    epochs: int = 800
    lr: float = 0.3  # For a batch of 256: scaled with the batch.
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
        arch="tiny", cut=(0.05, 0.2), mask=(0.1, 0.3), bins=6, head=(128, 64), bank=512,
        momentum=0.99, batch=40, epochs=8, lr=0.8, workers=1, precision="fp32", save_every=204,
        views=Views(64, scale=(0.5, 1.0), hue=0.5, blur=(0.1, 1.0)),
    ),
    "paper": Config("paper"),
    "decoupling": Config("decoupling", depositioning=0.0),
    "region": Config("region", depositioning=0.0, cut=(0, 0), mask=(0, 0), jitter=(1, 1)),
}  # fmt: skip
LAYERS = "layer1", "layer2", "layer3", "layer4"  # of a ResNet: C2 to C5


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
from proposals import crop_objects, image_source
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms
from torchvision.utils import draw_bounding_boxes, save_image
from tqdm import tqdm
import densekit as dk


# ==== views =======================================================================================
class TwoViews:  # the whole image and a crop, the views they are, and K proposals in pixels
    def __init__(self, source, config: Config):
        self.source, self.seed, self.config, self.epoch = source, config.seed, config, 0
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
        scale, generator = self.config.views.scale, harness.generator(*key)
        whole = nn.functional.pad(torch.tensor(sizes).flip(-1).float(), (2, 0))
        view2 = dk.sample_views(torch.tensor(sizes), scale=scale, generator=generator)
        views = [dk.View(whole, torch.rand(len(sizes), generator=generator) < 0.5), view2]
        crop = partial(dk.crop_views, [x / 255 for x in images], size=self.config.views.size)
        crops = [(crop(view) * 255).round().byte() for view in views]
        with harness.seeded(*key, 1):  # other numbers than the views have
            crops = [torch.stack([*map(self.photometric, crop)]) for crop in crops]
        read = [(i + len(bad)) % len(self) for i, bad in zip(indices, unreadable, strict=True)]
        boxes = nn.utils.rnn.pad_sequence([self.source.boxes[i] for i in read], batch_first=True)
        held = dk.boxes_in_view(view2, boxes := boxes * whole[:, None, [2, 3, 2, 3]]).valid
        boxes, valid = dk.sample_boxes(boxes, self.config.regions, held, generator=generator)
        boxes = torch.where(valid[:, :1, None], boxes, view2.box[:, None])  # none: all, not valid
        return crops, views, boxes, valid, [name for names in unreadable for name in names]


def augment(images: list, views: list, boxes: Tensor, valid: Tensor, config: Config) -> list:
    """View 1, view 2, the small view 2 and view 3, each with its boxes in [0, 1] (Eq 2, 6 to 8)."""
    (x1, x2), size = images, images[0].shape[-2:]

    def cut(boxes: Tensor, size: Any) -> Tensor:  # PRC
        draws = dk.sample_cutout(boxes, ratio=config.cut)
        return dk.proposal_cutout(boxes, draws, size, valid).mask

    def fill(x: Tensor, boxes: Tensor) -> Tensor:  # PRM after PRC, with the mean of the data
        side, beside = x.shape[-2:], dk.sample_surrounding_boxes(boxes, ratio=config.mask)
        return dk.fill_mask(x, cut(boxes, side) | dk.boxes_to_mask(beside, side, valid))

    b1, b2 = (dk.boxes_in_view(view, boxes).boxes * size[0] for view in views)
    b3 = dk.shift_boxes(b2, shift := dk.sample_shift(b2, size, valid))
    mask = dk.boxes_to_mask(b3, size, valid) & ~cut(b3, size)
    x3 = dk.composite(x2, x2.roll(1, 0), mask, shift)  # on another image of the batch
    small = fill(nn.functional.avg_pool2d(x2, 2), b2 / 2)
    pairs = (fill(x1, b1), b1), (x2, b2), (small, b2), (x3, b3)
    return [(x, dk.sample_inner_boxes(b, scale=config.jitter) / size[0]) for x, b in pairs]  # RBJ


# ==== model =======================================================================================
def build_encoder(arch: str) -> Any:
    """A ResNet without its head; the weights have torchvision's names."""
    small = {"layers": (1,) * 4, "channels": (16, 32, 64, 64), "stem_type": "deep", "stem_width": 8}
    tiny = ("resnet18", {**small, "output_stride": 8})
    name, options = tiny if arch == "tiny" else (arch, {})
    if "resn" not in name or "v2" in name or not timm.is_model(name):
        raise harness.UserError(f"There is no ResNet {arch} in timm: try resnet50, or tiny.")
    return timm.create_model(name, num_classes=0, global_pool="", **options)


def embed(network: Any, images: Tensor, boxes: Tensor, bins: int) -> Tensor:  # of regions, Eq 1
    encoder, options = network["encoder"], {"stop_early": True, "intermediates_only": True}
    (c4,) = encoder.forward_intermediates(images, indices=[3], **options)
    c5 = encoder.layer4(dk.roi_align(c4, boxes, bins).features.flatten(0, 1))
    return network["head"](c5.flatten(2).mT.mean(1)).unflatten(0, boxes.shape[:2])


class D3SSL(nn.Module):  # query (student) and key (teacher): each an encoder f and a head (Fig 5)
    def __init__(self, config: Config):
        super().__init__()
        self.config, encoder, (wide, out) = config, build_encoder(config.arch), config.head
        numbers = config.bank, wide, out, config.regions, config.temperature, config.bins - 1
        shares = config.cut, config.mask, config.jitter, config.views.scale
        bad = min(*numbers, config.jitter[0], config.views.scale[0]) <= 0 or config.views.size % 2
        if bad or not all(0 <= low <= high <= 1 for low, high in shares):
            what = "--cut, --mask, --jitter, --views.scale: rising shares; --views.size: even"
            raise harness.UserError(f"{what}; --bins 2+; --bank --head --regions --temperature >0.")
        head = nn.Sequential(nn.Linear(encoder.num_features, wide), nn.ReLU(), nn.Linear(wide, out))
        self.student = nn.ModuleDict({"encoder": encoder, "head": head})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    # ==== loss ====================================================================================
    def forward(self, images, views, boxes: Tensor, valid: Tensor, bank: dk.Bank, order: Tensor):
        config, group, bins = self.config, torch.distributed.group.WORLD, self.config.bins
        *clean, small, view3 = augment(images, views, boxes, valid, config)
        z1, z2 = embed(self.student, *clean[0], bins), embed(self.student, *small, bins // 2)
        with torch.no_grad():  # dealt out anew: batch statistics then give no key away
            deal = ([dk.shuffle_batch(x, order, group) for x in view] for view in clean)
            k1, k2 = (dk.unshuffle_batch(embed(self.teacher, *x, bins), order, group) for x in deal)
        options = {"negatives": dk.bank_negatives(bank), "valid": valid, "reduction": "none"}
        info_nce = partial(dk.info_nce, temperature=config.temperature, **options)
        mean = partial(dk.masked_mean, valid=valid, group=group)  # over all processes' valid ones
        loss = mean(info_nce(z1, k2) + info_nce(z2, k1))  # Eq 4
        terms = {"decoupling": loss, "filled": bank.filled, "valid": valid.double().mean()}
        terms["cosine"] = -mean(dk.negative_cosine(z1.detach(), k2, reduction="none"))
        if config.depositioning:
            z3 = embed(self.student, *view3, bins)
            terms["depositioning"] = mean(info_nce(z3, k2) + info_nce(z3, k1))  # Eq 9
            loss = loss + config.depositioning * terms["depositioning"]
        rows, valid = (dk.all_gather(x, group) for x in (dk.l2_normalize(k1), valid))
        return loss, terms, dk.push_to_bank(bank, rows, valid)  # in one order everywhere


# ==== evaluation ==================================================================================
@torch.no_grad()
def evaluate(model: D3SSL, source, preview, config: Config, run: harness.Run, step: int) -> None:
    """Draw the five inputs, and coupling and positional bias of each layer; on scenes, probe."""
    model.eval()
    encoder: Any = nn.Sequential(transforms.Normalize(MEAN, STD), model.student["encoder"])
    torch.manual_seed(config.seed)  # the same augmentations each time
    view1, view2, small, view3 = augment(*preview, config)
    std, mean, panels = torch.tensor(STD).view(3, 1, 1), torch.tensor(MEAN).view(3, 1, 1), []
    draw = partial(draw_bounding_boxes, width=2)
    for x, boxes in (view1, small, view3, view1, view2):  # the student's three, the teacher's two
        x = (nn.functional.interpolate(x.cpu(), 224) * std + mean).clamp(0, 1)
        rows = zip(x, boxes.cpu() * 224, preview[3].cpu(), strict=True)
        panels.append(torch.stack([draw(x, b[i]) if i.any() else x for x, b, i in rows]))
    (path := run.folder / f"pictures/step-{step:06d}.png").parent.mkdir(exist_ok=True)
    save_image(torch.stack(panels, 1).flatten(0, 1), path, nrow=len(panels))
    stride = encoder[1].feature_info[-1]["reduction"]  # whole cells: nine times the same map
    side = max(1, round(config.views.size / 3 / stride)) * stride
    objects = crop_objects(source, 256, side).to(run.world.device)
    bias = dk.layer_bias(encoder, objects, [f"1.{x}" for x in LAYERS])
    names = [f"{name}_{layer}" for name in bias._fields for layer in LAYERS]
    terms = dict(zip(names, torch.cat([*bias]), strict=True))
    if config.data is None:
        score = dk.probe_scenes(lambda x: encoder(x.to(run.world.device)))
        terms |= {"probe_miou": score.miou, "prior_miou": score.prior_miou}
    run.log(step, **terms)
    for name, axes in zip(bias._fields, (figure := Figure()).subplots(2), strict=True):
        for row in (rows := run.rows("mean_cosine_layer4"))[:1] + rows[1:][-6:]:
            axes.plot(LAYERS, [row[f"{name}_{x}"] for x in LAYERS], label=f"step {row['step']}")
        axes.legend(title=name.replace("_", " "))
    figure.savefig(path.with_name("layers.png"))
    model.train()


# ==== loop ========================================================================================
def train(config: Config) -> None:
    name = "-".join([config.preset, *([config.data.resolve().name] if config.data else [])])
    folder = config.run or Path("runs", f"d3ssl-{name}")
    with harness.process_group(config.device) as world, harness.Run(folder, config, world) as run:
        scenes = 4096 if config.preset == "demo" else 0
        source = image_source(config.data, config.proposals, scenes=scenes)
        if config.bank > len(source):  # and negatives are of other images
            raise harness.UserError(f"--bank: at most as many as there are images, {len(source)}.")
        steps = config.epochs * harness.batches_per_epoch(len(source), config.batch, world)
        lr, device = config.lr * config.batch / 256, world.device
        torch.manual_seed(config.seed)
        model = D3SSL(config)
        model.to(device, memory_format=torch.channels_last).compile(disable=not config.compile)
        ddp = nn.parallel.DistributedDataParallel(model)
        parameters, decay = model.student.parameters(), config.weight_decay
        optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=decay)
        bank = dk.init_bank(config.bank, config.head[1], device=device)
        step = run.resume(model, optimizer, bank=bank)
        options = {"world": world, "seed": config.seed, "workers": config.workers}
        batches = partial(harness.batches, TwoViews(source, config), **options)
        *preview, _ = next(batches(min(6 * world.size, config.batch), start=0, stop=1))
        if step == 0 and world.is_main:
            evaluate(model, source, preview, config, run, step)
        regions = batches(config.batch, start=step, stop=steps)
        bar = tqdm(regions, total=steps, initial=step, disable=not world.is_main, unit="step")
        for *inputs, unreadable in bar:
            now = optimizer.param_groups[0]["lr"] = dk.cosine_schedule(step, steps, start=lr)
            dk.ema_update(model.teacher, model.student, momentum=config.momentum, buffers="keep")
            order = torch.randperm(config.batch, generator=harness.generator(config.seed, step, 3))
            torch.manual_seed(harness.generator(config.seed, step, world.rank, 2).initial_seed())
            with torch.autocast(device.type, torch.bfloat16, config.precision == "bf16"):
                loss, terms, bank = ddp(*inputs, bank, order.to(device))
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
                evaluate(model, source, preview, config, run, step)
            if due or stop:
                run.save(step, model, optimizer, bank=bank)
            if stop:
                return
        if world.is_main:
            f, more = model.student["encoder"], (*config.cut, *config.mask, 1 - config.jitter[0])
            method = "d3ssl" if config.depositioning else ("region", "decoupling")[any(more)]
            facts = {"method": method, "architecture": config.arch, "mean": MEAN, "std": STD}
            harness.save_encoder(folder / "encoder.safetensors", f, **facts, step=step)
            line = "step {step:4} (0: random): probe mIoU {probe_miou:.3f}, prior {prior_miou:.3f}"
            line += "; C5: coupling {coupling_rate_layer4:.3f}, cosine {mean_cosine_layer4:.3f}"
            print(*(line.format(**row) for row in run.rows("probe_miou")), sep="\n")


if __name__ == "__main__":
    harness.main(train, CONFIG)  # pyright: ignore[reportPossiblyUnboundVariable]
