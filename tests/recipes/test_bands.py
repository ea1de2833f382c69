"""Images of any channels and values: files, values, crops, weights, and a run from end to end."""

import json
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import adapt
import evaluate
import export
import harness
import numpy as np
import onnxruntime
import pytest
import test_adapt
import test_evaluate
import tifffile
import torch
from downstream import bands, encoders, image_sets
from downstream.bands import BandImages, Bands, Stored
from downstream.crops import crop_floats
from harness import UserError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
import densekit as dk

PATIENCE = harness.Patience()
GRAY = {"photometric": "minisblack"}
# How a file may hold an array (c, H, W).
LAYOUTS = {
    "first.npy": lambda path, x: np.save(path, x),
    "last.npy": lambda path, x: np.save(path, x.transpose(1, 2, 0)),
    "fortran.npy": lambda path, x: np.save(path, np.asfortranarray(x)),
    "planes.tif": lambda path, x: tifffile.imwrite(path, x, planarconfig="separate", **GRAY),
    "samples.tiff": lambda path, x: tifffile.imwrite(
        path, x.transpose(1, 2, 0), planarconfig="contig", **GRAY
    ),
    "pages.tif": lambda path, x: tifffile.imwrite(path, x, **GRAY),
    "packed.tif": lambda path, x: tifffile.imwrite(
        path, x, planarconfig="separate", compression="zlib", **GRAY
    ),
    "tiles.tif": lambda path, x: tifffile.imwrite(
        path, x, planarconfig="separate", tile=(16, 16), **GRAY
    ),
    "stack.tif": lambda path, x: tifffile.imwrite(path, x, imagej=True, metadata={"axes": "CYX"}),
    "big.TIF": lambda path, x: tifffile.imwrite(
        path, x, planarconfig="separate", byteorder=">", **GRAY
    ),
}


def array(shape, dtype, seed):
    """Values over the whole range of their type, in any byte order."""
    draws = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return draws.normal(size=shape).astype(dtype)
    limits = np.iinfo(dtype)
    values = draws.integers(limits.min, limits.max, shape, np.int64, endpoint=True)
    return values.astype(dtype)


# ---- files -----------------------------------------------------------------------------------


@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8", ">u2", ">f4"]),
    channels=st.sampled_from([1, 2, 3, 4, 5, 9]),
    sides=st.tuples(st.integers(10, 40), st.integers(10, 40)),
    seed=st.integers(0, 99),
)
def test_every_layout_of_a_file_gives_the_same_values(layout, dtype, channels, sides, seed):
    values = array((channels, *sides), dtype, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, layout)
        if channels == 1 and layout.startswith(("planes", "samples", "packed", "tiles", "big")):
            layout = "pages.tif"  # one plane is none
        if layout == "stack.tif" and dtype not in ("u1", "u2", "f4"):
            layout = "pages.tif"  # ImageJ knows no others
        LAYOUTS[layout](path, values)
        for known in (None, channels):
            stored = bands.read_stored(path, known)
            np.testing.assert_array_equal(stored.values.numpy(), values)
            assert bands.image_size(path, known) == sides
        assert not bands.is_picture(path) or (values.dtype == np.uint8 and channels == 1)


def test_axes_of_arrays_and_stacks(tmp_path):
    assert bands.channel_axis((5, 40, 50)) == 0
    assert bands.channel_axis((40, 50, 5)) == 2
    assert bands.channel_axis((3, 8, 9)) == 0  # a small image
    assert bands.channel_axis((90, 80, 224), 224) == 2
    assert bands.channel_axis((90, 80, 6), 5) == 2  # of another number, which is then told
    for shape in [(64, 64, 64), (7, 9, 7), (90, 80, 224), (2, 3, 8, 8), (9,), ()]:
        with pytest.raises(ValueError, match="its shape is"):
            bands.channel_axis(shape)
    with pytest.raises(ValueError, match="its shape is 64 x 9 x 64"):
        bands.channel_axis((64, 9, 64), 64)
    np.save(tmp_path / "gray.npy", np.ones((6, 7), np.uint16))
    assert bands.read_stored(tmp_path / "gray.npy").shape == (1, 6, 7)
    x = array((2, 5, 16, 17), "u2", 0)
    path = tmp_path / "a.tif"
    for axes, values in [("ZYX", x[0]), ("TYX", x[0]), ("TCYX", x), ("ZCYX", x)]:
        tifffile.imwrite(path, values, imagej=True, metadata={"axes": axes})
        with pytest.raises(ValueError, match=f"it is a stack with the axes {axes} of "):
            bands.read_stored(path)
    for axes, values in [("CYX", x[0]), ("TCYX", x[:1])]:
        tifffile.imwrite(path, values, imagej=True, metadata={"axes": axes})
        np.testing.assert_array_equal(bands.read_stored(path).values, x[0])
    tifffile.imwrite(path, x[0], ome=True, metadata={"axes": "CYX"})
    np.testing.assert_array_equal(bands.read_stored(path).values, x[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_heeded_as_pillow_does(orientation, tmp_path):
    values = array((5, 8), "u1", 0)
    tag = (274, "H", 1, orientation, True)
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=[tag], **GRAY)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    expected = harness.read_image(tmp_path / "a.png")[:1]
    assert torch.equal(bands.read_stored(tmp_path / "a.tif").values, expected)
    assert bands.image_size(tmp_path / "a.tif") == expected.shape[1:]


def test_what_is_a_picture(tmp_path):
    rgb = array((3, 16, 17), "u1", 0).transpose(1, 2, 0)
    rgba = array((4, 16, 17), "u1", 0).transpose(1, 2, 0)
    Image.fromarray(rgb).save(tmp_path / "rgb.jpg")
    Image.fromarray(rgb[..., 0]).save(tmp_path / "gray.png")
    Image.fromarray(rgb).quantize(4).save(tmp_path / "palette.png")
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(rgb).quantize(4).save(tmp_path / "palette.tif")
    Image.fromarray(rgb[..., 0] > 99).save(tmp_path / "bits.tif")
    tifffile.imwrite(tmp_path / "rgb.tif", rgb, photometric="rgb")
    tifffile.imwrite(tmp_path / "rgba.tif", rgba, photometric="rgb")
    tifffile.imwrite(tmp_path / "gray.tif", rgb[..., 0])
    for path in sorted(tmp_path.iterdir()):
        assert bands.is_picture(path), path.name
        harness.read_image(path)

    others = tmp_path / "others"
    others.mkdir()
    Image.fromarray(array((16, 17), "u2", 0)).save(others / "gray16.png")
    tifffile.imwrite(others / "near-infrared.tif", rgba, photometric="rgb", extrasamples=[0])
    tifffile.imwrite(others / "rgb16.tif", rgb.astype("u2"), photometric="rgb")
    tifffile.imwrite(others / "gray16.tif", rgb[..., 0].astype("u2"))
    tifffile.imwrite(others / "float.tif", rgb[..., 0].astype("f4"))
    tifffile.imwrite(others / "pages.tif", rgba.transpose(2, 0, 1), **GRAY)
    np.save(others / "rgb.npy", rgb)
    for path in sorted(others.iterdir()):
        assert not bands.is_picture(path), path.name
        bands.read_stored(path)


def test_a_picture_with_other_channels_is_no_first_channel(tmp_path):
    """Pillow reads some such files as their first channel alone."""
    for layout in ("planes.tif", "samples.tiff", "packed.tif"):
        LAYOUTS[layout](tmp_path / layout, array((5, 16, 16), "u2", 0))
        with pytest.raises(Exception, match=r"5 channels|cannot identify"):
            harness.read_image(tmp_path / layout)


def cut(layout, share):
    """A file of this layout without its end."""

    def write(path):
        LAYOUTS[layout](path, array((5, 64, 64), "u2", 0))
        content = path.read_bytes()
        path.write_bytes(content[: round(share * len(content))])

    return write


BAD = {
    "cut1.tif": (cut("pages.tif", 0.5), ""),
    "cut2.tif": (cut("packed.tif", 0.9), ""),
    "cut3.tif": (cut("planes.tif", 0.5), ""),
    "cut4.tif": (cut("stack.tif", 0.5), "cut off"),
    "cut5.npy": (cut("first.npy", 0.5), ""),
    "text.tif": (lambda path: path.write_text("no image"), "TIFF"),
    "empty.tif": (lambda path: path.touch(), ""),
    "stack.tif": (
        lambda path: tifffile.imwrite(path, np.ones((5, 16, 16), "u2"), imagej=True,
                                      metadata={"axes": "ZYX"}), "a stack with the axes ZYX"),
    "empty.npy": (lambda path: path.touch(), ""),
    "nothing.npy": (lambda path: np.save(path, np.ones((0, 5, 5))), "it has no pixel"),
    "object.npy": (lambda path: np.save(path, np.array([{}], object), allow_pickle=True), ""),
    "text.npy": (lambda path: np.save(path, np.full((9, 9), "a")), "is no number"),
    "complex.npy": (lambda path: np.save(path, np.ones((9, 9), "c8")), "is no number"),
    "cube.npy": (lambda path: np.save(path, np.ones((40, 40, 40))), "is not clear"),
    "row.npy": (lambda path: np.save(path, np.ones(9)), "its shape is 9"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_folder_of_a_broken_file_is_one_sentence(name, tmp_path, capsys):
    write, reason = BAD[name]
    write(tmp_path / name)
    config = replace(test_adapt.SMALL, preset="images", data=tmp_path, run=tmp_path / "run")
    assert harness.main(adapt.train, config) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: No image below {tmp_path} is readable, such as ")
    assert name in said
    assert reason in said
    assert said.count("\n") == 1


# ---- values ----------------------------------------------------------------------------------


@given(
    dtype=st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"]),
    limits=st.sampled_from([None, (0.0, 1.0), (-5.0, 100.0), (100.0, 4000.0)]),
    places=st.lists(st.integers(0, 23), max_size=4, unique=True),
    mark=st.sampled_from([math.nan, math.inf, -math.inf, -9999.0]),
    seed=st.integers(0, 99),
)
def test_values_are_scaled_and_what_has_no_data_gets_the_mean(dtype, limits, places, mark, seed):
    values = array((2, 3, 4), dtype, seed)
    is_float = values.dtype.kind == "f"
    marked = values.copy()
    if is_float:
        marked.reshape(-1)[places] = mark
    wanted = limits or bands.range_of(torch.from_numpy(values).dtype)
    chosen = Bands(2, wanted, limits is not None, (0.25, -3.0), (1.0, 1.0))
    found = bands.to_floats(Stored(torch.from_numpy(marked), -9999.0), chosen).numpy()
    low, high = wanted
    expected = (values.astype("f8") - low) / (high - low)
    if limits is not None:
        expected = expected.clip(0, 1)
    if is_float:
        expected.reshape(-1)[places] = np.repeat([0.25, -3.0], 12)[places]
    size = np.abs(np.r_[expected.ravel(), low / (high - low)]).max()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * size)


@given(st.integers(1, 5), st.floats(0.1, 1e4), st.floats(-1e4, 1e4), st.integers(0, 99))
def test_mean_and_deviation_are_those_of_all_pixels_with_data(channels, scale, shift, seed):
    images = [array((channels, 9, 8 + i), "f8", seed + i) * scale + shift for i in range(3)]
    images[1][:, 2, 3] = np.nan
    images[2][-1] = 7.0 if channels == 1 else images[2][-1]
    with tempfile.TemporaryDirectory() as folder:
        for number, image in enumerate(images):
            np.save(Path(folder, f"{number}.npy"), image)
        source = bands.open_folder(Path(folder), channels, None, None, PATIENCE)
        bands.complete(source, None, None)
    flat = np.concatenate([image.reshape(channels, -1) for image in images], 1)
    size = abs(shift) + scale
    np.testing.assert_allclose(source.bands.mean, np.nanmean(flat, 1), atol=1e-5 * size)
    np.testing.assert_allclose(source.bands.std, np.nanstd(flat, 1), rtol=1e-3, atol=1e-5 * size)


@given(
    canvas=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    size=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_a_crop_is_that_of_the_library(canvas, size, seed):
    values = torch.from_numpy(array((3, *canvas), "u2", seed))
    view = dk.sample_views(canvas, generator=harness.generator(seed))
    chosen = Bands(3, (0.0, 65535.0), False, (0.0,) * 3, (1.0,) * 3)
    found = bands.crop(Stored(values), view, size, chosen)
    expected = dk.crop_views((values.float() / 65535)[None], dk.index_views(view, None), size)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert crop_floats(found, torch.tensor(True), size).equal(found.flip(-1))


def test_pictures_of_bands_are_stretched_and_gray_where_there_are_few():
    images = torch.rand(2, 5, 9, 9) * 1000 + 300
    shown = bands.to_pictures(images)
    assert shown.shape == (2, 3, 9, 9)
    assert (shown.min(), shown.max()) == (0, 1)
    torch.testing.assert_close(shown, bands.to_pictures(images * 7 - 40), rtol=0, atol=1e-4)
    assert (
        bands.to_pictures(images[:, :1]).unbind(1)[0].equal(bands.to_pictures(images[:, :1])[:, 2])
    )
    assert bands.to_pictures(torch.full((1, 2, 3, 3), 5.0)).isfinite().all()


@given(scale=st.floats(0.1, 1e4), shift=st.floats(-1e4, 1e4), seed=st.integers(0, 99))
def test_the_changes_of_bands_do_not_depend_on_their_unit(scale, shift, seed):
    views = adapt.Views(blur=(0.1, 1.0))
    crop = torch.rand(5, 9, 9, dtype=torch.float64)
    std = tuple(torch.linspace(0.1, 0.9, 5).tolist())
    found = []
    for factor, offset in ((1.0, 0.0), (scale, shift)):
        change = adapt.BandPhotometric(views, tuple(factor * x for x in std))
        with harness.seeded(seed):
            found.append(change(crop * factor + offset))
    torch.testing.assert_close(found[1], found[0] * scale + shift, rtol=1e-4, atol=1e-4 * scale)


# ---- views of a canvas -----------------------------------------------------------------------


@given(
    side=st.integers(8, 40),
    extra=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    method=st.sampled_from(["paka", "neco"]),
    seed=st.integers(0, 99),
)
def test_crops_of_a_canvas_have_one_resolution_and_overlap(side, extra, method, seed):
    canvas = (side + extra[0], side + extra[1])
    views = adapt.Views(size=32, small_size=16, small=4)
    config = replace(test_adapt.SMALL, method=method, crop_pixels=side, views=views, seed=seed)
    dataset = adapt.ManyViews([(torch.zeros(3, *canvas, dtype=torch.uint8), ())], config)
    crops, drawn, valid, *_ = dataset[0, 0]
    sides = torch.stack([drawn.box[:, 2] - drawn.box[:, 0], drawn.box[:, 3] - drawn.box[:, 1]])
    assert (sides[:, :2] == side).all()
    assert (sides[:, 2:] == round(side / 2)).all()
    assert (drawn.box >= 0).all()
    assert (drawn.box[:, 2:] <= torch.tensor([canvas[1], canvas[0]])).all()
    assert dk.box_iou(drawn.box[:1], drawn.box[1:2]).item() > 0.1
    assert valid[:2].all()
    assert crops.large.shape == (2, 3, 32, 32)


# ---- weights ---------------------------------------------------------------------------------
FIVE = Bands(5, (0.0, 1.0), False, (0.0,) * 5, (1.0,) * 5)


@pytest.mark.parametrize(("architecture", "channels"), [("tiny", 1), ("tiny", 5), ("tiny-vit", 4)])
def test_new_channels_start_as_the_option_says(architecture, channels):
    with harness.seeded(1):
        network = encoders.build(architecture)
    facts = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    start = encoders.Start("some", architecture, network.state_dict(), facts)
    wanted = Bands(channels, (0.0, 1.0), False, (0.0,) * channels, (1.0,) * channels)
    count = "1 channel" if channels == 1 else f"{channels} channels"
    with pytest.raises(UserError, match=f"images have {count}, and some takes 3: give --channel-i"):
        encoders.change_channels(start, wanted, None)

    old = encoders.encoder_of(start)
    made = {
        how: encoders.encoder_of(encoders.change_channels(start, wanted, how))
        for how in ("mean", "zero", "random")
    }
    gray = torch.rand(2, 1, 64, 64)
    same = gray.expand(-1, channels, -1, -1)
    torch.testing.assert_close(made["mean"](same), old(gray.expand(-1, 3, -1, -1)))
    images = torch.rand(2, channels, 64, 64)
    known = torch.zeros(2, 3, 64, 64)
    known[:, :channels] = images[:, :3]
    torch.testing.assert_close(made["zero"](images), old(known))
    first = [next(x for x in e.network.parameters() if x.ndim == 4) for e in (old, made["random"])]
    assert first[1].shape[1] == channels
    spread = first[1].std() * math.sqrt(channels / 3) / first[0].std()
    assert 0.7 < spread < 1.4
    assert made["mean"].bands == wanted


def test_an_encoder_of_bands_is_no_start_of_a_recipe_of_pictures(tmp_path):
    network = encoders.build("tiny", channels=5)
    facts = {**FIVE.side_car(), "architecture": "tiny", "method": "adapt-paka"}
    path = tmp_path / "encoder.safetensors"
    harness.save_encoder(path, network, **facts)
    encoder = encoders.load_encoder(str(path))
    assert encoder.bands == FIVE
    assert encoder(torch.rand(1, 5, 32, 32)).shape[-1] == 4
    config = replace(test_adapt.SMALL, weights=str(path))
    with pytest.raises(UserError, match=r"takes images of 5 channels as stored, and this recipe"):
        encoders.read_start(type("Options", (), {"weights": str(path), "arch": "tiny"}))
    with pytest.raises(UserError, match=r"The images have 3 channels, and .* takes 5: give --chan"):
        adapt.open_source(config, encoders.find_start(str(path)))
    side_car = path.with_suffix(".json")
    told = json.loads(side_car.read_text())
    for wrong, sentence in [
        ({"value_range": None}, "has value_range None: two numbers"),
        ({"value_range": [1, 0]}, r"has value_range \[1, 0\]: two numbers"),
        ({"clip": 3}, "has clip 3: true or false"),
        ({"mean": [0, 0, 0]}, r"has mean \[0, 0, 0\]: 5 numbers are needed"),
        ({"std": [1, 1, 1, 1, 0]}, "5 numbers above 0 are needed"),
    ]:
        side_car.write_text(json.dumps({**told, **wrong}))
        with pytest.raises(UserError, match=sentence):
            encoders.load_encoder(str(path))


# ---- folders ---------------------------------------------------------------------------------


def test_images_of_other_kinds_in_one_folder_are_one_sentence(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((5, 40, 40), np.uint16))
    tifffile.imwrite(tmp_path / "b.tif", np.ones((4, 40, 40), np.uint16), **GRAY)
    np.save(tmp_path / "c.npy", np.ones((40, 40, 5), np.uint8))
    (tmp_path / "d.tif").write_text("no image")
    source = bands.open_folder(tmp_path, "auto", None, None, PATIENCE)
    assert isinstance(source, BandImages)
    with pytest.raises(UserError, match=r"a.npy has 5 channels, and .*b.tif has 4: give images of"):
        source[1]
    with pytest.raises(UserError, match=r"a.npy has values of uint16, and .*c.npy of uint8: give"):
        source[2]
    stored, unreadable = source[3]  # a broken file is passed over
    assert stored.shape == (5, 40, 40)
    assert "d.tif: " in unreadable[0]
    other_range = bands.open_folder(tmp_path, 5, (0.0, 9.0), None, PATIENCE)
    assert other_range[2][0].values.dtype == torch.uint8
    assert (other_range.bands.value_range, other_range.bands.clip) == ((0.0, 9.0), True)
    with pytest.raises(UserError, match=r"--channels is 3: .*a.npy has 5 channels"):
        bands.open_folder(tmp_path, 3, None, None, PATIENCE)
    for option in ("mean", "std"):
        given_values = {"mean": None, "std": None, option: (1.0, 2.0)}
        with pytest.raises(UserError, match=rf"--{option} is 1.0 2.0: give 5 numbers"):
            bands.complete(source, **given_values)


def test_pictures_stay_pictures_unless_a_number_of_channels_is_given(tmp_path):
    gray = array((20, 20), "u1", 0)
    Image.fromarray(gray).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.ones((3, 7)))  # something beside it
    found = bands.open_folder(tmp_path / "", "rgb", None, None, PATIENCE)
    assert [type(found), len(found)] == [harness.FolderImages, 1]
    (tmp_path / "a.npy").rename(tmp_path / "z.npy")
    found = bands.open_folder(tmp_path, "auto", None, None, PATIENCE)
    assert [type(found), len(found)] == [harness.FolderImages, 1]
    (tmp_path / "z.npy").unlink()
    as_stored = bands.open_folder(tmp_path, 1, None, None, PATIENCE)
    np.testing.assert_array_equal(as_stored[0][0].values[0], gray)
    assert as_stored.bands.value_range == (0.0, 255.0)


def test_mistakes_with_images_are_one_sentence_each(tmp_path, capsys):
    for number in range(10):
        Image.fromarray(array((40, 50, 3), "u1", number)).save(tmp_path / f"{number}.png")
    config = replace(test_adapt.SMALL, preset="images", data=tmp_path, run=tmp_path / "run")
    for changes, sentence in [
        ({"batch": 64}, "--batch is 64: give at most 10, the number of images."),
        ({"crop_pixels": 48}, "--crop-pixels is 48: give at most 40, since an image has 40 x 50"),
        ({"channels": 5}, f"--channels is 5: {tmp_path / '0.png'} has 3 channels."),
        ({"channels": 3, "mean": (1.0,)}, "--mean is 1.0: give 3 numbers, one for each channel"),
    ]:
        assert harness.main(adapt.train, replace(config, **changes)) == 2
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith(f"error: {sentence}")
        assert "Traceback" not in "".join(said)


# ---- from end to end -------------------------------------------------------------------------


@pytest.fixture
def five(tmp_path):
    """A labeled set of 5 channels of 16 bits: scenes, seen by other sensors."""
    draws = harness.generator(3)
    scenes = dk.sample_scenes(12, (48, 48), generator=draws)
    sensors = torch.rand(5, 3, generator=draws)
    values = (dk.map_to_rows(scenes.images) @ sensors.T * 1500).round()
    images = dk.rows_to_map(values, (48, 48)).numpy().astype(np.uint16)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    names = [f"{number:02}" for number in range(12)]
    kinds = sorted(LAYOUTS)
    for number, name in enumerate(names):
        layout = kinds[number % len(kinds)]
        LAYOUTS[layout](tmp_path / "images" / f"{name}{Path(layout).suffix}", images[number])
        labels = (scenes.labels[number] > 0).numpy().astype(np.uint8)
        Image.fromarray(labels).save(tmp_path / "labels" / f"{name}.png")
    (tmp_path / "classes.json").write_text(json.dumps({"labels": ["background", "any"]}))
    (tmp_path / "splits.json").write_text(json.dumps({"train": names[:8], "val": names[8:]}))
    return tmp_path


def test_a_set_of_five_channels_trains_is_evaluated_and_exported(five, capsys, monkeypatch):
    options = adapt.scoring.Config
    monkeypatch.setattr(adapt.scoring, "Config", lambda *x, **y: options(*x, **(y | {"draws": 9})))
    start = five / "start.safetensors"
    facts = {"architecture": "tiny", "method": "test", "mean": [0.5] * 3, "std": [0.25] * 3}
    with harness.seeded(0):
        harness.save_encoder(start, encoders.build("tiny"), **facts)
    score = adapt.Score(data=five, size=(48, 48))
    config = replace(
        test_adapt.SMALL, preset="images", weights=str(start), data=five / "images", epochs=1,
        crop_pixels=40, run=five / "run", score=score,
    )  # fmt: skip
    assert harness.main(adapt.train, config) == 2
    assert "The images have 5 channels, and " in capsys.readouterr().err
    assert harness.main(adapt.train, replace(config, channel_init="mean")) == 0
    said = capsys.readouterr()
    assert "Images have 5 channels as stored: " in said.err
    assert "hue, saturation and gray are left out" in said.err
    assert "retrieval" in said.out
    told = json.loads((five / "run" / "encoder.json").read_text())
    assert (told["channels"], told["color_order"], told["channel_init"]) == (5, "file", "mean")
    assert told["value_range"] == [0, 65535]
    pixels = np.stack([bands.read_stored(x, 5).values for x in (five / "images").iterdir()])
    np.testing.assert_allclose(told["mean"], pixels.mean((0, 2, 3)) / 65535, rtol=1e-4)
    np.testing.assert_allclose(told["std"], pixels.std((0, 2, 3)) / 65535, rtol=1e-4)

    extra = five / "images" / "more.npy"
    shutil.copy(next((five / "images").glob("*.npy")), extra)
    assert harness.main(adapt.train, replace(config, channel_init="mean")) == 2
    assert "--data: 12 images then, 13 now" in capsys.readouterr().err
    extra.unlink()

    # A run of bands is a start, and needs no --channel-init for its own channels.
    again = encoders.find_start(str(five / "run"))
    source, _ = adapt.open_source(config, again)
    assert list(source.bands.mean) == told["mean"]

    scored = evaluate.Config(
        (str(five / "run"),), protocol="kmeans-seg,retrieval", data=five, size=(48, 48),
        out=five / "out", workers=0, draws=9, device="cpu",
    )  # fmt: skip
    assert harness.main(evaluate.evaluate, scored) == 0
    figures = json.loads((five / "out" / "results.json").read_text())
    assert str(five / "run") in json.dumps(figures)
    capsys.readouterr()
    plain = replace(scored, encoders=("random:tiny",), protocol="kmeans-seg")
    assert harness.main(evaluate.evaluate, plain) == 2
    assert "has 5 channels as stored, and random:tiny takes RGB: give --channel-init" in (
        capsys.readouterr().err
    )
    assert harness.main(evaluate.evaluate, replace(plain, channel_init="zero")) == 0

    file = five / "run.onnx"
    assert harness.main(export.export, export.Config(str(five / "run"), "onnx", file)) == 0
    car = json.loads((five / "run.onnx.json").read_text())
    assert (car["color_order"], car["value_range"]) == ("file", [0, 65535])
    image = image_sets.open_images(five, split="val")
    encoder = encoders.load_encoder(str(five / "run"))
    image.bands = encoder.bands
    inputs = image.read_image(0)[None]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    *_, found = session.run(None, {"images": inputs.numpy()})
    np.testing.assert_allclose(found, encoder(inputs), rtol=1e-3, atol=1e-4)
    assert harness.main(
        export.export, export.Config(str(five / "run"), "detectron2", five / "a.pkl")
    ) == 2  # fmt: skip
    assert "give timm or onnx" in capsys.readouterr().err


def test_the_protocols_read_bands_as_they_read_pictures(tmp_path):
    """The pixels of pictures, stored as arrays, give each protocol the same numbers."""
    pictures = test_evaluate.write_set(tmp_path / "pictures")
    arrays = test_evaluate.write_set(tmp_path / "arrays")
    for path in sorted((arrays / "images").iterdir()):
        np.save(path.with_suffix(".npy"), harness.read_image(path).numpy())
        path.unlink()
    with harness.seeded(0):
        network = encoders.build("tiny")
    of_pictures = encoders.Encoder("some", "tiny", network, {})
    told = Bands(3, (0.0, 255.0), False, of_pictures.mean, of_pictures.std)
    of_arrays = encoders.Encoder("some", "tiny", network, told.side_car())

    found = []
    for encoder, data in ((of_pictures, pictures), (of_arrays, arrays)):
        config = test_evaluate.configured(data, tmp_path, draws=2, epochs=2)
        splits = evaluate.open_samples(config)
        evaluation = evaluate.Evaluation(encoder, splits, None, config)
        found.append([dk.as_dict(evaluation.score(name)) for name in SAME])
        image = splits[1].read(0, frozenset()).image
        assert image.dtype == (torch.uint8 if encoder is of_pictures else torch.float32)
        assert dk.as_dict(evaluation.score("patches"))["images"] == 8  # colors of pictures alone
    for of_picture, of_array in zip(*found, strict=True):
        assert flat(of_array) == pytest.approx(flat(of_picture), rel=1e-3, abs=1e-4, nan_ok=True)


SAME = (
    "ridge-seg", "kmeans-seg", "retrieval-seg", "object-knn", "disturbed-object-knn", "image-knn",
    "image-svm", "similarity-iou", "retrieval", "bias", "health",
)  # fmt: skip


def flat(figures):
    """The numbers of nested figures, in order."""
    if isinstance(figures, dict):
        figures = list(figures.values())
    if isinstance(figures, list):
        return [number for item in figures for number in flat(item)]
    return [figures]


def test_labels_and_sizes_of_images_of_bands(five):
    found = image_sets.open_images(five, split="train")
    found.bands = Bands(5, (0.0, 65535.0), False, (0.0,) * 5, (1.0,) * 5)
    for number in range(len(found)):
        assert found[number].image.shape == (5, 48, 48)
        assert found.read_labels(number).shape == (48, 48)
    found.bands = found.bands._replace(channels=4)
    with pytest.raises(UserError, match=r"has 5 channels, and the encoder takes images of 4"):
        found.read_image(0)
    found.bands = Bands(5, (0.0, 255.0), False, (0.0,) * 5, (1.0,) * 5)
    with pytest.raises(UserError, match=r"has values of uint16, and the encoder takes values from"):
        found.read_image(0)
