"""The scenes and their ground truth agree, and what tells a class is not its color."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generators, sizes
from densekit import scenes
from densekit.scenes import SCENE_CLASSES, sample_scenes

STUFF = 4
SLOTS = 8
SEEDS = st.integers(0, 2**31 - 1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def ranges():
    """Smallest and largest number of objects."""
    return st.lists(st.integers(0, SLOTS), min_size=2, max_size=2).map(lambda n: tuple(sorted(n)))


def assert_same(first, second):
    for name, a, b in zip(first._fields, first, second, strict=True):
        assert torch.equal(a, b), name


@given(st.integers(0, 4), sizes(1, 16), ranges(), generators())
def test_ground_truth_is_consistent(count, size, objects, generator):
    batch = sample_scenes(count, size, generator=generator, objects=objects)
    assert batch.images.shape == (count, 3, *size)
    assert batch.labels.shape == batch.instances.shape == (count, *size)
    assert batch.boxes.shape == (count, SLOTS, 4)
    assert batch.images.isfinite().all()
    assert ((batch.images >= 0) & (batch.images <= 1)).all()
    assert ((batch.labels >= 0) & (batch.labels < len(SCENE_CLASSES))).all()
    assert (batch.labels[batch.instances == 0] < STUFF).all()
    for labels, instances, boxes, classes, valid in zip(*batch[1:], strict=True):
        used = int((classes > 0).sum())
        assert objects[0] <= used <= objects[1]
        assert (classes[:used] >= STUFF).all()
        assert (classes[used:] == 0).all()
        for slot in range(SLOTS):
            rows, columns = torch.nonzero(instances == slot + 1, as_tuple=True)
            assert bool(valid[slot]) == (len(rows) > 0)
            if len(rows) == 0:
                assert boxes[slot].tolist() == [0, 0, 0, 0]
                continue
            assert slot < used
            assert (labels[rows, columns] == classes[slot]).all()
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert boxes[slot].tolist() == [int(edge) for edge in tight]
            # Centers of the pixels of a shape lie within its diameter.
            longest = max(tight[2] - tight[0], tight[3] - tight[1])
            assert longest <= 0.55 * min(size) + 1


@given(st.integers(1, 3), sizes(1, 12), SEEDS)
def test_seed_decides(count, size, seed):
    first = sample_scenes(count, size, generator=seeded(seed))
    assert_same(first, sample_scenes(count, size, generator=seeded(seed)))
    other = sample_scenes(count, size, generator=seeded(seed + 1))
    assert not torch.equal(first.images, other.images)
    generator = seeded(seed)
    sample_scenes(count, size, generator=generator)
    assert not torch.equal(first.images, sample_scenes(count, size, generator=generator).images)


def test_global_generator_is_the_default():
    torch.manual_seed(5)
    assert_same(sample_scenes(2, (8, 9)), sample_scenes(2, (8, 9), generator=seeded(5)))


@given(st.integers(0, 5), sizes(1, 12), SEEDS, st.integers(1, 400))
def test_chunks_do_not_change_the_scenes(count, size, seed, chunk):
    whole = sample_scenes(count, size, generator=seeded(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "_CHUNK", chunk)
        parts = sample_scenes(count, size, generator=seeded(seed))
    assert_same(whole, parts)


@given(sizes(2, 16), SEEDS, st.integers(1, SLOTS))
def test_later_objects_hide_earlier_ones(size, seed, most):
    """The last object only covers: everywhere else the scene is as it was without it."""
    before = sample_scenes(3, size, generator=seeded(seed), objects=(most - 1, most - 1))
    after = sample_scenes(3, size, generator=seeded(seed), objects=(most, most))
    covered = after.instances == most
    assert torch.equal(after.instances[~covered], before.instances[~covered])
    assert torch.equal(after.labels[~covered], before.labels[~covered])
    assert (after.images == before.images).all(1)[~covered].all()


def test_objects_that_occur_together_are_partners_side_by_side():
    """As often as it is asked for, and at 0 and without it the scenes are the same."""
    share = 0.75
    size = (64, 96)
    batch = sample_scenes(
        800, size, generator=seeded(3), objects=(SLOTS, SLOTS), co_occurrence=share
    )
    first, second = batch.classes[:, ::2], batch.classes[:, 1::2]
    partners = (first - STUFF) ^ 1 == second - STUFF
    # By chance one of eight classes is the partner.
    expected = share + (1 - share) / (len(SCENE_CLASSES) - STUFF)
    spread = 5 * math.sqrt(expected * (1 - expected) / partners.numel())
    assert abs(float(partners.double().mean()) - expected) < spread
    counts = torch.bincount(batch.classes.flatten(), minlength=len(SCENE_CLASSES))[STUFF:]
    assert float(counts.double().std() / counts.double().mean()) < 0.1  # all are as frequent

    middles = (batch.boxes[..., :2] + batch.boxes[..., 2:]) / 2
    seen = batch.valid[:, ::2] & batch.valid[:, 1::2]
    apart = (middles[:, ::2] - middles[:, 1::2]).norm(dim=-1)
    assert apart[partners & seen].mean() < 0.75 * apart[~partners & seen].mean()

    alone = sample_scenes(4, size, generator=seeded(3), co_occurrence=0.0)
    assert_same(alone, sample_scenes(4, size, generator=seeded(3)))
    pairs = sample_scenes(4, size, generator=seeded(3), co_occurrence=1.0)
    assert torch.equal(alone.classes > 0, pairs.classes > 0)
    assert torch.equal(alone.classes[:, ::2], pairs.classes[:, ::2])


def test_every_class_occurs():
    batch = sample_scenes(300, (16, 24), generator=seeded(0))
    shares = torch.bincount(batch.labels.flatten(), minlength=len(SCENE_CLASSES))
    assert (shares > 0).all()
    assert len(set(SCENE_CLASSES)) == len(SCENE_CLASSES)
    counts = torch.bincount(batch.classes[batch.classes > 0], minlength=len(SCENE_CLASSES))
    # The classes of the objects are equally likely: five standard deviations of a binomial.
    total, share = int(counts.sum()), 1 / (len(SCENE_CLASSES) - STUFF)
    spread = 5 * math.sqrt(total * share * (1 - share))
    assert ((counts[STUFF:] - total * share).abs() < spread).all()
    used = (batch.classes > 0).sum(1)
    assert set(used.tolist()) == set(range(2, SLOTS + 1))


def test_color_does_not_tell_the_class():
    batch = sample_scenes(3000, (16, 16), generator=seeded(1))
    assert (batch.images >= 0).all()  # enough pixels for the rare one that noise takes below 0
    hot = torch.nn.functional.one_hot(batch.labels, len(SCENE_CLASSES)).flatten(1, 2).double()
    area = hot.sum(1)
    # Mean color of each class in each scene, then its mean over the scenes that show the class.
    color = torch.einsum("bcp,bpk->bkc", batch.images.flatten(2).double(), hot)
    color = color / area.clamp(min=1).unsqueeze(-1)
    expected = color[area > 0].mean(0)
    for index, name in enumerate(SCENE_CLASSES):
        shown = color[area[:, index] > 0, index]
        assert len(shown) > 500, name
        error = shown.std(0) / math.sqrt(len(shown))
        # 12 classes x 3 channels: five standard errors are passed by chance once in 50,000.
        assert ((shown.mean(0) - expected).abs() < 5 * error).all(), name
        assert (shown.std(0) > 0.08).all(), name  # and the colors do vary within a class


# Area and polar moment about the centroid, of the shapes within the unit circle.
SQUARE, BAR = 2 * 0.71, (2 * 0.95, 2 * 0.3)
SHAPES = {
    "ringed disk": (math.pi, math.pi / 2),
    "checked square": (SQUARE**2, SQUARE**4 / 6),
    "striped triangle": (3 * math.sqrt(3) / 4, 3 * math.sqrt(3) / 16),
    "plain ring": (math.pi * (1 - 0.5**2), math.pi / 2 * (1 - 0.5**4)),
    "dotted cross": (
        2 * BAR[0] * BAR[1] - BAR[1] ** 2,
        BAR[0] * BAR[1] * (BAR[0] ** 2 + BAR[1] ** 2) / 6 - BAR[1] ** 4 / 6,
    ),
    # Two triangles less the hexagon of circumradius 1 / sqrt(3) that they share.
    "spotted star": (math.sqrt(3), 3 * math.sqrt(3) / 8 - 5 * math.sqrt(3) / 8 / 9),
    "zigzag half-disk": (math.pi / 2, math.pi / 4 - math.pi / 2 * (4 / (3 * math.pi)) ** 2),
    "latticed bar": (BAR[0] * BAR[1], BAR[0] * BAR[1] * (BAR[0] ** 2 + BAR[1] ** 2) / 12),
}


def test_every_object_has_the_shape_of_its_class():
    """Area squared over polar moment depends on the shape alone, not on its size or angle."""
    assert set(SHAPES) == set(SCENE_CLASSES[STUFF:])
    side = 128
    batch = sample_scenes(400, (side, side), generator=seeded(2), objects=(1, 1))
    box = batch.boxes[:, 0]
    whole = (box[:, :2] > 0).all(1) & (box[:, 2:] < side).all(1) & batch.valid[:, 0]
    mask = (batch.instances[whole] == 1).double()
    place = torch.arange(side, dtype=torch.float64)
    area = mask.sum((1, 2))
    moment = torch.zeros_like(area)
    for line in (mask.sum(1), mask.sum(2)):
        mean = (line * place).sum(1) / area
        moment = moment + (line * (place - mean[:, None]) ** 2).sum(1)
    ratio, classes = area**2 / moment, batch.classes[whole, 0]
    for name, (true_area, true_moment) in SHAPES.items():
        mine = ratio[classes == SCENE_CLASSES.index(name)]
        assert len(mine) >= 10, name
        torch.testing.assert_close(
            mine.mean(), torch.tensor(true_area**2 / true_moment).double(), rtol=0.02, atol=0
        )


@given(generators())
def test_shapes_have_no_handedness_and_a_diameter_of_two(generator):
    u, v = torch.rand(2, 200, generator=generator).mul(3).sub(1.5)
    for name, (shape, _) in scenes._THINGS.items():
        inside = shape(u, v) > 0
        assert torch.equal(inside, shape(-u, v) > 0), name
        points = torch.stack([u, v], 1)[inside]
        assert (torch.cdist(points, points) <= 2).all(), name


@given(generators())
def test_textures_are_weights(generator):
    """Outside [0, 1] a weight would spill into the number of the region."""
    u, v = torch.rand(2, 500, generator=generator).mul(40).sub(20)
    for name, (_, texture) in scenes._CLASSES.items():
        weight = texture(u, v)
        assert ((weight >= 0) & (weight <= 1)).all(), name
        if name != "plain ring":
            assert weight.std() > 0.1, name


@pytest.mark.parametrize(
    ("count", "size", "objects", "words"),
    [
        (-1, (8, 8), (2, 8), "count should be 0 or more, but it is -1"),
        (1, (0, 8), (2, 8), r"size should be .* but it is \(0, 8\)"),
        (1, (8, -3), (2, 8), r"size should be .* but it is \(8, -3\)"),
        (1, (8, 8), (3, 2), r"objects should be .* but it is \(3, 2\)"),
        (1, (8, 8), (-1, 2), r"objects should be .* but it is \(-1, 2\)"),
        (1, (8, 8), (2, 9), r"objects should be .* but it is \(2, 9\)"),
    ],
)
def test_wrong_numbers_are_named(count, size, objects, words):
    with pytest.raises(ValueError, match=rf"^densekit\.scenes\.sample_scenes: {words}"):
        sample_scenes(count, size, objects=objects)


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="argument 'size'"):
        sample_scenes(1, 8)
    with pytest.raises(TypeError, match="argument 'count'"):
        sample_scenes(1.5, (8, 8))


def test_a_large_image():
    batch = sample_scenes(1, (480, 640), generator=seeded(0))
    assert batch.images.shape == (1, 3, 480, 640)
    assert batch.valid.any()


def test_light_reaches_the_ends_of_a_long_image():
    """Expected brightness is that of the colors, 0.5, times a light between 0.43 and 1."""
    brightness = sample_scenes(400, (4, 200), generator=seeded(0)).images.mean((0, 1, 2))
    assert ((brightness > 0.5 * 0.7) & (brightness < 0.5)).all()
