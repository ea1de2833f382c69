"""Nearest neighbors by cosine: votes for classes, nearest rows, retrieval of maps."""

import math
from typing import NamedTuple

import torch
from densekit.metrics import Accuracy, accuracy
from densekit.numerics import (
    check,
    check_temperature,
    full_precision,
    in_range,
    l2_normalize,
    readable,
)
from densekit.typing import Float, Integer, Scalar, Tensor, typed

__all__ = ["Neighbors", "knn_votes", "nearest_maps", "nearest_rows", "object_knn"]

_NUMBERS = 2**27  # of a block of cosines, half a gigabyte in float32


class Neighbors(NamedTuple):
    """The nearest neighbors of each row in a gallery.

    Attributes:
        indices: Indices of the nearest rows, the most similar first; -1 where there is none.
        similarity: Their cosines; NaN where there is none.
    """

    indices: Integer[Tensor, "*batch n k"]
    similarity: Float[Tensor, "*batch n k"]


@typed
def knn_votes(
    features: Float[Tensor, "n d"],
    gallery: Float[Tensor, "m d"],
    gallery_labels: Integer[Tensor, " m"],
    *,
    classes: int,
    k: int = 20,
    temperature: Scalar = 0.07,
    chunk: int | None = None,
) -> Float[Tensor, "n classes"]:
    """Classify each row by a vote of its nearest neighbors in a gallery.

    The k nearest neighbors by cosine vote with the weight `exp(cosine / t)`, divided by the sum of
    the weights. Rows are images (image kNN), objects (`object_knn`), or the cells of feature maps
    (retrieval segmentation, where the votes as maps are scores for `segmentation_counts`).

    Args:
        features: Rows to classify.
        gallery: Rows whose class is known; a row that is not finite has no vote.
        gallery_labels: Their classes; a row whose number is outside [0, classes) has no vote.
        classes: Number of classes.
        k: Number of neighbors that vote; all rows if the gallery has fewer.
        temperature: Divisor of the cosine in a vote.
        chunk: Number of rows that are classified at a time, which bounds the memory to `chunk x m`
            numbers. By default it is chosen for 2^27 numbers (half a gigabyte), and is at least 1.

    Returns:
        Share of the votes for each class, in at least float32. It is zeros for a row that is not
        finite or has no neighbor with a vote.

    Raises:
        TypeError: The shapes do not match.
        ValueError: `classes`, `k` or `chunk` is below 1, or the temperature is not positive.

    Examples:
        >>> gallery, labels = torch.eye(2), torch.tensor([0, 1])
        >>> knn_votes(torch.tensor([[1.0, 0.2]]), gallery, labels, classes=2).argmax(1)
        tensor([0])

    References:
        Wu et al. 2018, Sec 3.4 (weighted vote); D3SSL, Sec 5.3.
    """
    chunk = max(1, _NUMBERS // max(1, len(gallery))) if chunk is None else chunk
    for name, number in {"classes": classes, "k": k, "chunk": chunk}.items():
        check("neighbors.knn_votes", name, number, number >= 1, "1 or more")
    check_temperature("neighbors.knn_votes", temperature)

    known = l2_normalize(gallery)
    known_labels = gallery_labels.long()
    usable = (known_labels >= 0) & (known_labels < classes) & known.isfinite().all(-1)
    known = torch.where(usable[:, None], known, 0.0)
    known_labels = known_labels * usable
    bias = None
    if not readable(usable) or not usable.all():  # to add it takes a pass over all cosines
        bias = torch.where(usable, known.new_zeros(()), -torch.inf)

    shares = []
    for rows in features.split(chunk):
        similarity, indices = _nearest(rows, known, bias, k)
        weights = (similarity / in_range(temperature, similarity.dtype)).softmax(-1)
        weights = torch.where(weights.isnan(), 0.0, weights)  # NaN where nobody votes
        votes = weights.new_zeros(len(rows), classes)
        shares.append(votes.scatter_add(1, known_labels[indices], weights))
    return torch.cat(shares)


def _nearest(rows: Tensor, known: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Return the largest cosines of each row with the known rows, plus a bias, and where."""
    with full_precision(rows):
        unit = l2_normalize(rows).to(known)
        cosine = unit @ known.mT if bias is None else torch.addmm(bias, unit, known.mT)
        values, indices = cosine.topk(min(k, len(known)))
    return values, indices


@typed
def object_knn(
    features: Float[Tensor, "n d"],
    labels: Integer[Tensor, " n"],
    gallery: Float[Tensor, "m d"],
    gallery_labels: Integer[Tensor, " m"],
    *,
    classes: int,
    k: int = 20,
    temperature: Scalar = 0.07,
    chunk: int | None = None,
) -> Accuracy:
    """Classify objects by their nearest neighbors in a gallery, and score the classification.

    The k nearest neighbors by cosine vote (`knn_votes`). The features of an object are the mean of
    RoIAlign of its box. In the disturbed protocol, another image replaces everything outside the
    object's box before encoding: `composite(images, others, boxes_to_mask(boxes, size))`.

    Args:
        features: One row for each object to classify.
        labels: Their classes; an object whose number is outside [0, classes) is not counted.
        gallery: One row for each known object; a row that is not finite has no vote.
        gallery_labels: Their classes; a row whose number is outside [0, classes) has no vote.
        classes: Number of classes.
        k: Number of neighbors that vote; all rows if the gallery has fewer.
        temperature: Divisor of the cosine in a vote.
        chunk: Number of objects that are classified at a time, as in `knn_votes`.

    Returns:
        Overall and macro accuracy, in [0, 1]; 0 if there is no object or no gallery.

    Raises:
        TypeError: The shapes do not match.
        ValueError: As in `knn_votes`.

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
def nearest_rows(
    features: Float[Tensor, "*batch n d"], gallery: Float[Tensor, "*batch m d"], *, k: int = 1
) -> Neighbors:
    """Find the k rows of a gallery that are nearest to each row, by cosine.

    To match the rows of two views, for a loss, use `match_by_feature`. The cosines are computed in
    blocks of at most 2^27 numbers (half a gigabyte), or of one row.

    Args:
        features: Rows to look up; one that is not finite has no neighbor.
        gallery: Rows to search; one that is not finite is no neighbor.
        k: Number of neighbors of each row; all rows of the gallery if there are fewer.

    Returns:
        The k nearest rows by cosine; the index -1 and the cosine NaN where there is none.

    Raises:
        TypeError: The shapes do not match.
        ValueError: `k` is below 1.

    Examples:
        >>> nearest_rows(torch.eye(3)[[2, 0]], torch.eye(3)).indices.T
        tensor([[2, 0]])

    References:
        DUPR, Fig 10.
    """
    check("neighbors.nearest_rows", "k", k, k >= 1, "1 or more")

    lost = ~features.isfinite().all(-1)
    usable = gallery.isfinite().all(-1)
    known = l2_normalize(torch.where(usable[..., None], gallery, 0.0))
    chunk = max(1, _NUMBERS // max(1, math.prod(gallery.shape[:-1])))
    parts = zip(features.split(chunk, -2), lost.split(chunk, -1), strict=True)
    indices = []
    similarity = []

    for rows, missing in parts:
        with full_precision(rows):
            own = l2_normalize(torch.where(missing[..., None], 0.0, rows))
            dtype = torch.promote_types(own.dtype, known.dtype)
            cosine = own.to(dtype) @ known.mT.to(dtype)
        cosine = torch.where(usable[..., None, :], cosine, -torch.inf)
        best = cosine.topk(min(k, known.shape[-2]))
        none = missing[..., None] | (best.values == -torch.inf)
        indices.append(torch.where(none, -1, best.indices))
        similarity.append(torch.where(none, torch.nan, best.values))

    return Neighbors(torch.cat(indices, -2), torch.cat(similarity, -2))


@typed
def nearest_maps(
    features: Float[Tensor, "n d h w"], gallery: Float[Tensor, "m d h w"], *, k: int = 4
) -> Neighbors:
    """Retrieve the images whose feature maps are most similar, position by position.

    The maps are compared without averaging. An image of the same class is therefore far if its
    object has another pose or another position.

    Args:
        features: Maps to look up, such as C5.
        gallery: Maps to search.
        k: Number of neighbors of each map; all maps if there are fewer.

    Returns:
        The k nearest maps by the cosine of whole maps, as in `nearest_rows`.

    Raises:
        TypeError: The shapes do not match.
        ValueError: `k` is below 1.

    Examples:
        >>> maps = torch.rand(5, 8, 7, 7)
        >>> nearest_maps(maps[2:3], maps, k=1).indices
        tensor([[2]])

    References:
        DUPR, Fig 6 and 8.
    """
    check("neighbors.nearest_maps", "k", k, k >= 1, "1 or more")
    return nearest_rows(features.flatten(1), gallery.flatten(1), k=k)
