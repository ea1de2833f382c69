"""Measures of dense features: confusion matrix, mean IoU, a closed-form linear probe."""

from typing import NamedTuple

import torch

from densekit.typing import Float, Int, Tensor, typed

__all__ = ["LinearProbe", "confusion_matrix", "fit_linear_probe", "mean_iou"]


class LinearProbe(NamedTuple):
    """A linear classifier of features.

    Attributes:
        weight: Weights; `features @ weight + bias` are the class scores.
        bias: Offsets.
    """

    weight: Float[Tensor, "d classes"]
    bias: Float[Tensor, " classes"]


@typed
def confusion_matrix(
    labels: Int[Tensor, "*shape"],
    predictions: Int[Tensor, "*shape"],
    *,
    classes: int,
    ignore: int = 255,
) -> Int[Tensor, "classes classes"]:
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

    Example:
        >>> confusion_matrix(torch.tensor([0, 0, 1, 255]), torch.tensor([0, 1, 1, 1]), classes=2)
        tensor([[1, 1],
                [0, 1]])

    References:
        Long et al. 2015 (FCN), Sec 5.
    """
    if classes < 1:
        raise ValueError(f"densekit.confusion_matrix: classes is {classes}; give one or more.")
    labels, predictions = labels.long().flatten(), predictions.long().flatten()
    keep = (labels != ignore) & (labels >= 0) & (labels < classes)
    keep = keep & (predictions >= 0) & (predictions < classes)
    cell = torch.where(keep, labels * classes + predictions, 0)
    counts = torch.zeros(classes * classes, dtype=torch.long, device=labels.device)
    return counts.scatter_add(0, cell, keep.long()).view(classes, classes)


@typed
def mean_iou(confusion: Int[Tensor, "*batch classes classes"]) -> Float[Tensor, "*batch"]:
    """Mean intersection over union of the classes that occur.

    Args:
        confusion: Counts with labels as rows and predictions as columns.

    Returns:
        The mean over the classes that occur in labels or predictions, in [0, 1]; zero when
        nothing was counted.

    Raises:
        TypeError: The matrix is not square.

    Example:
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
    labels: Int[Tensor, " n"],
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

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [0.9], [1.0]])
        >>> probe = fit_linear_probe(features, torch.tensor([0, 0, 1, 1]), classes=2)
        >>> (features @ probe.weight + probe.bias).argmax(-1)
        tensor([0, 0, 1, 1])

    References:
        CrOC, Sec 4.2 (linear segmentation); Hastie et al. 2009, Sec 3.4.1 and 4.2.
    """
    if classes < 1 or not penalty > 0:
        raise ValueError(
            f"densekit.fit_linear_probe: classes is {classes} and penalty {penalty}; give at least "
            "one class and a penalty above 0."
        )
    labels = labels.long()
    keep = (labels != ignore) & (labels >= 0) & (labels < classes)
    rows = keep.sum().clamp(min=1)
    x = torch.where(keep[:, None], features.double(), 0.0)
    mean = x.sum(0) / rows
    x = torch.where(keep[:, None], x - mean, 0.0)
    deviation = (x.square().sum(0) / rows).sqrt()
    deviation = torch.where(deviation > 0, deviation, 1.0)
    x = x / deviation
    target = torch.nn.functional.one_hot(torch.where(keep, labels, 0), classes).double()
    target = torch.where(keep[:, None], target, 0.0)
    prior = target.sum(0) / rows
    gram = x.mT @ x / rows + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(gram, x.mT @ (target - prior) / rows) / deviation[:, None]
    return LinearProbe(weight.float(), (prior - mean @ weight).float())
