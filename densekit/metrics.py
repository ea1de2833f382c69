"""Scores of predictions: confusion, IoU, matched clusters, accuracy, precision, intervals.

The state of a score is a matrix of counts. Add the matrices of batches (`+`) and of processes
(`torch.distributed.all_reduce`), and compute the score of the sum once.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from densekit.numerics import block_rows, check, widened
from densekit.typing import Bool, Float, Integer, Shaped, Tensor, typed

__all__ = [
    "Accuracy",
    "ConfusionScores",
    "Interval",
    "accuracy",
    "as_dict",
    "as_table",
    "average_precision",
    "bootstrap",
    "confusion_matrix",
    "confusion_scores",
    "group_scores",
    "match_clusters",
    "mean_iou",
    "merge_clusters",
]


class ConfusionScores(NamedTuple):
    """Scores of a confusion matrix, in [0, 1]; zero if nothing was counted.

    Attributes:
        miou: Mean IoU of the classes that occur in labels or predictions.
        pixel_accuracy: Share of the pixels that are correct.
        mean_accuracy: Mean, over the classes that occur in labels, of the share of their pixels
            that are correct.
        iou: IoU of each class; zero where the class does not occur.
        valid: True for classes that occur in labels or predictions.
    """

    miou: Float[Tensor, "*batch"]
    pixel_accuracy: Float[Tensor, "*batch"]
    mean_accuracy: Float[Tensor, "*batch"]
    iou: Float[Tensor, "*batch classes"]
    valid: Bool[Tensor, "*batch classes"]


class Accuracy(NamedTuple):
    """Share of correct predictions, in [0, 1]; zero if nothing was counted.

    Attributes:
        overall: Share of all rows that are correct.
        macro: Mean, over the classes that occur, of the share of their rows that are correct.
    """

    overall: Float[Tensor, ""]
    macro: Float[Tensor, ""]


class Interval(NamedTuple):
    """A figure and its variation over random selections of the images.

    Attributes:
        value: The figure of all images.
        low: Lower end of the interval.
        high: Upper end of the interval.
        deviation: Standard deviation over the resamplings.
    """

    value: Float[Tensor, "*figure"]
    low: Float[Tensor, "*figure"]
    high: Float[Tensor, "*figure"]
    deviation: Float[Tensor, "*figure"]


@typed
def confusion_matrix(
    labels: Integer[Tensor, "*shape"],
    predictions: Integer[Tensor, "*shape"],
    *,
    classes: int,
    clusters: int | None = None,
    ignore: int | None = None,
) -> Integer[Tensor, "classes clusters"]:
    """Count the predictions of each class; the matrices of several batches can be added.

    Args:
        labels: True classes, of any integer dtype. A number outside [0, classes) is not counted,
            such as -1, or 255 if there are at most 255 classes.
        predictions: Predicted classes, or clusters; a number outside their range is not counted.
        classes: Number of classes.
        clusters: Number of clusters, if predictions are clusters
            ([`match_clusters`][densekit.metrics.match_clusters]); by default the number of classes.
        ignore: A class that is not counted either; by default none.

    Returns:
        Counts, in int64; rows are labels, columns are predictions.

    Raises:
        TypeError: The shapes differ, or a dtype is not an integer dtype.
        ValueError: There is no class, or no cluster.

    Examples:
        >>> confusion_matrix(torch.tensor([0, 0, 1, 255]), torch.tensor([0, 1, 1, 1]), classes=2)
        tensor([[1, 1],
                [0, 1]])

    References:
        Long et al. 2015 (FCN), Sec 5.
    """
    clusters = classes if clusters is None else clusters
    check("metrics.confusion_matrix", "classes", classes, classes >= 1, "one or more")
    check("metrics.confusion_matrix", "clusters", clusters, clusters >= 1, "one or more")

    labels = labels.long().flatten()
    predictions = predictions.long().flatten()
    keep = (labels >= 0) & (labels < classes)
    if ignore is not None:
        keep = keep & (labels != ignore)
    keep = keep & (predictions >= 0) & (predictions < clusters)
    cell = torch.where(keep, labels * clusters + predictions, 0)
    counts = torch.zeros(classes * clusters, dtype=torch.long, device=labels.device)
    return counts.scatter_add(0, cell, keep.long()).view(classes, clusters)


@typed
def confusion_scores(confusion: Integer[Tensor, "*batch classes predictions"]) -> ConfusionScores:
    """Compute the IoU and the accuracies of a confusion matrix.

    Args:
        confusion: Counts with labels as rows and predictions as columns. Columns beyond the
            classes, such as the last one of `merge_clusters`, always count as wrong.

    Returns:
        The scores, in float32.

    Raises:
        ValueError: There are fewer columns than rows.

    Examples:
        >>> confusion_scores(torch.tensor([[1, 1], [0, 2]])).iou
        tensor([0.5000, 0.6667])

    References:
        Long et al. 2015 (FCN), Sec 5; CrOC, Sec 4.2.
    """
    classes, predictions = confusion.shape[-2:]
    if predictions < classes:
        raise ValueError(
            f"densekit.metrics.confusion_scores: there are {classes} rows and {predictions} "
            "columns; give a column for each class, in the order of the rows (see merge_clusters)."
        )

    confusion = confusion.long()  # sums of few bits do not fit them
    hits = confusion.diagonal(dim1=-2, dim2=-1).double()
    labels = confusion.sum(-1)
    union = labels + confusion.sum(-2)[..., :classes] - hits

    occurs = union > 0
    iou = hits / union.clamp(min=1)
    miou = iou.sum(-1) / occurs.sum(-1).clamp(min=1)
    pixel_accuracy = hits.sum(-1) / confusion.sum((-2, -1)).clamp(min=1)
    recall = hits / labels.clamp(min=1)
    mean_accuracy = recall.sum(-1) / (labels > 0).sum(-1).clamp(min=1)
    return ConfusionScores(
        miou.float(), pixel_accuracy.float(), mean_accuracy.float(), iou.float(), occurs
    )


@typed
def mean_iou(
    confusion: Integer[Tensor, "*batch classes predictions"],
) -> Float[Tensor, "*batch"]:
    """Compute the mean intersection over union of the classes that occur.

    Args:
        confusion: Counts, as for `confusion_scores`.

    Returns:
        The mean over the classes that occur in labels or predictions, in [0, 1]; zero if nothing
        was counted.

    Raises:
        ValueError: As in `confusion_scores`.

    Examples:
        >>> mean_iou(torch.tensor([[1, 1], [0, 1]]))
        tensor(0.5000)

    References:
        Long et al. 2015 (FCN), Sec 5; CrOC, Sec 4.2.
    """
    return confusion_scores(confusion).miou


@typed
def match_clusters(
    confusion: Integer[Tensor, "classes clusters"],
    *,
    by: Literal["pixels", "iou"] = "pixels",
    many_to_one: bool = False,
) -> Integer[Tensor, " clusters"]:
    """Match clusters to classes: the Hungarian assignment, or the best class of each cluster.

    One-to-one matching maximizes the sum over the pairs; if there are more clusters than classes,
    some clusters have no class. Many-to-one matching, for over-clustering, assigns to every cluster
    the class that fits it best. Both use the labels, so the scores that follow are those of the
    best matching. One-to-one matching needs scipy.

    Args:
        confusion: Counts with classes as rows and clusters as columns, of the whole set.
        by: What to maximize: the number of correct pixels (as PiCIE and DenseSiam do), or the IoU
            of class and cluster.
        many_to_one: Allow several clusters to have the same class.

    Returns:
        The class of each cluster; -1 for a cluster without a class (in many-to-one matching, an
        empty cluster).

    Raises:
        ImportError: scipy is not installed.

    Examples:
        >>> match_clusters(torch.tensor([[0, 5, 4], [3, 0, 0]]))
        tensor([ 1,  0, -1])
        >>> match_clusters(torch.tensor([[0, 5, 4], [3, 0, 0]]), many_to_one=True)
        tensor([1, 0, 0])

    References:
        Kuhn 1955; DenseSiam, Sec 4.3; CrOC, Sec 4.2.
    """
    counts = confusion.long().double()
    union = counts.sum(-1, keepdim=True) + counts.sum(-2) - counts
    score = counts / union.clamp(min=1) if by == "iou" else counts
    if many_to_one:
        empty = counts.sum(0) == 0
        best = score.argmax(0) if len(score) else -1
        return torch.where(empty, -1, best)

    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "densekit.metrics.match_clusters: the Hungarian assignment needs scipy; install it, "
            "or give many_to_one=True."
        ) from error

    rows, columns = linear_sum_assignment(score.cpu().numpy(), maximize=True)
    assignment = torch.full((confusion.shape[1],), -1, device=confusion.device)
    assignment[torch.from_numpy(columns).to(assignment)] = torch.from_numpy(rows).to(assignment)
    return assignment


@typed
def merge_clusters(
    confusion: Integer[Tensor, "*batch classes clusters"],
    assignment: Integer[Tensor, " clusters"],
) -> Integer[Tensor, "*batch classes merged"]:
    """Convert the columns of a confusion matrix from clusters to classes.

    Args:
        confusion: Counts with classes as rows and clusters as columns; or one such matrix for each
            image.
        assignment: The class of each cluster, -1 for none (`match_clusters`).

    Returns:
        Counts in int64, with a column for each class, in the order of the rows, and a last column
        for the clusters without a class, which `confusion_scores` counts as wrong.

    Examples:
        >>> merge_clusters(torch.tensor([[0, 5, 4], [3, 0, 0]]), torch.tensor([1, 0, -1]))
        tensor([[5, 0, 4],
                [0, 3, 0]])

    References:
        DenseSiam, Sec 4.3 (whose code moves the rows instead).
    """
    classes = confusion.shape[-2]
    confusion = confusion.long()
    assignment = assignment.long()
    usable = (assignment >= 0) & (assignment < classes)
    column = torch.where(usable, assignment, classes)
    merged = confusion.new_zeros(*confusion.shape[:-1], classes + 1)
    return merged.scatter_add(-1, column.expand(confusion.shape), confusion)


@typed
def group_scores(
    confusion: Integer[Tensor, "*batch classes predictions"], group: Bool[Tensor, " classes"]
) -> ConfusionScores:
    """Compute scores within a group of classes, such as things or stuff.

    Only pixels whose label and prediction are both in the group count, as in the tables of PiCIE
    and DenseSiam. For the mean IoU of a group among all classes use
    `confusion_scores(confusion).iou[group].mean()`.

    Args:
        confusion: Counts with labels as rows and classes as columns, in the same order
            (`merge_clusters`); further columns are ignored.
        group: True for the classes of the group.

    Returns:
        The scores. `iou` and `valid` have entries for all classes; they are zero and False outside
        the group.

    Raises:
        ValueError: As in `confusion_scores`.

    Examples:
        >>> things = torch.tensor([True, False])
        >>> group_scores(torch.tensor([[3, 1], [0, 5]]), things).miou
        tensor(1.)

    References:
        Cho et al. 2021 (PiCIE), Table 2; DenseSiam, Table 3.
    """
    beyond = group.new_zeros(max(0, confusion.shape[-1] - len(group)))
    columns = torch.cat([group, beyond])
    inside = group[:, None] & columns if confusion.shape[-1] >= len(group) else False
    return confusion_scores(confusion.long() * inside)


@typed
def accuracy(
    labels: Integer[Tensor, " n"], predictions: Integer[Tensor, " n"], *, classes: int
) -> Accuracy:
    """Compute the share of rows whose class is predicted correctly, over all rows and per class.

    Args:
        labels: True classes; a row whose number is outside [0, classes) is not counted.
        predictions: Predicted classes; any number that is not the label is wrong.
        classes: Number of classes.

    Returns:
        Overall and macro accuracy.

    Raises:
        ValueError: There is no class.

    Examples:
        >>> accuracy(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]), classes=2)
        Accuracy(overall=tensor(0.6667), macro=tensor(0.5000))

    References:
        D3SSL, Sec 5.3 (accuracy of objects).
    """
    if classes < 1:
        raise ValueError(f"densekit.metrics.accuracy: classes is {classes}; give one or more.")

    labels = labels.long()
    counted = (labels >= 0) & (labels < classes)
    right = counted & (labels == predictions.long())
    row = labels * counted
    nothing = labels.new_zeros(classes)
    hits = nothing.scatter_add(0, row, right.long())
    count = nothing.scatter_add(0, row, counted.long())
    share = hits.float() / count.clamp(min=1)
    overall = hits.sum().float() / count.sum().clamp(min=1)
    return Accuracy(overall, share.sum() / (count > 0).sum().clamp(min=1))


@typed
def average_precision(
    scores: Float[Tensor, "n classes"],
    targets: Bool[Tensor, "n classes"],
    *,
    points: int | None = None,
) -> Float[Tensor, " classes"]:
    """Compute the average precision of each class, for images that contain several classes.

    `AP = sum_k (R_k - R_{k-1}) P_k` over the different scores, from the highest to the lowest. The
    classes are processed in blocks: besides the result, the memory is that of some columns, and of
    no more than some 2^22 numbers where a column is shorter.

    Args:
        scores: One score for each image and class; only their order matters. Where a score is NaN,
            the image is left out for this class, and other classes do not change.
        targets: True where the image contains the class.
        points: If given, use the interpolated form: at this number of equidistant recalls, take the
            best precision at this recall or above, and average. PASCAL VOC 2007 uses 11.

    Returns:
        Average precision, in [0, 1]. It is 0 for a class that no image contains; exclude such
        classes from the mean (`targets.any(0)`).

    Raises:
        ValueError: `points` is below 2.

    Examples:
        >>> targets = torch.tensor([[True], [False], [True]])
        >>> average_precision(torch.tensor([[0.9], [0.8], [0.7]]), targets)
        tensor([0.8333])

    References:
        Everingham et al. 2010 (PASCAL VOC), Sec 4.2; DUPR, Table 1b.
    """
    if points is not None and points < 2:
        raise ValueError(
            f"densekit.metrics.average_precision: points is {points}; give 2 or more, or None."
        )

    if not len(scores):
        return scores.new_zeros(scores.shape[1], dtype=torch.float32)
    columns = block_rows(len(scores))
    parts = zip(scores.split(columns, 1), targets.split(columns, 1), strict=True)
    return torch.cat([_average_precision(score, target, points) for score, target in parts])


def _average_precision(scores: Tensor, targets: Tensor, points: int | None) -> Tensor:
    known = ~scores.isnan()
    values, order = torch.where(known, scores, -torch.inf).sort(0, descending=True)
    hit = (targets & known).gather(0, order).double()
    end = _last_of_equals(values)
    found = hit.cumsum(0).gather(0, end)
    seen = known.gather(0, order).cumsum(0).gather(0, end)

    precision = found / seen.clamp(min=1)
    count = hit.sum(0)
    total = count.clamp(min=1)
    if points is None:
        return ((hit * precision).sum(0) / total).float()
    interpolated = _interpolated_precision(precision, found / total, points)
    return torch.where(count > 0, interpolated, 0.0).float()


def _last_of_equals(values: Tensor) -> Tensor:
    """Return the last row of the same value in sorted columns: the order of equals is chance."""
    number = torch.arange(len(values), device=values.device)[:, None]
    final = torch.ones_like(values[:1], dtype=torch.bool)
    last = torch.cat([values[:-1] != values[1:], final])
    return torch.where(last, number, len(values)).flip(0).cummin(0).values.flip(0)


def _interpolated_precision(precision: Tensor, recall: Tensor, points: int) -> Tensor:
    """Average, over equidistant recalls, the best precision at this recall or above."""
    # Recall never falls: the best precision at a recall or above is the best from a row on.
    best = precision.flip(0).cummax(0).values.flip(0)
    recalls = torch.linspace(0, 1, points, dtype=torch.double, device=recall.device)
    reached = recall.mT.contiguous()
    wanted = torch.zeros_like(reached[:, :1]) + (recalls - 1e-12)
    first = torch.searchsorted(reached, wanted).clamp(max=len(recall) - 1)
    return best.gather(0, first.mT).mean(0)


@typed
def bootstrap(
    states: Shaped[Tensor, " n *shape"],
    statistic: Callable[[Tensor], Tensor],
    *,
    draws: int = 1000,
    level: float = 0.95,
    generator: torch.Generator | None = None,
) -> Interval:
    """Compute a confidence interval of a figure by resampling the images with replacement.

    The figure is a function of a sum over images, as the mean IoU is of the sum of the images'
    confusion matrices. The interval shows how much the figure depends on the choice of the scored
    images. It does not show how much another training run would differ.

    The resamplings are processed in blocks: besides one copy of the states in float64, the memory
    is that of some 2^22 numbers, or of some sums where one is larger.

    Args:
        states: The summands, one row for each image. Integers are summed in int64, half precision
            in float32. A row that is not finite is left out, as if it was zero.
        statistic: A function that maps sums `(draws, *shape)` to figures `(draws, *)`, such as
            `mean_iou`. It is called several times, each time with some of the draws.
        draws: Number of resamplings.
        level: Share of the resamplings inside the interval.
        generator: Source of the random numbers, on the states' device.

    Returns:
        The figure of all images, and its percentile interval and deviation over the resamplings.

    Raises:
        ValueError: There is no image or no resampling, the level is not in (0, 1), or the statistic
            does not return one figure, or one row of figures, for each of the draws.

    Examples:
        >>> counts = torch.tensor([[[3, 0], [0, 1]]]).expand(5, 2, 2)  # five images alike
        >>> [x.item() for x in bootstrap(counts, mean_iou, draws=10)]
        [1.0, 1.0, 1.0, 0.0]

    References:
        Efron and Tibshirani 1993, Sec 13.3 (percentile interval).
    """
    n = len(states)
    check("metrics.bootstrap", "the number of images", n, n >= 1, "one or more")
    check("metrics.bootstrap", "draws", draws, draws >= 1, "one or more")
    check("metrics.bootstrap", "level", level, 0 < level < 1, "a number between 0 and 1")

    states = _summands(states)
    total = states.sum(0, keepdim=True)
    wide = states.double()
    block = block_rows(max(n, states[0].numel()))
    some_figures = []
    for first in range(0, draws, block):
        sums = _resampled_sums(wide, min(block, draws - first), generator)
        sums = sums if states.is_floating_point() else sums.round()
        some_figures.append(_figures_of(statistic, sums.to(total.dtype)))

    figures = torch.cat(some_figures)
    value = _figures_of(statistic, total)[0]
    low = _quantile(figures, (1 - level) / 2)
    high = _quantile(figures, (1 + level) / 2)
    return Interval(value, low, high, figures.std(0, correction=0))


def _figures_of(statistic: Callable[[Tensor], Tensor], sums: Tensor) -> Tensor:
    """Return the figures of some sums, in floats."""
    figures = statistic(sums)
    given = type(figures).__name__
    is_tensor = isinstance(figures, Tensor)
    check("metrics.bootstrap", "what the statistic returns", given, is_tensor, "a tensor")
    shape = tuple(figures.shape)
    fits = shape[:1] == sums.shape[:1]
    wanted = f"figures of {len(sums)} sums, along the first axis"
    check("metrics.bootstrap", "the shape of what the statistic returns", shape, fits, wanted)
    return figures if figures.is_floating_point() else figures.double()


def _quantile(values: Tensor, share: float) -> Tensor:
    """Return `torch.quantile` along the first axis, which torch 2.8 cannot compile."""
    ordered = values.sort(0).values
    position = share * (len(values) - 1)
    below = ordered[math.floor(position)]
    above = ordered[math.ceil(position)]
    quantile = below.lerp(above, position - math.floor(position))
    return torch.where(values.isnan().any(0), torch.nan, quantile)


def _summands(states: Tensor) -> Tensor:
    """Convert states to a dtype in which they can be summed; zero where a row is not finite."""
    if not states.is_floating_point():
        return states.long()
    states = widened(states)
    finite = states.reshape(len(states), -1).isfinite().all(1)
    return torch.where(finite.view(-1, *[1] * (states.ndim - 1)), states, 0.0)


def _resampled_sums(states: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    """Return the sums of `draws` random selections of rows, with replacement."""
    n = len(states)
    rows = torch.randint(n, (draws, n), generator=generator, device=states.device)
    weights = torch.zeros(draws, n, dtype=torch.double, device=states.device)
    weights = weights.scatter_add(1, rows, torch.ones_like(weights))
    return torch.tensordot(weights, states, 1)


@typed
def as_dict(result: Any) -> Any:
    """Convert a result to plain Python numbers, for `json.dump`.

    Args:
        result: A record, a tensor, or a dict or sequence of them.

    Returns:
        Records become dicts of their fields, and tensors become numbers and lists; anything else
        stays as it is.

    Examples:
        >>> as_dict({"knn": Accuracy(torch.tensor(0.5), torch.tensor(0.25))})
        {'knn': {'overall': 0.5, 'macro': 0.25}}
    """
    if isinstance(result, Tensor):
        return result.tolist()
    if hasattr(result, "_asdict"):
        result = result._asdict()
    if isinstance(result, Mapping):
        return {key: as_dict(value) for key, value in result.items()}
    if isinstance(result, (list, tuple)):
        return [as_dict(x) for x in result]
    return result


@typed
def as_table(rows: Mapping[str, Any], *, digits: int = 3) -> str:
    """Format results as a Markdown table with a row for each result and a column for each number.

    Args:
        rows: Records, or dicts of numbers and records, by name.
        digits: Number of decimals.

    Returns:
        The table. Nested fields have dotted names; per-class numbers are left out.

    Examples:
        >>> print(as_table({"knn": Accuracy(torch.tensor(0.5), torch.tensor(0.25))}, digits=2))
        | | overall | macro |
        |---|---|---|
        | knn | 0.50 | 0.25 |

    References:
        GitHub Flavored Markdown, Sec 4.10.
    """
    flat = {name: _numbers(as_dict(result)) for name, result in rows.items()}
    columns = list(dict.fromkeys(key for numbers in flat.values() for key in numbers))
    head = " | ".join(["", *(_cell(column, digits) for column in columns)])
    rule = "|".join(["---"] * (1 + len(columns)))
    lines = [f"|{head} |", f"|{rule}|"]
    for name, numbers in flat.items():
        cells = [_cell(name, digits)]
        cells += [_cell(numbers.get(column), digits) for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _numbers(tree: Any, name: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": [2]} as {"a.b": 1}."""
    if isinstance(tree, list):
        return {}
    if not isinstance(tree, dict):
        return {name.removeprefix("."): tree}
    flat = {}
    for key, value in tree.items():
        flat |= _numbers(value, f"{name}.{key}")
    return flat


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return str(value).replace("|", "\\|").replace("\n", " ")  # a line break would end the row
