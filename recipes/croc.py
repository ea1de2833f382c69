"""CrOC pre-training: clusters, found online in both views at once, have to agree (CVPR 2023).

    python recipes/croc.py                      # the demo: minutes on a CPU
    python recipes/croc.py --data FOLDER        # the demo's model on your images
    torchrun --nproc-per-node 8 -- recipes/croc.py --preset coco --data coco/train2017

Run the same command again to resume. `--preset dino` is the baseline, without the clusters'
loss. Logged values, deviations from the paper, time and results: docs/recipes/croc.md.
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
    # Set of defaults; each option below overrides one of them.
    preset: Literal["demo", "coco", "imagenet", "dino"] = "demo"
    data: Path | None = None  # Folder of images, also in its subfolders; the demo can run without.
    run: Path | None = None  # Run folder; by default runs/croc-PRESET[-NAME OF DATA].
    arch: str = "vit_small_patch16_224"  # A ViT of timm, or "tiny" (96 channels, patches of 8).
    # Weights to start from: timm:NAME, torchvision:NAME, lite0, a file, a run folder; without them
    # the network is random.
    weights: str | None = None
    freeze: int = 0  # Keep the stem and this many stages, or blocks of a ViT, as they start.
    # Width of the MLP, prototypes for images, and prototypes for clusters.
    head: tuple[int, int, int] = (2048, 65536, 8192)
    alpha: float = 1.0  # Weight of the clusters' loss.
    # Tokens to cluster: of the last block's attention, or its output (last).
    tokens: Literal["values", "keys", "queries", "last"] = "values"
    # Weight of a token: the attention of [CLS] to it, or its cosine to [CLS].
    token_weights: Literal["attention", "cosine"] = "attention"
    start: int = 12  # Number of tokens that the clusters start from, K_start.
    # Largest number of clusters; by default that of the start tokens.
    max_clusters: int | None = None
    position: float = 4.0  # Weight of the positional cost, lambda_pos; inf is this cost alone.
    # The cost has the range of each image and head alone (problem), or that of the whole batch.
    cost_range: Literal["problem", "batch"] = "problem"
    # Similarity of the clusters that are merged: cosine, or dot product of the mean tokens.
    similarity: Literal["cosine", "dot"] = "cosine"
    # What a merged cluster is: the average of both, or their average by mass.
    merge: Literal["average", "mass"] = "average"
    # Cost by which the number of clusters is chosen: that of the transport, or Eq 13's (semantic).
    choose_by: Literal["cost", "semantic"] = "cost"
    # Assignments are normalized for each token (rows), or for each cluster and view (columns).
    normalize: Literal["rows", "columns"] = "rows"
    # Tokens of a centroid: the cluster's own (hard), or all by their assignments (soft, Eq 2).
    pooling: Literal["hard", "soft"] = "hard"
    # Temperature of the teacher at the start and at the end, and the epochs between them.
    teacher_temperature: tuple[float, float, float] = (0.07, 0.07, 30.0)
    batch: int = 256  # Images per step, over all processes.
    epochs: int = 300  # Passes over the images.
    lr: float = 5e-4  # Learning rate for a batch of 256; it is scaled with the batch.
    warmup: float = 10.0  # Epochs in which the learning rate rises.
    weight_decay: tuple[float, float] = (0.04, 0.4)  # Weight decay at the start and at the end.
    momentum: float = 0.996  # Momentum of the teacher at the start; it rises to 1.
    drop_path: float = 0.1  # Share of the student's residual branches that are dropped.
    clip: float = 3.0  # Largest gradient norm of each parameter; 0 clips nothing.
    freeze_last: float = 1.0  # Epochs in which the last layers of the head stay as they are.
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
    views: Views = field(default_factory=Views)  # The two views of each image.


PRESETS = {
    "demo": Config(
        arch="tiny", head=(256, 512, 512), tokens="keys", teacher_temperature=(0.02, 0.02, 0.0),
        batch=40, epochs=5, lr=4e-3, warmup=1.0, weight_decay=(0.04, 0.04), momentum=0.99,
        drop_path=0.0, workers=1, precision="fp32", save_every=85,  # six times in 510 steps
        views=Views(size=64, scale=(0.5, 1.0), hue=0.5, blur=(0.1, 1.0)),
    ),
    "coco": Config("coco"),  # the defaults of Config
    "imagenet": Config("imagenet", tokens="keys", batch=1024, position=3.0),
    "dino": Config("dino", alpha=0.0),
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
from downstream import colors, encoders, health, scene_probe
from downstream.crops import as_bytes, as_picture, crop_bytes
from einops import rearrange, repeat
from timm.layers import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Attention, init_weights_vit_timm
from torch import Tensor, nn
from torchvision.ops import MLP
from torchvision.transforms import v2 as transforms
from torchvision.utils import save_image
import densekit as dk
from densekit import viz


def check_options(config: Config) -> None:
    """Raise a UserError of one sentence for a wrong option, before any data is read."""
    harness.check_training(config)

    encoders.check_start(config)
    arch = encoders.architecture_of(config)
    encoder = build_encoder(arch, drop_path=0.0, option=encoders.option_of(config))
    size = config.views.size
    encoders.check_side("--views.size", size, encoder, arch)
    tokens = 2 * (size // encoder.patch_embed.patch_size[0]) ** 2  # of both views
    width, image_prototypes, cluster_prototypes = config.head
    enough_prototypes = image_prototypes >= 2 and cluster_prototypes >= 2
    harness.check(
        width >= 8 and enough_prototypes,  # the MLP ends in width // 8
        f"--head is {harness.as_typed(config.head)}: give a width of 8 or more, and 2 prototypes "
        "or more of each kind.",
    )
    harness.check_finite("--alpha", config.alpha)
    harness.check(
        2 <= config.start <= tokens,
        f"--start is {config.start}: give a number from 2 to {tokens}, the tokens of both views.",
    )
    most = config.max_clusters
    harness.check(
        most is None or 2 <= most <= config.start,
        f"--max-clusters is {most}: give a number from 2 to {config.start}, that of the start "
        "tokens, or leave it out.",
    )
    harness.check(
        config.position >= 0,
        f"--position is {config.position}: give 0 or more; inf is the positional cost alone.",
    )
    start, end, ramp_epochs = config.teacher_temperature
    harness.check(
        0 < start < math.inf and 0 < end < math.inf and 0 <= ramp_epochs < math.inf,
        f"--teacher-temperature is {harness.as_typed(config.teacher_temperature)}: give two finite "
        "temperatures above 0, and a finite number of epochs, 0 or more.",
    )

    harness.check_finite("--warmup", config.warmup)
    start, end = config.weight_decay
    harness.check(
        0 <= start < math.inf and 0 <= end < math.inf,
        f"--weight-decay is {harness.as_typed(config.weight_decay)}: give two finite numbers, 0 or "
        "more.",
    )
    momentum = config.momentum
    harness.check(
        0 <= momentum < 1, f"--momentum is {momentum}: give a number from 0 to less than 1."
    )
    harness.check(
        0 <= config.drop_path < 1,
        f"--drop-path is {config.drop_path}: give a share from 0 to less than 1.",
    )
    harness.check(
        config.clip >= 0, f"--clip is {config.clip}: give a norm above 0, or 0 to clip nothing."
    )
    harness.check_finite("--freeze-last", config.freeze_last)


# ==== views =======================================================================================
def photometric(
    view_config: Views, *, blur_probability: float, solarize_probability: float
) -> transforms.Compose:
    """DINO's random changes of a crop's colors and sharpness."""
    jitter = colors.ColorJitter(0.4, 0.4, 0.2, view_config.hue)
    blur = colors.RandomBlur(view_config.blur)

    return transforms.Compose(
        [
            as_picture,  # PIL is the quickest on a CPU, and DINO blurs with it
            transforms.RandomApply([jitter], p=0.8),
            colors.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=blur_probability),
            transforms.RandomSolarize(128, p=solarize_probability),
            as_bytes,
        ]
    )


class TwoViews:
    """Two augmented crops of each image, and the `View` of each crop.

    `source` is from `harness.image_source`. `dataset[epoch, index]` is one image: its crops, of 8
    bits, their views, its index, and the files that could not be read.
    """

    def __init__(self, source, config: Config):
        self.source = source
        self.seed = config.seed
        self.view_config = config.views
        self.photometric = [  # one for each view, as in DINO
            photometric(config.views, blur_probability=1.0, solarize_probability=0.0),
            photometric(config.views, blur_probability=0.1, solarize_probability=0.2),
        ]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        image, unreadable = self.source[index]
        size = tuple(image.shape[-2:])

        generator = harness.generator(self.seed, epoch, index)
        pairs = dk.sample_view_pairs(size, scale=self.view_config.scale, generator=generator)
        views = (pairs.view1, pairs.view2)
        if epoch == 0:
            dk.check_views(dk.stack_views(views), size)

        side = self.view_config.size
        crops = [crop_bytes(image, view, side, "bicubic") for view in views]
        # The colors need other random numbers than the views.
        with harness.seeded(self.seed, epoch, index, harness.COLORS):
            augments_and_crops = zip(self.photometric, crops, strict=True)
            augmented = tuple(augment(crop) for augment, crop in augments_and_crops)
        return augmented, views, torch.tensor(index), list(unreadable)


# ==== model =======================================================================================
# The attention that `attend` can take apart: that of most ViTs, and those with rotary embeddings.
PLAIN_ATTENTION = (Attention, EvaAttention, getattr(timm.layers, "AttentionRope", Attention))


def build_encoder(arch: str, drop_path: float, option: str | None = None) -> Any:
    """A ViT of timm, whose last block `encode` can take apart.

    `option` begins the sentence about any other network.
    """
    name = "tiny-vit" if arch == "tiny" else arch
    sentence = (
        f"{option or f'--arch is {arch}'}: give a ViT of timm, such as vit_small_patch16_224, or "
        "tiny"
    )
    try:
        encoder = encoders.build(name, drop_path_rate=drop_path)
        attention = encoder.blocks[-1].attn
    except (AttributeError, TypeError, harness.UserError) as error:
        # timm does not know the network, or the network has no such parts.
        raise harness.UserError(f"{sentence}.") from error
    harness.check(
        type(attention) in PLAIN_ATTENTION,
        f"{sentence}; the last block of this network gives no queries, keys and values of all "
        "tokens.",
    )
    harness.check(
        getattr(encoder, "cls_token", None) is not None,
        f"{sentence}; this network has no [CLS] token.",
    )
    return encoder


# What is drawn for an image: which paths are dropped, and the start tokens.
PATHS = 1
START = 2


def encode(encoder: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The final tokens; queries, keys and values of the last block (Eq 21).

    The shapes are (2b, 1 + n, d) and three times (2b, heads, 1 + n, d), with [CLS] first. Registers
    are left out.
    """
    # This is timm's forward_features, up to the last block.
    embedded = encoder._pos_embed(encoder.patch_embed(images))
    x, rotations = embedded if isinstance(embedded, tuple) else (embedded, None)
    if hasattr(encoder, "norm_pre"):
        x = encoder.norm_pre(x)
    of_block = [{}] * len(encoder.blocks)
    if rotations is not None:
        is_mixed = getattr(encoder, "rope_mixed", False)  # each block then has rotations of its own
        of_block = [{"rope": rotations[i] if is_mixed else rotations} for i in range(len(of_block))]
    for block, rotation in zip(encoder.blocks[:-1], of_block[:-1], strict=True):
        x = block(x, **rotation)

    last = encoder.blocks[-1]
    rows = attend(last.attn, last.norm1(x), **of_block[-1])
    queries, keys, values = [drop_registers(encoder, x, axis=2) for x in rows]
    tokens = encoder.norm(last(x, **of_block[-1]))
    return drop_registers(encoder, tokens), queries, keys, values


def attend(attention: Any, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of an attention of timm, as it compares them, (b, heads, n, d)."""
    if attention.qkv is None:
        parts = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
        qkv = torch.cat(parts, -1)
    elif getattr(attention, "q_bias", None) is not None:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        qkv = nn.functional.linear(x, attention.qkv.weight, bias)
    else:
        qkv = attention.qkv(x)
    split = rearrange(qkv, "b n (s heads d) -> s b heads n d", s=3, heads=attention.num_heads)
    queries, keys, values = split.unbind(0)
    queries = attention.q_norm(queries)
    keys = attention.k_norm(keys)
    if rope is not None:
        # Patches are rotated by their places; [CLS] and registers have none.
        halves = {"half": True} if getattr(attention, "rotate_half", False) else {}
        count = attention.num_prefix_tokens
        queries, keys = [
            torch.cat([x[:, :, :count], apply_rot_embed_cat(x[:, :, count:], rope, **halves)], 2)
            for x in (queries, keys)
        ]
    return queries.type_as(values), keys.type_as(values), values


def drop_registers(encoder: Any, tokens: Tensor, axis: int = 1) -> Tensor:
    """[CLS] and the patches, without the tokens between them that some ViTs have."""
    count = encoder.num_prefix_tokens
    if count == 1:
        return tokens
    patches = tokens.narrow(axis, count, tokens.shape[axis] - count)
    return torch.cat([tokens.narrow(axis, 0, 1), patches], axis)


def grid_side(tokens: Tensor) -> int:
    """The number of patches along each side of a square view."""
    return math.isqrt(tokens.shape[1] - 1)  # one token is [CLS]


def to_map(tokens: Tensor) -> Tensor:
    """The patch tokens of a square view, without [CLS], as a (b, d, h, w) map."""
    side = grid_side(tokens)
    return dk.rows_to_map(tokens[:, 1:], (side, side))


def attention_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """The attention of [CLS] to every token, (2b, heads, tokens)."""
    scores = queries[:, :, :1] @ keys.mT / queries.shape[-1] ** 0.5
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=dtype)[:, :, 0]


def cosine_weights(tokens: Tensor) -> Tensor:
    """The exponential of half the cosine of [CLS] and every token, as in the authors' program.

    The clustering scales the weights of the tokens that it gets, so that they sum to 1.
    """
    cosines = dk.l2_normalize(tokens[:, :, :1]) @ dk.l2_normalize(tokens).mT
    return (cosines / 2).exp()[:, :, 0]


def join_views(x: Tensor) -> Tensor:
    """Tokens, or their weights, of the patches of both views: view 1 first, without [CLS]."""
    return rearrange(x[:, :, 1:], "(v b) h n ... -> b h (v n) ...", v=2)


def pool_clusters(tokens: Tensor, masks: Tensor) -> Tensor:
    """Mean token of each cluster, brought to the mean length of the batch's [CLS] tokens."""
    # Both kinds of rows pass through one MLP, and need one scale. Each process has as many images.
    own_length = tokens[:, 0].detach().norm(dim=-1).mean()
    length = dk.all_mean(own_length, torch.distributed.group.WORLD)
    centroids = dk.pool_masks(tokens[:, 1:], masks, average=True)
    return dk.l2_normalize(centroids) * length


class CrOC(nn.Module):
    """Student and teacher. Each is an encoder with a head: an MLP and two last layers (Fig 2)."""

    def __init__(self, config: Config, initial: encoders.Start | None = None):
        super().__init__()
        initial = initial or encoders.read_start(config)
        self.mean = initial.mean
        self.std = initial.std
        self.config = config
        width, image_prototypes, cluster_prototypes = config.head
        encoder = build_encoder(initial.architecture, config.drop_path)
        if initial.weights is not None:
            encoder.load_state_dict(initial.weights)

        # Images and clusters share the MLP, and each kind has a last layer of its own. The buffer
        # that has the name of a kind is the center of the teacher's outputs.
        last = nn.ModuleDict({"image": nn.Linear(width // 8, image_prototypes, bias=False)})
        self.register_buffer("image", torch.zeros(image_prototypes))
        if config.alpha:
            last["cluster"] = nn.Linear(width // 8, cluster_prototypes, bias=False)
            self.register_buffer("cluster", torch.zeros(cluster_prototypes))
        mlp = MLP(encoder.num_features, [width, width, width // 8], activation_layer=nn.GELU)
        mlp.apply(init_weights_vit_timm)
        last.apply(init_weights_vit_timm)

        self.student = nn.ModuleDict({"encoder": encoder, "mlp": mlp, "last": last})
        self.teacher = copy.deepcopy(self.student)
        self.teacher.requires_grad_(False)
        for module in self.teacher.modules():
            if isinstance(module, timm.layers.DropPath):
                module.drop_prob = 0.0  # only the student drops paths
        self.drop_paths = encoders.replace_drop_paths(self.student)

    def project(self, network: nn.ModuleDict, rows: Tensor, kind: str) -> Tensor:
        """Cosine of each row's embedding and each prototype; `kind` is "image" or "cluster"."""
        embeddings = network["mlp"](rows)
        prototypes = network["last"][kind].weight
        # Cosines in bf16 are too coarse to be divided by the temperature.
        with torch.autocast(rows.device.type, enabled=False):
            return dk.l2_normalize(embeddings) @ dk.l2_normalize(prototypes).mT

    def encode_student(self, pixels: Tensor, seeds: Tensor) -> Tensor:
        """The final tokens of the student, which drops paths by the seed of each image."""
        noise = harness.noise(seeds, (2, len(self.drop_paths)), PATHS)
        by_path = rearrange(noise, "b v paths -> paths (v b)")
        for drop_path, own_noise in zip(self.drop_paths, by_path, strict=True):
            drop_path.noise = own_noise
        encoder = self.student["encoder"]
        tokens = drop_registers(encoder, encoder.forward_features(pixels))
        for drop_path in self.drop_paths:
            drop_path.noise = None
        return tokens

    def find_clusters(
        self,
        tokens: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        views: list[dk.View],
        seeds: Tensor,
    ) -> tuple[Tensor, dk.PrunedClusters]:
        """The chosen number of clusters, and the clusters of both views together (Sec 3.3).

        Each attention head has clusters of its own. The start tokens of each image follow from its
        seed.
        """
        config = self.config
        choices = {"queries": queries, "keys": keys, "values": values, "last": tokens[:, None]}
        chosen = choices[config.tokens]  # (2b, heads, tokens, d)
        if config.token_weights == "cosine":
            weights = cosine_weights(chosen)
        else:
            weights = attention_weights(queries, keys)
            if config.tokens == "last":  # these are clustered once, not for each head
                weights = weights.mean(1, keepdim=True)

        # z, r and their positions in Eq 8 are of both views.
        z = join_views(chosen)  # (b, heads, tokens of both views, d)
        r = join_views(weights)  # (b, heads, tokens of both views)
        size = (grid_side(tokens), grid_side(tokens))
        view_positions = [dk.coordinate_map(view, size).flatten(1, 2) for view in views]
        positions = repeat(torch.cat(view_positions, 1), "b n xy -> b heads n xy", heads=z.shape[1])

        noise = harness.noise(seeds, r.shape[1:], START)
        start = dk.sample_tokens(r, config.start, noise=noise)
        found = dk.sinkhorn_merge(
            z,
            positions,
            r,
            start,
            position_weight=config.position,
            max_clusters=config.max_clusters,
            similarity=config.similarity,
            merge=config.merge,
            cost_range=config.cost_range,
            choose_by=config.choose_by,
        )
        soft = dk.split_assignments(found.assignments, normalize=config.normalize)
        pruned = dk.prune_clusters(soft)
        if config.pooling == "soft":  # each token also keeps its part in the other clusters
            kept = torch.where(pruned.valid[..., None, None, :], soft, 0.0)
            pruned = pruned._replace(assignments=kept)
        return found.clusters, pruned

    # ==== loss ====================================================================================
    def forward(
        self, images: list[Tensor], views: list[dk.View], temperature: float, seeds: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, and the terms that are logged.

        The dropped paths and the start tokens of each image follow from its seed.
        """
        pixels = torch.cat(images)
        student_tokens = self.encode_student(pixels, seeds)
        teacher_tokens, queries, keys, values = encode(self.teacher["encoder"], pixels)

        loss, terms = self.distill("image", student_tokens[:, 0], teacher_tokens[:, 0], temperature)
        if not self.config.alpha:
            return loss, terms

        counts, pruned = self.find_clusters(teacher_tokens, queries, keys, values, views, seeds)
        # The clusters of all heads are on one axis. Both views have the same clusters.
        masks = rearrange(pruned.assignments, "b heads v n k -> (v b) n (heads k)")
        valid = repeat(pruned.valid, "b heads k -> (v b) (heads k)", v=2)
        student_rows = pool_clusters(student_tokens, masks)
        teacher_rows = pool_clusters(teacher_tokens, masks)
        # What is not valid is masked, not left out: the shapes do not depend on the clusters.
        cluster_loss, cluster_terms = self.distill(
            "cluster", student_rows, teacher_rows, temperature, valid
        )

        terms |= cluster_terms
        terms["clusters"] = counts.double().mean()
        terms["valid"] = valid.double().sum(1).mean()
        return loss + self.config.alpha * cluster_loss, terms

    def distill(
        self,
        kind: str,
        student_rows: Tensor,
        teacher_rows: Tensor,
        temperature: float,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """DINO's loss of one kind of rows (Eq 4 and 6).

        The rows of view 1 come first, then equally many of view 2, of which the same are `valid`.
        Afterwards the center moves towards the mean of the teacher's outputs.
        """
        group = torch.distributed.group.WORLD
        student_outputs = self.project(self.student, student_rows, kind)
        teacher_outputs = self.project(self.teacher, teacher_rows, kind)
        center = self.get_buffer(kind)
        row_losses = dk.symmetric_loss(
            dk.self_distillation,
            student_outputs.tensor_split(2),
            teacher_outputs.tensor_split(2),
            center=center,
            student_temperature=0.1,
            teacher_temperature=temperature,
            reduction="none",
        )
        # The means are over the rows of all processes, which may have different numbers of them.
        valid_pairs = None if valid is None else valid.tensor_split(2)[0]
        loss = dk.masked_mean(row_losses, valid_pairs, group=group)

        # The loss is a sum: the entropy of the teacher, and the divergence of the student from the
        # teacher. The cross-entropy of a distribution with itself is its entropy.
        sharpened = (teacher_outputs - center) / temperature
        row_entropies = dk.cross_entropy_similarity(sharpened, sharpened, reduction="none")
        entropy = dk.masked_mean(row_entropies, valid, group=group)
        terms = {kind: loss, f"{kind}_entropy": entropy, f"{kind}_kl": loss.detach() - entropy}

        center.copy_(dk.update_center(center, teacher_outputs, valid, momentum=0.9, group=group))
        return loss, terms


# ==== evaluation ==================================================================================
PANEL_SIDE = 224  # Side of a panel of the picture, in pixels.


@torch.no_grad()
def evaluate(model: CrOC, preview: tuple, config: Config, run: harness.Run, step: int) -> None:
    """Save a picture of the preview's images. Without --data, also probe the teacher's encoder."""
    images, views, indices, _ = preview
    seeds = harness.image_seeds(config.seed, step, indices)
    draw(model, images, views, seeds, run.picture_path(step))

    if config.data is None:
        normalize = transforms.Normalize(model.mean, model.std)
        device = images[0].device

        def features(scenes: Tensor) -> Tensor:
            tokens, *_ = encode(model.teacher["encoder"], normalize(scenes).to(device))
            return to_map(tokens)

        run.log(step, **scene_probe.probe(features, run.picture_path(step, "probe")))


def draw(
    model: CrOC, images: list[Tensor], views: list[dk.View], seeds: Tensor, path: Path
) -> None:
    """A row per image: for each of its views the crop, the clusters of three heads, PCA colors."""
    pixels = torch.cat(images)
    tokens, queries, keys, values = encode(model.teacher["encoder"], pixels)
    maps = to_map(tokens).cpu()
    _, pruned = model.find_clusters(tokens, queries, keys, values, views, seeds)

    # The tokens of pruned clusters are black.
    own_cluster = pruned.labels.clamp(min=0)  # without any assignment the label is -1
    kept = pruned.assignments.gather(-1, own_cluster[..., None])[..., 0] > 0
    colors = viz.label_colors(torch.where(kept, own_cluster, -1).cpu())
    head_maps = rearrange(colors, "b heads v (h w) c -> heads (v b) c h w", h=grid_side(tokens))

    pictures = harness.unnormalize(pixels, model.mean, model.std)
    panels = [pictures, *head_maps[:3], dk.pca_colors(maps)]
    tiles = [nn.functional.interpolate(x, PANEL_SIDE) for x in panels]
    rows = rearrange(tiles, "p (v b) c h w -> (b v p) c h w", v=2)
    save_image(rows, path, nrow=2 * len(panels))


# ==== loop ========================================================================================
def clip_each(parameters: list[nn.Parameter], largest_norm: float) -> Tensor:
    """Clip the gradient of each parameter by itself; the norm of all of them before.

    It does what `clip_grad_norm_` does to one parameter after the other, with fewer calls.
    """
    gradients = [x.grad for x in parameters if x.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    shares = (largest_norm / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, shares.unbind())
    return norms.norm()


def train(config: Config) -> None:
    check_options(config)
    initial = encoders.read_start(config)
    folder = harness.run_folder("croc", config)
    group = harness.process_group(config.device, config.collective_timeout, fixed_shapes=True)
    with group as world, harness.Run(folder, config, world) as run:
        device = world.device
        patience = harness.Patience(config.warn_after, config.give_up_after)
        scenes = 4096 if config.preset == "demo" else 0  # the other presets need --data
        source = harness.image_source(
            config.data, scenes=scenes, value_range=config.value_range, patience=patience
        )
        dataset = TwoViews(source, config)
        steps_per_epoch = harness.batches_per_epoch(len(source), config.batch, world)
        steps = config.epochs * steps_per_epoch
        peak_lr = config.lr * config.batch / 256
        end_lr = min(1e-6, peak_lr)
        warmup_steps = min(config.warmup, config.epochs) * steps_per_epoch

        torch.manual_seed(config.seed)
        model = CrOC(config, initial)
        encoders.freeze(model.student["encoder"], config.freeze)
        encoders.freeze(model.teacher["encoder"], config.freeze)
        model.to(device)
        model.compile(disable=not config.compile)
        ddp = nn.parallel.DistributedDataParallel(model)

        parameters = list(model.student.parameters())
        largest_norm = config.clip or math.inf  # an infinite norm clips nothing
        decayed = [x for x in parameters if x.ndim >= 2]
        not_decayed = [x for x in parameters if x.ndim < 2]  # biases and norms
        optimizer = torch.optim.AdamW([{"params": decayed}, {"params": not_decayed}], peak_lr)
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
            evaluate(model, preview, config, run, step)
        run.wait()

        method = "croc" if config.alpha else "dino"
        facts = {**initial.side_car(), "method": method}
        kept = harness.kept_epochs(config, steps_per_epoch)

        training_batches = batches(config.batch, start=step, stop=steps)
        bar = harness.progress(training_batches, start=step, stop=steps, world=world)
        for images, views, indices, unreadable in bar:
            lr = dk.warmup_cosine(step, steps, peak=peak_lr, warmup=warmup_steps, end=end_lr)
            start, end = config.weight_decay
            weight_decay = dk.cosine_schedule(step, steps, start=start, end=end)
            optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay)
            optimizer.param_groups[1].update(lr=lr, weight_decay=0.0)

            start, end, ramp_epochs = config.teacher_temperature
            ramp_steps = ramp_epochs * steps_per_epoch
            temperature = dk.linear_schedule(step, ramp_steps, start=start, end=end)

            # For start tokens and dropped paths.
            seeds = harness.image_seeds(config.seed, step, indices)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, terms = ddp(images, views, temperature, seeds)

            optimizer.zero_grad()
            loss.backward()
            # Each parameter is clipped by itself, as in DINO.
            grad_norm = clip_each(parameters, largest_norm)
            run.record(step, {"loss": loss, "grad_norm": grad_norm, **terms})
            if step < config.freeze_last * steps_per_epoch:
                # Without a gradient, the optimizer leaves the last layers as they are.
                model.student["last"].zero_grad()
            optimizer.step()
            momentum = dk.cosine_schedule(step, steps, start=config.momentum, end=1.0)
            dk.ema_update(model.teacher, model.student, momentum=momentum)
            step += 1

            run.note_unreadable(unreadable)
            # The device is waited for here alone. The run ends if a value was not finite.
            if step % config.log_every == 0:
                values = run.take_means()
                harness.show(bar, values, ("image", "cluster"))
                run.log(step, **values, **monitor.measure(), lr=lr, unreadable=run.unreadable)
                monitor.warn(step)

            due = step % config.save_every == 0 or step in kept or step == steps
            if due:
                run.check()  # what follows a bad value is neither shown nor saved
                run.log(step, **monitor.measure_all())
                monitor.warn(step)
            stop = run.stop_requested()
            if due and world.is_main:
                evaluate(model, preview, config, run, step)
            if due or stop:
                run.save(
                    step,
                    model,
                    optimizer,
                    encoder=model.teacher["encoder"],
                    facts=facts,
                    epoch=kept.get(step),
                )
            if stop:
                return

        if world.is_main:
            harness.print_probes(run)
