"""Box algebra, and random selection and placement of boxes.

Boxes are `(x1, y1, x2, y2)`, half-open, in continuous pixels or in another frame.
"""

from typing import NamedTuple

import torch
from densekit.numerics import check, check_size, safe_divide, sample_uniform, take_rows, widened
from densekit.typing import Bool, Float, Size, Tensor, typed

__all__ = [
    "SampledBoxes",
    "box_area",
    "box_containment",
    "box_iou",
    "boxes_valid",
    "clip_boxes",
    "intersect_boxes",
    "sample_boxes",
    "sample_boxes_at_iou",
]


class SampledBoxes(NamedTuple):
    """Randomly selected boxes, the same number for each image.

    Attributes:
        boxes: The selected boxes.
        valid: False where the image has too few boxes; the entry is then a copy of its first
            selected box.
    """

    boxes: Float[Tensor, "*batch count 4"]
    valid: Bool[Tensor, "*batch count"]


@typed
def boxes_valid(boxes: Float[Tensor, "*batch 4"]) -> Bool[Tensor, "*batch"]:
    """Find the boxes that enclose an area.

    Reversed, empty, infinite and NaN boxes are not valid.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)`, in any frame.

    Returns:
        True where all four numbers are finite and `x1 < x2` and `y1 < y2`.

    Examples:
        >>> boxes_valid(torch.tensor([[0.0, 0.0, 2.0, 1.0], [2.0, 0.0, 0.0, 1.0]]))
        tensor([ True, False])
    """
    return _valid(boxes)


@typed
def box_area(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """Compute the area of each box; it is zero for a box that is not valid.

    Half precision is converted to float32, in which the area of an image does not overflow.
    torchvision's `box_area` returns negative areas for reversed boxes.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)`, in any frame.

    Returns:
        `(x2 - x1)(y2 - y1)` in the squared unit of the boxes' frame.

    Examples:
        >>> box_area(torch.tensor([[1.0, 1.0, 3.0, 2.0], [2.0, 0.0, 0.0, 1.0]]))
        tensor([2., 0.])
    """
    return _area(boxes, _valid(boxes))


@typed
def intersect_boxes(
    boxes1: Float[Tensor, "*batch 4"], boxes2: Float[Tensor, "*batch 4"]
) -> Float[Tensor, "*batch 4"]:
    """Intersect two boxes, pair by pair.

    Args:
        boxes1: Boxes `(x1, y1, x2, y2)`.
        boxes2: Boxes in the same frame.

    Returns:
        The box of the points that lie inside both. It is all zeros where the two boxes share no
        area or one of them is not valid, so `boxes_valid` of the result is True where an
        intersection exists.

    Examples:
        >>> intersect_boxes(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, -1, 3, 1]))
        tensor([1., 0., 2., 1.])

    References:
        DenseSiam, Sec 3.2 (the intersected region of two views).
    """
    boxes, valid = _with_shared(boxes1, boxes2)
    return torch.where(valid[..., None], boxes[2], 0.0)


@typed
def box_iou(
    boxes1: Float[Tensor, "*batch 4"], boxes2: Float[Tensor, "*batch 4"]
) -> Float[Tensor, "*batch"]:
    """Compute the intersection over union of two boxes, pair by pair.

    Half precision is converted to float32. torchvision's `box_iou` compares all pairs, and returns
    NaN for empty boxes.

    Args:
        boxes1: Boxes `(x1, y1, x2, y2)`.
        boxes2: Boxes in the same frame.

    Returns:
        The area of the intersection divided by the area of the union, in [0, 1]. It is zero where
        the two boxes share no area or one of them is not valid.

    Examples:
        >>> box_iou(torch.tensor([0.0, 0, 2, 1]), torch.tensor([1.0, 0, 3, 1]))
        tensor(0.3333)
    """
    area1, area2, shared = _areas(boxes1, boxes2)
    union = area1 + area2 - shared
    return safe_divide(shared, union)


@typed
def box_containment(
    boxes1: Float[Tensor, "*batch 4"], boxes2: Float[Tensor, "*batch 4"]
) -> Float[Tensor, "*batch"]:
    """Compute the share of each first box that lies inside the second, pair by pair.

    Half precision is converted to float32.

    Args:
        boxes1: Boxes `(x1, y1, x2, y2)`.
        boxes2: Boxes in the same frame.

    Returns:
        The area of the intersection divided by the area of the first box, in [0, 1]. It is zero
        where the two boxes share no area or one of them is not valid.

    Examples:
        >>> box_containment(torch.tensor([0.0, 0, 2, 1]), torch.tensor([1.0, 0, 9, 9]))
        tensor(0.5000)

    References:
        D3SSL, Sec 4.1 (proposals that a view contains).
    """
    area, _, shared = _areas(boxes1, boxes2)
    return safe_divide(shared, area)


@typed
def clip_boxes(boxes: Float[Tensor, "*batch 4"], size: Size) -> Float[Tensor, "*batch 4"]:
    """Clip boxes to the image.

    This is torchvision's `clip_boxes_to_image`, for any leading axes.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)` in pixels, or in a frame whose extent is `size`.
        size: Size `(h, w)` of the image; `(1, 1)` for boxes in the frame of a view.

    Returns:
        The part of each box that lies inside the image. A box that lies outside becomes empty, and
        so is not valid.

    Raises:
        ValueError: The size is not positive.

    Examples:
        >>> clip_boxes(torch.tensor([-2.0, 1.0, 3.0, 9.0]), (4, 8))
        tensor([0., 1., 3., 4.])
    """
    check_size("boxes.clip_boxes", size)
    x1, y1, x2, y2 = boxes.unbind(-1)
    h, w = size
    return torch.stack([x1.clamp(0, w), y1.clamp(0, h), x2.clamp(0, w), y2.clamp(0, h)], -1)


@typed
def sample_boxes(
    boxes: Float[Tensor, "*batch n 4"],
    count: int,
    valid: Bool[Tensor, "*batch n"] | None = None,
    *,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "*batch n"] | None = None,
) -> SampledBoxes:
    """Randomly select `count` boxes per image, without replacement.

    The number of valid boxes may differ between images; the result has one length.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)`, in any frame.
        count: Number K of boxes to select per image.
        valid: Boxes to select from; by default all. A box that is reversed, empty or not finite is
            never selected.
        generator: Source of the random numbers, on the boxes' device.
        noise: Uniform numbers in [0, 1) from which the draw follows; by default they are drawn from
            `generator`.

    Returns:
        The selected boxes in random order, valid ones first. Where an image has fewer than `count`
        boxes, the other entries are not valid: they are copies of its first selected box, so that
        statistics over all entries contain real regions only. An image without any box has zeros.

    Raises:
        TypeError: The shapes do not match.
        ValueError: The count is negative.

    Examples:
        >>> boxes = torch.tensor([[[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 3.0]]])
        >>> sample_boxes(boxes, 2)
        SampledBoxes(boxes=tensor([[[0., 0., 2., 2.],
                 [0., 0., 2., 2.]]]), valid=tensor([[ True, False]]))

    References:
        D3SSL, Sec 4.2 (the K proposals of an image); SoCo, Sec 3.2.
    """
    check("boxes.sample_boxes", "count", count, count >= 0, "0 or more")
    usable = _valid(boxes) if valid is None else valid & _valid(boxes)
    boxes = torch.nn.functional.pad(torch.where(usable[..., None], boxes, 0.0), (0, 0, 0, count))
    usable = torch.nn.functional.pad(usable, (0, count))
    if noise is not None:
        noise = torch.nn.functional.pad(noise, (0, count))
    draws = sample_uniform(boxes.shape[:-1], boxes, generator=generator, noise=noise)
    draws = draws.where(usable, -1.0)
    chosen = draws.topk(count).indices
    boxes = take_rows(boxes, chosen)
    usable = usable.gather(-1, chosen)
    return SampledBoxes(torch.where(usable[..., None], boxes, boxes[..., :1, :]), usable)


@typed
def sample_boxes_at_iou(
    boxes: Float[Tensor, "*batch 4"],
    iou: float,
    *,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "*batch 3"] | None = None,
) -> Float[Tensor, "*batch 4"]:
    """Sample moved boxes of the same size that have a given IoU with the original boxes.

    Each box is moved in a random direction. How the loss of overlap is divided between x and y is
    random too. The moved boxes may leave the image.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)`, in any frame.
        iou: The intersection over union, in [0, 1]; with 0 the two boxes touch at a corner.
        generator: Source of the random numbers, on the boxes' device.
        noise: Uniform numbers in [0, 1) from which the draw follows; by default they are drawn from
            `generator`.

    Returns:
        The moved boxes, in the same frame.

    Raises:
        TypeError: The shapes do not match.
        ValueError: The IoU is outside [0, 1].

    Examples:
        >>> boxes = torch.tensor([0.2, 0.2, 0.6, 0.6])
        >>> box_iou(boxes, sample_boxes_at_iou(boxes, 0.25))
        tensor(0.2500)

    References:
        DUPR, Fig 5 (RoIs of a given IoU with a ground-truth box).
    """
    check("boxes.sample_boxes_at_iou", "iou", iou, 0 <= iou <= 1, "a number in [0, 1]")
    draws = sample_uniform((*boxes.shape[:-1], 3), boxes, generator=generator, noise=noise)
    shared = 2 * iou / (1 + iou)  # share of one box that both cover: (1 - |dx|) (1 - |dy|)
    part = draws[..., :1]
    kept = shared ** torch.cat([part, 1 - part], -1)
    shift = torch.where(draws[..., 1:] < 0.5, kept - 1, 1 - kept)
    shift = shift * (boxes[..., 2:] - boxes[..., :2])
    return (boxes + torch.cat([shift, shift], -1)).to(boxes.dtype)


def _valid(boxes: Tensor) -> Tensor:
    extent = boxes[..., 2:] - boxes[..., :2]  # NaN or infinite if a coordinate is
    return ((extent > 0) & (extent < torch.inf)).all(-1)


def _area(boxes: Tensor, valid: Tensor) -> Tensor:
    boxes = widened(boxes)
    extent = torch.where(valid[..., None], boxes[..., 2:] - boxes[..., :2], 0.0)
    return extent[..., 0] * extent[..., 1]


def _areas(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, ...]:
    """Compute the areas of both boxes and of what they share; 0 where they share nothing."""
    boxes, valid = _with_shared(boxes1, boxes2)
    return _area(boxes, valid).unbind(0)


def _with_shared(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Stack two boxes and what they share, and return where all three are valid."""
    corner = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    box = torch.cat([corner, torch.minimum(boxes1[..., 2:], boxes2[..., 2:])], -1)
    boxes = torch.stack([boxes1, boxes2, box])
    return boxes, _valid(boxes).all(0)
