"""Measure the memory and the speed of recipes/evaluate.py, and print Markdown tables.

    python benchmarks/evaluation.py                       # all sections, some minutes on a core
    python benchmarks/evaluation.py --only table          # the memory of three sets, at once
    python benchmarks/evaluation.py --only check --protocols linear-seg kmeans-seg

The sections:

* `table`: the peak of each protocol on PVOC, COCO and ADE20K, by `peak_bytes`, from shapes alone.
* `check`: the same against the measured peak, on 300 large synthetic images in a temporary folder.
  All that torch allocates on the CPU counts, which its profiler writes down.
* `encoding`: images a second of the loader alone, of the encoder alone and of `evaluate.py`.
* `neighbors`: cells that are looked up in labeled cells, against the bare product and `topk`.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

# The recipes come first: both they and the benchmarks have an adapt.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

import evaluate
import numpy as np
import torch
from downstream import protocols as protocols_module
from downstream.memory import Sizes, feature_bytes, peak_bytes
from PIL import Image
from torch import Tensor, nn
import densekit as dk

IMAGES = {"train": 200, "val": 100}  # of the check
DIFFERENT = 20  # of them; the others have the same content
FEW = 4  # images that nobody reads
LARGE = (768, 1024)  # height and width of the files
SIZE = (448, 448)  # of the images that are encoded
CELL = 16  # pixels
CHANNELS = 384
CLASSES = 21
BOXES = 3  # of an image
TOLERANCE = 0.2  # of the formulas


# ---- a set and an encoder of any size ------------------------------------------------------------
def write_set(folder: Path, images: dict[str, int], size: tuple[int, int]) -> None:
    """A labeled set of a splits' images, each with a label map and three boxes."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    random = np.random.default_rng(0)
    height, width = size
    boxes = []
    splits = {}
    number = 0
    for split, count in images.items():
        names = []
        for _ in range(count):
            name = f"{number:05d}"
            files = (folder / "images" / f"{name}.jpg", folder / "labels" / f"{name}.png")
            if number < DIFFERENT:
                coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((width, height)).save(files[0], quality=80)
                labels = random.integers(0, CLASSES, (8, 8), dtype=np.uint8)
                enlarged = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
                enlarged.save(files[1])
            else:
                for file in files:
                    os.link(file.with_stem(f"{number % DIFFERENT:05d}"), file)
            objects = []
            for _ in range(BOXES):
                x, y = random.integers(0, width // 2), random.integers(0, height // 2)
                box = [int(x), int(y), int(x + width // 4), int(y + height // 4)]
                objects.append({"box": box, "cat": int(random.integers(1, CLASSES)), "crowd": 0})
            boxes.append({"id": name, "objects": objects})
            names.append(name)
            number += 1
        splits[split] = names
    classes = ["background", *(f"class {number}" for number in range(1, CLASSES))]
    (folder / "classes.json").write_text(json.dumps({"labels": classes}))
    (folder / "splits.json").write_text(json.dumps(splits))
    (folder / "boxes.json").write_text(json.dumps(boxes))


class Patches(nn.Module):
    """An encoder that needs hardly any memory beside its maps: a random layer on patches."""

    name = "patches"

    def __init__(self, cell: int, channels: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(channels, 3, generator=generator))
        self.stride = cell
        self.strides = [cell] * 4
        self.bands = None

    def levels(self, images: Tensor, *, stem: bool = False) -> list[Tensor]:
        means = nn.functional.avg_pool2d(images, self.stride)
        maps = torch.einsum("dc,nchw->ndhw", self.weight, means)
        maps += 0.1 * torch.randn(maps.shape[1:], generator=torch.Generator().manual_seed(0))
        return [maps] * (5 if stem else 4)

    def takes(self, size: tuple[int, int]) -> str:
        return ""


# ---- memory --------------------------------------------------------------------------------------
PROTOCOLS = (
    "linear-seg",
    "ridge-seg",
    "kmeans-seg",
    "retrieval-seg",
    "object-knn",
    "disturbed-object-knn",
    "image-knn",
    "image-linear",
    "image-linear-map",
    "image-svm",
    "retrieval",
)

# A ViT-S/16 at 448 pixels. Boxes are those of the annotations, and ADE20K has none.
VIT = Sizes(
    0, 0, 28 * 28, 384, pooled=(384,) * 4, vectors=(9600,) * 4, image=448 * 448
)  # fmt: skip
SETS = {
    "PVOC": VIT._replace(
        fit=1_464, test=1_449, gallery=3_507, objects=3_422, classes=21, pixels=500 * 500
    ),
    "COCO": VIT._replace(
        fit=118_287, test=5_000, gallery=860_001, objects=36_781, classes=81, pixels=640 * 640
    ),
    "ADE20K": VIT._replace(fit=20_210, test=2_000, classes=150, pixels=2_000 * 2_000),
}


def table(protocols: list[str]) -> None:
    """Print the features and the peak of each protocol on three sets, in GB."""
    print(f"| protocol | {' | '.join(SETS)} |\n|---|{'---|' * len(SETS)}")
    for protocol in protocols:
        cells = []
        for sizes in SETS.values():
            if protocol.endswith("object-knn") and not sizes.gallery:
                cells.append("")
                continue
            features = feature_bytes(protocol, sizes) / 1e9
            cells.append(f"{features:.2f}, {peak_bytes(protocol, sizes) / 1e9:.2f}")
        print(f"| `{protocol}` | {' | '.join(cells)} |", flush=True)


def score(protocol: str, config: Any, cell: int, channels: int) -> None:
    config = replace(config, protocol=protocol)  # the features are those of this one alone
    samples = evaluate.open_samples(config)
    encoder = Patches(cell, channels).requires_grad_(requires_grad=False)
    evaluate.Evaluation(encoder, samples, None, config).score(protocol)


def measure(protocol: str, config: Any, cell: int, channels: int) -> int:
    """The most bytes that torch holds on the CPU while a protocol scores."""
    with torch.profiler.profile(profile_memory=True) as profile:
        score(protocol, config, cell, channels)
    profiler: Any = profile.profiler
    events = profiler.kineto_results.events()
    changes = [(x.start_ns(), x.nbytes()) for x in events if x.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    held = itertools.accumulate(bytes_more for _, bytes_more in changes)
    return max(held, default=0)


def sizes_of(config: Any, images: dict[str, int], size: tuple[int, int]) -> Sizes:
    """The sizes of the set of `write_set` and of the features of `Patches`."""
    height, width = [side // CELL for side in config.size]
    pooled = [min(round((9000 / CHANNELS) ** 0.5), side) for side in (height, width)]
    return Sizes(
        images["train"],
        images["val"],
        height * width,
        CHANNELS,
        pooled=(CHANNELS,) * 4,
        vectors=(CHANNELS * pooled[0] * pooled[1],) * 5,
        gallery=BOXES * images["train"],
        objects=BOXES * images["val"],
        classes=CLASSES,
        pixels=size[0] * size[1],
        image=config.size[0] * config.size[1],
        batch=config.batch,
        workers=config.workers,
        draws=config.draws,
    )


def check(
    protocols: list[str],
    images: dict[str, int] = IMAGES,
    size: tuple[int, int] = LARGE,
    encoded: tuple[int, int] = SIZE,
) -> list[float]:
    """Print what each protocol takes on large images beside what its formula says."""
    ratios = []
    print("| protocol | measured | formula | ratio |\n|---|---|---|---|", flush=True)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        # These numbers change the time alone, but for the gallery, which is in the formula too.
        stack.enter_context(mock.patch.object(protocols_module, "GALLERY", 10_000))
        stack.enter_context(mock.patch.object(dk, "fit_svm", partial(dk.fit_svm, iterations=25)))
        data = Path(folder) / "set"
        write_set(data, images, size)
        config = evaluate.Config(
            ("patches",), data=data, size=encoded, out=Path(folder) / "out", workers=0, epochs=1,
            cost=1.0, batch=4,
        )  # fmt: skip  # few images at a time, so that the fits take the most
        for protocol in protocols:
            with contextlib.redirect_stderr(io.StringIO()):  # the bars of each split
                measured = measure(protocol, config, CELL, CHANNELS)
            said = peak_bytes(protocol, sizes_of(config, images, size))
            ratios.append(said / measured)
            cells = f"{measured / 1e6:.0f} MB | {said / 1e6:.0f} MB | {ratios[-1]:.2f}"
            print(f"| `{protocol}` | {cells} |", flush=True)
    return ratios


# ---- speed ---------------------------------------------------------------------------------------
def seconds(*functions: Callable[[], object], rounds: int) -> list[float]:
    """The seconds of this process for a call of each function, in turn: the median of the rounds.

    Seconds that the processor works count, so that a busy machine changes little.
    """
    measured: list[list[float]] = [[] for _ in functions]
    for number in range(rounds + 1):
        for function, own in zip(functions, measured, strict=True):
            start = time.process_time()
            function()
            if number:  # the first round warms up
                own.append(time.process_time() - start)
    return [statistics.median(own) for own in measured]


def row(what: str, ours: str, rival: str, ratio: str) -> None:
    print(f"| {what} | {ours} | {rival} | {ratio} |", flush=True)


def encoding(count: int = 32, rounds: int = 3) -> None:
    """Images a second of the loader alone, of the encoder alone and of `encode`, each by one core.

    The loader works in a process of its own, and does not count for the process that encodes.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "set"
        write_set(data, {"train": count, "val": FEW}, (480, 640))
        config = evaluate.Config(("random",), data=data, size=(224, 224), batch=count)
        read_here = replace(config, workers=0)
        samples, _ = evaluate.open_samples(config)
        parts = frozenset({"maps"})

        def load() -> None:
            list(evaluate.load_batches(samples.with_parts(parts), read_here, "", range(count)))

        def encode_all() -> None:
            evaluate.encode(encoder, samples, replace(config, workers=1), parts)

        @torch.no_grad()
        def encode_alone() -> None:
            encoder.levels(images)

        for name in ("random:resnet18", "random:vit_small_patch16_224"):
            encoder = evaluate.load_encoder(name, seed=0)
            images = torch.rand(count, 3, 224, 224)
            loaded, alone, whole = seconds(load, encode_alone, encode_all, rounds=rounds)
            row(
                f"images a second, {name}",
                f"{count / whole:.1f} (`evaluate.py`, beside its loader)",
                f"{count / alone:.1f} (the encoder alone), {count / loaded:.1f} (a loader process)",
                f"{alone / whole:.2f} of the encoder's",
            )


def neighbors(blocks: int = 4, known: int = 100_000, rounds: int = 2) -> None:
    """Look up some of 480,000 cells in 100,000 labeled ones, against the bare product.

    All sides work in blocks of half a gigabyte of cosines, and the rows are of length one.
    """
    at_once = 2**27 // known
    generator = torch.Generator().manual_seed(0)
    gallery = dk.l2_normalize(torch.randn(known, CHANNELS, generator=generator))
    cells = dk.l2_normalize(torch.randn(blocks * at_once, CHANNELS, generator=generator))
    labels = torch.randint(CLASSES, (known,), generator=generator)

    def ours() -> None:
        dk.knn_votes(cells, gallery, labels, classes=CLASSES, k=20)

    def product() -> None:
        for part in cells.split(at_once):
            part @ gallery.mT

    def with_topk() -> None:
        for part in cells.split(at_once):
            (part @ gallery.mT).topk(20)

    own, bare, floor = seconds(ours, product, with_topk, rounds=rounds)
    what = f"`knn_votes`, {len(cells):,} of 480,000 cells in {known:,} of {CHANNELS} numbers, k 20"
    for other, name in ((bare, "bare product"), (floor, "bare product and topk")):
        row(what, f"{own:.2f} s", f"{other:.2f} s ({name})", f"{other / own:.0%} of its speed")


SPEED: dict[str, Callable[[], None]] = {"encoding": encoding, "neighbors": neighbors}
SECTIONS = ("table", "check", *SPEED)


def main(sections: list[str], protocols: list[str]) -> int:
    """Print the sections; 1 if a peak is more than 20 % off its formula."""
    torch.set_num_threads(1)
    failed = False
    for section in sections:
        if section in SPEED:
            print("| what | densekit | rival | ratio |\n|---|---|---|---|")
            SPEED[section]()
        elif section == "table":
            table(protocols)
        else:
            ratios = check(protocols)
            failed = not all(1 / (1 + TOLERANCE) <= x <= 1 + TOLERANCE for x in ratios)
        print()
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    arguments = parser.parse_args()
    sys.exit(main(arguments.only, arguments.protocols))
