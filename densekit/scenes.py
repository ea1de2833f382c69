"""Procedural scenes of many objects, with ground truth, for tests, demos and documentation."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from densekit.typing import Bool, Float, Int, Size, Tensor, typed

__all__ = ["SCENE_CLASSES", "Scenes", "sample_scenes"]

_SLOTS = 8  # object slots of a scene
_GROUNDS = 2  # background regions of a scene; regions 0, 1 are grounds, 2 ... 9 the object slots
_CHUNK = 2**18  # pixels rendered at a time, which bounds the memory and fits into the cache


class Scenes(NamedTuple):
    """A batch of procedural scenes with their ground truth; boxes are in image pixels.

    Attributes:
        images: RGB values in [0, 1].
        labels: Class of every pixel, an index into `SCENE_CLASSES`.
        instances: 0 on the background, `i + 1` where the object of slot `i` is visible.
        boxes: Half-open boxes `(x1, y1, x2, y2)`, tight around the visible pixels; zeros where not
            valid.
        classes: Class of the object in each slot; 0 where the slot is unused.
        valid: True where the slot is used and at least one pixel of its object is visible.
    """

    images: Float[Tensor, "b 3 h w"]
    labels: Int[Tensor, "b h w"]
    instances: Int[Tensor, "b h w"]
    boxes: Float[Tensor, "b k 4"]
    classes: Int[Tensor, "b k"]
    valid: Bool[Tensor, "b k"]


@typed
def sample_scenes(
    count: int,
    size: Size,
    *,
    generator: torch.Generator | None = None,
    objects: tuple[int, int] = (2, 8),
    co_occurrence: float = 0.0,
) -> Scenes:
    """Sample procedural scenes of textured objects on textured backgrounds.

    Use it where a test, a demo or an example needs images whose content is known exactly. The
    background is one or two of the stuff classes. An object's class determines its shape and the
    family of its texture. Colors, the texture's angle, scale and phase, rotation, position,
    diameter (20 to 55 % of the short side), illumination and pixel noise are random and independent
    of the class, so shape and texture identify the class and color alone does not. A mirrored
    object belongs to the same class. Objects are drawn in slot order: later ones hide earlier ones,
    and all may reach over the image border.

    With `co_occurrence` some objects come in pairs, as a rider and a horse do: the object of each
    second slot then often is the partner of the one before it, and touches it. The partners are the
    first and second object class, the third and fourth, and so on. What is beside an object then
    tells its class, which a representation may learn instead of the object itself.

    Args:
        count: Number of scenes `b`; it may be 0.
        size: Height and width of the images in pixels.
        generator: Source of the random numbers; the scenes are on its device. By default it is the
            global CPU generator. The scenes depend on its state and on the other arguments.
        objects: Smallest and largest number of objects in a scene, both at most 8.
        co_occurrence: Probability that the object of a second, fourth, ... slot is made the partner
            of the one before it. At 0 all objects are independent.

    Returns:
        The scenes, with `k = 8` object slots, of which the first ones are used.

    Raises:
        ValueError: `count` is negative, `size` is not positive, or `objects` is not an ascending
            pair within [0, 8], or `co_occurrence` is not within [0, 1].

    Examples:
        >>> batch = sample_scenes(4, (48, 64), generator=torch.Generator().manual_seed(0))
        >>> batch.images.shape, batch.boxes.shape
        (torch.Size([4, 3, 48, 64]), torch.Size([4, 8, 4]))
        >>> bool((batch.labels[batch.instances == 0] < 4).all())  # the stuff classes
        True
    """
    height, width = size
    if count < 0:
        raise ValueError(
            f"densekit.scenes.sample_scenes: count should be 0 or more, but it is {count}."
        )

    if height < 1 or width < 1:
        raise ValueError(
            f"densekit.scenes.sample_scenes: size should be (height, width), each >= 1, but it "
            f"is {size}."
        )

    if not 0 <= objects[0] <= objects[1] <= _SLOTS:
        raise ValueError(
            "densekit.scenes.sample_scenes: objects should be (fewest, most) with "
            f"0 <= fewest <= most <= {_SLOTS}, but it is {objects}."
        )

    if not 0 <= co_occurrence <= 1:
        raise ValueError(
            "densekit.scenes.sample_scenes: co_occurrence should be a probability from 0 to 1, but "
            f"it is {co_occurrence}."
        )

    # All random numbers are drawn here for all scenes at once, so chunks do not change the result.
    plan = _draw_plan(count, size, generator, objects, co_occurrence)
    noise = torch.empty(count, height, width, dtype=torch.float32, device=plan.classes.device)
    noise.uniform_(-0.04, 0.04, generator=generator)
    images, regions = _render(plan, noise)

    labels = plan.classes.gather(1, regions.flatten(1)).view_as(regions)
    boxes, valid = _tight_boxes(regions)
    instances = regions.sub_(_GROUNDS - 1).clamp_(min=0)
    classes = plan.classes[:, _GROUNDS:].clamp(min=0)
    return Scenes(images, labels, instances, boxes, classes, valid)


class _Plan(NamedTuple):
    """The random parameters of scenes; lengths are in units of the image's short side."""

    classes: Tensor  # (b, r): class of each region, -1 for an unused object slot
    shape: Tensor  # (b, r, 4): from the image to the shape's frame, see `_similarity`
    texture: Tensor  # (b, r, 4): from the image to the texture's frame, one unit a period
    colors: Tensor  # (b, r, 2, 3): the two colors that the texture mixes
    light: Tensor  # (b, 3): per unit of x, per unit of y, at the origin
    horizon: Tensor  # (b, 5): unit normal (2), offset, amplitude and phase of the waves


def _draw_plan(
    count: int,
    size: Size,
    generator: torch.Generator | None,
    objects: tuple[int, int],
    co_occurrence: float,
) -> _Plan:
    device = generator.device if generator is not None else torch.device("cpu")
    short = min(size)
    total = _GROUNDS + _SLOTS

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        numbers = torch.empty(count, *shape, dtype=torch.float32, device=device)
        return numbers.uniform_(low, high, generator=generator)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, (count, *shape), device=device, generator=generator)

    extent = torch.tensor([size[1] / short, size[0] / short], dtype=torch.float32, device=device)
    stuff = len(_STUFF)
    first = integers(0, stuff, 1)
    second = (first + integers(1, stuff, 1)) % stuff  # never the same stuff on both sides
    things = integers(stuff, len(SCENE_CLASSES), _SLOTS)
    used = torch.arange(_SLOTS, device=device) < integers(objects[0], objects[1] + 1, 1)

    center = uniform(total, 2, low=0.08, high=0.92) * extent
    radius = uniform(total, low=0.1, high=0.275)
    if co_occurrence > 0:
        paired = uniform(_SLOTS // 2) < co_occurrence
        # The classes of partners differ in their last bit.
        partner = stuff + ((things[:, ::2] - stuff) ^ 1)
        things[:, 1::2] = torch.where(paired, partner, things[:, 1::2])
        leading = slice(_GROUNDS, None, 2)
        beside_them = slice(_GROUNDS + 1, None, 2)
        # Both are disks at most, so at this distance they touch or overlap a little.
        distance = 0.9 * (radius[:, leading] + radius[:, beside_them])
        places = center[:, leading] + distance.unsqueeze(-1) * _direction(uniform(_SLOTS // 2))
        places = torch.clamp(places, 0.08 * extent, 0.92 * extent)  # within the image, as all
        center[:, beside_them] = torch.where(paired.unsqueeze(-1), places, center[:, beside_them])

    # A texture has about four periods across its object, but a period has at least three pixels.
    period = 2 * radius * uniform(total, low=0.2, high=0.32)
    period[:, :_GROUNDS] = uniform(_GROUNDS, low=0.09, high=0.18)
    texture = _similarity(uniform(total), period.clamp(min=3 / short), center)
    texture[..., 2:] += uniform(total, 2, low=-0.5, high=0.5)

    # Each channel is on a circle, and the second color is roughly opposite the first. So both are
    # uniform in [0, 1], independent of the class, and differ in each channel by at least 0.35.
    color = uniform(total, 3)
    other = (color + uniform(total, 3, low=0.35, high=0.65)) % 1
    slope = _direction(uniform()) * uniform(1, high=0.4) / extent
    angle = _direction(uniform())
    offset = (angle * extent * uniform(2, low=0.2, high=0.8)).sum(-1, keepdim=True)
    return _Plan(
        classes=torch.cat([first, second, torch.where(used, things, -1)], 1),
        shape=_similarity(uniform(total), radius, center),
        texture=texture,
        colors=torch.stack([color, other], 2) * 0.9 + 0.05,
        # Light decreases linearly from 1 in the brightest corner, to 0.43 or more in the opposite.
        light=torch.cat([slope, 1 - (slope * extent).clamp(min=0).sum(-1, keepdim=True)], 1),
        horizon=torch.cat([angle, offset, uniform(1, high=0.08), uniform(1, high=6.28)], dim=1),
    )


def _direction(turns: Tensor) -> Tensor:
    return torch.stack([torch.cos(2 * math.pi * turns), torch.sin(2 * math.pi * turns)], -1)


def _similarity(turns: Tensor, unit: Tensor, center: Tensor) -> Tensor:
    """Return `(a, b, c, d)` of u = a x + b y + c, v = a y - b x + d: `center` to 0, `unit` to 1."""
    a, b = (_direction(turns) / unit.unsqueeze(-1)).unbind(-1)
    x, y = center.unbind(-1)
    return torch.stack([a, b, -a * x - b * y, b * x - a * y], -1)


def _axes(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the coordinates of the pixel centers, x as `(w,)` and y as `(h, 1)`."""
    height, width = size
    x = torch.arange(width, dtype=torch.float32, device=device) + 0.5
    y = torch.arange(height, dtype=torch.float32, device=device) + 0.5
    return x / min(size), y.unsqueeze(1) / min(size)


def _render(plan: _Plan, noise: Tensor) -> tuple[Float[Tensor, "b 3 h w"], Int[Tensor, "b h w"]]:
    """Return the images and each pixel's visible region, a chunk of scenes at a time."""
    count, height, width = noise.shape
    images = noise.new_empty(count, 3, height, width)
    regions = torch.empty(count, height, width, dtype=torch.long, device=noise.device)
    step = max(1, _CHUNK // (height * width))
    for start in range(0, count, step):
        rows = slice(start, start + step)
        part = _Plan(*[field[rows] for field in plan])
        regions[rows], mix = _paint(part, (height, width))
        for channel, color in enumerate(_colors(part, regions[rows], mix)):
            torch.add(color, noise[rows], out=images[rows, channel]).clamp_(0, 1)
    return images, regions


def _paint(plan: _Plan, size: Size) -> tuple[Int[Tensor, "b h w"], Float[Tensor, "b h w"]]:
    """Return each pixel's visible region (0, 1, or 2 + slot) and the weight of its second color."""
    x, y = _axes(size, plan.classes.device)
    count, total = plan.classes.shape
    # One number contains both: its integer part is the region, and its fraction is half the weight.
    # So the maximum over the layers belongs to the last region that covers the pixel.
    layers = torch.zeros(count, total, *size, dtype=torch.float32, device=x.device)
    for index, (shape, texture) in enumerate(_CLASSES.values()):
        row = torch.nonzero((plan.classes == index).flatten()).squeeze(1)
        weight = texture(*_apply(plan.texture.flatten(0, 1)[row], x, y))
        layer = torch.add((row % total)[:, None, None], weight, alpha=0.5)
        if shape is not None:
            inside = shape(*_apply(plan.shape.flatten(0, 1)[row], x, y))
            layer *= inside.clamp_(0, 1).ceil_()
        layers.flatten(0, 1).index_copy_(0, row, layer)

    normal_x, normal_y, offset, swing, phase = plan.horizon[..., None, None].unbind(1)
    along = 12 * (normal_x * y - normal_y * x)
    side = normal_x * x + normal_y * y - offset + swing * torch.sin(along + phase)
    layers[:, 1] *= side > 0

    top = layers.amax(1)
    regions = top.floor()
    return regions.long(), 2 * (top - regions)


def _apply(similarity: Float[Tensor, "n 4"], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    a, b, c, d = similarity[..., None, None].unbind(1)
    return (a * x + c) + b * y, (a * y + d) - b * x  # each is a row plus a column


def _tight_boxes(
    regions: Int[Tensor, "b h w"],
) -> tuple[Float[Tensor, "b k 4"], Bool[Tensor, "b k"]]:
    count, height, width = regions.shape
    total = _GROUNDS + _SLOTS
    columns = regions.new_zeros(count, total, width).scatter_(1, regions, 1)
    rows = regions.new_zeros(count, height, total).scatter_(2, regions, 1).transpose(1, 2)
    ends = []
    for seen in (columns[:, _GROUNDS:], rows[:, _GROUNDS:]):
        length = seen.shape[-1]
        index = torch.arange(length, device=seen.device)
        first = length - ((length - index) * seen).amax(-1)
        stop = ((index + 1) * seen).amax(-1)
        ends.append((first, stop))

    (left, right), (top, bottom) = ends
    valid = right > 0
    boxes = torch.stack([left, top, right, bottom], -1) * valid.unsqueeze(-1)
    return boxes.float(), valid


def _colors(
    plan: _Plan, regions: Int[Tensor, "b h w"], mix: Float[Tensor, "b h w"]
) -> Iterator[Float[Tensor, "b h w"]]:
    """Yield the lit colors of the pixels without noise, channel by channel."""
    x, y = _axes((regions.shape[1], regions.shape[2]), regions.device)
    slope_x, slope_y, level = plan.light[..., None, None].unbind(1)
    light = (slope_x * x + level) + slope_y * y
    owner = regions.flatten(1)
    for base, other in plan.colors.permute(3, 2, 0, 1).contiguous():
        start = base.gather(1, owner).view_as(mix)
        change = (other - base).gather(1, owner).view_as(mix)
        yield torch.addcmul(start, change, mix).mul_(light)


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    return 0.5 - torch.maximum(v, math.sqrt(0.75) * u.abs() - 0.5 * v)


def _star(u: Tensor, v: Tensor) -> Tensor:
    v = v.abs()  # the union of a triangle and its reflection
    lean = math.sqrt(0.75) * u.abs()
    tilt = 0.5 * v
    return 0.5 - torch.minimum(torch.maximum(v, lean - tilt), lean + tilt)


def _cross(u: Tensor, v: Tensor) -> Tensor:
    u = u.abs()
    v = v.abs()
    return torch.minimum(0.3 - torch.minimum(u, v), 0.95 - torch.maximum(u, v))


def _half_disk(u: Tensor, v: Tensor) -> Tensor:
    v = v + 0.45  # the flat side passes below the origin
    return torch.minimum(v, 1 - u * u - v * v)


def _fold(u: Tensor) -> Tensor:
    """Return the distance from the middle of the period: 0.5 at whole numbers, 0 halfway."""
    return (u - u.floor()).sub_(0.5).abs_()


def _edge(level: Tensor) -> Tensor:
    """Return 1 where the level is positive and 0 where it is negative, with a narrow ramp."""
    return (8 * level).add_(0.5).clamp_(0, 1)


def _clouds(u: Tensor, v: Tensor) -> Tensor:
    # Sines that distort each other give irregular blobs, much faster than a noise table.
    waves = torch.sin(3.1 * u + 2 * torch.sin(1.7 * v))
    waves = waves + torch.sin(2.7 * v + 2 * torch.sin(2.1 * u))
    return 0.5 + 0.25 * waves


def _bricks(u: Tensor, v: Tensor) -> Tensor:
    beside = 2 * _fold(0.5 * (u + v.floor())) - 0.9
    return _edge(torch.maximum(beside, _fold(v) - 0.4))


# A class is a shape and a texture, each a function of u and v. A shape is positive inside, in a
# frame where its diameter is at most 2 (numbers, not Booleans: comparing and converting would
# take most of the time); grounds have no shape. A texture is the weight of the second color, from
# 0 to 1, in a frame whose unit is one period. No class has a handedness: every shape is symmetric
# in u, and every mirrored texture is one of the same family.
_STUFF = {
    "gradient": (None, lambda u, v: 0.5 + 0.5 * torch.sin(0.6 * u)),
    "clouds": (None, _clouds),
    "bricks": (None, _bricks),
    "waves": (None, lambda u, v: 0.5 + 0.5 * torch.sin(6.28 * u + 2.5 * torch.sin(1.5 * v))),
}
_THINGS = {
    "ringed disk": (
        lambda u, v: 1 - u * u - v * v,
        lambda u, v: _edge(_fold(torch.sqrt(u * u + v * v)) - 0.25),
    ),
    "checked square": (
        lambda u, v: 0.71 - torch.maximum(u.abs(), v.abs()),
        lambda u, v: _edge(4 * (_fold(u) - 0.25) * (_fold(v) - 0.25)),
    ),
    "striped triangle": (_triangle, lambda u, v: _edge(_fold(u) - 0.25)),
    "plain ring": (
        lambda u, v: 0.375 - (u * u + v * v - 0.625).abs(),  # radii 0.5 and 1
        lambda u, v: torch.zeros_like(u),
    ),
    "dotted cross": (_cross, lambda u, v: _edge(0.1 - _fold(u).square_() - _fold(v).square_())),
    "spotted star": (_star, lambda u, v: _edge(_clouds(1.5 * u, 1.5 * v) - 0.5)),
    "zigzag half-disk": (_half_disk, lambda u, v: _edge(_fold(u + _fold(v)) - 0.25)),
    "latticed bar": (
        lambda u, v: torch.minimum(0.95 - u.abs(), 0.3 - v.abs()),
        lambda u, v: _edge(torch.maximum(_fold(u), _fold(v)) - 0.375),
    ),
}
_CLASSES = {**_STUFF, **_THINGS}
SCENE_CLASSES: tuple[str, ...] = tuple(_CLASSES)
"""Names of the classes, by index: the background (stuff) classes first, then the objects."""
