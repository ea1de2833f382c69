"""DenseSiam pre-training: pixels and regions of two views agree, by location (ECCV 2022).

    python recipes/densesiam.py                 # the demo: minutes on a CPU
    python recipes/densesiam.py --data FOLDER --views.vertical-flip 0   # on your images
    torchrun --nproc-per-node 8 -- recipes/densesiam.py --preset paper --data coco/train2017

Run the same command again to resume. `--preset simsiam` is the baseline, without the dense
losses. Logged values, deviations from the paper, time and results: docs/recipes/densesiam.md.
"""

import argparse
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Views:
    size: int = 224  # Side of the square views, in pixels.
    scale: tuple[float, float] = (0.2, 1.0)  # Share of the image's area that a view covers.
    vertical_flip: float = 0.0  # Probability of a flip top to bottom, where no side is up.
    hue: float = 0.1  # Strength of the hue jitter; 0.5 allows every hue.
    blur: tuple[float, float] = (0.1, 2.0)  # Standard deviation of the blur, in pixels.


@dataclass(frozen=True)
class Loss:
    dense: float = 1.0  # Weight of PixSim.
    region: float = 0.1  # Weight of RegionSim.
    region_start: float = 0.5  # Share of the training after which RegionSim begins.
    grid: int = 7  # PixSim compares grid x grid points of the overlap; 0: no dense loss at all.
    # Distance of PixSim: the cross-entropy of Eq 3, or the negative cosine of Eq 2.
    distance: Literal["cross_entropy_similarity", "negative_cosine"] = "cross_entropy_similarity"
    temperature: float = 0.1  # Temperature of RegionSim's InfoNCE.
    # Order of PixSim's steps (Table 4d).
    order: Literal["project_predict_sample", "project_sample_predict", "sample_project_predict"] = (
        "project_predict_sample"
    )
    pooled: Literal["views", "overlap"] = "views"  # What the global branch pools (Table 4e).
    # Points of the overlap: regular, random, or random with the most dissimilar ones (Table A2).
    points: Literal["grid", "random", "hard"] = "grid"
    candidates: int = 3  # Hard points: candidates for each point, k in Table A2.
    hard_share: float = 0.75  # Hard points: share that are the most dissimilar, beta in Table A2.
    # What PixSim compares: the same points, or what another method would compare (Table A1).
    correspondence: Literal[
        "location", "feature_similarity", "pixel_distance", "candidate_regions"
    ] = "location"


@dataclass(frozen=True)
class Config:
    # Set of defaults; each option below overrides one of them.
    preset: Literal["demo", "paper", "simsiam"] = "demo"
    data: Path | None = None  # Folder of images, also in its subfolders; the demo can run without.
    run: Path | None = None  # Run folder; by default runs/densesiam-PRESET[-NAME OF DATA].
    arch: str = "resnet50"  # A network of timm with maps, or "tiny" (64 channels).
    # Weights to start from: timm:NAME, torchvision:NAME, lite0, a file, a run folder; without them
    # the network is random.
    weights: str | None = None
    freeze: int = 0  # Keep the stem and this many stages, or blocks of a ViT, as they start.
    hidden: int = 2048  # Width of the global projector; its predictor narrows to a quarter.
    categories: int = 512  # Channels of PixSim: its pseudo-categories, the regions of RegionSim.
    batch: int = 512  # Images per step, over all processes.
    epochs: int = 800  # The paper trains 800 epochs on COCO and 200 on ImageNet.
    lr: float = 0.05  # Learning rate for a batch of 256; it is scaled with the batch.
    weight_decay: float = 1e-4  # Weight decay of all parameters.
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
    loss: Loss = field(default_factory=Loss)  # The terms of the loss.


PRESETS = {
    "demo": Config(
        arch="tiny", hidden=256, categories=64, batch=20, epochs=12, lr=0.8, workers=1,
        precision="fp32", save_every=408,
        views=Views(size=48, scale=(0.5, 1.0), vertical_flip=0.5, hue=0.5, blur=(0.1, 1.0)),
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
from downstream.encoders import last_map
from einops import rearrange
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms
from torchvision.utils import save_image
import densekit as dk
from densekit import viz


def check_options(config: Config) -> None:
    """Raise a UserError of one sentence for a wrong option, before any data is read."""
    harness.check_training(config)
    harness.check_finite("--weight-decay", config.weight_decay)
    encoders.check_start(config)
    encoders.check_maps(config, "--views.size", config.views.size)
    harness.check(
        config.hidden >= 4,
        f"--hidden is {config.hidden}: give 4 or more, since the predictor narrows to a quarter.",
    )
    categories = config.categories
    harness.check(categories >= 2, f"--categories is {categories}: give 2 or more.")

    vertical_flip = config.views.vertical_flip
    harness.check(
        0 <= vertical_flip <= 1,
        f"--views.vertical-flip is {vertical_flip}: give a probability from 0 to 1.",
    )

    loss = config.loss
    harness.check_finite("--loss.dense", loss.dense)
    harness.check_finite("--loss.region", loss.region)
    harness.check(
        0 <= loss.region_start <= 1,
        f"--loss.region-start is {loss.region_start}: give a share from 0 to 1.",
    )
    harness.check(loss.grid >= 0, f"--loss.grid is {loss.grid}: give 0 (no dense loss), 1 or more.")
    harness.check_above_zero("--loss.temperature", loss.temperature)
    harness.check(
        loss.grid >= 1 or loss.pooled == "views",
        f"--loss.grid is {loss.grid}: give 1 or more with --loss.pooled overlap.",
    )
    harness.check(
        loss.points != "hard" or loss.order == "project_predict_sample",
        f"--loss.points is {loss.points}: give grid or random with --loss.order {loss.order}, "
        "which has no predictions to choose by.",
    )
    harness.check(loss.candidates >= 1, f"--loss.candidates is {loss.candidates}: give 1 or more.")
    harness.check(
        0 <= loss.hard_share <= 1,
        f"--loss.hard-share is {loss.hard_share}: give a share from 0 to 1.",
    )
    is_location = loss.correspondence == "location"
    harness.check(
        is_location or loss.region == 0,
        f"--loss.correspondence is {loss.correspondence}: give --loss.region 0 with it, since "
        "RegionSim needs the same points in both views.",
    )
    harness.check(
        is_location or (loss.points == "grid" and loss.order == "project_predict_sample"),
        f"--loss.correspondence is {loss.correspondence}: give location with --loss.points "
        f"{loss.points} and --loss.order {loss.order}.",
    )


# ==== views =======================================================================================
def photometric(view_config: Views) -> transforms.Compose:
    """SimSiam's random changes of a crop's colors and sharpness."""
    jitter = colors.ColorJitter(0.4, 0.4, 0.4, view_config.hue)
    blur = colors.RandomBlur(view_config.blur)

    return transforms.Compose(
        [
            as_picture,  # PIL is the quickest on a CPU, and SimSiam blurs with it
            transforms.RandomApply([jitter], p=0.8),
            colors.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=0.5),
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
        self.photometric = photometric(config.views)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        image, unreadable = self.source[index]
        size = tuple(image.shape[-2:])

        generator = harness.generator(self.seed, epoch, index)
        pairs = dk.sample_view_pairs(
            size,
            scale=self.view_config.scale,
            vertical_flip=self.view_config.vertical_flip,
            generator=generator,
        )
        views = (pairs.view1, pairs.view2)
        if epoch == 0:
            dk.check_views(dk.stack_views(views), size)

        side = self.view_config.size
        crops = [crop_bytes(image, view, side) for view in views]
        # The colors need other random numbers than the views.
        with harness.seeded(self.seed, epoch, index, harness.COLORS):
            augmented = tuple(self.photometric(crop) for crop in crops)
        return augmented, views, torch.tensor(index), list(unreadable)


# ==== model =======================================================================================
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


# What is drawn for an image: random points, and the candidates that hard points are chosen from.
POINTS = 1
CANDIDATES = 2


def pair_points(views: list[dk.View], points: Tensor, valid: Tensor) -> dk.PairedPoints:
    """Points of the image, in the frames of both views; `valid` says which images are used."""
    points1 = dk.image_to_view(views[0], points)
    points2 = dk.image_to_view(views[1], points)
    return dk.PairedPoints(points, points1, points2, valid[:, None].expand(points.shape[:-1]))


def sample_pairs(views: list[dk.View], noise: Tensor) -> dk.PairedPoints:
    """Random points of the overlap of the views, which follow from noise (b, points, 2)."""
    overlap = dk.intersect_views(*views)
    points = dk.sample_points(overlap.box, noise.shape[1], noise=noise)
    return pair_points(views, points, overlap.valid)


def overlap_pairs(views: list[dk.View], loss_config: Loss, seeds: Tensor) -> dk.PairedPoints:
    """Points of the overlap of the views: a grid, or random ones (Table A2)."""
    if loss_config.points == "grid":
        return dk.grid_pairs(*views, loss_config.grid)
    return sample_pairs(views, harness.noise(seeds, (loss_config.grid**2, 2), POINTS))


def sample_maps(maps: list[Tensor], pairs: dk.PairedPoints) -> list[Tensor]:
    """Features of both views at the same points of the image, (b, points, channels) each."""
    return [dk.gridsample(maps[0], pairs.points1), dk.gridsample(maps[1], pairs.points2)]


def apply_to_rows(head: nn.Module, rows: Tensor) -> Tensor:
    """A head of 1 x 1 convolutions on rows (b, points, channels), as on a map of these pixels."""
    maps = rows.mT[..., None]
    return head(maps)[..., 0].mT


class Samples(NamedTuple):
    """The outputs of PixSim's heads for both views at the same points of the image."""

    projections: list[Tensor]  # (b, points, categories) each
    predictions: list[Tensor]
    pairs: dk.PairedPoints


def has_pixsim(loss_config: Loss) -> bool:
    return loss_config.grid > 0 and loss_config.dense > 0


def has_regionsim(loss_config: Loss) -> bool:
    return loss_config.grid > 0 and loss_config.region > 0


def has_dense_heads(loss_config: Loss) -> bool:
    """RegionSim needs the heads of PixSim, too: its masks come from them."""
    return has_pixsim(loss_config) or has_regionsim(loss_config)


class DenseSiam(nn.Module):
    """Encoder f with global, dense (g, h) and region (g', h') projectors and predictors (Fig 2)."""

    def __init__(self, config: Config, initial: encoders.Start | None = None):
        super().__init__()
        initial = initial or encoders.read_start(config)
        self.mean = initial.mean
        self.std = initial.std
        self.loss = config.loss
        self.view_size = config.views.size
        self.encoder = encoders.build_start(initial, levels=1)
        channels = self.encoder.feature_info[-1]["num_chs"]
        hidden = config.hidden
        regions = config.categories

        self.projector = build_projector(nn.Linear, nn.BatchNorm1d, channels, hidden)
        self.predictor = build_predictor(nn.Linear, nn.BatchNorm1d, hidden, hidden // 4)
        if has_dense_heads(self.loss):
            self.dense_projector = build_projector(conv1x1, nn.BatchNorm2d, channels, regions)
            self.dense_predictor = build_predictor(conv1x1, nn.BatchNorm2d, regions, regions)
        if has_regionsim(self.loss):
            self.region_projector = build_projector(nn.Linear, nn.BatchNorm1d, channels, regions)
            self.region_predictor = build_predictor(nn.Linear, nn.BatchNorm1d, regions, regions)

    # ==== loss ====================================================================================
    def forward(
        self, images: list[Tensor], views: list[dk.View], with_region: bool, seeds: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, and the terms that are logged; `with_region` adds RegionSim.

        The random points of each image follow from its seed.
        """
        maps = [last_map(self.encoder, x) for x in images]
        loss, terms = self.global_loss(maps, views)
        if not has_dense_heads(self.loss):
            return loss, terms
        if self.loss.correspondence != "location":
            terms["dense"] = self.matched_loss(maps, views)
            return loss + self.loss.dense * terms["dense"], terms

        samples = self.sample_heads(maps, views, seeds)
        terms["dense"] = self.dense_loss(samples)
        overlap = samples.pairs.valid
        terms["overlap"] = overlap.float().mean()  # share of the pairs of views that overlap
        loss = loss + self.loss.dense * terms["dense"]

        if with_region:
            terms["region"] = self.region_loss(maps, samples.projections, samples.pairs)
            loss = loss + self.loss.region * terms["region"]
        return loss, terms

    def global_loss(
        self, maps: list[Tensor], views: list[dk.View]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """SimSiam: negative cosine of the pooled features, of the whole views (Table 4e)."""
        if self.loss.pooled == "overlap":
            pooled, valid = self.pool_overlap(maps, views)
        else:
            pooled = [x.mean((-2, -1)) for x in maps]
            valid = None  # all are
        projections = [self.projector(x) for x in pooled]
        predictions = [self.predictor(z) for z in projections]
        cosine = partial(dk.negative_cosine, valid=valid, reduction="none")
        cosines = dk.symmetric_loss(cosine, predictions, projections)
        loss = dk.masked_mean(cosines, valid, group=torch.distributed.group.WORLD)

        # A spread near 1 is normal, and a spread near 0 is collapse.
        deviation = dk.l2_normalize(projections[0].detach()).std(0).mean()
        spread = deviation * projections[0].shape[1] ** 0.5
        return loss, {"sim": loss, "spread": spread}

    def sample_heads(self, maps: list[Tensor], views: list[dk.View], seeds: Tensor) -> Samples:
        """The outputs of PixSim's heads for both views at the same points of the image."""
        if self.loss.order == "sample_project_predict":
            return self.sample_first(maps, views, seeds)
        if self.loss.order == "project_sample_predict":
            return self.sample_between(maps, views, seeds)

        # The maps are sampled last, after the projection and the prediction (Table 4d).
        projected_maps = [self.dense_projector(x) for x in maps]
        predicted_maps = [self.dense_predictor(x) for x in projected_maps]
        if self.loss.points == "hard":
            pairs = self.hard_pairs(projected_maps, predicted_maps, views, seeds)
        else:
            pairs = overlap_pairs(views, self.loss, seeds)
        projections = sample_maps(projected_maps, pairs)
        predictions = sample_maps(predicted_maps, pairs)
        return Samples(projections, predictions, pairs)

    def dense_loss(self, samples: Samples) -> Tensor:
        """PixSim: the views agree at the same points (Eq 1 and 3)."""
        valid = samples.pairs.valid
        distance = partial(getattr(dk, self.loss.distance), valid=valid, reduction="none")
        distances = dk.symmetric_loss(distance, samples.predictions, samples.projections)
        # The mean is over the valid points of all processes.
        return dk.masked_mean(distances, valid, group=torch.distributed.group.WORLD)

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
        info_nce = partial(dk.info_nce, valid=valid, temperature=temperature, reduction="none")
        losses = dk.symmetric_loss(info_nce, predictions, projections)
        # The mean is over the regions of the valid images of all processes.
        return dk.masked_mean(losses, valid, group=torch.distributed.group.WORLD)

    # ---- rows of the paper's tables ----
    def pool_overlap(self, maps: list[Tensor], views: list[dk.View]) -> tuple[list[Tensor], Tensor]:
        """The mean of the features at the points of the overlap, and where there is one."""
        pairs = dk.grid_pairs(*views, self.loss.grid)
        pooled = [x.mean(1) for x in sample_maps(maps, pairs)]
        return pooled, pairs.valid[:, 0]

    def sample_first(self, maps: list[Tensor], views: list[dk.View], seeds: Tensor) -> Samples:
        """Sample the features, then project and predict them."""
        pairs = overlap_pairs(views, self.loss, seeds)
        features = sample_maps(maps, pairs)
        projections = [apply_to_rows(self.dense_projector, x) for x in features]
        predictions = [apply_to_rows(self.dense_predictor, x) for x in projections]
        return Samples(projections, predictions, pairs)

    def sample_between(self, maps: list[Tensor], views: list[dk.View], seeds: Tensor) -> Samples:
        """Project the maps, sample the projections, then predict from these."""
        pairs = overlap_pairs(views, self.loss, seeds)
        projected_maps = [self.dense_projector(x) for x in maps]
        projections = sample_maps(projected_maps, pairs)
        predictions = [apply_to_rows(self.dense_predictor, x) for x in projections]
        return Samples(projections, predictions, pairs)

    @torch.no_grad()
    def hard_pairs(
        self,
        projected_maps: list[Tensor],
        predicted_maps: list[Tensor],
        views: list[dk.View],
        seeds: Tensor,
    ) -> dk.PairedPoints:
        """Random points, some of which are the most dissimilar of many candidates (Table A2)."""
        count = self.loss.grid**2
        noise = harness.noise(seeds, (self.loss.candidates * count, 2), CANDIDATES)
        candidates = sample_pairs(views, noise)
        projections = sample_maps(projected_maps, candidates)
        predictions = sample_maps(predicted_maps, candidates)
        distance = partial(getattr(dk, self.loss.distance), reduction="none")
        dissimilarity = dk.symmetric_loss(distance, predictions, projections)

        others = sample_pairs(views, harness.noise(seeds, (count, 2), POINTS))
        points = dk.hard_points(
            candidates.points, dissimilarity, others.points, beta=self.loss.hard_share
        )
        return pair_points(views, points, others.valid[:, 0])

    def matched_loss(self, maps: list[Tensor], views: list[dk.View]) -> Tensor:
        """PixSim with another correspondence, which differs between the directions (Table A1)."""
        projected_maps = [self.dense_projector(x) for x in maps]
        predicted_maps = [self.dense_predictor(x) for x in projected_maps]
        students = [Side(*x) for x in zip(views, maps, predicted_maps, strict=True)]
        teachers = [Side(*x) for x in zip(views, maps, projected_maps, strict=True)]

        match = MATCHING[self.loss.correspondence]
        distance = getattr(dk, self.loss.distance)
        means = []
        for student, teacher in ((students[0], teachers[1]), (students[1], teachers[0])):
            matched = match(student, teacher, self.view_size)
            distances = distance(*matched, reduction="none")
            group = torch.distributed.group.WORLD
            means.append(dk.masked_mean(distances, matched.valid, group=group))
        return (means[0] + means[1]) / 2


class Side(NamedTuple):
    """One of the two views, for the correspondences of Table A1."""

    view: dk.View
    features: Tensor  # of the encoder, (b, d, h, w)
    outputs: Tensor  # predictions of the student, projections of the teacher, (b, c, h, w)


class Matched(NamedTuple):
    """Outputs of the student with those of the teacher that they are compared with."""

    students: Tensor  # (*batch, c)
    teachers: Tensor
    valid: Tensor  # (*batch)


def match_similar_features(student: Side, teacher: Side, view_size: int) -> Matched:
    """Each cell with the cell of the most similar features, as in DenseCL."""
    student_features = dk.map_to_rows(student.features)
    teacher_features = dk.map_to_rows(teacher.features)
    matches = dk.match_by_feature(student_features, teacher_features)
    students = dk.take_rows(dk.map_to_rows(student.outputs), matches.indices1)
    teachers = dk.take_rows(dk.map_to_rows(teacher.outputs), matches.indices2)
    return Matched(students, teachers, matches.valid)


def match_near_pixels(student: Side, teacher: Side, view_size: int) -> Matched:
    """Each cell with all cells whose centers are near in the image, as in PixPro."""
    size = student.outputs.shape[-2:]
    near = dk.positive_pairs(student.view, teacher.view, size)  # (b, cells, cells)
    students = dk.map_to_rows(student.outputs)[:, :, None]
    teachers = dk.map_to_rows(teacher.outputs)[:, None]
    students, teachers = torch.broadcast_tensors(students, teachers)
    return Matched(students, teachers, near)


def match_regions(student: Side, teacher: Side, view_size: int) -> Matched:
    """The same windows of both views, as in ReSim: of 48 pixels every 32 in a view of 224."""
    window = max(1, round(view_size * 48 / 224))
    stride = max(1, round(view_size * 32 / 224))
    regions = dk.candidate_regions(
        student.view, teacher.view, view_size, window=window, stride=stride
    )
    students = dk.roi_align(student.outputs, regions.boxes1, 1).features
    teachers = dk.roi_align(teacher.outputs, regions.boxes2, 1).features
    return Matched(students.flatten(2), teachers.flatten(2), regions.valid)


MATCHING = {
    "feature_similarity": match_similar_features,
    "pixel_distance": match_near_pixels,
    "candidate_regions": match_regions,
}


# ==== evaluation ==================================================================================
PANEL_SIDE = 224  # Side of a panel of the picture, in pixels.


@torch.no_grad()
def evaluate(model: DenseSiam, preview: tuple, config: Config, run: harness.Run, step: int) -> None:
    """Save a picture of the preview's images. Without --data, also probe the encoder."""
    images, views, indices, _ = preview
    model.eval()
    seeds = harness.image_seeds(config.seed, step, indices)
    draw(model, images, views, seeds, run.picture_path(step))

    if config.data is None:
        normalize = transforms.Normalize(model.mean, model.std)
        device = images[0].device

        def features(scenes: Tensor) -> Tensor:
            return last_map(model.encoder, normalize(scenes).to(device))

        run.log(step, **scene_probe.probe(features, run.picture_path(step, "probe")))
    model.train()


def draw(
    model: DenseSiam, images: list[Tensor], views: list[dk.View], seeds: Tensor, path: Path
) -> None:
    """A row per image: for each of its views the matched points, pseudo-categories, PCA colors."""
    pixels = torch.cat(images)
    maps = last_map(model.encoder, pixels)

    panels = [harness.unnormalize(pixels, model.mean, model.std)]
    if has_dense_heads(model.loss):
        categories = model.dense_projector(maps).argmax(1).cpu()
        panels.append(viz.label_colors(categories).movedim(-1, 1))
    panels.append(dk.pca_colors(maps).cpu())
    tiles = [nn.functional.interpolate(x, PANEL_SIDE) for x in panels]

    if model.loss.grid:
        mark_pairs(tiles[0], overlap_pairs(views, model.loss, seeds))
    rows = rearrange(tiles, "p (v b) c h w -> (b v p) c h w", v=2)
    save_image(rows, path, nrow=2 * len(panels))


def mark_pairs(tiles: Tensor, pairs: dk.PairedPoints) -> None:
    """Mark the same points of the image in both of its views, those of view 1 come first."""
    points = torch.cat([pairs.points1, pairs.points2])
    valid = pairs.valid.repeat(2, 1)  # once for each view
    colors = viz.label_colors(torch.arange(points.shape[1]))
    for tile, places, used in zip(tiles, points, valid, strict=True):
        if used.all():
            mark(tile, places, colors)


def mark(tile: Tensor, points: Tensor, colors: Tensor) -> None:
    """Mark each point, in [0, 1], by a square of 7 x 7 pixels in its color; the tile changes."""
    places = (points * tile.shape[-1]).int().tolist()
    for (x, y), color in zip(places, colors, strict=True):
        tile[:, max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4] = color[:, None, None]


def method_of(loss_config: Loss) -> str:
    """The name of the method that these options make."""
    if has_pixsim(loss_config):
        return "densesiam" if has_regionsim(loss_config) else "pixsim"
    return "regionsim" if has_regionsim(loss_config) else "simsiam"


# ==== loop ========================================================================================
def spread(model: DenseSiam, with_region: bool) -> nn.parallel.DistributedDataParallel:
    """The model, whose gradients are averaged over the processes.

    The heads of RegionSim have no gradient, and no weight decay, before it begins. To find that out
    by itself, DistributedDataParallel would let the host wait for the device in each step.
    """
    for name, parameter in model.named_parameters():
        if "region" in name:
            parameter.requires_grad_(with_region)
    return nn.parallel.DistributedDataParallel(model)


def train(config: Config) -> None:
    check_options(config)
    initial = encoders.read_start(config)
    folder = harness.run_folder("densesiam", config)
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

        torch.manual_seed(config.seed)
        model = DenseSiam(config, initial)
        if device.type == "cuda":
            model = timm.layers.convert_sync_batchnorm(model)
        encoders.freeze(model.encoder, config.freeze)
        model.to(device, memory_format=torch.channels_last)
        model.compile(disable=not config.compile)
        regionsim = has_regionsim(config.loss)
        with_region = False
        ddp = spread(model, with_region)

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
        monitor = health.Monitor(model.encoder, preview[0], run)
        if step == 0 and world.is_main:
            run.log(step, **monitor.measure_all())
            evaluate(model, preview, config, run, step)
        run.wait()

        method = method_of(config.loss)
        facts = {**initial.side_car(), "method": method}
        kept = harness.kept_epochs(config, steps_per_epoch)

        training_batches = batches(config.batch, start=step, stop=steps)
        bar = harness.progress(training_batches, start=step, stop=steps, world=world)
        for images, views, indices, unreadable in bar:
            lr = dk.cosine_schedule(step, steps, start=peak_lr)
            optimizer.param_groups[0].update(lr=lr)

            seeds = harness.image_seeds(config.seed, step, indices)  # for random points
            has_begun = regionsim and step >= config.loss.region_start * steps
            if has_begun and not with_region:
                with_region = True
                ddp = spread(model, with_region)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, terms = ddp(images, views, with_region, seeds)

            optimizer.zero_grad()
            loss.backward()
            # An infinite norm clips nothing; the gradient norm is only measured.
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
            run.record(step, {"loss": loss, "grad_norm": grad_norm, **terms})
            optimizer.step()
            step += 1

            run.note_unreadable(unreadable)
            # The device is waited for here alone. The run ends if a value was not finite.
            if step % config.log_every == 0:
                values = run.take_means()
                harness.show(bar, values, ("sim", "dense", "region"))
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
                    encoder=model.encoder,
                    facts=facts,
                    epoch=kept.get(step),
                )
            if stop:
                return

        if world.is_main:
            harness.print_probes(run)
