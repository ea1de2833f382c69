"""CrOC pre-training: clusters found online in both views at once agree (CVPR 2023).

    python recipes/croc.py                      # the demo: CPU, minutes; --data FOLDER: your images
    torchrun --nproc-per-node 8 -- recipes/croc.py --preset coco --data coco/train2017

The same command run again resumes; `dino` is the baseline. More: docs/recipes/croc.md.
"""

import argparse
import copy
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Views:
    size: int = 224  # Side of the square views, in pixels.
    scale: tuple[float, float] = (0.25, 1.0)  # Share of the image's area that a view covers.
    hue: float = 0.1  # Strength of the hue jitter; 0.5 goes all around.
    blur: tuple[float, float] = (0.1, 2.0)  # Standard deviation of the blur, in pixels.


@dataclass(frozen=True)
class Config:
    preset: Literal["demo", "coco", "imagenet", "dino"] = "demo"  # Where the defaults come from.
    data: Path | None = None  # Folder of images, any tree; the demo also runs without.
    run: Path | None = None  # Run folder; else runs/croc-PRESET, with the data's name.
    arch: str = "vit_small_patch16_224"  # A ViT of timm, or "tiny" (96 channels, patches of 8).
    head: tuple[int, int, int] = (2048, 65536, 8192)  # Width, outputs for images, for clusters.
    alpha: float = 1.0  # Weight of the clusters' loss.
    tokens: Literal["values", "keys", "queries", "last"] = "values"  # What is clustered.
    token_weights: Literal["attention", "cosine"] = "attention"  # To [CLS], by either.
    start: int = 12  # Tokens that the clusters start from, K_start.
    position: float = 4.0  # Weight of the positional cost, lambda_pos.
    teacher_temperature: tuple[float, float, float] = (0.07, 0.07, 30.0)  # From, to, epochs.
    batch: int = 256  # Images a step, over all processes.
    epochs: int = 300
    lr: float = 5e-4  # For a batch of 256: scaled with the batch.
    warmup: float = 10.0  # Epochs in which the learning rate rises.
    weight_decay: tuple[float, float] = (0.04, 0.4)  # At the start and at the end.
    momentum: float = 0.996  # Of the teacher at the start; 1 at the end.
    drop_path: float = 0.1  # Share of the student's residual branches that are left out.
    clip: float = 3.0  # Norm that each parameter's gradient is clipped to.
    freeze: float = 1.0  # Epochs before the heads' last layers move.
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
        arch="tiny", head=(256, 512, 512), tokens="keys", batch=40, epochs=5, lr=4e-3, warmup=1.0,
        momentum=0.99, teacher_temperature=(0.02, 0.02, 0.0), weight_decay=(0.04, 0.04), workers=1,
        drop_path=0.0, precision="fp32", save_every=85, views=Views(64, (0.5, 1), 0.5, (0.1, 1)),
    ),
    "coco": Config("coco"),
    "imagenet": Config("imagenet", tokens="keys", batch=1024, position=3.0),
    "dino": Config("dino", alpha=0.0),
}  # fmt: skip


if __name__ == "__main__":  # the arguments before torch: --help answers at once
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=list(PRESETS), default="demo")
    default = PRESETS[first.parse_known_args()[0].preset]
    CONFIG = tyro.cli(Config, default=default, description=__doc__)

import harness
import timm
import torch
from einops import rearrange
from PIL.ImageFilter import GaussianBlur
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from timm.models.vision_transformer import Attention, init_weights_vit_timm
from torch import Tensor, nn
from torchvision.ops import MLP
from torchvision.transforms import v2 as transforms
from torchvision.utils import save_image
from tqdm import tqdm
import densekit as dk


# ==== views =======================================================================================
class TwoViews:  # two augmented crops of each image, and the views they are
    def __init__(self, source, config: Config):
        self.source, self.seed, self.config, self.epoch = source, config.seed, config.views, 0
        jitter = transforms.ColorJitter(0.4, 0.4, 0.2, config.views.hue)
        std = torch.distributions.Uniform(*map(torch.tensor, config.views.blur))
        self.photometric = [
            transforms.Compose([
                transforms.ToPILImage(),  # the quickest on a CPU, and the blur of DINO
                transforms.RandomApply([jitter], p=0.8), transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([lambda x: x.filter(GaussianBlur(float(std.sample())))], p),
                transforms.RandomSolarize(128, p=solarized), transforms.ToImage(),
                transforms.ToDtype(torch.float32, scale=True), transforms.Normalize(MEAN, STD),
            ]) for p, solarized in ((1.0, 0.0), (0.1, 0.2))
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: list[int]):
        images, unreadable = zip(*(self.source[i] for i in indices), strict=True)
        key, sizes = (self.seed, self.epoch, indices[0]), [image.shape[-2:] for image in images]
        scale, generator = self.config.scale, harness.generator(*key)
        *views, _ = dk.sample_view_pairs(torch.tensor(sizes), scale=scale, generator=generator)
        pixels = [image / 255 for image in images]
        crop = partial(dk.crop_views, pixels, size=self.config.size, interpolation="bicubic")
        crops = [(crop(view).clamp(0, 1) * 255).round().byte() for view in views]
        with harness.seeded(*key, 1):  # other numbers than the views have
            both = [torch.stack([*map(f, x)]) for f, x in zip(self.photometric, crops, strict=True)]
        return both, views, [name for names in unreadable for name in names]


# ==== model =======================================================================================
def build_encoder(arch: str, drop_path: float) -> Any:
    tiny = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3}
    name, options = ("vit_tiny_patch16_224", tiny) if arch == "tiny" else (arch, {})
    options |= {"dynamic_img_size": True, "drop_path_rate": drop_path, "num_classes": 0}
    with suppress(AttributeError, RuntimeError, TypeError):  # unknown, or no such options or parts
        vit: Any = timm.create_model(name, **options)
        parts = [type(x) for x in (vit.blocks[-1].attn, vit.blocks[-1].attn.q_norm)]
        if parts == [Attention, nn.Identity] and vit.num_prefix_tokens == 1 and vit.has_class_token:
            return vit
    raise harness.UserError(f"{arch} is no plain ViT of timm: try vit_small_patch16_224.")


def encode(vit, images: Tensor) -> tuple[Tensor, Tensor]:
    """The final tokens, [CLS] first; queries, keys and values of the last block (Eq 21)."""
    x, last = vit.norm_pre(vit._pos_embed(vit.patch_embed(images))), vit.blocks[-1]
    for block in vit.blocks[:-1]:
        x = block(x)
    qkv, heads = last.attn.qkv(last.norm1(x)), last.attn.num_heads
    return vit.norm(last(x)), rearrange(qkv, "b n (s h d) -> s b h n d", s=3, h=heads)


def to_map(tokens: Tensor) -> Tensor:  # of a square view, without [CLS]
    return rearrange(tokens[:, 1:], "b (h w) d -> b d h w", h=round(tokens.shape[1] ** 0.5))


class CrOC(nn.Module):  # student and teacher: each an encoder f and DINO's head (Fig 2)
    def __init__(self, config: Config):
        super().__init__()
        self.config, (wide, *counts) = config, config.head[: 3 if config.alpha else 2]
        encoder, last = build_encoder(config.arch, config.drop_path), nn.ModuleDict()
        patch, size = encoder.patch_embed.patch_size[0], config.views.size
        if size % patch or config.start not in range(2, 2 * (size // patch) ** 2 + 1):
            raise harness.UserError(f"--views.size: multiples of {patch}; --start: 2 to all tokens")
        for kind, count in zip(("image", "cluster"), counts, strict=False):
            last[kind] = nn.Linear(wide // 8, count, bias=False)
            self.register_buffer(kind, torch.zeros(count))  # center of the teacher's outputs
        mlp = MLP(encoder.num_features, [wide, wide, wide // 8], activation_layer=nn.GELU)
        head = nn.ModuleDict({"mlp": mlp, "last": last}).apply(init_weights_vit_timm)
        self.student = nn.ModuleDict({"encoder": encoder, **head})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()  # drops no path

    def head(self, network: nn.ModuleDict, x: Tensor, kind: str) -> Tensor:
        x, prototypes = network["mlp"](x), network["last"][kind].weight
        with torch.autocast(x.device.type, enabled=False):  # bf16 is too coarse to be sharpened
            return dk.l2_normalize(x) @ dk.l2_normalize(prototypes).mT

    def locate(self, x: Tensor, qkv: Tensor, views: list[dk.View]):
        """K and the clusters of both views together, for each attention head (Sec 3.3)."""
        names, config = ("queries", "keys", "values", "last"), self.config
        z = (*qkv, x[:, None])[names.index(config.tokens)]
        if config.token_weights == "attention":
            r = (qkv[0, :, :, :1] @ qkv[1].mT / qkv.shape[-1] ** 0.5).float().softmax(-1)[:, :, 0]
            r = r if r.shape[1] == z.shape[1] else r.mean(1, keepdim=True)
        else:  # the authors' program
            r = (dk.l2_normalize(z[:, :, :1]) @ dk.l2_normalize(z).mT / 2).exp()[:, :, 0]
        size = to_map(x).shape[-2:]
        places = torch.cat([dk.coordinate_map(view, size).flatten(1, 2) for view in views], 1)
        z, r = (rearrange(y[:, :, 1:], "(v b) h n ... -> b h (v n) ...", v=2) for y in (z, r))
        places, start = places[:, None].expand(*z.shape[:-1], 2), dk.sample_tokens(r, config.start)
        found = dk.sinkhorn_merge(z, places, r, start, position_weight=config.position)
        return found.clusters, dk.prune_clusters(dk.split_assignments(found.assignments))

    # ==== loss ====================================================================================
    def forward(self, images: list[Tensor], views: list[dk.View], tau: float):
        pixels, networks, terms, loss = torch.cat(images), (self.student, self.teacher), {}, 0.0
        s = self.student["encoder"].forward_features(pixels)
        t, qkv = encode(self.teacher["encoder"], pixels)
        inputs = {"image": [s[:, 0], t[:, 0]]}
        if self.config.alpha:
            clusters, pruned = self.locate(t, qkv, views)
            q = rearrange(pruned.assignments, "b h v n k -> (v b) n (h k)")
            valid = pruned.valid.flatten(1).repeat(2, 1)  # the same clusters in both views
            terms |= {"clusters": clusters.double().mean(), "valid": valid.double().sum(1).mean()}
            sizes = [x[:, 0].detach().norm(dim=-1).mean() for x in (s, t)]  # the MLP's one scale
            means = [dk.pool_masks(x[:, 1:], q, average=True) for x in (s, t)]
            pooled = [dk.l2_normalize(x)[valid] for x in means]
            inputs["cluster"] = [x * size for x, size in zip(pooled, sizes, strict=True)]
        for kind, pair in inputs.items():
            s, t = (self.head(*x, kind) for x in zip(networks, pair, strict=True))
            c, sides = self.get_buffer(kind), (s.tensor_split(2), t.tensor_split(2))
            h = dk.symmetric_loss(dk.self_distillation, *sides, center=c, teacher_temperature=tau)
            entropy = dk.cross_entropy_similarity((t - c) / tau, (t - c) / tau)
            terms |= {kind: h, f"{kind}_entropy": entropy, f"{kind}_kl": h.detach() - entropy}
            loss = loss + (self.config.alpha if kind == "cluster" else 1.0) * h
            c.copy_(dk.update_center(c, t, group=torch.distributed.group.WORLD))
        return loss, terms


# ==== evaluation ==================================================================================
def evaluate(model: CrOC, preview: tuple, config: Config, run: harness.Run, step: int) -> None:
    """Draw both views with their clusters, pruned ones black, and PCA; on scenes, probe."""
    pixels, vit = torch.cat(preview[0]), model.teacher["encoder"]
    _, pruned = model.locate(*(found := encode(vit, pixels)), preview[1])
    maps, palette = to_map(found[0]).cpu(), torch.rand(99, 3, generator=harness.generator(1493))
    colors = palette[pruned.labels.cpu()] * (pruned.assignments.sum(-1, keepdim=True).cpu() > 0)
    heads = rearrange(colors, "b k v (h w) c -> k (v b) c h w", h=maps.shape[-2])[:3]
    rgb = pixels.cpu() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    panels = [nn.functional.interpolate(x, 224) for x in (rgb, *heads, dk.pca_colors(maps))]
    (path := run.folder / f"pictures/step-{step:06d}.png").parent.mkdir(exist_ok=True)
    save_image(rearrange(panels, "p (v b) c h w -> (b v p) c h w", v=2), path, nrow=2 * len(panels))
    if config.data is None:
        normalize = transforms.Normalize(MEAN, STD)
        score = dk.probe_scenes(lambda x: to_map(encode(vit, normalize(x).to(pixels.device))[0]))
        run.log(step, probe_miou=score.miou, prior_miou=score.prior_miou)


# ==== loop ========================================================================================
def train(config: Config) -> None:
    name = "-".join([config.preset, *([config.data.resolve().name] if config.data else [])])
    folder = config.run or Path("runs", f"croc-{name}")
    with harness.process_group(config.device) as world, harness.Run(folder, config, world) as run:
        source = harness.image_source(config.data, scenes=4096 if config.preset == "demo" else 0)
        epoch = harness.batches_per_epoch(len(source), config.batch, world)
        steps, lr = config.epochs * epoch, config.lr * config.batch / 256
        warmup = min(config.warmup, config.epochs) * epoch
        torch.manual_seed(config.seed)
        model = CrOC(config).to(world.device)
        model.compile(disable=not config.compile)
        ddp = nn.parallel.DistributedDataParallel(model)
        parameters = [*model.student.parameters()]
        groups = [[x for x in parameters if (x.ndim < 2) == flat] for flat in (False, True)]
        optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr)
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
            now = dk.warmup_cosine(step, steps, peak=lr, warmup=warmup, end=1e-6)
            (low, high), (first, last, warm) = config.weight_decay, config.teacher_temperature
            decays = dk.cosine_schedule(step, steps, start=low, end=high), 0.0
            tau = dk.linear_schedule(step, warm * epoch, start=first, end=last)
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                group.update(lr=now, weight_decay=decay)
            torch.manual_seed(harness.generator(config.seed, step, world.rank, 2).initial_seed())
            with torch.autocast(world.device.type, torch.bfloat16, config.precision == "bf16"):
                loss, terms = ddp(images, views, tau)
            optimizer.zero_grad()
            loss.backward()
            norms = [nn.utils.clip_grad_norm_(x, config.clip) for x in parameters]
            values = run.reduce(
                step, {"loss": loss, "grad_norm": torch.stack(norms).norm(), **terms}
            )
            if step < config.freeze * epoch:
                model.student["last"].zero_grad()
            optimizer.step()
            momentum = dk.cosine_schedule(step, steps, start=config.momentum, end=1.0)
            dk.ema_update(model.teacher, model.student, momentum=momentum)
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
            facts = {"method": "croc" if config.alpha else "dino", "architecture": config.arch}
            path, facts = folder / "encoder.safetensors", {**facts, "mean": MEAN, "std": STD}
            harness.save_encoder(path, model.teacher["encoder"], **facts, step=step)
            line = "step {step:4} (0: random): probe mIoU {probe_miou:.3f}, prior {prior_miou:.3f}"
            print(*(line.format(**row) for row in run.rows("probe_miou")), sep="\n")


if __name__ == "__main__":
    harness.main(train, CONFIG)  # pyright: ignore[reportPossiblyUnboundVariable]
