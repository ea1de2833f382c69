"""What changes colors and sharpness does what PIL and torchvision do, to the bit."""

import numpy as np
import pytest
import torch
from downstream import colors
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional


@st.composite
def pictures(draw):
    """Pictures of any size, of few levels and of many."""
    height, width = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    levels = draw(st.sampled_from([[0, 255], [0, 1, 127, 128, 254, 255], range(256)]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return Image.fromarray(generator.choice(levels, (height, width, 3)).astype(np.uint8))


@given(pictures(), st.floats(0, 12))
def test_the_blur_is_that_of_pil(picture, sigma):
    before = picture.copy()
    assert colors.blur(picture, sigma) == picture.filter(ImageFilter.GaussianBlur(sigma))
    assert picture == before


def test_each_hue_saturation_and_value_has_the_color_that_pil_gives_it():
    saturation, value = np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 2)
    for number in range(256):
        hue = np.full_like(value, number)
        bands = [Image.fromarray(band) for band in (hue, saturation, value)]
        assert colors.from_hsv(hue, saturation, value) == Image.merge("HSV", bands).convert("RGB")


@given(pictures(), st.floats(-0.5, 0.5))
def test_the_hue_turns_as_in_torchvision(picture, factor):
    assert colors.change_hue(picture, factor) == functional.adjust_hue(picture, factor)


@st.composite
def changes(draw):
    """A change of this module, and torchvision's of the same parameters."""
    strength = st.floats(0, 1.5)
    jitter = draw(st.tuples(*[st.none() | strength] * 3, st.none() | st.floats(0, 0.5)))
    share = draw(st.floats(0, 1))
    low, more = draw(st.tuples(st.floats(0, 3), st.floats(0.1, 3)))
    sigma = torch.distributions.Uniform(low, low + more)

    def blur(picture):
        return picture.filter(ImageFilter.GaussianBlur(float(sigma.sample())))

    pairs = (
        (colors.ColorJitter(*jitter), transforms.ColorJitter(*jitter)),
        (colors.RandomGrayscale(share), transforms.RandomGrayscale(share)),
        (colors.RandomBlur((low, low + more)), blur),
    )
    return draw(st.sampled_from(pairs))


@given(pictures(), changes(), st.integers(0, 2**32 - 1))
def test_a_change_draws_and_makes_what_torchvision_does(picture, pair, seed):
    ours, theirs = pair
    torch.manual_seed(seed)
    changed = ours(picture)
    next_number = torch.rand(())
    torch.manual_seed(seed)
    assert changed == theirs(picture)
    assert next_number == torch.rand(())


def test_the_parameters_of_the_jitter_are_checked_as_in_torchvision():
    with pytest.raises(ValueError, match="hue"):
        colors.ColorJitter(hue=0.6)
