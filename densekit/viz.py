"""Pictures of views, clusters, features and scores: matplotlib figures, and the colors in them.

The functions `plot_*` return a `matplotlib.figure.Figure`, or draw on axes that you give. They
never use pyplot: no window opens, and no figure of yours becomes another current one. They need
matplotlib, `pip install densekit[viz]`; the other functions take and give tensors, and do not.

All of them draw pictures in continuous pixels, as everywhere in densekit: the pixel in row i and
column j covers [j, j + 1) by [i, i + 1).
"""

import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from densekit.diagnostics import pca_colors
from densekit.numerics import check, fit_valid, refuse_channels_last
from densekit.typing import Bool, Float, Integer, Shaped, Tensor, typed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any  # the library is imported without matplotlib

__all__ = [
    "label_colors",
    "place_colors",
    "plot_affinity",
    "plot_clusters",
    "plot_matches",
    "plot_pca",
    "plot_segmentation",
    "plot_similarity_iou",
    "tint_images",
]

_PANEL = 3.0  # inches: the height of a picture
_GAP = 0.05  # between the two pictures of matches, as a share of the first one's width


# ---- colors ----------------------------------------------------------------------------------


@typed
def label_colors(
    labels: Integer[Tensor, "*shape"], *, ignore: int | None = None
) -> Float[Tensor, "*shape 3"]:
    """Give each label a color, which is the same in every picture.

    The color depends on the label alone: its hue is the fractional part of `0.55 + 0.618 label`, so
    that neighboring numbers get distant hues, and its lightness and saturation alternate.

    Args:
        labels: Numbers of classes or clusters, such as those of `kmeans`. There may be any number
            of them, but beyond about twenty some colors are alike.
        ignore: A label without a color, such as 255.

    Returns:
        RGB colors in [0, 1], in float32, channels last. Labels below 0, and the ignored one, are
        black.

    Examples:
        >>> label_colors(torch.tensor([0, -1, 255]), ignore=255)
        tensor([[0.4750, 0.8075, 0.9500],
                [0.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    labels = labels.long()  # torch compares no uint16
    used = _is_used(labels, ignore)
    numbers = torch.where(used, labels, 0).double()
    hue = (0.55 + numbers * 0.61803398875) % 1.0
    # Of all that we tried, these keep the first twenty colors farthest apart.
    value = 0.95 - 0.35 * (numbers % 2)
    saturation = numbers.new_tensor([0.5, 0.8, 0.95])[(numbers % 3).long()]

    channels = []
    for offset in (5, 3, 1):  # of red, green and blue: the usual formula of HSV
        sector = (offset + 6 * hue) % 6
        distance = torch.minimum(sector, 4 - sector).clamp(0, 1)
        channels.append(value * (1 - saturation * distance))
    return torch.where(used[..., None], torch.stack(channels, -1), 0.0).float()


@typed
def place_colors(points: Float[Tensor, "*batch n 2"]) -> Float[Tensor, "*batch n 3"]:
    """Give each point a color that tells its place: `(x, y, 1 - x)` as red, green and blue.

    Matched points of two views get the same color where both are given the color of one of them.

    Args:
        points: `(x, y)` in the frame of a view, in [0, 1]; other numbers are clipped.

    Returns:
        RGB colors in [0, 1], in float32. The color of a point that is not finite has no meaning,
        but is finite.

    Examples:
        >>> place_colors(torch.tensor([[0.0, 0.0], [1.0, 0.5]]))
        tensor([[0.0000, 0.0000, 1.0000],
                [1.0000, 0.5000, 0.0000]])
    """
    x, y = points.float().nan_to_num(0.0).clamp(0.0, 1.0).unbind(-1)
    return torch.stack([x, y, 1.0 - x], -1)


@typed
def tint_images(
    images: Shaped[Tensor, "*batch c h w"],
    colors: Float[Tensor, "*batch 3 h2 w2"],
    valid: Bool[Tensor, "*batch h2 w2"] | None = None,
    *,
    opacity: float = 0.6,
) -> Float[Tensor, "*batch 3 tall wide"]:
    """Lay colors over gray copies of images, such as those of clusters or of places.

    Images and colors may have different sizes. Both cover the same area: a pixel gets the color of
    the cell that its center lies in.

    Args:
        images: Images of one or three channels: floats in [0, 1], or uint8.
        colors: RGB colors in [0, 1], a map of cells for each image.
        valid: Cells to tint; the image stays as it is elsewhere. By default all.
        opacity: Share of the color in the result.

    Returns:
        Images in [0, 1], in float32. Each axis has the larger size of both.

    Raises:
        TypeError: The channels come last, or the shapes do not match.
        ValueError: The images have another number of channels or another dtype, or the opacity is
            outside [0, 1].

    Examples:
        >>> red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
        >>> tint_images(torch.zeros(1, 2, 2), red, opacity=0.5)[:, 0, 0]
        tensor([0.5000, 0.0000, 0.0000])
    """
    where = "viz.tint_images"
    check(where, "opacity", opacity, 0 <= opacity <= 1, "one in [0, 1]")
    valid = fit_valid(where, valid, (*colors.shape[:-3], *colors.shape[-2:]))
    pictures = _pictures(where, images)
    size = [max(a, b) for a, b in zip(pictures.shape[-2:], colors.shape[-2:], strict=True)]

    pictures = _resize(pictures, size)
    tints = _resize(colors.float(), size)
    tinted = (1 - opacity) * pictures.mean(-3, keepdim=True) + opacity * tints
    if valid is None:
        return tinted
    return torch.where(_resize(valid[..., None, :, :], size), tinted, pictures)


# ---- pictures --------------------------------------------------------------------------------


@typed
def plot_matches(
    image1: Shaped[Tensor, "c1 h1 w1"],
    image2: Shaped[Tensor, "c2 h2 w2"],
    points1: Float[Tensor, "n 2"],
    points2: Float[Tensor, "n 2"],
    valid: Bool[Tensor, " n"] | None = None,
    *,
    colors: Float[Tensor, "n 3"] | None = None,
    lines: bool = True,
    axes: Axes | None = None,
) -> Figure:
    """Draw two views side by side, with their matched points in equal colors.

    Look at this picture before you train: a flip or a frame that is wrong is seen at once.

    Args:
        image1: First view, as `crop_views` returns it, of one or three channels: floats in [0, 1],
            or uint8.
        image2: Second view; it is drawn with the height of the first one.
        points1: `(x, y)` in the frame of the first view, in [0, 1].
        points2: The same points in the frame of the second view.
        valid: Pairs to draw; by default all. A pair with a point that is not finite or outside its
            view is left out as well.
        colors: RGB color of each pair; by default its place in the first view (`place_colors`).
        lines: Join the points of each pair.
        axes: Axes to draw both views on; by default those of a new figure. One unit is a pixel of
            the first view.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: The channels come last, or the shapes do not match.
        ValueError: An image has another number of channels, another dtype, or no pixel.

    Examples:
        >>> views = torch.rand(2, 3, 32, 32)
        >>> figure = plot_matches(*views, torch.rand(5, 2), torch.rand(5, 2))
        >>> [len(x.get_offsets()) for x in figure.axes[0].collections[-2:]]
        [5, 5]
    """
    where = "viz.plot_matches"
    pictures = [_pictures(where, image, pixels=True) for image in (image1, image2)]
    (h1, w1), (h2, w2) = [picture.shape[-2:] for picture in pictures]
    wide2 = w2 * h1 / h2
    left2 = w1 * (1 + _GAP)

    # In float64, where the end of an axis lies exactly.
    points1 = points1.detach().double().cpu()
    points2 = points2.detach().double().cpu()
    both = torch.cat([points1, points2], -1)
    drawn = ((both >= 0) & (both <= 1)).all(-1)  # not where one is NaN
    if valid is not None:
        drawn &= valid.cpu()
    chosen = place_colors(points1) if colors is None else colors.detach().float().cpu()
    shown = chosen[drawn].clamp(0, 1).numpy()
    places1 = points1[drawn] * points1.new_tensor([w1, h1])
    places2 = points2[drawn] * points2.new_tensor([wide2, h1]) + points2.new_tensor([left2, 0.0])

    figure, (panel,) = _panels(where, axes, (1, 1), (left2 + wide2) / h1)
    _show(panel, pictures[0], (0, w1, h1, 0))
    _show(panel, pictures[1], (left2, left2 + wide2, h1, 0))
    panel.set(xlim=(0, left2 + wide2), ylim=(h1, 0))
    if lines:
        segments = torch.stack([places1, places2], 1).numpy()
        panel.add_collection(_matplotlib("collections").LineCollection(segments, colors=shown))
    for places in (places1, places2):
        panel.scatter(*places.T.numpy(), s=30, c=shown, edgecolors="black", zorder=3)
    return figure


@typed
def plot_clusters(
    images: Shaped[Tensor, "n c h w"] | Sequence[Shaped[Tensor, "_ _ _"]],
    labels: Integer[Tensor, "n h2 w2"] | Sequence[Integer[Tensor, "_ _"]],
    *,
    ignore: int | None = None,
    opacity: float = 0.6,
    axes: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Draw maps of clusters over their images; a cluster has the same color in all of them.

    Args:
        images: Images of one or three channels: floats in [0, 1], or uint8; or a list of images
            `(c, h, w)` of several sizes.
        labels: Number of the cluster of each cell, of any size (`label_colors`), or a list of such
            maps.
        ignore: A label that is not drawn, such as 255; labels below 0 are not drawn either.
        opacity: Share of the color; 0 shows the gray image.
        axes: One for each image; by default those of a new figure, in one row. One unit is a pixel
            of the image.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: The channels come last, or the shapes do not match.
        ValueError: There is no image, or not one map for each; the images have another number of
            channels, another dtype or no pixel; a map has no cell; the opacity is outside [0, 1];
            or there are not as many axes as images.

    Examples:
        >>> figure = plot_clusters(torch.rand(2, 3, 32, 32), torch.arange(32).view(2, 4, 4))
        >>> len(figure.axes)
        2
    """
    where = "viz.plot_clusters"
    pictures = _several(where, images)
    maps = _maps_of(where, "labels", labels, len(pictures))
    h, w = pictures[0].shape[-2:]
    figure, panels = _panels(where, axes, (1, len(pictures)), w / h)
    for panel, picture, cells in zip(panels, pictures, maps, strict=True):
        h, w = picture.shape[-2:]
        colors = label_colors(cells, ignore=ignore).movedim(-1, 0)
        tinted = tint_images(picture, colors, _is_used(cells, ignore), opacity=opacity)
        _show(panel, tinted, (0, w, h, 0))
    return figure


@typed
def plot_pca(
    features: Float[Tensor, "n d h w"] | Sequence[Float[Tensor, "_ _ _"]],
    *,
    axes: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Draw feature maps as colors: the first three principal components of all maps together.

    All maps have one basis, so a color means the same in each of them. Maps of two networks have
    a common basis only if their channels mean the same, such as before and after a short training.

    Args:
        features: Feature maps, or a list of maps `(d, h, w)` of several sizes. Values that are not
            finite count as 0.
        axes: One for each map; by default those of a new figure, in one row. One unit is a cell.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no map, a map has no cell, they have different numbers of channels, or
            there are not as many axes as maps.

    Examples:
        >>> figure = plot_pca([torch.rand(16, 7, 7), torch.rand(16, 14, 14)])
        >>> [x.images[0].get_array().shape for x in figure.axes]
        [(7, 7, 3), (14, 14, 3)]
    """
    where = "viz.plot_pca"
    maps = [x.detach().cpu() for x in features]
    check(where, "the number of maps", len(maps), len(maps) > 0, "1 or more")
    channels = {len(x) for x in maps}
    check(where, "the number of channels", sorted(channels), len(channels) == 1, "maps of one")
    cells = min(x[0:1].numel() for x in maps)
    check(where, "the number of cells of a map", cells, cells > 0, "maps of 1 or more")

    together = torch.cat([x.float().flatten(1) for x in maps], 1)
    colors = pca_colors(together[None, :, None])[0, :, 0]
    parts = colors.split([x[0].numel() for x in maps], 1)
    h, w = maps[0].shape[-2:]
    figure, panels = _panels(where, axes, (1, len(maps)), w / h)
    for panel, part, x in zip(panels, parts, maps, strict=True):
        h, w = x.shape[-2:]
        _show(panel, part.unflatten(1, (h, w)), (0, w, h, 0))
    return figure


@typed
def plot_affinity(affinity: Float[Tensor, "n m"], *, axes: Axes | None = None) -> Figure:
    """Draw the affinity of two views as a matrix, with a scale of its values.

    For the same patches of both views, in the same order, the diagonal is ideal.

    Args:
        affinity: Affinities as of `affinity_matrix`, rows of the first view by rows of the second,
            or their mean over images. NaN entries stay white.
        axes: Axes to draw on; by default those of a new figure.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The matrix has no entry.

    Examples:
        >>> plot_affinity(torch.eye(4)).axes[0].get_xlabel()
        'patch of view 2'
    """
    where = "viz.plot_affinity"
    shape = tuple(affinity.shape)
    check(where, "the shape of the affinity", shape, affinity.numel() > 0, "one without a 0")
    figure, (panel,) = _panels(where, axes, (1, 1), 1.25)
    n, m = shape
    values = affinity.detach().float().cpu().numpy()
    drawn = panel.imshow(values, vmin=0.0, extent=(0, m, n, 0), interpolation="nearest")
    panel.set(xlabel="patch of view 2", ylabel="patch of view 1")
    panel.figure.colorbar(drawn, ax=panel)
    return figure


@typed
def plot_similarity_iou(
    ious: Sequence[float],
    similarity: Float[Tensor, "*curves k"],
    valid: Bool[Tensor, "*curves k"] | None = None,
    *,
    names: Sequence[str] | None = None,
    axes: Axes | None = None,
) -> Figure:
    """Draw the similarity of boxes and their moved copies against their IoU, a curve or several.

    For a detector a steep curve is good.

    Args:
        ious: The k intersections over union, as given to `similarity_iou_curve`.
        similarity: Mean cosines of one encoder, or of several, which get a curve each.
        valid: Values to draw; by default all. NaN values are not drawn either.
        names: Name of each curve, for the legend.
        axes: Axes to draw on; by default those of a new figure.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: The shapes of `similarity` and `valid` do not match.
        ValueError: There are not as many IoUs as values, or not as many names as curves.

    Examples:
        >>> curves = torch.tensor([[0.2, 0.6, 1.0], [0.8, 0.9, 1.0]])
        >>> figure = plot_similarity_iou((0.1, 0.5, 0.9), curves, names=["DUPR", "MoCo v2"])
        >>> [x.get_label() for x in figure.axes[0].lines]
        ['DUPR', 'MoCo v2']
    """
    where = "viz.plot_similarity_iou"
    *_, count = similarity.shape
    check(where, "the number of IoUs", len(ious), len(ious) == count, f"{count}, one for a value")
    valid = fit_valid(where, valid, similarity.shape)
    values = similarity.detach().double()
    if valid is not None:
        values = torch.where(valid, values, torch.nan)
    curves = values.cpu().reshape(similarity.shape[:-1].numel(), count)
    if names is not None:
        fits = len(names) == len(curves)
        check(where, "the number of names", len(names), fits, f"{len(curves)}, one for a curve")

    figure, (panel,) = _panels(where, axes, (1, 1), 1.25)
    order = sorted(range(count), key=lambda number: ious[number])
    lines = []
    for number, curve in enumerate(curves):
        label = None if names is None else names[number]
        (line,) = panel.plot(
            [ious[i] for i in order], curve[order].numpy(), marker="o", label=label
        )
        lines.append(line)
    panel.set(xlabel="IoU", ylabel="cosine")
    if names:
        _write_legend(panel, lines, names)
    return figure


@typed
def plot_segmentation(
    images: Shaped[Tensor, "n c h w"] | Sequence[Shaped[Tensor, "_ _ _"]],
    labels: Integer[Tensor, "n h2 w2"] | Sequence[Integer[Tensor, "_ _"]],
    predictions: Integer[Tensor, "n h3 w3"] | Sequence[Integer[Tensor, "_ _"]],
    *,
    names: Sequence[str],
    ignore: int | None = None,
    axes: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Draw images, their true classes and the predicted ones side by side, with the class names.

    Args:
        images: Images of one or three channels: floats in [0, 1], or uint8; or a list of images
            `(c, h, w)` of several sizes. Each of them is a row of the figure.
        labels: True class of each pixel, in maps of any size, or a list of such maps.
        predictions: Predicted class of each pixel, likewise.
        names: Names of the classes. The legend lists the classes that occur; a class without a
            name is listed by its number.
        ignore: A true label without a class, such as 255; it is black, as labels below 0 are.
        axes: Three for each image, row by row; by default those of a new figure. One unit is a
            pixel of the image.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: The channels come last, or the shapes do not match.
        ValueError: There is no image, or not one map for each; the images have another number of
            channels, another dtype or no pixel; a map has no cell; or there are not three axes for
            each image.

    Examples:
        >>> truth = torch.tensor([[[0, 0, 1], [0, 2, 2]]])
        >>> figure = plot_segmentation(
        ...     torch.rand(1, 3, 2, 3), truth, truth, names=["sky", "road", "car"])
        >>> [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
        ['sky', 'road', 'car']
    """
    where = "viz.plot_segmentation"
    pictures = _several(where, images)
    truths = _maps_of(where, "labels", labels, len(pictures))
    found = _maps_of(where, "predictions", predictions, len(pictures))

    h, w = pictures[0].shape[-2:]
    figure, panels = _panels(where, axes, (len(pictures), 3), w / h)
    for row, (picture, truth, own) in enumerate(zip(pictures, truths, found, strict=True)):
        h, w = picture.shape[-2:]
        colors = [label_colors(truth, ignore=ignore), label_colors(own)]
        shown = [picture, *[x.movedim(-1, 0) for x in colors]]
        for column, x in enumerate(shown):
            _show(panels[3 * row + column], x, (0, w, h, 0))
    for panel, title in zip(panels, ("image", "truth", "prediction"), strict=False):
        panel.set_title(title)

    used = [truth[_is_used(truth, ignore)] for truth in truths]
    used += [own[own >= 0] for own in found]
    occur = torch.cat([x.unique() for x in used]).unique()
    patches = []
    listed = []
    for label in occur:
        number = int(label)
        patches.append(_matplotlib("patches").Patch(color=label_colors(label).tolist()))
        name = names[number] if number < len(names) else f"class {number}"
        listed.append(name)
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False}
    _write_legend(panels[2], patches, listed, fontsize="small", **place)
    return figure


# ---- helpers ---------------------------------------------------------------------------------


def _matplotlib(module: str) -> Any:
    """Import a module of matplotlib, or say how it is installed."""
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError(
            "densekit.viz: pictures need matplotlib, which is not installed; "
            "`pip install densekit[viz]` installs it."
        ) from error


def _is_used(labels: Tensor, ignore: int | None) -> Tensor:
    """Return where labels are drawn."""
    used = labels >= 0
    return used if ignore is None else used & (labels != ignore)


def _several(where: str, images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Convert images of any sizes to RGB in [0, 1], in float32, on the CPU."""
    check(where, "the number of images", len(images), len(images) > 0, "1 or more")
    return [_pictures(where, image, pixels=True) for image in images]


def _maps_of(where: str, name: str, maps: Tensor | Sequence[Tensor], images: int) -> list[Tensor]:
    """Return maps of labels, one for each image, on the CPU."""
    check(where, f"the number of maps in {name}", len(maps), len(maps) == images, f"{images}")
    for x in maps:
        shape = tuple(x.shape)
        check(where, f"the shape of a map in {name}", shape, x.numel() > 0, "one without a 0")
    return [x.detach().cpu().long() for x in maps]  # torch compares no uint16


def _pictures(where: str, images: Tensor, *, pixels: bool = False) -> Tensor:
    """Convert images to RGB in [0, 1], in float32; with `pixels` on the CPU, where some exist."""
    refuse_channels_last(where, "images", images)
    channels = images.shape[-3]
    check(where, "the number of channels", channels, channels in (1, 3), "images of 1 or 3")
    known = images.is_floating_point() or images.dtype == torch.uint8
    check(where, "the dtype of the images", images.dtype, known, "floats in [0, 1] or uint8")
    if pixels:
        shape = tuple(images.shape)
        check(where, "the shape of an image", shape, images.numel() > 0, "one without a 0")
        images = images.detach().cpu()

    scale = 255 if images.dtype == torch.uint8 else 1
    values = (images.float() / scale).nan_to_num(0.0).clamp(0.0, 1.0)
    return values.expand(*values.shape[:-3], 3, *values.shape[-2:])


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Enlarge maps (..., h, w): each pixel has the value of the cell that its center lies in."""
    for axis, wanted in zip((-2, -1), size, strict=True):
        cells = maps.shape[axis]
        if cells != wanted:
            centers = torch.arange(wanted, device=maps.device) * 2 + 1  # twice their place
            maps = maps.index_select(axis, centers * cells // (2 * wanted))
    return maps


def _panels(where: str, axes: Any, shape: tuple[int, int], aspect: float) -> tuple[Any, list[Any]]:
    """Return the figure and its axes: those given, or new ones for panels of this aspect."""
    rows, columns = shape
    if axes is None:
        size = (columns * max(1.0, _PANEL * aspect) + 0.5, rows * _PANEL + 0.5)
        figure = _matplotlib("figure").Figure(figsize=size, layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False).flat)

    _matplotlib("figure")
    given = [axes] if hasattr(axes, "imshow") else list(_flat(axes))
    wanted = rows * columns
    check(where, "the number of axes", len(given), len(given) == wanted, f"{wanted} of them")
    return given[0].figure, given


def _flat(axes: Any) -> Iterator[Any]:
    """Yield the axes of a list, of a list of lists, or of what `Figure.subplots` returns."""
    for item in axes:
        if hasattr(item, "imshow"):
            yield item
        else:
            yield from _flat(item)


def _write_legend(panel: Any, handles: list[Any], names: Sequence[str], **options: Any) -> None:
    """Add a legend of any names: matplotlib leaves out `_name`, and takes `$` for mathematics."""
    legend = panel.legend(handles, [str(number) for number in range(len(handles))], **options)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
        text.set_parse_math(False)


def _show(panel: Any, picture: Tensor, extent: tuple[float, float, float, float]) -> None:
    """Draw one picture (3, h, w) within an extent, without ticks and frame."""
    pixels = picture.movedim(0, -1).numpy()
    panel.imshow(pixels, extent=extent, interpolation="nearest")
    panel.set(xticks=[], yticks=[], frame_on=False)
