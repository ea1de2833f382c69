"""How much memory evaluate.py takes, computed from the sizes of a set.

This module is no command. `python benchmarks/evaluation.py` prints the table of three sets, and
checks it. What is counted is that of the first process, above what it needs for torch and for the
encoder with what this makes of a batch of images.
"""

from typing import NamedTuple

from downstream import diagnose, protocols

BLOCK = diagnose.BLOCK  # the fits of densekit work on as many numbers at a time
STEP = 16  # images of a step of the linear layers
SAMPLE = 256  # cells for each cluster that k-means starts from
PICTURES = 30  # in the figure of retrieval
HISTORY = 2 * 20 + 8  # vectors that the optimizer of the SVM keeps


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
    classes: int = 21
    clusters: int = 0  # of k-means; 0 is one for each class
    pixels: int = 0  # of the largest label map
    image: int = 0  # pixels of an image as the encoder takes it
    batch: int = 32  # images that are encoded at a time
    workers: int = 2
    draws: int = 1000  # of the bootstrap


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


def peak_bytes(protocol: str, sizes: Sizes) -> int:
    """The most bytes that a protocol takes at a time: its features, and what is made of them."""
    fits = {
        "linear-seg": linear_layer_on_cells,
        "ridge-seg": ridge,
        "kmeans-seg": clusters,
        "retrieval-seg": gallery_of_cells,
        "object-knn": neighbors_of_objects,
        "disturbed-object-knn": neighbors_of_objects,
        "image-knn": neighbors_of_images,
        "image-linear": linear_layers,
        "image-linear-map": linear_layers_on_vectors,
        "image-svm": support_vectors,
        "retrieval": cosines_of_images,
    }
    held = feature_bytes(protocol, sizes)
    held_first = feature_bytes(protocol, sizes._replace(test=0, objects=0))
    return max(
        held_first + encoding(protocol, sizes, sizes.fit),
        held + encoding(protocol, sizes, sizes.test),
        held + fits[protocol](sizes),
    )


# ---- what a protocol takes beside its features ---------------------------------------------------
def encoding(protocol: str, sizes: Sizes, images: int) -> int:
    """A batch of images as bytes and as floats, those that wait, and the maps of a batch.

    The batches of a split are of nearly the same size.
    """
    batches = -(-images // sizes.batch)
    batch = -(-images // max(1, batches))
    pixels = batch * 3 * sizes.image
    waiting = 2 * sizes.workers * pixels
    number_in_map = sizes.cells * sizes.channels
    maps = 4 * batch * number_in_map
    if protocol == "object-knn":
        maps += 8 * sizes.batch * number_in_map  # of each object, twice
    elif not protocol.startswith("image"):
        maps += 4 * batch * number_in_map
    # Without loader processes this one counts the pixels of each class.
    reading = 20 * sizes.pixels if protocol.startswith("image") and not sizes.workers else 0
    return waiting + pixels * (1 + 4) + max(pixels, maps, reading)


def scoring(sizes: Sizes, columns: int = 0) -> int:
    """Class scores at the size of the largest label map, and the counts of all images."""
    columns = columns or sizes.classes
    images = max(1, protocols.CELLS // sizes.cells)
    cells = images * sizes.cells * (4 * sizes.channels + 12 * columns)
    # As measured: beside the scores of a pixel some 13 bytes of labels, and 45 bytes at least.
    pixels = sizes.pixels * max(4 * columns + 13, 45)
    counts = sizes.test * sizes.classes * columns * 8
    bootstrap = 20 * min(BLOCK, sizes.draws * max(sizes.test, sizes.classes * columns))
    return max(counts + cells + pixels, 2 * counts + bootstrap)


def linear_layer_on_cells(sizes: Sizes) -> int:
    """Labels of 4 x 4 pixels for each cell, twice, and the scores of a step."""
    pixels = 16 * sizes.cells
    numbers = sizes.cells * sizes.channels
    labels = sizes.fit * (pixels * 4 + sizes.cells * 2)
    block = min(sizes.fit, max(1, BLOCK // max(numbers, pixels))) * numbers
    step = STEP * (numbers * 16 + pixels * (12 * sizes.classes + 24))
    return max(labels + max(26 * block, step), scoring(sizes))


def ridge(sizes: Sizes) -> int:
    """A label of 64 bits for each cell, and blocks in 64 bits."""
    cells = sizes.fit * sizes.cells
    block = min(cells * sizes.channels, BLOCK)
    return max(cells * 14 + block * 24, scoring(sizes))


def clusters(sizes: Sizes) -> int:
    """Labels of 64 bits, the sample that k-means starts from, and blocks."""
    count = sizes.clusters or sizes.classes
    cells = sizes.test * sizes.cells
    sample = min(cells, SAMPLE * count) * sizes.channels * 4
    block = min(cells * max(sizes.channels, count), BLOCK)
    # As measured: 13 bytes for each number of a block, and four copies of the sample.
    return max(cells * 24 + block * 13, sample * 4 + cells * 8, scoring(sizes, count))


def gallery_of_cells(sizes: Sizes) -> int:
    """The labels and the order of all cells to fit on, the gallery, and the votes of some images.

    These have gone when the scores come to the size of the label maps.
    """
    cells = sizes.fit * sizes.cells
    gallery = min(protocols.GALLERY, cells)
    rows = min(sizes.test, max(1, protocols.CELLS // sizes.cells)) * sizes.cells
    found = votes(rows, gallery, sizes) + rows * sizes.channels * 4
    return cells * 18 + gallery * sizes.channels * 4 + max(found, scoring(sizes))


def votes(rows: int, gallery: int, sizes: Sizes) -> int:
    """A copy of a gallery at length one, and a block of cosines."""
    block = min(rows * gallery, diagnose.COSINES)
    copy = gallery * sizes.channels * 4
    return max(2 * copy, copy + 4 * block + rows * sizes.classes * 8)


def neighbors_of_objects(sizes: Sizes) -> int:
    """The votes of all objects, and what is right of each image and class."""
    return max(votes(sizes.objects, sizes.gallery, sizes), accuracies(sizes))


def neighbors_of_images(sizes: Sizes) -> int:
    """The votes of all images, of the last level."""
    last = sizes._replace(channels=sizes.pooled[-1])
    return max(votes(sizes.test, sizes.fit, last), accuracies(sizes))


def accuracies(sizes: Sizes) -> int:
    """What is right of each image and class, in 64 bits, three times."""
    states = sizes.test * sizes.classes * 3
    return states * 3 * 8 + 20 * min(BLOCK, sizes.draws * max(sizes.test, 3 * sizes.classes))


def linear_layers(sizes: Sizes) -> int:
    """Blocks of rows of the largest level in 64 bits."""
    return blocks_of_rows(max(sizes.pooled), sizes)


def linear_layers_on_vectors(sizes: Sizes) -> int:
    """The same on vectors."""
    return blocks_of_rows(max(sizes.vectors), sizes)


def blocks_of_rows(width: int, sizes: Sizes) -> int:
    fit = 26 * min(sizes.fit * width, BLOCK) + STEP * width * 12
    return max(fit, sizes.test * width * 4 + accuracies(sizes))


def support_vectors(sizes: Sizes) -> int:
    """A level at length one in 32 bits, and in 64 bits; the vectors of the optimizer."""
    largest = max(sizes.vectors)
    fit = sizes.fit * largest * (4 + 4 + 8)
    return fit + sizes.test * largest * 4 + HISTORY * largest * sizes.classes * 8


def cosines_of_images(sizes: Sizes) -> int:
    """The cosines of all pairs of images and blocks of columns; then the pictures, three times."""
    numbers = sizes.test * sizes.cells * sizes.channels
    cosines = min(sizes.test**2, diagnose.COSINES) * 4
    found = cosines + 12 * min(numbers, BLOCK)
    pictures = 3 * PICTURES * 3 * 4 * min(sizes.image, diagnose.THUMBNAIL**2)
    return max(found, pictures, accuracies(sizes._replace(classes=1)))
