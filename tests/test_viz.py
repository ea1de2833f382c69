"""Pictures, read back from what matplotlib was told to draw and from what it has drawn."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from strategies import batches, generators, sizes, uniform
from densekit import View, crop_views, grid_points, image_to_view, intersect_views, pca_colors
from densekit.viz import (
    label_colors,
    place_colors,
    plot_affinity,
    plot_clusters,
    plot_matches,
    plot_pca,
    plot_segmentation,
    plot_similarity_iou,
    tint_images,
)

FEW = settings(max_examples=12)  # a figure takes some 20 ms
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8)


@pytest.fixture(autouse=True)
def without_pyplot(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its import fails


def pictures(generator, *shape, dtype=torch.float32):
    values = uniform(generator, *shape)
    return (values * 255).byte() if dtype == torch.uint8 else values.to(dtype)


def rgb(images):
    """Images (..., c, h, w) as (..., h, w, 3) in [0, 1], as an oracle of what is drawn."""
    values = images.float() / (255 if images.dtype == torch.uint8 else 1)
    return values.expand(*images.shape[:-3], 3, *images.shape[-2:]).movedim(-3, -1)


def drawn(panel, number=0):
    return torch.from_numpy(np.array(panel.images[number].get_array()))


def dots(figure):
    """The places and the colors of the points of both views."""
    found = figure.axes[0].collections[-2:]
    places = [torch.from_numpy(np.array(x.get_offsets())) for x in found]
    # Without a point matplotlib keeps its default color.
    return places, [torch.from_numpy(x.get_facecolors()[: len(places[0]), :3]) for x in found]


def within(places, picture):
    """Places on the axes as places within one of their images, in [0, 1]."""
    left, right, bottom, top = picture.get_extent()
    return (places - places.new_tensor([left, top])) / places.new_tensor(
        [right - left, bottom - top]
    )


# ---- colors ----------------------------------------------------------------------------------


@given(st.lists(st.integers(-3, 10**6), max_size=8), st.sampled_from([None, 0, 255]))
def test_a_label_has_one_color_whatever_stands_beside_it(labels, ignore):
    labels = torch.tensor(labels, dtype=torch.long)
    colors = label_colors(labels, ignore=ignore)
    assert colors.shape == (len(labels), 3)
    assert ((colors >= 0) & (colors <= 1)).all()
    for label, color in zip(labels, colors, strict=True):
        assert torch.equal(label_colors(label, ignore=ignore), color)
        assert (color == 0).all() == (label < 0 or label == ignore)


INTEGERS = [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16, torch.int32]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_integers_are_drawn_alike(dtype):
    labels = torch.randint(0, 3, (1, 6, 8))
    image = torch.rand(1, 3, 6, 8)
    for plot in (plot_clusters, partial(plot_segmentation, predictions=labels, names="abc")):
        panels = zip(plot(image, labels).axes, plot(image, labels.to(dtype)).axes, strict=True)
        for one, other in panels:
            pictures = zip(one.get_images(), other.get_images(), strict=True)
            assert all((x.get_array() == y.get_array()).all() for x, y in pictures)


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.int64])
def test_the_colors_of_twenty_labels_differ(dtype):
    colors = label_colors(torch.arange(20).to(dtype))
    assert torch.pdist(colors).min() > 0.2
    assert torch.pdist(torch.cat([colors, torch.zeros(1, 3)])).min() > 0.2  # of black as well


@given(batches(), generators())
def test_place_colors_tell_the_place(batch, generator):
    points = uniform(generator, *batch, 4, 2)
    colors = place_colors(points)
    torch.testing.assert_close(colors[..., :2].double(), points)
    torch.testing.assert_close(colors[..., 2].double(), 1 - points[..., 0])
    odd = points.clone()
    odd[..., 0, :] = torch.nan
    odd[..., 1, :] = torch.inf
    assert ((place_colors(odd) >= 0) & (place_colors(odd) <= 1)).all()
    assert torch.equal(place_colors(odd)[..., 2:, :], colors[..., 2:, :])


@given(batches(), sizes(), sizes(), st.sampled_from([1, 3]), st.sampled_from(DTYPES), generators())
def test_a_pixel_has_the_tint_of_the_cell_that_holds_its_center(
    batch, size, cells, channels, dtype, generator
):
    images = pictures(generator, *batch, channels, *size, dtype=dtype)
    colors = uniform(generator, *batch, 3, *cells).float()
    valid = uniform(generator, *batch, *cells) < 0.5
    found = tint_images(images, colors, valid, opacity=0.25)
    (h, w), (h2, w2) = size, cells
    tall, wide = max(h, h2), max(w, w2)
    assert found.shape == (*batch, 3, tall, wide)
    assert found.dtype == torch.float32
    plain = rgb(images)
    for i in range(tall):
        for j in range(wide):
            y, x = (i + 0.5) / tall, (j + 0.5) / wide
            pixel = plain[..., int(y * h), int(x * w), :]
            cell = int(y * h2), int(x * w2)
            tinted = 0.75 * pixel.mean(-1, keepdim=True) + 0.25 * colors[..., cell[0], cell[1]]
            wanted = torch.where(valid[..., cell[0], cell[1], None], tinted, pixel)
            torch.testing.assert_close(found[..., i, j], wanted)
    everywhere = tint_images(images, colors, torch.ones_like(valid))
    assert torch.equal(everywhere, tint_images(images, colors))


# ---- matches ---------------------------------------------------------------------------------


@FEW
@given(sizes(), sizes(), st.integers(0, 6), st.booleans(), generators())
def test_a_matched_pair_has_one_color_and_lies_where_its_points_are(
    size1, size2, count, lines, generator
):
    images = [pictures(generator, 3, *size) for size in (size1, size2)]
    points = [uniform(generator, count, 2).float() for _ in range(2)]
    valid = uniform(generator, count) < 0.7
    figure = plot_matches(*images, *points, valid, lines=lines)
    (panel,) = figure.axes
    places, colors = dots(figure)
    assert torch.equal(colors[0], colors[1])
    torch.testing.assert_close(colors[0], place_colors(points[0][valid]).double())
    for own, shown, picture, image in zip(places, points, panel.images, images, strict=True):
        torch.testing.assert_close(within(own, picture), shown[valid].double())
        torch.testing.assert_close(torch.from_numpy(np.array(picture.get_array())), rgb(image))
    # One unit is a pixel of the first view, and both views keep their proportions and their gap.
    h, w = size1
    assert panel.images[0].get_extent() == [0, w, h, 0]
    left, right, bottom, top = panel.images[1].get_extent()
    assert (bottom, top) == (h, 0)
    assert left > w
    assert abs((right - left) / h - size2[1] / size2[0]) < 1e-9
    assert (panel.get_xlim(), panel.get_ylim()) == ((0, right), (h, 0))
    joined = panel.collections[0].get_segments() if lines else []
    assert len(joined) == lines * valid.sum()
    for segment, *ends in zip(joined, *places, strict=lines):
        torch.testing.assert_close(torch.from_numpy(segment), torch.stack(ends))


@pytest.mark.parametrize("position", [0, 3])
def test_what_is_not_valid_not_finite_or_outside_is_not_drawn(position):
    generator = torch.Generator().manual_seed(0)
    points = [uniform(generator, 5, 2).float() for _ in range(2)]
    images = pictures(generator, 2, 1, 4, 5)
    kept = torch.arange(5) != position
    wanted, _ = dots(plot_matches(*images, points[0][kept], points[1][kept]))
    for view in range(2):
        for value in (torch.nan, torch.inf, -torch.inf, 1.01, -0.01):
            odd = [x.clone() for x in points]
            odd[view][position, 1] = value
            found, colors = dots(plot_matches(*images, *odd))
            assert all(map(torch.equal, found, wanted))
            assert torch.equal(*colors)


def test_the_pixels_under_a_matched_pair_show_the_same_place():
    rows, columns = torch.meshgrid(torch.arange(60) + 0.5, torch.arange(90) + 0.5, indexing="ij")
    image = torch.stack([columns / 90, rows / 60, torch.zeros(60, 90)])  # a color tells the place
    views = [
        View(torch.tensor([10.0, 5.0, 58.0, 53.0]), torch.tensor(False)),
        View(torch.tensor([30.0, 20.0, 78.0, 52.0]), torch.tensor(True), torch.tensor(True)),
    ]
    points = grid_points(intersect_views(*views).box, 5)
    crops = [crop_views(image, views[0], (48, 48)), crop_views(image, views[1], (32, 48))]
    figure = plot_matches(*crops, *[image_to_view(view, points) for view in views])
    for places, picture in zip(dots(figure)[0], figure.axes[0].images, strict=True):
        pixels = np.array(picture.get_array())
        size = torch.tensor([pixels.shape[1], pixels.shape[0]])
        column, row = (within(places, picture) * size).long().unbind(-1)
        shown = torch.from_numpy(pixels)[row, column, :2] * torch.tensor([90, 60])
        assert (shown - points).abs().max() <= 0.5 + 1e-3


def test_a_point_at_the_center_of_a_pixel_is_drawn_in_the_middle_of_it():
    for number in (0, 1):
        images = torch.zeros(2, 3, 7, 9)
        images[number, :, 2, 5] = 1.0
        center = torch.tensor([[5.5 / 9, 2.5 / 7]])
        figure = plot_matches(*images, center, center, lines=False)
        (panel,) = figure.axes
        marks = list(panel.collections)
        for mark in marks:
            mark.remove()
        figure.patch.set_facecolor("black")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        shown = np.asarray(canvas.buffer_rgba())[..., 0] > 127
        rows, columns = np.nonzero(shown)
        x, y = panel.transData.transform(marks[number].get_offsets()[0])
        found = columns.mean() + 0.5, shown.shape[0] - rows.mean() - 0.5
        assert len(rows) > 100
        assert np.abs(np.array(found) - (x, y)).max() <= 1.0  # of about 33 that a pixel is wide


def test_a_list_of_several_sizes_is_drawn_as_its_images_alone():
    images = [torch.rand(3, 4, 5), torch.rand(1, 6, 3)]
    labels = [torch.randint(3, (2, 2)), torch.randint(3, (6, 3))]
    for plot in (plot_clusters, partial(plot_segmentation, predictions=labels, names="abc")):
        together = plot(images, labels).axes
        alone = []
        for image, own in zip(images, labels, strict=True):
            if plot is not plot_clusters:
                plot = partial(plot, predictions=own[None])
            alone += plot(image[None], own[None]).axes
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(drawn(one), drawn(other))
            assert one.images[0].get_extent() == other.images[0].get_extent()


def test_given_colors_are_used():
    images = torch.zeros(2, 3, 4, 4)
    points = torch.rand(3, 2)
    given_colors = label_colors(torch.arange(3))
    _, colors = dots(plot_matches(*images, points, points, colors=given_colors))
    torch.testing.assert_close(colors[0], given_colors.double())


# ---- maps ------------------------------------------------------------------------------------


@FEW
@given(st.integers(1, 3), sizes(), sizes(), st.sampled_from(DTYPES), generators())
def test_a_cluster_has_the_same_color_in_all_images(count, size, cells, dtype, generator):
    images = pictures(generator, count, 1, *size, dtype=dtype)
    labels = torch.randint(-1, 4, (count, *cells), generator=generator)
    figure = plot_clusters(images, labels, ignore=2, opacity=1.0)
    used = (labels >= 0) & (labels != 2)
    colors = label_colors(labels, ignore=2).movedim(-1, 1)
    wanted = tint_images(images, colors, used, opacity=1.0)
    assert len(figure.axes) == count
    for panel, picture in zip(figure.axes, wanted, strict=True):
        torch.testing.assert_close(drawn(panel), picture.movedim(0, -1))
        assert panel.images[0].get_extent() == [0, size[1], size[0], 0]


@FEW
@given(st.lists(sizes(), min_size=1, max_size=3), st.integers(1, 5), generators())
def test_maps_of_any_sizes_have_one_basis(shapes, channels, generator):
    maps = [uniform(generator, channels, *size).float() for size in shapes]
    figure = plot_pca(maps)
    together = torch.cat([x.flatten(1) for x in maps], 1)
    colors = pca_colors(together[None, :, None])[0, :, 0].T
    shown = torch.cat([drawn(panel).flatten(0, 1) for panel in figure.axes])
    torch.testing.assert_close(shown, colors)
    for panel, size in zip(figure.axes, shapes, strict=True):
        assert drawn(panel).shape[:2] == size
        assert panel.images[0].get_extent() == [0, size[1], size[0], 0]


def test_maps_of_one_size_have_the_colors_of_pca_colors():
    maps = torch.randn(3, 6, 4, 5, dtype=torch.float64).requires_grad_()
    figure = plot_pca(maps)
    shown = torch.stack([drawn(panel) for panel in figure.axes])
    torch.testing.assert_close(shown, pca_colors(maps.detach()).movedim(1, -1), atol=1e-5, rtol=0)


def test_an_entry_of_the_affinity_is_drawn_in_its_row_and_column():
    affinity = torch.rand(3, 5).half()
    affinity[1, 2] = torch.nan
    figure = plot_affinity(affinity)
    panel = figure.axes[0]
    shown = panel.images[0].get_array()
    assert np.array_equal(shown.filled(np.nan), affinity.float().numpy(), equal_nan=True)
    assert panel.images[0].get_extent() == [0, 5, 3, 0]
    assert len(figure.axes) == 2  # and the scale


# ---- curves ----------------------------------------------------------------------------------


def test_what_is_not_valid_or_nan_leaves_a_gap_in_a_curve():
    values = torch.tensor([[0.1, 0.2, torch.nan], [0.4, 0.5, 0.6]])
    valid = torch.tensor([[False, True, True], [True, True, True]])
    figure = plot_similarity_iou((0.9, 0.1, 0.5), values, valid, names=["a", "b"])
    (panel,) = figure.axes
    first, second = panel.lines
    assert [*first.get_xdata()] == [0.1, 0.5, 0.9]  # in order
    assert np.isnan(first.get_ydata()).tolist() == [False, True, True]
    assert second.get_ydata().round(3).tolist() == [0.5, 0.6, 0.4]
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["a", "b"]


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 3), (0, 3), (0,), (2, 0)])
def test_each_leading_entry_is_a_curve(shape):
    figure = plot_similarity_iou((0.1, 0.5, 0.9)[: shape[-1]], torch.rand(shape))
    curves = int(np.prod(shape[:-1]))
    assert len(figure.axes[0].lines) == curves
    assert all(len(line.get_ydata()) == shape[-1] for line in figure.axes[0].lines)


# ---- segmentation ----------------------------------------------------------------------------


@FEW
@given(st.integers(1, 2), sizes(), sizes(), st.sampled_from([None, 0, 7]), generators())
def test_truth_and_prediction_have_the_colors_of_their_classes(
    count, size, cells, ignore, generator
):
    images = pictures(generator, count, 3, *size, dtype=torch.uint8)
    labels = torch.randint(-1, 9, (count, *cells), generator=generator)
    predictions = torch.randint(0, 9, (count, *size), generator=generator).byte()
    names = [f"name {number}" for number in range(6)]
    figure = plot_segmentation(images, labels, predictions, names=names, ignore=ignore)
    assert len(figure.axes) == 3 * count
    for number, panel in enumerate(figure.axes):
        row, column = divmod(number, 3)
        maps = (rgb(images), label_colors(labels, ignore=ignore), label_colors(predictions))
        torch.testing.assert_close(drawn(panel), maps[column][row])
        assert panel.images[0].get_extent() == [0, size[1], size[0], 0]

    occur = {int(x) for x in labels.unique()} - {-1, ignore} | {
        int(x) for x in predictions.unique()
    }
    legend = figure.axes[2].get_legend()
    listed = [names[x] if x < 6 else f"class {x}" for x in sorted(occur)]
    assert [text.get_text() for text in legend.get_texts()] == listed
    for label, patch in zip(sorted(occur), legend.get_patches(), strict=True):
        color = label_colors(torch.tensor(label))
        torch.testing.assert_close(torch.tensor(patch.get_facecolor()[:3]), color)


def test_a_legend_has_any_names(tmp_path):
    names = ["_background_", "a$b", r"$\frac$", "two\nlines", ""]
    maps = torch.arange(5).view(1, 1, 5)
    image = torch.rand(1, 1, 1, 5)
    values = torch.rand(5, 2)
    for figure, number in (
        (plot_segmentation(image, maps, maps, names=names), 2),
        (plot_similarity_iou((0.1, 0.5), values, names=names), 0),
    ):
        figure.savefig(tmp_path / "figure.png", dpi=20)
        legend = figure.axes[number].get_legend()
        assert [text.get_text() for text in legend.get_texts()] == names


def test_one_class_has_a_legend_of_one():
    maps = torch.zeros(1, 2, 2, dtype=torch.long)
    figure = plot_segmentation(torch.rand(1, 1, 2, 2), maps, maps, names=["sky"])
    assert [x.get_text() for x in figure.axes[2].get_legend().get_texts()] == ["sky"]


# ---- all of them -----------------------------------------------------------------------------

IMAGES = torch.rand(2, 3, 6, 8)
LABELS = torch.randint(3, (2, 3, 4))
POINTS = torch.rand(2, 4, 2)
VALUES = torch.rand(3, 4)
CALLS = {  # and the number of axes that each takes
    "matches": (lambda **kw: plot_matches(*IMAGES, *POINTS, **kw), 1),
    "clusters": (lambda **kw: plot_clusters(IMAGES, LABELS, **kw), 2),
    "pca": (lambda **kw: plot_pca(IMAGES, **kw), 2),
    "affinity": (lambda **kw: plot_affinity(VALUES, **kw), 1),
    "curve": (lambda **kw: plot_similarity_iou((0.1, 0.2, 0.5, 0.9), VALUES, **kw), 1),
    "segmentation": (lambda **kw: plot_segmentation(IMAGES, LABELS, LABELS, names="ab", **kw), 6),
}


@pytest.mark.parametrize("name", CALLS)
def test_axes_of_yours_are_drawn_on(name, tmp_path):
    call, count = CALLS[name]
    figure = Figure()
    panels = figure.subplots(2, count + 1, squeeze=False)
    untouched = [*panels[1], panels[0, -1]]
    given_axes = panels[0, 0] if count == 1 else panels[0, :count]
    assert call(axes=given_axes) is figure
    assert not any(panel.has_data() for panel in untouched)
    assert all(panel.has_data() for panel in panels[0, :count])
    with pytest.raises(ValueError, match=f"the number of axes is {count + 1}; give {count} of"):
        call(axes=panels[0])
    own = call()
    own.savefig(tmp_path / "own.png")  # without a display
    assert own is not figure


@pytest.mark.parametrize("name", CALLS)
def test_settings_and_numbers_of_yours_stay_as_they_are(name):
    before, state = rcParams.copy(), torch.get_rng_state()
    tensors = [x.clone() for x in (IMAGES, LABELS, POINTS, VALUES)]
    call, _ = CALLS[name]
    call()
    assert rcParams.copy() == before
    assert all(map(torch.equal, (IMAGES, LABELS, POINTS, VALUES), tensors))
    assert torch.equal(torch.get_rng_state(), state)


def numbers(figure):
    """All numbers that a figure was given to draw."""
    for panel in figure.axes:
        yield from (np.array(x.get_array()) for x in panel.images)
        yield from (x.get_offsets() for x in panel.collections)
        yield from (x.get_xydata() for x in panel.lines)


@pytest.mark.parametrize("name", CALLS)
def test_a_picture_does_not_depend_on_its_surroundings(name):
    call, _ = CALLS[name]
    wanted = [*numbers(call())]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu"), torch.inference_mode():
            found = [*numbers(call())]
    finally:
        torch.set_default_dtype(default)
    assert len(found) == len(wanted) > 0
    assert all(map(np.array_equal, found, wanted))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_colors_are_float32_and_mapped_as_batched(dtype):
    points = torch.rand(3, 4, 2, dtype=dtype)
    labels = torch.randint(-1, 5, (3, 2, 2))
    colors = label_colors(labels).movedim(-1, 1).to(dtype)
    calls = [
        (place_colors, (points,)),
        (partial(label_colors, ignore=2), (labels,)),
        (tint_images, (torch.rand(3, 1, 4, 6, dtype=dtype), colors, labels > 1)),
    ]
    for call, arguments in calls:
        batched = call(*arguments)
        assert batched.dtype == torch.float32
        torch.testing.assert_close(torch.vmap(call)(*arguments), batched)
        alone = [call(*(x[i] for x in arguments)) for i in range(3)]
        torch.testing.assert_close(torch.stack(alone), batched)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plot_clusters(torch.rand(1, 2, 4, 4), LABELS[:1]), "channels is 2; give"),
        (lambda: plot_clusters(IMAGES.long(), LABELS), "dtype of the images is torch.int64"),
        (lambda: plot_clusters(IMAGES[:, :, :0], LABELS), "the shape of an image is"),
        (lambda: plot_clusters([], []), "the number of images is 0"),
        (lambda: plot_clusters(list(IMAGES), list(LABELS[:1])), "maps in labels is 1; give 2"),
        (lambda: plot_clusters(IMAGES, LABELS[:, :0]), "the shape of a map in labels is"),
        (lambda: plot_clusters(IMAGES, LABELS, opacity=1.5), "opacity is 1.5"),
        (lambda: plot_matches(torch.rand(5, 0, 4)[:3], *[torch.rand(1, 2)] * 3), "image"),
        (lambda: plot_pca([]), "the number of maps is 0"),
        (lambda: plot_pca(torch.rand(1, 4, 0, 3)), "cells of a map is 0"),
        (lambda: plot_pca([torch.rand(2, 3, 3), torch.rand(4, 3, 3)]), r"channels is \[2, 4\]"),
        (lambda: plot_affinity(torch.rand(0, 3)), r"affinity is \(0, 3\)"),
        (lambda: plot_similarity_iou((0.5,), torch.rand(2)), "IoUs is 1; give 2"),
        (lambda: plot_similarity_iou((0.5,), torch.rand(3, 1), names=["a"]), "names is 1; give 3"),
        (
            lambda: plot_segmentation(IMAGES, LABELS[:, :0], LABELS, names=[]),
            "the shape of a map in labels is",
        ),
        (lambda: tint_images(IMAGES, IMAGES, opacity=-1), "opacity is -1"),
    ],
)
def test_a_wrong_call_is_one_sentence(call, words):
    with pytest.raises((ValueError, TypeError), match=words) as raised:
        call()
    assert str(raised.value).startswith("densekit.viz.")
    assert str(raised.value).count("\n") == 0


def test_channels_that_come_last_are_named():
    with pytest.raises(TypeError, match="channels seem to come last"):
        plot_clusters(torch.rand(2, 6, 8, 3), LABELS)


@pytest.mark.parametrize("name", CALLS)
def test_without_matplotlib_a_sentence_says_how_to_install_it(name, monkeypatch):
    call, count = CALLS[name]
    panels = list(Figure().subplots(1, count, squeeze=False).flat)
    for module in ("figure", "collections", "patches"):
        monkeypatch.setitem(sys.modules, f"matplotlib.{module}", None)  # its import fails
    for given_axes in (None, panels):
        with pytest.raises(ImportError, match=r"pip install densekit\[viz\]"):
            call(axes=given_axes)
