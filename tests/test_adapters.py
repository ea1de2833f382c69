"""Views from and to other libraries: what a library crops is where the view says.

The image is its own ground truth: two channels hold the coordinates of the pixel centers, so a crop
by another library shows from where each of its pixels comes.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2
import densekit as dk

H, W = 48, 64
SIDE = 40  # of the views; most crops are smaller, so that nothing is averaged
MARGIN = 8  # of a view, where a crop reads beyond the image or is not linear at its edge


def coordinates(height=H, width=W):
    """An image (2, h, w) of the coordinates of its pixels in the image frame."""
    return dk.coordinate_map(dk.full_view((height, width)), (height, width)).permute(2, 0, 1)


def assert_shows(crop, view, within=1e-3):
    """The crop (..., 2, s, s) of the image of coordinates shows what the view says."""
    expected = dk.coordinate_map(view, crop.shape[-1])
    inner = slice(MARGIN, -MARGIN)
    difference = (crop.movedim(-3, -1) - expected)[..., inner, inner, :]
    assert difference.abs().max() < within


@st.composite
def crops(draw):
    """A crop of whole pixels and its two flips."""
    x1, x2 = sorted(draw(st.sets(st.integers(0, W), min_size=2, max_size=2)))
    y1, y2 = sorted(draw(st.sets(st.integers(0, H), min_size=2, max_size=2)))
    box = torch.tensor([x1, y1, x2, y2]).float()
    return dk.View(box, *(torch.tensor(draw(st.booleans())) for _ in range(2)))


# ---- torchvision -----------------------------------------------------------------------------


def test_torchvision_crops_where_the_view_says():
    image = coordinates()
    torch.manual_seed(0)
    for flip in (False, True):
        params = v2.RandomResizedCrop(SIDE, scale=(0.1, 0.4)).make_params([image])
        view = dk.view_from_torchvision(params, flip=flip)
        crop = v2.functional.resized_crop(image, **params, size=[SIDE, SIDE], antialias=True)
        assert_shows(v2.functional.horizontal_flip(crop) if flip else crop, view)


@given(crops())
def test_a_crop_of_torchvision_comes_back(view):
    flip, vertical_flip = bool(view.flip), bool(view.vertical_flip)
    params = dk.view_to_torchvision(view)
    back = dk.view_from_torchvision(params, flip=flip, vertical_flip=vertical_flip)
    assert all(torch.equal(x, y) for x, y in zip(view, back, strict=True))


def test_other_libraries_take_whole_pixels_of_one_view():
    half = dk.View(torch.tensor([0.5, 0.0, 4.0, 4.0]), torch.tensor(False))
    for write in (dk.view_to_torchvision, dk.view_to_albumentations):
        with pytest.raises(ValueError, match="no whole pixels"):
            write(half)
        with pytest.raises(ValueError, match="one view at a time"):
            write(dk.full_view((4, 4), (2,)))
    with pytest.raises(ValueError, match="no 'top'"):
        dk.view_from_torchvision({"left": 0, "height": 1, "width": 1})


@pytest.mark.parametrize("padding", [8, [3, 7], [1, 2, 3, 4]])
def test_a_crop_of_a_padded_image_may_reach_out_of_it(padding):
    torch.manual_seed(0)
    image = coordinates()
    transform = v2.RandomCrop(SIDE, padding=padding)
    params = transform.make_params([image])
    crop = transform.transform(image, params)
    inside = torch.ones_like(image[:1])
    is_inside = transform.transform(inside, params)[0] > 0
    view = dk.view_from_torchvision(params)
    places = dk.coordinate_map(view, (SIDE, SIDE)).movedim(-1, 0)
    torch.testing.assert_close(crop[:, is_inside], places[:, is_inside], atol=1e-4, rtol=0)


@pytest.mark.parametrize("number", [0.5, None, "3", torch.tensor(2)])
def test_what_is_no_whole_number_of_pixels_is_refused(number):
    with pytest.raises(ValueError, match=r"view_from_torchvision: params\['top'\] is"):
        dk.view_from_torchvision({"left": 0, "top": number, "height": 1, "width": 1})


# ---- kornia ----------------------------------------------------------------------------------


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("mode", ["slice", "resample"])
def test_kornia_crops_where_the_view_says(mode, align_corners):
    augmentation = pytest.importorskip("kornia.augmentation")
    images = coordinates().expand(6, -1, -1, -1)
    torch.manual_seed(0)
    crop = augmentation.RandomResizedCrop(
        (SIDE, SIDE), scale=(0.1, 0.4), cropping_mode=mode, align_corners=align_corners
    )
    flips = augmentation.RandomHorizontalFlip(p=0.5), augmentation.RandomVerticalFlip(p=0.5)
    pipeline = augmentation.AugmentationSequential(crop, *flips, data_keys=["input"])
    crops = pipeline(images)
    view, valid = dk.view_from_kornia(pipeline.transform_matrix, SIDE)
    assert valid.all()
    assert view.flip.any()
    assert not view.flip.all()
    assert_shows(crops, view)

    crops = crop(images)
    aligned = align_corners or mode == "resample"
    assert_shows(crops, dk.view_from_kornia(crop._params, SIDE, align_corners=aligned).view)


@pytest.mark.parametrize("padding", [8, (3, 7), (1, 2, 3, 4)])
def test_parameters_of_a_padded_crop_of_kornia_are_those_of_its_matrix(padding):
    augmentation = pytest.importorskip("kornia.augmentation")
    torch.manual_seed(0)
    crop = augmentation.RandomCrop((SIDE, SIDE), padding=padding, p=1.0)
    crop(coordinates().expand(6, -1, -1, -1))
    want = dk.view_from_kornia(crop.transform_matrix, SIDE).view
    torch.testing.assert_close(dk.view_from_kornia(crop._params, SIDE).view.box, want.box)


def test_a_crop_of_kornia_that_was_not_applied_is_the_whole_image():
    corners = torch.tensor([[2.0, 3.0], [9.0, 3.0], [9.0, 10.0], [2.0, 10.0]]).expand(2, 4, 2)
    target = torch.tensor([[0.0, 0.0], [7.0, 0.0], [7.0, 7.0], [0.0, 7.0]]).expand(2, 4, 2)
    params = {"src": corners, "dst": target, "batch_prob": torch.tensor([1.0, 0.0])}
    view = dk.view_from_kornia(params, 8).view
    torch.testing.assert_close(view.box, torch.tensor([[2.0, 3, 10, 11], [0, 0, 8, 8]]))
    with pytest.raises(ValueError, match="the parameter 'src' is a list; give tensors"):
        dk.view_from_kornia({"src": [[0.0, 0.0]], "dst": target}, 8)


def test_kornia_warps_to_the_view():
    geometry = pytest.importorskip("kornia.geometry")
    generator = torch.Generator().manual_seed(0)
    views = dk.sample_views((H, W), (6,), scale=(0.1, 0.4), generator=generator)
    matrix = dk.view_to_kornia(views, SIDE)
    images = coordinates().expand(6, -1, -1, -1).contiguous()
    crops = geometry.warp_perspective(images, matrix, (SIDE, SIDE), align_corners=True)
    assert_shows(crops, views)
    back = dk.view_from_kornia(matrix, SIDE)
    torch.testing.assert_close(back.view.box, views.box, atol=1e-3, rtol=0)
    assert torch.equal(back.view.flip, views.flip)


def test_parameters_that_are_no_crop_are_refused():
    with pytest.raises(ValueError, match="not those of a crop"):
        dk.view_from_kornia({"batch_prob": torch.ones(2)}, SIDE)


# ---- albumentations --------------------------------------------------------------------------


def resized(edges, count):
    """As many pixels as `count` on the same length."""
    length = edges[-1] - edges[0]
    return [edges[0] + length * i / count for i in range(count + 1)]


@st.composite
def recorded(draw):
    """Transforms as albumentations records them, and the edges of the result's columns and rows."""
    edges = [[float(x) for x in range(W + 1)], [float(y) for y in range(H + 1)]]
    applied = []
    for _ in range(draw(st.integers(1, 5))):
        width, height = len(edges[0]) - 1, len(edges[1]) - 1
        kind = draw(st.sampled_from(["RandomCrop", "HorizontalFlip", "VerticalFlip", "Resize"]))
        params = {"shape": (height, width, 3)}
        if kind == "RandomCrop":
            x1, x2 = sorted(draw(st.sets(st.integers(0, width), min_size=2, max_size=2)))
            y1, y2 = sorted(draw(st.sets(st.integers(0, height), min_size=2, max_size=2)))
            params |= {"crop_coords": (x1, y1, x2, y2), "pad_params": None}
            edges = [edges[0][x1 : x2 + 1], edges[1][y1 : y2 + 1]]
        elif kind == "Resize":
            edges = [resized(line, draw(st.integers(1, 80))) for line in edges]
        else:
            edges["HV".index(kind[0])].reverse()
        applied.append((kind, params))
    return applied, edges


@given(recorded())
def test_the_transforms_of_albumentations_are_followed_one_after_the_other(case):
    applied, (columns, rows) = case
    view = dk.view_from_albumentations(applied)
    box = [min(columns), min(rows), max(columns), max(rows)]
    assert view.box.tolist() == pytest.approx(box, abs=1e-4)
    assert bool(view.flip) == (columns[0] > columns[-1])
    assert bool(view.vertical_flip) == (rows[0] > rows[-1])


def test_albumentations_crops_where_the_view_says():
    library = pytest.importorskip("albumentations")
    pipeline = library.Compose(
        [
            library.SmallestMaxSize(2 * H),
            library.RandomCrop(H, H),
            library.HorizontalFlip(p=0.5),
            library.RandomResizedCrop((SIDE, SIDE), scale=(0.1, 0.4)),
            library.VerticalFlip(p=0.5),
            library.RandomBrightnessContrast(0, 0, p=0.5),
        ],
        save_applied_params=True,
        seed=0,
    )
    image = coordinates().permute(1, 2, 0).numpy() / W
    for _ in range(20):
        found = pipeline(image=image)
        crop = torch.from_numpy(found["image"]).permute(2, 0, 1) * W
        assert_shows(crop, dk.view_from_albumentations(found["applied_transforms"]))
    for transform in (library.Transpose(p=1), library.PadIfNeeded(2 * H, 2 * W)):
        found = library.Compose([transform], save_applied_params=True)(image=image)
        with pytest.raises(ValueError, match="does more than crop, resize and mirror"):
            dk.view_from_albumentations(found["applied_transforms"])


@given(crops())
def test_a_crop_of_albumentations_comes_back(view):
    x_min, y_min, x_max, y_max = dk.view_to_albumentations(view).values()
    shape = (H, W, 3)
    applied = [("Crop", {"shape": shape, "crop_coords": (x_min, y_min, x_max, y_max)})]
    applied += [("HorizontalFlip", {"shape": shape})] * bool(view.flip)
    applied += [("VerticalFlip", {"shape": shape})] * bool(view.vertical_flip)
    back = dk.view_from_albumentations(applied)
    torch.testing.assert_close(tuple(back), tuple(view), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name",
    ["ToTensorV2", "ToTensor3D", "NoOp", "PixelDropout", "CoarseDropout", "GridDropout"],
)
def test_what_moves_no_pixel_is_passed_over(name):
    crop = ("RandomCrop", {"shape": (48, 64, 3), "crop_coords": (10, 3, 51, 46)})
    view = dk.view_from_albumentations([crop, (name, {"shape": (43, 41, 3)})])
    assert view.box.tolist() == [10, 3, 51, 46]
    with pytest.raises(ValueError, match="CenterCrop was recorded without the shape"):
        dk.view_from_albumentations([crop, ("CenterCrop", {"crop_coords": (0, 0, 1, 1)})])


def test_a_record_that_holds_no_positions_is_no_view():
    with pytest.raises(ValueError, match="no transform was applied"):
        dk.view_from_albumentations([])
    recorded = [("RandomResizedCrop", {"p": 1.0, "scale": (0.7, 0.7), "size": (24, 24)})]
    with pytest.raises(ValueError, match="RandomResizedCrop was recorded without the shape"):
        dk.view_from_albumentations(recorded)


# ---- lightly-train ---------------------------------------------------------------------------


@given(crops())
def test_eight_numbers_come_back(view):
    numbers = dk.view_to_lightly_train(view, (H, W))
    assert numbers[4:6].tolist() == [W, H]
    back = dk.view_from_lightly_train(numbers)
    assert all(torch.equal(x, y) for x, y in zip(view, back, strict=True))
