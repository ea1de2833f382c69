"""A score as a paper published it, to compare with its table: known to be wrong."""

import densekit as dk
from densekit.typing import Bool, Integer, Tensor, typed


@typed
def row_permuted_group_scores(
    confusion: Integer[Tensor, "classes classes"],
    assignment: Integer[Tensor, " classes"],
    group: Bool[Tensor, " classes"],
) -> dk.ConfusionScores:
    """The things and stuff scores as published, from a matrix whose rows were moved: wrong.

    The code of PiCIE and DenseSiam moves the row of each label to the number of its cluster.
    The diagonal is then right, so the mean IoU of all classes is, but the group holds the labels
    of arbitrary clusters. To compare with their Tables; `group_scores` is right.

    Args:
        confusion: Counts with labels as rows and clusters as columns, as many as classes.
        assignment: The class of each cluster, one to one (`match_clusters`).
        group: Classes of the group, taken as numbers of clusters.

    Returns:
        Scores as the papers report them.

    Examples:
        >>> confusion, clusters = torch.tensor([[1, 8], [9, 2]]), torch.tensor([1, 0])
        >>> wrong = row_permuted_group_scores(confusion, clusters, torch.tensor([True, False]))
        >>> wrong.pixel_accuracy
        tensor(1.)

    References:
        DenseSiam, Table 3; Cho et al. 2021 (PiCIE), Table 2, and the programs of both.
    """
    return dk.group_scores(confusion[assignment.clamp(min=0)], group)
