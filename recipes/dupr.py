"""DUPR pre-training: patches of two views are found again, at several levels (2021).

    python recipes/dupr.py                      # the demo: CPU, minutes; --data FOLDER: your images
    torchrun --nproc-per-node 8 -- recipes/dupr.py --preset paper --data imagenet/train

The same command run again resumes. `--preset mocov2` is the baseline: one loss, of whole images.
Logged values, deviations from the paper, time and results: docs/recipes/dupr.md.
"""

import argparse
import copy
import math
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
    preset: Literal["demo", "paper", "coco", "mocov2"] = "demo"  # The preset of the defaults.
    data: Path | None = None  # Folder of images, at any depth; the demo also runs without one.
    run: Path | None = None  # Run folder; by default runs/dupr-PRESET[-NAME OF DATA].
    arch: str = "resnet50"  # A ResNet of timm, or "tiny" (64 channels, stride 8).
    alpha: tuple[float, float, float, float] = (0.1, 0.4, 0.7, 1.0)  # Image losses, C2 to C5.
    beta: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # Patch losses, C2 to C5.
    patches: tuple[int, int, int, int] = (14, 14, 14, 7)  # S of each level: S x S patches.
    outputs: int = 128  # Outputs of every head.
    bank: int = 65536  # Keys in the bank of each loss.
    keys: int = 4  # Patches of an image that enter the bank of a patch loss.
    temperature: float = 0.2  # Divides the cosines.
    momentum: float = 0.999  # Momentum of the key encoder and its heads.
    norm: Literal["shuffled", "sync"] = "shuffled"  # Batch statistics of the keys; sync on GPUs.
    batch: int = 256  # Images per step, over all processes.
    epochs: int = 200
    lr: float = 0.06  # Learning rate for a batch of 256; it is scaled with the batch.
    weight_decay: float = 1e-4
    seed: int = 0
    workers: int = 8  # Loader processes of each training process.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False  # Compile the model with torch.compile.
    log_every: int = 20  # Steps between two rows of the log.
    save_every: int = 1000  # Steps between two checkpoints, each with a picture and a probe.
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


def read_options() -> Config:
    """The command line; the preset is read first, since the other defaults are its own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=list(PRESETS), default="demo")
    preset = parser.parse_known_args()[0].preset
    return tyro.cli(Config, default=PRESETS[preset], description=__doc__)


if __name__ == "__main__":
    # The options are read before torch is imported, so that --help answers at once. The rest of
    # this file then runs as a module.
    options = read_options()
    import dupr
    import harness

    sys.exit(harness.main(dupr.train, options))

import harness
import timm
import torch
from einops import rearrange
from matplotlib.figure import Figure
from PIL.ImageFilter import GaussianBlur
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms
from torchvision.utils import save_image
import densekit as dk


def check(config: Config) -> None:
    """Answer an option that makes no sense with one sentence, before any data is read."""
    harness.check_training(config)

    decay = config.weight_decay
    harness.check(
        0 <= decay < math.inf, f"--weight-decay is {decay}: give a finite number, 0 or more."
    )
    harness.check(
        config.arch == "tiny" or ("resn" in config.arch and timm.is_model(config.arch)),
        f"--arch is {config.arch}: give a ResNet of timm, such as resnet50, or tiny.",
    )

    alpha = harness.as_typed(config.alpha)
    beta = harness.as_typed(config.beta)
    harness.check(
        all(0 <= weight < math.inf for weight in config.alpha),
        f"--alpha is {alpha}: give four finite weights, 0 or more.",
    )
    harness.check(
        all(0 <= weight < math.inf for weight in config.beta),
        f"--beta is {beta}: give four finite weights, 0 or more.",
    )
    harness.check(
        config.alpha[3] > 0 or config.beta[3] > 0,
        f"--alpha is {alpha} and --beta is {beta}: give the last weight, of C5, a number above 0 "
        "in one of the two.",
    )
    harness.check(
        min(config.patches) >= 1,
        f"--patches is {harness.as_typed(config.patches)}: give four numbers, 1 or more.",
    )
    harness.check(config.outputs >= 1, f"--outputs is {config.outputs}: give 1 or more.")
    harness.check(config.bank >= 1, f"--bank is {config.bank}: give 1 key or more.")
    harness.check(config.keys >= 1, f"--keys is {config.keys}: give 1 or more.")
    for head in list_heads(config):
        harness.check(
            head.patches == 0 or config.keys <= head.patches**2,
            f"--keys is {config.keys}: give at most {head.patches**2}, the patches of an image in "
            f"{head.name}.",
        )
    harness.check(
        0 < config.temperature < math.inf,
        f"--temperature is {config.temperature}: give a finite number above 0.",
    )
    momentum = config.momentum
    harness.check(0 <= momentum <= 1, f"--momentum is {momentum}: give a number from 0 to 1.")
    use_cuda = config.device != "cpu" and torch.cuda.is_available()
    harness.check(
        config.norm == "shuffled" or use_cuda,
        "--norm is sync: give shuffled, since sync needs GPUs.",
    )


# ==== views =======================================================================================
def photometric(views: Views) -> transforms.Compose:
    """MoCo v2's random changes of the colors of one crop, which is then normalized."""
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, views.hue)
    sigma = torch.distributions.Uniform(*views.blur)

    def blur(image):
        return image.filter(GaussianBlur(float(sigma.sample())))

    return transforms.Compose(
        [
            transforms.ToPILImage(),  # PIL is the quickest on a CPU, and MoCo v2 blurs with it
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=0.5),
            transforms.ToImage(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(MEAN, STD),
        ]
    )


class TwoViews:
    """Batches of images: two augmented crops of each image, and the `View` of each crop."""

    def __init__(self, source, config: Config):
        self.source = source
        self.seed = config.seed
        self.config = config.views
        self.epoch = 0  # `harness.batches` sets it
        self.photometric = photometric(config.views)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: list[int]):
        images, unreadable = harness.read_batch(self.source, indices)
        key = (self.seed, self.epoch, indices[0])

        sizes = torch.tensor([image.shape[-2:] for image in images])
        generator = harness.generator(*key)
        pairs = dk.sample_view_pairs(sizes, scale=self.config.scale, generator=generator)
        views = [pairs.view1, pairs.view2]

        pixels = [image / 255 for image in images]
        crops = []
        for view in views:
            crop = dk.crop_views(pixels, view, self.config.size)
            crops.append((crop * 255).round().byte())
        with harness.seeded(*key, 1):  # the colors need other random numbers than the views
            augmented = [torch.stack([self.photometric(x) for x in crop]) for crop in crops]
        return augmented, views, unreadable


# ==== model =======================================================================================
class Head(NamedTuple):
    """One loss at one level, of whole images or of their patches."""

    name: str  # "image2" to "patch5"
    level: int  # 0 is C2, and 3 is C5
    patches: int  # S, for S x S patches; 0 is the whole image
    weight: float  # in the total loss


def list_heads(config: Config) -> list[Head]:
    """The losses whose weight is not 0. Those of images come before those of patches."""
    heads = []
    for level, weight in enumerate(config.alpha):
        heads.append(Head(f"image{level + 2}", level, 0, weight))
    for level, weight in enumerate(config.beta):
        heads.append(Head(f"patch{level + 2}", level, config.patches[level], weight))
    return [head for head in heads if head.weight]


def build_encoder(arch: str) -> Any:
    """A ResNet without its head, whose weights have torchvision's names."""
    if arch != "tiny":
        return timm.create_model(arch, num_classes=0, global_pool="")
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


def levels(encoder: Any, images: Tensor) -> list[Tensor]:
    """The feature maps C2 to C5 of a ResNet."""
    return encoder.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)


def pool(maps: Tensor) -> Tensor:
    """Mean over all cells: one row of features for each image, (b, 1, d)."""
    return maps.flatten(2).mT.mean(1, keepdim=True)


class DUPR(nn.Module):
    """Query network (student) and key network (teacher). Each is an encoder with heads (Fig 3)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.losses = list_heads(config)
        encoder = build_encoder(config.arch)
        heads = nn.ModuleDict()
        for head in self.losses:
            channels = encoder.feature_info[head.level + 1]["num_chs"]
            # The paper's 1 x 1 convolutions of a map are linear layers of its rows.
            heads[head.name] = nn.Sequential(
                nn.Linear(channels, channels),
                nn.ReLU(inplace=True),
                nn.Linear(channels, config.outputs),
            )
        self.student = nn.ModuleDict({"encoder": encoder, "heads": heads})
        self.teacher = copy.deepcopy(self.student)
        self.teacher.requires_grad_(False)

    def init_banks(self, device: torch.device) -> dict[str, dk.Bank]:
        """An empty bank of keys for each head."""
        banks = {}
        for head in self.losses:
            banks[head.name] = dk.init_bank(self.config.bank, self.config.outputs, device=device)
        return banks

    @torch.no_grad()
    def key_levels(self, images: Tensor, order: Tensor) -> list[Tensor]:
        """The maps C2 to C5 of the key encoder.

        The images are shuffled over the processes before, and the maps are brought back after. So
        the batch statistics of a key come from other images than those of its query, and the
        query cannot recognize its key by them.
        """
        group = torch.distributed.group.WORLD
        shuffled = self.config.norm == "shuffled"
        if shuffled:
            images = dk.shuffle_batch(images, order, group)
        maps = levels(self.teacher["encoder"], images)
        for level, beta in enumerate(self.config.beta):
            if not beta:
                # No patch loss reads this level. Its pooled map is less to send.
                maps[level] = maps[level].mean((-2, -1), keepdim=True)
        if shuffled:
            maps = [dk.unshuffle_batch(x, order, group) for x in maps]
        return maps

    # ==== loss ====================================================================================
    def forward(self, images: list[Tensor], views: list[dk.View], banks: dict, order: Tensor):
        """The total loss, the terms that are logged, and the banks with the keys of this batch."""
        config = self.config
        group = torch.distributed.group.WORLD
        query_maps = levels(self.student["encoder"], images[0])
        key_maps = self.key_levels(images[1], order)
        always = torch.ones(len(images[0]), dtype=torch.bool, device=images[0].device)

        loss = 0.0
        terms = {}
        new_banks = {}
        for head in self.losses:
            query_map = query_maps[head.level]
            key_map = key_maps[head.level]
            if head.patches:
                pairs = dk.patch_pairs(query_map, key_map, *views, head.patches)
                query_rows = pairs.features1
                key_rows = pairs.features2
                valid = pairs.valid
                filled = "patch_filled"
                keys_per_image = config.keys
            else:
                query_rows = pool(query_map)
                key_rows = pool(key_map)
                valid = always
                filled = "image_filled"
                keys_per_image = 1
            query = self.student["heads"][head.name](query_rows)
            key = self.teacher["heads"][head.name](key_rows)

            # A row is one patch or one image. The means are over the valid rows of all processes.
            bank = banks[head.name]
            mean = partial(dk.masked_mean, valid=valid[:, None], group=group)
            row_losses = dk.info_nce(
                query,
                key,
                dk.bank_negatives(bank),
                valid[:, None],
                temperature=config.temperature,
                reduction="none",
            )
            row_cosines = -dk.negative_cosine(query.detach(), key, reduction="none")
            terms[head.name] = mean(row_losses)
            terms[f"{head.name}_cosine"] = mean(row_cosines)
            terms[filled] = bank.filled
            loss = loss + head.weight * terms[head.name]

            # Every process pushes the keys of all processes, so that the banks stay the same.
            own_keys = dk.sample_keys(dk.l2_normalize(key), keys_per_image)
            all_keys = dk.all_gather(own_keys, group)
            all_valid = dk.all_gather(valid, group)
            new_banks[head.name] = dk.push_to_bank(bank, all_keys, all_valid[:, None])

        terms["overlap"] = dk.intersect_views(*views).valid.double().mean()
        return loss, terms, new_banks


# ==== evaluation ==================================================================================
LEVEL = 2  # C4, as in the paper's figures
PICTURE = (224, 224)  # Height and width of each panel.
IOUS = [i / 10 for i in range(11)]


class Matches(NamedTuple):
    """Similarity of the S x S patches of two views."""

    affinity: Tensor  # (b, S S, S S): patches of view 1 by patches of view 2
    nearest: Tensor  # (b, S S): for each patch of view 2 the most similar patch of view 1
    valid: Tensor  # (b,): whether the views overlap


@torch.no_grad()
def evaluate(model: DUPR, preview: tuple, config: Config, run: harness.Run, step: int) -> None:
    """Save pictures of matched patches and of similarity against IoU; on scenes, also probe."""
    model.eval()
    encoder = model.student["encoder"]
    images, views, _ = preview
    maps = [levels(encoder, x)[LEVEL].cpu() for x in images]
    views = [dk.View(view.box.cpu(), view.flip.cpu()) for view in views]

    path = run.picture_path(step)
    matches = match(maps, views, config.patches[LEVEL])
    draw_matches(images, views, matches, path)
    same_patch = torch.arange(matches.nearest.shape[1])
    matched = dk.masked_mean((matches.nearest == same_patch).float(), matches.valid[:, None])
    similarity = measure_similarity(torch.cat(maps), config.seed)
    run.log(step, matched=matched, **similarity)
    draw_similarity(run.rows("matched"), path.with_name("similarity-iou.png"))

    if config.data is None:
        normalize = transforms.Normalize(MEAN, STD)
        device = images[0].device
        score = dk.probe_scenes(lambda x: encoder(normalize(x).to(device)))
        run.log(step, probe_miou=score.miou, prior_miou=score.prior_miou)
    model.train()


def match(maps: list[Tensor], views: list[dk.View], patches: int) -> Matches:
    """Match each patch of view 2 with the patch of view 1 that has the most similar features."""
    pairs = dk.patch_pairs(*maps, *views, patches)
    affinity = dk.affinity_matrix(pairs.features1, pairs.features2)
    return Matches(affinity, affinity.argmax(-2), pairs.valid)


def draw_matches(images: list[Tensor], views: list[dk.View], matches: Matches, path: Path) -> None:
    """A row per image: view 1, view 2, view 2 in the colors of its matches, and affinity (Fig 9).

    The color of a patch tells its place. In the third panel a patch has the color of the patch of
    view 1 that it is matched with.
    """
    count, patches = matches.nearest.shape
    x, y = dk.grid_points(torch.tensor([0.0, 0.0, 1.0, 1.0]), math.isqrt(patches)).unbind(-1)
    colors = torch.stack([x, y, 1 - x], -1)
    own_colors = colors.expand(count, -1, -1)
    matched_colors = colors[matches.nearest]

    overlap = dk.intersect_views(*views)
    affinity = nn.functional.interpolate(matches.affinity[:, None], PICTURE)
    panels = [
        tint_patches(images[0], views[0], overlap, own_colors),
        tint_patches(images[1], views[1], overlap, own_colors),
        tint_patches(images[1], views[1], overlap, matched_colors),
        affinity.expand(-1, 3, -1, -1),
    ]
    save_image(rearrange(panels, "p b c h w -> (b p) c h w"), path, nrow=len(panels))


def tint_patches(images: Tensor, view: dk.View, overlap: dk.Overlap, colors: Tensor) -> Tensor:
    """The images of a view; `colors` (b, S S, 3) tint the S x S patches of the shared region."""
    side = math.isqrt(colors.shape[1])
    points = dk.coordinate_map(view, PICTURE).flatten(1, 2)  # of all pixels, in the whole image
    region = dk.View(overlap.box, torch.zeros_like(overlap.valid))
    column, row = (dk.image_to_view(region, points) * side).floor().long().unbind(-1)
    inside = (column >= 0) & (column < side) & (row >= 0) & (row < side) & overlap.valid[:, None]

    patch = torch.where(inside, row * side + column, 0)
    tints = torch.stack([x[index] for x, index in zip(colors, patch, strict=True)])
    plain = harness.unnormalize(nn.functional.interpolate(images, PICTURE), MEAN, STD)
    gray = plain.mean(1, keepdim=True)
    tinted = 0.4 * gray + 0.6 * rearrange(tints, "b (h w) c -> b c h w", h=PICTURE[0])
    return torch.where(inside.view(-1, 1, *PICTURE), tinted, plain)


def measure_similarity(maps: Tensor, seed: int) -> dict[str, Tensor]:
    """Cosine of the features of a box and of moved copies of it, for each IoU (Eq 8)."""
    boxes = torch.tensor([1 / 3, 1 / 3, 2 / 3, 2 / 3]).expand(len(maps), 1, 4)
    curve = dk.similarity_iou_curve(maps, boxes, ious=IOUS, generator=harness.generator(seed))
    names = [f"similarity_iou_{iou}" for iou in IOUS]
    return dict(zip(names, curve.similarity, strict=True))


def draw_similarity(rows: list[dict], path: Path) -> None:
    """Cosine against IoU, a curve for each checkpoint (Fig 5)."""
    figure = Figure()
    axes = figure.subplots(subplot_kw={"xlabel": "IoU", "ylabel": "cosine (C4)"})
    for row in rows:
        curve = [row[f"similarity_iou_{iou}"] for iou in IOUS]
        axes.plot(IOUS, curve, label=f"step {row['step']}")
    axes.legend()
    figure.savefig(path)


# ==== loop ========================================================================================
def train(config: Config) -> None:
    check(config)
    folder = harness.run_folder("dupr", config)
    with harness.process_group(config.device) as world, harness.Run(folder, config, world) as run:
        device = world.device
        scenes = 4096 if config.preset == "demo" else 0
        source = harness.image_source(config.data, scenes=scenes)
        dataset = TwoViews(source, config)
        # With more keys than images, an image would often meet its own earlier key as a negative.
        harness.check(
            config.bank <= len(source),
            f"--bank is {config.bank}: there are {len(source)} images, give at most as many.",
        )
        steps = config.epochs * harness.batches_per_epoch(len(source), config.batch, world)
        peak_lr = config.lr * config.batch / 256

        torch.manual_seed(config.seed)
        model: Any = DUPR(config)
        if config.norm == "sync":
            model = timm.layers.convert_sync_batchnorm(model)
        model.to(device, memory_format=torch.channels_last)
        model.compile(disable=not config.compile)
        ddp = nn.parallel.DistributedDataParallel(model)

        parameters = model.student.parameters()
        optimizer = torch.optim.SGD(
            parameters, peak_lr, momentum=0.9, weight_decay=config.weight_decay
        )
        banks = model.init_banks(device)
        step = run.resume(model, optimizer, banks=banks)

        batches = partial(
            harness.batches, dataset, world=world, seed=config.seed, workers=config.workers
        )
        preview = next(batches(min(6 * world.size, config.batch), start=0, stop=1))
        if step == 0 and world.is_main:
            evaluate(model, preview, config, run, step)

        bar = harness.progress(
            batches(config.batch, start=step, stop=steps), start=step, stop=steps, world=world
        )
        for images, views, unreadable in bar:
            lr = dk.cosine_schedule(step, steps, start=peak_lr)
            optimizer.param_groups[0].update(lr=lr)
            dk.ema_update(model.teacher, model.student, momentum=config.momentum, buffers="keep")

            # All processes shuffle the images of the keys in the same order.
            order = torch.randperm(config.batch, generator=harness.generator(config.seed, step, 3))
            harness.seed_step(config.seed, step, world.rank)  # for the keys that enter the banks
            with torch.autocast(device.type, torch.bfloat16, config.precision == "bf16"):
                loss, terms, banks = ddp(images, views, banks, order.to(device))

            optimizer.zero_grad()
            loss.backward()
            # An infinite norm clips nothing; the gradient norm is only measured.
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
            # The run ends here when a value is not finite, before the weights are touched.
            values = run.reduce(step, {"loss": loss, "grad_norm": grad_norm, **terms})
            optimizer.step()
            step += 1

            run.note_unreadable(unreadable)
            harness.show(bar, values, ("image5", "patch4", "patch5"))
            if step % config.log_every == 0:
                run.log(step, **values, lr=lr, unreadable=run.unreadable)

            due = step % config.save_every == 0 or step == steps
            stop = run.stop_requested()
            if due and world.is_main:
                evaluate(model, preview, config, run, step)
            if due or stop:
                run.save(step, model, optimizer, banks=banks)
            if stop:
                return

        if world.is_main:
            only_image5 = not any(config.alpha[:3]) and not any(config.beta)
            method = "mocov2" if only_image5 else "dupr"
            harness.save_encoder(
                folder / "encoder.safetensors",
                model.student["encoder"],
                architecture=config.arch,
                mean=MEAN,
                std=STD,
                method=method,
                step=step,
            )
            line = "step {step:4} (0: random): probe mIoU {probe_miou:.3f}, prior {prior_miou:.3f}"
            for row in run.rows("probe_miou"):
                print(line.format(**row))
