"""Transfer to detection: torchvision's Faster R-CNN, Mask R-CNN or RetinaNet, and their AP.

    python recipes/detect.py --encoder runs/d3ssl-demo      # the demo: minutes on a CPU
    torchrun --nproc-per-node 8 -- recipes/detect.py --preset voc --encoder ... --data VOCdevkit

Run the same command again to resume. `--encoder` is a ResNet: of a recipe, of timm or of
torchvision. Other data, logged values, deviations from the papers, results: docs/recipes/detect.md.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Config:
    # Set of defaults; each option below overrides one of them.
    preset: Literal["demo", "voc", "coco", "cityscapes"] = "demo"
    encoder: str = "random:tiny"  # A run folder, timm:NAME, torchvision:NAME or random:NAME.
    # On a pyramid (FPN) of the levels C2 to C5, or on C4 with the fifth block as the head.
    detector: Literal[
        "faster-rcnn-fpn", "faster-rcnn-c4", "mask-rcnn-fpn", "mask-rcnn-c4", "retinanet-fpn"
    ] = "faster-rcnn-fpn"
    data: Path | None = None  # Folder of VOC, COCO, Cityscapes or boxes.json; the demo needs none.
    annotations: tuple[str, ...] = ("train",)  # To train on: a .json of COCO, or lists, in --data.
    val_annotations: tuple[str, ...] = ("val",)  # To test on, in the same form.
    scenes: int = 128  # Procedural scenes to train and to test on, without --data.
    run: Path | None = None  # Run folder; by default runs/detect-PRESET-DETECTOR[-NAME OF DATA].
    norm: Literal["trained", "frozen"] = "trained"  # Train the batch norms, or leave them as is.
    steps: int = 24_000  # Steps of the training.
    milestones: tuple[int, ...] = (18_000, 22_000)  # Steps after which the rate falls tenfold.
    warmup: int = 100  # Steps in which the learning rate rises to its full value.
    batch: int = 16  # Images per step, over all processes.
    lr: float = 0.02  # Learning rate for a batch of 16; it is scaled with the batch.
    weight_decay: float = 1e-4  # Weight decay of all parameters.
    # Short sides in training; the last in tests.
    sides: tuple[int, ...] = tuple(range(480, 801, 32))
    longest: int = 1333  # Longest side in pixels; a longer image is made smaller than `sides` says.
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)  # Sides of the anchors, in pixels.
    width: int = 256  # Channels of the FPN, if there is one.
    rois: int = 512  # Regions per image that train the box head; RetinaNet has none.
    # Regions per image that the RPN proposes; on C4 twice as many in training.
    proposals: int = 1000
    seed: int = 0  # Seed of all random numbers.
    workers: int = 8  # Loader processes of each training process.
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU, where there is one.
    precision: Literal["fp32", "bf16"] = "fp32"  # What the networks compute in; weights are fp32.
    log_every: int = 20  # Steps between two rows of the log.
    save_every: int = 4000  # Steps between two checkpoints, each with a picture and the AP.
    # Range of values that is mapped to black ... white, for images whose file tells none.
    value_range: tuple[float, float] | None = None
    warn_after: float = 60.0  # Seconds without a new batch or listed file, then a warning.
    give_up_after: float = 600.0  # Seconds without a new batch or listed file, then the end.
    # Seconds that processes wait for each other in a step; None is torch's limit.
    collective_timeout: float | None = None
    changed_data: bool = False  # Go on with a run although its images or other files have changed.


PRESETS = {
    "demo": Config(
        steps=600, milestones=(450, 550), batch=8, lr=0.04, sides=(64,), width=64, rois=64,
        anchors=(8, 12, 18, 26, 40), proposals=100, workers=1, save_every=200,
    ),
    "voc": Config(
        "voc", detector="faster-rcnn-c4", annotations=("VOC2007/trainval", "VOC2012/trainval"),
        val_annotations=("VOC2007/test",),
    ),
    "coco": Config(
        "coco", detector="mask-rcnn-fpn", annotations=("annotations/instances_train2017.json",),
        val_annotations=("annotations/instances_val2017.json",), save_every=15_000,
        steps=90_000, milestones=(60_000, 80_000), warmup=1000, sides=tuple(range(640, 801, 32)),
    ),
    "cityscapes": Config(
        "cityscapes", detector="mask-rcnn-fpn", batch=8, milestones=(18_000,), warmup=1000,
        sides=tuple(range(800, 1025, 32)), longest=2048,
    ),
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
import torchvision
from downstream.encoders import check_pictures, load_encoder
from downstream.object_sets import Objects, boxes_of, object_classes, read, sample_set
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as rle
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
)
from torchvision.ops import MultiScaleRoIAlign, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.utils import draw_bounding_boxes, save_image
from tqdm import tqdm

WITH_PYRAMID = ("faster-rcnn-fpn", "mask-rcnn-fpn", "retinanet-fpn")
WITH_MASKS = ("mask-rcnn-fpn", "mask-rcnn-c4")
DRAWS = 1  # ends the key of what torchvision draws in a step


def check_options(config: Config) -> None:
    """Raise a UserError of one sentence for a wrong option, before any data is read."""
    harness.check_training(config)
    harness.check(
        config.data is not None or config.preset == "demo",
        f"--data is missing: the preset {config.preset} needs the folder of the images.",
    )
    harness.check(
        config.data is None or config.data.is_dir(),
        f"--data is {config.data}: give the folder of VOCdevkit, COCO, Cityscapes or boxes.json.",
    )
    harness.check(
        ":" in config.encoder or Path(config.encoder).exists(),
        f"--encoder is {config.encoder}: give a run folder or its encoder.safetensors, timm:NAME, "
        "torchvision:NAME or random:NAME.",
    )
    harness.check(
        len(config.annotations) >= 1, "--annotations is empty: name a file or list to train on."
    )
    harness.check(
        len(config.val_annotations) >= 1,
        "--val-annotations is empty: name a file or list to test on.",
    )
    harness.check(config.scenes >= 1, f"--scenes is {config.scenes}: give 1 scene or more.")

    harness.check(config.steps >= 1, f"--steps is {config.steps}: give 1 step or more.")
    milestones = config.milestones
    harness.check(
        all(x >= 1 for x in milestones) and list(milestones) == sorted(milestones),
        f"--milestones is {harness.as_typed(milestones)}: give steps from 1 in rising order.",
    )
    harness.check(config.warmup >= 0, f"--warmup is {config.warmup}: give 0 steps or more.")

    sides = harness.as_typed(config.sides)
    harness.check(len(config.sides) >= 1, "--sides is empty: give one short side or more.")
    harness.check(min(config.sides) >= 1, f"--sides is {sides}: give sides of 1 pixel or more.")
    harness.check(config.longest >= 1, f"--longest is {config.longest}: give 1 pixel or more.")
    anchors = harness.as_typed(config.anchors)
    harness.check(len(config.anchors) >= 1, "--anchors is empty: give one side or more.")
    harness.check(
        min(config.anchors) >= 1, f"--anchors is {anchors}: give sides of 1 pixel or more."
    )
    harness.check(
        config.detector not in WITH_PYRAMID or len(config.anchors) == 5,
        f"--anchors is {anchors}: give five sides, one for each level of an FPN.",
    )
    harness.check(config.width >= 1, f"--width is {config.width}: give 1 channel or more.")
    harness.check(config.rois >= 1, f"--rois is {config.rois}: give 1 region or more.")
    harness.check(
        config.proposals >= 1, f"--proposals is {config.proposals}: give 1 region or more."
    )
    harness.check_finite("--weight-decay", config.weight_decay)


# ==== data ========================================================================================
def load(config: Config) -> tuple[Objects, Objects]:
    """The images with their objects, to train on and to test on."""
    if config.data is None:
        found = sample_set(config.scenes)
        val_found = found
    else:
        found = read(config.data, config.annotations)
        val_found = read(config.data, config.val_annotations)

    classes = object_classes(found)
    train_set = Objects(found, classes, config, train=True)
    val_set = Objects(val_found, classes, config, train=False)
    if config.data is not None:
        train_set.images.value_range = config.value_range
        val_set.images.value_range = config.value_range
    for info in train_set.infos + val_set.infos:
        check_image(info, config)
    return train_set, val_set


def check_image(info: dict, config: Config) -> None:
    """A UserError for an image that the detector would make less than a pixel wide."""
    short, long = sorted((info["height"], info["width"]))
    scale = min(min(config.sides) / short, config.longest / long)
    harness.check(
        short * scale > 1.001,  # the detector rounds down
        f"The image {info['file_name']} has {info['height']} x {info['width']} pixels, and "
        f"--longest {config.longest} with --sides {harness.as_typed(config.sides)} would leave "
        "no pixel of its short side: leave it out, or give larger ones.",
    )


# ==== model =======================================================================================
RATIOS = (0.5, 1.0, 2.0)  # Height of an anchor, divided by its width.


def build_detector(config: Config, classes: int) -> nn.Module:
    """The detector of torchvision whose backbone is the encoder; `classes` are those of objects."""
    encoder = load_encoder(config.encoder)
    check_pictures(encoder)
    network = encoder.network
    harness.check(
        isinstance(network, timm.models.ResNet | torchvision.models.ResNet),
        f"--encoder is {config.encoder}: give a ResNet of timm or torchvision.",
    )
    levels = encoder.levels(torch.zeros(1, 3, 64, 64))
    channels = [x.shape[1] for x in levels]

    network.requires_grad_(True)  # load_encoder freezes it
    if config.norm == "frozen":
        network = timm.layers.freeze_batch_norm_2d(network)
    images = {
        "min_size": config.sides,
        "max_size": config.longest,
        "image_mean": encoder.mean,
        "image_std": encoder.std,
    }
    if config.detector == "retinanet-fpn":
        parts = one_stage_parts(config, network, channels)
        return OneStage(num_classes=classes, **parts, **images)

    if config.detector in WITH_PYRAMID:
        parts = pyramid_parts(config, network, channels, classes + 1)
        candidates = config.proposals  # of each level, before non-maximum suppression
        training_proposals = config.proposals
    else:
        parts = c4_parts(config, network, channels, classes + 1)
        candidates = 6 * config.proposals
        training_proposals = 2 * config.proposals

    build = MaskRCNN if config.detector in WITH_MASKS else FasterRCNN
    detector = build(
        box_batch_size_per_image=config.rois,
        rpn_pre_nms_top_n_train=2 * candidates,
        rpn_pre_nms_top_n_test=candidates,
        rpn_post_nms_top_n_train=training_proposals,
        rpn_post_nms_top_n_test=config.proposals,
        **parts,
        **images,
    )
    if config.detector == "mask-rcnn-c4":
        detector.roi_heads = share_block(detector.roi_heads, config)
    return detector


def pyramid_parts(
    config: Config, network: nn.Module, channels: list[int], outputs: int
) -> dict[str, Any]:
    """A feature pyramid on the levels C2 to C5; the heads are torchvision's own."""
    levels = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}
    sides = [(side,) for side in config.anchors]  # P2 to P6 have one each
    return {
        "backbone": BackboneWithFPN(
            network, levels, channels, config.width, norm_layer=added_norm(config)
        ),
        "num_classes": outputs,
        "rpn_anchor_generator": AnchorGenerator(sides, [RATIOS] * len(sides)),
    }


def added_norm(config: Config) -> type[nn.BatchNorm2d] | None:
    """The norm that MoCo adds to the layers of a pyramid."""
    return nn.BatchNorm2d if config.norm == "trained" else None


def one_stage_parts(config: Config, network: nn.Module, channels: list[int]) -> dict[str, Any]:
    """A feature pyramid on the levels C3 to C5, with P6 and P7 made from C5."""
    levels = {"layer2": "0", "layer3": "1", "layer4": "2"}
    backbone = BackboneWithFPN(
        network,
        levels,
        channels[1:],
        config.width,
        extra_blocks=LastLevelP6P7(channels[-1], config.width),
        norm_layer=added_norm(config),
    )
    # P3 to P7 have three sides each, a third of an octave apart.
    sides = [tuple(side * 2 ** (third / 3) for third in range(3)) for side in config.anchors]
    return {
        "backbone": backbone,
        "anchor_generator": AnchorGenerator(sides, [RATIOS] * len(sides)),
        "topk_candidates": config.proposals,  # of each level
        "detections_per_img": 100,
    }


class OneStage(RetinaNet):
    """torchvision's RetinaNet with the labels and the names of losses of the other detectors.

    Its own classes count from 0, since it has none for the background.
    """

    def compute_loss(self, targets, head_outputs, anchors) -> dict[str, Tensor]:
        from_zero = [{**target, "labels": target["labels"] - 1} for target in targets]
        terms = super().compute_loss(from_zero, head_outputs, anchors)
        return {
            "loss_classifier": terms["classification"],
            "loss_box_reg": terms["bbox_regression"],
        }

    def postprocess_detections(self, head_outputs, anchors, image_shapes) -> list[dict]:
        detections = super().postprocess_detections(head_outputs, anchors, image_shapes)
        return [{**found, "labels": found["labels"] + 1} for found in detections]


def c4_parts(
    config: Config, network: nn.Module, channels: list[int], outputs: int
) -> dict[str, Any]:
    """The encoder up to C4 is the backbone, and its fifth block is the head of the regions."""
    children = list(network.children())
    backbone = nn.Sequential(*children[: children.index(network.layer4)])
    backbone.out_channels = channels[2]

    width = channels[3]
    # The norm after the block is MoCo's.
    last_norm = nn.BatchNorm2d(width) if config.norm == "trained" else nn.Identity()
    fifth_block = nn.Sequential(network.layer4, last_norm)
    roi_align = MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2)
    parts = {
        "backbone": backbone,
        "rpn_anchor_generator": AnchorGenerator([config.anchors], [RATIOS]),
        "box_roi_pool": roi_align,
        "box_head": nn.Sequential(fifth_block, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "box_predictor": FastRCNNPredictor(width, outputs),
    }
    if config.detector in WITH_MASKS:  # both heads share the fifth block
        parts["mask_roi_pool"] = roi_align
        parts["mask_head"] = fifth_block
        parts["mask_predictor"] = MaskRCNNPredictor(width, 256, outputs)
    return parts


class SharedBlockHeads(RoIHeads):
    """The box head and the mask head of C4, which share the fifth block.

    In training the block runs once on each region, and the masks take the maps of those regions
    that are matched to an object. A second run on these alone would have batch statistics of
    objects only. In a test the masks are of the boxes that were found, which are other regions.
    """

    mask_predictor: nn.Module

    def forward(self, features, proposals, image_shapes, targets: Any = None):
        """The detections of each image in a test, the losses in training, as in RoIHeads."""
        if not self.training:
            return self.detect(features, proposals, image_shapes), {}

        proposals, matches, labels, box_targets = self.select_training_samples(proposals, targets)
        maps = self.region_maps(features, proposals, image_shapes)
        class_logits, box_codes = self.box_predictor(self.pool(maps))
        class_loss, box_loss = fastrcnn_loss(class_logits, box_codes, labels, box_targets)

        has_object = [x > 0 for x in labels]
        mask_loss = maskrcnn_loss(
            self.mask_predictor(maps[torch.cat(has_object)]),
            [x[chosen] for x, chosen in zip(proposals, has_object, strict=True)],
            [x["masks"] for x in targets],
            [x["labels"] for x in targets],
            [x[chosen] for x, chosen in zip(matches, has_object, strict=True)],
        )
        return [], {"loss_classifier": class_loss, "loss_box_reg": box_loss, "loss_mask": mask_loss}

    def detect(self, features, proposals, image_shapes) -> list[dict[str, Tensor]]:
        """Boxes, labels, scores and masks of each image."""
        maps = self.region_maps(features, proposals, image_shapes)
        class_logits, box_codes = self.box_predictor(self.pool(maps))
        boxes, scores, labels = self.postprocess_detections(
            class_logits, box_codes, proposals, image_shapes
        )

        mask_logits = self.mask_predictor(self.region_maps(features, boxes, image_shapes))
        masks = maskrcnn_inference(mask_logits, labels)
        names = ("boxes", "scores", "labels", "masks")
        images = zip(boxes, scores, labels, masks, strict=True)
        return [dict(zip(names, image, strict=True)) for image in images]

    def region_maps(self, features, boxes, image_shapes) -> Tensor:
        """What the fifth block makes of each region, (regions, channels, h, w)."""
        fifth_block = self.box_head[0]
        return fifth_block(self.box_roi_pool(features, boxes, image_shapes))

    def pool(self, maps: Tensor) -> Tensor:
        """What the box head does behind the fifth block, (regions, channels)."""
        return self.box_head[1:](maps)


def share_block(heads: RoIHeads, config: Config) -> SharedBlockHeads:
    """The same parts in heads that run the fifth block once; the numbers are torchvision's."""
    return SharedBlockHeads(
        box_roi_pool=heads.box_roi_pool,
        box_head=heads.box_head,
        box_predictor=heads.box_predictor,
        mask_roi_pool=heads.mask_roi_pool,
        mask_head=heads.mask_head,
        mask_predictor=heads.mask_predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.rois,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
    )


def compute_in_bf16(detector: Any, device_type: str) -> None:
    """Let the networks of a detector compute in bfloat16 and return float32.

    All else stays in float32: a bfloat16 tells places in an image apart by up to four pixels.
    """
    if isinstance(detector, RetinaNet):
        networks = [detector.backbone, detector.head]
    else:
        heads = detector.roi_heads
        networks = [detector.backbone, detector.rpn.head, heads.box_head, heads.mask_head]

    for network in networks:
        if network is not None:  # there may be no masks
            network.forward = in_bf16(network.forward, device_type)


def in_bf16(forward: Callable, device_type: str) -> Callable:
    def compute(*inputs: Any) -> Any:
        with torch.autocast(device_type, torch.bfloat16):
            outputs = forward(*inputs)
        return tree_map_only(Tensor, Tensor.float, outputs)

    return compute


# ==== evaluation ==================================================================================
@torch.no_grad()
def evaluate(model: nn.Module, data: Objects, run: harness.Run, step: int) -> None:
    """Test a share of the images in each process; the first one scores what all have found."""
    world = run.world
    found = []
    unreadable = []
    harness.share_buffers(model)
    model.eval()
    share = range(world.rank, len(data), world.size)
    for index in tqdm(
        share, "test", leave=False, disable=not world.is_main, ncols=harness.bar_width()
    ):
        images, targets, _, skipped = data[0, index]
        unreadable += skipped
        if skipped:  # this is the next readable image, which is tested anyway
            continue
        output = model([images[0].to(world.device) / 255])[0]
        found += coco_rows(output, targets[0]["image_id"])
    model.train()

    run.wait()  # for processes whose images take longer
    parts: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(parts, (found, unreadable))
    if not world.is_main:
        return

    all_found = []
    for part_found, part_unreadable in parts:
        all_found += part_found
        run.note_unreadable(part_unreadable)

    results = {"box": average_precision(data.coco, all_found, "bbox")}
    if data.masks:
        results["mask"] = average_precision(data.coco, all_found, "segm")
    row = {}
    for kind, scores in results.items():
        for name in ("AP", "AP50", "AP75"):
            row[f"{kind}_{name}"] = scores[name]
    run.log(step, **row)

    text = json.dumps({"step": step, "images": len(data), **results}, indent=2)
    harness.write(run.folder / "results.json", text.encode())
    draw(data, all_found, run.picture_path(step))


def coco_rows(output: dict[str, Tensor], image_id: int) -> list[dict]:
    """What the detector found in one image, as COCO's evaluation takes it."""
    output = {name: x.cpu() for name, x in output.items()}
    boxes = box_convert(output["boxes"], "xyxy", "xywh").tolist()
    labels = output["labels"].tolist()
    scores = output["scores"].tolist()
    rows = []
    for box, label, score in zip(boxes, labels, scores, strict=True):
        rows.append({"image_id": image_id, "category_id": label, "bbox": box, "score": score})

    if "masks" in output:
        for row, mask in zip(rows, output["masks"][:, 0], strict=True):
            pixels = (mask > 0.5).byte().numpy()
            row["segmentation"] = rle.encode(pixels.copy(order="F"))
    return rows


def average_precision(truth: COCO, found: list[dict], kind: str) -> dict[str, Any]:
    """COCO's AP over the IoU 0.5 to 0.95, AP50, AP75, and AP of each class that has an object."""
    results = truth.loadRes(found) if found else COCO()  # version 1.7 cannot load an empty list
    coco_eval = COCOeval_faster(truth, results, kind)
    coco_eval.evaluate()
    # The first range of areas is that of all objects, and the last limit of detections is 100.
    curves = coco_eval.eval["precision"][..., 0, -1]  # IoU x recall x class
    precision = curves.mean(1)
    occurs = precision[0] > -1  # COCO gives -1 to a class without an object

    by_iou = precision[:, occurs].mean(1).tolist()  # IoU 0.5, 0.55 ... 0.95
    by_class = {}
    for number, mean in enumerate(precision.mean(0).tolist()):
        if occurs[number]:
            by_class[truth.dataset["categories"][number]["name"]] = mean
    return {
        "AP": sum(by_iou) / len(by_iou),
        "AP50": by_iou[0],
        "AP75": by_iou[5],
        "classes": by_class,
    }


def draw(data: Objects, found: list[dict], path: Path) -> None:
    """Eight images with their objects, each beside what was found with a score above 0.5."""
    images, targets, *_ = harness.make_batch(data, range(min(8, len(data))))
    tiles = []
    for image, target in zip(images, targets, strict=True):
        number = target["image_id"]
        sure = [row for row in found if row["image_id"] == number and row["score"] > 0.5]
        tiles.append(draw_rows(image, data.coco.imgToAnns[number], data.classes))
        tiles.append(draw_rows(image, sure, data.classes))
    save_image(torch.stack(tiles) / 255, path, nrow=4)


def draw_rows(image: Tensor, rows: list[dict], classes: list[str]) -> Tensor:
    """An image of 320 x 320 pixels with the boxes and the class names of COCO's rows."""
    picture = nn.functional.interpolate(image[None], (320, 320))[0]
    if not rows:
        return picture
    height, width = image.shape[1:]
    scale = 320 / torch.tensor([width, height, width, height])
    names = [classes[row["category_id"] - 1] for row in rows]  # 0 is the background
    return draw_bounding_boxes(picture, boxes_of(rows) * scale, names, "white", width=2)


# ==== loop ========================================================================================
def learning_rate(step: int, config: Config) -> float:
    """A linear warm-up, then a tenth after each milestone."""
    peak_lr = config.lr * config.batch / 16
    passed = sum(step >= milestone for milestone in config.milestones)
    warmup = min(1, (step + 1) / (config.warmup + 1))
    return peak_lr * 0.1**passed * warmup


def train(config: Config) -> None:
    check_options(config)
    folder = harness.run_folder("detect", config, config.detector)
    group = harness.process_group(config.device, config.collective_timeout)
    with group as world, harness.Run(folder, config, world) as run:
        device = world.device
        patience = harness.Patience(config.warn_after, config.give_up_after)
        dataset, val = load(config)
        steps = config.steps

        torch.manual_seed(config.seed)
        model = build_detector(config, len(dataset.classes))
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if config.precision == "bf16":
            compute_in_bf16(model, device.type)
        model.to(device).train()
        ddp = nn.parallel.DistributedDataParallel(model)
        # The loop sets the learning rate of each step.
        optimizer = torch.optim.SGD(
            model.parameters(), config.lr, momentum=0.9, weight_decay=config.weight_decay
        )
        step = run.resume(model, optimizer)

        training_batches = harness.batches(
            dataset,
            config.batch,
            world,
            seed=config.seed,
            start=step,
            stop=steps,
            workers=config.workers,
            patience=patience,
        )
        bar = harness.progress(training_batches, start=step, stop=steps, world=world)
        for images, targets, _, unreadable in bar:
            # torchvision draws the image sizes and the samples of the losses.
            harness.seed_step(config.seed, step, world.rank, stream=DRAWS)
            lr = learning_rate(step, config)
            optimizer.param_groups[0]["lr"] = lr

            terms = ddp([image / 255 for image in images], targets)
            loss = torch.stack(list(terms.values())).sum()

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
                harness.show(bar, values, ("loss_classifier", "loss_box_reg"))
                run.log(step, **values, lr=lr, unreadable=run.unreadable)

            due = step % config.save_every == 0 or step == steps
            if due:
                run.check()  # what follows a bad value is neither shown nor saved
            stop = run.stop_requested()
            if due:
                evaluate(model, val, run, step)
            if due or stop:
                run.save(step, model, optimizer)
            if stop:
                return

        if world.is_main:
            torch.save(model.state_dict(), folder / "detector.pt")
            line = "step {step}: AP {box_AP:.3f}, AP50 {box_AP50:.3f}, AP75 {box_AP75:.3f}"
            for row in run.rows("box_AP", "box_AP50", "box_AP75"):
                harness.tell(line.format(**row))
