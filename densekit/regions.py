"""Region augmentations: proposals are jittered, cut, covered, shifted, and pasted on other images.

Boxes are `(x1, y1, x2, y2)` in pixels of the image, n for each image; `valid` says which are used.
Choosing is separate from applying: `sample_*` functions are random, all others are deterministic. A
mask is True for the pixels that are to be changed.
"""

import math
from typing import NamedTuple

import torch
from densekit.boxes import boxes_valid
from densekit.numerics import (
    check,
    check_size,
    full_precision,
    readable,
    row_of,
    sample_uniform,
    take_rows,
    widened,
)
from densekit.typing import Bool, Float, Size, Tensor, typed

__all__ = [
    "Cutout",
    "boxes_to_mask",
    "composite",
    "fill_mask",
    "proposal_cutout",
    "sample_cutout",
    "sample_inner_boxes",
    "sample_jittered_boxes",
    "sample_shift",
    "sample_surrounding_boxes",
    "shift_boxes",
]


class Cutout(NamedTuple):
    """The pixels that are cut out of the proposals of an image.

    Attributes:
        mask: True for the pixels that are cut.
        boxes: The rectangle that was cut out of each proposal, in pixels; zeros where there is
            none.
    """

    mask: Bool[Tensor, "*batch h w"]
    boxes: Float[Tensor, "*batch n 4"]


@typed
def sample_jittered_boxes(
    boxes: Float[Tensor, "*batch n 4"],
    *,
    center: float = 0.1,
    size: float = 0.1,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "*batch n 4"] | None = None,
) -> Float[Tensor, "*batch n 4"]:
    """Move and resize boxes at random.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)`, in any frame. The result may leave the image, so clip it.
        center: Largest shift of a center, as a share of the box's width and height.
        size: Largest change of the width and of the height, as a share; both change independently.
        generator: Source of the random numbers, on the boxes' device.
        noise: Uniform numbers in [0, 1) from which the draw follows; by default they are drawn from
            `generator`.

    Returns:
        Jittered boxes, in the same frame.

    Raises:
        TypeError: The shapes do not match.
        ValueError: `center` is negative, or `size` is outside [0, 1).

    Examples:
        >>> sample_jittered_boxes(torch.tensor([[10.0, 10.0, 30.0, 20.0]]), center=0.0, size=0.0)
        tensor([[10., 10., 30., 20.]])

    References:
        SoCo, Sec 3.2 (box jitter by 10 %); D3SSL, Sec 4.1 and Table 5.
    """
    where = "regions.sample_jittered_boxes"
    check(where, "center", center, 0 <= center < math.inf, "0 or more")
    check(where, "size", size, 0 <= size < 1, "a number from 0 to below 1")
    draws = 2 * sample_uniform((*boxes.shape[:-1], 4), boxes, generator=generator, noise=noise) - 1
    wide = widened(boxes)
    extent = wide[..., 2:] - wide[..., :2]
    middle = (wide[..., :2] + wide[..., 2:]) / 2 + center * draws[..., :2] * extent
    half = extent * (1 + size * draws[..., 2:]) / 2
    return torch.cat([middle - half, middle + half], -1).to(boxes.dtype)


@typed
def sample_inner_boxes(
    boxes: Float[Tensor, "*batch n 4"],
    *,
    scale: tuple[float, float] = (0.8, 1.0),
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "*batch n 4"] | None = None,
) -> Float[Tensor, "*batch n 4"]:
    """Sample a random box inside each box (restricted box jitter, RBJ).

    Proposals of selective search are often larger than the object. A jittered box that stays inside
    the proposal loses background and gains none.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)`, in any frame.
        scale: Smallest and largest share of the width and of the height, which are sampled
            independently.
        generator: Source of the random numbers, on the boxes' device.
        noise: Uniform numbers in [0, 1) from which the draw follows; by default they are drawn from
            `generator`.

    Returns:
        Boxes inside the given ones, at uniformly random positions, in the same frame.

    Raises:
        TypeError: The shapes do not match.
        ValueError: `scale` is not within (0, 1].

    Examples:
        >>> boxes = torch.tensor([[10.0, 10.0, 30.0, 20.0]])
        >>> inside = sample_inner_boxes(boxes)
        >>> bool((inside[:, :2] >= boxes[:, :2]).all() and (inside[:, 2:] <= boxes[:, 2:]).all())
        True

    References:
        D3SSL, Sec 4.1, 3) (restricted box jitter).
    """
    low, high = scale
    fits = 0 < low <= high <= 1
    check("regions.sample_inner_boxes", "scale", scale, fits, "0 < smallest <= largest <= 1")

    draws = sample_uniform((*boxes.shape[:-1], 4), boxes, generator=generator, noise=noise)
    corner1 = boxes[..., :2]
    corner2 = boxes[..., 2:]
    first = widened(corner1)
    last = widened(corner2)
    free = (1 - (low + (high - low) * draws[..., :2])) * (last - first)
    before = free * draws[..., 2:]
    first = (first + before).to(boxes.dtype)
    last = (last - (free - before)).to(boxes.dtype)
    # Rounding must not move a side outside.
    return torch.cat([first.maximum(corner1), last.minimum(corner2)], -1)


@typed
def sample_cutout(
    boxes: Float[Tensor, "*batch n 4"],
    *,
    ratio: tuple[float, float] = (0.2, 0.5),
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "*batch n 3"] | None = None,
) -> Float[Tensor, "*batch n 3"]:
    """Sample the parameters of `proposal_cutout`: the size and the position of each proposal's cut.

    Args:
        boxes: The proposals; only their number and device matter.
        ratio: Smallest and largest share rho of a proposal's area that may be cut.
        generator: Source of the random numbers, on the boxes' device.
        noise: Uniform numbers in [0, 1) from which the draw follows; by default they are drawn from
            `generator`.

    Returns:
        rho, and the position of the cut along x and y, in [0, 1].

    Raises:
        TypeError: The shapes do not match.
        ValueError: The ratio is not within [0, 1].

    Examples:
        >>> sample_cutout(torch.zeros(8, 4, 4)).shape
        torch.Size([8, 4, 3])

    References:
        D3SSL, Sec 4.1, 1) (sizes from 0.2 to 0.5).
    """
    low, high = ratio
    fits = 0 <= low <= high <= 1
    check("regions.sample_cutout", "ratio", ratio, fits, "0 <= smallest <= largest <= 1")
    draws = sample_uniform((*boxes.shape[:-1], 3), boxes, generator=generator, noise=noise)
    return torch.cat([low + (high - low) * draws[..., :1], draws[..., 1:]], -1)


@typed
def proposal_cutout(
    boxes: Float[Tensor, "*batch n 4"],
    draws: Float[Tensor, "*batch n 3"],
    size: Size,
    valid: Bool[Tensor, "*batch n"] | None = None,
) -> Cutout:
    """Cut a part out of every proposal, but never too much of one (random cutout, PRC).

    The proposals are processed from large to small. If the cuts of larger proposals have removed
    more than rho of a proposal, the proposal is restored first. Then a rectangle with the
    proposal's aspect ratio is cut out of it, whose area is what remains of rho. So a proposal has
    lost at most rho of its area at this point, and later loses only what smaller proposals inside
    it lose. A pixel is cut if the whole pixel lies in the rectangle, and restored if any part of it
    lies in the proposal.

    Args:
        boxes: Proposals `(x1, y1, x2, y2)` in pixels; the part outside the image has no pixels.
        draws: rho and the position of each cut, from `sample_cutout`.
        size: Size `(h, w)` of the image in pixels.
        valid: Proposals to use; by default all. A proposal that is reversed, empty or not finite is
            never used. On the CPU the time depends on the largest number of used proposals of an
            image; elsewhere, and under `vmap` and `torch.compile`, on the number of rows.

    Returns:
        The pixels that are cut, and the rectangle of each proposal, which is zeros where nothing
        was cut. Proposals of the same area are ordered by their corners (x1, y1, x2, y2), and equal
        boxes by their draws, so permuting the proposals and their draws permutes the result.

    Raises:
        TypeError: The shapes do not match.
        ValueError: The size is not positive.

    Examples:
        >>> boxes, draws = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([[0.25, 0.0, 0.0]])
        >>> cutout = proposal_cutout(boxes, draws, (4, 4))
        >>> cutout.boxes, int(cutout.mask.sum())
        (tensor([[0., 0., 2., 2.]]), 4)

    References:
        D3SSL, Sec 4.1, 1) (proposal-based random cutout).
    """
    check_size("regions.proposal_cutout", size)
    draws = draws.clamp(0, 1)
    usable = boxes_valid(boxes) & (draws == draws).all(-1)  # not NaN
    if valid is not None:
        usable = usable & valid
    boxes = widened(boxes)
    table = torch.where(usable[..., None], torch.cat([boxes, draws.to(boxes)], -1), 0.0)
    cuts = torch.zeros_like(boxes)

    order = _large_to_small(table, usable)
    if usable.numel() and readable(usable):
        order = order[..., : int(usable.sum(-1).max())]  # the other proposals come last
    table = take_rows(table, order)

    # Both axes are handled at once: the axes of what belongs to a proposal are x and y, and two of
    # size 1, for rectangles and for the edges along an axis.
    columns = table[..., None, None]
    corners, rho, place = columns.split((4, 1, 2), -3)
    sides = corners.unflatten(-3, (2, 2))
    limits = row_of([size[1], size[0]], table)[:, None, None]
    first, last = sides.unbind(-4)
    low, high = sides.clamp(min=0).minimum(limits).unbind(-4)
    extent = last - first
    tiny = torch.finfo(extent.dtype).tiny
    area = torch.mul(*extent.split(1, -3)).clamp(min=tiny)  # nothing is lost of an area of 0
    nothing = extent * -(tiny**0.5)  # the gradient of a root is infinite at 0, so it begins at tiny

    # Pixels between the same edges have the same state, so the mask consists of such cells, as long
    # as there are few: a proposal has up to four edges along each axis. A cell begins at an edge,
    # and ends at the next one; the last cell has no end.
    by_pixel = 4 * table.shape[-2] > max(size)
    pixels = torch.arange(max(size), dtype=table.dtype, device=table.device)
    pixels = pixels.expand(*table.shape[:-2], 2, 1, -1).contiguous()
    edges = pixels if by_pixel else torch.full_like(pixels[..., :1], -torch.inf)
    count = edges.shape[-1]
    cells = edges.new_zeros((*table.shape[:-2], 1, count, count), dtype=torch.bool)

    corners = []
    opposites = []
    quantities = (
        first, extent, nothing, area, low, high, first.floor(), last.ceil(), rho, place
    )  # fmt: skip
    turns = zip(*(quantity.unbind(-4) for quantity in quantities), strict=True)
    for first, extent, nothing, area, low, high, first_touched, last_touched, rho, place in turns:
        across, down = edges.clamp(low, high).diff(append=high).split(1, -3)
        lost = (cells * down.mT).mul_(across)
        share = lost.sum((-2, -1), keepdim=True) / area
        restored = share > rho
        root = (rho - share.masked_fill(restored, 0.0)).clamp(min=tiny).sqrt()
        length = torch.addcmul(nothing, root, extent)
        corner = torch.addcmul(first, place, extent - length)
        opposite = corner + length
        corners.append(corner)
        opposites.append(opposite)

        # Two rectangles of whole pixels: what the proposal touches, and what is cut out of it.
        starts = torch.cat([first_touched, corner.ceil()], -2)
        ends = torch.cat([last_touched, opposite.floor()], -2)
        if not by_pixel:
            more_edges = torch.cat([edges, starts.mT, ends.mT], -1).sort().values
            cells = _cells_at(more_edges, edges, cells)
            edges = more_edges
        across, down = ((edges >= starts) & (edges < ends)).unbind(-3)
        touched, cut = _outer(down, across).split(1, -3)
        cells = (cells > (touched & restored)) | cut  # > is "and not"

    if not by_pixel:
        cells = _cells_at(pixels, edges, cells)
    mask = cells.squeeze(-3)[..., : size[0], : size[1]]
    if corners:
        corner = torch.stack(corners, -4)
        opposite = torch.stack(opposites, -4)
        some = (opposite > corner).all(-3, keepdim=True)
        own = torch.where(some, torch.cat([corner, opposite], -3), 0.0).flatten(-3)
    else:
        own = table[..., :4]
    return Cutout(mask, cuts.scatter(-2, order[..., None].expand_as(own), own))


@typed
def sample_surrounding_boxes(
    boxes: Float[Tensor, "*batch n 4"],
    *,
    ratio: tuple[float, float] = (0.2, 0.6),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "*batch n 3"] | None = None,
) -> Float[Tensor, "*batch n 4"]:
    """Sample a rectangle beside each proposal, in a random direction (random mask, PRM).

    Covering this rectangle leaves only a part of the proposal's surroundings, and a different part
    in each view. The rectangle touches the proposal from outside. `boxes_to_mask` makes the mask of
    all rectangles, and `fill_mask` applies it.

    Args:
        boxes: Proposals `(x1, y1, x2, y2)`, in pixels.
        ratio: Smallest and largest area, as a share of the proposal's area; 0 means no rectangle.
        aspect: Smallest and largest width divided by height; the aspect is log-uniform.
        generator: Source of the random numbers, on the boxes' device.
        noise: Uniform numbers in [0, 1) from which the draw follows; by default they are drawn from
            `generator`.

    Returns:
        One rectangle for each proposal, in the same frame; it may leave the image.

    Raises:
        TypeError: The shapes do not match.
        ValueError: A range is negative or not in order, or an aspect is 0.

    Examples:
        >>> boxes = torch.tensor([[20.0, 20.0, 40.0, 30.0]])
        >>> sample_surrounding_boxes(boxes).shape
        torch.Size([1, 4])

    References:
        D3SSL, Sec 4.1, 2) (proposal-based random mask).
    """
    where = "regions.sample_surrounding_boxes"
    fits = 0 <= ratio[0] <= ratio[1] < math.inf
    check(where, "ratio", ratio, fits, "0 <= smallest <= largest")
    fits = 0 < aspect[0] <= aspect[1] < math.inf
    check(where, "aspect", aspect, fits, "0 < smallest <= largest")

    draws = sample_uniform((*boxes.shape[:-1], 3), boxes, generator=generator, noise=noise)
    by_share, by_aspect, by_angle = draws.unbind(-1)
    wide = widened(boxes)
    first = wide[..., :2]
    last = wide[..., 2:]
    share = ratio[0] + (ratio[1] - ratio[0]) * by_share
    stretch = (aspect[0] * (aspect[1] / aspect[0]) ** by_aspect).sqrt()
    extent = (last - first).clamp(min=0)

    area = extent.prod(-1) * share
    tiny = torch.finfo(area.dtype).tiny  # the gradient of the root is infinite at 0
    root = area.clamp(min=tiny).sqrt() - tiny**0.5
    half = torch.stack([root * stretch, root / stretch], -1) / 2

    angle = 2 * math.pi * by_angle
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    # The distance of the centers at which the two boxes no longer overlap along one axis.
    reach = (extent / 2 + half) / direction.abs().clamp(min=1e-6)
    center = (first + last) / 2 + reach.amin(-1, keepdim=True) * direction
    return torch.cat([center - half, center + half], -1).to(boxes.dtype)


@typed
def boxes_to_mask(
    boxes: Float[Tensor, "*batch n 4"],
    size: Size,
    valid: Bool[Tensor, "*batch n"] | None = None,
) -> Bool[Tensor, "*batch h w"]:
    """Mark the pixels whose center lies in any of the boxes.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)` in pixels, half-open.
        size: Size `(h, w)` of the mask.
        valid: Boxes to use; by default all.

    Returns:
        True inside the union of the boxes. A box that is not valid covers nothing.

    Raises:
        TypeError: The shapes do not match.
        ValueError: The size is not positive.

    Examples:
        >>> boxes_to_mask(torch.tensor([[1.0, 0.0, 3.0, 1.0]]), (2, 3)).int()
        tensor([[0, 1, 1],
                [0, 0, 0]], dtype=torch.int32)

    References:
        D3SSL, Eq 6.
    """
    check_size("regions.boxes_to_mask", size)
    usable = boxes_valid(boxes) if valid is None else valid & boxes_valid(boxes)
    x1, y1, x2, y2 = widened(boxes)[..., None].unbind(-2)

    h, w = size
    y = torch.arange(0.5, h, dtype=x1.dtype, device=boxes.device)
    x = torch.arange(0.5, w, dtype=x1.dtype, device=boxes.device)
    in_rows = (y >= y1) & (y < y2)
    in_columns = (x >= x1) & (x < x2)
    rows = (in_rows & usable[..., None]).float()
    columns = in_columns.float()
    with full_precision(boxes):
        return rows.mT @ columns > 0  # the number of boxes that contain a pixel


@typed
def fill_mask(
    images: Float[Tensor, "*batch c h w"],
    mask: Bool[Tensor, "*batch h w"],
    *,
    fill: float | Float[Tensor, " c"] = 0.0,
) -> Float[Tensor, "*batch c h w"]:
    """Fill the masked pixels of images.

    Args:
        images: Images.
        mask: True for the pixels to fill.
        fill: One number, or one for each channel; 0 is the mean of normalized images.

    Returns:
        The filled images.

    Raises:
        TypeError: The shapes do not match.

    Examples:
        >>> fill_mask(torch.ones(1, 1, 2), torch.tensor([[True, False]]))
        tensor([[[0., 1.]]])

    References:
        D3SSL, Sec 4.1.
    """
    mask = mask[..., None, :, :]
    if not isinstance(fill, Tensor):
        return images.masked_fill(mask, fill)
    return torch.where(mask, fill[:, None, None], images).to(images.dtype)


@typed
def sample_shift(
    boxes: Float[Tensor, "*batch n 4"],
    size: Size,
    valid: Bool[Tensor, "*batch n"] | None = None,
    *,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "*batch 2"] | None = None,
) -> Float[Tensor, "*batch 2"]:
    """Sample one shift for all boxes of an image that keeps them inside the image.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)` in pixels.
        size: Size `(h, w)` of the image.
        valid: Boxes to use; by default all.
        generator: Source of the random numbers, on the boxes' device.
        noise: Uniform numbers in [0, 1) from which the draw follows; by default they are drawn from
            `generator`.

    Returns:
        `(dx, dy)` in whole pixels, in at least float32, uniform over the shifts that keep every
        valid box inside. It is 0 along an axis where a box already reaches outside, and 0 if there
        is no valid box.

    Raises:
        TypeError: The shapes do not match.
        ValueError: The size is not positive.

    Examples:
        >>> sample_shift(torch.tensor([[0.0, 0.0, 4.0, 4.0]]), (4, 4))
        tensor([0., 0.])

    References:
        D3SSL, Sec 4.2 (the bias t of the de-positioning module).
    """
    check_size("regions.sample_shift", size)
    usable = boxes_valid(boxes) if valid is None else valid & boxes_valid(boxes)
    wide = widened(boxes)
    used = usable[..., None]

    sides = row_of([size[1], size[0]], wide)
    reach = torch.where(used, torch.cat([-wide[..., :2], wide[..., 2:]], -1), -torch.inf)
    # The padding gives an envelope to an image without boxes.
    farthest = torch.nn.functional.pad(reach, (0, 0, 0, 1), value=-torch.inf).amax(-2)

    low = farthest[..., :2].ceil()
    high = (sides - farthest[..., 2:]).floor()
    fits = (low <= 0) & (high >= 0) & usable.any(-1, keepdim=True)
    low = torch.where(fits, low, 0.0)
    high = torch.where(fits, high, 0.0)

    draws = sample_uniform((*low.shape[:-1], 2), low, generator=generator, noise=noise)
    return (low + (draws * (high - low + 1)).floor()).minimum(high)


@typed
def shift_boxes(
    boxes: Float[Tensor, "*batch n 4"], shift: Float[Tensor, "*batch 2"]
) -> Float[Tensor, "*batch n 4"]:
    """Move all boxes of an image by one vector.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)`.
        shift: `(dx, dy)`, in the same unit.

    Returns:
        The moved boxes.

    Raises:
        TypeError: The shapes do not match.

    Examples:
        >>> shift_boxes(torch.tensor([[0.0, 0.0, 2.0, 1.0]]), torch.tensor([1.0, 3.0]))
        tensor([[1., 3., 3., 4.]])

    References:
        D3SSL, Sec 4.2.
    """
    return boxes + torch.cat([shift, shift], -1)[..., None, :]


@typed
def composite(
    foreground: Float[Tensor, "*batch c h w"],
    background: Float[Tensor, "*batch c h w"],
    mask: Bool[Tensor, "*batch h w"],
    shift: Float[Tensor, "*batch 2"] | None = None,
) -> Float[Tensor, "*batch c h w"]:
    """Paste a part of one image, which may be moved, onto another image.

    Every pixel of the result comes from exactly one of the two images.

    Args:
        foreground: Images to copy from.
        background: Images to paste on, such as other images of the batch.
        mask: Pixels to paste, in the frame of the result: the union of the shifted boxes without
            the pixels that `proposal_cutout` cuts.
        shift: `(dx, dy)` in whole pixels, from `sample_shift`: the pixel at p of the foreground
            moves to p + shift. By default nothing moves.

    Returns:
        The moved foreground where `mask` is True and the foreground reaches; elsewhere the
        background.

    Raises:
        TypeError: The shapes do not match.

    Examples:
        >>> new, mask = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[True, True, True]])
        >>> composite(new, torch.zeros(1, 1, 3), mask, torch.tensor([1.0, 0.0]))
        tensor([[[0., 1., 2.]]])

    References:
        D3SSL, Eq 7 and 8.
    """
    if shift is not None:
        h, w = foreground.shape[-2:]
        dx, dy = shift.round().long()[..., None].unbind(-2)
        x = torch.arange(w, device=shift.device) - dx
        y = torch.arange(h, device=shift.device) - dy
        row = y.clamp(0, max(h - 1, 0))
        column = x.clamp(0, max(w - 1, 0))
        mask = mask & _outer(row == y, column == x)  # where the foreground reaches
        source = torch.add(column[..., None, :], row[..., :, None], alpha=w)
        source = source.flatten(-2)[..., None, :]
        pixels = foreground.flatten(-2)
        foreground = pixels.gather(-1, source.expand_as(pixels)).view_as(background)
    return torch.where(mask[..., None, :, :], foreground, background)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[..., :, None] * columns[..., None, :]


def _cells_at(points: Tensor, edges: Tensor, cells: Tensor) -> Tensor:
    """Take the cells (*batch, 1, rows, columns) at points of both axes (*batch, 2, 1, n)."""
    column, row = (torch.searchsorted(edges, points, right=True) - 1).split(1, -3)
    count = points.shape[-1]
    cells = cells.gather(-2, row.mT.expand(*cells.shape[:-2], count, cells.shape[-1]))
    return cells.gather(-1, column.expand(*cells.shape[:-2], count, count))


def _large_to_small(table: Tensor, usable: Tensor) -> Tensor:
    """Order the rows of boxes and draws; those that are not usable come last."""
    x1, y1, x2, y2, *draws = table.unbind(-1)
    minus_area = (x2 - x1) * (y1 - y2)
    least, *keys = [*draws, y2, x2, y1, x1, torch.where(usable, minus_area, torch.inf)]
    order = least.argsort(dim=-1)
    for key in keys:  # stable sorts, by the least important key first
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, stable=True))
    return order
