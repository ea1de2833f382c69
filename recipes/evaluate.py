"""Score frozen encoders by the protocols of the four papers, side by side.

    python recipes/evaluate.py runs/croc-coco timm:vit_small_patch16_224 random:resnet50
        --protocol linear-seg,kmeans-seg --data VOCdevkit --size 448 448

An encoder is a run folder or its encoder.safetensors, timm:NAME, torchvision:NAME or random:NAME.
Without --data it takes procedural scenes. It writes results.json, report.md (one table for each
protocol, with figures) and figures/. The protocols, one by one: docs/recipes/evaluate.md.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro


@dataclass(frozen=True)
class Config:
    encoders: Annotated[tuple[str, ...], tyro.conf.Positional]  # Run folders, timm:NAME, ...
    protocol: str = "linear-seg,kmeans-seg,object-knn"  # Some of the protocols, or all.
    data: Path | None = None  # A labeled set (docs/recipes/labeled_images.md), or DAVIS.
    layout: str = "auto"  # Of the data: folder, coco, coco-stuff, voc, ade20k, cityscapes, ...
    mapping: Path | None = None  # Other classes for the labels' ids, as for image_sets.
    fit: str = "train"  # Split to fit on; the gallery of neighbors.
    split: str = "val"  # Split to score.
    size: tuple[int, int] = (224, 224)  # Height and width that images are resized to.
    limit: int = 0  # At most so many images of a split, drawn at random; 0 takes all.
    out: Path = Path("runs/evaluate")  # Folder to write.
    seeds: int = 1  # Repeat with seeds 0, 1, ...: of random encoders, of fits, of k-means.
    clusters: int = 0  # Of kmeans-seg; 0 is one for each class; more match many to one.
    neighbors: int = 20  # k of all nearest-neighbor protocols but video.
    epochs: int = 25  # Of the linear layers.
    lr: float = 0.1  # Of the linear layers.
    objects: int = 10  # At most so many objects of an image, drawn at random.
    cost: float = 1.0  # C of the SVM.
    draws: int = 1000  # Of the bootstrap over images.
    batch: int = 32  # Images at a time.
    workers: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"


if __name__ == "__main__":  # the arguments before torch: --help answers at once
    CONFIG = tyro.cli(Config, description=__doc__)

import harness
import torch
from downstream import image_sets
from downstream.diagnose import ALONE, place, retrieval
from downstream.encoders import Encoder, load_encoder
from downstream.protocols import FITTED, Features, position_prior, video
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm
import densekit as dk


# ==== features ====================================================================================
class Sample(NamedTuple):
    image: Tensor  # float (3, h, w) in [0, 1], resized
    labels: Tensor | None
    boxes: Tensor  # in [0, 1]
    classes: Tensor  # of the boxes
    area: Tensor  # share of each class in the image


class Samples:  # a labeled set at one size, as a DataLoader reads it
    def __init__(self, data: Any, config: Config):
        self.data, self.size, self.objects = data, config.size, config.objects
        drawn = torch.randperm(len(data), generator=harness.generator(0))
        count = min(config.limit or len(data), len(data))
        self.rows = drawn[:count].sort().values.tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        item, row = self.data[self.rows[index]], self.rows[index]
        h, w = item.image.shape[-2:]
        image = transforms.resize(item.image / 255, self.size, antialias=True)
        chosen = torch.randperm(len(item.boxes), generator=harness.generator(1, row))
        chosen = chosen[: self.objects].sort().values
        kinds = torch.nn.functional.one_hot(item.box_classes, len(self.data.classes))
        sizes = kinds * dk.box_area(item.boxes)[:, None] / (h * w)
        area = torch.cat([torch.zeros(1, kinds.shape[1]), sizes]).amax(0)  # of the largest box
        if item.labels is not None:
            known = item.labels[item.labels != image_sets.IGNORED]
            area = torch.bincount(known, minlength=kinds.shape[1]) / (h * w)
        boxes = item.boxes[chosen] / torch.tensor([w, h, w, h])
        return Sample(image, item.labels, boxes, item.box_classes[chosen], area)


def loader(samples: Samples, config: Config, title: str) -> Iterator[list[Sample]]:
    parts = torch.arange(len(samples)).tensor_split(-(-len(samples) // config.batch))
    found = DataLoader(
        samples, batch_sampler=[x.tolist() for x in parts], collate_fn=list,
        num_workers=config.workers, multiprocessing_context="fork" if config.workers else None,
    )  # fmt: skip
    return iter(tqdm(found, desc=title, unit="batch", leave=False))


@torch.no_grad()
def encode(
    encoder: Encoder, samples: Samples, config: Config, *, disturb: bool = False
) -> Features:
    """All features of a set; disturbed: each object with another image around its box."""
    rows: dict[str, list] = {name: [] for name in Features._fields[:-1]}
    device, first = place(encoder), 0
    title = f"{encoder.name}{' (disturbed)' if disturb else ''}"
    for batch in loader(samples, config, title):
        images = torch.stack([x.image for x in batch])
        if disturb and len(images) < 2:
            raise harness.UserError("To disturb an object takes another image: give --batch 2.")
        levels = encoder.levels(images.to(device))
        owner = torch.cat([torch.full((len(x.boxes),), i) for i, x in enumerate(batch)]).long()
        boxes = torch.cat([x.boxes for x in batch])
        for part in torch.arange(len(owner)).split(config.batch):
            own, box = owner[part], boxes[part]
            maps = levels[-1][own.to(device)]
            if disturb:
                others = images[(own + 1 + part % max(1, len(images) - 1)) % len(images)]
                h, w = images.shape[-2:]
                mask = dk.boxes_to_mask((box * torch.tensor([w, h, w, h]))[:, None], (h, w))
                maps = encoder(dk.composite(images[own], others, mask).to(device))
            roi = dk.roi_align(maps.float(), box[:, None].to(device), 7).features
            rows["objects"].append(roi.mean((-2, -1))[:, 0].cpu())
        rows["maps"].append(levels[-1].half().cpu())
        rows["pooled"].append([x.float().mean((-2, -1)).cpu() for x in levels])
        rows["labels"] += [x.labels for x in batch]
        rows["area"] += [x.area for x in batch]
        rows["object_classes"] += [x.classes for x in batch]
        rows["object_images"].append(owner + first)
        first += len(batch)
    pooled = [torch.cat(level) for level in zip(*rows["pooled"], strict=True)]
    empty = torch.zeros(0, rows["maps"][0].shape[1])
    return Features(
        torch.cat(rows["maps"]), pooled, rows["labels"], torch.stack(rows["area"]),
        torch.cat([empty, *rows["objects"]]), torch.cat(rows["object_classes"]),
        torch.cat(rows["object_images"]), list(samples.data.classes),
    )  # fmt: skip


# ==== report ======================================================================================
PROTOCOLS = (*FITTED, *ALONE, "retrieval", "video")


def over_seeds(found: list) -> Any:
    """Means over the seeds; an interval also gets the deviation of its value over them."""
    if not isinstance(found[0], dict):
        mean = statistics.fmean(found)
        return found[0] if isinstance(found[0], int) and mean == found[0] else mean
    means = {key: over_seeds([x[key] for x in found if key in x]) for key in found[0]}
    if "value" in means and len(found) > 1:
        means["over_seeds"] = statistics.stdev(x["value"] for x in found)
    return means


def short(figures: dict) -> dict:
    """For a table: an interval in one cell, no numbers of single classes."""
    cells = {}
    for name, x in figures.items():
        if isinstance(x, dict) and "value" in x:
            spread = f" ± {x['over_seeds']:.3f}" if "over_seeds" in x else ""
            cells[name] = f"{x['value']:.3f}{spread} [{x['low']:.3f}, {x['high']:.3f}]"
        elif name != "iou":
            cells[name] = short(x) if isinstance(x, dict) else x
    return cells


def report(results: dict, config: Config) -> str:
    data, size = config.data or "procedural scenes", f"{config.size[0]} x {config.size[1]}"
    seeds = f"; mean over {config.seeds} seeds ± their deviation" if config.seeds > 1 else ""
    lines = ["# Evaluation", "", f"`{data}`, split {config.split}, images at {size}{seeds}; "
             "[95 % interval of a bootstrap over the images].", ""]  # fmt: skip
    for protocol in [x for x in PROTOCOLS if any(x in found for found in results.values())]:
        rows = {name: found[protocol] for name, found in results.items() if protocol in found}
        lines += [f"## {protocol}", "", dk.as_table({x: short(y) for x, y in rows.items()}), ""]
        if any("iou" in x for x in rows.values()):
            lines += [dk.as_table({x: y["iou"] for x, y in rows.items() if "iou" in y}), ""]
    for path in sorted((config.out / "figures").glob("*.png")):
        lines += [f"![{path.stem}](figures/{path.name})", ""]
    return "\n".join(lines)


def score(encoder: Encoder, wanted: list[str], sets: Any, config: Config, seed: int, prior: dict):
    """(protocol, figures) one by one; features are made once, the prior in the first run."""
    fit: Any
    test: Any
    fit, test = sets or (None, None)  # video reads its own
    features: dict[bool, list] = {}
    for protocol in wanted:
        disturb, figures = protocol.startswith("disturbed"), config.out / "figures"
        if protocol == "video":
            yield protocol, video(encoder, config)
        elif protocol in ALONE:
            batches = loader(test, config, f"{encoder.name} {protocol}")
            yield protocol, ALONE[protocol](encoder, batches, config, figures)
        else:
            if disturb not in features:
                features[disturb] = [
                    encode(encoder, x, config, disturb=disturb) for x in (fit, test)
                ]
            pair = features[disturb]
            if protocol == "retrieval":
                yield protocol, retrieval(encoder, lambda i: test[i].image, pair[1], figures)
                continue
            yield protocol, FITTED[protocol](*pair, config, seed)
            if protocol.endswith("-seg") and protocol not in prior:
                prior[protocol] = dk.as_dict(position_prior(*pair, config))


def evaluate(config: Config) -> None:
    wanted = list(PROTOCOLS) if config.protocol == "all" else config.protocol.split(",")
    if unknown := [x for x in wanted if x not in PROTOCOLS]:
        raise harness.UserError(f"There is no protocol {unknown[0]!r}: {', '.join(PROTOCOLS)}.")
    if min(config.seeds, config.batch, config.draws, *config.size) < 1 or not config.encoders:
        raise harness.UserError("Give an encoder, and 1 or more seeds, draws, batch and size.")
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    options = {"layout": config.layout, "mapping": config.mapping}
    splits = (config.fit, config.split) if wanted != ["video"] else ()
    sets = [image_sets.open_images(config.data, split=x, **options) for x in splits]
    if len(sets) == 2 and sets[0].classes != sets[1].classes:
        raise harness.UserError("The two splits name different classes.")
    sets = [Samples(x, config) for x in sets]
    results: dict[str, dict] = {"position prior": {}}
    seeds: dict[str, dict] = {}
    for name in config.encoders:
        runs: dict[str, list] = {}
        for seed in range(config.seeds):
            encoder = load_encoder(name, seed=seed).to("cuda" if cuda else "cpu")
            if any(x % encoder.stride for x in config.size):
                size = f"--size {config.size[0]} {config.size[1]}"
                what = f"whole cells of {name}: give multiples of {encoder.stride}"
                raise harness.UserError(f"{size} is not in {what}.")
            prior = results["position prior"]
            for protocol, found in score(encoder, wanted, sets, config, seed, prior):
                runs.setdefault(protocol, []).append(dk.as_dict(found))
        results[name] = {protocol: over_seeds(found) for protocol, found in runs.items()}
        seeds[name] = runs
        config.out.mkdir(parents=True, exist_ok=True)
        facts = {"config": asdict(config), "results": results, "seeds": seeds}
        text = json.dumps(facts, indent=2, default=str) + "\n"
        harness.write(config.out / "results.json", text.encode())  # after each: nothing is lost
        harness.write(config.out / "report.md", report(results, config).encode())
    print(report(results, config))


if __name__ == "__main__":
    harness.main(evaluate, CONFIG)  # pyright: ignore[reportPossiblyUnboundVariable]
