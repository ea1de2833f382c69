"""How much memory the protocols of evaluate.py take at their peak, from the sizes of a set.

This module is no command. It counts what the first process holds on the CPU after the encoding: the
features of the chosen protocol, and what its fit and its score add. The libraries, the encoder and
the loader come on top. docs/recipes/evaluate.md has the table of three sets.
"""

from typing import NamedTuple

from downstream.protocols import CELLS, GALLERY

COSINES = 2**27  # numbers of a block of cosines, of densekit.neighbors


class Sizes(NamedTuple):
    """The sizes of a set, of its features and of a protocol's options."""

    fit: int  # images to fit on
    test: int  # images to score
    classes: int
    height: int  # cells of a map
    width: int
    channels: int  # of the level that dense protocols read
    pooled: tuple[int, ...] = ()  # channels of each level
    vectors: tuple[int, ...] = ()  # numbers of each level for the SVM
    gallery: int = 0  # objects to fit on
    objects: int = 0  # objects to score
    pixels: int = 0  # of the largest label map
    half: bool = True  # whether half precision holds the features

    @property
    def cells(self) -> int:
        return self.height * self.width

    def maps(self, images: int, size: int | None = None) -> int:
        """Bytes of maps, with numbers of `size` bytes."""
        if size is None:
            size = 2 if self.half else 4
        return images * self.cells * self.channels * size


def peak_bytes(protocol: str, sizes: Sizes) -> int:
    """The bytes that a protocol takes at its peak, with the features that it needs."""
    features = feature_bytes(protocol, sizes)
    return features + max(fit_bytes(protocol, sizes), score_bytes(protocol, sizes))


def feature_bytes(protocol: str, sizes: Sizes) -> int:
    """The bytes of the features of both splits."""
    number = 2 if sizes.half else 4
    images = sizes.fit + sizes.test
    if protocol == "kmeans-seg":
        return sizes.maps(sizes.test)
    if protocol.endswith("-seg"):
        return sizes.maps(images)
    if protocol == "retrieval":
        return sizes.maps(sizes.test)
    if protocol.endswith("object-knn"):
        return (sizes.gallery + sizes.objects) * sizes.channels * 4
    if protocol in ("image-knn", "image-linear"):
        return images * sum(sizes.pooled) * 4
    return images * sum(sizes.vectors) * number


def fit_bytes(protocol: str, sizes: Sizes) -> int:
    """The bytes that the fit adds."""
    if protocol == "linear-seg":
        # The labels at four times the resolution: int16, and copies of them; masks of the cells.
        return sizes.fit * sizes.cells * (16 * 9 + 4)
    if protocol == "ridge-seg":
        return sizes.fit * sizes.cells * 32
    if protocol == "kmeans-seg":
        # All cells in float32, their labels and squared distances.
        return sizes.maps(sizes.test, 4) + sizes.test * sizes.cells * 24
    if protocol == "retrieval":
        # The maps in float32, copied once for their finite rows and once at length one.
        return 4 * sizes.maps(sizes.test, 4)
    if protocol in ("image-svm", "image-linear-map"):
        # One level in float32, and for the SVM in float64, padded with the offset.
        return sizes.fit * max(sizes.vectors) * (28 if protocol == "image-svm" else 4)
    return 0


def score_bytes(protocol: str, sizes: Sizes) -> int:
    """The bytes that the score adds, by the largest blocks in it."""
    if protocol.endswith("-seg"):
        # Class scores of one image at the size of its label map, and the cells of a block.
        scores = 2 * sizes.pixels * sizes.classes * 4
        if protocol == "retrieval-seg":
            gallery = min(GALLERY, sizes.fit * sizes.cells)
            block = min(COSINES, max(CELLS, sizes.cells) * gallery)
            return scores + gallery * sizes.channels * 16 + block * 4
        return scores + CELLS * sizes.channels * 8
    if protocol.endswith("object-knn"):
        rows = sizes.gallery * sizes.channels * 8  # at length one, and where they are finite
        return rows + min(COSINES, sizes.objects * sizes.gallery) * 4
    if protocol == "image-knn":
        rows = sizes.fit * sizes.pooled[-1] * 8
        return rows + min(COSINES, sizes.fit * sizes.test) * 4
    return 0
