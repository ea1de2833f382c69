"""Labeled images and videos for evaluation, from any layout: docs/recipes/labeled_images.md.

image, labels, boxes, box_classes, name, classes = open_images(Path("VOCdevkit"), split="val")[0]
name, frames, masks, _ = open_videos(Path("DAVIS"))[0]

Crowds, difficult objects, and pixels of no class are ignored here: the readers only mark them.
"""

import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import harness
import torch
from harness import UserError
from torch import Tensor
from downstream import bands
from downstream.davis import Video, open_videos
from downstream.label_files import (
    UnknownNameError,
    read_frame,
    read_list,
    read_mask,
    reading,
    upright_size,
)
from downstream.layouts import LAYOUTS, open_set
from downstream.records import IGNORED, LabeledObject, LabeledSet, clip_box, has_area, image_size

__all__ = [
    "LAYOUTS",
    "ImageSet",
    "Labeled",
    "UnknownNameError",
    "Video",
    "open_images",
    "open_videos",
    "read_frame",
    "read_list",
    "read_mask",
]


class Labeled(NamedTuple):
    image: Tensor  # uint8 (3, H, W), upright RGB; of bands, float (c, H, W)
    labels: Tensor | None  # (H, W), the class of each pixel, or `ignored`; None: no map
    boxes: Tensor  # float32 (n, 4), x0 y0 x1 y1 in pixels, half-open
    box_classes: Tensor  # int64 (n,)
    name: str
    # int8 (classes,): 1 of the image, 0 not, -1 unsure; None: the set does not say.
    classes: Tensor | None = None


class ImageSet:
    """Labeled images, read one by one: `images[i]` is a `Labeled`.

    `read_image(i)`, `read_labels(i)` and `read_boxes(i)` read no more than their names say.

    Attributes:
        classes: The names of the classes.
        background: The class that stands for no object; None where there is none.
        ignored: What a label map has where there is no class: 255 in a uint8 of up to 255 classes,
            and -1 in an int16 of more.
        layout: The name of the layout.
        things: How many of the classes, the first ones, a mapping calls things; 0: it does not say.
        names: The name of each image, in order.
        images: The file of each image, or the image itself, by its name.
        labels: The file of each label map, by the name of the image; None where there is none.
        value_range: Of the values of images whose file does not tell it.
        bands: How image files become images; None: they are pictures.
    """

    def __init__(self, found: LabeledSet):
        self.records = found.records
        self.classes = found.classes
        self.background = found.background
        self.stuff = found.stuff
        self.layout = found.layout
        self.things = found.things
        self.names = [record.name for record in found.records]
        self.images = {record.name: record.image for record in found.records}
        self.labels = {record.name: record.label_file for record in found.records}
        self.value_range: tuple[float, float] | None = None
        self.bands: bands.Bands | None = None
        self.numbers: dict[str, list[int]] | None = None  # by name, once `find` needs them

        self.label_type = torch.uint8
        self.ignored = 255
        if len(self.classes) > 255:
            self.label_type = torch.int16
            self.ignored = -1
        with_maps = any(record.label_map is not None for record in found.records)
        if with_maps and len(self.classes) > 2**15:
            raise UserError(f"The set has {len(self.classes)} classes: label maps hold {2**15}.")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Labeled:
        image = self.read_image(index)
        labels = self.draw_labels(index, image.shape[1:])
        size = image.shape[1:]
        self.check_size(index, size)
        boxes, box_classes = self.read_boxes(index, size)
        classes = self.image_classes(index, size)
        return Labeled(image, labels, boxes, box_classes, self.names[index], classes)

    def check_size(self, index: int, size: Sequence[int]) -> None:
        """A UserError, unless the annotation of an image with objects says this size."""
        record = self.records[index]
        if record.objects and record.size not in (None, tuple(size)):
            raise UserError(
                f"{record.image} is {list(size)} pixels, upright, but its annotation "
                f"says {list(record.size)}: the boxes are of another image."
            )

    def read_image(self, index: int) -> Tensor:
        """The image alone."""
        source = self.records[index].image
        if self.bands is not None:
            return self.read_bands(source, self.bands)
        return source if isinstance(source, Tensor) else read_frame(source, self.value_range)

    def read_bands(self, source: Path | Tensor, wanted: bands.Bands) -> Tensor:
        """An image with all channels, float (c, H, W)."""
        if isinstance(source, Tensor):
            raise UserError(
                f"Scenes are RGB pictures, and the encoder takes {wanted.channels} channels as "
                "stored: name a labeled set."
            )
        with reading(source):
            return bands.read_floats(source, wanted)

    def size_in_file(self, index: int) -> Sequence[int]:
        """Height and width, as the image says: no pixel is decoded."""
        source = self.records[index].image
        if self.bands is None or isinstance(source, Tensor):
            return image_size(source)
        return upright_size(source, self.bands.channels)

    def read_labels(self, index: int) -> Tensor | None:
        """The label map alone; None where the image has none. No pixel of the image is decoded."""
        record = self.records[index]
        if record.label_map is None:
            return None
        return self.draw_labels(index, self.size_in_file(index))

    def draw_labels(self, index: int, image_size: Sequence[int]) -> Tensor | None:
        """The label map of an image of this size; None where it has none."""
        record = self.records[index]
        if record.label_map is None:
            return None
        file = record.label_file
        if file is not None and file.suffix.lower() == ".json" and record.size is not None:
            # The map is drawn at the size that the JSON says: a wrong one may be huge.
            self.check_label_size(index, record.size, image_size)
        numbers = record.label_map(IGNORED)
        self.check_label_size(index, numbers.shape, image_size)
        return torch.where(numbers == IGNORED, self.ignored, numbers).to(self.label_type)

    def check_label_size(
        self, index: int, of_labels: Sequence[int], of_image: Sequence[int]
    ) -> None:
        """A UserError, unless a label map has the size of its image."""
        record = self.records[index]
        if list(of_labels) != list(of_image):
            raise UserError(
                f"{record.image} is {list(of_image)} pixels, upright, but {record.label_file} has "
                f"labels of {list(of_labels)}."
            )

    def read_boxes(
        self, index: int, image_size: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The boxes, clipped to the image, and their classes: no crowds, nothing difficult."""
        size = image_size or self.said_size(index)
        objects = self.objects_in_image(index, size)
        things = [x for x in objects if x.number not in self.stuff]
        found = [x for x in things if not (x.crowd or x.difficult)]
        clipped = [clip_box(x.box, size) for x in found]
        boxes = torch.tensor(clipped, dtype=torch.float32).view(-1, 4)
        return boxes, torch.tensor([x.number for x in found], dtype=torch.int64)

    def image_classes(self, index: int, image_size: Sequence[int] | None = None) -> Tensor | None:
        """Which classes the image has, int8: 1 yes, 0 no, -1 only crowds or difficult objects."""
        record = self.records[index]
        found = torch.zeros(len(self.classes), dtype=torch.int8)
        if record.classes is not None:
            found[list(record.classes)] = 1
            return found
        if record.objects is None:
            return None
        objects = self.objects_in_image(index, image_size or self.said_size(index))
        found[[x.number for x in objects]] = -1
        found[[x.number for x in objects if not (x.crowd or x.difficult)]] = 1
        return found

    def said_size(self, index: int) -> Sequence[int]:
        """Height and width, as the annotation says, or else the image itself."""
        record = self.records[index]
        if record.size is not None or not record.objects:  # without objects none is needed
            return record.size or (0, 0)
        return self.size_in_file(index)

    def objects_in_image(self, index: int, image_size: Sequence[int]) -> list[LabeledObject]:
        """The objects whose boxes have an area in the image."""
        objects = self.records[index].objects or []
        return [x for x in objects if has_area(x.box, image_size)]

    def find(self, line: str) -> int | None:
        """The number of the image that a line of a list names; None where there is none.

        The line may lack the folder and the extension, or have another extension. A line that
        several images fit is an error.
        """
        if self.numbers is None:
            self.numbers = number_by_name(self.names)
        without = PurePosixPath(line)
        if without.suffix.lower() in harness.EXTENSIONS:
            without = without.with_suffix("")
        for name in (line, PurePosixPath(line).name, without.as_posix(), without.name):
            fits = self.numbers.get(name, [])
            if len(fits) > 1:
                first = self.names[fits[0]]
                second = self.names[fits[1]]
                raise UserError(f"{line} may be {first} or {second}: give the whole name.")
            if fits:
                return fits[0]
        return None


def number_by_name(names: list[str]) -> dict[str, list[int]]:
    """The numbers of the images by their names, with and without folder and extension."""
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        path = PurePosixPath(name)
        without = path
        if path.suffix.lower() in harness.EXTENSIONS:
            without = path.with_suffix("")
        for key in {name, path.name, without.as_posix(), without.name}:
            numbers.setdefault(key, []).append(number)
    for number, name in enumerate(names):
        numbers[name] = [number]  # a whole name means one image, whatever else it fits
    return numbers


def open_images(
    data: Path | None,
    layout: str = "auto",
    split: str = "val",
    mapping: Path | None = None,
    *,
    labels: bool = True,
) -> ImageSet:
    """The labeled images below a folder; without one, scenes. A `mapping` gives other classes.

    Without `labels` only the images are wanted, and no label map has to be there.
    """
    found = open_set(data, layout, split, mapping)
    if labels:
        found.check_labels()
        say_left_out(found)
    return ImageSet(found)


def say_left_out(found: LabeledSet) -> None:
    """Count the objects whose boxes have no area in their image."""
    left_out = 0
    for record in found.records:
        size = record.size or (math.inf, math.inf)  # unknown until the image is read
        left_out += sum(not has_area(x.box, size) for x in record.objects or [])
    if left_out and harness.is_main_process():
        harness.tell(f"{left_out} objects are left out: their boxes have no area in the image.")
