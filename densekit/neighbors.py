"""Labels by nearest neighbors, nothing learned: of images, objects and cells; through a video."""

import torch
from densekit.losses import l2_normalize
from densekit.metrics import Accuracy, accuracy
from densekit.typing import Float, Integer, Tensor, typed, widen

__all__ = ["knn_votes", "object_knn", "propagate_labels", "propagate_video"]


@typed
def knn_votes(
    features: Float[Tensor, "n d"],
    gallery: Float[Tensor, "m d"],
    gallery_labels: Integer[Tensor, " m"],
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int | None = None,
) -> Float[Tensor, "n classes"]:
    """Let the nearest neighbors in a gallery vote for the class of each row.

    The k nearest by cosine vote with `exp(cosine / t)`, here divided by the sum of the votes. Rows
    are images (image kNN), objects (`object_knn`), or the cells of feature maps: retrieval
    segmentation, where unflattened votes are the scores of `segmentation_counts`.

    Args:
        features: Rows to classify.
        gallery: Rows whose class is known; one that is not finite has no vote.
        gallery_labels: Their classes; one outside [0, classes) has no vote.
        classes: How many classes there are.
        k: Neighbors that vote; all when the gallery has fewer.
        temperature: Divides the cosine in a vote.
        chunk: Rows classified at a time, which bounds the memory to `chunk x m` numbers; when
            left out as many as make 2^27 numbers (half a gigabyte), one at least.

    Returns:
        Share of the votes for each class, in at least float32; a row that is not finite, or has
        no neighbor with a vote, has zeros.

    Raises:
        TypeError: The shapes do not fit.
        ValueError: `classes`, `k` or `chunk` is below 1, or the temperature is not positive.

    Examples:
        >>> gallery, labels = torch.eye(2), torch.tensor([0, 1])
        >>> knn_votes(torch.tensor([[1.0, 0.2]]), gallery, labels, classes=2).argmax(1)
        tensor([0])

    References:
        Wu et al. 2018, Sec 3.4 (weighted vote); D3SSL, Sec 5.3.
    """
    chunk = max(1, 2**27 // max(1, len(gallery))) if chunk is None else chunk
    if min(classes, k, chunk) < 1 or not temperature > 0:
        raise ValueError(
            f"densekit.neighbors.knn_votes: classes is {classes}, k {k}, chunk {chunk} and "
            f"temperature {temperature}; give at least 1, and a temperature above 0."
        )
    known, k = l2_normalize(gallery), min(k, len(gallery))
    known_labels = gallery_labels.long()
    usable = (known_labels >= 0) & (known_labels < classes) & known.isfinite().all(-1)
    known, known_labels = torch.where(usable[:, None], known, 0.0), known_labels * usable
    bias = torch.where(usable, 0.0, -torch.inf).to(known)
    shares = []
    for rows in features.split(chunk):
        with torch.autocast(features.device.type, enabled=False):
            nearest = torch.addmm(bias, l2_normalize(rows).to(known), known.mT).topk(k)
        weights = (nearest.values / temperature).softmax(-1).nan_to_num()  # no vote: NaN
        votes = weights.new_zeros(len(rows), classes)
        shares.append(votes.scatter_add(1, known_labels[nearest.indices], weights))
    return torch.cat(shares)


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
) -> Accuracy:
    """Classify objects by their nearest neighbors in a gallery.

    The k nearest by cosine vote (`knn_votes`). Features of objects are RoIAlign of their boxes,
    averaged. For the disturbed protocol everything outside an object's box is replaced by another
    image before encoding: `composite(images, others, boxes_to_mask(boxes, size))`.

    Args:
        features: One row an object to classify.
        labels: Their classes; an object with a number outside [0, classes) is not counted.
        gallery: One row for each known object; one that is not finite has no vote.
        gallery_labels: Their classes; one outside [0, classes) has no vote.
        classes: How many classes there are.
        k: Neighbors that vote; all when the gallery has fewer.
        temperature: Divides the cosine in a vote.
        chunk: Objects classified at a time, as in `knn_votes`.

    Returns:
        Overall and macro accuracy, in [0, 1]; 0 without an object or without a gallery.

    Raises:
        TypeError: The shapes do not fit.
        ValueError: As `knn_votes`.

    Examples:
        >>> gallery, labels = torch.eye(2), torch.tensor([0, 1])
        >>> object_knn(gallery, labels, gallery, labels, classes=2).overall
        tensor(1.)

    References:
        D3SSL, Sec 5.3, Table 4; Wu et al. 2018, Sec 3.4 (weighted vote).
    """
    options = {"classes": classes, "k": k, "temperature": temperature, "chunk": chunk}
    votes = knn_votes(features, gallery, gallery_labels, **options)
    best = votes.max(1)
    named = torch.where(best.values > 0, best.indices, -1)
    return accuracy(labels, named, classes=classes)


@typed
def propagate_labels(
    features: Float[Tensor, "d h w"],
    context: Float[Tensor, "t d h w"],
    context_labels: Float[Tensor, "t c h w"],
    *,
    radius: int = 12,
    k: int = 5,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> Float[Tensor, "c h w"]:
    """Carry labels from earlier frames of a video to the next, by nearest neighbors.

    Each cell takes the labels of the k cells of the earlier frames that are most alike, among
    those at most `radius` rows and columns away, weighted by `exp(cosine / t)`.

    Args:
        features: Feature map of the new frame.
        context: Feature maps of t earlier frames.
        context_labels: Their labels: c shares in each cell, such as one-hot objects.
        radius: How far an object may have moved, in cells.
        k: Neighbors to take.
        temperature: Divides the cosine.
        chunk: Cells at a time: bounds the memory to `chunk x t h w` numbers.

    Returns:
        Shares of the new frame, in at least float32.

    Raises:
        TypeError: The shapes do not fit.
        ValueError: There is no earlier frame, `k` or `chunk` is below 1, the radius is negative, or
            the temperature is not positive.

    Examples:
        >>> maps = torch.eye(9).view(1, 9, 3, 3)
        >>> labels = torch.rand(1, 2, 3, 3)
        >>> torch.equal(propagate_labels(maps[0], maps, labels, k=1), labels[0])
        True

    References:
        Caron et al. 2021 (DINO), Sec 4.2.2; Jabri et al. 2020; CrOC, Appendix D.
    """
    t, _, h, w = context.shape
    if min(t, k, chunk) < 1 or radius < 0 or not temperature > 0:
        raise ValueError(
            f"densekit.neighbors.propagate_labels: {t} frames, k={k}, chunk={chunk}, "
            f"radius={radius} and temperature={temperature} came; give 1 or more frames, k and "
            "chunk, a radius from 0, and a temperature above 0."
        )
    with torch.autocast(features.device.type, enabled=False):
        own = l2_normalize(features.flatten(1).mT)
        known = l2_normalize(context.movedim(1, -1).flatten(0, 2)).to(own)
        labels = context_labels.movedim(1, -1).flatten(0, 2).to(own)
        cell = torch.arange(h * w, device=features.device)
        place = torch.stack([cell // max(w, 1), cell % max(w, 1)], -1)
        found = []
        for rows, at in zip(own.split(chunk), place.split(chunk), strict=True):
            far = ((at[:, None] - place).abs() > radius).any(-1).repeat(1, t)
            best = (rows @ known.mT).masked_fill(far, -torch.inf).topk(min(k, t * h * w))
            weights = (best.values / temperature).softmax(-1)
            found.append((weights[..., None] * labels[best.indices]).sum(1))
    return torch.cat(found).mT.unflatten(-1, (h, w))


@typed
def propagate_video(
    features: Float[Tensor, "t d h w"],
    first: Float[Tensor, "c h w"],
    *,
    context: int = 7,
    radius: int = 12,
    k: int = 5,
    temperature: float = 0.1,
) -> Float[Tensor, "t c h w"]:
    """Carry the labels of a video's first frame through all others.

    Each frame is labeled from the first one and the `context` frames before it, by
    `propagate_labels`; nothing is learned.

    Args:
        features: Feature maps of the frames, in order.
        first: Labels of the first frame: c shares in each cell.
        context: Frames before the current one that are used, besides the first.
        radius: As in `propagate_labels`.
        k: As in `propagate_labels`.
        temperature: As in `propagate_labels`.

    Returns:
        Shares of all frames, in at least float32; resize them bilinearly and take the best.

    Raises:
        ValueError: There is no frame, the context is negative, or as `propagate_labels`.

    Examples:
        >>> features = torch.rand(1, 9, 3, 3).expand(4, 9, 3, 3)  # nothing moves
        >>> first = torch.rand(2, 3, 3)
        >>> torch.allclose(propagate_video(features, first, k=1), first.expand(4, 2, 3, 3))
        True

    References:
        Caron et al. 2021 (DINO), Sec 4.2.2 (7 frames, radius 12, the 5 nearest); CrOC, Appendix D.
    """
    if not len(features) or context < 0:
        raise ValueError(
            f"densekit.neighbors.propagate_video: {len(features)} frames and context={context} "
            "came; give a frame or more, and a context of 0 or more."
        )
    labels = [widen(first)]
    for now in range(1, len(features)):
        used = sorted({0, *range(max(0, now - context), now)})
        known = torch.stack([labels[i] for i in used])
        options = {"radius": radius, "k": k, "temperature": temperature}
        labels.append(propagate_labels(features[now], features[used], known, **options))
    return torch.stack(labels)
