"""Measure the memory and the speed of recipes/evaluate.py, and print Markdown tables.

    python benchmarks/evaluation.py                       # all sections, some minutes on a core
    python benchmarks/evaluation.py --only table          # the memory of three sets, at once
    python benchmarks/evaluation.py --only check --protocols linear-seg kmeans-seg

The sections:

* `table`: the peak of each protocol on PVOC, COCO and ADE20K, by `peak_bytes`, from shapes alone.
* `check`: the same against the measured peak, on 300 large synthetic images in a temporary folder.
  Each protocol has a process of its own. What it holds before is not counted: torch, the encoder,
  and what a run on few images has left.
* `encoding`: images a second of the loader alone, of the encoder alone and of `evaluate.py`.
* `neighbors`: cells that are looked up in labeled cells, against the bare product and `topk`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# The recipes come first: both they and the benchmarks have an adapt.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

import evaluate
import numpy as np
import torch
from downstream import image_sets
from downstream.memory import Sizes
from PIL import Image
from torch import Tensor, nn

IMAGES = {"train": 200, "val": 100}  # of the check
DIFFERENT = 20  # of them; the others have the same content
FEW = 4  # images of the run before the measurement
LARGE = (768, 1024)  # height and width of the files
SIZE = (448, 448)  # of the images that are encoded
CELL = 16  # pixels
CHANNELS = 384
CLASSES = 21


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
            for _ in range(3):
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
def measure(protocol: str, config: Any, cell: int, channels: int) -> int:
    """The peak of the memory of this process while it scores, above what it holds before."""

    def score(limit: int) -> None:
        own = replace(config, limit=limit, protocol=protocol)
        samples = evaluate.open_samples(own)
        encoder = Patches(cell, channels).requires_grad_(requires_grad=False)
        evaluate.Evaluation(encoder, samples, None, own).score(protocol)

    score(FEW)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    score(0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
