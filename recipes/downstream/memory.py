"""How much memory the features of evaluate.py take, from the sizes of a set.

This module is no command. docs/recipes/evaluate.md has the table of three sets, and says what the
fits add.
"""

from typing import NamedTuple


class Sizes(NamedTuple):
    """The sizes of a set and of its features."""

    fit: int  # images to fit on
    test: int  # images to score
    cells: int  # of a map
    channels: int  # of the level that dense protocols read
    pooled: tuple[int, ...] = ()  # channels of each level
    vectors: tuple[int, ...] = ()  # numbers of each level for the SVM
    gallery: int = 0  # objects to fit on
    objects: int = 0  # objects to score
    half: bool = True  # whether half precision holds the maps and the vectors


def feature_bytes(protocol: str, sizes: Sizes) -> int:
    """The bytes of the features of both splits that a protocol needs, without the label maps."""
    number = 2 if sizes.half else 4
    images = sizes.fit + sizes.test
    if protocol in ("kmeans-seg", "retrieval"):  # of the split to score alone
        return sizes.test * sizes.cells * sizes.channels * number
    if protocol.endswith("-seg"):
        return images * sizes.cells * sizes.channels * number
    if protocol.endswith("object-knn"):
        return (sizes.gallery + sizes.objects) * sizes.channels * 4
    if protocol in ("image-knn", "image-linear"):
        return images * sum(sizes.pooled) * 4
    if protocol in ("image-linear-map", "image-svm"):
        return images * sum(sizes.vectors) * number
    raise ValueError(
        f"protocol is {protocol!r}: give one that fits on features of images, objects or cells; "
        "video and the diagnostics keep none."
    )
