"""Measures of dense features: mean IoU, linear probes, affinity, similarity against IoU."""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from densekit.boxes import roi_align, sample_boxes_at_iou
from densekit.losses import l2_normalize, masked_mean
from densekit.sampling import grid_points, gridsample
from densekit.typing import Bool, Float, Integer, Size, Tensor, typed, widen

__all__ = [
    "CouplingImages",
    "KNNScore",
    "LayerBias",
    "LinearProbe",
    "SegmentationScore",
    "SimilarityCurve",
    "affinity_matrix",
    "confusion_matrix",
    "coupling_images",
    "coupling_rate",
    "fit_linear_probe",
    "layer_bias",
    "layer_features",
    "linear_segmentation",
    "mean_cosine_similarity",
    "mean_iou",
    "object_knn",
    "pca_colors",
    "similarity_iou_curve",
]


class SegmentationScore(NamedTuple):
    """How well images are segmented, and how well without looking at them.

    Attributes:
        miou: Mean IoU, in [0, 1].
        prior_miou: Mean IoU of saying the most frequent class everywhere.
    """

    miou: Float[Tensor, ""]
    prior_miou: Float[Tensor, ""]


class SimilarityCurve(NamedTuple):
    """How alike a box and its moved copies are.

    Attributes:
        similarity: Mean cosine at each IoU.
        valid: True where any moved copy was inside the map.
    """

    similarity: Float[Tensor, " k"]
    valid: Bool[Tensor, " k"]


class KNNScore(NamedTuple):
    """How often the nearest neighbours name the class of an object.

    Attributes:
        overall: Share of all objects that are named rightly.
        macro: Mean over the classes that occur of the share of their objects.
    """

    overall: Float[Tensor, ""]
    macro: Float[Tensor, ""]


class CouplingImages(NamedTuple):
    """Images that show how much one object's features say of another, and where the objects are.

    Attributes:
        together: A, and B to its right, on black.
        alone: A at the same place, alone.
        box_a: Place of A in the frame of the image, in [0, 1].
        box_b: Place of B.
    """

    together: Float[Tensor, "*batch c tall wide"]
    alone: Float[Tensor, "*batch c tall wide"]
    box_a: Float[Tensor, "*batch 4"]
    box_b: Float[Tensor, "*batch 4"]


class LayerBias(NamedTuple):
    """What the features of each layer carry besides the object itself.

    Attributes:
        coupling_rate: How much they take over from a neighbour; 1 is none.
        mean_cosine: How alike they are at nine places; 1 is the same everywhere.
    """

    coupling_rate: Float[Tensor, " layers"]
    mean_cosine: Float[Tensor, " layers"]


class LinearProbe(NamedTuple):
    """A linear classifier of features.

    Attributes:
        weight: Weights; `features @ weight + bias` are the class scores.
        bias: Offsets.
        prior: Share of each class among the rows it was fitted on.
    """

    weight: Float[Tensor, "d classes"]
    bias: Float[Tensor, " classes"]
    prior: Float[Tensor, " classes"]


@typed
def confusion_matrix(
    labels: Integer[Tensor, "*shape"],
    predictions: Integer[Tensor, "*shape"],
    *,
    classes: int,
    ignore: int = 255,
) -> Integer[Tensor, "classes classes"]:
    """Count how often each class is predicted as each; add the matrices of batches.

    Args:
        labels: True classes.
        predictions: Predicted classes.
        classes: How many classes there are.
        ignore: Label to leave out. Any other number outside [0, classes), of a label or of a
            prediction, is left out too.

    Returns:
        Counts: rows are labels, columns are predictions.

    Raises:
        TypeError: The shapes differ, or a number is not an integer.
        ValueError: There is no class.

    Examples:
        >>> confusion_matrix(torch.tensor([0, 0, 1, 255]), torch.tensor([0, 1, 1, 1]), classes=2)
        tensor([[1, 1],
                [0, 1]])

    References:
        Long et al. 2015 (FCN), Sec 5.
    """
    if classes < 1:
        raise ValueError(
            f"densekit.metrics.confusion_matrix: classes is {classes}; give one or more."
        )
    labels, predictions = labels.long().flatten(), predictions.long().flatten()
    keep = (labels != ignore) & (labels >= 0) & (labels < classes)
    keep = keep & (predictions >= 0) & (predictions < classes)
    cell = torch.where(keep, labels * classes + predictions, 0)
    counts = torch.zeros(classes * classes, dtype=torch.long, device=labels.device)
    return counts.scatter_add(0, cell, keep.long()).view(classes, classes)


@typed
def mean_iou(confusion: Integer[Tensor, "*batch classes classes"]) -> Float[Tensor, "*batch"]:
    """Mean intersection over union of the classes that occur.

    Args:
        confusion: Counts with labels as rows and predictions as columns.

    Returns:
        The mean over the classes that occur in labels or predictions, in [0, 1]; zero when
        nothing was counted.

    Raises:
        TypeError: The matrix is not square.

    Examples:
        >>> mean_iou(torch.tensor([[1, 1], [0, 1]]))
        tensor(0.5000)

    References:
        Long et al. 2015 (FCN), Sec 5; CrOC, Sec 4.2.
    """
    hits = confusion.diagonal(dim1=-2, dim2=-1).double()
    union = confusion.sum(-1) + confusion.sum(-2) - hits
    occurs = union > 0
    iou = torch.where(occurs, hits / torch.where(occurs, union, 1.0), 0.0)
    return (iou.sum(-1) / occurs.sum(-1).clamp(min=1)).float()


@typed
def fit_linear_probe(
    features: Float[Tensor, "n d"],
    labels: Integer[Tensor, " n"],
    *,
    classes: int,
    ignore: int = 255,
    penalty: float = 1e-3,
) -> LinearProbe:
    r"""Fit a linear classifier in closed form: ridge regression onto one-hot labels.

    A quick stand-in for a linear layer trained by SGD. Features are standardised, so that the
    penalty means the same at every scale; the result applies to the raw features.

    Args:
        features: Frozen features, one row a cell.
        labels: Class of each row.
        classes: How many classes there are.
        ignore: Label of the rows to leave out.
        penalty: Ridge penalty, per row.

    Returns:
        The classifier in float32; `(features @ probe.weight + probe.bias).argmax(-1)` predicts.

    Raises:
        TypeError: The counts of features and labels differ.
        ValueError: There is no class, or the penalty is not positive.

    Examples:
        >>> features = torch.tensor([[0.0], [0.1], [0.9], [1.0]])
        >>> probe = fit_linear_probe(features, torch.tensor([0, 0, 1, 1]), classes=2)
        >>> (features @ probe.weight + probe.bias).argmax(-1)
        tensor([0, 0, 1, 1])

    References:
        CrOC, Sec 4.2 (linear segmentation); Hastie et al. 2009, Sec 3.4.1 and 4.2.
    """
    if classes < 1 or not penalty > 0:
        raise ValueError(
            f"densekit.metrics.fit_linear_probe: classes is {classes} and penalty {penalty}; "
            "give at least one class and a penalty above 0."
        )
    labels = labels.long()
    keep = (labels != ignore) & (labels >= 0) & (labels < classes)
    rows = keep.sum().clamp(min=1)
    x = torch.where(keep[:, None], features.double(), 0.0)
    mean = x.sum(0) / rows
    rounding = 1e-12 * x.abs().amax(0) if len(x) else mean
    x = torch.where(keep[:, None], x - mean, 0.0)
    deviation = (x.square().sum(0) / rows).sqrt()
    deviation = torch.where(deviation > rounding, deviation, torch.inf)  # a constant says nothing
    x = x / deviation
    target = torch.nn.functional.one_hot(torch.where(keep, labels, 0), classes).double()
    target = torch.where(keep[:, None], target, 0.0)
    prior = target.sum(0) / rows
    gram = x.mT @ x / rows + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(gram, x.mT @ (target - prior) / rows) / deviation[:, None]
    return LinearProbe(weight.float(), (prior - mean @ weight).float(), prior.float())


@typed
def linear_segmentation(
    features: Float[Tensor, "n d h w"],
    test_features: Float[Tensor, "m d h w"],
    labels: Integer[Tensor, "n big_h big_w"],
    test_labels: Integer[Tensor, "m big_h big_w"],
    *,
    classes: int,
    ignore: int = 255,
    stride: int = 4,
    penalty: float = 1e-3,
) -> SegmentationScore:
    """Score frozen feature maps by linear segmentation of held-out images, in closed form.

    Features are resized bilinearly to every `stride`-th pixel of the label maps, `fit_linear_probe`
    is fitted there, and the held-out images are scored at the same pixels. It takes seconds and
    no learning rate; it is no substitute for the papers' protocol, a linear layer trained by SGD.

    Args:
        features: Feature maps to fit on.
        test_features: Feature maps to score.
        labels: Class maps of the images to fit on, of any size.
        test_labels: Class maps of the images to score.
        classes: How many classes there are.
        ignore: Label of the pixels to leave out.
        stride: Use every `stride`-th pixel of the labels in each direction.
        penalty: As in `fit_linear_probe`.

    Returns:
        The mean IoU over the held-out images, and that of the most frequent class to fit on.

    Raises:
        TypeError: Counts or channels do not fit.
        ValueError: The stride is not positive, or as `fit_linear_probe`.

    Examples:
        >>> labels = torch.arange(4).repeat(2, 8, 2)
        >>> features = torch.nn.functional.one_hot(labels).movedim(-1, 1).float()
        >>> linear_segmentation(features, features, labels, labels, classes=4, stride=1).miou
        tensor(1.)

    References:
        CrOC, Sec 4.2 (the protocol this stands in for).
    """
    if stride < 1:
        raise ValueError(
            f"densekit.metrics.linear_segmentation: stride is {stride}; give 1 or more."
        )
    h, w = labels.shape[-2:]
    offset = min(stride, h, w) // 2
    points = grid_points(torch.tensor([0.0, 0.0, 1.0, 1.0], device=features.device), (h, w))
    points = points.unflatten(0, (h, w))[offset::stride, offset::stride].flatten(0, 1)

    def rows(maps: Tensor, targets: Tensor):
        sampled = gridsample(maps, points.expand(len(maps), *points.shape))
        return sampled.flatten(0, 1), targets[:, offset::stride, offset::stride].flatten()

    sampled, targets = rows(features, labels)
    probe = fit_linear_probe(sampled, targets, classes=classes, ignore=ignore, penalty=penalty)
    frequent = probe.prior.argmax()
    sampled, targets = rows(test_features, test_labels)
    predictions = (sampled.float() @ probe.weight + probe.bias).argmax(-1)
    scores = (
        mean_iou(confusion_matrix(targets, guess, classes=classes, ignore=ignore))
        for guess in (predictions, frequent.expand_as(predictions))
    )
    return SegmentationScore(*scores)


@typed
def affinity_matrix(
    features1: Float[Tensor, "*batch n d"],
    features2: Float[Tensor, "*batch m d"],
    *,
    temperature: float = 0.001,
) -> Float[Tensor, "*batch n m"]:
    """Tell how well each row of one view is found again in the other.

    `A_ij = exp(sim(f1_i, f2_j) / t) / sum_k exp(sim(f1_k, f2_j) / t)` with the cosine as sim. For
    the same patches of two views, in the same order, the ideal is the identity.

    Args:
        features1: Rows of the first view, such as the patches of `patch_pairs`.
        features2: Rows of the second view.
        temperature: Divides the cosine; the smaller, the nearer to a hard choice.

    Returns:
        Shares, in at least float32: each column sums to 1 over the rows.

    Raises:
        TypeError: The shapes do not fit.
        ValueError: The temperature is not positive.

    Examples:
        >>> affinity_matrix(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([[0., 1.],
                [1., 0.]])

    References:
        DUPR, Eq 9, Fig 9.
    """
    if not temperature > 0:
        raise ValueError(
            f"densekit.metrics.affinity_matrix: temperature is {temperature}; give one above 0."
        )
    with torch.autocast(features1.device.type, enabled=False):
        similarity = l2_normalize(features1) @ l2_normalize(features2).mT
    return (similarity / temperature).softmax(-2)


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
    """Measure how the similarity of a box to a moved copy falls with their overlap.

    Both boxes are pooled to S x S, and the cosine is averaged over the S x S places. A detector
    wants a steep curve: near 1 for boxes that overlap much, low for those that overlap little.
    A moved copy that leaves the map is left out, which large boxes do: what is averaged then
    differs from IoU to IoU.

    Args:
        features: Feature maps.
        boxes: Boxes `(x1, y1, x2, y2)` in the maps' frame, in [0, 1], such as those of objects.
        valid: Boxes to use; all when left out.
        ious: The k intersections over union to measure at, each in [0, 1].
        size: Bins S of the pooled boxes along each axis.
        generator: Source of the random moves, on the boxes' device.

    Returns:
        Mean cosine at each IoU, in at least float32, and whether any box was left to measure.

    Raises:
        TypeError: The shapes do not fit.
        ValueError: An IoU is outside [0, 1], or as `roi_align`.

    Examples:
        >>> boxes = torch.tensor([[0.2, 0.2, 0.6, 0.6]])
        >>> similarity_iou_curve(torch.rand(8, 16, 16), boxes, ious=(0.5, 1.0)).similarity[1]
        tensor(1.)

    References:
        DUPR, Eq 8, Fig 5.
    """
    query, similarities, found = roi_align(features, boxes, size, valid), [], []
    for iou in ious:
        moved = sample_boxes_at_iou(boxes, iou, generator=generator)
        inside = ((moved >= -1e-4) & (moved <= 1 + 1e-4)).all(-1)
        key = roi_align(features, moved, size, query.valid & inside)
        pair = (l2_normalize(x.features.movedim(-3, -1)) for x in (query, key))
        cosine = torch.mul(*pair).sum(-1).mean((-2, -1))
        similarities.append(masked_mean(cosine, key.valid))
        found.append(key.valid.any())
    if not found:
        return SimilarityCurve(widen(features).new_zeros(0), query.valid.new_zeros(0))
    return SimilarityCurve(torch.stack(similarities), torch.stack(found))


@typed
def layer_features(
    model: torch.nn.Module,
    images: Float[Tensor, "b c h w"],
    layers: Sequence[str],
    *,
    patch: int | None = None,
) -> dict[str, Float[Tensor, "b _ _ _"]]:
    """Feature maps of the named layers of any model, caught by hooks in one forward pass.

    Gradients flow and the model's mode stays as they are: call `model.eval()` and use
    `torch.no_grad()` to measure. The model is left without hooks, also after an error.

    Args:
        model: The model; it is called with the images alone.
        images: Its input.
        layers: Names of modules as in `model.named_modules()`, such as `"layer3"`; of one that
            runs more than once the last output counts.
        patch: Side of a ViT's patches in pixels, for layers that give tokens `(b, n, d)`: they
            become the map of h / patch by w / patch cells; tokens in front (class, registers) are
            left out.

    Returns:
        The maps by name, in the order of `layers`.

    Raises:
        ValueError: A layer does not exist, was not run, or gives neither a map nor tokens of such
            patches.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 2, 2))
        >>> maps = layer_features(model, torch.rand(1, 3, 4, 4), ["0", "1"])
        >>> [x.shape for x in maps.values()]
        [torch.Size([1, 8, 4, 4]), torch.Size([1, 4, 2, 2])]

    References:
        D3SSL, Fig 3b and 4b (its measures of each layer).
    """
    known, caught = dict(model.named_modules()), {}
    if unknown := [name for name in layers if name not in known]:
        near = difflib.get_close_matches(unknown[0], filter(None, known), cutoff=0.0)
        raise ValueError(
            f"densekit.metrics.layer_features: there is no layer {unknown[0]!r}; give names of "
            f"model.named_modules(), such as {', '.join(map(repr, near))}."
        )

    grid = (images.shape[-2] // patch, images.shape[-1] // patch) if patch else None

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
            f"densekit.metrics.layer_features: the layer {missing[0]!r} was not run; give one that "
            "the model's forward calls (in a compiled model, none is seen)."
        )
    return {name: caught[name] for name in layers}


@typed
def coupling_images(
    objects_a: Float[Tensor, "*batch c h w"], objects_b: Float[Tensor, "*batch c h w"]
) -> CouplingImages:
    """Put two objects side by side, and the first one alone, for `coupling_rate`.

    Each has a margin of a quarter of its size all around, but towards the other, which it touches.

    Args:
        objects_a: Pictures of objects A.
        objects_b: Pictures of objects B, of another class and the same size.

    Returns:
        Images of `3 h / 2` by `5 w / 2` pixels, black (0) elsewhere, and the places of A and B.

    Raises:
        TypeError: The shapes differ.

    Examples:
        >>> coupling_images(torch.rand(3, 64, 64), torch.rand(3, 64, 64)).together.shape
        torch.Size([3, 96, 160])

    References:
        D3SSL, Sec 3.1, Fig 3a.
    """
    h, w = objects_a.shape[-2:]
    top, left = h // 4, w // 4
    border = (left, w // 2 - left, top, h // 2 - top)
    together, alone = (
        torch.nn.functional.pad(torch.cat([objects_a, x], -1), border)
        for x in (objects_b, torch.zeros_like(objects_b))
    )
    height, width = together.shape[-2:]
    boxes = together.new_tensor(
        [[left, top, left + w, top + h], [left + w, top, left + 2 * w, top + h]]
    )
    boxes = boxes / boxes.new_tensor([width, height, width, height])
    return CouplingImages(together, alone, *boxes.expand(*together.shape[:-3], 2, 4).unbind(-2))


@typed
def coupling_rate(
    together: Float[Tensor, "*batch d h w"],
    alone: Float[Tensor, "*batch d h w"],
    box_a: Float[Tensor, "*batch 4"],
    box_b: Float[Tensor, "*batch 4"],
) -> Float[Tensor, "*batch"]:
    """Coupling rate of a layer: how much an object's features take over from its neighbour.

    `CR = cos(A1, B) / cos(A2, B)`: A1 and B are pooled where both are in the image, A2 where A is
    alone. Above 1 A's features carry B; 1 is ideal. Take the mean over many pairs of objects.

    Args:
        together: Feature maps of images that hold A and B, such as `coupling_images` makes.
        alone: Feature maps of the images that hold A alone, at the same place.
        box_a: Place of A in the maps' frame, in [0, 1].
        box_b: Place of B.

    Returns:
        The rate of each pair of objects, in at least float32; of no meaning where the cosine
        `cos(A2, B)` is near zero, and 0 where it is zero.

    Raises:
        TypeError: The shapes differ.

    Examples:
        >>> maps, left = torch.rand(8, 4, 4), torch.tensor([0.0, 0.0, 0.5, 1.0])
        >>> coupling_rate(maps, maps, left, 1 - left[[2, 3, 0, 1]])
        tensor(1.)

    References:
        D3SSL, Sec 3.1, Fig 3, Table 7.
    """
    pooled = []
    for features, box in ((together, box_a), (alone, box_a), (together, box_b)):
        roi = roi_align(features, box[..., None, :], 1, sampling_ratio=0).features
        pooled.append(l2_normalize(roi.flatten(-4)))
    first, second, other = pooled
    coupled, free = (first * other).sum(-1), (second * other).sum(-1)
    return torch.where(free != 0, coupled / torch.where(free != 0, free, 1.0), 0.0)


@typed
def mean_cosine_similarity(features: Float[Tensor, "*batch d h w"]) -> Float[Tensor, "*batch"]:
    """Positional bias of a layer: how alike the same object's features are at nine places.

    Repeat an image in a 3 x 3 grid (`images.repeat(1, 1, 3, 3)`), encode it, and compare the
    central third of the map with the eight others, pooled. 1 is ideal: the nine are identical, and
    only the border of the image (zero padding) can tell them apart. So it is for pictures of whole
    cells, a multiple of the layer's stride in pixels; others fall differently on the nine.

    Args:
        features: Feature maps of images that hold the same picture nine times.

    Returns:
        Mean cosine of the centre and the other eight, in at least float32.

    Raises:
        ValueError: The map has no cell.

    Examples:
        >>> mean_cosine_similarity(torch.rand(8, 4, 4).repeat(1, 3, 3))
        tensor(1.)

    References:
        D3SSL, Sec 3.2, Fig 4, Table 7.
    """
    places = grid_points(widen(features).new_tensor([0.0, 0.0, 1.0, 1.0]), 3)
    boxes = torch.cat([places - 1 / 6, places + 1 / 6], -1)
    nine = roi_align(features, boxes.expand(*features.shape[:-3], 9, 4), 1, sampling_ratio=0)
    rows = l2_normalize(nine.features.flatten(-3))
    cosine = (rows * rows[..., 4:5, :]).sum(-1)
    return (cosine.sum(-1) - cosine[..., 4]) / 8


@typed
def layer_bias(
    model: torch.nn.Module,
    objects: Float[Tensor, "n c h w"],
    layers: Sequence[str],
    *,
    patch: int | None = None,
    chunk: int = 64,
) -> LayerBias:
    """Coupling rate and positional bias of each layer of a model, over pictures of objects.

    Each object has the next one as its neighbour. Call it on a model in evaluation mode that
    normalises its input itself (`torch.nn.Sequential(normalize, encoder)`, with the layers then
    named `"1.layer4"`), so that 0 is black.

    Args:
        model: The model; it is called with images alone.
        objects: Pictures of objects, cut out and resized. The images made of them are three times
            as large: take about a third of the training size, and whole cells of the deepest layer
            (a multiple of its stride); otherwise the nine fall differently on its cells.
        layers: Names of modules, as in `layer_features`.
        patch: Side of a ViT's patches in pixels, as in `layer_features`.
        chunk: Objects measured at a time: bounds the memory.

    Returns:
        The means over the objects, one number for each layer.

    Raises:
        ValueError: There are fewer than two objects, the chunk is below 1, or as `layer_features`.

    Examples:
        >>> layer_bias(torch.nn.Identity(), torch.rand(4, 3, 8, 8), [""])
        LayerBias(coupling_rate=tensor([1.]), mean_cosine=tensor([1.]))

    References:
        D3SSL, Sec 3, Fig 3 and 4, Table 7.
    """
    if len(objects) < 2 or chunk < 1:
        raise ValueError(
            f"densekit.metrics.layer_bias: there are {len(objects)} objects and chunk is {chunk}; "
            "give two objects or more, and 1 or more at a time."
        )
    rates, cosines = [], []
    for own, other in zip(objects.split(chunk), objects.roll(1, 0).split(chunk), strict=True):
        made = coupling_images(own, other)
        together, alone, nine = (
            layer_features(model, x, layers, patch=patch).values()
            for x in (made.together, made.alone, own.repeat(1, 1, 3, 3))
        )
        pairs = zip(together, alone, strict=True)
        rates.append(torch.stack([coupling_rate(*x, made.box_a, made.box_b) for x in pairs]))
        cosines.append(torch.stack([mean_cosine_similarity(x) for x in nine]))
    return LayerBias(*(torch.cat(values, -1).mean(-1) for values in (rates, cosines)))


@typed
def object_knn(
    features: Float[Tensor, "n d"],
    labels: Integer[Tensor, " n"],
    gallery: Float[Tensor, "m d"],
    gallery_labels: Integer[Tensor, " m"],
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int | None = None,
) -> KNNScore:
    """Classify objects by their nearest neighbours in a gallery.

    The k nearest by cosine vote with `exp(cosine / t)`. Features of objects are RoIAlign of their
    boxes, averaged. For the disturbed protocol everything outside an object's box is replaced
    by another image before encoding: `composite(images, others, boxes_to_mask(boxes, size))`.

    Args:
        features: One row an object to classify.
        labels: Their classes; an object with a number outside [0, classes) is not counted.
        gallery: One row for each known object; one that is not finite has no vote.
        gallery_labels: Their classes; one outside [0, classes) has no vote.
        classes: How many classes there are.
        k: Neighbours that vote; all when the gallery has fewer.
        temperature: Divides the cosine in a vote.
        chunk: Objects classified at a time, which bounds the memory to `chunk x m` numbers; when
            left out as many as make 2^27 numbers (half a gigabyte), one at least.

    Returns:
        Overall and macro accuracy, in [0, 1]; 0 without an object or without a gallery.

    Raises:
        TypeError: The shapes do not fit.
        ValueError: `classes`, `k` or `chunk` is below 1, or the temperature is not positive.

    Examples:
        >>> gallery, labels = torch.eye(2), torch.tensor([0, 1])
        >>> object_knn(gallery, labels, gallery, labels, classes=2).overall
        tensor(1.)

    References:
        D3SSL, Sec 5.3, Table 4; Wu et al. 2018, Sec 3.4 (weighted vote).
    """
    chunk = max(1, 2**27 // max(1, len(gallery))) if chunk is None else chunk
    if min(classes, k, chunk) < 1 or not temperature > 0:
        raise ValueError(
            f"densekit.metrics.object_knn: classes is {classes}, k {k}, chunk {chunk} and "
            f"temperature {temperature}; give at least 1, and a temperature above 0."
        )
    known, k, right = l2_normalize(gallery), min(k, len(gallery)), []
    labels, known_labels = labels.long(), gallery_labels.long()
    counted, usable = ((x >= 0) & (x < classes) for x in (labels, known_labels))
    usable = usable & known.isfinite().all(-1)
    known, known_labels = torch.where(usable[:, None], known, 0.0), known_labels * usable
    bias = torch.where(usable, 0.0, -torch.inf).to(known)
    for rows, target in zip(features.split(chunk), labels.split(chunk), strict=True):
        with torch.autocast(features.device.type, enabled=False):
            nearest = torch.addmm(bias, l2_normalize(rows).to(known), known.mT).topk(k)
        weights = (nearest.values / temperature).softmax(-1)  # the same winner as exp
        votes = weights.new_zeros(len(rows), classes)
        votes = votes.scatter_add(1, known_labels[nearest.indices], weights)
        best = votes.max(1)
        right.append((best.indices == target) & (best.values > 0))  # no vote: NaN or 0
    right = (torch.cat(right) & counted).float()
    nothing, labels = torch.zeros(classes, device=right.device), labels * counted
    hits = nothing.scatter_add(0, labels, right)
    count = nothing.scatter_add(0, labels, counted.float())
    occurs = count > 0
    share = torch.where(occurs, hits / count.clamp(min=1), 0.0)
    return KNNScore(hits.sum() / count.sum().clamp(min=1), share.sum() / occurs.sum().clamp(min=1))


@typed
def pca_colors(features: Float[Tensor, "n d h w"]) -> Float[Tensor, "n 3 h w"]:
    """Paint feature maps with their three principal components, for looking at them.

    The components are those of all cells together, so that a colour means the same in every map;
    each is stretched to [0, 1].

    Args:
        features: Feature maps; what is not finite counts as 0.

    Returns:
        Colour maps in [0, 1], in float32; components that do not exist (fewer than three channels
        or cells) are zero.

    Examples:
        >>> pca_colors(torch.rand(2, 16, 7, 7)).shape
        torch.Size([2, 3, 7, 7])

    References:
        Oquab et al. 2023 (DINOv2), Fig 1.
    """
    n, _, h, w = features.shape
    tokens = features.float().nan_to_num().movedim(1, -1).flatten(0, 2)
    tokens = tokens - tokens.mean(0)
    axes = torch.linalg.eigh(tokens.mT @ tokens).eigenvectors[:, -3:].flip(-1)
    colors = torch.nn.functional.pad(tokens @ axes, (0, 3 - axes.shape[1]))
    if len(tokens):
        colors = colors - colors.amin(0)
        spread = colors.amax(0)
        exists = spread > 1e-5 * spread.amax().clamp(min=1e-6)  # below it is rounding noise
        colors = colors / torch.where(exists, spread, torch.inf)
    return colors.unflatten(0, (n, h, w)).movedim(-1, 1)


def _as_map(output: object, name: str, grid: Size | None) -> Tensor:
    """A layer's output as feature maps, safe from what the next layers do to it in place."""
    if isinstance(output, Tensor) and output.ndim == 4:
        return output.clone()
    if isinstance(output, Tensor) and output.ndim == 3 and grid:
        front = output.shape[1] - grid[0] * grid[1]
        if front >= 0:
            return output[:, front:].mT.unflatten(-1, grid).contiguous()
    what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    tokens = f"for {grid} patches" if grid else "without `patch`"
    raise ValueError(
        f"densekit.metrics.layer_features: the layer {name!r} gives {what} {tokens}; give a layer "
        "of maps (b, d, h, w), or of tokens (b, n, d) and the side of their patches."
    )
