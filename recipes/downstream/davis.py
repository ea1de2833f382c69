"""Reader of the videos of DAVIS 2017, with a mask for each object, and of DAVIS 2016, with one.

This module is no command. In a mask 0 is the background, and 255 is to be ignored.

    name, frames, masks, _ = open_videos(Path("DAVIS"))[0]
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from harness import UserError
from torch import Tensor
from downstream.label_files import (
    GRAY_MODES,
    by_stem,
    choose_file,
    choose_folder,
    list_images,
    read_list,
    read_mask,
    read_pixels,
)
from downstream.records import IGNORED, LabeledSet, Record

VOID = 255  # in a mask: to be ignored
LISTS = {"2017": "2017", "2016": "2016", "480p": "2016", "1080p": "2016"}  # in ImageSets, by year


class Video(NamedTuple):
    name: str
    frames: list[Path]  # for read_frame
    masks: list[Path | None] | None  # of each frame; None: the whole video has no mask
    one_object: bool = False  # whether the objects of a mask count as one

    def read_mask(self, path: Path) -> Tensor:
        """The number of the object at each pixel, int64 (H, W): 0 none, 255 to be ignored."""
        if not self.one_object:
            return read_mask(path)
        pixels = read_pixels(path, (*GRAY_MODES, "RGB", "RGBA"))
        if pixels.ndim == 3:  # some masks of 2016 have colors
            pixels = pixels[..., :3].amax(-1)
        return (pixels > 0).long()


def find_lists(data: Path) -> list[str]:
    """The folders of ImageSets that list videos: of 2017 first, then of 2016. Empty: no DAVIS."""
    return [name for name in LISTS if (data / "ImageSets" / name).is_dir()]


def open_videos(
    data: Path, split: str = "val", resolution: str = "480p", year: str | None = None
) -> list[Video]:
    """The videos of a split; of 2017, unless the folder has 2016 alone or `year` says so."""
    lists = [name for name in find_lists(data) if year in (None, LISTS[name])]
    if not lists:
        wanted = year or "2017 or 2016"
        raise UserError(f"{data} is no DAVIS {wanted}: it lacks the lists in ImageSets.")
    one_object = LISTS[lists[0]] == "2016"
    listing = choose_file(split, data / "ImageSets" / lists[0], "", ".txt")
    resolution, _ = choose_folder(resolution, data / "JPEGImages")

    videos = []
    for name in dict.fromkeys(video_name(line) for line in read_list(listing)):
        frames = by_stem(list_images(data / "JPEGImages" / resolution / name))
        masks = by_stem(list_images(data / "Annotations" / resolution / name))
        if not frames or masks.keys() - frames.keys():
            raise UserError(f"Video {name} of {data} has no frames, or a mask without a frame.")
        of_frames = [masks.get(frame) for frame in frames] if masks else None
        videos.append(Video(name, list(frames.values()), of_frames, one_object))
    return videos


def open_set(root: Path, split: str) -> LabeledSet:
    """The frames as single images, with two classes: the background, and any object."""
    records = []
    for video in open_videos(root, split):
        masks = video.masks or [None] * len(video.frames)
        for frame, mask in zip(video.frames, masks, strict=True):
            record = Record(f"{video.name}/{frame.name}", frame)
            if mask is not None:
                label_map = partial(draw_foreground, video, mask)
                record = record._replace(label_map=label_map, label_file=mask)
            records.append(record)
    return LabeledSet(["background", "object"], records, background=0)


def draw_foreground(video: Video, path: Path, crowd: int | None) -> Tensor:
    """The `label_map` of a frame, in which there are no crowds."""
    numbers = video.read_mask(path)
    return torch.where(numbers == VOID, IGNORED, (numbers > 0).long())


def video_name(line: str) -> str:
    """The video of a line: its name, or in the lists of 2016 a frame of it and the frame's mask.

    Such a line is `/JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/00000.png`.
    """
    first = line.split()[0]
    return Path(first).parent.name if "/" in first else first
