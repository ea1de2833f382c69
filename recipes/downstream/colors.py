"""Random changes of the colors and the sharpness of a picture, as the loader processes make them.

Each draws the numbers that torchvision draws, and makes the pixels that PIL makes, to the bit, but
in less time. The pictures are RGB images of PIL. This module is no command.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torchvision.transforms import v2 as transforms


class ColorJitter(transforms.ColorJitter):
    """torchvision's ColorJitter for pictures."""

    def forward(self, *inputs: Any) -> Image.Image:
        (picture,) = inputs
        drawn = self.make_params([])
        changes = (
            (change_brightness, drawn["brightness_factor"]),
            (change_contrast, drawn["contrast_factor"]),
            (change_saturation, drawn["saturation_factor"]),
            (change_hue, drawn["hue_factor"]),
        )
        for number in drawn["fn_idx"].tolist():
            change, factor = changes[number]
            if factor is not None:
                picture = change(picture, factor)
        return picture


class RandomGrayscale(transforms.RandomGrayscale):
    """torchvision's RandomGrayscale for pictures."""

    def forward(self, *inputs: Any) -> Image.Image:
        (picture,) = inputs
        if torch.rand(1) >= self.p:
            return picture
        return picture.convert("L").convert("RGB")


class RandomBlur:
    """PIL's Gaussian blur, whose standard deviation in pixels is uniform in a range."""

    def __init__(self, sigma: tuple[float, float]):
        self.sigma = torch.distributions.Uniform(*sigma)

    def __call__(self, picture: Image.Image) -> Image.Image:
        return blur(picture, float(self.sigma.sample()))


# ==== colors ======================================================================================
def change_brightness(picture: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(factor)


def change_contrast(picture: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(picture).enhance(factor)


def change_saturation(picture: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Color(picture).enhance(factor)


def change_hue(picture: Image.Image, factor: float) -> Image.Image:
    """Turn the hue by a share of the circle, -0.5 ... 0.5: torchvision's `adjust_hue`."""
    bands = picture.convert("HSV").split()
    hue, saturation, value = [np.asarray(band) for band in bands]
    turned = hue + np.uint8(int(factor * 255) % 256)  # it wraps around
    return from_hsv(turned, saturation, value)


def from_hsv(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> Image.Image:
    """The picture of hue, saturation and value, uint8 (h, w) each: PIL's `convert("RGB")`.

    Each color is `value (1 - saturation share(hue))`, where all numbers are in 255ths. PIL rounds
    it, from floats; integers are quicker.
    """
    twice = 2 * value.astype(np.uint32)
    colors = []
    for shares in SHARES:
        kept = 255**2 - np.take(shares, hue) * saturation
        color = (twice * kept + 255**2) // (2 * 255**2)  # the quotient, rounded
        colors.append(Image.fromarray(color.astype(np.uint8)))
    return Image.merge("RGB", colors)


def shares_of_hues() -> np.ndarray:
    """Which share of the saturation red, green and blue lack at each hue, in 255ths: (3, 256).

    It is 0 in the third of the circle around a color and 1 in the third opposite to it, with a
    straight slope between them.
    """
    sixth = 255  # of the circle
    hues = 6 * np.arange(256)
    rows = []
    for start in (5, 3, 1):
        place = (start * sixth + hues) % (6 * sixth)
        rows.append(np.minimum(place, 4 * sixth - place).clip(0, sixth))
    return np.stack(rows).astype(np.uint16)  # as the products with a saturation are at most 255^2


SHARES = shares_of_hues()


# ==== blur ========================================================================================
class Box(NamedTuple):
    """The weights of a mean over a box of a width that is no whole number, in 2^-24."""

    reach: int  # pixels on each side that the box covers
    inner: np.uint32  # the weight of each pixel that it covers
    outer: np.uint32  # of the two beside them


PASSES = 3
HALF = np.uint32(2**23)
BITS = np.uint32(24)


def blur(picture: Image.Image, sigma: float) -> Image.Image:
    """PIL's `GaussianBlur(sigma)`: three means over a box along the rows, then along the columns.

    Here a plane of one color is worked on at a time, which the processor's cache can hold.
    """
    box = box_of(sigma)
    pixels = np.array(picture)
    for color in range(3):
        across = blur_lines(pixels[..., color].T, box)
        pixels[..., color] = blur_lines(across.T, box)
    return Image.fromarray(pixels)


def box_of(sigma: float) -> Box:
    """The box whose mean, three times, has this standard deviation, in single precision as PIL's.

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering".
    """
    single = np.float32
    variance = single(sigma) * single(sigma) / single(PASSES)
    width = single(math.sqrt(12 * float(variance) + 1))
    reach = math.floor((float(width) - 1) / 2)
    above = single(reach * (reach + 1)) - single(3) * variance
    below = single(6) * (variance - single((reach + 1) ** 2))
    radius = single(reach) + single(2 * reach + 1) * above / below
    inner = int(single(2**24) / (single(2) * radius + single(1)))
    outer = (2**24 - (2 * reach + 1) * inner) // 2
    return Box(reach, np.uint32(inner), np.uint32(outer))


def blur_lines(lines: np.ndarray, box: Box) -> np.ndarray:
    """Three means over a box along the first axis, each rounded; the pixels at the ends go on."""
    count = len(lines)
    edge = box.reach + 1
    padded = np.empty((count + 2 * edge, *lines.shape[1:]), np.uint32)
    first, *covered, last = [padded[x : x + count] for x in range(2 * edge + 1)]
    middle = covered[box.reach]
    middle[:] = lines

    total = np.empty_like(middle)
    ends = np.empty_like(middle)
    for _ in range(PASSES):
        padded[:edge] = middle[0]
        padded[-edge:] = middle[-1]
        np.copyto(total, covered[0])
        for shifted in covered[1:]:
            total += shifted
        total *= box.inner
        np.add(first, last, out=ends)
        ends *= box.outer
        total += ends
        total += HALF
        np.right_shift(total, BITS, out=middle)
    return middle
