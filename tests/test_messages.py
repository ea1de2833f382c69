"""The wrong calls that a newcomer makes, and the sentence that each must answer.

A message is one line, names the function and the argument, and shows no numbers of an array.
"""

import ast
import re

import numpy as np
import pytest
import torch
from files import ROOT, project_files
from PIL import Image
import densekit as dk
from densekit import messages

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(2, 3, 32, 48, generator=GENERATOR)
VIEWS = dk.sample_views((32, 48), (2,), generator=GENERATOR)
ONE_VIEW = dk.full_view((32, 48))
MAPS = torch.rand(2, 16, 7, 7, generator=GENERATOR)
ROWS = dk.map_to_rows(MAPS)  # (2, 49, 16)
BOXES = torch.tensor([[[0.0, 0.0, 8.0, 8.0]], [[4.0, 4.0, 12.0, 12.0]]])
VALID = torch.tensor([True, False])
BANK = dk.push_to_bank(dk.init_bank(64, 16), ROWS[0])
TOKENS = torch.rand(12, 4, generator=GENERATOR)
PLACES = torch.rand(12, 2, generator=GENERATOR)
LABELS = torch.arange(12) % 3
CALLS = {}  # name of the mistake: the call, and what its message must say


def call(name, function, *parts):
    assert name not in CALLS
    CALLS[name] = function, parts


# ---- arrays and types that are no tensors ------------------------------------------------------

call(
    "numpy images",
    lambda: dk.crop_views(IMAGES.numpy(), VIEWS, 24),
    "views.crop_views: argument 'images'",
    "a numpy array of shape (2, 3, 32, 48) and dtype float32 was given. Use `torch.from_numpy(x)`.",
)
call(
    "numpy boxes",
    lambda: dk.box_area(np.zeros((900, 4))),
    "boxes.box_area: argument 'boxes'",
    "a numpy array of shape (900, 4) and dtype float64 was given. Use `torch.from_numpy(x)`.",
)
call(
    "numpy labels",
    lambda: dk.confusion_matrix(LABELS.numpy(), LABELS, classes=3),
    "argument 'labels'",
    "a numpy array of shape (12,) and dtype int64",
)
call(
    "numpy valid",
    lambda: dk.negative_cosine(ROWS, ROWS, np.ones((2, 49), dtype=bool)),
    "argument 'valid'",
    "a numpy array of shape (2, 49) and dtype bool was given. Use `torch.from_numpy(x)`.",
)
call(
    "a PIL image",
    lambda: dk.crop_views(Image.new("RGB", (48, 32)), ONE_VIEW, 24),
    "argument 'images'",
    "of type Image was given. Convert it to a tensor first",
)
call(
    "boxes as nested lists",
    lambda: dk.roi_align(MAPS, [[[0.1, 0.1, 0.9, 0.9]]] * 2, 7),
    "pooling.roi_align: argument 'boxes'",
    "a list of",
    "Use `torch.tensor(x)`.",
)
call(
    "boxes as a list of tensors",
    lambda: dk.roi_align(MAPS, list(BOXES / 32), 7),
    "pooling.roi_align: argument 'boxes'",
    "Stack them first: `torch.stack(x)`.",
)
call(
    "a list of a thousand numbers",
    lambda: dk.l2_normalize([0.5] * 1000),
    "argument 'x'",
    "... 1000 in all",
    "Use `torch.tensor(x)`.",
)
call(
    "None for a tensor",
    lambda: dk.box_iou(BOXES, None),
    "argument 'boxes2'",
    "None of type NoneType was given",
)
call(
    "a module for its output",
    lambda: dk.l2_normalize(torch.nn.Sequential(*[torch.nn.Linear(99, 99) for _ in range(99)])),
    "argument 'x'",
    "... of type Sequential was given",
)

# ---- views -------------------------------------------------------------------------------------

call(
    "a list of views",
    lambda: dk.crop_views(IMAGES, [ONE_VIEW, ONE_VIEW], 24),
    "argument 'view' should be View, but a list of (a View, a View) was given",
    "Stack them first: `stack_views(x)`.",
)
call(
    "a tuple of two views",
    lambda: dk.intersect_views(tuple([ONE_VIEW] * 2), ONE_VIEW),
    "argument 'view1' should be View",
    "`stack_views(x)`.",
)
call(
    "a view as its two fields",
    lambda: dk.coordinate_map((VIEWS.box, VIEWS.flip), 7),
    "argument 'view' should be View",
    "Use `View(*x)`.",
)
call(
    "a box for a view",
    lambda: dk.image_to_view(VIEWS.box, BOXES[..., :2]),
    "argument 'view' should be View, but a tensor of shape (2, 4)",
)
call(
    "flips as numbers",
    lambda: dk.crop_views(IMAGES, dk.View(VIEWS.box, VIEWS.flip.long()), 24),
    "argument 'view.flip' should be Bool",
    "Convert it first: `x.bool()`.",
)
call(
    "pairs of views for a view",
    lambda: dk.crop_views(IMAGES, dk.sample_view_pairs((32, 48), 2), 24),
    "argument 'view' should be View, but a ViewPairs of",
)
call(
    "images and view exchanged",
    lambda: dk.crop_views(VIEWS, IMAGES, 24),
    "argument 'images'",
    "but a View of",
)
call(
    "views between maps",
    lambda: dk.gridsample_pairs(MAPS, VIEWS, MAPS, VIEWS),
    "argument 'features2'",
    "but a View of",
)
call(
    "views of one image fewer",
    lambda: dk.crop_views(IMAGES, dk.full_view((32, 48), 3), 24),
    "argument 'view.box'",
    "with batch=(2)",
    "shape (3, 4)",
)
call(
    "one image without its batch axis",
    lambda: dk.crop_views(IMAGES[0], VIEWS, 24),
    "argument 'images'",
    "with batch=(2), but a tensor of shape (3, 32, 48)",
    "It has 3 axes instead of 4.",
)

# ---- images, maps and rows -----------------------------------------------------------------------

call(
    "uint8 images",
    lambda: dk.crop_views((255 * IMAGES).byte(), VIEWS, 24),
    "argument 'images'",
    "dtype torch.uint8 was given. Convert it first: `x.float()`, and `/ 255` for an image.",
)
call(
    "images with their channels last",
    lambda: dk.crop_views(IMAGES.movedim(1, -1), VIEWS, 24),
    "views.crop_views: argument 'images' has shape (2, 32, 48, 3), whose channels seem to come",
    "give images (*batch, c, h, w): `images.movedim(-1, -3)`.",
)
call(
    "integer features",
    lambda: dk.negative_cosine(ROWS.long(), ROWS),
    "argument 'student'",
    "dtype torch.int64 was given. Convert it first: `x.float()`.",
)
call(
    "integer boxes",
    lambda: dk.box_area(BOXES.long()),
    "argument 'boxes'",
    "Convert it first: `x.float()`.",
)
call(
    "tokens for maps",
    lambda: dk.gridsample_pairs(ROWS, ROWS, VIEWS, VIEWS),
    "argument 'features1' should be Float[Tensor, \"*batch d h1 w1\"] with batch=(2)",
    "a tensor of shape (2, 49, 16)",
    "It has 3 axes instead of 4. Maps are wanted: for rows (..., n, d) use `rows_to_map(x, size)`.",
)
call(
    "tokens for maps in roi_align",
    lambda: dk.roi_align(ROWS, BOXES, 7),
    "argument 'features'",
    "It has 3 axes instead of 4. Maps are wanted",
)
call(
    "tokens for a map in gridsample",
    lambda: dk.gridsample(ROWS, torch.rand(2, 5, 2)),
    "argument 'features'",
    "Maps are wanted",
)
call(
    "maps for rows in a loss",
    lambda: dk.negative_cosine(MAPS, MAPS),
    "losses.negative_cosine: argument 'student' should have its channels last",
    "shape (2, 16, 7, 7) looks like that of maps (..., d, h, w); use `map_to_rows(x)`.",
)
call(
    "maps for rows in info_nce",
    lambda: dk.info_nce(MAPS, MAPS, temperature=0.1),
    "argument 'query' should have its channels last",
    "use `map_to_rows(x)`.",
)
call(
    "a map for keys of a bank",
    lambda: dk.push_to_bank(BANK, MAPS),
    "argument 'keys'",
    "with size=64, d=16",
    "For a map (..., d, h, w) use `map_to_rows(x)`, whose channels come last.",
)
call(
    "boxes of all images in one list",
    lambda: dk.roi_align(MAPS, BOXES[:, 0], 7),
    "argument 'boxes'",
    "with batch=(2)",
    "It has 2 axes instead of 3.",
)
call(
    "points of one image for a batch",
    lambda: dk.gridsample(MAPS, torch.rand(5, 2)),
    "argument 'points'",
    "It has 2 axes instead of 3.",
)
call(
    "features of two widths",
    lambda: dk.negative_cosine(ROWS, ROWS[..., :8]),
    "argument 'teacher'",
    "with batch=(2, 49), d=16, but a tensor of shape (2, 49, 8)",
)

# ---- negatives, valid and temperatures -----------------------------------------------------------

call(
    "a bank for negatives",
    lambda: dk.info_nce(ROWS, ROWS, BANK, temperature=0.2),
    "argument 'negatives'",
    "but a Bank of",
    "Use `bank_negatives(bank)`.",
)
call(
    "valid in the place of negatives",
    lambda: dk.info_nce(ROWS, ROWS, torch.ones(2, 49).bool(), temperature=0.2),
    "argument 'negatives'",
    "dtype torch.bool was given. If it says which entries to use, pass it as `valid=`.",
)
call(
    "negatives of another width",
    lambda: dk.info_nce(ROWS, ROWS, ROWS[0, :, :8], temperature=0.2),
    "argument 'negatives'",
    "d=16, but a tensor of shape (49, 8)",
)
call(
    "negatives of two kinds",
    lambda: dk.info_nce(ROWS, ROWS, [ROWS[0], ROWS[1]], temperature=0.2),
    "argument 'negatives'",
    "a list of",
    "`torch.stack(x)`",
)
call(
    "valid of another length",
    lambda: dk.negative_cosine(ROWS, ROWS, torch.ones(2, 7).bool()),
    "losses.negative_cosine: argument 'valid'",
    "shape (2, 7)",
)
call(
    "valid of the images for points",
    lambda: dk.info_nce(ROWS, ROWS, valid=VALID, temperature=0.1),
    "losses.info_nce: argument 'valid'",
    "batch=(2, 49)",
    "use `valid[:, None]`",
)
call(
    "valid as numbers",
    lambda: dk.negative_cosine(ROWS, ROWS, torch.ones(2, 49)),
    "argument 'valid' should be Bool",
    "Convert it first: `x.bool()`.",
)
call(
    "no temperature",
    lambda: dk.info_nce(ROWS, ROWS),
    "losses.info_nce: missing a required argument: 'temperature'; give `temperature=` by name.",
)
call(
    "a temperature without its name",
    lambda: dk.affinity_matrix(ROWS, ROWS, 0.1),
    "too many positional arguments; give `temperature=` by name.",
)
call(
    "a temperature of zero",
    lambda: dk.info_nce(ROWS, ROWS, temperature=0),
    "temperature is 0; give one above 0.",
)
call(
    "a temperature for each row",
    lambda: dk.info_nce(ROWS, ROWS, temperature=torch.full((49,), 0.1)),
    "argument 'temperature' should be float or Float[Tensor, \"\"]",
)
call(
    "a reduction that is not there",
    lambda: dk.negative_cosine(ROWS, ROWS, reduction="sum"),
    "argument 'reduction' should be Literal['mean', 'none'], but 'sum' of type str was given.",
)
call(
    "one student for two",
    lambda: dk.symmetric_loss(dk.negative_cosine, (ROWS,), (ROWS, ROWS)),
    "the number of students is 1; give 2.",
)

# ---- numbers and sizes ---------------------------------------------------------------------------

call(
    "a list for a size",
    lambda: dk.crop_views(IMAGES, VIEWS, [96, 128]),
    "argument 'size' should be int or tuple[int, int], but [96, 128] of type list was given.",
    "Use a tuple: `tuple(x)`.",
)
call(
    "a number for the size of an image",
    lambda: dk.sample_views(224, 8),
    "argument 'size'",
    "but 224 of type int was given. Give `(h, w)`, such as `(224, 224)`.",
)
call(
    "a size of fractions",
    lambda: dk.coordinate_map(VIEWS, (3.5, 7)),
    "argument 'size' should be int or tuple[int, int], but (3.5, 7) of type tuple was given.",
)
call(
    "a size of nothing",
    lambda: dk.crop_views(IMAGES, VIEWS, 0),
    "size is 0; give a positive size in pixels.",
)
call(
    "scale the wrong way round",
    lambda: dk.sample_views((32, 48), scale=(1.0, 0.2)),
    "scale is (1.0, 0.2); give 0 < smallest <= largest.",
)
call(
    "flip in percent",
    lambda: dk.sample_views((32, 48), flip=50),
    "flip is 50; give a probability in [0, 1].",
)
call(
    "no attempts",
    lambda: dk.sample_view_pairs((32, 48), min_overlap=0.5, attempts=0),
    "attempts is 0; give 1 or more.",
)
call(
    "transport without iterations",
    lambda: dk.sinkhorn(TOKENS, reg=3, iterations=0),
    "clustering.sinkhorn: iterations is 0; give 1 or more.",
)
call(
    "transport without strength",
    lambda: dk.sinkhorn(TOKENS, reg=0, iterations=3),
    "clustering.sinkhorn: reg is 0; give a number above 0.",
)
call(
    "masses for options",
    lambda: dk.sinkhorn(TOKENS, 0.05, 3),
    "missing a required argument: 'reg'; give `reg=` by name.",
)
call(
    "a negative number of points",
    lambda: dk.sample_points(BOXES, -1),
    "sampling.sample_points: count is -1; give 0 or more.",
)
call(
    "more keys than there are",
    lambda: dk.sample_keys(ROWS, 50),
    "bank.sample_keys: count is 50, but there are 49 keys; give 0 to 49.",
)
call(
    "more start tokens than tokens",
    lambda: dk.sample_tokens(torch.ones(12), 20),
    "count is 20, but there are 12 tokens",
)
call(
    "a bank without rows",
    lambda: dk.init_bank(0, 128),
    "bank.init_bank: size is 0; give 1 or more.",
)
call(
    "a bank of integers",
    lambda: dk.init_bank(8, 128, dtype=torch.int8),
    "bank.init_bank: dtype is torch.int8; give a floating dtype.",
)
call(
    "a momentum in percent",
    lambda: dk.update_center(torch.zeros(16), ROWS, momentum=99),
    "momentum is 99; give",
)
call(
    "labels as floats",
    lambda: dk.confusion_matrix(LABELS.float(), LABELS, classes=3),
    "argument 'labels'",
    "Convert it first: `x.long()`.",
)
call(
    "no classes",
    lambda: dk.knn_votes(TOKENS, TOKENS, LABELS, classes=0),
    "neighbors.knn_votes: classes is 0; give 1 or more.",
)
call(
    "labels of another number",
    lambda: dk.knn_votes(TOKENS, TOKENS, LABELS[:5], classes=3),
    "argument 'gallery_labels'",
    "shape (5,)",
)
call(
    "positions without their columns",
    lambda: dk.sinkhorn_merge(TOKENS, PLACES[:, :1], torch.ones(12), torch.arange(4)),
    "argument 'positions'",
    "shape (12, 1)",
)
call(
    "start tokens as a mask",
    lambda: dk.sinkhorn_merge(TOKENS, PLACES, torch.ones(12), torch.ones(12).bool()),
    "argument 'start' should be Integer",
)
call(
    "a rank for a group",
    lambda: dk.all_gather(TOKENS, 0),
    "argument 'group' should be ProcessGroup or None, but 0 of type int was given.",
)
call(
    "an option that is not there",
    lambda: dk.sinkhorn(TOKENS, reg=0.1, iters=3),
    "unexpected keyword argument 'iters', and is missing a required argument: 'iterations'",
)
call(
    "a window larger than the view",
    lambda: dk.candidate_regions(VIEWS, VIEWS, 32),
    "matching.candidate_regions: size is 32; give 48 or more, to hold a window.",
)
call(
    "a number of clusters for centroids",
    lambda: dk.kmeans(TOKENS, 5),
    "argument 'start'",
    "but 5 of type int was given",
)
call(
    "a number that is not whole",
    lambda: dk.kmeans_plus_plus(TOKENS, 12 / 4),
    "argument 'count' should be int, but 3.0 of type float was given.",
)
call(
    "points for boxes",
    lambda: dk.boxes_valid(PLACES),
    "argument 'boxes' should be Float[Tensor, \"*batch 4\"]",
    "shape (12, 2)",
)

# ---- the argument that is wrong, where another one does not fit any more -----------------------

call(
    "a grid of points as grid_sample wants it",
    lambda: dk.gridsample(MAPS, torch.rand(2, 7, 7, 2)),
    "argument 'points'",
    "shape (2, 7, 7, 2)",
    "It has 4 axes instead of 3. Flatten the grid: `x.flatten(-3, -2)`.",
)
call(
    "a grid of points for one map",
    lambda: dk.gridsample(MAPS[0], torch.rand(7, 7, 2)),
    "argument 'points'",
    "Flatten the grid: `x.flatten(-3, -2)`.",
)
call(
    "valid of the points for that of the pairs",
    lambda: dk.gridsample_pairs(MAPS, MAPS, VIEWS, VIEWS, 7, torch.ones(2, 49).bool()),
    "argument 'valid' should be Bool",
    "with batch=(2)",
    "It has 2 axes instead of 1.",
)
call(
    "one axis too few",
    lambda: dk.gridsample_pairs(MAPS, MAPS, VIEWS, VIEWS, 7, torch.tensor(True)),
    "argument 'valid'",
    "It has 0 axes instead of 1.",
)
call(
    "one axis",
    lambda: dk.image_to_view(ONE_VIEW, torch.rand(2)),
    "argument 'points'",
    "It has 1 axis instead of 2.",
)
call(
    "one map before several views",
    lambda: dk.gridsample_pairs(MAPS[0], MAPS[0], VIEWS, VIEWS),
    "argument 'features1'",
    "with batch=(2), but a tensor of shape (16, 7, 7)",
    "It has 3 axes instead of 4.",
)
call(
    "maps before a bank",
    lambda: dk.info_nce(MAPS, MAPS, dk.bank_negatives(BANK), temperature=0.2),
    "argument 'query' should have its channels last",
    "use `map_to_rows(x)`.",
)
call(
    "a map for the student's rows",
    lambda: dk.negative_cosine(MAPS, ROWS),
    "argument 'student' should have its channels last",
    "use `map_to_rows(x)`.",
)
call(
    "a map that is not square for the student's rows",
    lambda: dk.negative_cosine(MAPS[..., :5], ROWS[:, :35]),
    "argument 'student' should have its channels last",
    "use `map_to_rows(x)`.",
)
call(
    "maps before a center",
    lambda: dk.self_distillation(MAPS, MAPS, torch.zeros(16)),
    "argument 'student' should have its channels last",
)
call(
    "a map to take rows of",
    lambda: dk.take_rows(MAPS, torch.zeros(2, 5).long()),
    "argument 'rows' should have its channels last",
)
call(
    "maps for keys of a bank as wide as the maps",
    lambda: dk.push_to_bank(dk.init_bank(8, 7), MAPS),
    "bank.push_to_bank: argument 'keys' should have its channels last",
    "use `map_to_rows(x)`.",
)
call(
    "maps to sample keys of",
    lambda: dk.sample_keys(MAPS, 2),
    "bank.sample_keys: argument 'keys' should have its channels last",
)
call(
    "maps to match",
    lambda: dk.match_by_feature(MAPS, MAPS),
    "matching.match_by_feature: argument 'features1' should have its channels last",
)
call(
    "a map of scores",
    lambda: dk.swav_codes(MAPS),
    "clustering.swav_codes: argument 'scores' should have its channels last",
)

# ---- what to give instead ------------------------------------------------------------------------

call(
    "PIL images",
    lambda: dk.crop_views([Image.new("RGB", (48, 32))] * 2, VIEWS, 24),
    "argument 'images'",
    "Convert each to a tensor first",
)
call(
    "a list of numpy images",
    lambda: dk.crop_views([np.zeros((3, 8, 9)), np.zeros((3, 9, 8))], VIEWS, 24),
    "argument 'images'",
    "Use `[torch.from_numpy(a) for a in x]`.",
)
call(
    "boxes as a list of numpy arrays",
    lambda: dk.roi_align(MAPS, list(BOXES.numpy()), 7),
    "Use `torch.stack([torch.from_numpy(a) for a in x])`.",
)
call(
    "boxes of different numbers",
    lambda: dk.roi_align(MAPS, [torch.rand(3, 4), torch.rand(5, 4)], 7),
    "Pad them to one shape, and stack them.",
)
call(
    "images for their size",
    lambda: dk.sample_view_pairs(IMAGES),
    "argument 'size'",
    "Give `(h, w)`, such as `x.shape[-2:]`.",
)
call(
    "the shape of images for their size",
    lambda: dk.sample_view_pairs(IMAGES.shape),
    "argument 'size'",
    "Give `(h, w)`, such as `x.shape[-2:]`.",
)
call(
    "sizes as floats",
    lambda: dk.sample_views(torch.tensor([[32.0, 48.0]])),
    "argument 'size'",
    "Convert it first: `x.long()`.",
)
call(
    "maps for the size of a map",
    lambda: dk.coordinate_map(VIEWS, MAPS),
    "argument 'size'",
    "Give `(h, w)`, such as `x.shape[-2:]`.",
)
call(
    "a temperature with an axis",
    lambda: dk.info_nce(ROWS, ROWS, temperature=torch.ones(1)),
    "argument 'temperature'",
    "Give a tensor of no axes: `x.squeeze()`.",
)
call(
    "numpy numbers in a size",
    lambda: dk.coordinate_map(VIEWS, (np.int64(7), 7)),
    "argument 'size'",
    "Use `tuple(map(int, x))`.",
)
call(
    "a numpy number for a size",
    lambda: dk.coordinate_map(VIEWS, np.int64(7)),
    "argument 'size'",
    "Use `int(x)`.",
)
call(
    "a tensor for a number",
    lambda: dk.sample_keys(ROWS, torch.tensor(4)),
    "argument 'count'",
    "Use `int(x)`.",
)
call(
    "one view for a pair",
    lambda: dk.symmetric_loss(dk.negative_cosine, ROWS, ROWS),
    "argument 'students'",
    "Give a pair, such as `(x1, x2)`.",
)
call(
    "pairs of points for points",
    lambda: dk.gridsample(MAPS, dk.grid_pairs(VIEWS, VIEWS)),
    "argument 'points'",
    "Use one of `pairs.points1, pairs.points2`.",
)
call(
    "matches for indices",
    lambda: dk.take_rows(ROWS, dk.match_by_feature(ROWS, ROWS)),
    "argument 'indices'",
    "Use one of `matches.indices1, matches.indices2`.",
)
call(
    "pairs of views for two views",
    lambda: dk.gridsample_pairs(MAPS, MAPS, dk.sample_view_pairs((32, 48), 2)),
    "missing a required argument: 'view2'; give `pairs.view1, pairs.view2` for the ViewPairs.",
)
call(
    "pairs of views to check",
    lambda: dk.check_views(dk.sample_view_pairs((32, 48), 2), (32, 48)),
    "argument 'view'",
    "Use one of `pairs.view1, pairs.view2`.",
)
call(
    "views with their valid for views",
    lambda: dk.coordinate_map(dk.view_from_matrix(torch.eye(3), 8, pixel_centers="half"), 7),
    "argument 'view'",
    "Use `x.view`.",
)
call(
    "the first field for the first view",
    lambda: dk.coordinate_map(VIEWS[0], 7),
    "argument 'view'",
    "use `index_views(view, 0)`.",
)
call(
    "one flip for all",
    lambda: dk.view_from_xywh(VIEWS.box, True),
    "argument 'flip'",
    "Use `torch.full((2,), True)`.",
)
call(
    "a flip that is no tensor",
    lambda: dk.view_from_relative(torch.rand(4), (32, 48), flip=True),
    "argument 'flip'",
    "Use `torch.tensor(True)`.",
)
call(
    "boxes with the index of their image",
    lambda: dk.roi_align(MAPS, torch.rand(6, 5), 7),
    "argument 'boxes'",
    "Boxes are (*batch, n, 4), those of each image together",
    "`x[..., 1:]`",
)

# ---- numbers are checked where they are given ----------------------------------------------------

call(
    "no grid for pairs of maps",
    lambda: dk.gridsample_pairs(MAPS, MAPS, VIEWS, VIEWS, size=0),
    "sampling.gridsample_pairs: size is 0; give a positive (h, w).",
)
call(
    "no grid for pairs of views",
    lambda: dk.grid_pairs(VIEWS, VIEWS, (7, 0)),
    "sampling.grid_pairs: size is (7, 0); give",
)
call(
    "no grid",
    lambda: dk.grid_points(BOXES, 0),
    "sampling.grid_points: size is 0; give",
)
call(
    "maps without cells",
    lambda: dk.gridsample_pairs(MAPS, MAPS[..., :0], VIEWS, VIEWS),
    "sampling.gridsample_pairs: the second map is 7 x 0; give a map with cells.",
)
call(
    "cells of no map",
    lambda: dk.match_by_place(VIEWS, VIEWS, 0),
    "matching.match_by_place: size1 is 0; give",
)
call(
    "cells of no second map",
    lambda: dk.positive_pairs(VIEWS, VIEWS, 7, (0, 7)),
    "matching.positive_pairs: size2 is (0, 7); give",
)
call(
    "fewer than no views",
    lambda: dk.sample_views((96, 96), batch=-4),
    "views.sample_views: batch is -4; give axes of 0 or more.",
)
call(
    "fewer than no whole images",
    lambda: dk.full_view((96, 96), (2, -4)),
    "views.full_view: batch is (2, -4); give axes of 0 or more.",
)
call(
    "fewer than no pairs",
    lambda: dk.sample_view_pairs((96, 96), -4),
    "views.sample_view_pairs: batch is -4; give axes of 0 or more.",
)
call(
    "scale of pairs the wrong way round",
    lambda: dk.sample_view_pairs((32, 48), scale=(1.0, 0.2)),
    "views.sample_view_pairs: scale is (1.0, 0.2); give 0 < smallest <= largest.",
)


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_is_answered_in_one_sentence(name):
    function, parts = CALLS[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        function()
    message = str(caught.value)
    assert message.startswith("densekit.")
    assert "\n" not in message
    assert len(message) < 400
    for part in parts:
        assert part in message
    assert not re.search(r"\d\.\d{5}", message)  # no numbers of a tensor


def test_tensors_on_two_devices_are_named():
    student, teacher = torch.ones(2, 3), torch.ones(2, 3, device="meta")
    with pytest.raises(RuntimeError) as caught:
        dk.negative_cosine(student, teacher)
    assert str(caught.value) == (
        "densekit.losses.negative_cosine: argument 'student' is on cpu and 'teacher' is on meta; "
        "move them to one device."
    )


@pytest.mark.parametrize("heads", [3, 4, 7, 8])
@pytest.mark.parametrize("size", [(2, 2), (7, 7), (7, 6)])
def test_one_rule_says_what_is_a_map_whichever_argument_fits(heads, size):
    x = torch.ones(2, heads, *size)
    sentence = "argument 'student' should have its channels last"
    refused = heads > max(size[1], 3) and size[0] == size[1]
    with pytest.raises(TypeError) as caught:
        dk.negative_cosine(x, torch.ones(2, 9))
    assert (sentence in str(caught.value)) == refused
    if refused:
        with pytest.raises(TypeError, match=sentence):
            dk.negative_cosine(x, x)
    else:
        dk.negative_cosine(x, x)


def test_records_that_nothing_can_stack_get_no_advice():
    with pytest.raises(TypeError, match=r"a list of \(a Bank, .* 3 in all\) was given\.$"):
        dk.bank_negatives([BANK] * 3)


def test_a_view_without_flip_is_named():
    with pytest.raises(TypeError, match=r"^View\(\) missing 1 required .* 'flip'$"):
        dk.View(torch.rand(4))


def test_errors_of_other_kinds_are_left_as_they_are():
    """Two devices are no reason to blame them for another error."""

    def broken(one, two):
        raise RuntimeError("the cause")

    pair = torch.ones(2, 3), torch.ones(2, 3, device="meta")
    with pytest.raises(RuntimeError, match=r"^the cause$"):
        dk.symmetric_loss(broken, pair, pair)


def named(error, parameters):
    """Numbers that a message shows as what was found, before it says what to give.

    The shape of a tensor may stand beside a number that does not fit it.
    """
    shown = []
    for part in getattr(error, "values", []):
        if isinstance(part, ast.Constant) and ";" in part.value:
            break
        if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
            shown.append(part.value.id)
    return {name for name in shown if name in parameters} - {"function", "name", "where"}


def crowded(source):
    """Functions in which an error about a number shows more than one argument."""
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            arguments = (*function.args.args, *function.args.kwonlyargs)
            parameters = {argument.arg for argument in arguments}
            for node in ast.walk(function):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    is_about_a_number = getattr(node.exc.func, "id", "") == "ValueError"
                    if is_about_a_number and len(named(node.exc.args[0], parameters)) > 1:
                        yield function.name


@pytest.mark.parametrize("path", project_files("densekit/*.py"), ids=lambda path: path.stem)
def test_an_error_about_a_number_names_the_culprit_alone(path):
    assert list(crowded(path.read_text())) == []


def test_the_check_sees_two_culprits():
    start = "def f(reg, steps):\n    raise ValueError(f'reg is {reg}"
    assert list(crowded(f"{start} and steps is {{steps}}; give more.')")) == ["f"]
    assert list(crowded(f"{start}; give less than {{steps}}.')")) == []


def test_what_a_message_advises_exists():
    source = (ROOT / "densekit" / "messages.py").read_text()
    advised = set(re.findall(r"`(\w+)\((?:x|x, size|bank)\)`", source)) - {"tuple"}
    assert {"map_to_rows", "rows_to_map", "bank_negatives", "stack_views"} <= advised
    assert advised | messages.CALLED.keys() <= set(dk.__all__)
