"""What every public function shows, in one table: a row for each function, a column for each law.

The columns:

* `vmap`: torch.vmap over one axis is the stack of the single results;
* `batched`: leading axes of the arguments are the stack of the single results;
* `compile`: `torch.compile(fullgraph=True)` is eager, gradients too;
* `dynamic`: one graph with dynamic shapes serves a second shape. The first row of a function is
  traced and lowered to operators; the others are traced, and a `slow` test lowers them;
* `gradcheck`, `gradgradcheck`: against finite differences in float64;
* `bfloat16`, `float16`: finite, and close to the float32 result of the same numbers;
* `pure`: no argument is modified;
* `empty`: axes of size 0 give finite results of the right shape;
* `single`: an axis of size 1 is the single result;
* `cuda`: the GPU gives what the CPU gives, where there is one.

A row names the columns that its function cannot pass, each with the reason.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from strategies import flips, uniform
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
import densekit as dk
from densekit import View

COLUMNS = (
    *("vmap", "batched", "compile", "dynamic", "gradcheck", "gradgradcheck"),
    *("bfloat16", "float16", "pure", "empty", "single", "cuda"),
)
GRADIENTS = ("gradcheck", "gradgradcheck")
HALVES = ("bfloat16", "float16")


class Row(NamedTuple):
    """One function under test.

    Attributes:
        name: The public name.
        call: The function with its hyperparameters bound: trees of tensors in and out.
        build: `(batch, n, dtype, generator)` to arguments; n is the size of every free axis.
        smooth: Which arguments the gradient checks move.
        without: Columns that do not apply, and why.
        close: Half precision's allowed distance, in machine epsilons of the largest result.
    """

    name: str
    call: Callable[..., Any]
    build: Callable[..., tuple]
    smooth: tuple[int, ...]
    without: dict[str, str]
    close: float


def row(name, build, smooth=(), *, close=2.0, without=None, call=None, **options):
    call = partial(call or getattr(dk, name), **options)
    reasons = {}
    for columns, reason in (without or {}).items():
        reasons |= dict.fromkeys(columns.split(), reason)
    return Row(name, call, build, smooth, reasons, close)


# --------------------------------------------------------------------------- the arguments


def box(batch, dtype, generator):
    """Boxes that all hold [3, 5] x [3, 5], inside 8 x 8."""
    low = uniform(generator, *batch, 2, high=3)
    return torch.cat([low, uniform(generator, *batch, 2, low=5, high=8)], -1).to(dtype)


def view(batch, dtype, generator):
    corners, flip = box(batch, dtype, generator), flips(generator, *batch)
    return View(corners, flip, flips(generator, *batch))


def at_least_float32(dtype):
    """Views stay in float32 when features are half: a mixed-precision program's dtypes."""
    return torch.promote_types(dtype, torch.float32)


def one_box(batch, n, dtype, generator):
    return (box(batch, dtype, generator),)


def two_boxes(batch, n, dtype, generator):
    return tuple(box(batch, dtype, generator) for _ in range(2))


def some_boxes(batch, n, dtype, generator):
    return (box((*batch, n), dtype, generator),)


def boxes_and_valid(batch, n, dtype, generator):
    return box((*batch, n), dtype, generator), flips(generator, *batch, n)


def boxes_draws_valid(batch, n, dtype, generator):
    draws = uniform(generator, *batch, n, 3, low=0.2, high=0.5)
    return *some_boxes(batch, n, dtype, generator), draws.to(dtype), flips(generator, *batch, n)


def whole_shift(batch, dtype, generator):
    return torch.randint(-2, 3, (*batch, 2), generator=generator).to(dtype)


def boxes_and_shift(batch, n, dtype, generator):
    return *some_boxes(batch, n, dtype, generator), whole_shift(batch, dtype, generator)


def images_and_mask(batch, n, dtype, generator):
    return maps(batch, n, dtype, generator), flips(generator, *batch, 3, 4)


def images_mask_colors(batch, n, dtype, generator):
    colors = uniform(generator, *batch, n).to(dtype)
    return *images_and_mask(batch, n, dtype, generator), colors


def paste(batch, n, dtype, generator):
    images = (maps(batch, n, dtype, generator) for _ in range(2))
    return *images, flips(generator, *batch, 3, 4), whole_shift(batch, dtype, generator)


def two_objects(batch, n, dtype, generator):
    # 4 columns of more than 4 channels would be an image whose channels come last.
    return tuple(maps(batch, n, dtype, generator, (4, 5)) for _ in range(2))


def two_maps_two_boxes(batch, n, dtype, generator):
    # Above zero, so that no cosine is near it.
    features = (uniform(generator, *batch, n, 5, 4, low=0.5).to(dtype) for _ in range(2))
    places = (box(batch, at_least_float32(dtype), generator) / 8 for _ in range(2))
    return *features, *places


def nine_pictures(batch, n, dtype, generator):
    return (maps(batch, n, dtype, generator, (5, 4)),)


def objects_and_gallery(batch, n, dtype, generator):
    counts = 2 * n, 3 * n + 4
    features = [rows(batch, count, dtype, generator) for count in counts]
    labels = [torch.randint(3, (*batch, count), generator=generator) for count in counts]
    return features[0], labels[0], features[1], labels[1]


def one_view(batch, n, dtype, generator):
    return (view(batch, dtype, generator),)


def two_views(batch, n, dtype, generator):
    return tuple(view(batch, dtype, generator) for _ in range(2))


def three_views(batch, n, dtype, generator):
    return (view((*batch, 3), dtype, generator),)


def boxes_and_flips(batch, n, dtype, generator):
    return box(batch, dtype, generator), *flips(generator, 2, *batch)


def view_and_size(batch, n, dtype, generator):
    return view(batch, dtype, generator), torch.randint(6, 10, (*batch, 2), generator=generator)


def boxes_and_size(batch, n, dtype, generator):
    boxes = box(batch, dtype, generator) / 8
    return boxes, torch.randint(6, 10, (*batch, 2), generator=generator)


def matrices_of_views(batch, n, dtype, generator):
    scale = uniform(generator, *batch, 2, low=0.5) * (1 - 2 * flips(generator, *batch, 2).double())
    offset = uniform(generator, *batch, 2, 1, high=8)
    first = torch.cat([torch.diag_embed(scale), offset], -1)
    last = torch.tensor([[0.0, 0.0, 1.0]]).expand(*batch, 1, 3)
    return (torch.cat([first, last], -2).to(dtype),)


def eight_numbers(batch, n, dtype, generator):
    box, *mirrored = view(batch, dtype, generator)
    sides = uniform(generator, *batch, 2, low=8, high=16).to(dtype)
    return (torch.cat([box, sides, torch.stack(mirrored, -1).to(dtype)], -1),)


def view_and_points(batch, n, dtype, generator):
    points = uniform(generator, *batch, n, 2, high=8).to(dtype)
    return view(batch, dtype, generator), points


def view_and_boxes(batch, n, dtype, generator):
    return view(batch, dtype, generator), box((*batch, n), dtype, generator)


def images_and_view(batch, n, dtype, generator):
    images = uniform(generator, *batch, n, 8, 8).to(dtype)
    return images, view(batch, at_least_float32(dtype), generator)


def maps(batch, n, dtype, generator, size=(3, 4)):
    return uniform(generator, *batch, n, *size, low=-1).to(dtype)


def map_and_points(batch, n, dtype, generator):
    points = uniform(generator, *batch, n, 2).to(at_least_float32(dtype))
    return maps(batch, n, dtype, generator), points


def two_maps_and_views(batch, n, dtype, generator):
    features = (maps(batch, n, dtype, generator), maps(batch, n, dtype, generator, (5, 2)))
    return (*features, *two_views(batch, n, at_least_float32(dtype), generator))


def map_and_boxes(batch, n, dtype, generator):
    regions = box((*batch, n), at_least_float32(dtype), generator) / 8
    return maps(batch, n + 1, dtype, generator), regions


def map_boxes_valid(batch, n, dtype, generator):
    return *map_and_boxes(batch, n, dtype, generator), flips(generator, *batch, n)


def hard_choice(batch, n, dtype, generator):
    candidates = uniform(generator, *batch, 2 * n, 2).to(dtype)
    # Whole numbers, all different: no ties in any dtype.
    order = torch.rand(*batch, 2 * n, generator=generator).argsort(-1).to(dtype)
    return candidates, order, uniform(generator, *batch, n, 2).to(dtype)


def rows(batch, n, dtype, generator, d=4):
    return uniform(generator, *batch, n, d, low=-1).to(dtype)


def one_set(batch, n, dtype, generator):
    return (rows(batch, n, dtype, generator),)


def rows_of_a_map(batch, n, dtype, generator):
    return (rows(batch, 12, dtype, generator, n),)


def rows_and_valid(batch, n, dtype, generator):
    return rows(batch, n, dtype, generator), flips(generator, *batch, n)


def rows_and_prototypes(batch, n, dtype, generator):
    return (uniform(generator, *batch, n, n + 1, low=-1).to(dtype),)


def rows_and_columns(batch, n, dtype, generator):
    return tuple(rows(batch, count, dtype, generator) for count in (n, n + 1))


def pair_and_valid(batch, n, dtype, generator):
    pair = (rows(batch, n, dtype, generator) for _ in range(2))
    return *pair, flips(generator, *batch, n)


def sets_of_three(batch, n, dtype, generator):
    pair = (rows(batch, n, dtype, generator) for _ in range(2))
    return *pair, rows(batch, n + 1, dtype, generator), flips(generator, *batch, n)


def sets_and_allowed(batch, n, dtype, generator):
    return *sets_of_three(batch, n, dtype, generator), flips(generator, *batch, n, n + 1)


def some_values(batch, n, dtype, generator):
    return (uniform(generator, *batch, n, low=-1).to(dtype),)


def pair_negatives_valid(batch, n, dtype, generator):
    query, key, valid = pair_and_valid(batch, n, dtype, generator)
    return query, key, rows(batch, n + 1, dtype, generator), valid


def masked_negatives(batch, n, dtype, generator):
    query, key, valid = pair_and_valid(batch, n, dtype, generator)
    known = flips(generator, *batch, n + 1)
    return query, key, dk.Negatives(rows(batch, n + 1, dtype, generator), known), valid


def used_bank(batch, n, dtype, generator):
    """Any rows, the oldest anywhere; whether they are filled is left to chance."""
    cursor, filled = (torch.randint(5, batch, generator=generator) for _ in range(2))
    return (dk.Bank(rows(batch, 5, dtype, generator), cursor, filled),)


def bank_and_keys(batch, n, dtype, generator):
    bank = used_bank(batch, n, dtype, generator)
    return *bank, rows(batch, 2 * n, dtype, generator), flips(generator, *batch, 2 * n)


def keys_to_draw(batch, n, dtype, generator):
    return (rows(batch, n + 2, dtype, generator),)


def rows_and_order(batch, n, dtype, generator):
    return rows(batch, n, dtype, generator), torch.rand(*batch, n, generator=generator).argsort(-1)


def rows_and_indices(batch, n, dtype, generator):
    indices = torch.randint(-1, n + 1, (*batch, n + 1), generator=generator)
    return rows(batch, n, dtype, generator), indices


def students_and_teachers(batch, n, dtype, generator):
    return tuple(tuple(rows(batch, n, dtype, generator) for _ in range(2)) for _ in range(2))


def features_masks_valid(batch, n, dtype, generator):
    masks = uniform(generator, *batch, n, n + 1).to(dtype)
    return rows(batch, n, dtype, generator), masks, flips(generator, *batch, n)


def values_and_valid(batch, n, dtype, generator):
    return uniform(generator, *batch, n).to(dtype), flips(generator, *batch, n)


def image_sizes(batch, n, dtype, generator):
    return (torch.randint(1, 9, (*batch, 2), generator=generator),)


def labels_and_predictions(batch, n, dtype, generator):
    return tuple(torch.randint(0, 4, (*batch, n), generator=generator) for _ in range(2))


def confusion(batch, n, dtype, generator):
    return (torch.randint(0, 9, (*batch, n, n), generator=generator),)


def scores_and_targets(batch, n, dtype, generator):
    # Whole numbers, all different: no ties in any dtype.
    order = torch.rand(*batch, 2 * n, 3, generator=generator).argsort(-2).to(dtype)
    return order, flips(generator, *batch, 2 * n, 3)


def confusions_of_images(batch, n, dtype, generator):
    return (torch.randint(0, 9, (*batch, 5, n, n), generator=generator),)


def two_masks(batch, n, dtype, generator):
    return tuple(flips(generator, *batch, n, 5) for _ in range(2))


def features_and_labels(batch, n, dtype, generator):
    labels = torch.randint(0, 4, (*batch, 4 * n), generator=generator)
    return rows(batch, 4 * n, dtype, generator), labels


def segmentation(batch, n, dtype, generator):
    features = (maps((*batch, n), 4, dtype, generator) for _ in range(2))
    labels = (torch.randint(0, 4, (*batch, n, 7, 8), generator=generator) for _ in range(2))
    return *features, *labels


def maps_and_labels(batch, n, dtype, generator):
    labels = torch.randint(0, 4, (*batch, n + 1, 6, 8), generator=generator)
    return maps((*batch, n + 1), n, dtype, generator), labels


def scores_and_labels(batch, n, dtype, generator):
    labels = torch.randint(0, 4, (*batch, n, 6, 8), generator=generator)
    return maps((*batch, n), 4, dtype, generator), labels


def features_and_targets(batch, n, dtype, generator):
    return rows(batch, 4 * n, dtype, generator), flips(generator, *batch, 4 * n, 3)


def probe_and_maps(batch, n, dtype, generator):
    weight, bias = rows(batch, 4, dtype, generator, 3), uniform(generator, *batch, 3).to(dtype)
    return dk.LinearProbe(weight, bias, bias), maps((*batch, n), 4, dtype, generator)


def frames_and_labels(batch, n, dtype, generator):
    features, *context = (maps((*batch, k), 2, dtype, generator) for k in (1, 2))
    return features[..., 0, :, :, :], *context, maps((*batch, 2), n, dtype, generator)


def video_and_labels(batch, n, dtype, generator):
    return maps((*batch, 3), 2, dtype, generator), maps(batch, n, dtype, generator)


def maps_and_gallery(batch, n, dtype, generator):
    return tuple(maps((*batch, count), 2, dtype, generator) for count in (n, n + 1))


def map_set(batch, n, dtype, generator):
    return (maps((*batch, n), 4, dtype, generator),)


def costs_and_marginals(batch, n, dtype, generator):
    shapes = (n, n + 1), (n,), (n + 1,)
    return tuple(uniform(generator, *batch, *shape, low=0.5).to(dtype) for shape in shapes)


def two_point_sets(batch, n, dtype, generator):
    sizes = n, n + 1
    return tuple(uniform(generator, *batch, size, 2, high=8).to(dtype) for size in sizes)


def clustering(batch, n, dtype, generator):
    """Two directions, exact in half precision, so that no rounding changes a choice."""
    count = 4 * max(n, 1)
    kinds = torch.tensor([[4, 0, 0, 1], [0, 4, 1, 0], [0, 1, 4, 0], [1, 0, 0, 4]])
    tokens = kinds.repeat(max(n, 1), 1) + torch.arange(count)[:, None] % 7 / 4
    places = torch.arange(2 * count).view(count, 2) % 5
    start = torch.tensor([0, 1, 2, 3])
    shift = torch.randint(4, (*batch, 1, 1), generator=generator)
    tokens = (tokens + shift).to(dtype)
    weights = torch.ones(*batch, count, dtype=dtype)
    return tokens, places.to(dtype).expand(*batch, count, 2), weights, start.expand(*batch, 4)


def joint_assignments(batch, n, dtype, generator):
    return (uniform(generator, *batch, 2 * n, n + 1, low=0.1).to(dtype),)


def view_assignments(batch, n, dtype, generator):
    return (uniform(generator, *batch, 2, n, n + 1).to(dtype),)


def weights_to_draw(batch, n, dtype, generator):
    return (uniform(generator, *batch, n + 2).to(dtype),)


def points_to_draw(batch, n, dtype, generator):
    return (rows(batch, n + 1, dtype, generator),)


def points_and_start(batch, n, dtype, generator):
    # Whole numbers on both sides of a gap: no distance is a tie.
    points = torch.randint(8, (*batch, 2 * n, 2), generator=generator).to(dtype)
    points[..., n:, :] += 32
    start = torch.tensor([[1.0, 2.0], [36.0, 35.0]], dtype=dtype).expand(*batch, 2, 2)
    return points, start, flips(generator, *batch, 2 * n)


def points_and_centroids(batch, n, dtype, generator):
    points, centers, _ = points_and_start(batch, n, dtype, generator)
    return points, centers


def nothing(batch, n, dtype, generator):
    return ()


# -------------------------------------------------------------------------------- the table

TRUTH = {"gradcheck gradgradcheck": "true or false has no gradient"}
COUNTS = {
    "gradcheck gradgradcheck": "counts have no gradient",
    "bfloat16 float16": "counts are whole numbers",
}
DRAWS = {
    "vmap": "random: torch asks of vmap whether the copies share their draws",
    "batched": "random: a batch is drawn in one go, with other numbers than one by one",
    "cuda": "random: each device has its own stream of numbers",
}
SYMBOLIC = {"dynamic": "random: torch.rand takes no symbolic size beside `generator=None`"}
SIZES = {
    "gradcheck gradgradcheck": "takes whole numbers, the sizes of images",
    "bfloat16 float16": "takes whole numbers, the sizes of images",
}
VIEWS_DRAWN = DRAWS | SIZES
NUMBERS = {
    " ".join(COLUMNS): "takes and gives Python numbers: there is no tensor to stack, move or change"
}
ONE_SET = {"batched": "one result for all the data together: there are no leading axes"}
SINGLE_SET = ONE_SET | {"single": "one result for all the data together: there are no leading axes"}
SCENES = {" ".join(COLUMNS): "takes Python numbers: tests/test_scenes.py"}
ENCODER = {" ".join(COLUMNS): "takes a function and calls it: tests/test_probes.py"}
MODULES = {" ".join(COLUMNS): "takes modules and changes one: tests/test_ema.py"}
HOOKS = {" ".join(COLUMNS): "takes a module and calls it: tests/test_diagnostics.py"}
ONE_BANK = {"batched single": "one bank for all keys: its record has no leading axes"}
ROWS_OF_ALL = {"batched single": "the first axis is the batch that it permutes"}
DETACHED = {"gradcheck gradgradcheck": "no gradient flows"}
COLORS = {"batched single": "the colors are those of all images: they have no leading axes"}
MASKS = {
    "gradcheck gradgradcheck": "masks have no gradient",
    "bfloat16 float16": "takes true or false",
}
RAISES = {" ".join(COLUMNS): "reads values, and raises or gives nothing: tests/test_views.py"}
ADAPTS = {" ".join(COLUMNS): "takes or gives Python numbers: tests/test_adapters.py"}
RECORDS = {" ".join(COLUMNS): "gives Python numbers and text: tests/test_metrics.py"}
TRAINS = {
    "vmap": "it takes its own backward passes, where the losses of all copies would be needed",
    "compile dynamic": "it takes its own backward passes: a graph cannot hold them",
}
NETWORK = {"dynamic": "the network is made for the number of values: it is compiled for it"}
STRUCTURE = {
    "compile dynamic": "k-means of each group makes a graph of thousands of operations",
    "empty": "raises without a token, as k-means does",
    "bfloat16 float16": "a rounding changes the clusters that k-means finds",
}
WEIGHTS = {"gradcheck gradgradcheck": "the result is float32, too coarse for finite differences"}


def cutout(boxes, draws, valid):
    return dk.proposal_cutout(boxes, draws, (8, 7), valid)


def boxes_drawn(boxes, valid):
    return dk.sample_boxes(boxes, 4, valid)


def mask_of_boxes(boxes, valid):
    return dk.boxes_to_mask(boxes, (8, 7), valid)


def fill_colors(images, mask, colors):
    return dk.fill_mask(images, mask, fill=colors)


def shift_drawn(boxes, valid):
    return dk.sample_shift(boxes, (9, 8), valid)


def merged(confusion):
    clusters = torch.arange(confusion.shape[-1], device=confusion.device)
    return dk.merge_clusters(confusion, clusters - 1)  # the first has no class


def every_second(confusion):
    return torch.arange(confusion.shape[-2], device=confusion.device) % 2 == 0


def scores_of_a_group(confusion):
    return dk.group_scores(confusion, every_second(confusion))


def moved_axis(view, to_front):
    """The last axis of some views in front, or the first one behind."""
    sources = {"box": -2, "flip": -1, "vertical_flip": -1}
    moves = [(k, 0) if to_front else (0, k) for k in sources.values()]
    return View(*(x.movedim(*move) for x, move in zip(view, moves, strict=True)))


def stacked(view1, view2):
    return moved_axis(dk.stack_views([view1, view2]), to_front=False)


def unstacked(views):
    return dk.unstack_views(moved_axis(views, to_front=True))


def paired(views):
    pairs = dk.pair_views(moved_axis(views, to_front=True), anchors=2)
    both = [moved_axis(view, to_front=False) for view in (pairs.view1, pairs.view2)]
    return *both, pairs.valid.movedim(0, -1)


def sent(view):
    return dk.views_to(view, view.box.device)


def center(teacher):
    dtype = at_least_float32(teacher.dtype)
    return torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=dtype, device=teacher.device)


def votes(features, labels, gallery, gallery_labels):
    return dk.knn_votes(features, gallery, gallery_labels, classes=3, k=3, temperature=0.5)


TABLE = [
    row("box_area", one_box, (0,)),
    row("box_iou", two_boxes, (0, 1)),
    row("boxes_valid", one_box, without=TRUTH),
    row("intersect_boxes", two_boxes, (0, 1)),
    row("box_containment", two_boxes, (0, 1)),
    row("clip_boxes", one_box, (0,), size=(7, 6)),
    # The boxes are 2 to 8 pixels wide: some belong to the canonical level, some below.
    row(
        "assign_levels",
        one_box,
        levels=(2, 4),
        canonical_size=5.0,
        canonical_level=3,
        without={"gradcheck gradgradcheck": "levels are whole numbers"},
    ),
    row("sample_boxes", some_boxes, (0,), count=2, without=DRAWS | SYMBOLIC),
    row("sample_boxes", boxes_and_valid, (0,), call=boxes_drawn, without=DRAWS | SYMBOLIC),
    row("sample_boxes_at_iou", one_box, (0,), iou=0.4, without=DRAWS | SYMBOLIC),
    row("roi_align", map_and_boxes, (0, 1), size=(3, 2)),
    row("roi_align", map_and_boxes, (0, 1), size=(1, 2), sampling_ratio=0),
    row(
        "roi_align",
        map_boxes_valid,
        (0, 1),
        call=lambda features, boxes, valid: dk.roi_align(features, boxes, 2, valid),
    ),
    row("boxes_image_to_view", view_and_boxes, (0, 1), close=8),
    row("boxes_view_to_image", view_and_boxes, (0, 1)),
    row("image_to_view", view_and_points, (0, 1), close=8),
    row("view_to_image", view_and_points, (0, 1)),
    row("boxes_in_view", view_and_boxes, (0, 1), min_share=0.5, close=8),
    row("intersect_views", two_views, (0, 1), close=8),
    row("coordinate_map", one_view, (0,), size=(2, 3)),
    row("crop_views", images_and_view, (0, 1), size=(3, 5)),
    row("crop_views", images_and_view, (0, 1), size=(3, 5), interpolation="bicubic", close=4),
    row(
        "full_view",
        nothing,
        size=(3, 5),
        batch=(2,),
        without={
            "vmap batched single empty": "takes a size and batch in Python numbers",
            "pure": "takes no tensor",
            "gradcheck gradgradcheck": "takes no tensor",
            "bfloat16 float16": "takes no tensor; the result is float32",
            "cuda": "takes no tensor; `device` says where",
        },
    ),
    row("full_view", image_sizes, without=SIZES),
    row("view_from_xywh", boxes_and_flips, (0,)),
    row("view_from_relative", boxes_and_size, (0,)),
    row("view_from_relative", one_box, (0,), size=(7, 9)),
    row("views_valid", view_and_size, without=TRUTH),
    row("check_views", nothing, without=RAISES),
    row("stack_views", two_views, (0, 1), call=stacked),
    row("unstack_views", three_views, (0,), call=unstacked),
    row("index_views", three_views, (0,), index=(..., slice(None, None, 2))),
    row("views_to", one_view, (0,), call=sent),
    row("pair_views", three_views, (0,), call=paired),
    row("view_from_matrix", matrices_of_views, (0,), size=(6, 5), pixel_centers="integer"),
    row("view_to_matrix", one_view, (0,), size=(6, 5), pixel_centers="half"),
    row("view_from_kornia", matrices_of_views, (0,), size=(6, 5)),
    row("view_to_kornia", one_view, (0,), size=(6, 5)),
    row("view_from_lightly_train", eight_numbers, (0,)),
    row("view_to_lightly_train", one_view, (0,), size=(6, 5)),
    row("view_from_torchvision", nothing, without=ADAPTS),
    row("view_to_torchvision", nothing, without=ADAPTS),
    row("view_from_albumentations", nothing, without=ADAPTS),
    row("view_to_albumentations", nothing, without=ADAPTS),
    row("sample_views", image_sizes, without=VIEWS_DRAWN),
    row("sample_inner_views", one_view, without=DRAWS | DETACHED),
    row(
        "sample_view_pairs",
        image_sizes,
        min_overlap=0.3,
        attempts=3,
        without=VIEWS_DRAWN | SYMBOLIC,
    ),
    row("grid_points", one_box, (0,), size=(2, 3)),
    row("grid_pairs", two_views, (0, 1), size=2, close=8),
    row("sample_points", one_box, (0,), count=3, without=DRAWS | SYMBOLIC),
    row("hard_points", hard_choice, (0, 2), beta=0.5),
    row("gridsample", map_and_points, (0, 1)),
    row("gridsample_pairs", two_maps_and_views, (0, 1, 2, 3), size=2),
    row("patch_pairs", two_maps_and_views, (0, 1, 2, 3), size=2),
    row("sample_jittered_boxes", some_boxes, (0,), without=DRAWS | SYMBOLIC),
    row("sample_inner_boxes", some_boxes, (0,), without=DRAWS | SYMBOLIC),
    row("sample_cutout", some_boxes, without=DRAWS | SYMBOLIC | DETACHED),
    row(
        "proposal_cutout",
        boxes_draws_valid,
        (0, 1),
        call=cutout,
        without={"dynamic": "boxes are cut one after the other: it is compiled for their number"},
    ),
    row("sample_surrounding_boxes", some_boxes, (0,), without=DRAWS | SYMBOLIC),
    row("boxes_to_mask", boxes_and_valid, call=mask_of_boxes, without=TRUTH),
    row("fill_mask", images_and_mask, (0,), fill=0.5),
    row("fill_mask", images_mask_colors, (0, 2), call=fill_colors, without=COLORS),
    row("sample_shift", boxes_and_valid, call=shift_drawn, without=DRAWS | SYMBOLIC | DETACHED),
    row("shift_boxes", boxes_and_shift, (0, 1)),
    row("composite", paste, (0, 1)),
    row("pool_masks", features_masks_valid, (0, 1)),
    row("pool_masks", features_masks_valid, (0, 1), average=True),
    row(
        "masked_mean",
        values_and_valid,
        (0,),
        without={"batched": "the mean over all the axes together is what it is for"},
    ),
    row("l2_normalize", one_set, (0,)),
    row("map_to_rows", nine_pictures, (0,)),
    row("rows_to_map", rows_of_a_map, (0,), size=(3, 4)),
    row("widen", one_set, (0,)),
    # The teacher is detached: its finite differences are not zero, its gradient is none.
    row("negative_cosine", pair_and_valid, (0,), reduction="none"),
    row("cross_entropy_similarity", pair_and_valid, (0,), reduction="none"),
    row(
        "symmetric_loss",
        students_and_teachers,
        (0,),
        call=partial(dk.symmetric_loss, dk.negative_cosine, reduction="none"),
    ),
    row(
        "info_nce",
        pair_and_valid,
        (0, 1),
        call=lambda q, k, valid: dk.info_nce(q, k, None, valid, temperature=0.5, reduction="none"),
    ),
    row("info_nce", pair_negatives_valid, (0, 1, 2), temperature=0.5, reduction="none"),
    row("info_nce", masked_negatives, (0, 1, 2), temperature=0.5, reduction="none"),
    row("kernel_alignment", pair_and_valid, (0,), reduction="none", close=8),
    row(
        "kernel_alignment",
        lambda *arguments: pair_and_valid(*arguments)[:2],
        (0,),
        unit=True,
        reduction="none",
        close=8,
    ),
    row("mutual_information_loss", pair_and_valid, (0, 1), reduction="none", close=4),
    row("gram_loss", pair_and_valid, (0,), reduction="none", close=4),
    row("gram_loss", pair_and_valid, (0,), clip_negative=True, reduction="none", close=4),
    row(
        "neighbor_order_loss",
        sets_of_three,
        (0,),
        steepness=3.0,
        reduction="none",
        without=NETWORK,
        close=4,
    ),
    row(
        "neighbor_order_loss",
        sets_of_three,
        (0,),
        steepness=2.0,
        teacher_steepness=4.0,
        metric="euclidean",
        network="odd_even",
        reduction="none",
        without=NETWORK,
        close=4,
    ),
    row("neighbor_distribution_loss", sets_and_allowed, (0,), reduction="none", close=4),
    row("soft_sort", some_values, (0,), steepness=3.0, without=NETWORK),
    row("soft_sort", some_values, (0,), steepness=3.0, network="odd_even", without=NETWORK),
    row(
        "info_nce",
        masked_negatives,
        (0, 1, 2),
        temperature=0.5,
        reduction="none",
        normalized=True,
    ),
    row("variance_covariance", one_set, (0,)),
    row(
        "variance_covariance",
        rows_and_valid,
        (0,),
        call=lambda x, valid: dk.variance_covariance(x, valid, target=2.0, epsilon=0.1),
    ),
    row(
        "init_bank",
        nothing,
        size=3,
        dim=2,
        without={
            "vmap batched single empty": "takes a size and length in Python numbers",
            "pure": "takes no tensor",
            "gradcheck gradgradcheck": "takes no tensor",
            "bfloat16 float16": "takes no tensor; `dtype` says of what",
            "cuda": "takes no tensor; `device` says where",
        },
    ),
    row("push_to_bank", bank_and_keys, without=DETACHED | ONE_BANK),
    row("bank_negatives", used_bank, (0,), without=ONE_BANK),
    row("sample_keys", keys_to_draw, (0,), count=2, without=DRAWS | SYMBOLIC),
    row(
        "self_distillation",
        pair_and_valid,
        (0,),
        call=lambda s, t, valid: dk.self_distillation(
            s,
            t,
            center(t).to(s),
            valid,
            student_temperature=0.5,
            teacher_temperature=0.25,
            reduction="none",
        ),
    ),
    row(
        "update_center",
        lambda *arguments: pair_and_valid(*arguments)[1:],
        call=lambda t, valid: dk.update_center(center(t), t, valid),
        without=DETACHED | {"batched": "the mean over all the axes together is what it is for"},
    ),
    row("sinkhorn", costs_and_marginals, (0, 1, 2), reg=0.5, iterations=3, close=4),
    row("swav_codes", rows_and_prototypes, epsilon=0.5, without=DETACHED, close=4),
    row("positional_cost", two_point_sets, (0, 1), close=4),
    row("sample_tokens", weights_to_draw, count=2, without=DRAWS | SYMBOLIC | DETACHED),
    row("sinkhorn_merge", clustering, without=DETACHED, close=8),
    row(
        "sinkhorn_merge",
        clustering,
        similarity="dot",
        merge="mass",
        choose_by="semantic",
        position_weight=torch.inf,
        max_clusters=3,
        reg=0.02,
        iterations=2,  # a longer loop has a larger graph, and the first row shows it
        without=DETACHED,
        close=8,
    ),
    row(
        "sinkhorn_merge",
        clustering,
        cost_range="batch",
        iterations=2,
        close=8,
        without=DETACHED
        | {"vmap batched single": "the range of the whole batch is what it asks for"},
    ),
    row("split_assignments", joint_assignments, (0,)),
    row("split_assignments", joint_assignments, (0,), normalize="columns"),
    row("prune_clusters", view_assignments, (0,)),
    row("kmeans_plus_plus", points_to_draw, count=2, without=DRAWS | SYMBOLIC | DETACHED),
    row("kmeans", points_and_start, iterations=3, without=DETACHED),
    row(
        "minibatch_kmeans",
        points_to_draw,
        clusters=2,
        steps=3,
        batch=4,
        sample=2,
        without=DRAWS
        | DETACHED
        | SINGLE_SET
        | {"compile dynamic": "it draws a seed, a number that a graph cannot hold"},
    ),
    row("nearest_centroids", points_and_centroids, without=DETACHED),
    # Without a group; over processes: tests/test_distributed.py.
    row("all_gather", one_set, (0,)),
    row("all_max", one_set, (0,)),
    row("all_mean", one_set, (0,)),
    row("all_sum", one_set, (0,)),
    row("shuffle_batch", rows_and_order, (0,), without=ROWS_OF_ALL),
    row("unshuffle_batch", rows_and_order, (0,), without=ROWS_OF_ALL),
    row("ema_update", nothing, without=MODULES),
    row(
        "confusion_matrix",
        labels_and_predictions,
        classes=4,
        without=COUNTS | {"batched": "the counts of all the axes together are what it is for"},
    ),
    row(
        "confusion_matrix",
        labels_and_predictions,
        classes=3,
        clusters=5,
        without=COUNTS | {"batched": "the counts of all the axes together are what it is for"},
    ),
    row("confusion_scores", confusion, without=COUNTS),
    row("mean_iou", confusion, without=COUNTS),
    row(
        "match_clusters",
        confusion,
        without=COUNTS | SINGLE_SET | {"vmap compile dynamic": "the assignment is scipy's"},
    ),
    row("match_clusters", confusion, many_to_one=True, by="iou", without=COUNTS | SINGLE_SET),
    # One assignment, one group, for all matrices.
    row("merge_clusters", confusion, call=merged, without=COUNTS),
    row("group_scores", confusion, call=scores_of_a_group, without=COUNTS),
    row("accuracy", labels_and_predictions, classes=3, without=COUNTS | SINGLE_SET),
    row(
        "average_precision",
        scores_and_targets,
        without=SINGLE_SET | {"gradcheck gradgradcheck": "only the order of the scores counts"},
    ),
    row(
        "average_precision",
        scores_and_targets,
        points=11,
        without=SINGLE_SET | {"gradcheck gradgradcheck": "only the order of the scores counts"},
    ),
    row("region_similarity", two_masks, without=MASKS),
    row(
        "boundary_f_measure",
        two_masks,
        tolerance=0.2,
        without=MASKS
        | {"dynamic": "its reach in pixels is a number: it is compiled for the size of the masks"},
    ),
    row(
        "bootstrap",
        confusions_of_images,
        call=lambda states: dk.bootstrap(states, dk.mean_iou, draws=7),
        without=COUNTS | SINGLE_SET | DRAWS | SYMBOLIC,
    ),
    row("sample_scenes", nothing, without=SCENES),
    row("probe_scenes", nothing, without=ENCODER),
    row("as_dict", nothing, without=RECORDS),
    row("as_table", nothing, without=RECORDS),
    row("fit_linear_probe", features_and_labels, classes=4, without=SINGLE_SET | WEIGHTS),
    row(
        "linear_segmentation",
        segmentation,
        classes=4,
        stride=2,
        without=SINGLE_SET | {"gradcheck gradgradcheck": "the best class has no gradient"},
    ),
    row(
        "train_linear_probe",
        maps_and_labels,
        classes=4,
        epochs=2,
        batch=2,
        without=SINGLE_SET | WEIGHTS | TRAINS,
    ),
    row("fit_svm", features_and_targets, without=SINGLE_SET | WEIGHTS | TRAINS),
    row("linear_maps", probe_and_maps, (0, 1), without=SINGLE_SET),
    row(
        "segmentation_counts",
        scores_and_labels,
        without=SINGLE_SET
        | {
            "gradcheck gradgradcheck": "counts have no gradient",
            "dynamic": "images are counted one after the other: it is compiled for their number",
        },
    ),
    row("knn_votes", objects_and_gallery, (0, 2), call=votes, without=SINGLE_SET),
    row(
        "propagate_labels",
        frames_and_labels,
        (0, 1, 2),
        radius=1,
        k=3,
        temperature=0.5,
        chunk=5,
        without=SINGLE_SET,
    ),
    row(
        "propagate_video",
        video_and_labels,
        (0, 1),
        radius=1,
        k=3,
        temperature=0.5,
        without=SINGLE_SET,
    ),
    row("affinity_matrix", rows_and_columns, (0, 1), temperature=0.1),
    row(
        "similarity_iou_curve",
        map_boxes_valid,
        (0, 1),
        ious=(0.1, 0.5),
        size=2,
        without=DRAWS | SYMBOLIC | ONE_SET,
    ),
    row("nearest_rows", rows_and_columns, (0, 1), k=2),
    row("match_by_place", two_views, size1=(2, 3), max_distance=None, without=DETACHED),
    row(
        "match_by_place",
        two_views,
        size1=4,
        size2=(3, 2),
        max_distance=1.0,
        best=3,
        without=DETACHED,
    ),
    row("positive_pairs", two_views, size1=(2, 3), size2=2, without=TRUTH),
    row("match_by_feature", rows_and_columns, without=DETACHED),
    row("match_by_feature", rows_and_columns, metric="euclidean", best=2, without=DETACHED),
    row("candidate_regions", two_views, (0, 1), size=8, window=1, stride=3, close=8),
    row("take_rows", rows_and_indices, (0,)),
    row("nearest_maps", maps_and_gallery, (0, 1), k=2, without=SINGLE_SET),
    row("layer_bias", nothing, without=HOOKS),
    row("layer_features", nothing, without=HOOKS),
    row("coupling_images", two_objects, (0, 1)),
    row("coupling_rate", two_maps_two_boxes, (0, 1, 2, 3)),
    row("mean_cosine_similarity", nine_pictures, (0,)),
    row(
        "object_knn",
        objects_and_gallery,
        classes=3,
        k=3,
        without=SINGLE_SET | {"gradcheck gradgradcheck": "counts have no gradient"},
    ),
    row("effective_rank", one_set, (0,)),
    row("effective_rank", one_set, (0,), centered=False),
    row("off_diagonal_cosine", one_set, (0,)),
    row("position_share", map_set, (0,), without=SINGLE_SET),
    row("position_share", map_set, (0,), adjusted=False, without=SINGLE_SET),
    row("norm_outliers", map_set, factor=1.1, without=SINGLE_SET | TRUTH),
    row(
        "dense_structure_score",
        map_set,
        local_clusters=2,
        global_clusters=3,
        group=2,
        without=DRAWS | SYMBOLIC | SINGLE_SET | DETACHED | STRUCTURE,
    ),
    row("pca_colors", map_set, without=SINGLE_SET | WEIGHTS),
    row("cosine_schedule", nothing, without=NUMBERS),
    row("linear_schedule", nothing, without=NUMBERS),
    row("warmup_cosine", nothing, without=NUMBERS),
]


def cells(*columns):
    """The table's cells in some columns, as pytest parameters."""
    seen, found = {}, []
    for entry in TABLE:
        seen[entry.name] = seen.get(entry.name, 0) + 1
        again = f"-{seen[entry.name]}" if seen[entry.name] > 1 else ""
        for column in columns:
            if column not in entry.without:
                suffix = f"-{column}" if len(columns) > 1 else ""
                values = (entry, column) if len(columns) > 1 else (entry,)
                found.append(pytest.param(*values, id=f"{entry.name}{again}{suffix}"))
    return found


def test_every_public_function_has_a_row():
    functions = {name for name in dk.__all__ if inspect.isfunction(getattr(dk, name))}
    assert {entry.name for entry in TABLE} == functions


def test_reasons_name_columns_of_the_table():
    for entry in TABLE:
        assert set(entry.without) <= set(COLUMNS), entry.name
        assert all(entry.without.values()), entry.name
        assert entry.smooth or set(GRADIENTS) <= set(entry.without), entry.name


# --------------------------------------------------------------------------------- the laws


def build(entry, batch=(), n=3, dtype=torch.float64, seed=0):
    return entry.build(batch, n, dtype, torch.Generator().manual_seed(seed))


def run(entry, arguments, call=None):
    """The function on the arguments, random numbers always the same."""
    torch.manual_seed(0)
    return (call or entry.call)(*arguments)


def loop(entry, arguments, axes=1):
    """The stack of the single results along some leading axes."""
    size = tree_leaves(arguments)[0].shape[0]
    singles = []
    for i in range(size):
        one = tree_map(lambda x, i=i: x[i], arguments)
        singles.append(run(entry, one) if axes == 1 else loop(entry, one, axes - 1))
    return tree_map(lambda *parts: torch.stack(parts), *singles)


def assert_same(got, want):
    """The same tree, up to the rounding of sums in another order."""
    assert tree_flatten(got)[1] == tree_flatten(want)[1]
    for one, other in zip(tree_leaves(got), tree_leaves(want), strict=True):
        close = 1e-12 if one.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(one, other, rtol=close, atol=close, check_stride=False)


def differentiable(entry, arguments):
    """The leaves that the gradient checks move, and a way to put others in their place."""
    flat, spec = tree_flatten(arguments)
    first = [len(tree_leaves(arguments[:i])) for i in range(len(arguments) + 1)]
    moved = [
        k
        for i in entry.smooth
        for k in range(first[i], first[i + 1])
        if flat[k].is_floating_point()
    ]

    def insert(leaves):
        placed = list(flat)
        for k, leaf in zip(moved, leaves, strict=True):
            placed[k] = leaf
        return tree_unflatten(placed, spec)

    return [flat[k].clone().requires_grad_() for k in moved], insert


def floats(tree):
    return [x for x in tree_leaves(tree) if x.is_floating_point()]


def results_and_gradients(entry, arguments, call=None):
    """The results, and the gradients of a weighted sum of them, from one call."""
    leaves, insert = differentiable(entry, arguments)
    results = run(entry, insert(leaves), call)
    if not leaves:
        return results, ()
    generator = torch.Generator().manual_seed(1)
    weighted = ((x * uniform(generator, *x.shape).to(x.dtype)).sum() for x in floats(results))
    grads = torch.autograd.grad(sum(weighted), leaves, allow_unused=True, materialize_grads=True)
    return tree_map(torch.detach, results), grads


def gradients(entry, arguments, call=None):
    return results_and_gradients(entry, arguments, call)[1]


@pytest.mark.parametrize("entry", cells("vmap"))
def test_vmap_is_a_loop(entry):
    arguments = build(entry, (4,))
    assert_same(run(entry, arguments, torch.vmap(entry.call)), loop(entry, arguments))


@pytest.mark.parametrize("entry", cells("batched"))
def test_leading_axes_are_a_loop(entry):
    arguments = build(entry, (2, 3))
    assert_same(run(entry, arguments), loop(entry, arguments, axes=2))


@pytest.mark.parametrize("entry", cells("compile"))
def test_compiled_is_eager(entry):
    torch._dynamo.reset()
    compiled = torch.compile(entry.call, fullgraph=True, backend="aot_eager")
    arguments = build(entry, () if "batched" in entry.without else (2,))
    got = results_and_gradients(entry, arguments, compiled)
    assert_same(got, results_and_gradients(entry, arguments))


def serves_two_shapes(entry, backend):
    """One graph with dynamic shapes gives what the function itself gives, on two shapes."""
    torch._dynamo.reset()
    compiled = torch.compile(entry.call, fullgraph=True, backend=backend, dynamic=True)
    # Sizes that no other axis has: equal sizes would be taken for the same axis.
    for size, n, stance in ((11, 6, "default"), (13, 10, "fail_on_recompile")):
        arguments = build(entry, () if "batched" in entry.without else (size,), n)
        with torch.compiler.set_stance(stance):
            assert_same(run(entry, arguments, compiled), run(entry, arguments))


@pytest.mark.parametrize("entry", cells("dynamic"))
def test_compiled_with_dynamic_shapes_is_eager(entry, request):
    is_variant = "-" in request.node.callspec.id  # a further row of its function
    serves_two_shapes(entry, "eager" if is_variant else "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("entry", [cell for cell in cells("dynamic") if "-" in cell.id])
def test_lowered_with_dynamic_shapes_is_eager(entry):
    serves_two_shapes(entry, "aot_eager")


@pytest.mark.parametrize(("entry", "column"), cells(*GRADIENTS))
def test_gradients_are_finite_differences(entry, column):
    leaves, insert = differentiable(entry, build(entry, n=2))
    assert leaves

    def call(*leaves):
        return tuple(floats(run(entry, insert(leaves))))

    assert getattr(torch.autograd, column)(call, leaves)


@pytest.mark.parametrize("entry", cells("gradcheck"))
def test_forward_mode_is_the_transpose_of_reverse_mode(entry):
    leaves, insert = differentiable(entry, build(entry, n=2))
    points = [x.detach() for x in leaves]
    generator = torch.Generator().manual_seed(1)

    def call(*leaves):
        return floats(run(entry, insert(leaves)))

    def random_like(tensors):
        return [uniform(generator, *x.shape, low=-1).to(x.dtype) for x in tensors]

    def inner(some, others):
        return sum((x * y).sum() for x, y in zip(some, others, strict=True))

    tangents = random_like(points)
    _, forward = torch.func.jvp(call, tuple(points), tuple(tangents))
    values, reverse = torch.func.vjp(call, *points)
    cotangents = random_like(values)
    assert_same(inner(forward, cotangents), inner(tangents, reverse(cotangents)))


@pytest.mark.parametrize(("entry", "column"), cells(*HALVES))
def test_half_precision_is_close_to_float32(entry, column):
    dtype = getattr(torch, column)
    half = build(entry, () if "batched" in entry.without else (2,), dtype=dtype)
    assert any(x.dtype == dtype for x in tree_leaves(half))
    single = tree_map(lambda x: x.float() if x.dtype == dtype else x, half)
    got, want = run(entry, half), run(entry, single)
    for one, other in zip(tree_leaves(got), tree_leaves(want), strict=True):
        if one.is_floating_point():
            assert one.dtype in (dtype, torch.float32)
            assert one.isfinite().all()
            bound = entry.close * torch.finfo(dtype).eps * max(1.0, other.abs().max().item())
            torch.testing.assert_close(one.float(), other, rtol=0, atol=bound)
        else:
            assert torch.equal(one, other)
    if entry.smooth:
        assert all(grad.isfinite().all() for grad in gradients(entry, half))


@pytest.mark.parametrize("entry", cells("pure"))
def test_arguments_are_not_modified(entry):
    arguments = build(entry, () if "batched" in entry.without else (2,))
    before = tree_map(torch.clone, arguments)
    versions = [x._version for x in tree_leaves(arguments)]
    run(entry, arguments)
    assert tree_leaves(arguments)
    for one, other in zip(tree_leaves(arguments), tree_leaves(before), strict=True):
        assert torch.equal(one, other)
    assert [x._version for x in tree_leaves(arguments)] == versions


@pytest.mark.parametrize("entry", cells("empty"))
@pytest.mark.parametrize(("batch", "n"), [((), 0), ((2,), 0), ((0,), 3), ((2, 0), 3), ((0,), 0)])
def test_empty_axes_give_finite_results(entry, batch, n):
    if batch and "batched" in entry.without and "single" in entry.without:
        batch = ()
    result = run(entry, build(entry, batch, n))
    assert all(x.isfinite().all() for x in floats(result))
    if "batched" not in entry.without:
        one = run(entry, build(entry, (), n))
        for part, single in zip(tree_leaves(result), tree_leaves(one), strict=True):
            assert part.shape == (*batch, *single.shape)
            assert part.dtype == single.dtype
    if entry.smooth:
        assert all(grad.isfinite().all() for grad in gradients(entry, build(entry, batch, n)))


@pytest.mark.parametrize("entry", cells("single"))
@pytest.mark.parametrize("n", [1, 3])
def test_an_axis_of_size_one_is_the_single_result(entry, n):
    result = run(entry, build(entry, (), n))
    batched = run(entry, build(entry, (1,), n))
    if "batched" not in entry.without or "random" in entry.without["batched"]:
        batched = tree_map(lambda x: x[0], batched)
    assert all(x.isfinite().all() for x in floats(result))
    assert_same(batched, result)


def device_gives_what_the_cpu_gives(entry, device):
    arguments = build(entry, () if "batched" in entry.without else (2,))
    there = tree_map(lambda x: x.to(device), arguments)
    result = run(entry, there)
    assert all(x.device.type == device for x in tree_leaves(result))
    assert_same(tree_map(lambda x: x.cpu(), result), run(entry, arguments))
    if entry.smooth:
        grads = [grad.cpu() for grad in gradients(entry, there)]
        assert_same(grads, list(gradients(entry, arguments)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("entry", cells("cuda"))
def test_the_gpu_gives_what_the_cpu_gives(entry):
    device_gives_what_the_cpu_gives(entry, "cuda")
