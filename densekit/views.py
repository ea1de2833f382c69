"""Views of an image: a crop box and flips, the maps between the frames, overlap, cropping.

There are two frames. **Image frame**: continuous pixels of the source image, x to the right and y
down; the pixel in row i and column j covers `[j, j+1) x [i, i+1)` and its center is `(j + 0.5, i +
0.5)`. **View frame**: the unit square of a view; cell (i, j) of an h x w map has its center at `((j
+ 0.5)/w, (i + 0.5)/h)`. A flip maps x to 1 - x in the view frame, a vertical flip y to 1 - y.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from densekit.boxes import box_containment, box_iou, boxes_valid, intersect_boxes
from densekit.numerics import (
    broadcasts,
    check,
    check_size,
    full_precision,
    readable,
    refuse_channels_last,
    row_of,
    safe_divide,
    sample_uniform,
    widened,
)
from densekit.typing import Bool, Float, Int, Size, Tensor, typed

__all__ = [
    "BoxesInView",
    "MatrixViews",
    "Overlap",
    "PairedViews",
    "View",
    "ViewPairs",
    "boxes_image_to_view",
    "boxes_in_view",
    "boxes_view_to_image",
    "check_views",
    "coordinate_map",
    "crop_views",
    "full_view",
    "image_to_view",
    "index_views",
    "intersect_views",
    "pair_views",
    "sample_inner_views",
    "sample_view_pairs",
    "sample_views",
    "stack_views",
    "unstack_views",
    "view_from_matrix",
    "view_from_relative",
    "view_from_xywh",
    "view_to_image",
    "view_to_matrix",
    "views_to",
    "views_valid",
]

_MATRIX_CELLS = 2**20  # of the resize matrices that exist at one time
_ROUNDING = 0.01  # pixels by which rounding may move the side of a box
_SMALL = 16  # pixels: in an image with such a side, a box of one pixel may well be a crop
_OTHER_AXES = "has other leading axes than the argument"

PixelCenters = Literal["integer", "half"]


class View(NamedTuple):
    """A crop of an image, which may be resized to any size and may be mirrored.

    `View(box, flip)` is not mirrored top to bottom. One record holds any number of views, along the
    leading axes of its fields. As for every `NamedTuple`, a loop over it and `view[0]` give fields,
    not views: use `unstack_views` and `index_views`.

    Attributes:
        box: The crop `(x1, y1, x2, y2)` in the image frame, in pixels.
        flip: True where the crop is mirrored left to right.
        vertical_flip: True where the crop is mirrored top to bottom; by default nowhere.
    """

    box: Float[Tensor, "*batch 4"]
    flip: Bool[Tensor, "*batch"]
    # A view never holds this default: `_new_view` makes zeros of it, in the shape of `flip`.
    vertical_flip: Bool[Tensor, "*batch"] = None  # pyright: ignore[reportAssignmentType]


def _new_view(cls: type[View], box: Any, flip: Any, vertical_flip: Any = None) -> View:
    """Make a view; one that is given no vertical flip has none."""
    return tuple.__new__(cls, (box, flip, _or_no_flip(vertical_flip, flip)))


def _or_no_flip(vertical_flip: Any, flip: Any) -> Any:
    """Return the vertical flip, or False in the shape of `flip` where it is None.

    A `flip` that holds no truth values is what a tree of views may hold instead, such as the axes
    in `torch.vmap(..., in_dims=View(0, 0))`: the vertical flip is then the same.
    """
    if vertical_flip is not None:
        return vertical_flip
    if isinstance(flip, Tensor):
        return torch.zeros_like(flip)
    if isinstance(flip, bool) or hasattr(flip, "dtype"):
        # False, or an array of it as numpy has them: nothing is less than itself.
        return flip < flip
    return flip


_new_view.__name__ = _new_view.__qualname__ = "View"  # as errors about its arguments say it

# The class body of a NamedTuple may not define it, and a subclass that does is no NamedTuple to
# `torch.compile`. The compiler of torch 2.8 does not call it: there `View(box, flip)` holds None
# inside the graph, which `_fields` reads.
View.__new__ = _new_view  # pyright: ignore[reportAttributeAccessIssue]


class ViewPairs(NamedTuple):
    """Two views of each image.

    Attributes:
        view1: The first view.
        view2: The second view.
        valid: True where the two views overlap by at least the requested amount.
    """

    view1: View
    view2: View
    valid: Bool[Tensor, "*batch"]


class PairedViews(NamedTuple):
    """Pairs of views of each image, out of several.

    Attributes:
        view1: The first view of each pair.
        view2: The second view.
        index1: Which of the views the first one is.
        index2: Which of the views the second one is.
        valid: True where the two views overlap by at least the requested amount.
    """

    view1: View
    view2: View
    index1: Int[Tensor, " p"]
    index2: Int[Tensor, " p"]
    valid: Bool[Tensor, "*batch"]


class MatrixViews(NamedTuple):
    """Views that were read from matrices.

    Attributes:
        view: The views; the boxes are zeros where not valid.
        valid: True where a view does what the matrix does.
    """

    view: View
    valid: Bool[Tensor, "*batch"]


class BoxesInView(NamedTuple):
    """Boxes of an image as a view shows them.

    Attributes:
        boxes: The boxes in the view frame, in [0, 1].
        share: The share of each box that the view contains.
        valid: True for the boxes of which the view contains at least the requested share.
    """

    boxes: Float[Tensor, "*batch n 4"]
    share: Float[Tensor, "*batch n"]
    valid: Bool[Tensor, "*batch n"]


class Overlap(NamedTuple):
    """The overlap of two views of one image.

    Attributes:
        box: The shared region in the image frame, in pixels.
        box1: The same region in the frame of the first view, in [0, 1].
        box2: The same region in the frame of the second view, in [0, 1].
        iou: Intersection over union of the two crops, in [0, 1].
        valid: True where the two views share an area; elsewhere the boxes are zeros.
    """

    box: Float[Tensor, "*batch 4"]
    box1: Float[Tensor, "*batch 4"]
    box2: Float[Tensor, "*batch 4"]
    iou: Float[Tensor, "*batch"]
    valid: Bool[Tensor, "*batch"]


@typed
def full_view(
    size: Size | Int[Tensor, "*sizes 2"],
    batch: int | tuple[int, ...] = (),
    *,
    device: torch.device | str | None = None,
) -> View:
    """Make the view that is the whole image, not mirrored.

    Args:
        size: Size `(h, w)` of the image in pixels, or one size for each image.
        batch: Leading axes of the result, in front of those of `size`; a number is one axis.
        device: Device of the result; by default the device of the sizes.

    Returns:
        Views of shape `(*batch, *sizes)` with the box `(0, 0, w, h)`.

    Raises:
        ValueError: A size given as a tuple is not positive, or an axis of `batch` is negative.
            Sizes in a tensor are not checked.

    Examples:
        >>> full_view((480, 640)).box
        tensor([  0.,   0., 640., 480.])

    References:
        D3SSL, Sec 4.1 (its first view is the whole image).
    """
    if isinstance(size, tuple):
        check("views.full_view", "size", size, min(size) > 0, "a positive (h, w) in pixels")
    batch = _leading_axes("full_view", batch)
    height, width = _height_and_width(size, device)
    corner = torch.zeros_like(width)
    box = torch.stack([corner, corner, width, height], -1)
    box = box.expand(*batch, *box.shape).contiguous()
    flip = torch.zeros(box.shape[:-1], dtype=torch.bool, device=box.device)
    return View(box, flip, flip.clone())


@typed
def view_from_xywh(
    boxes: Float[Tensor, "*batch 4"],
    flip: Bool[Tensor, "*batch"] | None = None,
    vertical_flip: Bool[Tensor, "*batch"] | None = None,
) -> View:
    """Make views from crops that are given as a corner and a size.

    Args:
        boxes: Crops `(x, y, width, height)` in the image frame, in pixels.
        flip: True where the crop is mirrored left to right; by default nowhere.
        vertical_flip: True where the crop is mirrored top to bottom; by default nowhere.

    Returns:
        The views. Their boxes are not valid where a width or height is not positive.

    Raises:
        TypeError: The shapes do not match.

    Examples:
        >>> view_from_xywh(torch.tensor([10.0, 20.0, 30.0, 40.0])).box
        tensor([10., 20., 40., 60.])
    """
    corner, extent = boxes.unflatten(-1, (2, 2)).unbind(-2)
    return _view(torch.cat([corner, corner + extent], -1), flip, vertical_flip)


@typed
def view_from_relative(
    boxes: Float[Tensor, "*batch 4"],
    size: Size | Int[Tensor, "*sizes 2"],
    flip: Bool[Tensor, "*batch"] | None = None,
    vertical_flip: Bool[Tensor, "*batch"] | None = None,
) -> View:
    """Make views from crops in [0, 1], in units of the image's width and height.

    Args:
        boxes: Crops `(x1, y1, x2, y2)`, where x is divided by the width and y by the height of the
            image.
        size: Size `(h, w)` of the image in pixels, or one size for each image.
        flip: True where the crop is mirrored left to right; by default nowhere.
        vertical_flip: True where the crop is mirrored top to bottom; by default nowhere.

    Returns:
        The views, whose boxes are in pixels, in at least float32.

    Raises:
        TypeError: The shapes do not match.
        ValueError: A size given as a tuple is not positive. Sizes in a tensor are not checked.

    Examples:
        >>> view_from_relative(torch.tensor([0.0, 0.5, 0.25, 1.0]), (480, 640)).box
        tensor([  0., 240., 160., 480.])
    """
    boxes = widened(boxes)
    sides = _sides("view_from_relative", size, boxes)
    return _view(boxes * torch.cat([sides, sides], -1), flip, vertical_flip)


@typed
def views_valid(view: View, size: Size | Int[Tensor, "*sizes 2"]) -> Bool[Tensor, "*batch"]:
    """Find the views that are crops of an image of this size.

    Such a view has a valid box that is at least one pixel wide and high and lies inside the image;
    each side may be off by 0.01 pixels, which rounding may cause. A box inside [0, 1] x [0, 1] is
    not valid, since it is in the view frame, where pixels are wanted. Images with a side of 16
    pixels or less are an exception: there it may be a crop of one pixel. No function of densekit
    requires this: `crop_views` paints what lies outside the image black.

    Args:
        view: Any views.
        size: Size `(h, w)` of the images in pixels, or one size for each image, whose axes are the
            last of the view's.

    Returns:
        True where the view crops its image.

    Raises:
        TypeError: The sizes do not fit the views.
        ValueError: A size given as a tuple is not positive.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0.0, 640.0, 480.0], [0.1, 0.2, 0.7, 0.9]])
        >>> views_valid(View(boxes, torch.tensor([False, True])), (480, 640))
        tensor([ True, False])
    """
    return _crops_image(widened(view.box), _sides("views_valid", size, view.box))


@typed
def check_views(view: View, size: Size | Int[Tensor, "*sizes 2"]) -> None:
    """Raise an error if a view is no crop of an image of this size, and say what it may be instead.

    Call it once, at the first step of a program: it reads the values of tensors, so a GPU must
    finish its work first. In a compiled graph it does nothing. Use `views_valid` to find such views
    without an error.

    Args:
        view: Any views.
        size: Size `(h, w)` of the images in pixels, or one size for each image, whose axes are the
            last of the view's.

    Raises:
        TypeError: The sizes do not fit the views.
        ValueError: A view is not valid, in the sense of `views_valid`; the message names the first
            one. Or a size given as a tuple is not positive.

    Examples:
        >>> check_views(sample_views((480, 640), (8,)), (480, 640))
    """
    if torch.compiler.is_compiling():
        return
    boxes = widened(view.box)
    sides = _sides("check_views", size, boxes).expand(*boxes.shape[:-1], 2)
    good = _crops_image(boxes, sides)
    if good.all():
        return

    first = tuple((~good).nonzero()[0].tolist())
    which = f"the view at {list(first)}" if first else "the view"
    numbers = ", ".join(f"{number:g}" for number in boxes[first].tolist())
    width, height = sides[first].long().tolist()
    raise ValueError(
        f"densekit.views.check_views: {which} has the box ({numbers}) and its image the size (h, "
        f"w) = ({height}, {width}); {_advice(boxes, sides, first)}."
    )


@typed
def stack_views(views: Sequence[View]) -> Annotated[View, _OTHER_AXES]:
    """Stack views along a new first axis.

    Args:
        views: Views of the same shape.

    Returns:
        The views as one record, `(len(views), *batch)`.

    Raises:
        TypeError: The shapes of the views differ.
        ValueError: There are no views.

    Examples:
        >>> large = sample_views((480, 640), (2, 8), scale=(0.3, 1.0))
        >>> small = sample_views((480, 640), (4, 8), scale=(0.05, 0.3))
        >>> stack_views([*unstack_views(large), *unstack_views(small)]).box.shape
        torch.Size([6, 8, 4])
    """
    if not len(views):
        raise ValueError("densekit.views.stack_views: there are no views; give one or more.")
    return View(*(torch.stack(fields) for fields in zip(*map(_fields, views), strict=True)))


@typed
def unstack_views(view: View) -> tuple[View, ...]:
    """Split views along their first axis: the inverse of `stack_views`.

    Args:
        view: Views with at least one leading axis.

    Returns:
        One view for each entry of the first axis.

    Raises:
        TypeError: The view has no leading axis.

    Examples:
        >>> view1, view2 = unstack_views(sample_views((480, 640), (2, 8)))
        >>> view1.box.shape
        torch.Size([8, 4])
    """
    if not view.flip.ndim:
        raise TypeError(
            "densekit.views.unstack_views: argument 'view' is a single view; give views with a "
            "leading axis."
        )
    return tuple(View(*fields) for fields in zip(*(x.unbind() for x in _fields(view)), strict=True))


@typed
def index_views(view: View, index: Any) -> Annotated[View, _OTHER_AXES]:
    """Take views by an index into their leading axes.

    Args:
        view: Any views.
        index: All that a tensor takes between brackets: a number, a slice, a tensor of indices or
            of truth values, or a tuple of these.

    Returns:
        The views at the index, with the axes that `view.flip[index]` has.

    Raises:
        IndexError: The views have no such entry.

    Examples:
        >>> view = sample_views((480, 640), (2, 8))
        >>> index_views(view, 0).box.shape, index_views(view, (1, slice(3))).box.shape
        (torch.Size([8, 4]), torch.Size([3, 4]))
    """
    box, *flips = _fields(view)
    index = index if isinstance(index, tuple) else (index,)
    # The last axis of a box is none of the view's.
    return View(box[(*index, slice(None))], *(flip[index] for flip in flips))


@typed
def views_to(view: View, device: torch.device | str, *, non_blocking: bool = False) -> View:
    """Move views to a device.

    Args:
        view: Any views.
        device: Where to.
        non_blocking: Do not wait for the copy, if the views are in pinned memory.

    Returns:
        The views on the device.

    Examples:
        >>> views_to(full_view((480, 640)), "meta").box.device
        device(type='meta')
    """
    return View(*(x.to(device, non_blocking=non_blocking) for x in _fields(view)))


@typed
def sample_views(
    size: Size | Int[Tensor, "*sizes 2"],
    batch: int | tuple[int, ...] = (),
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    vertical_flip: float = 0.0,
    generator: torch.Generator | None = None,
) -> View:
    """Sample random views as RandomResizedCrop and RandomHorizontalFlip do.

    The area is uniform in `scale`, the aspect ratio is log-uniform in `ratio`, and the position is
    uniform over whole pixels. The first of ten samples that fits into the image is used; if none
    fits, the view is the largest centered crop whose aspect ratio is allowed. Sampling is separate
    from cropping: pass the views to `crop_views`, or their whole-pixel boxes to any other cropping
    function.

    Args:
        size: Size `(h, w)` of the image in pixels, or one size for each image.
        batch: Leading axes of the result, in front of those of `size`; a number is one axis.
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest width divided by height.
        flip: Probability that a view is mirrored left to right.
        vertical_flip: Probability that a view is mirrored top to bottom, for images without an
            upright, such as aerial and medical images. It changes no box and no other flip.
        generator: Source of the random numbers; the views are on its device.

    Returns:
        Views of shape `(*batch, *sizes)` in the image frame.

    Raises:
        ValueError: `scale`, `ratio` or the probability of a flip is out of its range, a size
            given as a tuple is not positive, or an axis of `batch` is negative. Sizes in a tensor
            are not checked.

    Examples:
        >>> view = sample_views((480, 640), (8,), generator=torch.Generator().manual_seed(0))
        >>> view.box.shape, view.flip.shape
        (torch.Size([8, 4]), torch.Size([8]))

    References:
        DenseSiam, App A.
    """
    batch = _check_sampling("sample_views", size, batch, scale, ratio, flip, vertical_flip)
    device = None if generator is None else generator.device
    height, width = _height_and_width(size, device)
    return _sample_views(height, width, batch, scale, ratio, flip, vertical_flip, generator)


def _sample_views(
    height: Tensor,
    width: Tensor,
    batch: tuple[int, ...],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    vertical_flip: float,
    generator: torch.Generator | None,
) -> View:
    """Sample views of images of these sides, in whole pixels."""
    # For each view: ten areas, ten ratios, the position (x, y), the flip.
    shape = (*batch, *height.shape, 23)
    draws = sample_uniform(shape, height, generator=generator)

    area = (height * width)[..., None] * (scale[0] + (scale[1] - scale[0]) * draws[..., :10])
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** draws[..., 10:20]
    widths = (area * aspect).sqrt().round()
    heights = (area / aspect).sqrt().round()

    fits = (widths >= 1) & (widths <= width[..., None])
    fits &= (heights >= 1) & (heights <= height[..., None])
    first = fits.to(torch.uint8).argmax(-1, keepdim=True)
    found = fits.any(-1)
    # The largest crop whose aspect ratio is allowed, where none of the ten fits.
    widest = (height * ratio[1]).round().clamp(1).minimum(width)
    highest = (width / ratio[0]).round().clamp(1).minimum(height)
    w = torch.where(found, widths.gather(-1, first)[..., 0], widest)
    h = torch.where(found, heights.gather(-1, first)[..., 0], highest)

    room_x = width - w
    room_y = height - h
    x = (draws[..., 20] * (room_x + 1)).floor().minimum(room_x)
    y = (draws[..., 21] * (room_y + 1)).floor().minimum(room_y)
    x = torch.where(found, x, (room_x / 2).floor())
    y = torch.where(found, y, (room_y / 2).floor())
    box = torch.stack([x, y, x + w, y + h], -1)

    # Drawn last, and only if asked: no other number of the generator changes.
    flips = draws[..., 22] < flip
    vertical_flips = torch.zeros_like(flips)
    if vertical_flip > 0:
        draws = sample_uniform(flips.shape, height, generator=generator)
        vertical_flips = draws < vertical_flip
    return View(box, flips, vertical_flips)


@typed
def sample_inner_views(
    outer: View,
    batch: int | tuple[int, ...] = (),
    *,
    scale: tuple[float, float] = (0.1, 0.5),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    vertical_flip: float = 0.0,
    generator: torch.Generator | None = None,
) -> Annotated[View, _OTHER_AXES]:
    """Sample random views inside other views, as `sample_views` does inside an image.

    So each point of an inner view is in the outer view too, as PaKA's small crops of a student are
    in the large crop of its teacher. The flips are those of the source image: they do not depend on
    the flips of the outer view.

    Args:
        outer: Views to sample in, such as the large views of `sample_views`. Of a box that is not
            in whole pixels, the whole pixels inside are used.
        batch: Leading axes of the result, in front of those of `outer`; a number is one axis.
        scale: Smallest and largest share of the outer view's area.
        ratio: Smallest and largest width divided by height.
        flip: Probability that a view is mirrored left to right.
        vertical_flip: Probability that a view is mirrored top to bottom.
        generator: Source of the random numbers, on the outer views' device.

    Returns:
        Views of shape `(*batch, *outer)` in the image frame, in at least float32. Where the outer
        box contains no whole pixel, the box is not valid.

    Raises:
        ValueError: `scale`, `ratio` or the probability of a flip is out of its range, or an axis of
            `batch` is negative.

    Examples:
        >>> large = sample_views((480, 640), (8,))
        >>> small = sample_inner_views(large, 2)
        >>> small.box.shape, bool((small.box[..., :2] >= large.box[:, :2]).all())
        (torch.Size([2, 8, 4]), True)

    References:
        PaKA (arXiv 2509.05606); DenseSiam, App A.
    """
    batch = _check_sampling("sample_inner_views", (1, 1), batch, scale, ratio, flip, vertical_flip)
    low, high = widened(outer.box.detach()).unflatten(-1, (2, 2)).unbind(-2)
    start = low.ceil()
    width, height = (high.floor() - start).clamp(min=0).unbind(-1)
    inner = _sample_views(height, width, batch, scale, ratio, flip, vertical_flip, generator)
    return View(inner.box + torch.cat([start, start], -1), inner.flip, inner.vertical_flip)


@typed
def sample_view_pairs(
    size: Size | Int[Tensor, "*sizes 2"],
    batch: int | tuple[int, ...] = (),
    *,
    min_overlap: float = 0.0,
    attempts: int = 10,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    vertical_flip: float = 0.0,
    generator: torch.Generator | None = None,
) -> ViewPairs:
    """Sample two views of each image that overlap by at least `min_overlap`.

    The function samples `attempts` independent pairs for each image. It returns the first pair that
    overlaps enough, or else the pair with the largest overlap, for which `valid` is False. With
    `min_overlap` 0 the two views are independent, as in most papers; at scale 0.2 about 1 pair in
    100 then shares no area.

    Args:
        size: Size `(h, w)` of the image in pixels, or one size for each image.
        batch: Leading axes of the result, in front of those of `size`; a number is one axis.
        min_overlap: Smallest allowed intersection over union of the two crops.
        attempts: Number of pairs that are sampled for each image when `min_overlap` is above 0.
        scale: As in `sample_views`.
        ratio: As in `sample_views`.
        flip: As in `sample_views`; the two views are mirrored independently.
        vertical_flip: As in `sample_views`.
        generator: Source of the random numbers; the views are on its device.

    Returns:
        Pairs of shape `(*batch, *sizes)`. `valid` is False where the views share no area or overlap
        by less than `min_overlap`.

    Raises:
        ValueError: `min_overlap` is outside [0, 1], `attempts` is below 1, or as in `sample_views`.

    Examples:
        >>> pairs = sample_view_pairs((480, 640), (8,), min_overlap=0.2, attempts=20)
        >>> pairs.view1.box.shape, pairs.valid.shape
        (torch.Size([8, 4]), torch.Size([8]))

    References:
        DenseSiam, Sec 3.2 and App A.
    """
    fits = 0 <= min_overlap <= 1
    check("views.sample_view_pairs", "min_overlap", min_overlap, fits, "an overlap in [0, 1]")
    check("views.sample_view_pairs", "attempts", attempts, attempts >= 1, "1 or more")
    batch = _check_sampling("sample_view_pairs", size, batch, scale, ratio, flip, vertical_flip)

    attempts = attempts if min_overlap > 0 else 1
    device = None if generator is None else generator.device
    height, width = _height_and_width(size, device)
    shape = (2, attempts, *batch)
    drawn = _sample_views(height, width, shape, scale, ratio, flip, vertical_flip, generator)
    drawn1 = View(*[field[0] for field in drawn])
    drawn2 = View(*[field[1] for field in drawn])
    iou = box_iou(drawn1.box, drawn2.box)
    if attempts == 1:  # nothing to choose: loaders sample the views of one image so
        view1 = View(*[field[0] for field in drawn1])
        view2 = View(*[field[0] for field in drawn2])
        return ViewPairs(view1, view2, (iou[0] >= min_overlap) & (iou[0] > 0))
    enough = iou >= min_overlap
    best = torch.where(enough.any(0), enough.to(torch.uint8).argmax(0), iou.argmax(0))

    view1 = _pick(drawn1, best)
    view2 = _pick(drawn2, best)
    share = iou.gather(0, best[None])[0]
    return ViewPairs(view1, view2, (share >= min_overlap) & (share > 0))


@typed
def pair_views(
    views: View, anchors: int | None = None, *, min_overlap: float = 0.0
) -> Annotated[PairedViews, _OTHER_AXES]:
    """Make pairs out of several views of each image, for losses between all of them.

    Take the features of pair p by `maps[index1[p]]` and `maps[index2[p]]`, or of all pairs at once
    where the maps `(v, *batch, d, h, w)` have one size.

    Args:
        views: v views of each image, `(v, *batch)`, such as those of `stack_views`.
        anchors: Without it, each two views are one pair: `v (v - 1) / 2` pairs `(i, j)` with i < j.
            With it, the first view of a pair is one of the first `anchors` views and the second any
            other one: `anchors (v - 1)` pairs. So the first of a pair is a large view, which the
            teacher sees, and the second any view, which the student sees.
        min_overlap: Smallest intersection over union of a pair that is valid.

    Returns:
        p pairs of views of each image, `(p, *batch)`, and the indices of their views. `valid` is
        False where the two views share no area or overlap by less than `min_overlap`.

    Raises:
        TypeError: The views have no leading axis.
        ValueError: `anchors` is not within [1, v], or `min_overlap` is outside [0, 1].

    Examples:
        >>> pairs = pair_views(sample_views((480, 640), (6, 8)), anchors=2)
        >>> pairs.valid.shape, pairs.index2
        (torch.Size([10, 8]), tensor([1, 2, 3, 4, 5, 0, 2, 3, 4, 5]))

    References:
        DINO, Eq 3 (two large and several small views).
    """
    if not views.flip.ndim:
        raise TypeError(
            "densekit.views.pair_views: argument 'views' is a single view; give v views along the "
            "first axis."
        )
    count = len(views.flip)
    if anchors is not None and not 1 <= anchors <= count:
        raise ValueError(
            f"densekit.views.pair_views: anchors is {anchors} and there are {count} views; give a "
            "number from 1 to that of the views, or None."
        )
    fits = 0 <= min_overlap <= 1
    check("views.pair_views", "min_overlap", min_overlap, fits, "an overlap in [0, 1]")

    pairs = list(itertools.combinations(range(count), 2))
    if anchors is not None:
        pairs = [(i, j) for i, j in itertools.product(range(anchors), range(count)) if i != j]
    index = torch.tensor(pairs, dtype=torch.int64, device=views.box.device).reshape(-1, 2)
    index1, index2 = index.unbind(-1)
    view1 = index_views(views, index1)
    view2 = index_views(views, index2)
    iou = box_iou(view1.box, view2.box)
    return PairedViews(view1, view2, index1, index2, (iou >= min_overlap) & (iou > 0))


@typed
def view_from_matrix(
    matrix: Float[Tensor, "*batch 3 3"], size: int | Size, *, pixel_centers: PixelCenters
) -> MatrixViews:
    """Read views from 3 x 3 matrices that map the pixels of an image to the pixels of a view.

    A view holds what crops, resizes and mirrors. It does not hold a rotation (but one by 180
    degrees, which is both flips), a shear or a perspective: there `valid` is False. If a matrix
    maps the view to the image, as the inverse maps of warping functions do, pass
    `torch.linalg.inv(matrix)`.

    Args:
        matrix: The map of `(x, y, 1)` in the image to `(x, y, 1)` in the view, up to a factor; x
            and y are in pixels.
        size: Size `(h, w)` of the views in pixels; a number means square views.
        pixel_centers: Where the center of the pixel in row i and column j is. It is at `(j, i)`
            with "integer", as in OpenCV, scikit-image, SciPy and albumentations, and at
            `(j + 0.5, i + 0.5)` with "half", as in PIL and in the image frame. The wrong one moves
            crops by fractions of a pixel.

    Returns:
        The views, in at least float32, and `valid`. It is False where no view puts the corners of
        the crop where the matrix puts them, within 0.01 pixels of the view; the boxes are zeros
        there.

    Raises:
        ValueError: The size is not positive.

    Examples:
        >>> halve = torch.tensor([[0.5, 0.0, -5.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0]])
        >>> view_from_matrix(halve, (24, 32), pixel_centers="half").view.box
        tensor([10.,  0., 74., 48.])
    """
    sides = _view_sides("view_from_matrix", size, matrix)
    matrix = widened(matrix)
    if pixel_centers == "integer":
        matrix = _move_centers(matrix, 0.5)
    valid = _maps_corners(matrix.detach(), sides)

    start, stop, flips = _ends(torch.where(valid[..., None, None], matrix, _unit(matrix)), sides)
    box = torch.cat([start.minimum(stop), start.maximum(stop)], -1)
    flip, vertical_flip = (flips & valid[..., None]).unbind(-1)
    return MatrixViews(View(torch.where(valid[..., None], box, 0.0), flip, vertical_flip), valid)


@typed
def view_to_matrix(
    view: View, size: int | Size, *, pixel_centers: PixelCenters
) -> Float[Tensor, "*batch 3 3"]:
    """Write views as 3 x 3 matrices that map the pixels of the image to the pixels of the view.

    `torch.linalg.inv` of a matrix is the map from view to image that warping functions want.

    Args:
        view: Any views.
        size: Size `(h, w)` of the views in pixels; a number means square views.
        pixel_centers: Where the center of a pixel is, as in `view_from_matrix`.

    Returns:
        One matrix for each view, in at least float32. It is zero where the view's box is not valid,
        and `view_from_matrix` says that it is not valid.

    Raises:
        ValueError: The size is not positive.

    Examples:
        >>> view = View(torch.tensor([10.0, 8.0, 74.0, 56.0]), torch.tensor(False))
        >>> view_to_matrix(view, (24, 32), pixel_centers="half")
        tensor([[ 0.5000,  0.0000, -5.0000],
                [ 0.0000,  0.5000, -4.0000],
                [ 0.0000,  0.0000,  1.0000]])
    """
    box, *flips = _fields(view)
    origin, extent = _affine(View(widened(box), *flips))
    scale = _view_sides("view_to_matrix", size, origin) / extent
    first = torch.cat([torch.diag_embed(scale), (-origin * scale)[..., None]], -1)
    last = _unit(first)[2].expand(*first.shape[:-2], 1, 3)

    matrix = torch.cat([first, last], -2)
    if pixel_centers == "integer":
        matrix = _move_centers(matrix, -0.5)
    return torch.where(boxes_valid(box)[..., None, None], matrix, 0.0)


@typed
def image_to_view(view: View, points: Float[Tensor, "*batch n 2"]) -> Float[Tensor, "*batch n 2"]:
    r"""Map points from the image frame to the frame of a view.

    $$
    u = \frac{x - x_1}{x_2 - x_1} , \qquad v = \frac{y - y_1}{y_2 - y_1} ,
    $$

    and $1 - u$ where the view is mirrored left to right, $1 - v$ where it is mirrored top to
    bottom. Points outside the crop are mapped to points outside [0, 1]. Where the view's box is not
    valid the points are returned unchanged: they are finite but have no meaning.

    Args:
        view: One view for each batch entry.
        points: Points `(x, y)` in the image frame, in pixels.

    Returns:
        The points in the view frame, `(x, y)` in units of the view's width and height.

    Raises:
        TypeError: The leading axes of the view and of the points differ.

    Examples:
        >>> view = View(torch.tensor([10.0, 0.0, 30.0, 10.0]), torch.tensor(True))
        >>> image_to_view(view, torch.tensor([[15.0, 5.0]]))
        tensor([[0.7500, 0.5000]])

    References:
        DenseSiam, Sec 3.2, Fig 3.
    """
    return _image_to_view(view, points)


@typed
def view_to_image(view: View, points: Float[Tensor, "*batch n 2"]) -> Float[Tensor, "*batch n 2"]:
    """Map points from the frame of a view to the image frame: the inverse of `image_to_view`.

    Where the view's box is not valid the points are returned unchanged.

    Args:
        view: One view for each batch entry.
        points: Points `(x, y)` in the view frame, in units of the view's width and height.

    Returns:
        The points in the image frame, in pixels.

    Raises:
        TypeError: The leading axes of the view and of the points differ.

    Examples:
        >>> view = View(torch.tensor([10.0, 0.0, 30.0, 10.0]), torch.tensor(True))
        >>> view_to_image(view, torch.tensor([[0.75, 0.5]]))
        tensor([[15.,  5.]])

    References:
        DenseSiam, Sec 3.2, Fig 3.
    """
    return _view_to_image(view, points)


@typed
def boxes_image_to_view(
    view: View, boxes: Float[Tensor, "*batch n 4"]
) -> Float[Tensor, "*batch n 4"]:
    """Map boxes from the image frame to the frame of a view; a flip does not reverse them.

    Boxes are not clipped: the part of a box outside the view is outside [0, 1].

    Args:
        view: One view for each batch entry.
        boxes: Boxes `(x1, y1, x2, y2)` in the image frame, in pixels.

    Returns:
        The boxes in the view frame, in units of the view's width and height.

    Raises:
        TypeError: The leading axes of the view and of the boxes differ.

    Examples:
        >>> view = View(torch.tensor([10.0, 0.0, 30.0, 10.0]), torch.tensor(True))
        >>> boxes_image_to_view(view, torch.tensor([[10.0, 0.0, 15.0, 10.0]]))
        tensor([[0.7500, 0.0000, 1.0000, 1.0000]])

    References:
        DUPR, Sec 3.2 (boxes of the intersection in each view).
    """
    return _map_boxes(_image_to_view, view, boxes)


@typed
def boxes_view_to_image(
    view: View, boxes: Float[Tensor, "*batch n 4"]
) -> Float[Tensor, "*batch n 4"]:
    """Map boxes from the frame of a view to the image frame: the inverse of `boxes_image_to_view`.

    Args:
        view: One view for each batch entry.
        boxes: Boxes `(x1, y1, x2, y2)` in the view frame, in units of its width and height.

    Returns:
        The boxes in the image frame, in pixels.

    Raises:
        TypeError: The leading axes of the view and of the boxes differ.

    Examples:
        >>> view = View(torch.tensor([10.0, 0.0, 30.0, 10.0]), torch.tensor(True))
        >>> boxes_view_to_image(view, torch.tensor([[0.75, 0.0, 1.0, 1.0]]))
        tensor([[10.,  0., 15., 10.]])

    References:
        DUPR, Sec 3.2.
    """
    return _map_boxes(_view_to_image, view, boxes)


@typed
def boxes_in_view(
    view: View,
    boxes: Float[Tensor, "*batch n 4"],
    valid: Bool[Tensor, "*batch n"] | None = None,
    *,
    min_share: float = 1.0,
) -> BoxesInView:
    """Map boxes into a view, clip them, and say which of them the view still shows.

    Args:
        view: One view for each batch entry.
        boxes: Boxes `(x1, y1, x2, y2)` in the image frame, in pixels.
        valid: Boxes to use; by default all.
        min_share: Share of a box that the view must contain for the box to stay valid; 1 is the
            whole box.

    Returns:
        The boxes in the view frame, clipped to the view (zeros where the view contains nothing of a
        box); the share of each box that the view contains; and which boxes are valid.

    Raises:
        TypeError: The leading axes do not match.
        ValueError: `min_share` is not within (0, 1].

    Examples:
        >>> view = View(torch.tensor([10.0, 0.0, 30.0, 10.0]), torch.tensor(True))
        >>> seen = boxes_in_view(view, torch.tensor([[5.0, 0.0, 15.0, 10.0]]), min_share=0.5)
        >>> seen.boxes, seen.share, seen.valid
        (tensor([[0.7500, 0.0000, 1.0000, 1.0000]]), tensor([0.5000]), tensor([True]))

    References:
        D3SSL, Sec 4.1 (proposals that both views contain); SoCo, Sec 3.2.
    """
    fits = 0 < min_share <= 1
    check("views.boxes_in_view", "min_share", min_share, fits, "a share above 0 and at most 1")
    share = box_containment(boxes, view.box[..., None, :].expand_as(boxes))
    some = share > 0
    seen = _map_boxes(_image_to_view, view, boxes).clamp(0, 1)
    seen = torch.where(some[..., None], seen, 0.0)
    enough = some & (share >= min_share - 1e-6)  # rounding may remove this much
    if valid is not None:
        enough = enough & valid
    return BoxesInView(seen, share, enough)


@typed
def intersect_views(view1: View, view2: View) -> Overlap:
    """Compute the region that two views of one image share.

    Args:
        view1: First views.
        view2: Second views of the same images.

    Returns:
        The shared box in the image frame and in the frame of each view, the intersection over union
        of the crops, and `valid`. Where the views share no area, or the box of a view is reversed,
        empty or NaN, `valid` is False and all boxes are zeros.

    Raises:
        TypeError: The leading axes of the two views differ.

    Examples:
        >>> flip = torch.tensor(False)
        >>> left = View(torch.tensor([0.0, 0, 40, 20]), flip)
        >>> overlap = intersect_views(left, View(torch.tensor([30.0, 0, 70, 20]), flip))
        >>> overlap.box, overlap.box1
        (tensor([30.,  0., 40., 20.]), tensor([0.7500, 0.0000, 1.0000, 1.0000]))

    References:
        DenseSiam, Sec 3.2 (the intersected region).
    """
    box = intersect_boxes(view1.box, view2.box)
    valid = boxes_valid(box)
    shared = box[..., None, :]
    box1 = _map_boxes(_image_to_view, view1, shared)[..., 0, :]
    box2 = _map_boxes(_image_to_view, view2, shared)[..., 0, :]
    box1 = torch.where(valid[..., None], box1, 0.0)
    box2 = torch.where(valid[..., None], box2, 0.0)
    return Overlap(box, box1, box2, box_iou(view1.box, view2.box), valid)


@typed
def coordinate_map(view: View, size: int | Size) -> Float[Tensor, "*batch h w 2"]:
    """Compute the image coordinates of the cell centers of a view's h x w map.

    Args:
        view: One view for each batch entry.
        size: Size `(h, w)` of the map in cells; a number K means K x K.

    Returns:
        `(x, y)` of each cell's center in the image frame, in pixels. Where the view's box is not
        valid the coordinates are finite but have no meaning.

    Raises:
        ValueError: The size is not positive.

    Examples:
        >>> view = View(torch.tensor([0.0, 0.0, 8.0, 4.0]), torch.tensor(True))
        >>> coordinate_map(view, (1, 2))
        tensor([[[6., 2.],
                 [2., 2.]]])

    References:
        DenseSiam, Fig 3; PixPro (its distance between pixels).
    """
    check_size("views.coordinate_map", size)
    h, w = (size, size) if isinstance(size, int) else size

    dtype = torch.promote_types(view.box.dtype, torch.float32)
    y = (torch.arange(h, dtype=dtype, device=view.box.device) + 0.5) / h
    x = (torch.arange(w, dtype=dtype, device=view.box.device) + 0.5) / w
    centers = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).to(view.box.dtype)
    points = _view_to_image(view, centers.reshape(h * w, 2).expand(*view.flip.shape, h * w, 2))
    return points.unflatten(-2, (h, w))


@typed
def crop_views(
    images: Float[Tensor, "*batch c h w"] | Sequence[Tensor],
    view: View,
    size: int | Size,
    *,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
) -> Float[Tensor, "*batch c out_h out_w"]:
    """Crop, resize and mirror a batch of images with antialiasing, each image by its own view.

    The resize filter is widened by the factor of shrinking, and uses no pixel outside the crop. For
    boxes in whole pixels the result is that of torchvision's `resized_crop(antialias=True)` on
    tensors; a box may also end inside a pixel. The area outside the image is black (zeros). A NaN
    inside a crop may reach the whole crop.

    On the CPU the time grows with the area of the crop, not of the image. Boxes in whole pixels
    are resized by torch's own kernel, which is faster; other boxes, and images or boxes that
    require gradients, by matrix products, which are twice differentiable with respect to both.
    On other devices, in a compiled graph and in transforms such as vmap the products are over the
    whole image. All ways agree up to rounding.

    Args:
        images: Images with any number of channels, channels first; or a list of images `(c, h, w)`
            of any sizes, in which images of the same size are cropped together. Images of more than
            4 channels whose width is 1, 3 or 4 are refused, since their channels seem to be last.
        view: One view for each image.
        size: Size `(h, w)` of the crops in pixels; a number means square crops.
        interpolation: The resize filter. At edges "bicubic" overshoots the range of the images, by
            up to a fifth of a step, so clamp the result; it fades to black only where no pixel is
            near.

    Returns:
        The crops, in the images' dtype; half precision is computed in float32. A crop is black
        where the view's box is not valid.

    Raises:
        ValueError: The size is not positive.
        TypeError: The images are integers (divide by 255 first), or their channels come last: the
            last axis is 1, 3 or 4 and the third from the end is above 4 (use `movedim(-1, -3)`). Or
            their number is not the number of views, or a list contains something else than images
            `(c, h, w)` of one dtype, device and number of channels.

    Examples:
        >>> images = torch.rand(2, 3, 40, 60)
        >>> crop_views(images, sample_views((40, 60), (2,)), 24).shape
        torch.Size([2, 3, 24, 24])
    """
    out_h, out_w = (size, size) if isinstance(size, int) else size
    fits = min(out_h, out_w) > 0
    check("views.crop_views", "size", size, fits, "a positive size in pixels")

    cubic = interpolation == "bicubic"
    if isinstance(images, Tensor):
        refuse_channels_last("views.crop_views", "images", images)
        if view.flip.numel() and readable(images, *view):
            single = [images[index] for index in itertools.product(*map(range, view.flip.shape))]
            return _crop_each(single, view, (out_h, out_w), cubic)
        return _crop_together(images, view, (out_h, out_w), cubic)

    _check_list(images, view)
    if readable(*images, *view):
        return _crop_each(images, view, (out_h, out_w), cubic)

    crops: list[Tensor] = [view.box.new_empty(0)] * len(images)
    for shape in {image.shape for image in images}:
        rows = [row for row, image in enumerate(images) if image.shape == shape]
        same = torch.stack([images[row] for row in rows])
        found = _crop_together(same, index_views(view, rows), (out_h, out_w), cubic)
        for row, crop in zip(rows, found, strict=True):
            crops[row] = crop
    return torch.stack(crops)


def _check_sampling(
    function: str,
    size: Size | Tensor,
    batch: int | tuple[int, ...],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    vertical_flip: float,
) -> tuple[int, ...]:
    """Check the options of `sample_views`, and return `batch` as a tuple."""
    where = f"views.{function}"
    for name, (low, high) in {"scale": scale, "ratio": ratio}.items():
        check(where, name, (low, high), 0 < low <= high < math.inf, "0 < smallest <= largest")
    for name, share in {"flip": flip, "vertical_flip": vertical_flip}.items():
        check(where, name, share, 0 <= share <= 1, "a probability in [0, 1]")
    if isinstance(size, tuple):
        check(where, "size", size, min(size) > 0, "a positive (h, w)")
    return _leading_axes(function, batch)


def _leading_axes(function: str, batch: int | tuple[int, ...]) -> tuple[int, ...]:
    """Return `batch` as a tuple."""
    axes = (batch,) if isinstance(batch, int) else batch
    check(f"views.{function}", "batch", batch, all(x >= 0 for x in axes), "axes of 0 or more")
    return axes


def _pick(view: View, which: Tensor) -> View:
    """Return for each image one of the views along the first axis."""
    box, *flips = _fields(view)
    which = which[None]
    picked = box.gather(0, which[..., None].expand(1, *box.shape[1:]))[0]
    return View(picked, *(flip.gather(0, which)[0] for flip in flips))


def _height_and_width(
    size: Size | Tensor, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """Return one size, or one for each image, in float32: exact up to 2^24 pixels a side."""
    if not isinstance(size, Tensor):
        # On the device from the start: a copy from the CPU is waited for.
        h, w = size
        height = torch.full((), h, dtype=torch.float32, device=device)
        width = torch.full((), w, dtype=torch.float32, device=device)
        return height, width
    sizes = size.to(device=device, dtype=torch.float32)
    height, width = sizes.unbind(-1)
    return height, width


def _sides(function: str, size: Size | Tensor, boxes: Tensor) -> Tensor:
    """Return width and height, `(2)` or one pair for each image, in the boxes' dtype."""
    if not isinstance(size, Tensor):
        fits = min(size) > 0
        check(f"views.{function}", "size", size, fits, "a positive (h, w) in pixels")
        return row_of(size[::-1], widened(boxes))
    if not broadcasts(size.shape[:-1], boxes.shape[:-1]):
        raise TypeError(
            f"densekit.views.{function}: argument 'size' has shape {tuple(size.shape)}, and the "
            f"views have {tuple(boxes.shape[:-1])}; give one size, or one for each image."
        )
    return size.flip(-1).to(widened(boxes))


def _view_sides(function: str, size: int | Size, like: Tensor) -> Tensor:
    """Return width and height of views, `(2)`."""
    h, w = (size, size) if isinstance(size, int) else size
    fits = min(h, w) > 0
    check(f"views.{function}", "size", size, fits, "a positive size in pixels")
    return row_of([w, h], widened(like))


def _view(box: Tensor, flip: Tensor | None, vertical_flip: Tensor | None) -> View:
    """Make a view that is mirrored nowhere where a flip is None."""
    if flip is None:
        flip = torch.zeros(box.shape[:-1], dtype=torch.bool, device=box.device)
    return View(box, flip, _or_no_flip(vertical_flip, flip))


def _fields(view: View) -> tuple[Tensor, Tensor, Tensor]:
    return view.box, view.flip, _or_no_flip(view.vertical_flip, view.flip)


def _crops_image(boxes: Tensor, sides: Tensor) -> Tensor:
    """Return what `views_valid` does."""
    low, high = boxes.unflatten(-1, (2, 2)).unbind(-2)
    inside = ((low >= -_ROUNDING) & (high <= sides + _ROUNDING)).all(-1)
    large = (high - low >= 1 - _ROUNDING).all(-1)
    relative = _in_unit_square(boxes) & (sides > _SMALL).all(-1)
    return boxes_valid(boxes) & inside & large & ~relative


def _in_unit_square(boxes: Tensor) -> Tensor:
    return ((boxes >= 0) & (boxes <= 1)).all(-1)


def _advice(boxes: Tensor, sides: Tensor, first: tuple[int, ...]) -> str:
    """Say what is wrong with the views, of which the one at `first` is no crop of its image."""
    low, high = boxes.unflatten(-1, (2, 2)).unbind(-2)
    reversed_ = (high <= low).any(-1)
    if _in_unit_square(boxes).all():
        return "boxes in [0, 1] become views by `view_from_relative(boxes, size)`"
    if reversed_.any() and _crops_image(torch.cat([low, low + high], -1), sides).all():
        return "boxes (x, y, width, height) become views by `view_from_xywh(boxes)`"
    if _crops_image(boxes, sides.flip(-1)).all():
        return "all boxes fit the size (w, h), so give sizes as (h, w)"
    if not boxes[first].isfinite().all():
        return "give boxes of finite numbers"
    if reversed_[first]:
        return "the box is reversed or empty: give (x1, y1, x2, y2) with x1 < x2 and y1 < y2"
    if (high - low)[first].min() < 1 - _ROUNDING:
        return "the box is smaller than a pixel: give boxes in pixels of the image"
    return "the box reaches outside the image: give boxes in pixels of the image that is cropped"


def _move_centers(matrix: Tensor, shift: float) -> Tensor:
    """Change the matrix for pixel coordinates that are larger by `shift`, on both of its sides."""
    x, y, offset = matrix.unbind(-1)
    matrix = torch.stack([x, y, offset - shift * (x + y)], -1)
    x, y, factor = matrix.unbind(-2)
    return torch.stack([x + shift * factor, y + shift * factor, factor], -2)


def _unit(like: Tensor) -> Tensor:
    return torch.eye(3, dtype=like.dtype, device=like.device)


def _ends(matrix: Tensor, sides: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the image points of the view's corners (0, 0) and (w, h), and which axes are mirrored.

    This reads the scales and the offset of the matrix alone.
    """
    factor = matrix[..., 2, 2, None]
    scale = matrix[..., :2, :2].diagonal(dim1=-2, dim2=-1) / factor
    offset = matrix[..., :2, 2] / factor
    # 0 - offset, since -offset would make a side of -0.0.
    return (0 - offset) / scale, (sides - offset) / scale, scale < 0


def _maps_corners(matrix: Tensor, sides: Tensor) -> Tensor:
    """Return whether the matrix maps the four corners of a box to those of the view."""
    start, stop, _ = _ends(matrix, sides)
    corners = _corners(start, stop)
    wanted = _corners(torch.zeros_like(sides), sides)
    with full_precision(matrix):
        placed = torch.nn.functional.pad(corners, (0, 1), value=1.0) @ matrix.mT
    off = (placed[..., :2] / placed[..., 2:] - wanted).abs()
    box = torch.cat([start.minimum(stop), start.maximum(stop)], -1)
    return (off <= _ROUNDING).all(-1).all(-1) & boxes_valid(box)


def _corners(start: Tensor, stop: Tensor) -> Tensor:
    """Return the four corners of a box from two opposite ones, `(*batch, 4, 2)`."""
    x1, y1 = start.unbind(-1)
    x2, y2 = stop.unbind(-1)
    corners = [(x1, y1), (x2, y1), (x1, y2), (x2, y2)]
    return torch.stack([torch.stack(corner, -1) for corner in corners], -2)


def _affine(view: View) -> tuple[Tensor, Tensor]:
    """Return origin and signed extent of image = origin + extent * view; identity if not valid."""
    valid = boxes_valid(view.box)[..., None]
    flips = _flips(view)
    low, high = view.box.unflatten(-1, (2, 2)).unbind(-2)
    origin = torch.where(flips, high, low)
    extent = torch.where(flips, low - high, high - low)
    return torch.where(valid, origin, 0.0), torch.where(valid, extent, 1.0)


def _flips(view: View) -> Tensor:
    """Return the flips of x and y, `(*batch, 2)`."""
    _, *flips = _fields(view)
    return torch.stack(flips, -1)


def _image_to_view(view: View, points: Tensor) -> Tensor:
    origin, extent = _affine(view)
    return (points - origin[..., None, :]) / extent[..., None, :]


def _view_to_image(view: View, points: Tensor) -> Tensor:
    origin, extent = _affine(view)
    return origin[..., None, :] + points * extent[..., None, :]


def _map_boxes(map_points, view: View, boxes: Tensor) -> Tensor:
    corners = map_points(view, boxes.unflatten(-1, (2, 2)).flatten(-3, -2)).unflatten(-2, (-1, 2))
    # A flip swaps left and right, or top and bottom; sorting instead would make a reversed box look
    # valid.
    flips = _flips(view)[..., None, None, :]
    return torch.where(flips, corners.flip(-2), corners).flatten(-2)


def _check_list(images: Sequence[Tensor], view: View) -> None:
    """Check each image of a list; the annotation only says that it is a list of tensors."""
    function = "densekit.views.crop_views"
    if not images or view.flip.shape != (len(images),):
        raise TypeError(
            f"{function}: there are {len(images)} images and views of shape "
            f"{tuple(view.flip.shape)}; give one view for each image of the list."
        )

    for row, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(
                f"{function}: images[{row}] is a {type(image).__name__}; give tensors (c, h, w)."
            )
        if image.ndim != 3 or not image.is_floating_point():
            raise TypeError(
                f"{function}: images[{row}] has shape {tuple(image.shape)} and dtype "
                f"{image.dtype}; give floating-point images (c, h, w). Convert integers first: "
                "`x.float() / 255`."
            )
        refuse_channels_last("views.crop_views", f"images[{row}]", image)
        for name, found, first in (
            ("number of channels", len(image), len(images[0])),
            ("dtype", image.dtype, images[0].dtype),
            ("device", image.device, images[0].device),
        ):
            if found != first:
                raise TypeError(
                    f"{function}: the {name} is {first} in images[0] and {found} in "
                    f"images[{row}]; give images of one {name}."
                )


def _crop_together(images: Tensor, view: View, size: Size, cubic: bool) -> Tensor:
    """Crop images of one size by products with dense matrices, as long as the images' sides.

    This suits accelerators, transforms and graphs: no value of a box is read.
    """
    x1, y1, x2, y2 = _boxes_to_crop(view).unbind(-1)
    flip_x, flip_y = _flips(view)[..., None, None].unbind(-3)
    columns = _resize_matrix(x1, x2, images.shape[-1], size[1], cubic)
    columns = torch.where(flip_x, columns.flip(-2), columns)
    rows = _resize_matrix(y1, y2, images.shape[-2], size[0], cubic)
    rows = torch.where(flip_y, rows.flip(-2), rows)

    dtype = torch.promote_types(images.dtype, torch.float32)
    with full_precision(images):
        wide = images.to(dtype) @ columns.to(dtype).mT[..., None, :, :]
        return (rows.to(dtype)[..., None, :, :] @ wide).to(images.dtype)


def _crop_each(images: Sequence[Tensor], view: View, size: Size, cubic: bool) -> Tensor:
    """Crop images one by one, from the pixels that each crop touches.

    A box in whole pixels inside its image is resized by torch's kernel, which is sparse. It has no
    second derivative and none by the box, so wherever a gradient could be asked, and for all other
    boxes, the crop is a product with dense matrices, as long as the crop's sides.
    """
    boxes = _boxes_to_crop(view).reshape(-1, 4)
    flips = _flips(view).reshape(-1, 2).tolist()
    moved = torch.is_grad_enabled() and any(x.requires_grad for x in (*images, boxes))
    dtype = torch.promote_types(images[0].dtype, torch.float32)
    mode = "bicubic" if cubic else "bilinear"

    crops: list[Tensor] = [boxes] * len(images)
    others: list[int] = []
    spans: list[tuple[slice, slice]] = []
    with full_precision(boxes):
        for row, (image, box) in enumerate(zip(images, boxes.tolist(), strict=True)):
            x = _touched(box[0::2], image.shape[-1])
            y = _touched(box[1::2], image.shape[-2])
            whole = box == [x.start, y.start, x.stop, y.stop] and box[0] < box[2]

            # torch repeats the first row in crops that are one pixel wide, seen in torch 2.15.
            if moved or not whole or size[1] == 1 or not len(image):
                others.append(row)
                spans.append((y, x))
                continue

            touched = image[None, :, y, x].to(dtype)
            crop = torch.nn.functional.interpolate(touched, size, mode=mode, antialias=True)[0]
            flip_x, flip_y = flips[row]
            crop = crop.flip(-1) if flip_x else crop
            crops[row] = crop.flip(-2) if flip_y else crop

        # The matrices of some images are made in one go: few operations, and bounded memory.
        longest = max((span.stop - span.start for pair in spans for span in pair), default=0)
        some = max(1, _MATRIX_CELLS // (max(size) * longest + 1))
        for first in range(0, len(others), some):
            group = others[first : first + some]
            pairs = spans[first : first + some]
            x1, y1, x2, y2 = boxes[group].unbind(-1)
            rows = _short_matrices(y1, y2, [pair[0] for pair in pairs], size[0], cubic)
            columns = _short_matrices(x1, x2, [pair[1] for pair in pairs], size[1], cubic)
            for row, (y, x), down, across in zip(group, pairs, rows, columns, strict=True):
                flip_x, flip_y = flips[row]
                across = across.flip(-2) if flip_x else across
                down = down.flip(-2) if flip_y else down
                wide = images[row][:, y, x].to(dtype) @ across.to(dtype).mT
                crops[row] = down.to(dtype) @ wide

    found = torch.stack(crops).to(images[0].dtype).contiguous()
    return found.reshape(*view.flip.shape, *found.shape[1:])


def _boxes_to_crop(view: View) -> Tensor:
    """Return the boxes in at least float32, with zeros where a box is not valid."""
    return widened(torch.where(boxes_valid(view.box)[..., None], view.box, 0.0))


def _touched(ends: list[float], length: int) -> slice:
    """Return the pixels of a line of this length that an interval touches."""
    start = min(max(math.floor(ends[0]), 0), length)
    return slice(start, max(start, min(math.ceil(ends[1]), length)))


def _short_matrices(
    start: Tensor, stop: Tensor, spans: list[slice], out: int, cubic: bool
) -> list[Tensor]:
    """Compute the columns of `_resize_matrix` in the span of each image."""
    origin = start.new_tensor([span.start for span in spans])
    lengths = [span.stop - span.start for span in spans]
    offset = torch.arange(max(lengths), dtype=start.dtype, device=start.device)
    own = offset < start.new_tensor(lengths)[:, None]
    pixel = torch.where(own, origin[:, None] + offset, start.detach().floor()[:, None] - 1)

    weight, total = _resize_weights(start, stop, pixel, out, cubic)
    # A sum one after the other: what follows for longer crops beside this one changes nothing.
    total = weight.cumsum(-1)[..., -1:] if cubic else total
    weight = _divided(weight, total) if cubic else safe_divide(weight, total)

    # Copies: the strides of a product's factors decide about its last bit.
    return [
        x[:, :length].clone(memory_format=torch.contiguous_format)
        for x, length in zip(weight, lengths, strict=True)
    ]


def _resize_matrix(start: Tensor, stop: Tensor, length: int, out: int, cubic: bool) -> Tensor:
    """Compute weights `(*batch, out, length)` that resize the pixels `[start, stop)` to `out`."""
    pixel = torch.arange(length, dtype=start.dtype, device=start.device)
    weight, total = _resize_weights(start, stop, pixel, out, cubic)
    return _divided(weight, weight.sum(-1, keepdim=True)) if cubic else safe_divide(weight, total)


def _divided(weight: Tensor, total: Tensor) -> Tensor:
    """Divide the cubic's weights by their sum, unless that is negative or zero but for rounding.

    It is so where no pixel is near.
    """
    return weight / torch.where(total > 1e-6, total, 1.0)


def _resize_weights(
    start: Tensor, stop: Tensor, pixel: Tensor, out: int, cubic: bool
) -> tuple[Tensor, Tensor]:
    """Compute weights `(*batch, out, pixels)` of some pixels `(*batch, pixels)`, and their sums.

    The filter is a triangle (or Keys' cubic, a = -1/2) around each output center, and is cut at the
    pixels that the crop touches. The sum of a triangle includes the pixels outside the image, which
    are black; the cubic has no such sum: its weights are divided by their own.
    """
    # Positions are counted from the first pixel that the crop touches, so that they are as exact
    # far from the image's corner as near it. The center of pixel k is k.
    first = start.floor()
    last = (stop.ceil() - 1 - first)[..., None]
    pixel = pixel - first[..., None]
    step = ((stop - start) / out)[..., None]
    reach = step.clamp(min=1.0)

    output = torch.arange(out, dtype=start.dtype, device=start.device)
    center = (start - first)[..., None] + (output + 0.5) * step - 0.5

    x = (pixel[..., None, :] - center[..., None]).abs() / reach[..., None]
    weight = (1 - x).clamp(min=0)
    if cubic:
        weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
        weight = torch.where(x < 2, weight, 0.0)

    touched = ((pixel >= 0) & (pixel <= last))[..., None, :]
    weight = torch.where(touched, weight, 0.0)
    if cubic:
        return weight, weight.new_zeros(())

    zero = torch.zeros_like(last)
    total = _ramp_sum(zero, last.minimum(center.floor()), center, reach)
    total = total + _ramp_sum(-last, zero.minimum(-center.floor() - 1), -center, reach)
    return weight, total[..., None]


def _ramp_sum(first: Tensor, last: Tensor, center: Tensor, reach: Tensor) -> Tensor:
    """Sum `max(0, 1 - (center - k)/reach)` over integers k in [first, last], last <= center."""
    first = first.maximum((center - reach).ceil())
    count = (last - first + 1).clamp(min=0)
    return count * (1 - (center - (first + last) / 2) / reach)
