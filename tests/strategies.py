"""Hypothesis strategies that build valid input: shapes and a seed are drawn, tensors follow.

Nothing is drawn and thrown away: what a test needs (a box inside its image, two views that
overlap) holds by construction. Sizes stay at 8 a side, so that an example takes a millisecond.
"""

import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from densekit import View

BATCHES = ((), (1,), (2,), (2, 3), (0,), (2, 0))
DEGENERATE = ("reversed x", "reversed y", "no width", "no height", "nan", "inf", "-inf")


def batches():
    """Leading axes: none, one, two, and some of size 0."""
    return st.sampled_from(BATCHES)


def sizes(low=1, high=8):
    """`(h, w)`."""
    return st.tuples(st.integers(low, high), st.integers(low, high))


def generators():
    """A seeded source of random numbers; Hypothesis prints the seed, not the numbers."""
    return st.integers(0, 2**31 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


def uniform(generator, *shape, low=0.0, high=1.0, dtype=torch.float64):
    """Uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=dtype)


def whole(generator, low, high):
    """Whole numbers in [low, high], bounds as tensors of one shape."""
    draws = torch.rand(low.shape, generator=generator, dtype=low.dtype)
    return (low + (draws * (high - low + 1)).floor()).minimum(high)


@st.composite
def tensors(draw, shape, low=-2.0, high=2.0, dtype=torch.float64):
    """Uniform numbers in [low, high) of a given shape."""
    return uniform(draw(generators()), *shape, low=low, high=high, dtype=dtype)


def boxes_within(generator, frame, whole_pixels=False):
    """One box inside each box of `frame`, a quarter of a unit wide at least."""
    low, high = frame[..., :2], frame[..., 2:]
    if whole_pixels:
        start = whole(generator, low, high - 1)
        stop = whole(generator, start + 1, high)
    else:
        least = (high - low).clamp(max=0.25)
        draws = uniform(generator, 2, *low.shape, dtype=low.dtype)
        start = low + draws[0] * (high - low - least)
        stop = (start + least + draws[1] * (high - start - least)).minimum(high)
    return torch.cat([start, stop], -1)


def image_box(size, batch=(), dtype=torch.float64):
    """The box of the whole image."""
    return torch.tensor([0, 0, size[1], size[0]], dtype=dtype).expand(*batch, 4)


def flips(generator, *shape):
    """Random flips."""
    return torch.rand(shape, generator=generator) < 0.5


@st.composite
def boxes(draw, shape=None, size=(8, 8), whole_pixels=None):
    """Boxes inside an image, with whole or fractional corners."""
    shape = draw(batches()) if shape is None else shape
    whole_pixels = draw(st.booleans()) if whole_pixels is None else whole_pixels
    return boxes_within(draw(generators()), image_box(size, shape), whole_pixels)


@st.composite
def views(draw, batch=None, size=None, whole_pixels=None):
    """Views inside an image of at most 8 x 8 pixels."""
    batch = draw(batches()) if batch is None else batch
    size = draw(sizes()) if size is None else size
    box = draw(boxes(batch, size, whole_pixels))
    return View(box, *flips(draw(generators()), 2, *batch))


@st.composite
def overlapping_views(draw, batch=None, size=None, whole_pixels=None):
    """Two views that share an area: both are grown, inside the image, from one common box."""
    batch = draw(batches()) if batch is None else batch
    size = draw(sizes()) if size is None else size
    whole_pixels = draw(st.booleans()) if whole_pixels is None else whole_pixels
    generator, frame = draw(generators()), image_box(size, batch)
    shared = boxes_within(generator, frame, whole_pixels)
    grown = []
    for _ in range(2):
        room = (frame - shared) * uniform(generator, *batch, 4)
        # Some sides stay where they are: the views touch the shared box from inside.
        room = torch.where(flips(generator, *batch, 4), 0.0, room)
        room = room.trunc() if whole_pixels else room
        grown.append(View(shared + room, *flips(generator, 2, *batch)))
    return tuple(grown)


@st.composite
def disjoint_views(draw, batch=None):
    """Two views without a common area: one on each side of a line, at times touching it."""
    batch = draw(batches()) if batch is None else batch
    size, whole_pixels = draw(sizes(2)), draw(st.booleans())
    generator, axis = draw(generators()), draw(st.sampled_from([0, 1]))
    first, second = image_box(size, batch).clone(), image_box(size, batch).clone()
    line = draw(st.integers(1, size[1 - axis] - 1))
    first[..., 2 + axis] = line
    second[..., axis] = line
    if not draw(st.booleans()):  # else both fill their side and touch
        first, second = (boxes_within(generator, side, whole_pixels) for side in (first, second))
    pair = [View(box, *flips(generator, 2, *batch)) for box in (first, second)]
    return tuple(reversed(pair)) if draw(st.booleans()) else tuple(pair)


def spoil(good, kinds, sides):
    """Make each box degenerate: `kinds` index DEGENERATE, `sides` the corner for NaN and inf."""
    x1, y1, x2, y2 = good.unbind(-1)
    corner = torch.arange(4) == sides[..., None]
    spoiled = [
        torch.stack([x2, y1, x1, y2], -1),
        torch.stack([x1, y2, x2, y1], -1),
        torch.stack([x1, y1, x1, y2], -1),
        torch.stack([x1, y1, x2, y1], -1),
        *(torch.where(corner, value, good) for value in (torch.nan, torch.inf, -torch.inf)),
    ]
    rows = torch.stack(spoiled, -2)
    return rows.gather(-2, kinds[..., None, None].expand(*kinds.shape, 1, 4))[..., 0, :]


@st.composite
def degenerate_boxes(draw, shape=None):
    """Boxes that enclose nothing: reversed, without an area, NaN or infinite."""
    good = draw(boxes(shape))
    generator = draw(generators())
    kinds = torch.randint(len(DEGENERATE), good.shape[:-1], generator=generator)
    return spoil(good, kinds, torch.randint(4, good.shape[:-1], generator=generator))


@st.composite
def points_in(draw, box, count=None):
    """Points inside each box, the corners among them."""
    count = draw(st.integers(0, 8)) if count is None else count
    share = uniform(draw(generators()), *box.shape[:-1], count, 2)
    share[..., :1, :] = 0.0
    share[..., 1:2, :] = 1.0
    low, high = box[..., None, :2], box[..., None, 2:]
    return (low + share * (high - low)).minimum(high)


@st.composite
def feature_maps(draw, batch, channels=None, size=None, low=-2.0, high=2.0):
    """Feature maps `(*batch, d, h, w)`, down to one cell."""
    channels = draw(st.integers(1, 4)) if channels is None else channels
    size = draw(sizes(high=6)) if size is None else size
    return draw(tensors((*batch, channels, *size), low, high))


@st.composite
def valid_rows(draw, shape):
    """Which rows to use; all, none and some are equally likely."""
    kind = draw(st.sampled_from(["all", "none", "some"]))
    some = flips(draw(generators()), *shape)
    return {"all": torch.ones_like(some), "none": torch.zeros_like(some), "some": some}[kind]


@st.composite
def feature_pairs(draw):
    """Rows of two views `(*batch, n, d)` and `(*batch, m, d)`."""
    batch, d = draw(batches()), draw(st.integers(1, 4))
    counts = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    return tuple(draw(tensors((*batch, count, d))) for count in counts)


@st.composite
def rois(draw, batch, n=None, low=-0.6, high=1.6, largest=2.0):
    """Boxes in the frame of a map; some leave it, by more than half a cell too, but not whole."""
    n = draw(st.integers(0, 4)) if n is None else n
    draws = uniform(draw(generators()), 2, *batch, n, 2)
    extent = 0.05 + draws[0] * (min(largest, high - low) - 0.05)
    first, last = (0.01 - extent).clamp(min=low), (high - extent).clamp(max=0.99)
    start = first + draws[1] * (last - first)
    return torch.cat([start, start + extent], -1)


@st.composite
def boxes_around(draw, batch):
    """Boxes in, across and beside an image of at most 8 x 8 pixels."""
    draws = uniform(draw(generators()), 2, *batch, draw(st.integers(0, 4)), 2)
    extent = 0.05 + draws[0] * 19.95
    start = -9 + draws[1] * (26 - extent)
    return torch.cat([start, start + extent], -1)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation makes; views hold none."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if is_tensor(x) and x.untyped_storage()._cdata not in given:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def largest(function):
    """Bytes of the largest tensor that a call makes."""
    with Largest() as mode:
        function()
    return mode.bytes
