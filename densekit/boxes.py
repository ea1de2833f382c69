"""Box algebra. Boxes are `xyxy`, half-open, in continuous pixels; never of negative size."""

import torch
from densekit.typing import Bool, Float, Tensor, typed, widen

__all__ = ["box_area", "box_iou", "boxes_valid", "intersect_boxes"]


@typed
def boxes_valid(boxes: Float[Tensor, "*batch 4"]) -> Bool[Tensor, "*batch"]:
    """Tell the boxes that enclose an area from the reversed, empty, infinite and NaN ones.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)`, in any frame.

    Returns:
        True where all four numbers are finite and `x1 < x2` and `y1 < y2`.

    Examples:
        >>> boxes_valid(torch.tensor([[0.0, 0.0, 2.0, 1.0], [2.0, 0.0, 0.0, 1.0]]))
        tensor([ True, False])

    References:
        House convention: what makes no sense is reported through `valid`, never raised.
    """
    return _valid(boxes)


@typed
def box_area(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """Area of each box; zero for a box that is not valid.

    Half precision is widened to float32, where the area of an image does not overflow.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)`, in any frame.

    Returns:
        `(x2 - x1)(y2 - y1)` in the squared unit of the boxes' frame.

    Examples:
        >>> box_area(torch.tensor([[1.0, 1.0, 3.0, 2.0], [2.0, 0.0, 0.0, 1.0]]))
        tensor([2., 0.])

    References:
        torchvision's `box_area`, which gives negative areas to reversed boxes.
    """
    return _area(boxes)


@typed
def intersect_boxes(
    boxes1: Float[Tensor, "*batch 4"], boxes2: Float[Tensor, "*batch 4"]
) -> Float[Tensor, "*batch 4"]:
    """Intersection of two boxes, pair by pair.

    Args:
        boxes1: Boxes `(x1, y1, x2, y2)`.
        boxes2: Boxes in the same frame.

    Returns:
        The box of the points inside both; all zeros where the two share no area or one of them
        is not valid, so that `boxes_valid` of the result tells which exist.

    Examples:
        >>> intersect_boxes(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, -1, 3, 1]))
        tensor([1., 0., 2., 1.])

    References:
        DenseSiam, Sec 3.2 (the intersected region of two views).
    """
    return _intersection(boxes1, boxes2)


@typed
def box_iou(
    boxes1: Float[Tensor, "*batch 4"], boxes2: Float[Tensor, "*batch 4"]
) -> Float[Tensor, "*batch"]:
    """Intersection over union of two boxes, pair by pair.

    Half precision is widened to float32.

    Args:
        boxes1: Boxes `(x1, y1, x2, y2)`.
        boxes2: Boxes in the same frame.

    Returns:
        Area of the intersection over area of the union, in [0, 1]; zero where they share no area
        or one of them is not valid.

    Examples:
        >>> box_iou(torch.tensor([0.0, 0, 2, 1]), torch.tensor([1.0, 0, 3, 1]))
        tensor(0.3333)

    References:
        torchvision's `box_iou` (all pairs; NaN for empty boxes).
    """
    area1, area2, shared = _area(torch.stack([boxes1, boxes2, _intersection(boxes1, boxes2)]))
    union = area1 + area2 - shared
    return torch.where(union > 0, shared / torch.where(union > 0, union, 1.0), 0.0)


def _valid(boxes: Tensor) -> Tensor:
    extent = boxes[..., 2:] - boxes[..., :2]  # NaN or infinite when a coordinate is
    return ((extent > 0) & (extent < torch.inf)).all(-1)


def _area(boxes: Tensor) -> Tensor:
    boxes = widen(boxes)
    extent = torch.where(_valid(boxes)[..., None], boxes[..., 2:] - boxes[..., :2], 0.0)
    return extent[..., 0] * extent[..., 1]


def _intersection(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    corner = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    box = torch.cat([corner, torch.minimum(boxes1[..., 2:], boxes2[..., 2:])], -1)
    valid = _valid(torch.stack([boxes1, boxes2, box])).all(0)
    return torch.where(valid[..., None], box, 0.0)
