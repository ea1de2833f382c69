"""The layouts of labeled sets on a disk, and which of them a folder has.

This module is no command. More: docs/recipes/labeled_images.md.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import harness
from harness import UserError
from downstream import ade20k, cityscapes, coco, davis, folders, scene_sets, voc
from downstream.label_files import choose
from downstream.records import LabeledSet, change_classes


class Layout(NamedTuple):
    open: Callable[[Path, str], LabeledSet]  # a split of the set in a folder
    mark: str  # the file or folder that shows the layout
    automatic: bool = True  # whether the mark is enough; else the layout has to be named


LAYOUTS = {
    "folder": Layout(folders.open_folder, "classes.json"),
    "class-folders": Layout(folders.open_class_folders, "*/*", automatic=False),
    "coco": Layout(coco.open_instances, "annotations/instances_*.json"),
    "coco-panoptic": Layout(coco.open_panoptic, "annotations/panoptic_*.json"),
    "coco-stuff": Layout(coco.open_stuff, "stuffthingmaps"),
    "voc": Layout(voc.open_segmentation, "SegmentationClass"),
    "voc-main": Layout(voc.open_main, "ImageSets/Main", automatic=False),
    "ade20k": Layout(ade20k.open_set, "objectInfo150.txt"),
    "cityscapes": Layout(cityscapes.open_set, "leftImg8bit"),
    "davis": Layout(davis.open_set, "JPEGImages/*0p", automatic=False),
}
INNER = ("", "VOC*/", "VOCdevkit/VOC*/", "ADEChallengeData2016/")  # where below the folder it is


def open_set(
    data: Path | None, layout: str = "auto", split: str = "val", mapping: Path | None = None
) -> LabeledSet:
    """The labeled set below a folder; without one, scenes. A `mapping` gives other classes."""
    main_process = harness.is_main_process()
    if data is None:
        choose(layout, ["auto", "scenes"], "The list of layouts")
        found = scene_sets.open_split(split)
        found.layout = "scenes"
    else:
        kind, root = find_layout(data, choose(layout, ["auto", *LAYOUTS], "The list of layouts"))
        found = LAYOUTS[kind].open(root, split)
        found.layout = kind
        images = len(found.records)
        if layout == "auto" and main_process:
            harness.tell(f"{root}: layout {kind}, {images} images, {len(found.classes)} classes")
        with_map = sum(record.label_map is not None for record in found.records)
        if 0 < with_map < images and main_process:
            harness.tell(f"{root}: {images - with_map} of the {images} images have no label map.")

    if mapping is not None:
        found = change_classes(found, mapping)
    return found


def find_layout(data: Path, layout: str) -> tuple[str, Path]:
    """The layout and the folder of the only set in or below `data`."""
    places = find_places(data, layout)
    if len(places) != 1:
        marks = [(kind, LAYOUTS[kind].mark) for kind in wanted_layouts(layout)]
        listed = [f"layout {kind}: {path}" for kind, path in places or marks]
        raise UserError(f"{data} must hold one set, not {len(places)}: {', '.join(listed)}.")
    return places[0]


def wanted_layouts(layout: str) -> list[str]:
    if layout == "auto":
        return [kind for kind, x in LAYOUTS.items() if x.automatic]
    return [layout]


def find_places(data: Path, layout: str = "auto") -> list[tuple[str, Path]]:
    """The layouts that lie in or below `data`, each with its folder."""
    places = set()
    for kind in wanted_layouts(layout):
        mark = LAYOUTS[kind].mark
        inner_folders = ("",) if kind == "class-folders" else INNER
        for inner in inner_folders:
            for path in data.glob(inner + mark):
                root = path.parents[mark.count("/")]
                places.add((kind, root))
    return sorted(places)
