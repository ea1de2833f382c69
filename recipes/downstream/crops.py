"""Crops of images as the loader processes make them: bytes in, bytes out; or floats.

This module is no command.
"""

from functools import partial
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
import densekit as dk


def as_picture(crop: Tensor) -> Image.Image:
    """A crop, uint8 (3, h, w), as an RGB image of PIL."""
    planes = [Image.fromarray(plane) for plane in crop.numpy()]
    return Image.merge("RGB", planes)


def as_bytes(picture: Image.Image) -> Tensor:
    """An RGB image of PIL as uint8 (3, h, w)."""
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)


def crop_bytes(
    image: Tensor,
    view: dk.View,
    size: int | tuple[int, int],
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
) -> Tensor:
    """One view of one image, both of 8 bits: `dk.crop_views` within one gray level, but quicker.

    Args:
        image: A whole image, uint8 (3, H, W).
        view: A view without leading axes.
        size: Size of the crop in pixels, or its side.
        interpolation: The resize filter.

    Returns:
        The crop, uint8 (3, h, w).
    """
    height, width = image.shape[-2:]
    left, top, right, bottom = view.box.tolist()
    is_inside = 0 <= left < right <= width and 0 <= top < bottom <= height
    is_whole = is_inside and all(edge == int(edge) for edge in (left, top, right, bottom))
    if not is_whole:  # its edges lie within pixels
        crop = dk.crop_views(image / 255, view, size, interpolation=interpolation)
        return _rounded_bytes(crop * 255)

    pixels = image[None, :, int(top) : int(bottom), int(left) : int(right)]
    sides = (size, size) if isinstance(size, int) else size
    resize = partial(nn.functional.interpolate, size=sides, mode=interpolation, antialias=True)
    if interpolation == "bilinear":
        crop = resize(pixels)[0]
    else:  # bytes would be clipped between the two passes, where bicubic overshoots
        crop = _rounded_bytes(resize(pixels.float())[0])

    if view.flip:
        crop = crop.flip(-1)
    if view.vertical_flip is not None and view.vertical_flip:
        crop = crop.flip(-2)
    return crop


def crop_floats(inside: Tensor, flip: Tensor, size: int) -> Tensor:
    """The part of an image in the box of a view, resized and flipped: as `dk.crop_views`.

    Args:
        inside: All pixels of the box and no others, float (c, h, w).
        flip: Whether the view is mirrored left to right.
        size: Side of the crop in pixels.

    Returns:
        The crop, float (c, size, size).
    """
    sides = (size, size)
    crop = inside
    if inside.shape[-2:] != sides:
        crop = nn.functional.interpolate(inside[None], sides, mode="bilinear", antialias=True)[0]
    return crop.flip(-1) if flip else crop


def _rounded_bytes(pixels: Tensor) -> Tensor:
    """Gray levels 0 ... 255 as uint8, rounded; they are lost."""
    return pixels.round_().clamp_(0, 255).byte()
