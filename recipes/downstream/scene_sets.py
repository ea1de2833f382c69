"""Procedural scenes as a labeled set.

This module is no command. It makes the records of records.py.
"""

from functools import partial

import harness
from faster_coco_eval import mask as coco_masks
from torch import Tensor
from densekit.scenes import SCENE_CLASSES, Scenes, sample_scenes
from downstream.label_files import choose
from downstream.records import LabeledObject, LabeledSet, Mask, Record

COUNT = 256  # of a split
STUFF = 4  # the first classes are no objects


def open_split(split: str) -> LabeledSet:
    """One of three splits of 256 scenes, which are always the same."""
    splits = ["train", "val", "test"]
    split = choose(split, splits, "The set of scenes")
    draws = harness.generator(27, splits.index(split), 0)  # other scenes than those of training
    return as_set(sample_scenes(COUNT, (64, 64), generator=draws), split)


def sample_set(count: int) -> LabeledSet:
    """Scenes with one to four objects, to train a detector on."""
    draws = harness.generator(0)
    return as_set(sample_scenes(count, (64, 64), objects=(1, 4), generator=draws), "scene")


def as_set(drawn: Scenes, prefix: str) -> LabeledSet:
    pixels = (drawn.images * 255).round().byte()
    size = (pixels.shape[-2], pixels.shape[-1])
    records = []
    for i in range(len(pixels)):
        objects = []
        for k in drawn.valid[i].nonzero()[:, 0].tolist():
            mask = (drawn.instances[i] == k + 1).byte().numpy().copy(order="F")
            x0, y0, x1, y1 = drawn.boxes[i, k].tolist()
            shape = Mask(coco_masks.encode(mask), size)
            objects.append(LabeledObject((x0, y0, x1, y1), int(drawn.classes[i, k]), mask=shape))
        label_map = partial(scene_labels, drawn.labels[i])
        records.append(Record(f"{prefix}-{i:03d}", pixels[i], size, objects, label_map))
    return LabeledSet(list(SCENE_CLASSES), records, stuff=frozenset(range(STUFF)))


def scene_labels(labels: Tensor, crowd: int | None) -> Tensor:
    """The `label_map` of a scene, in which there are no crowds."""
    return labels
