"""Classifiers on frozen features: linear layers and support vector machines, and their scores.

Features are rows `(n, d)` or maps `(n, d, h, w)`. On maps the predictions are class scores `(n,
classes, h, w)`; `segmentation_counts` compares them with labels of any size.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from densekit.metrics import confusion_matrix, mean_iou
from densekit.numerics import block_rows, check, check_cells, full_precision, map_to_rows, widened
from densekit.sampling import grid_points, gridsample
from densekit.scenes import SCENE_CLASSES, sample_scenes
from densekit.schedules import cosine_schedule
from densekit.typing import Bool, Float, Integer, Size, Tensor, typed

__all__ = [
    "LinearProbe",
    "SegmentationScore",
    "fit_linear_probe",
    "fit_svm",
    "linear_maps",
    "linear_segmentation",
    "probe_scenes",
    "segmentation_counts",
    "train_linear_probe",
]


_IGNORE = -100  # the label of pixels that are not counted, which is no class


class SegmentationScore(NamedTuple):
    """The score of a segmentation, and that of a baseline that ignores the images.

    Attributes:
        miou: Mean IoU, in [0, 1].
        prior_miou: Mean IoU of predicting the most frequent class everywhere.
    """

    miou: Float[Tensor, ""]
    prior_miou: Float[Tensor, ""]


class LinearProbe(NamedTuple):
    """A linear classifier of features.

    Attributes:
        weight: Weights; `features @ weight + bias` are the class scores.
        bias: Offsets of the class scores.
        prior: Share of each class among the rows that it was fitted on.
    """

    weight: Float[Tensor, "d classes"]
    bias: Float[Tensor, " classes"]
    prior: Float[Tensor, " classes"]


@typed
def fit_linear_probe(
    features: Float[Tensor, "n d"],
    labels: Integer[Tensor, " n"],
    *,
    classes: int,
    ignore: int | None = None,
    penalty: float = 1e-3,
) -> LinearProbe:
    r"""Fit a linear classifier in closed form: ridge regression onto one-hot labels.

    It is a quick approximation of a linear layer that is trained by SGD. Features are standardized,
    so that the penalty has the same effect at every scale; the resulting classifier applies to the
    raw features. The sums are in float64, in blocks of at most some 2^22 numbers or one row, which
    bounds the memory.

    Args:
        features: Frozen features, one row for each cell. A row that is not finite is left out.
        labels: Class of each row, of any integer dtype. A row with a number outside [0, classes) is
            left out, such as -1, or 255 if there are at most 255 classes.
        classes: Number of classes.
        ignore: A class whose rows are left out too; by default none. Rows that are left out may
            hold any features.
        penalty: Ridge penalty, per row.

    Returns:
        The classifier in float32; `(features @ probe.weight + probe.bias).argmax(-1)` predicts the
        classes.

    Raises:
        TypeError: The numbers of features and labels differ.
        ValueError: There is no class, or the penalty is not positive.

    Examples:
        >>> features = torch.tensor([[0.0], [0.1], [0.9], [1.0]])
        >>> probe = fit_linear_probe(features, torch.tensor([0, 0, 1, 1]), classes=2)
        >>> (features @ probe.weight + probe.bias).argmax(-1)
        tensor([0, 0, 1, 1])

    References:
        CrOC, Sec 4.2 (linear segmentation); Hastie et al. 2009, Sec 3.4.1 and 4.2.
    """
    check("probes.fit_linear_probe", "classes", classes, classes >= 1, "1 or more")
    check("probes.fit_linear_probe", "penalty", penalty, penalty > 0, "one above 0")

    labels = labels.long()
    size = block_rows(max(features.shape[1], classes))
    finite = torch.cat([x.isfinite().all(-1) for x in features.split(size)])
    keep = _counted(labels, classes, ignore) & finite
    rows = keep.sum().clamp(min=1)
    parts = list(zip(features.split(size), labels.split(size), keep.split(size), strict=True))

    def block(features: Tensor, keep: Tensor, mean: Tensor) -> Tensor:
        return torch.where(keep[:, None], features.double() - mean, 0.0)

    def one_hot(labels: Tensor, keep: Tensor) -> Tensor:
        target = torch.nn.functional.one_hot(torch.where(keep, labels, 0), classes).double()
        return torch.where(keep[:, None], target, 0.0)

    zero = features.new_zeros(features.shape[1], dtype=torch.double)
    mean = zero
    largest = zero
    for x, _, used in parts:
        kept = block(x, used, zero)
        mean = mean + kept.sum(0) / rows
        largest = torch.maximum(largest, kept.abs().amax(0)) if len(x) else largest

    square = torch.zeros_like(mean)
    for x, _, used in parts:
        square = square + block(x, used, mean).square().sum(0)
    deviation = (square / rows).sqrt()
    deviation = torch.where(deviation > 1e-12 * largest, deviation, torch.inf)  # ignores constants

    counts = features.new_zeros(classes, dtype=torch.double)
    for _, y, used in parts:
        counts = counts + one_hot(y, used).sum(0)
    prior = counts / rows

    gram = penalty * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    product = torch.zeros(len(mean), classes, dtype=mean.dtype, device=mean.device)
    for x, y, used in parts:
        scaled = block(x, used, mean) / deviation
        gram = gram + scaled.mT @ scaled / rows
        product = product + scaled.mT @ (one_hot(y, used) - prior)

    weight = torch.linalg.solve(gram, product / rows) / deviation[:, None]
    return LinearProbe(weight.float(), (prior - mean @ weight).float(), prior.float())


@typed
def linear_segmentation(
    features: Float[Tensor, "n d h w"],
    test_features: Float[Tensor, "m d h w"],
    labels: Integer[Tensor, "n big_h big_w"],
    test_labels: Integer[Tensor, "m big_h big_w"],
    *,
    classes: int,
    ignore: int | None = None,
    stride: int = 4,
    penalty: float = 1e-3,
) -> SegmentationScore:
    """Score frozen feature maps by linear segmentation of held-out images, in closed form.

    The features are resized bilinearly to every `stride`-th pixel of the label maps.
    `fit_linear_probe` is fitted at these pixels, and the held-out images are scored at the same
    pixels. This takes seconds and needs no learning rate. It does not replace the protocol of the
    papers, which train a linear layer by SGD. The resized features of all these pixels are in
    memory at once, `d` numbers for each.

    Args:
        features: Feature maps to fit on. Pixels that a cell takes part in which is not finite are
            left out, here and in the score.
        test_features: Feature maps to score.
        labels: Class maps of the images to fit on, of any size. Pixels with a number outside
            [0, classes) are left out.
        test_labels: Class maps of the images to score.
        classes: Number of classes.
        ignore: A class whose pixels are left out too; by default none.
        stride: Use every `stride`-th pixel of the labels in each direction.
        penalty: As in `fit_linear_probe`.

    Returns:
        The mean IoU over the held-out images, and the mean IoU of predicting the class that is most
        frequent in the images to fit on.

    Raises:
        TypeError: Numbers of images or channels do not match.
        ValueError: The stride is not positive, a map has no cell, or as in `fit_linear_probe`.

    Examples:
        >>> labels = torch.arange(4).repeat(2, 8, 2)
        >>> features = torch.nn.functional.one_hot(labels).movedim(-1, 1).float()
        >>> linear_segmentation(features, features, labels, labels, classes=4, stride=1).miou
        tensor(1.)

    References:
        CrOC, Sec 4.2 (the protocol that this approximates).
    """
    check("probes.linear_segmentation", "stride", stride, stride >= 1, "1 or more")
    check_cells("probes.linear_segmentation", "a map", features.shape[-2:])
    check_cells("probes.linear_segmentation", "a label map", labels.shape[-2:])
    h, w = labels.shape[-2:]
    offset = min(stride, h, w) // 2
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float32, device=features.device)
    points = grid_points(whole, (h, w))
    points = points.unflatten(0, (h, w))[offset::stride, offset::stride].flatten(0, 1)

    def rows(maps: Tensor, targets: Tensor):
        finite = maps.isfinite().all(1, keepdim=True)
        places = points.expand(len(maps), *points.shape)
        sampled = gridsample(torch.where(finite, maps, 0.0), places).flatten(0, 1)
        spoiled = gridsample((~finite).float(), places).flatten() > 0
        targets = targets[:, offset::stride, offset::stride].flatten().long()
        return sampled, torch.where(spoiled, -1, targets)

    sampled, targets = rows(features, labels)
    probe = fit_linear_probe(sampled, targets, classes=classes, ignore=ignore, penalty=penalty)
    frequent = probe.prior.argmax()

    sampled, targets = rows(test_features, test_labels)
    with full_precision(sampled):
        predictions = (sampled.float() @ probe.weight + probe.bias).argmax(-1)
    common = frequent.expand_as(predictions)
    counts = confusion_matrix(targets, predictions, classes=classes, ignore=ignore)
    prior_counts = confusion_matrix(targets, common, classes=classes, ignore=ignore)
    return SegmentationScore(mean_iou(counts), mean_iou(prior_counts))


@typed
def train_linear_probe(
    features: Float[Tensor, "n d h w"],
    labels: Integer[Tensor, "n big_h big_w"],
    *,
    classes: int,
    ignore: int | None = None,
    epochs: int = 25,
    batch: int = 16,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    generator: torch.Generator | None = None,
) -> LinearProbe:
    """Train a linear layer on frozen feature maps by SGD with cross-entropy (linear segmentation).

    The scores are resized bilinearly to the labels. Features are standardized over the cells that a
    counted pixel depends on, like a fixed batch norm without weights, and the learning rate follows
    a cosine. For classification use maps of one cell: `features[..., None, None]` and
    `labels[:, None, None]`.

    Args:
        features: Frozen feature maps. Pixels that depend on a cell which is not finite are not
            counted.
        labels: Class maps of the same images, of any size and of any integer dtype. Pixels with a
            number outside [0, classes) are not counted, such as -1, or 255 if there are at most 255
            classes.
        classes: Number of classes.
        ignore: A class whose pixels are not counted either; by default none. Cells that no counted
            pixel depends on may hold any features.
        epochs: Number of passes over the images.
        batch: Number of images in a step.
        lr: Learning rate at the start.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD, on the weights of the standardized features and on the
            offsets.
        generator: Source of the order of the images, on the CPU.

    Returns:
        The classifier of the raw features (`linear_maps` applies it), in float32.

    Raises:
        ValueError: There is no class, cell, pixel or epoch, the batch is below 1, or the rate, the
            momentum or the weight decay is negative or not finite.

    Examples:
        >>> labels = torch.arange(2).repeat(8, 4, 2)
        >>> maps = torch.nn.functional.one_hot(labels).movedim(-1, 1).float()
        >>> probe = train_linear_probe(maps, labels, classes=2)
        >>> bool((linear_maps(probe, maps).argmax(1) == labels).all())
        True

    References:
        CrOC, Sec 4.2 and Appendix C.
    """
    n, _, h, w = features.shape
    numbers = {"classes": classes, "epochs": epochs, "batch": batch, "the number of maps": n}
    for name, number in numbers.items():
        check("probes.train_linear_probe", name, number, number >= 1, "1 or more")
    for name, number in {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}.items():
        is_right = 0 <= number < math.inf
        check("probes.train_linear_probe", name, number, is_right, "a finite number, 0 or more")
    check_cells("probes.train_linear_probe", "a map", (h, w))
    check_cells("probes.train_linear_probe", "a label map", labels.shape[-2:])
    x = features.detach()
    y = _small_labels(labels, classes, ignore)
    used, mean, scale = _standardize(x, y)
    steps = epochs * -(-len(x) // batch)
    step = 0

    with _gradients(x):
        weight = x.new_zeros(x.shape[1], classes, dtype=torch.float32, requires_grad=True)
        bias = x.new_zeros(classes, dtype=torch.float32, requires_grad=True)
        optimizer = torch.optim.SGD([weight, bias], lr, momentum, weight_decay=weight_decay)
        for _ in range(epochs):
            order = torch.randperm(len(x), generator=generator, device="cpu").to(x.device)
            for rows in order.split(batch):
                optimizer.param_groups[0]["lr"] = cosine_schedule(step, steps, start=lr)
                maps = torch.where(used[rows], (x[rows].float() - mean) * scale, 0.0)
                scores = _resize(_scores(maps, weight, bias), y.shape[-2:])
                target = y[rows].long()
                counted = (target != _IGNORE).sum().clamp(min=1)
                loss = torch.nn.functional.cross_entropy(
                    scores, target, ignore_index=_IGNORE, reduction="sum"
                )

                optimizer.zero_grad()
                (loss / counted).backward()
                optimizer.step()
                step += 1
        weight = weight.detach() * scale[:, :, 0]
        bias = bias.detach() - mean[:, 0, 0] @ weight

    counts = torch.zeros(classes, dtype=torch.long, device=y.device)
    for target in y.split(block_rows(y[0].numel())):
        row = target.flatten().long()
        known = row != _IGNORE
        counts = counts.scatter_add(0, torch.where(known, row, 0), known.long())
    return LinearProbe(weight, bias, counts.float() / counts.sum().clamp(min=1))


@typed
def fit_svm(
    features: Float[Tensor, "n d"],
    targets: Bool[Tensor, "n classes"],
    weights: Float[Tensor, "n classes"] | None = None,
    *,
    cost: float = 1.0,
    iterations: int = 200,
) -> LinearProbe:
    r"""Fit a linear support vector machine for each class, against all other classes.

    `min ||w||^2 / 2 + C sum_i a_i max(0, 1 - y_i (w x_i + b))^2`, where y is 1 if the image
    contains the class and -1 otherwise, and a is the weight of the image for this class. The norm
    includes the offset b, as in LIBLINEAR. An image may contain several classes.
    `average_precision` computes the score. The features are held in float64.

    Args:
        features: Frozen features, one row for each image. Bring them to one scale, for example by
            `l2_normalize`, because the cost depends on it. A row that is not finite is left out.
        targets: True where the image contains the class.
        weights: Weight of each image for each class, 0 or more; by default 1. A weight of 0 leaves
            the image out for this class, such as one where the class is uncertain.
        cost: C, the weight of violated margins.
        iterations: Largest number of L-BFGS steps; the optimization stops earlier when it has
            converged.

    Returns:
        The classifiers, in float32; `features @ svm.weight + svm.bias` are the scores.

    Raises:
        ValueError: The cost or the number of iterations is not positive.

    Examples:
        >>> svm = fit_svm(torch.tensor([[-1.0], [1.0]]), torch.tensor([[False], [True]]))
        >>> (torch.tensor([[-2.0], [2.0]]) @ svm.weight + svm.bias > 0).flatten()
        tensor([False,  True])

    References:
        DUPR, Table 1b; Fan et al. 2008 (LIBLINEAR), Eq 2.
    """
    check("probes.fit_svm", "cost", cost, cost > 0, "one above 0")
    check("probes.fit_svm", "iterations", iterations, iterations >= 1, "1 or more")
    with _gradients(features):
        used = features.isfinite().all(-1, keepdim=True)
        x = torch.where(used, features.detach(), 0.0).double()
        sign = targets.double() * 2 - 1
        share = torch.ones_like(sign) if weights is None else weights.detach().double()
        share = torch.where(used & (share > 0) & share.isfinite(), share, 0.0)
        weight = x.new_zeros(x.shape[1] + 1, targets.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight],
            max_iter=iterations,
            tolerance_grad=1e-9,
            tolerance_change=1e-14,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            optimizer.zero_grad()
            scores = x @ weight[:-1] + weight[-1]
            slack = (1 - sign * scores).clamp(min=0)
            value = weight.square().sum() / 2 + cost * (share * slack.square()).sum()
            value.backward()
            return value

        if weight.numel():
            optimizer.step(objective)
    fitted = weight.detach().float()
    counted = share > 0
    prior = (targets & counted).float().sum(0) / counted.sum(0).clamp(min=1)
    return LinearProbe(fitted[:-1], fitted[-1], prior)


@typed
def linear_maps(
    probe: LinearProbe, features: Float[Tensor, "n d h w"]
) -> Float[Tensor, "n classes h w"]:
    """Compute the class scores of a linear classifier at every cell.

    Args:
        probe: The classifier (`fit_linear_probe`, `train_linear_probe`).
        features: Feature maps.

    Returns:
        Scores, in at least float32.

    Raises:
        TypeError: The channels do not match.

    Examples:
        >>> probe = LinearProbe(torch.eye(2), torch.zeros(2), torch.ones(2) / 2)
        >>> linear_maps(probe, torch.ones(1, 2, 3, 3)).shape
        torch.Size([1, 2, 3, 3])

    References:
        CrOC, Sec 4.2.
    """
    x = widened(features)
    with full_precision(x):
        return _scores(x, probe.weight.to(x), probe.bias.to(x))


@typed
def segmentation_counts(
    scores: Float[Tensor, "n clusters h w"],
    labels: Integer[Tensor, "n big_h big_w"],
    *,
    classes: int | None = None,
    ignore: int | None = None,
) -> Integer[Tensor, "n classes clusters"]:
    """Compare class scores of any size with label maps: one confusion matrix for each image.

    The scores are resized bilinearly to the labels, and the class with the highest score is the
    prediction. The sum of the matrices gives the score of the set, and `bootstrap` gives its
    interval.

    Args:
        scores: Scores of classes or of clusters: one-hot maps, votes, logits.
        labels: Class maps. Pixels with a number outside [0, classes) are not counted, nor are those
            where a score is NaN.
        classes: Number of classes; by default the number of scores.
        ignore: A class that is not counted either, as in `confusion_matrix`.

    Returns:
        Counts, in int64; rows are labels, columns are predictions.

    Raises:
        ValueError: There is no class or no score, or a map has no cell.

    Examples:
        >>> labels = torch.tensor([[[0, 0, 1, 1]]]).expand(2, 4, 4)
        >>> scores = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]]).expand(2, 2, 1, 2)
        >>> segmentation_counts(scores, labels).sum(0)
        tensor([[16,  0],
                [ 0, 16]])

    References:
        CrOC, Sec 4.2; DenseSiam, Sec 4.3 (one matrix over the whole set).
    """
    clusters = scores.shape[1]
    sizes = {"classes": clusters if classes is None else classes, "clusters": clusters}
    where = "probes.segmentation_counts"
    check(where, "the number of scores", clusters, clusters >= 1, "1 or more")
    check(where, "classes", classes, sizes["classes"] >= 1, "1 or more")
    check_cells(where, "a map of scores", scores.shape[-2:])
    check_cells(where, "a label map", labels.shape[-2:])

    counts = []
    # One image at a time: the resized scores of all may not fit the memory.
    for x, y in zip(scores.detach(), labels, strict=True):
        best = _resize(x[None], y.shape)[0].max(0)
        guess = torch.where(best.values.isnan(), -1, best.indices)
        counts.append(confusion_matrix(y, guess, ignore=ignore, **sizes))

    empty = labels.new_zeros(0, *sizes.values(), dtype=torch.long)
    return torch.stack(counts) if counts else empty


@typed
@torch.no_grad()
def probe_scenes(
    encode: Callable[[Tensor], Tensor],
    *,
    count: int = 512,
    size: Size = (64, 64),
    seed: int = 0,
) -> SegmentationScore:
    """Score an encoder by linear segmentation of procedural scenes that it has not seen.

    This is a quick score for demos and for monitoring a training run. A linear classifier is fitted
    in closed form on the frozen features of `count` scenes, and scored on as many other scenes.

    Args:
        encode: A function that maps images `(b, 3, h, w)` in [0, 1] to feature maps `(b, d, h',
            w')`. Put the network into evaluation mode, and normalize the images inside the
            function.
        count: Number of scenes to fit on, and number of scenes to score.
        size: Height and width of the scenes in pixels.
        seed: Seed of both sets of scenes.

    Returns:
        The mean IoU over the classes of the scenes, and that of always predicting the most frequent
        class.

    Examples:
        >>> score = probe_scenes(lambda images: images, count=16)  # raw colors
        >>> bool(score.miou < 0.3)
        True

    References:
        CrOC, Sec 4.2 (linear segmentation, there with SGD).
    """
    rows = []
    for part in (2 * seed, 2 * seed + 1):
        drawn = sample_scenes(count, size, generator=torch.Generator().manual_seed(part))
        maps = [encode(images).float().cpu() for images in drawn.images.split(64)]
        rows.append((torch.cat(maps), drawn.labels))
    (features, labels), (test_features, test_labels) = rows
    return linear_segmentation(
        features, test_features, labels, test_labels, classes=len(SCENE_CLASSES)
    )


@contextlib.contextmanager
def _gradients(x: Tensor) -> Iterator[None]:
    """Enable full precision and gradients, whatever modes the caller has set."""
    full = full_precision(x)
    with torch.inference_mode(False), torch.enable_grad(), full:
        yield


def _counted(labels: Tensor, classes: int, ignore: int | None) -> Tensor:
    counted = (labels >= 0) & (labels < classes)
    return counted if ignore is None else counted & (labels != ignore)


def _small_labels(labels: Tensor, classes: int, ignore: int | None) -> Tensor:
    """Return `_IGNORE` for what is not counted, and few bits: the labels of a large set are many.

    It works in blocks of images, because torch does not compare every integer dtype.
    """
    dtype = torch.int16 if classes <= 2**15 else torch.int64
    small = torch.empty_like(labels, dtype=dtype)
    images = block_rows(labels[0].numel())
    for part, own in zip(labels.split(images), small.split(images), strict=True):
        wide = part.long()
        own.copy_(torch.where(_counted(wide, classes, ignore), wide, _IGNORE))
    return small


def _standardize(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the cells to train on, and their mean and inverse deviation; in blocks of images.

    The labels become `_IGNORE`, in place, where the pixel depends on a cell that is not finite.

    Returns:
        The cells that are finite `(n, 1, h, w)`, and the mean and inverse deviation `(d, 1, 1)` of
        those that a pixel with a label depends on.
    """
    d = x.shape[1]
    size = y.shape[-2:]
    images = block_rows(max(x[0].numel(), y[0].numel()))
    finite = []
    known = []

    for maps, own in zip(x.split(images), y.split(images), strict=True):
        usable = maps.isfinite().all(1, keepdim=True)
        with _gradients(x):
            share = usable.new_ones(usable.shape, dtype=torch.float32, requires_grad=True)
            spread = _resize(share, size)
            spoiled = _resize((~usable).float(), size)[:, 0] > 0
            target = torch.where(spoiled, _IGNORE, own)
            wanted = (target != _IGNORE).float()[:, None]
            (needed,) = torch.autograd.grad(spread, share, wanted)
        own.copy_(target)  # not above, where an inference tensor cannot be written
        finite.append(usable)
        known.append(usable & (needed > 0))

    count = torch.cat(known).sum().clamp(min=1)
    total = torch.zeros(d, dtype=torch.double, device=x.device)
    largest = torch.zeros_like(total)
    for maps, cells in zip(x.split(images), known, strict=True):
        flat = map_to_rows(torch.where(cells, maps, 0.0).double()).flatten(0, 1)
        total = total + flat.sum(0)
        largest = torch.maximum(largest, flat.abs().amax(0))

    mean = total / count
    square = torch.zeros_like(total)
    for maps, cells in zip(x.split(images), known, strict=True):
        flat = map_to_rows(torch.where(cells, maps, 0.0).double()).flatten(0, 1)
        used = map_to_rows(cells).flatten(0, 1)
        square = square + torch.where(used, flat - mean, 0.0).square().sum(0)

    deviation = (square / count).sqrt()
    scale = 1 / torch.where(deviation > 1e-12 * largest, deviation, torch.inf)
    mean = mean.float()[:, None, None]
    scale = scale.float()[:, None, None]
    return torch.cat(finite), mean, scale


def _scores(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # A convolution would round to TF32 on a GPU, and fails without channels.
    return (weight.mT @ maps.flatten(2) + bias[:, None]).unflatten(2, maps.shape[-2:])


def _resize(scores: Tensor, size: torch.Size) -> Tensor:
    if scores.shape[-2:] == size:
        return scores
    most = torch.finfo(torch.float32).max / 4  # in the place of infinity: zero times it is NaN
    bounded = scores.float().clamp(-most, most)
    return torch.nn.functional.interpolate(bounded, tuple(size), mode="bilinear")
