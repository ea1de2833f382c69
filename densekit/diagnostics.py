"""Measures of a model without labels: affinity, similarity against IoU, coupling, health."""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from densekit.boxes import sample_boxes_at_iou
from densekit.k_means import kmeans, kmeans_plus_plus
from densekit.numerics import (
    check,
    check_temperature,
    full_precision,
    has_spread,
    in_range,
    l2_normalize,
    map_to_rows,
    masked_mean,
    readable,
    refuse_channels_last,
    refuse_maps,
    rows_to_map,
    safe_divide,
    sample_uniform,
    take_rows,
    widened,
)
from densekit.pooling import roi_align
from densekit.sampling import grid_points
from densekit.typing import Bool, Float, Scalar, Size, Tensor, typed

__all__ = [
    "CouplingImages",
    "DenseStructure",
    "LayerBias",
    "SimilarityCurve",
    "affinity_matrix",
    "coupling_images",
    "coupling_rate",
    "dense_structure_score",
    "effective_rank",
    "layer_bias",
    "layer_features",
    "mean_cosine_similarity",
    "norm_outliers",
    "off_diagonal_cosine",
    "pca_colors",
    "position_share",
    "similarity_iou_curve",
]

_IMAGES = 256  # of which the dimension is measured together: it depends on their number


class SimilarityCurve(NamedTuple):
    """The similarity of boxes and their moved copies, at several IoUs.

    Attributes:
        similarity: Mean cosine at each IoU.
        valid: True where at least one moved copy was inside the map.
    """

    similarity: Float[Tensor, " k"]
    valid: Bool[Tensor, " k"]


class CouplingImages(NamedTuple):
    """Images that measure how much one object's features depend on a neighboring object.

    Attributes:
        together: Object A, and object B to its right, on black.
        alone: A alone, at the same position.
        box_a: Box of A in the frame of the image, in [0, 1].
        box_b: Box of B in the same frame.
    """

    together: Float[Tensor, "*batch c tall wide"]
    alone: Float[Tensor, "*batch c tall wide"]
    box_a: Float[Tensor, "*batch 4"]
    box_b: Float[Tensor, "*batch 4"]


class LayerBias(NamedTuple):
    """The influence of neighboring objects and of the position on the features of each layer.

    Attributes:
        coupling_rate: Influence of a neighboring object; 1 means none.
        mean_cosine: Similarity of the features at nine positions; 1 means that they are equal.
    """

    coupling_rate: Float[Tensor, " layers"]
    mean_cosine: Float[Tensor, " layers"]


class DenseStructure(NamedTuple):
    """How well dense features fall into clusters, and how many dimensions they use.

    Attributes:
        inter: Mean distance of a token to the nearest centroid of another cluster, in units of the
            tokens' mean distance to their mean.
        intra: Mean radius of the clusters, in the same unit.
        dimension: Effective rank of the tokens of different images, divided by the largest possible
            one.
        score: `inter - intra + dimension`; more is better.
    """

    inter: Float[Tensor, ""]
    intra: Float[Tensor, ""]
    dimension: Float[Tensor, ""]
    score: Float[Tensor, ""]


@typed
def affinity_matrix(
    features1: Float[Tensor, "*batch n d"],
    features2: Float[Tensor, "*batch m d"],
    *,
    temperature: Scalar = 0.001,
) -> Float[Tensor, "*batch n m"]:
    r"""Measure how well each row of one view is found in the other view.

    With the rows $f_i$ of the first and $g_j$ of the second view,

    $$
    A_{ij} = \frac{\exp(\cos(f_i, g_j) / t)}{\sum_k \exp(\cos(f_k, g_j) / t)} .
    $$

    For the same patches of two views, in the same order, the identity is ideal.

    Args:
        features1: Rows of the first view, such as the patches of `patch_pairs`.
        features2: Rows of the second view.
        temperature: Divisor of the cosine; a smaller one gives a harder choice.

    Returns:
        Shares, in at least float32: each column sums to 1 over the rows.

    Raises:
        TypeError: The shapes do not match.
        ValueError: The temperature is not positive.

    Examples:
        >>> affinity_matrix(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), temperature=1.0)
        tensor([[0.2689, 0.7311],
                [0.7311, 0.2689]])

    References:
        DUPR, Eq 9, Fig 9.
    """
    check_temperature("diagnostics.affinity_matrix", temperature)
    with full_precision(features1):
        rows1 = l2_normalize(features1)
        rows2 = l2_normalize(features2)
        dtype = torch.promote_types(rows1.dtype, rows2.dtype)
        similarity = rows1.to(dtype) @ rows2.mT.to(dtype)
    return (similarity / in_range(temperature, similarity.dtype)).softmax(-2)


@typed
def similarity_iou_curve(
    features: Float[Tensor, "*batch d h w"],
    boxes: Float[Tensor, "*batch n 4"],
    valid: Bool[Tensor, "*batch n"] | None = None,
    *,
    ious: Sequence[float],
    size: int = 7,
    generator: torch.Generator | None = None,
) -> SimilarityCurve:
    """Measure how the similarity of a box and its moved copy decreases with their overlap.

    Both boxes are pooled to S x S bins, and the cosine is averaged over the bins. For a detector a
    steep curve is good: near 1 for boxes that overlap much, and low for boxes that overlap little.
    A moved copy that leaves the map is ignored. This happens to large boxes, so the averages at
    different IoUs are over different boxes.

    Args:
        features: Feature maps.
        boxes: Boxes `(x1, y1, x2, y2)` in the maps' frame, in [0, 1], such as those of objects.
        valid: Boxes to use; by default all.
        ious: The k intersections over union at which to measure, each in [0, 1].
        size: Bins S of the pooled boxes along each axis.
        generator: Source of the random moves, on the boxes' device.

    Returns:
        Mean cosine at each IoU, in at least float32, and whether any box was measured.

    Raises:
        TypeError: The shapes do not match.
        ValueError: An IoU is outside [0, 1], or as in `roi_align`.

    Examples:
        >>> boxes = torch.tensor([[0.2, 0.2, 0.6, 0.6]])
        >>> curve = similarity_iou_curve(torch.rand(8, 16, 16), boxes, ious=(0.5, 1.0))
        >>> curve.similarity[1].round(decimals=3)
        tensor(1.)

    References:
        DUPR, Eq 8, Fig 5.
    """
    query = roi_align(features, boxes, size, valid)
    similarities = []
    found = []

    for iou in ious:
        moved = sample_boxes_at_iou(boxes, iou, generator=generator)
        inside = ((moved >= -1e-4) & (moved <= 1 + 1e-4)).all(-1)
        key = roi_align(features, moved, size, query.valid & inside)
        query_rows = l2_normalize(query.features.movedim(-3, -1))
        key_rows = l2_normalize(key.features.movedim(-3, -1))
        cosine = (query_rows * key_rows).sum(-1).mean((-2, -1))
        similarities.append(masked_mean(cosine, key.valid))
        found.append(key.valid.any())

    if not found:
        return SimilarityCurve(widened(features).new_zeros(0), query.valid.new_zeros(0))
    return SimilarityCurve(torch.stack(similarities), torch.stack(found))


@typed
def layer_features(
    model: torch.nn.Module,
    images: Float[Tensor, "b c h w"],
    layers: Sequence[str],
    *,
    patch: int | None = None,
) -> dict[str, Float[Tensor, "b _ _ _"]]:
    """Record the feature maps of named layers of any model in one forward pass, by hooks.

    The function does not change the model's mode and does not stop gradients: to measure, call
    `model.eval()` and use `torch.no_grad()`. It removes its hooks, also after an error.

    Args:
        model: The model; it is called with the images alone.
        images: Input of the model.
        layers: Names of modules as in `model.named_modules()`, such as `"layer3"`. If a module runs
            more than once, its last output is recorded.
        patch: Side of a ViT's patches in pixels, for layers whose output is tokens `(b, n, d)`. The
            tokens become the map of h / patch by w / patch cells, without the tokens in front
            (class, registers).

    Returns:
        The maps by name, in the order of `layers`.

    Raises:
        TypeError: The channels of the images come last.
        ValueError: A layer does not exist or did not run, its output is neither a map nor tokens of
            such patches, or `patch` is below 1 or larger than a side of the images.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 2, 2))
        >>> maps = layer_features(model, torch.rand(1, 3, 4, 4), ["0", "1"])
        >>> [x.shape for x in maps.values()]
        [torch.Size([1, 8, 4, 4]), torch.Size([1, 4, 2, 2])]

    References:
        D3SSL, Fig 3b and 4b (its measures of each layer).
    """
    refuse_channels_last("diagnostics.layer_features", "images", images)
    known = dict(model.named_modules())
    caught = {}
    if unknown := [name for name in layers if name not in known]:
        near = difflib.get_close_matches(unknown[0], filter(None, known), cutoff=0.0)
        raise ValueError(
            f"densekit.diagnostics.layer_features: there is no layer {unknown[0]!r}; give names of "
            f"model.named_modules(), such as {', '.join(map(repr, near))}."
        )

    sides = images.shape[-2:]
    fits = patch is None or 1 <= patch <= min(sides)
    check("diagnostics.layer_features", "patch", patch, fits, f"1 to {min(sides)}")
    grid = None if patch is None else (sides[0] // patch, sides[1] // patch)

    def catch(name: str):
        return lambda module, given, output: caught.update({name: _as_map(output, name, grid)})

    hooks = [known[name].register_forward_hook(catch(name)) for name in layers]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()

    if missing := [name for name in layers if name not in caught]:
        raise ValueError(
            f"densekit.diagnostics.layer_features: the layer {missing[0]!r} did not run; give one "
            "that the model's forward calls (hooks see no layer of a compiled model)."
        )
    return {name: caught[name] for name in layers}


@typed
def coupling_images(
    objects_a: Float[Tensor, "*batch c h w"], objects_b: Float[Tensor, "*batch c h w"]
) -> CouplingImages:
    """Compose images of two objects side by side, and of the first one alone, for `coupling_rate`.

    Each object has a margin of a quarter of its size on all sides, except towards the other object,
    which it touches.

    Args:
        objects_a: Pictures of objects A.
        objects_b: Pictures of objects B, of another class and the same size.

    Returns:
        Images of `3 h / 2` by `5 w / 2` pixels, which are black (0) elsewhere, and the boxes of A
        and B.

    Raises:
        TypeError: The shapes differ, or the channels come last.

    Examples:
        >>> coupling_images(torch.rand(3, 64, 64), torch.rand(3, 64, 64)).together.shape
        torch.Size([3, 96, 160])

    References:
        D3SSL, Sec 3.1, Fig 3a.
    """
    refuse_channels_last("diagnostics.coupling_images", "objects_a", objects_a)
    h, w = objects_a.shape[-2:]
    top = h // 4
    left = w // 4
    border = (left, w // 2 - left, top, h // 2 - top)
    both = torch.cat([objects_a, objects_b], -1)
    only_a = torch.cat([objects_a, torch.zeros_like(objects_b)], -1)
    together = torch.nn.functional.pad(both, border)
    alone = torch.nn.functional.pad(only_a, border)

    height, width = together.shape[-2:]
    boxes = together.new_tensor(
        [[left, top, left + w, top + h], [left + w, top, left + 2 * w, top + h]]
    )
    boxes = boxes / boxes.new_tensor([width, height, width, height])
    box_a, box_b = boxes.expand(*together.shape[:-3], 2, 4).unbind(-2)
    return CouplingImages(together, alone, box_a, box_b)


@typed
def coupling_rate(
    together: Float[Tensor, "*batch d h w"],
    alone: Float[Tensor, "*batch d h w"],
    box_a: Float[Tensor, "*batch 4"],
    box_b: Float[Tensor, "*batch 4"],
) -> Float[Tensor, "*batch"]:
    r"""Compute the coupling rate of a layer: the influence of a neighbor on an object's features.

    $$
    CR = \frac{\cos(A_1, B)}{\cos(A_2, B)} ,
    $$

    where $A_1$ and $B$ are pooled from the image with both objects, and $A_2$ from the image with A
    alone. A rate above 1 means that the features of A contain B; 1 is ideal. Average over many
    pairs of objects.

    Args:
        together: Feature maps of images that contain A and B, such as those of `coupling_images`.
        alone: Feature maps of the images that contain A alone, at the same position.
        box_a: Box of A in the maps' frame, in [0, 1].
        box_b: Box of B in the same frame.

    Returns:
        The rate of each pair of objects, in at least float32. It has no meaning where the cosine
        `cos(A2, B)` is near zero, and is 0 where it is zero.

    Raises:
        TypeError: The shapes differ.

    Examples:
        >>> maps, left = torch.rand(8, 4, 4), torch.tensor([0.0, 0.0, 0.5, 1.0])
        >>> coupling_rate(maps, maps, left, 1 - left[[2, 3, 0, 1]]).round(decimals=3)
        tensor(1.)

    References:
        D3SSL, Sec 3.1, Fig 3, Table 7.
    """
    return safe_divide(*_cosines_with_neighbor(together, alone, box_a, box_b))


def _cosines_with_neighbor(
    together: Tensor, alone: Tensor, box_a: Tensor, box_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute cos(A1, B) and cos(A2, B); 0 where one of them has no features."""
    pooled = []
    for features, box in ((together, box_a), (alone, box_a), (together, box_b)):
        roi = roi_align(features, box[..., None, :], 1, sampling_ratio=0).features
        pooled.append(l2_normalize(roi.flatten(-4)))

    first, second, other = pooled
    return (first * other).sum(-1), (second * other).sum(-1)


@typed
def mean_cosine_similarity(features: Float[Tensor, "*batch d h w"]) -> Float[Tensor, "*batch"]:
    """Measure the positional bias of a layer: the similarity of features at nine positions.

    Repeat an image in a 3 x 3 grid (`images.repeat(1, 1, 3, 3)`) and encode it. The function pools
    the nine thirds of the map and compares the central one with the eight others. 1 is ideal: the
    nine pictures are identical, and only the border of the image (zero padding) can make their
    features differ. This needs pictures of whole cells, whose sides are a multiple of the layer's
    stride in pixels; other pictures lie differently on the cells.

    Args:
        features: Feature maps of images that contain the same picture nine times.

    Returns:
        Mean cosine of the central third and the eight others, in at least float32.

    Raises:
        ValueError: The map has no cell.

    Examples:
        >>> mean_cosine_similarity(torch.rand(8, 4, 4).repeat(1, 3, 3)).round(decimals=3)
        tensor(1.)

    References:
        D3SSL, Sec 3.2, Fig 4, Table 7.
    """
    return _cosines_of_center(features)[0]


def _cosines_of_center(features: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean cosine of the central third and the others, and that of it with itself.

    The second one is 1, or 0 where the central third has no features.
    """
    centers = grid_points(widened(features).new_tensor([0.0, 0.0, 1.0, 1.0]), 3)
    boxes = torch.cat([centers - 1 / 6, centers + 1 / 6], -1)
    nine = roi_align(features, boxes.expand(*features.shape[:-3], 9, 4), 1, sampling_ratio=0)
    rows = l2_normalize(nine.features.flatten(-3))
    cosine = (rows * rows[..., 4:5, :]).sum(-1)
    return (cosine.sum(-1) - cosine[..., 4]) / 8, cosine[..., 4]


@typed
def layer_bias(
    model: torch.nn.Module,
    objects: Float[Tensor, "n c h w"],
    layers: Sequence[str],
    neighbors: Float[Tensor, "n c h w"] | None = None,
    *,
    patch: int | None = None,
    chunk: int = 64,
) -> LayerBias:
    """Measure the coupling rate and the positional bias of each layer, over pictures of objects.

    The neighbor of each object is the next object, unless `neighbors` are given. The model must be
    in evaluation mode and normalize its input itself, so that 0 is black: use
    `torch.nn.Sequential(normalize, encoder)`, with layer names such as `"1.layer4"`.

    Args:
        model: The model; it is called with images alone.
        objects: Pictures of objects, cut out and resized. The images that are composed of them are
            three times as large, so use about a third of the training size. The sides should be a
            multiple of the stride of the deepest layer; otherwise the nine pictures lie differently
            on its cells.
        layers: Names of modules, as in `layer_features`.
        neighbors: The object B beside each object, which should be of another class.
        patch: Side of a ViT's patches in pixels, as in `layer_features`.
        chunk: Number of objects that are measured at a time, which bounds the memory.

    Returns:
        The means over the objects, one number for each layer. Where an object, or its neighbor, has
        no features in a layer (all are 0), it does not count; without any that count the mean is 0.

    Raises:
        TypeError: The channels of the objects come last.
        ValueError: There are fewer than two objects, the chunk is below 1, or as in
            `layer_features`.

    Examples:
        >>> bias = layer_bias(torch.nn.Identity(), torch.rand(4, 3, 8, 8), [""])
        >>> bias.coupling_rate.round(decimals=3), bias.mean_cosine.round(decimals=3)
        (tensor([1.]), tensor([1.]))

    References:
        D3SSL, Sec 3, Fig 3 and 4, Table 7.
    """
    count = len(objects)
    check("diagnostics.layer_bias", "the number of objects", count, count >= 2, "2 or more")
    check("diagnostics.layer_bias", "chunk", chunk, chunk >= 1, "1 or more")

    others = objects.roll(1, 0) if neighbors is None else neighbors
    parts = []  # of each chunk: cos(A1, B), cos(A2, B), and those of nine places, (layers, n)
    for own, other in zip(objects.split(chunk), others.split(chunk), strict=True):
        made = coupling_images(own, other)
        together = layer_features(model, made.together, layers, patch=patch).values()
        alone = layer_features(model, made.alone, layers, patch=patch).values()
        nine = layer_features(model, own.repeat(1, 1, 3, 3), layers, patch=patch).values()

        of_layers = []
        for both, single, repeated in zip(together, alone, nine, strict=True):
            with_neighbor = _cosines_with_neighbor(both, single, made.box_a, made.box_b)
            of_layers.append(torch.stack([*with_neighbor, *_cosines_of_center(repeated)]))
        parts.append(torch.stack(of_layers, 1))

    coupled, free, cosine, center = torch.cat(parts, -1)
    rates = _mean_where(free != 0, safe_divide(coupled, free))
    return LayerBias(rates, _mean_where(center != 0, cosine))


def _mean_where(counted: Tensor, values: Tensor) -> Tensor:
    """Average the last axis over what counts; 0 without any."""
    return torch.where(counted, values, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)


@typed
def effective_rank(
    rows: Float[Tensor, "*batch n d"], *, centered: bool = True
) -> Float[Tensor, "*batch"]:
    r"""Compute how many dimensions the rows use: the exponential of an entropy.

    Channels come last: the n rows of a set, such as tokens, are (..., n, d). For maps use
    `map_to_rows`. With the singular values $s_i$ of the rows about their mean and their shares
    $p_i = s_i / \sum_j s_j$, the rank is $\exp(-\sum_i p_i \log p_i)$. It is 1 if all rows lie on a
    line, and d if all directions are used alike. A rank that falls during training shows a collapse
    of dimensions. It depends on the number of rows, so compare it for the same number.

    Args:
        rows: n rows in each set.
        centered: Subtract the mean of the rows first.

    Returns:
        The rank in [1, min(n, d)], in at least float32, computed in float64. Sets without any
        spread but rounding errors have rank 1, and sets with a number that is not finite have NaN.
        Singular values that are rounding errors count as 0.

    Raises:
        TypeError: The rows look like maps.

    Examples:
        >>> effective_rank(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        tensor(2.)

    References:
        Roy and Vetterli, The effective rank: a measure of effective dimensionality, Def 1.
    """
    refuse_maps("diagnostics.effective_rank", "rows", rows)
    is_finite = rows.isfinite().all(-1).all(-1)  # else there are no singular values
    x = torch.where(is_finite[..., None, None], rows.double(), 0.0)
    if centered:
        x = x - x[..., :1, :].detach()  # equal rows become exactly zero
        x = x - x.sum(-2, keepdim=True) / max(1, x.shape[-2])
        x = torch.where(has_spread(x, rows)[..., None, None], x, 0.0)

    values = torch.linalg.svdvals(x) if rows.dtype == x.dtype else _quick_singular_values(x)
    rank = torch.where(is_finite, _entropy_rank(values, max(x.shape[-2:])), torch.nan)
    return rank.to(widened(rows[..., :0]).dtype)


def _quick_singular_values(rows: Tensor) -> Tensor:
    """Compute singular values by eigenvalues, five times as fast.

    In float64 their error is 1e-8 of the largest one: less than the rounding of float32 rows.
    """
    is_tall = rows.shape[-2] > rows.shape[-1]
    gram = rows.mT @ rows if is_tall else rows @ rows.mT  # the smaller one
    squares = torch.linalg.eigvalsh(gram)
    noise = torch.finfo(squares.dtype).eps * max(rows.shape[-2:])
    used = squares > noise * squares.detach()[..., -1:]
    return torch.where(used, torch.where(used, squares, 1.0).sqrt(), 0.0)


def _entropy_rank(values: Tensor, side: int) -> Tensor:
    """Compute the effective rank of singular values; `side` is the longer one of the matrix."""
    share = safe_divide(values, values.sum(-1, keepdim=True))
    used = share > torch.finfo(values.dtype).eps * side
    share = torch.where(used, share, 1.0)  # whose logarithm is 0
    return (-(share * share.log()).sum(-1)).exp()


@typed
def off_diagonal_cosine(rows: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch"]:
    r"""Compute the mean cosine of all pairs of different rows of a set.

    Channels come last: the n rows of a set, such as tokens, are (..., n, d). For maps use
    `map_to_rows`. It is computed as $(|\sum_i u_i|^2 - n) / (n (n - 1))$ from the rows $u_i$ of
    length one, without an array of pairs. It is 1 if all rows have one direction, as after a
    collapse, and never below $-1 / (n - 1)$.

    Args:
        rows: n rows in each set.

    Returns:
        The mean cosine, in at least float32, computed in float64; 0 for fewer than two rows. The
        cosines of a zero row are 0.

    Raises:
        TypeError: The rows look like maps.

    Examples:
        >>> off_diagonal_cosine(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]]))
        tensor(0.3333)
    """
    refuse_maps("diagnostics.off_diagonal_cosine", "rows", rows)
    n = rows.shape[-2]
    unit = l2_normalize(rows.double())
    pairs = unit.sum(-2).square().sum(-1) - unit.square().sum((-2, -1))
    return (pairs / max(1, n * (n - 1))).to(widened(rows[..., :0]).dtype)


@typed
def position_share(
    features: Float[Tensor, "n d h w"], *, adjusted: bool = True
) -> Float[Tensor, ""]:
    r"""Measure how much of the features' variance their position in the image explains.

    With the mean over the images $m_p$ of position p and the mean $m$ of all, the share is

    $$
    \frac{\sum (m_p - m)^2}{\sum (f - m)^2} ,
    $$

    both sums over all tokens: the $R^2$ of an analysis of variance. Photographs have the sky above,
    so use random crops and flips, and compare two models on the same ones. A share that rises means
    that features encode their place instead of the content.

    Args:
        features: Feature maps of different images.
        adjusted: Correct for the number of images, as the adjusted R^2 does: features without an
            effect of their position then give 0 on average. It may be below 0.

    Returns:
        The share, in at least float32, computed in float64: 1 if all images have the same maps, 0
        for features without any variance but rounding errors. With one image it is 0 if adjusted,
        since nothing is known.

    Examples:
        >>> place = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> position_share(place.expand(4, 1, 2, 2))
        tensor(1.)
    """
    rows = map_to_rows(features.double())
    images, positions, _ = rows.shape
    rows = rows - rows[:1, :1].detach()  # equal features become exactly zero
    mean = rows.sum((0, 1)) / max(1, images * positions)
    of_position = rows.sum(0) / max(1, images)
    total = (rows - mean).square().sum()
    total = torch.where(has_spread((rows - mean).flatten(0, 1), features.flatten(1)), total, 0.0)
    rest = (rows - of_position).square().sum()
    share = safe_divide(total - rest, total)
    if adjusted:
        tokens = images * positions
        freedom = (tokens - 1) / max(1, tokens - positions)
        share = 1 - freedom * safe_divide(rest, total) if images > 1 else 0.0 * share
        share = torch.where(total == 0, 0.0, share)
    return share.to(widened(features[:0]).dtype)


@typed
def norm_outliers(features: Float[Tensor, "n d h w"], *, factor: float = 3.0) -> Float[Tensor, ""]:
    """Compute the share of tokens whose norm is above `factor` times the median norm.

    Such tokens, mostly on plain background, hold global information in large vision transformers;
    they spoil dense features. Measure the output of the last block before the final norm, which
    hides them (`layer_features`).

    Args:
        features: Feature maps before the final norm.
        factor: Multiple of the median norm of all tokens of all maps.

    Returns:
        The share in [0, 1], in at least float32; norms are computed in float64. It is 0 without
        tokens.

    Raises:
        ValueError: The factor is not above 0.

    Examples:
        >>> features = torch.ones(1, 1, 2, 5)
        >>> features[0, 0, 0, 0] = 100
        >>> norm_outliers(features)
        tensor(0.1000)

    References:
        Darcet et al. 2023, Vision Transformers Need Registers, Sec 2.1 (which cut at a fixed norm).
    """
    check("diagnostics.norm_outliers", "factor", factor, factor > 0, "one above 0")
    norms = torch.linalg.vector_norm(map_to_rows(features.double()), dim=-1).flatten()
    ranked = norms.sort().values
    count = len(norms)
    median = (ranked[(count - 1) // 2 : count // 2 + 1]).mean() if count else norms.sum()
    share = (norms > factor * median).double().sum() / max(1, count)
    return share.to(widened(features[:0]).dtype)


@typed
def dense_structure_score(
    features: Float[Tensor, "n d h w"],
    *,
    local_clusters: int = 3,
    global_clusters: int = 24,
    group: int = 8,
    generator: torch.Generator | None = None,
) -> DenseStructure:
    """Compute the dense structure score: features in tight, distant clusters, of many dimensions.

    The tokens are scaled to length one. k-means finds clusters in each image and in each group of
    images. `inter` is the mean distance of a token to the nearest other centroid of its group;
    `intra` is the mean of the clusters' radii, averaged over images and over groups, where the
    radius of N members is the sum of the singular values of the centered members, divided by
    `sqrt(max(N - 1, d))`. Both are in units of the tokens' mean distance to their mean. `dimension`
    is the effective rank (not centered) of one random token of each image, divided by the smaller
    one of the number of images and d, averaged over as many draws as there are tokens in an image.

    Compare checkpoints of one run, on the same images: the score does not compare architectures.
    k-means is random, so average the score over a few seeds. The dimension is measured on 256
    images together, since it depends on their number; the paper used 1,024. Further images that
    make no 256 are left out of it.

    Args:
        features: Feature maps of the last layer, of different images; the paper uses 2,048 of them.
            Values that are not finite count as 0.
        local_clusters: Clusters in each image.
        global_clusters: Clusters in each group of images.
        group: Images in a group; the last group may have fewer.
        generator: Source of the random numbers, on the features' device.

    Returns:
        The parts and the score `inter - intra + dimension`, in at least float32; no gradient flows.

    Raises:
        ValueError: A number of clusters, or of images in a group, is below 1, or there is no token.

    Examples:
        >>> structure = dense_structure_score(torch.rand(16, 8, 7, 7))
        >>> [x.shape for x in structure]
        [torch.Size([]), torch.Size([]), torch.Size([]), torch.Size([])]

    References:
        DSE (arXiv 2510.17299).
    """
    where = "diagnostics.dense_structure_score"
    given = {"local_clusters": local_clusters, "global_clusters": global_clusters, "group": group}
    for name, number in given.items():
        check(where, name, number, number >= 1, "1 or more")
    n, _, h, w = features.shape
    check(where, "the number of tokens", n * h * w, n * h * w > 0, "1 or more")

    rows = l2_normalize(map_to_rows(features.detach()))
    rows = torch.where(rows.isfinite(), rows, 0.0)
    local = _clusters(rows, local_clusters, generator)
    intra_image = _radius(rows, local, local_clusters)
    radii = []
    distances = []
    for images in rows.split(group):
        tokens = images.flatten(0, 1)
        labels = _clusters(tokens, global_clusters, generator)
        radii.append(_radius(tokens, labels, global_clusters))
        distances.append(_separation(tokens, labels, global_clusters))

    scale = _token_scale(rows)
    inter = safe_divide(torch.cat(distances).mean(), scale)
    intra = safe_divide((intra_image.mean() + torch.stack(radii).mean()) / 2, scale)
    order = sample_uniform(rows.shape[:2], rows, generator=generator).argsort(-1)
    dimension = _dimension(rows, order)
    return DenseStructure(inter, intra, dimension, inter - intra + dimension)


def _clusters(tokens: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Return the clusters of tokens that k-means finds."""
    start = kmeans_plus_plus(tokens, count, generator=generator)
    return kmeans(tokens, start).labels


def _token_scale(tokens: Tensor) -> Tensor:
    """Compute the mean distance of all tokens to their mean; 0 if all are equal."""
    tokens = tokens.flatten(0, -2)
    centered = tokens - tokens.mean(0)
    distance = torch.linalg.vector_norm(centered, dim=-1).mean()
    return torch.where(has_spread(centered, tokens), distance, 0.0)


def _radius(tokens: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Compute the mean radius of the clusters of each set that have two or more members."""
    own = labels[..., None] == torch.arange(clusters, device=labels.device)
    count = own.sum(-2)
    rank = (own.cumsum(-2) - 1).gather(-1, labels[..., None])
    # The members of each cluster, one behind the other, with zeros behind them.
    most = int(count.max()) if readable(labels) else tokens.shape[-2]
    place = (labels[..., None] * most + rank).expand(tokens.shape)
    members = tokens.new_zeros(*tokens.shape[:-2], clusters * most, tokens.shape[-1])
    members = members.scatter(-2, place, tokens).unflatten(-2, (clusters, most))
    used = (torch.arange(most, device=labels.device) < count[..., None])[..., None]

    mean = members.sum(-2, keepdim=True) / count.clamp(min=1)[..., None, None]
    with full_precision(tokens):
        values = torch.linalg.svdvals(torch.where(used, members - mean, 0.0))
    freedom = (count - 1).clamp(min=max(1, tokens.shape[-1])).to(values)
    large = count > 1
    radius = torch.where(large, values.sum(-1) / freedom.sqrt(), 0.0)
    return safe_divide(radius.sum(-1), large.sum(-1).to(radius))


def _separation(tokens: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Compute the distance of each token to the nearest centroid of another cluster; 0 without."""
    own = labels[..., None] == torch.arange(clusters, device=labels.device)
    count = own.sum(-2)
    with full_precision(tokens):
        total = own.to(tokens.dtype).mT @ tokens
    centers = total / count.clamp(min=1)[..., None]
    distance = torch.cdist(tokens, centers, compute_mode="donot_use_mm_for_euclid_dist")
    distance = torch.where(own | (count == 0)[..., None, :], torch.inf, distance)
    nearest = distance.amin(-1)
    return torch.where(nearest.isfinite(), nearest, 0.0)


def _dimension(tokens: Tensor, order: Tensor) -> Tensor:
    """Compute the relative effective rank of one token of each image (n, p, d), the mean over p.

    The order says which token of an image each of the p draws takes.
    """
    shuffled = take_rows(tokens, order)
    parts = [part for part in shuffled.split(_IMAGES) if len(part) == min(_IMAGES, len(tokens))]
    ranks = []
    for part in parts:
        with full_precision(part):
            values = torch.linalg.svdvals(part.movedim(1, 0))
        n, _, d = part.shape
        ranks.append(_entropy_rank(values, max(n, d)).mean() / min(n, d))
    return torch.stack(ranks).mean()


@typed
def pca_colors(features: Float[Tensor, "n d h w"]) -> Float[Tensor, "n 3 h w"]:
    """Show feature maps as colors: their first three principal components.

    The components are computed over all cells of all maps, so a color means the same in every map.
    Each component is scaled to [0, 1].

    Args:
        features: Feature maps; values that are not finite count as 0.

    Returns:
        Color maps in [0, 1], in float32. Components that do not exist (fewer than three channels or
        cells) are zero.

    Examples:
        >>> pca_colors(torch.rand(2, 16, 7, 7)).shape
        torch.Size([2, 3, 7, 7])

    References:
        Oquab et al. 2023 (DINOv2), Fig 1.
    """
    n, _, h, w = features.shape
    tokens = map_to_rows(features.float()).flatten(0, 1)
    tokens = torch.where(tokens.isfinite(), tokens, 0.0)
    if tokens.numel():
        largest = tokens.abs().amax()
        tokens = tokens / torch.where(largest > 0, largest, 1.0)  # their squares stay finite
    tokens = tokens - tokens.mean(0)
    with full_precision(tokens):
        axes = torch.linalg.eigh(tokens.mT @ tokens).eigenvectors[:, -3:].flip(-1)
        colors = torch.nn.functional.pad(tokens @ axes, (0, 3 - axes.shape[1]))

    if len(tokens):
        colors = colors - colors.amin(0)
        spread = colors.amax(0)
        exists = spread > 1e-5 * spread.amax().clamp(min=1e-6)  # smaller values are rounding noise
        colors = colors / torch.where(exists, spread, torch.inf)
    return rows_to_map(colors.unflatten(0, (n, h * w)), (h, w))


def _as_map(output: object, name: str, grid: Size | None) -> Tensor:
    """Convert a layer's output to feature maps, in a copy that later layers cannot change."""
    if isinstance(output, Tensor) and output.ndim == 4:
        return output.clone()
    if isinstance(output, Tensor) and output.ndim == 3 and grid:
        front = output.shape[1] - grid[0] * grid[1]
        if front >= 0:
            return rows_to_map(output[:, front:], grid).contiguous()

    what = f"a {type(output).__name__}"
    if isinstance(output, Tensor):
        what = f"a tensor of shape {tuple(output.shape)}"
    tokens = f"for {grid} patches" if grid else "without `patch`"
    raise ValueError(
        f"densekit.diagnostics.layer_features: the layer {name!r} returns {what} {tokens}; give a "
        "layer that returns maps (b, d, h, w), or tokens (b, n, d) and the side of their patches."
    )
