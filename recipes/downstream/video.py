"""The protocol video of evaluate.py: labels of the first frame, carried through DAVIS.

This module is no command. It is the protocol of DINO: nothing is learned. The labels of the first
frame are one for each cell, the nearest earlier cells vote, and each object's map is brought to
[0, 1] before the best one is taken.
"""

from typing import Any

import harness
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm
import densekit as dk
from downstream.davis import VOID, Video
from downstream.encoders import Encoder, device_of
from downstream.label_files import read_frame
from downstream.protocols import interval_over_images, resize_labels, split_interval
from downstream.shards import ALONE, Shards


@torch.no_grad()
def video(encoder: Encoder, videos: list[Video], config: Any, shards: Shards = ALONE) -> dict:
    """J, F and their mean over the objects of all videos (CrOC, Appendix D).

    The processes share the videos out; the first one has the figures, and the others have none.
    """
    own_videos = [videos[number] for number in shards.part(len(videos))]
    sums = []  # of each video, (1, 3): J and F, summed over its objects, and their number
    for item in tqdm(
        own_videos,
        desc=harness.printable(f"{encoder.name} video"),
        leave=False,
        disable=not shards.is_main,
    ):
        first, objects = read_first_mask(item)
        maps = encode_frames(encoder, item, config)
        start = labels_of_cells(first, objects, maps)
        shares = dk.propagate_video(maps, start)
        scores = score_frames(item, shares, objects)  # (frames, 2, objects)
        of_video = torch.cat([scores.mean(0).sum(1), torch.tensor([len(objects)])])
        sums.append(of_video.double()[None])
    states = shards.gather_parts(sums)
    if states is None:
        return {}

    def means(total: Tensor) -> Tensor:
        both = total[..., :2] / total[..., 2:]
        return torch.cat([both, both.mean(-1, keepdim=True)], -1)

    interval = interval_over_images(states, means, config.draws)
    return {
        **split_interval(interval, ("J", "F", "J&F")),
        "videos": len(states),
        "objects": int(states[:, 2].sum()),
    }


def read_first_mask(item: Video) -> tuple[Tensor, list[int]]:
    """The mask of the first frame, and the numbers of its objects."""
    masks = item.masks or []
    if len(masks) >= 3 and masks[0] is not None:
        first = item.read_mask(masks[0])
        objects = [x for x in first.unique().tolist() if x not in (0, VOID)]
        if objects:
            return first, objects
    raise harness.UserError(f"{item.name} has no object in its first frame to follow.")


def encode_frames(encoder: Encoder, item: Video, config: Any) -> Tensor:
    """The maps (t, d, h, w) of all frames, of the level that `config` chooses."""
    maps = []
    for number in range(0, len(item.frames), config.batch):
        paths = item.frames[number : number + config.batch]
        pixels = [read_frame(path, config.value_range) / 255 for path in paths]
        frames = [transforms.resize(x, config.size, antialias=True) for x in pixels]
        levels = encoder.levels(torch.stack(frames).to(device_of(encoder)))
        maps.append(levels[config.level - 1].float())  # level 0 is the last one
    together = torch.cat(maps)
    harness.check(
        bool(together.isfinite().all()),
        f"{encoder.name} gives features that are not finite, of the video {item.name}.",
    )
    return together


def labels_of_cells(mask: Tensor, objects: list[int], maps: Tensor) -> Tensor:
    """One-hot labels (1 + objects, h, w) of the cells: the number at the middle of each cell.

    A cell of what is to be ignored has no label.
    """
    numbers = resize_labels(mask, maps.shape[-2:])
    labels = torch.stack([numbers == x for x in (0, *objects)])
    return labels.float().to(maps.device)


def bring_to_one(shares: Tensor) -> Tensor:
    """Each map of (objects, h, w) from its own minimum and maximum to 0 and 1."""
    low = shares.amin((-2, -1), keepdim=True)
    high = shares.amax((-2, -1), keepdim=True)
    span = high - low
    scaled = (shares - low) / torch.where(span > 0, span, 1.0)
    return torch.where(high > 0, scaled, shares)


def score_frames(item: Video, shares: Tensor, objects: list[int]) -> Tensor:
    """J and F of each object in every frame with a mask, (frames, 2, objects).

    The first and the last frame do not count, as in DAVIS's own program.
    """
    masks = item.masks or []
    scores = []
    for path, share in zip(masks[1:-1], shares[1:-1], strict=True):
        if path is None:
            continue
        mask = item.read_mask(path)
        resized = F.interpolate(share[None], tuple(mask.shape), mode="bilinear")[0]
        predicted = bring_to_one(resized).argmax(0).cpu()  # 0 is the background

        is_known = mask != VOID
        true_masks = torch.stack([mask == x for x in objects])
        own_masks = torch.stack([(predicted == i) & is_known for i in range(1, len(objects) + 1)])
        j = dk.region_similarity(true_masks, own_masks)
        f = dk.boundary_f_measure(true_masks, own_masks)
        scores.append(torch.stack([j, f]))
    if not scores:
        raise harness.UserError(f"{item.name} has no mask to score by but those at its ends.")
    return torch.stack(scores)
