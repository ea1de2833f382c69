"""CrOC pre-training: clusters found online in both views at once agree (CVPR 2023).

    python recipes/croc.py                      # the demo: CPU, minutes; --data FOLDER: your images
    torchrun --nproc-per-node 8 -- recipes/croc.py --preset coco --data coco/train2017

The same command run again resumes. `--preset dino` is the baseline: the clusters' weight is 0.
Logged values, deviations from the paper, time and results: docs/recipes/croc.md.
"""

import argparse
import copy
import math
import sys
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
    hue: float = 0.1  # Strength of the hue jitter; 0.5 allows every hue.
    blur: tuple[float, float] = (0.1, 2.0)  # Standard deviation of the blur, in pixels.


@dataclass(frozen=True)
class Config:
    preset: Literal["demo", "coco", "imagenet", "dino"] = "demo"  # The preset of the defaults.
    data: Path | None = None  # Folder of images, at any depth; the demo also runs without one.
    run: Path | None = None  # Run folder; by default runs/croc-PRESET[-NAME OF DATA].
    arch: str = "vit_small_patch16_224"  # A ViT of timm, or "tiny" (96 channels, patches of 8).
    head: tuple[int, int, int] = (2048, 65536, 8192)  # Width, outputs for images, and for clusters.
    alpha: float = 1.0  # Weight of the clusters' loss.
    tokens: Literal["values", "keys", "queries", "last"] = "values"  # The tokens to cluster.
    token_weights: Literal["attention", "cosine"] = "attention"  # Measure of similarity to [CLS].
    start: int = 12  # K_start, the tokens that the clusters start from.
    position: float = 4.0  # Weight of the positional cost, lambda_pos.
    # The teacher's temperature at first and at last, and the epochs in which it changes.
    teacher_temperature: tuple[float, float, float] = (0.07, 0.07, 30.0)
    batch: int = 256  # Images per step, over all processes.
    epochs: int = 300
    lr: float = 5e-4  # Learning rate for a batch of 256; it is scaled with the batch.
    warmup: float = 10.0  # Epochs in which the learning rate rises.
    weight_decay: tuple[float, float] = (0.04, 0.4)  # Weight decay at the start and at the end.
    momentum: float = 0.996  # Momentum of the teacher at the start; it rises to 1.
    drop_path: float = 0.1  # Share of the student's residual branches that are dropped.
    clip: float = 3.0  # Largest gradient norm of each parameter.
    freeze: float = 1.0  # Epochs in which the last layers of the heads stay as they are.
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
        arch="tiny", head=(256, 512, 512), tokens="keys", batch=40, epochs=5, lr=4e-3, warmup=1.0,
        momentum=0.99, teacher_temperature=(0.02, 0.02, 0.0), weight_decay=(0.04, 0.04), workers=1,
        drop_path=0.0, precision="fp32", save_every=85, views=Views(64, (0.5, 1), 0.5, (0.1, 1)),
    ),
    "coco": Config("coco"),
    "imagenet": Config("imagenet", tokens="keys", batch=1024, position=3.0),
    "dino": Config("dino", alpha=0.0),
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
    import croc
    import harness

    sys.exit(harness.main(croc.train, options))

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
import densekit as dk


def check(config: Config) -> None:
    """Answer an option that makes no sense with one sentence, before any data is read."""
    harness.check_training(config)

    encoder = build_encoder(config.arch, 0.0)  # which checks --arch
    size = config.views.size
    patch = encoder.patch_embed.patch_size[0]
    tokens = 2 * (size // patch) ** 2  # of both views
    harness.check(
        size % patch == 0,
        f"--views.size is {size}: give a multiple of {patch}, the side of a patch.",
    )
    harness.check(
        2 <= config.start <= tokens,
        f"--start is {config.start}: give a number from 2 to {tokens}, the tokens of both views.",
    )

    width, image_outputs, cluster_outputs = config.head
    harness.check(
        width >= 8 and image_outputs >= 2 and cluster_outputs >= 2,
        f"--head is {harness.as_typed(config.head)}: give a width of 8 or more, and two numbers of "
        "outputs that are 2 or more.",
    )
    first, last, epochs = config.teacher_temperature
    harness.check(
        0 < first < math.inf and 0 < last < math.inf and 0 <= epochs < math.inf,
        f"--teacher-temperature is {harness.as_typed(config.teacher_temperature)}: give two "
        "temperatures above 0, and a number of epochs that is 0 or more.",
    )
    start, end = config.weight_decay
    harness.check(
        0 <= start < math.inf and 0 <= end < math.inf,
        f"--weight-decay is {harness.as_typed(config.weight_decay)}: give two finite numbers, 0 or "
        "more.",
    )

    for name in ("alpha", "position", "warmup", "freeze"):
        value = getattr(config, name)
        harness.check(
            0 <= value < math.inf, f"--{name} is {value}: give a finite number, 0 or more."
        )
    momentum = config.momentum
    harness.check(0 <= momentum <= 1, f"--momentum is {momentum}: give a number from 0 to 1.")
    harness.check(
        0 <= config.drop_path < 1,
        f"--drop-path is {config.drop_path}: give a share from 0 to less than 1.",
    )
    harness.check(config.clip > 0, f"--clip is {config.clip}: give a norm above 0.")


# ==== views =======================================================================================
def photometric(views: Views, *, blurred: float, solarized: float) -> transforms.Compose:
    """DINO's random changes of the colors of one crop, which is then normalized."""
    jitter = transforms.ColorJitter(0.4, 0.4, 0.2, views.hue)
    sigma = torch.distributions.Uniform(*views.blur)

    def blur(image):
        return image.filter(GaussianBlur(float(sigma.sample())))

    return transforms.Compose(
        [
            transforms.ToPILImage(),  # PIL is the quickest on a CPU, and DINO blurs with it
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=blurred),
            transforms.RandomSolarize(128, p=solarized),
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
        self.photometric = [  # one for each view, as in DINO
            photometric(config.views, blurred=1.0, solarized=0.0),
            photometric(config.views, blurred=0.1, solarized=0.2),
        ]

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
            crop = dk.crop_views(pixels, view, self.config.size, interpolation="bicubic")
            crops.append((crop.clamp(0, 1) * 255).round().byte())
        augmented = []
        with harness.seeded(*key, 1):  # the colors need other random numbers than the views
            for change, crop in zip(self.photometric, crops, strict=True):
                augmented.append(torch.stack([change(x) for x in crop]))
        return augmented, views, unreadable


# ==== model =======================================================================================
def build_encoder(arch: str, drop_path: float) -> Any:
    """A plain ViT of timm, whose last block `encode` can take apart."""
    options: Any = {"dynamic_img_size": True, "drop_path_rate": drop_path, "num_classes": 0}
    if arch == "tiny":
        shape = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3}
        return timm.create_model("vit_tiny_patch16_224", **shape, **options)

    sentence = (
        f"--arch is {arch}: give a plain ViT of timm, such as vit_small_patch16_224, or tiny."
    )
    try:
        vit: Any = timm.create_model(arch, **options)
        attention = vit.blocks[-1].attn
        has_plain_attention = type(attention) is Attention and type(attention.q_norm) is nn.Identity
        has_plain_tokens = vit.num_prefix_tokens == 1 and vit.has_class_token
    except (AttributeError, RuntimeError, TypeError) as error:  # unknown, or without such parts
        raise harness.UserError(sentence) from error
    harness.check(has_plain_attention and has_plain_tokens, sentence)
    return vit


def encode(vit, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The final tokens, [CLS] first; queries, keys and values of the last block (Eq 21)."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    for block in vit.blocks[:-1]:
        x = block(x)

    last = vit.blocks[-1]
    qkv = last.attn.qkv(last.norm1(x))
    heads = last.attn.num_heads
    queries, keys, values = rearrange(qkv, "b n (s h d) -> s b h n d", s=3, h=heads).unbind(0)
    tokens = vit.norm(last(x))
    return tokens, queries, keys, values


def to_map(tokens: Tensor) -> Tensor:
    """The patch tokens of a square view, without [CLS], as a (b, d, h, w) map."""
    return rearrange(tokens[:, 1:], "b (h w) d -> b d h w", h=round(tokens.shape[1] ** 0.5))


def attention_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """The attention of [CLS] to every token, (2b, heads, tokens)."""
    scores = queries[:, :, :1] @ keys.mT / queries.shape[-1] ** 0.5
    return scores.float().softmax(-1)[:, :, 0]


def cosine_weights(tokens: Tensor) -> Tensor:
    """The exponential of half the cosine of [CLS] and every token, as in the authors' program."""
    cosines = dk.l2_normalize(tokens[:, :, :1]) @ dk.l2_normalize(tokens).mT
    return (cosines / 2).exp()[:, :, 0]


def join_views(x: Tensor) -> Tensor:
    """The patch tokens of both views of an image, without [CLS], one after the other."""
    return rearrange(x[:, :, 1:], "(v b) h n ... -> b h (v n) ...", v=2)


def pool(tokens: Tensor, weights: Tensor) -> Tensor:
    """Mean token of each cluster, brought to the mean length of the batch's [CLS] tokens."""
    length = tokens[:, 0].detach().norm(dim=-1).mean()  # the heads share an MLP: one scale for both
    centroids = dk.pool_masks(tokens[:, 1:], weights, average=True)
    return dk.l2_normalize(centroids) * length


class CrOC(nn.Module):
    """Student and teacher. Each is an encoder f with DINO's head (Fig 2)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width, image_outputs, cluster_outputs = config.head
        encoder = build_encoder(config.arch, config.drop_path)

        # The two kinds of outputs share the MLP. A buffer is the center of the teacher's outputs.
        last = nn.ModuleDict({"image": nn.Linear(width // 8, image_outputs, bias=False)})
        self.register_buffer("image", torch.zeros(image_outputs))
        if config.alpha:
            last["cluster"] = nn.Linear(width // 8, cluster_outputs, bias=False)
            self.register_buffer("cluster", torch.zeros(cluster_outputs))
        mlp = MLP(encoder.num_features, [width, width, width // 8], activation_layer=nn.GELU)
        head = nn.ModuleDict({"mlp": mlp, "last": last})
        head.apply(init_weights_vit_timm)

        self.student = nn.ModuleDict({"encoder": encoder, **head})
        self.teacher = copy.deepcopy(self.student)
        self.teacher.requires_grad_(False)
        self.teacher.eval()  # the teacher drops no paths

    def head(self, network: nn.ModuleDict, rows: Tensor, kind: str) -> Tensor:
        """Cosine of each row's embedding and each prototype; `kind` is "image" or "cluster"."""
        embeddings = network["mlp"](rows)
        prototypes = network["last"][kind].weight
        with torch.autocast(rows.device.type, enabled=False):  # bf16 is too coarse to be sharpened
            return dk.l2_normalize(embeddings) @ dk.l2_normalize(prototypes).mT

    def locate(
        self, tokens: Tensor, queries: Tensor, keys: Tensor, values: Tensor, views: list[dk.View]
    ) -> tuple[Tensor, dk.PrunedClusters]:
        """K, and the clusters of both views together, for each attention head (Sec 3.3)."""
        kinds = {"queries": queries, "keys": keys, "values": values, "last": tokens[:, None]}
        chosen = kinds[self.config.tokens]  # (2b, heads, tokens, d)
        if self.config.token_weights == "cosine":
            weights = cosine_weights(chosen)
        else:
            weights = attention_weights(queries, keys)
            if self.config.tokens == "last":  # these are clustered once, not for each head
                weights = weights.mean(1, keepdim=True)

        z = join_views(chosen)  # (b, heads, tokens of both views, d)
        r = join_views(weights)
        size = to_map(tokens).shape[-2:]
        centers = [dk.coordinate_map(view, size).flatten(1, 2) for view in views]
        positions = torch.cat(centers, 1)[:, None].expand(*z.shape[:-1], 2)  # for every head
        start = dk.sample_tokens(r, self.config.start)
        found = dk.sinkhorn_merge(z, positions, r, start, position_weight=self.config.position)
        return found.clusters, dk.prune_clusters(dk.split_assignments(found.assignments))

    # ==== loss ====================================================================================
    def forward(
        self, images: list[Tensor], views: list[dk.View], temperature: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, and the terms that are logged."""
        pixels = torch.cat(images)
        student = self.student["encoder"].forward_features(pixels)
        teacher, queries, keys, values = encode(self.teacher["encoder"], pixels)

        loss, terms = self.distill("image", student[:, 0], teacher[:, 0], temperature)
        if not self.config.alpha:
            return loss, terms

        clusters, pruned = self.locate(teacher, queries, keys, values, views)
        weights = rearrange(pruned.assignments, "b h v n k -> (v b) n (h k)")
        valid = pruned.valid.flatten(1).repeat(2, 1)  # the same clusters in both views
        student_rows = pool(student, weights)[valid]
        teacher_rows = pool(teacher, weights)[valid]
        cluster_loss, cluster_terms = self.distill(
            "cluster", student_rows, teacher_rows, temperature
        )

        terms |= cluster_terms
        terms["clusters"] = clusters.double().mean()
        terms["valid"] = valid.double().sum(1).mean()
        return loss + self.config.alpha * cluster_loss, terms

    def distill(
        self, kind: str, student_rows: Tensor, teacher_rows: Tensor, temperature: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """DINO's loss of one kind of rows (Eq 4 and 6); the center moves with the teacher's.

        The rows of view 1 come first, and then those of view 2, as many.
        """
        student = self.head(self.student, student_rows, kind)
        teacher = self.head(self.teacher, teacher_rows, kind)
        center = self.get_buffer(kind)
        loss = dk.symmetric_loss(
            dk.self_distillation,
            student.tensor_split(2),
            teacher.tensor_split(2),
            center=center,
            teacher_temperature=temperature,
        )

        # The loss is the entropy of the teacher's outputs and the student's divergence from them.
        sharpened = (teacher - center) / temperature
        entropy = dk.cross_entropy_similarity(sharpened, sharpened)
        terms = {kind: loss, f"{kind}_entropy": entropy, f"{kind}_kl": loss.detach() - entropy}

        center.copy_(dk.update_center(center, teacher, group=torch.distributed.group.WORLD))
        return loss, terms


# ==== evaluation ==================================================================================
@torch.no_grad()
def evaluate(model: CrOC, preview: tuple, config: Config, run: harness.Run, step: int) -> None:
    """Save a picture of the preview's images; on scenes, also probe the teacher's encoder."""
    images, views, _ = preview
    draw(model, images, views, run.picture_path(step))

    if config.data is None:
        normalize = transforms.Normalize(MEAN, STD)
        device = images[0].device
        vit = model.teacher["encoder"]
        score = dk.probe_scenes(lambda x: to_map(encode(vit, normalize(x).to(device))[0]))
        run.log(step, probe_miou=score.miou, prior_miou=score.prior_miou)


def draw(model: CrOC, images: list[Tensor], views: list[dk.View], path: Path) -> None:
    """A row per image; for each view itself, the clusters of three heads, and PCA colors."""
    pixels = torch.cat(images)
    tokens, queries, keys, values = encode(model.teacher["encoder"], pixels)
    maps = to_map(tokens).cpu()
    _, pruned = model.locate(tokens, queries, keys, values, views)

    palette = torch.rand(99, 3, generator=harness.generator(1493))
    kept = pruned.assignments.sum(-1, keepdim=True).cpu() > 0
    colors = palette[pruned.labels.cpu()] * kept  # the tokens of pruned clusters are black
    heads = rearrange(colors, "b k v (h w) c -> k (v b) c h w", h=maps.shape[-2])[:3]

    panels = [harness.unnormalize(pixels, MEAN, STD), *heads, dk.pca_colors(maps)]
    tiles = [nn.functional.interpolate(x, 224) for x in panels]
    rows = rearrange(tiles, "p (v b) c h w -> (b v p) c h w", v=2)
    save_image(rows, path, nrow=2 * len(panels))


# ==== loop ========================================================================================
def train(config: Config) -> None:
    check(config)
    folder = harness.run_folder("croc", config)
    with harness.process_group(config.device) as world, harness.Run(folder, config, world) as run:
        device = world.device
        scenes = 4096 if config.preset == "demo" else 0
        source = harness.image_source(config.data, scenes=scenes)
        dataset = TwoViews(source, config)
        steps_per_epoch = harness.batches_per_epoch(len(source), config.batch, world)
        steps = config.epochs * steps_per_epoch
        peak_lr = config.lr * config.batch / 256
        warmup = min(config.warmup, config.epochs) * steps_per_epoch

        torch.manual_seed(config.seed)
        model = CrOC(config)
        model.to(device)
        model.compile(disable=not config.compile)
        ddp = nn.parallel.DistributedDataParallel(model)

        parameters = list(model.student.parameters())
        matrices = [x for x in parameters if x.ndim >= 2]
        vectors = [x for x in parameters if x.ndim < 2]  # biases and norms have no weight decay
        optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors}], peak_lr)
        step = run.resume(model, optimizer)

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
            lr = dk.warmup_cosine(step, steps, peak=peak_lr, warmup=warmup, end=1e-6)
            start, end = config.weight_decay
            weight_decay = dk.cosine_schedule(step, steps, start=start, end=end)
            optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay)
            optimizer.param_groups[1].update(lr=lr, weight_decay=0.0)

            first, last, epochs = config.teacher_temperature
            temperature = dk.linear_schedule(step, epochs * steps_per_epoch, start=first, end=last)

            harness.seed_step(config.seed, step, world.rank)  # for start tokens and dropped paths
            with torch.autocast(device.type, torch.bfloat16, config.precision == "bf16"):
                loss, terms = ddp(images, views, temperature)

            optimizer.zero_grad()
            loss.backward()
            # Each parameter is clipped by itself, as in DINO.
            norms = [nn.utils.clip_grad_norm_(x, config.clip) for x in parameters]
            grad_norm = torch.stack(norms).norm()
            # The run ends here when a value is not finite, before the weights are touched.
            values = run.reduce(step, {"loss": loss, "grad_norm": grad_norm, **terms})
            if step < config.freeze * steps_per_epoch:
                model.student["last"].zero_grad()
            optimizer.step()
            momentum = dk.cosine_schedule(step, steps, start=config.momentum, end=1.0)
            dk.ema_update(model.teacher, model.student, momentum=momentum)
            step += 1

            run.note_unreadable(unreadable)
            harness.show(bar, values, ("image", "cluster"))
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
            method = "croc" if config.alpha else "dino"
            harness.save_encoder(
                folder / "encoder.safetensors",
                model.teacher["encoder"],
                architecture=config.arch,
                mean=MEAN,
                std=STD,
                method=method,
                step=step,
            )
            line = "step {step:4} (0: random): probe mIoU {probe_miou:.3f}, prior {prior_miou:.3f}"
            for row in run.rows("probe_miou"):
                print(line.format(**row))
