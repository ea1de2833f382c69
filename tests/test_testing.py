"""The checks for users: what is right passes, and each planted fault is found and named."""

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from PIL import Image
from strategies import sizes, uniform, views
from torch import nn
from torch.multiprocessing import ProcessContext, ProcessRaisedException
from torchvision.transforms.v2 import functional as transforms
import densekit as dk
from densekit import View, image_to_view, view_to_image
from densekit.testing import (
    assert_world_size_invariant,
    check_photometry,
    check_view_geometry,
    view_geometry_cases,
)

# ---- any number of processes -----------------------------------------------------------------


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(n=5, d=3, seed=0):
    return uniform(seeded(seed), n, d, low=-1).requires_grad_()


VALID = torch.tensor([True, False, True, True, False])
NET = nn.Linear(3, 2).double()
WEIGHTS = tuple(NET.parameters())


def right(part, group):
    """Results of all kinds: a number, the rows of the part, and what all processes share."""
    x, valid, scale, note = part
    assert note == "text"
    features = NET(x) * scale
    loss = dk.masked_mean(features, valid[:, None], group=group)
    keys = dk.all_gather(features, group, ragged=True)
    return {"loss": loss, "rows": features, "keys": keys.detach(), "same": 7, "norm": keys.norm()}


def mean_of_means(part, group):
    return dk.all_mean(dk.masked_mean(NET(part[0]), part[1][:, None]), group)


def keys_without_gradient(part, group):
    """The loss is right, but a row gets no gradient from the losses of the other processes."""
    features = NET(part[0])
    n = len(features)
    start = 5 - n if group.rank() else 0
    keys = dk.all_gather(features.detach(), group, ragged=True)
    keys = torch.cat([keys[:start], features, keys[start + n :]])
    return dk.all_sum((features @ keys.mT).sum(), group)


def doubled_gradient(part, group):
    total = dk.all_sum(NET(part[0]).sum(), group)
    return total * 2 - total.detach() if group.size() > 1 else total


def own_rows_alone(part, group):
    return NET(part[0]).square().sum()


def reversed_rows(part, group):
    return NET(part[0]).flip(0)


def rows_by_rank(part, group):
    return part[0][:2].detach() + group.rank()


def another_dtype(part, group):
    total = dk.all_sum(part[0].sum(), group).detach()
    return total.float() if group.size() > 1 else total


def a_result_more(part, group):
    return [dk.all_sum(part[0].sum(), group)] * group.size()


FAULTS = [
    (mean_of_means, r"On 2 processes with 3, 2 rows the result is another on process 0: 1 of 1"),
    (keys_without_gradient, r"On 2 processes .* the gradient of batch\[0\] is another: "),
    (doubled_gradient, r"On 2 .* result is another|gradient.* all values are 2 times those of one"),
    (own_rows_alone, r"the result is another on process 0: .* it is"),
    (reversed_rows, r"the result is another: \d+ of 10 values, at \[0, 0\]"),
    (rows_by_rank, r"On 2 .*the result is another on process 1: "),
    (another_dtype, r"its dtype is torch.float32, not torch.float64"),
    (a_result_more, r"the function returns \[1, 2\] results"),
    (lambda part, _: part[0].detach()[:, :1].expand(-1, len(part[0])), "neither .5, 5., as on one"),
]


def batch():
    return rows(), VALID, torch.tensor(2.0, dtype=torch.float64, requires_grad=True), "text"


def test_a_right_function_passes_on_any_split():
    sizes = (1, 2, 4, (0, 5), [2, 1, 2])
    assert_world_size_invariant(right, batch(), sizes, parameters=WEIGHTS)


@pytest.mark.parametrize(("function", "message"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_wrong_function_is_found(function, message):
    with pytest.raises(AssertionError, match=message):
        assert_world_size_invariant(function, batch(), (2,), parameters=WEIGHTS)


def test_rows_may_be_dealt_in_turn():
    """Row i is on process i % size, and comes back to its place."""

    def numbered(part, group):
        x, numbers = part
        assert (numbers % group.size() == group.rank()).all()
        return NET(x), dk.masked_mean(NET(x) * numbers[:, None], group=group)

    numbered_rows = rows(), torch.arange(5)
    sizes = (2, 4)
    assert_world_size_invariant(
        numbered, numbered_rows, sizes, parameters=WEIGHTS, interleaved=True
    )


def test_the_error_is_that_of_the_process_that_failed_first(monkeypatch):
    join = ProcessContext.join

    def join_late(self, timeout=None):
        """Look at the processes only when all have ended, as on a busy machine."""
        time.sleep(1.0)
        return join(self, timeout)

    def fail(part, group):
        if group.rank() == 1:
            raise ArithmeticError("of rank 1")
        return dk.all_sum(part[0].sum(), group)  # on two processes it waits for the failed one

    monkeypatch.setattr(ProcessContext, "join", join_late)
    with pytest.raises(ProcessRaisedException, match="ArithmeticError: of rank 1"):
        assert_world_size_invariant(fail, batch(), (2,))


def test_a_wait_without_end_ends():
    def wait(part, group):
        time.sleep(3600 if group.size() > 1 else 0)
        return 0

    began = time.monotonic()
    with pytest.raises(AssertionError, match="On 2 processes the function does not end"):
        assert_world_size_invariant(wait, batch(), (2,), timeout=1.0)
    assert time.monotonic() - began < 30


def scaled(part, group):
    """A function that `pickle` takes, as a system that cannot fork needs it."""
    x, valid, factor, _ = part
    return dk.masked_mean(x * factor, valid[:, None], group=group), x.square()


@pytest.mark.slow
def test_processes_may_be_spawned():
    """As on macOS and on Windows; also beside a group, which forks could not leave."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert_world_size_invariant(scaled, batch(), ((2, 3),), start_method="spawn")
        with pytest.raises(ValueError, match="this process is in a group"):
            assert_world_size_invariant(scaled, batch(), (2,), start_method="fork")
    finally:
        dist.destroy_process_group()


def test_rows_that_do_not_fit_are_refused():
    for wrong in ((torch.zeros(2, 3), torch.zeros(3)), (torch.zeros(()), 5), ()):
        with pytest.raises(ValueError, match="give tensors of one number of rows"):
            assert_world_size_invariant(right, wrong)
    for wrong in ((1, 1), (6, -1), (9,), ()):
        with pytest.raises(ValueError, match="give numbers of 0 or more, whose sum is 5"):
            assert_world_size_invariant(right, batch(), (wrong,))
    with pytest.raises(ValueError, match="a number of processes is 0; give 1 or more"):
        assert_world_size_invariant(right, batch(), (0,))


# ---- every function with a group -------------------------------------------------------------
ROWS = 9


def problems():
    """The rows of each function's arguments, along the first axis; a process has a part of them."""
    some = uniform(seeded(1), ROWS) < 0.6
    first = torch.arange(ROWS) > 3  # the first process of two or four has none
    return {
        "cost": uniform(seeded(2), ROWS, 4, high=2.0),
        "mass": uniform(seeded(3), ROWS, low=0.1),
        "scores": uniform(seeded(4), ROWS, 4, low=-1),
        "x": rows(ROWS, 3, 5),
        "y": rows(ROWS, 3, 6),
        "some": some,
        "first": first,
        "none": some & False,
        "of_two": uniform(seeded(7), ROWS, 2, 3, low=-1).requires_grad_(),
        "valid_of_two": uniform(seeded(9), ROWS, 2) < 0.5,
        "entries": uniform(seeded(10), ROWS, 3) < 0.5,
        "one_entry": torch.arange(3 * ROWS).view(ROWS, 3) == 25,
    }


BANK = dk.init_bank(7, 3, dtype=torch.float64)
CENTER = uniform(seeded(8), 3)
COLUMNS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


def all_functions(part, group):
    x = part["x"]
    gather = partial(dk.all_gather, group=group, ragged=True)
    keys = gather(part["y"])
    allowed = gather(part["some"])
    each = dk.info_nce(
        x, part["y"], dk.Negatives(keys, allowed), part["some"], temperature=0.5, reduction="none"
    )
    results = {
        "sinkhorn": dk.sinkhorn(part["cost"], reg=0.3, iterations=4, group=group),
        "info_nce": dk.masked_mean(each, part["some"], group=group),
        "bank": list(dk.push_to_bank(BANK, keys.detach(), allowed)),
        "swav_codes": dk.swav_codes(part["scores"], group=group),
        "all_sum": dk.all_sum(x.sum(0), group),
        "all_mean": dk.all_mean(x.sum(0), group) * group.size(),
        "all_max": dk.all_max(F.pad(x.detach(), (0, 0, 0, 1), value=-9.0).amax(0), group),
    }
    for name in ("entries", "one_entry"):
        unused = torch.where(part[name], x, torch.nan)
        results[f"mean {name}"] = dk.masked_mean(unused, part[name], group=group)
    columns = torch.tensor([[True, False, True]])  # one mask for all rows
    results["mean of columns"] = dk.masked_mean(x, columns, group=group)
    results["mean of all"] = dk.masked_mean(x, group=group)
    results["center of all"] = dk.update_center(CENTER, x.detach(), group=group)
    results["information"] = dk.mutual_information_loss(9 * x, part["y"], group=group)
    two, valid_of_two = part["of_two"].movedim(1, 0), part["valid_of_two"].mT
    results["variance of two"] = list(dk.variance_covariance(two, valid_of_two, group=group))
    results["variance of all"] = list(dk.variance_covariance(two, group=group))
    for name in ("some", "first", "none"):
        valid = part[name]
        unused = torch.where(valid[:, None], x, torch.nan)  # what is not valid may be anything
        terms = dk.variance_covariance(unused, valid, group=group)
        results |= {
            f"sinkhorn {name}": dk.sinkhorn(
                part["cost"], None, COLUMNS, reg=0.3, iterations=4,
                valid=valid[:, None].expand(-1, 4), group=group,
            ),
            f"mean {name}": dk.masked_mean(unused, valid[:, None], group=group),
            f"variance {name}": list(terms),
            f"center {name}": dk.update_center(CENTER, unused.detach(), valid, group=group),
        }  # fmt: skip
    return results


def test_every_function_with_a_group_is_that_of_one_process():
    sizes = (2, 4, (0, 9), (2, 0, 3, 4))
    assert_world_size_invariant(all_functions, problems(), sizes, rtol=1e-9, atol=1e-11)


def test_shuffled_rows_come_back_and_are_those_of_one_process():
    order = torch.randperm(8, generator=seeded(5))

    def shuffled(x, group):
        mine = dk.shuffle_batch(x, order, group)
        return mine, dk.unshuffle_batch(mine.square(), order, group)

    x = rows(8)
    assert_world_size_invariant(shuffled, x, (1, 2, 4))


# ---- geometry --------------------------------------------------------------------------------


def swapped(view, points):
    return image_to_view(view, points).flip(-1)


def without_flip(view, points):
    return image_to_view(View(view.box, torch.tensor(False)), points)


def without_vertical_flip(view, points):
    return image_to_view(View(view.box, view.flip), points)


def by_index(view, points):
    """Flips as `w - 1 - x`, in pixels of the crop."""
    mirrored = torch.stack([view.flip, view.vertical_flip])
    sides = view.box[2:] - view.box[:2]
    return image_to_view(view, points) - torch.where(mirrored, 1 / sides, 0)


def of_image(view, points):
    """Relative to the image's corner."""
    return points / (view.box[2:] - view.box[:2])


GEOMETRY_FAULTS = [
    (swapped, "x and y are swapped"),
    (without_flip, "the flip is ignored"),
    (without_vertical_flip, "vertical flip"),
    (by_index, "the flip is of pixel indices"),
    (lambda view, points: image_to_view(view, points - 0.5), "it is half a pixel too small"),
    (lambda view, points: image_to_view(view, points + 0.5), "it is half a pixel too large"),
    (lambda view, x: image_to_view(view, x) * (view.box[2:] - view.box[:2]), "in pixels of the"),
    (of_image, "In the case 'crop'"),
    (lambda view, points: image_to_view(view, points).clamp(0, 1), "In the case 'disjoint views"),
    (lambda view, points: image_to_view(view, points)[:1], "In the case 'whole image'"),
    (lambda view, points: image_to_view(view, points) + torch.nan, "In the case 'whole image'"),
]


def test_the_library_passes_its_own_vectors():
    check_view_geometry(image_to_view, view_to_image)
    cases = view_geometry_cases()
    assert len({case.name for case in cases}) == len(cases) >= 18
    assert {len(case.in_image) for case in cases} >= {0, 2, 4}


@pytest.mark.parametrize(("function", "message"), GEOMETRY_FAULTS)
def test_a_fault_of_geometry_is_found_and_named(function, message):
    with pytest.raises(AssertionError, match=message):
        check_view_geometry(function)


def test_a_wrong_way_back_is_found():
    with pytest.raises(AssertionError, match="of the view are at"):
        check_view_geometry(image_to_view, lambda view, x: view_to_image(view, x) + 0.5)


def test_the_vectors_are_plain_json():
    path = Path(dk.__file__).with_name("view_geometry.json")
    for row in json.loads(path.read_text()):
        x0, y0, x1, y1 = row["box"]
        for (x, y), (u, v) in zip(row["in_image"], row["in_view"], strict=True):
            across, down = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
            assert u == pytest.approx(1 - across if row["flip"] else across)
            assert v == pytest.approx(1 - down if row["vertical_flip"] else down)


# ---- photometry ------------------------------------------------------------------------------


def crops(image, change=lambda view: view, cut=dk.crop_views, side=32, **options):
    """Two views of densekit, whose records `change` spoils."""
    pairs = dk.sample_view_pairs(image.shape[-2:], scale=(0.2, 0.9), vertical_flip=0.5)
    return [(cut(image, view, side, **options), change(view)) for view in pairs[:2]]


def with_pillow(image, resample=Image.Resampling.BILINEAR):
    """A pipeline of Pillow and of bytes."""
    picture = transforms.to_pil_image((image * 255).round().byte())
    view = dk.sample_views(image.shape[-2:], scale=(0.2, 0.9))
    crop = picture.resize((32, 32), resample, box=tuple(view.box.tolist()))
    crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else crop
    return [(transforms.pil_to_tensor(crop), view)]


def with_torchvision(image):
    view = dk.sample_views(image.shape[-2:], scale=(0.2, 0.9))
    left, top, right, bottom = view.box.int().tolist()
    place = top, left, bottom - top, right - left
    crop = transforms.resized_crop(image, *place, [32, 32], antialias=True)
    box = torch.tensor([left, top, right, bottom]).float()
    crop = transforms.horizontal_flip(crop) if view.flip else crop
    return [(crop, View(box, view.flip))]


@pytest.mark.parametrize(
    "pipeline",
    [
        crops,
        partial(crops, side=80),
        partial(crops, side=(17, 40), interpolation="bicubic"),
        with_pillow,
        partial(with_pillow, resample=Image.Resampling.BICUBIC),
        with_torchvision,
    ],
)
def test_pipelines_show_what_their_views_say(pipeline):
    check_photometry(pipeline)


def moved(view, x=0.0, y=0.0):
    return view._replace(box=view.box + torch.tensor([x, y, x, y]))


PHOTOMETRIC_FAULTS = {
    "half a pixel to the right": partial(moved, x=0.5),
    "half a pixel up": partial(moved, y=-0.5),
    "the flip is forgotten": lambda view: view._replace(flip=torch.tensor(False)),
    "the vertical flip is forgotten": lambda view: View(view.box, view.flip),
    "x and y are swapped": lambda view: view._replace(box=view.box[[1, 0, 3, 2]]),
    "x, y, width, height": lambda view: view._replace(
        box=torch.cat([view.box[:2], view.box[2:] - view.box[:2] + 1])
    ),
    "the box ends at the last center": lambda view: view._replace(
        box=view.box - torch.tensor([0.0, 0, 1, 1])
    ),
}  # fmt: skip


@pytest.mark.parametrize("side", [16, 32, 80])
@pytest.mark.parametrize("fault", PHOTOMETRIC_FAULTS)
def test_a_view_that_says_other_points_is_found(fault, side):
    with pytest.raises(AssertionError, match=r"shows points that are .* pixels to the right"):
        check_photometry(partial(crops, change=PHOTOMETRIC_FAULTS[fault], side=side), draws=12)


def test_half_a_pixel_of_the_crop_is_found_where_it_is_less_than_one_of_the_image():
    def half(image):
        view = dk.sample_views(image.shape[-2:], scale=(0.2, 0.3))
        step = 0.5 * (view.box[2:] - view.box[:2]) / 96
        return [(dk.crop_views(image, view, 96), view._replace(box=view.box + step.repeat(2)))]

    with pytest.raises(AssertionError, match="shows points"):
        check_photometry(half)


@settings(max_examples=12)
@given(view=views(batch=(), size=(8, 8), whole_pixels=False), size=sizes(4, 40))
def test_crops_of_the_library_pass_whatever_the_view(view, size):
    view = view._replace(box=view.box * 6)

    def pipeline(image):
        return [(dk.crop_views(image.double(), view, size), view)]

    check_photometry(pipeline, draws=1)


def test_the_draws_follow_from_their_numbers_and_leave_the_generator_alone():
    seen = []

    def pipeline(image):
        seen.append(torch.rand(()).item())
        return []

    torch.manual_seed(3)
    state = torch.get_rng_state()
    for _ in range(2):
        check_photometry(pipeline, draws=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert seen[:2] == seen[2:]
    assert seen[0] != seen[1]
    for wrong in (0.5, 0.0):
        with pytest.raises(ValueError, match=f"tolerance is {wrong}; .* below half a pixel"):
            check_photometry(pipeline, tolerance=wrong)
    with pytest.raises(ValueError, match="draws is 0; give 1 or more"):
        check_photometry(pipeline, draws=0)
