"""Transfer to detection: torchvision's Faster R-CNN or Mask R-CNN from an encoder, and its AP.

    python recipes/detect.py --encoder runs/d3ssl-demo      # procedural scenes: CPU, minutes
    torchrun --nproc-per-node 8 -- recipes/detect.py --preset voc --encoder ... --data VOCdevkit

The same command run again resumes. `--encoder` is whatever encoders.py loads, if it is a ResNet.
Other data, logged values, deviations from the papers, results: docs/recipes/detect.md.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Config:
    preset: Literal["demo", "voc", "coco"] = "demo"  # Where the defaults come from.
    encoder: str = "random:tiny"  # A run folder, timm:NAME, torchvision:NAME or random:NAME.
    detector: Literal["faster-rcnn-fpn", "faster-rcnn-c4", "mask-rcnn-fpn", "mask-rcnn-c4"] = (
        "faster-rcnn-fpn"  # On the levels C2 to C5, or on C4 with C5 as the head.
    )
    data: Path | None = None  # VOCdevkit, COCO or boxes.json's folder; without, procedural scenes.
    annotations: tuple[str, ...] = ("train",)  # Below --data: a COCO .json; or VOC2007/trainval.
    val_annotations: tuple[str, ...] = ("val",)  # To test on.
    scenes: int = 128  # How many there are, to train and to test on.
    run: Path | None = None  # Run folder; else runs/detect-PRESET-DETECTOR, with the data's name.
    norm: Literal["trained", "frozen"] = "trained"  # Batch norms: over all GPUs, or left as is.
    steps: int = 24_000
    milestones: tuple[int, ...] = (18_000, 22_000)  # Steps after which the rate falls tenfold.
    warmup: int = 100  # Steps in which the rate rises to its full value.
    batch: int = 16  # Images a step, over all processes.
    lr: float = 0.02  # For a batch of 16: scaled with the batch.
    sides: tuple[int, ...] = tuple(range(480, 801, 32))  # Short sides to train at; last: to test.
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)  # Their sides; of an FPN one a level.
    width: int = 256  # Channels of the FPN.
    rois: int = 512  # Regions of an image that train the box head.
    proposals: int = 1000  # Regions of an image when it is tested; twice as many in training.
    seed: int = 0
    workers: int = 8  # Loader processes of each training process.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = 20  # Steps between two rows of the log.
    save_every: int = 4000  # Steps between two checkpoints, each with its AP and a picture.


PRESETS = {
    "demo": Config(
        steps=600, milestones=(450, 550), batch=8, lr=0.04, sides=(64,), width=64, rois=64,
        anchors=(8, 12, 18, 26, 40), proposals=100, workers=1, save_every=200,
    ),
    "voc": Config("voc", detector="faster-rcnn-c4", val_annotations=("VOC2007/test",),
                  annotations=("VOC2007/trainval", "VOC2012/trainval")),
    "coco": Config(
        "coco", detector="mask-rcnn-fpn", annotations=("annotations/instances_train2017.json",),
        val_annotations=("annotations/instances_val2017.json",), save_every=15_000,
        steps=90_000, milestones=(60_000, 80_000), warmup=1000, sides=tuple(range(640, 801, 32)),
    ),
}  # fmt: skip


if __name__ == "__main__":  # the arguments before torch: --help answers at once
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=list(PRESETS), default="demo")
    default = PRESETS[first.parse_known_args()[0].preset]
    CONFIG = tyro.cli(Config, default=default, description=__doc__)

import json
from typing import Any

import harness
import timm
import torch
import torchvision
from downstream.encoders import load_encoder
from downstream.object_sets import Objects, boxes_of, read, read_scenes
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as rle
from harness import UserError
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, faster_rcnn, mask_rcnn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import MultiScaleRoIAlign as RoIAlign
from torchvision.ops import box_convert
from torchvision.utils import draw_bounding_boxes, save_image
from tqdm import tqdm


# ==== model =======================================================================================
def build_detector(config: Config, classes: int) -> Any:
    """The detector of torchvision whose backbone, and C4's box head, is the encoder."""
    encoder, norm = load_encoder(config.encoder), nn.BatchNorm2d
    network, kind, count = encoder.network, config.detector, classes + 1  # 0 is the background
    if not isinstance(network, timm.models.ResNet | torchvision.models.ResNet):
        raise UserError(f"{config.encoder} is no ResNet, of whose levels detectors are built.")
    if kind.endswith("fpn") and len(config.anchors) != 5:
        raise UserError("--anchors of an FPN are five, one for each level of P2 to P6.")
    channels = [x.shape[1] for x in encoder.levels(torch.zeros(1, 3, 64, 64))]
    network.requires_grad_(True)
    if config.norm == "frozen":
        network, norm = timm.layers.freeze_batch_norm_2d(network), None
    options: dict[str, Any] = {"num_classes": count}
    if kind.endswith("fpn"):  # the heads are torchvision's own
        levels, sizes = {f"layer{i + 1}": f"{i}" for i in range(4)}, [(x,) for x in config.anchors]
        backbone: Any = BackboneWithFPN(network, levels, channels, config.width, norm_layer=norm)
    else:
        parts, sizes, d = [*network.children()], [config.anchors], channels[3]
        pool = RoIAlign(["0"], 14, 2)
        backbone = nn.Sequential(*parts[: parts.index(network.layer4)])
        backbone.out_channels = channels[2]
        fifth = nn.Sequential(network.layer4, norm(d) if norm else nn.Identity())  # as in MoCo
        options = {
            "box_roi_pool": pool, "box_predictor": faster_rcnn.FastRCNNPredictor(d, count),
            "box_head": nn.Sequential(fifth, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        }  # fmt: skip
        if kind.startswith("mask"):  # both heads share the fifth block
            predictor = mask_rcnn.MaskRCNNPredictor(d, 256, count)
            options |= {"mask_roi_pool": pool, "mask_head": fifth, "mask_predictor": predictor}
    anchors = AnchorGenerator(sizes, [(0.5, 1.0, 2.0)] * len(sizes))
    after = config.proposals
    before = after if len(sizes) > 1 else 6 * after  # of a level, before non-maximum suppression
    return (MaskRCNN if kind.startswith("mask") else FasterRCNN)(
        backbone, min_size=config.sides, image_mean=encoder.mean, image_std=encoder.std,
        rpn_anchor_generator=anchors, box_batch_size_per_image=config.rois,
        rpn_pre_nms_top_n_train=2 * before, rpn_post_nms_top_n_train=2 * after,
        rpn_pre_nms_top_n_test=before, rpn_post_nms_top_n_test=after, **options,
    )  # fmt: skip


# ==== evaluation ==================================================================================
def average_precision(truth: COCO, found: list[dict], kind: str) -> dict[str, Any]:
    """COCO's AP over the IoU 0.5 to 0.95, AP50, AP75, and AP of each class that has an object."""
    judge = COCOeval_faster(truth, truth.loadRes(found), kind)
    judge.evaluate()
    precision = judge.eval["precision"][..., 0, -1].mean(1)  # IoU x class; -1 of absent classes
    names = [x["name"] for x in truth.dataset["categories"]]
    classes = {name: float(x) for name, x in zip(names, precision.mean(0), strict=True) if x > -1}
    mean = [float(x) for x in precision[:, precision[0] > -1].mean(1)]  # of each IoU
    return {"AP": sum(mean) / 10, "AP50": mean[0], "AP75": mean[5], "classes": classes}


def draw(data: Objects, found: list[dict], path: Path) -> None:
    """Eight images with their objects, and again with what was found with a score above 0.5."""
    (images, targets, _), tiles = data[[*range(min(8, len(data)))]], []
    for image, i in zip(images, (x["image_id"] for x in targets), strict=True):
        picture = nn.functional.interpolate(image[None], (320, 320))[0]
        scale = 320 / torch.tensor(image.shape[:0:-1]).repeat(2)
        sure = [x for x in found if x["image_id"] == i and x["score"] > 0.5]
        for rows in (data.coco.imgToAnns[i], sure):
            names, boxes = (
                [data.classes[x["category_id"] - 1] for x in rows],
                boxes_of(rows) * scale,
            )
            drawn = (
                draw_bounding_boxes(picture, boxes, names, "white", width=2) if rows else picture
            )
            tiles.append(drawn)
    path.parent.mkdir(exist_ok=True)
    save_image(torch.stack(tiles) / 255, path, nrow=4)


@torch.no_grad()
def evaluate(model: Any, data: Objects, run: harness.Run, step: int) -> None:
    """Test a share of the images in each process; the first has all that was found, and judges."""
    model.eval()
    world, found, unreadable = run.world, [], []
    parts: list[Any] = [None] * world.size
    share = range(world.rank, len(data), world.size)
    for index in tqdm(share, "test", leave=False, disable=not world.is_main):
        (image,), (target,), skipped = data[[index]]
        unreadable += skipped
        if skipped:  # it is another image: nothing is found in this one
            continue
        seen = {k: x.cpu() for k, x in model([image.to(world.device) / 255])[0].items()}
        boxes = box_convert(seen["boxes"], "xyxy", "xywh").tolist()
        for i, label in enumerate(seen["labels"].tolist()):
            row = {"image_id": target["image_id"], "category_id": label, "bbox": boxes[i]}
            found.append({**row, "score": float(seen["scores"][i])})
            if data.masks:
                mask = (seen["masks"][i, 0] > 0.5).byte().numpy()
                found[-1]["segmentation"] = rle.encode(mask.copy(order="F"))
    torch.distributed.all_gather_object(parts, (found, unreadable))
    if world.is_main:
        found, unreadable = ([x for part in parts for x in part[i]] for i in (0, 1))
        run.note_unreadable(unreadable)
        draw(data, found, run.folder / f"pictures/step-{step:06d}.png")
        kinds = {"box": "bbox"} | ({"mask": "segm"} if data.masks else {})
        results = {x: average_precision(data.coco, found, kind) for x, kind in kinds.items()}
        run.log(step, **{f"{x}_{k}": results[x][k] for x in kinds for k in ("AP", "AP50", "AP75")})
        text = json.dumps({"step": step, "images": len(data), **results}, indent=2)
        harness.write(run.folder / "results.json", text.encode())
    model.train()


# ==== loop ========================================================================================
def load(config: Config) -> tuple[Objects, Objects]:
    """What to train on, and what to test on."""
    if config.data is None and config.preset != "demo":
        raise UserError(f"The preset {config.preset} needs images: name them with --data.")
    if config.data is None:
        train = val = read_scenes(config.scenes)
    else:
        train, val = (read(config.data, x) for x in (config.annotations, config.val_annotations))
    classes = list(dict.fromkeys(x["name"] for x in train[1]["categories"]))
    return Objects(*train, classes, config, train=True), Objects(*val, classes, config, train=False)


def train(config: Config) -> None:
    names = [config.preset, config.detector, *([config.data.resolve().name] if config.data else [])]
    folder = config.run or Path("runs", "-".join(["detect", *names]))
    with harness.process_group(config.device) as world, harness.Run(folder, config, world) as run:
        (data, val), steps = load(config), config.steps
        torch.manual_seed(config.seed)
        model = build_detector(config, len(data.classes))
        if world.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        ddp = nn.parallel.DistributedDataParallel(model.to(world.device).train())
        optimizer = torch.optim.SGD(model.parameters(), config.lr, momentum=0.9, weight_decay=1e-4)
        step = run.resume(model, optimizer)
        options = {"seed": config.seed, "workers": config.workers, "start": step, "stop": steps}
        batches = harness.batches(data, config.batch, world, **options)
        bar = tqdm(batches, total=steps, initial=step, disable=not world.is_main, unit="step")
        for images, targets, unreadable in bar:
            # What torchvision draws, sizes and samples, is of the step: a resumed run repeats it.
            torch.manual_seed(harness.generator(config.seed, step, world.rank, 1).initial_seed())
            now = config.lr * config.batch / 16 * 0.1 ** sum(step >= x for x in config.milestones)
            now *= min(1, (step + 1) / (config.warmup + 1))
            optimizer.param_groups[0]["lr"] = now
            terms = ddp([image / 255 for image in images], targets)
            loss = torch.stack([*terms.values()]).sum()
            optimizer.zero_grad()
            loss.backward()
            values = run.reduce(step, {"loss": loss, **terms})  # ends if not finite
            optimizer.step()
            step += 1
            run.note_unreadable(unreadable)
            bar.set_postfix(loss=values["loss"], refresh=False)
            if step % config.log_every == 0:
                run.log(step, **values, lr=now, unreadable=run.unreadable)
            due, stop = step % config.save_every == 0 or step == steps, run.stop_requested()
            if due:
                evaluate(model, val, run, step)
            if due or stop:
                run.save(step, model, optimizer)
            if stop:
                return
        if world.is_main:
            torch.save(model.state_dict(), folder / "detector.pt")
            line = "step {step}: AP {box_AP:.3f}, AP50 {box_AP50:.3f}, AP75 {box_AP75:.3f}"
            print(*(line.format(**row) for row in run.rows("box_AP")), sep="\n")


if __name__ == "__main__":
    harness.main(train, CONFIG)  # pyright: ignore[reportPossiblyUnboundVariable]
