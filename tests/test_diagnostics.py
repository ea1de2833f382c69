"""Diagnostics of dense features against the papers' formulas and slow loops."""

import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from strategies import (
    batches,
    boxes_within,
    degenerate_boxes,
    feature_pairs,
    generators,
    image_box,
    sizes,
    tensors,
    uniform,
    valid_rows,
)
from torch import nn
from torchvision import ops
from densekit import (
    affinity_matrix,
    coupling_images,
    coupling_rate,
    dense_structure_score,
    effective_rank,
    l2_normalize,
    layer_bias,
    layer_features,
    map_to_rows,
    mean_cosine_similarity,
    norm_outliers,
    off_diagonal_cosine,
    pca_colors,
    position_share,
    rows_to_map,
    sample_boxes_at_iou,
    similarity_iou_curve,
)
from densekit.diagnostics import _dimension, _radius, _separation, _token_scale

DATA = Path(__file__).parent / "data"

# ---------------------------------------------------------------------------------- affinity


def slow_affinity(rows, columns, temperature):
    """DUPR's Eq 9, entry by entry."""

    def similarity(a, b):
        return a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)

    got = np.zeros((len(rows), len(columns)))
    for j, b in enumerate(columns):
        total = sum(math.exp(similarity(a, b) / temperature) for a in rows)
        for i, a in enumerate(rows):
            got[i, j] = math.exp(similarity(a, b) / temperature) / total
    return torch.from_numpy(got)


@given(feature_pairs(), st.floats(1e-3, 10))
def test_each_column_of_the_affinity_sums_to_one(pair, temperature):
    got = affinity_matrix(*pair, temperature=temperature)
    assert got.shape == (*pair[0].shape[:-1], pair[1].shape[-2])
    assert ((got >= 0) & (got <= 1)).all()
    torch.testing.assert_close(got.sum(-2), torch.ones_like(pair[1][..., 0]))


@given(feature_pairs(), st.floats(0.05, 2))
def test_the_affinity_is_the_papers_formula(pair, temperature):
    got = affinity_matrix(*pair, temperature=temperature)
    for index in np.ndindex(pair[0].shape[:-2]):
        rows, columns = (x[index].numpy() for x in pair)
        torch.testing.assert_close(got[index], slow_affinity(rows, columns, temperature))


@given(feature_pairs(), generators())
def test_permuted_rows_permute_the_affinity(pair, generator):
    orders = [torch.randperm(x.shape[-2], generator=generator) for x in pair]
    moved = (x[..., order, :] for x, order in zip(pair, orders, strict=True))
    want = affinity_matrix(*pair, temperature=0.1)[..., orders[0], :][..., orders[1]]
    torch.testing.assert_close(affinity_matrix(*moved, temperature=0.1), want)


@given(feature_pairs(), generators())
def test_the_length_of_the_features_does_not_matter(pair, generator):
    longer = (x * uniform(generator, *x.shape[:-1], 1, low=0.1, high=10) for x in pair)
    got = affinity_matrix(*longer, temperature=0.1)
    torch.testing.assert_close(got, affinity_matrix(*pair, temperature=0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rows_that_are_found_again_give_the_identity(dtype):
    angles = torch.arange(12) * math.tau / 12  # neighbors have cosine 0.87
    rows = torch.stack([angles.cos(), angles.sin()], -1).to(dtype)
    got = affinity_matrix(rows, rows)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got, torch.eye(12, dtype=got.dtype), rtol=0, atol=1e-6)


def test_zero_features_are_found_nowhere_in_particular():
    got = affinity_matrix(torch.zeros(4, 3), torch.rand(2, 3))
    assert torch.equal(got, torch.full((4, 2), 0.25))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=f"affinity_matrix: temperature is {temperature}"):
        affinity_matrix(torch.zeros(2, 3), torch.zeros(2, 3), temperature=temperature)


def test_the_affinity_refuses_features_of_another_width():
    with pytest.raises(TypeError, match=r"affinity_matrix: argument 'features2'.*d=3.*\(2, 4\)"):
        affinity_matrix(torch.zeros(2, 3), torch.zeros(2, 4))


# ------------------------------------------------------------------------- similarity and IoU

# Boxes here lie in the middle third: as large as they can be, their moves stay inside the map.
MIDDLE = torch.tensor([1 / 3, 1 / 3, 2 / 3, 2 / 3], dtype=torch.float64)


@st.composite
def objects(draw, batch=None, least=0):
    """Maps `(*batch, d, h, w)`, boxes in their middle, and which to use."""
    batch = draw(batches()) if batch is None else batch
    d, n = draw(st.integers(2, 4)), draw(st.integers(least, 3))
    maps = draw(tensors((*batch, d, *draw(sizes()))))
    regions = boxes_within(draw(generators()), MIDDLE.expand(*batch, n, 4))
    return maps, regions, draw(valid_rows((*batch, n)))


def levels(least=0):
    """A few overlaps in [0, 1]."""
    return st.lists(st.floats(0, 1), min_size=least, max_size=4)


@given(objects())
def test_a_box_is_like_itself(case):
    maps, regions, valid = case
    got, found = similarity_iou_curve(maps, regions, valid, ious=(1.0, 1))
    assert (found == valid.any()).all()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.full_like(got, float(valid.any())))


def test_the_affinity_ignores_autocast():
    features = [torch.rand(9, 8, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    want = affinity_matrix(*features)
    with torch.autocast("cpu", torch.bfloat16):
        got = affinity_matrix(*features)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@given(objects(), st.floats(0.1, 2), levels())
def test_a_constant_map_is_alike_everywhere(case, value, ious):
    maps, regions, valid = case
    got, _ = similarity_iou_curve(torch.full_like(maps, value), regions, valid, ious=ious)
    torch.testing.assert_close(got, torch.full((len(ious),), float(valid.any())).double())


@given(objects((2,), 1), levels(1), st.integers(1, 4), st.integers(0, 99))
def test_the_curve_is_the_papers_formula(case, ious, size, seed):
    maps, regions, valid = case
    h, w = maps.shape[-2:]
    got, _ = similarity_iou_curve(
        maps, regions, valid, ious=ious, size=size, generator=torch.Generator().manual_seed(seed)
    )
    generator = torch.Generator().manual_seed(seed)
    for similarity, iou in zip(got, ious, strict=True):
        moved = sample_boxes_at_iou(regions, iou, generator=generator)
        cosines = []
        for index in valid.nonzero().tolist():
            image = maps[tuple(index[:-1])][None]
            cells = torch.stack([x[tuple(index)] for x in (regions, moved)])
            cells = cells * torch.tensor([w, h, w, h])
            pooled = ops.roi_align(image, [cells], size, sampling_ratio=2, aligned=True)
            cosines.append(torch.cosine_similarity(*pooled, dim=0).mean())
        want = torch.stack(cosines).mean() if cosines else torch.zeros(()).double()
        torch.testing.assert_close(similarity, want)


@given(objects(), st.data(), levels())
def test_boxes_that_are_not_used_may_be_anything(case, data, ious):
    maps, regions, valid = case
    bad = data.draw(degenerate_boxes(valid.shape), label="bad") / 8
    spoiled = torch.where(valid[..., None], regions, bad)

    def curve(regions, valid):
        generator = torch.Generator().manual_seed(0)
        return similarity_iou_curve(maps, regions, valid, ious=ious, generator=generator)

    want = curve(regions, valid)
    torch.testing.assert_close(curve(spoiled, valid), want)
    torch.testing.assert_close(curve(spoiled, None), want)


def test_features_of_places_fall_off_with_the_overlap():
    y, x = torch.meshgrid(*[(torch.arange(32) + 0.5) / 32 * 6] * 2, indexing="ij")
    waves = torch.stack([x.sin(), x.cos(), y.sin(), y.cos()])
    regions = MIDDLE.float().expand(200, 4)
    got, _ = similarity_iou_curve(
        waves,
        regions,
        ious=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        generator=torch.Generator().manual_seed(0),
    )
    assert (got.diff() > 0.005).all()
    assert got[-1].item() == pytest.approx(1)
    # A shift by s turns half the features by 6 s: (cos 6 dx + cos 6 dy) / 2, and s = 1/3 at 0.
    assert got[0].item() == pytest.approx(math.cos(2), abs=0.02)


def test_a_moved_box_that_leaves_the_map_is_left_out():
    maps, corner = torch.ones(2, 6, 6), torch.tensor([0.0, 0.0, 0.3, 0.3]).expand(50, 4)
    generator = torch.Generator().manual_seed(0)
    got = similarity_iou_curve(maps, corner, ious=(0.1, 0.5, 0.9), generator=generator)
    torch.testing.assert_close(got.similarity, torch.ones(3))  # outside the map would count as 0
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    got = similarity_iou_curve(maps, whole, ious=(0.5, 1.0))
    assert got.similarity.tolist() == pytest.approx([0, 1])
    assert got.valid.tolist() == [False, True]  # the 0 is no measurement


def test_no_overlap_to_measure_gives_an_empty_curve():
    empty = similarity_iou_curve(torch.rand(2, 3, 3), image_box((1, 1))[None], ious=())
    assert empty.similarity.shape == empty.valid.shape == (0,)
    half = torch.rand(2, 3, 3, dtype=torch.bfloat16)
    empty = similarity_iou_curve(half, image_box((1, 1))[None].float(), ious=())
    assert empty.similarity.dtype == torch.float32


def test_no_box_to_measure_gives_zeros_with_a_graph():
    maps = torch.rand(2, 3, 3, requires_grad=True)
    got, found = similarity_iou_curve(maps, torch.zeros(0, 4), ious=(0.0, 0.5))
    assert not found.any()
    assert got.tolist() == [0, 0]
    assert (torch.autograd.grad(got.sum(), maps)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_curve_of_half_features_is_float32(dtype):
    maps = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0))
    got, want = (
        similarity_iou_curve(
            x,
            MIDDLE.float().expand(9, 4),
            ious=(0.2, 1.0),
            generator=torch.Generator().manual_seed(0),
        ).similarity
        for x in (maps.to(dtype), maps.to(dtype).float())
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=1e-2)


def test_the_curve_refuses_what_makes_no_sense():
    maps, regions = torch.zeros(2, 3, 3), torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"sample_boxes_at_iou: iou is 1.5"):
        similarity_iou_curve(maps, regions, ious=(0.5, 1.5))
    with pytest.raises(ValueError, match=r"roi_align: size is 0"):
        similarity_iou_curve(maps, regions, ious=(0.5,), size=0)
    with pytest.raises(TypeError, match=r"similarity_iou_curve: argument 'valid'.*n=4"):
        similarity_iou_curve(maps, regions, torch.ones(3).bool(), ious=(0.5,))


# ------------------------------------------------------------------------------ layer features


def small_net():
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 4, 3, 2, 1), act=nn.ReLU(inplace=True),
            block=nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(inplace=True)),
        )
    )  # fmt: skip


class Tokens(nn.Module):
    """A patch embedding with two tokens in front, as a ViT with registers has."""

    def __init__(self):
        super().__init__()
        self.patch, self.layer = nn.Conv2d(3, 5, 4, 4), nn.Identity()

    def forward(self, x):
        tokens = self.patch(x).flatten(2).mT
        return self.layer(torch.cat([tokens.new_full((len(x), 2, 5), 9.0), tokens], 1)).mean(1)


@given(generators(), st.permutations(["stem", "act", "block", "block.0"]))
def test_layer_features_are_what_the_layers_give(generator, names):
    torch.manual_seed(0)
    net, x = small_net().double(), uniform(generator, 2, 3, 6, 10)
    got = layer_features(net, x, names)
    assert [*got] == names
    stem = net.stem(x)
    want = {"stem": stem.clone(), "act": stem.relu(), "block.0": net.block[0](stem.relu())}
    want["block"] = want["block.0"].relu()
    for name in names:  # the ReLUs behind them work in place
        torch.testing.assert_close(got[name], want[name])


def test_layer_features_carry_gradients_and_leave_no_hook():
    net, x = small_net(), torch.rand(1, 3, 8, 8, requires_grad=True)
    net.train()
    layer_features(net, x, ["block"])["block"].sum().backward()
    assert x.grad.abs().sum() > 0
    assert net.stem.weight.grad is not None
    assert net.training
    with pytest.raises(RuntimeError):
        layer_features(net, torch.rand(1, 4, 8, 8), ["block"])  # the model itself refuses
    assert not any(module._forward_hooks for module in net.modules())


def test_tokens_become_the_map_of_their_grid():
    net, x = Tokens(), torch.rand(2, 3, 8, 12)
    got = layer_features(net, x, ["layer"], patch=4)["layer"]
    torch.testing.assert_close(got, net.patch(x))


def test_of_a_layer_that_runs_twice_the_last_output_counts():
    net = nn.Sequential(shared := nn.Conv2d(3, 3, 1), nn.ReLU(), shared)
    x = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(layer_features(net, x, ["0"])["0"], net(x))


@pytest.mark.parametrize("temperature", [1e-320, 1e-100, 1e100, math.inf])
def test_an_affinity_of_any_temperature_is_a_share(temperature):
    rows = uniform(torch.Generator().manual_seed(0), 6, 3, dtype=torch.float32)
    shares = affinity_matrix(rows, rows, temperature=temperature)
    want = torch.eye(6) if temperature < 1 else torch.full((6, 6), 1 / 6)
    torch.testing.assert_close(shares, want)


def test_images_whose_channels_come_last_are_refused():
    images = torch.zeros(2, 8, 12, 3)
    with pytest.raises(TypeError, match=r"layer_features: argument 'images'.*channels seem to"):
        layer_features(small_net(), images, ["block"])
    with pytest.raises(TypeError, match=r"coupling_images: argument 'objects_a'.*channels seem"):
        coupling_images(images, images)
    with pytest.raises(TypeError, match=r"channels seem to come last"):
        layer_bias(small_net(), images, ["block"])


def test_layers_that_cannot_be_read_are_named():
    x = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"no layer 'blok'.*'block'"):
        layer_features(small_net(), x, ["blok"])
    for patch in (None, 1):
        with pytest.raises(
            ValueError, match=r"'layer' returns a tensor of shape \(1, 6, 5\).*the side of their"
        ):
            layer_features(Tokens(), x, ["layer"], patch=patch)
    net = Tokens()
    net.unused = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="'unused' did not run"):
        layer_features(net, x, ["unused"])
    net.layer.forward = lambda x: (x, x)
    net.layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="'layer' returns a tuple"):
        layer_features(net, x, ["layer"], patch=4)


@given(generators(), st.integers(2, 5))
def test_the_bias_of_layers_is_that_of_their_maps(generator, n):
    torch.manual_seed(0)
    net, objects = small_net().double().eval(), uniform(generator, n, 3, 8, 8)
    got = layer_bias(net, objects, ["block", "stem"])
    rates, cosines = (torch.zeros(2, n, dtype=torch.float64) for _ in "rc")
    for i in range(n):
        made = coupling_images(objects[i], objects[i - 1])
        for k in (0, 1):
            layer = [lambda x: net(x), lambda x: net.stem(x)][k]
            pair = (layer(x[None])[0] for x in (made.together, made.alone))
            rates[k, i] = coupling_rate(*pair, made.box_a, made.box_b)
            cosines[k, i] = mean_cosine_similarity(layer(objects[i, None].repeat(1, 1, 3, 3))[0])
    torch.testing.assert_close(got.coupling_rate, rates.mean(1))
    torch.testing.assert_close(got.mean_cosine, cosines.mean(1))
    said = layer_bias(net, objects, ["block", "stem"], objects.roll(1, 0))
    torch.testing.assert_close([*said], [*got])


def test_zero_padding_and_a_wide_kernel_show_as_bias():
    torch.manual_seed(0)
    objects = torch.randn(8, 3, 12, 12)
    narrow, wide = (nn.Conv2d(3, 32, side, padding=side // 2) for side in (1, 13))
    assert layer_bias(narrow, objects, [""]).mean_cosine.item() == pytest.approx(1, abs=1e-5)
    assert layer_bias(narrow, objects, [""]).coupling_rate.item() == pytest.approx(1, abs=1e-5)
    assert layer_bias(wide, objects, [""]).mean_cosine < 0.95
    with pytest.raises(ValueError, match="the number of objects is 1; give 2 or more"):
        layer_bias(narrow, objects[:1], [""])


@given(generators(), st.integers(2, 7), st.integers(1, 8))
def test_the_bias_does_not_depend_on_the_chunk(generator, n, chunk):
    torch.manual_seed(0)
    net, objects = small_net().double().eval(), uniform(generator, n, 3, 8, 8)
    torch.testing.assert_close(
        layer_bias(net, objects, ["stem"], chunk=chunk), layer_bias(net, objects, ["stem"])
    )


@given(generators(), st.integers(3, 6))
def test_objects_without_features_do_not_count_in_the_bias(generator, n):
    objects = uniform(generator, n, 3, 8, 8, low=0.1, high=1.0)
    others = uniform(generator, n, 3, 8, 8, low=0.1, high=1.0)
    net = nn.Conv2d(3, 4, 5, padding=2, bias=False).double()
    black = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    want = layer_bias(net, objects, [""], others)
    some = torch.cat([objects, black])
    got = layer_bias(net, some, [""], torch.cat([others, others[:2]]))
    torch.testing.assert_close([*got], [*want])
    alone = nn.Conv2d(3, 4, 1, bias=False).double()  # nothing of an object reaches its neighbor
    got = layer_bias(alone, torch.cat([objects, objects[:2]]), [""], torch.cat([others, black]))
    torch.testing.assert_close(got.coupling_rate, torch.ones_like(got.coupling_rate))
    assert [x.item() for x in layer_bias(net, black, [""])] == [0, 0]


@given(generators(), st.integers(2, 6), st.integers(2, 6))
def test_features_that_differ_by_rounding_alone_have_no_spread(generator, n, d):
    same = uniform(generator, 1, d, low=0.5, high=2.0).float().expand(16 * n, d)
    weights = uniform(generator, 16 * n, 16 * n).float()
    rows = (weights / weights.sum(-1, keepdim=True)) @ same  # as an interpolation rounds
    maps = rows_to_map(rows.unflatten(0, (n, 16)), (4, 4))
    assert effective_rank(rows) == 1
    assert position_share(maps) == 0
    structure = dense_structure_score(maps, generator=generator)
    assert structure.inter == structure.intra == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_set_that_is_not_finite_has_no_rank_and_spoils_no_other(dtype, value):
    rows = torch.randn(3, 10, 4, dtype=dtype)
    want = effective_rank(rows)
    rows[1, 2, 3] = value
    got = effective_rank(rows)
    assert got[1].isnan()
    assert torch.equal(got[::2], want[::2])


@pytest.mark.parametrize("scale", [1e-20, 1e20, 1e38])
def test_colors_need_no_scale(scale):
    maps = torch.rand(2, 5, 3, 3)
    torch.testing.assert_close(pca_colors(maps * scale), pca_colors(maps), rtol=0, atol=1e-3)


def test_tokens_have_a_bias_too():
    torch.manual_seed(0)
    got = layer_bias(Tokens(), torch.rand(4, 3, 8, 8), ["layer", "patch"], patch=4)
    torch.testing.assert_close(got.mean_cosine[0], got.mean_cosine[1])
    torch.testing.assert_close(got.coupling_rate[0], got.coupling_rate[1])


# ---------------------------------------------------------------------------------- coupling


@given(st.data(), sizes(high=9))
def test_the_objects_are_where_their_boxes_say_and_all_else_is_black(data, size):
    shape = (*data.draw(batches()), data.draw(st.integers(1, 3)), *size)
    a, b = (data.draw(tensors(shape, 1, 2), label=name) for name in "ab")
    got = coupling_images(a, b)
    (h, w), (tall, wide) = size, got.together.shape[-2:]
    assert (tall, wide) == (h * 3 // 2, w * 5 // 2)
    assert got.box_a.shape == got.box_b.shape == (*shape[:-3], 4)
    pixels = torch.tensor([wide, tall, wide, tall]).double()
    frame = (slice(None),) * (len(shape) - 2)
    want = {"together": torch.zeros_like(got.together), "alone": torch.zeros_like(got.alone)}
    for box, objects, shown in ((got.box_a, a, want), (got.box_b, b, ("together",))):
        corners = (box * pixels).reshape(-1, 4)
        torch.testing.assert_close(corners, corners.round(), rtol=0, atol=1e-9)
        for x1, y1, x2, y2 in corners.round().int().unique(dim=0).tolist():
            assert (y2 - y1, x2 - x1) == size
            for name in shown:
                want[name][(*frame, slice(y1, y2), slice(x1, x2))] = objects
    assert torch.equal(got.together, want["together"])
    assert torch.equal(got.alone, want["alone"])


def test_the_objects_touch_and_have_a_margin_of_a_quarter():
    got = coupling_images(torch.ones(3, 64, 32), torch.ones(3, 64, 32))
    pixels = torch.tensor([80.0, 96.0, 80.0, 96.0])
    assert (got.box_a * pixels).tolist() == pytest.approx([8, 16, 40, 80])
    assert (got.box_b * pixels).tolist() == pytest.approx([40, 16, 72, 80])


@st.composite
def coupled(draw):
    """Directions of A beside B, of A alone and of B, near enough that no cosine is 0."""
    batch, d = draw(batches()), draw(st.integers(1, 4))
    return [draw(tensors((*batch, d), 0.1, 2)) for _ in range(3)]


def painted(*columns):
    """Maps of 4 x 6 cells whose left, middle and right third are constant."""
    return torch.stack(columns, -1).repeat_interleave(2, -1)[..., None, :].repeat_interleave(4, -2)


LEFT = torch.tensor([0.0, 0.25, 1 / 3, 1.0], dtype=torch.float64)
RIGHT = torch.tensor([2 / 3, 0.0, 1.0, 0.75], dtype=torch.float64)


@given(coupled(), generators())
def test_the_coupling_rate_is_the_ratio_of_two_cosines(directions, generator):
    beside, free, other = directions
    places = (x.expand(*beside.shape[:-1], 4) for x in (LEFT, RIGHT))
    noise = uniform(generator, *beside.shape)
    maps = painted(beside, noise, other), painted(free, other, noise)
    want = torch.cosine_similarity(beside, other, -1) / torch.cosine_similarity(free, other, -1)
    torch.testing.assert_close(coupling_rate(*maps, *places), want)


@given(coupled(), st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_coupling_rate_does_not_know_the_length_of_features(directions, one, other):
    places = [x.expand(*directions[0].shape[:-1], 4) for x in (LEFT, RIGHT)]
    maps = painted(*directions), painted(*directions[::-1])
    got = coupling_rate(maps[0] * one, maps[1] * other, *places)
    torch.testing.assert_close(got, coupling_rate(*maps, *places))


@given(st.data())
def test_features_that_do_not_know_their_neighbor_have_rate_one(data):
    shape = (*data.draw(batches()), 3, *data.draw(sizes(2, 6)))
    a, b = (data.draw(tensors(shape, 0.5, 2), label=name) for name in "ab")
    got = coupling_images(a, b)
    # The pixels are the features: nothing passes from one to the other.
    rate = coupling_rate(*got)
    torch.testing.assert_close(rate, torch.ones_like(rate))


def test_features_that_take_over_from_the_neighbor_have_a_rate_above_one():
    got = coupling_images(*torch.eye(3)[:2, :, None, None].expand(2, 3, 8, 8) + 0.1)
    blurred = [torch.nn.functional.avg_pool2d(x, 7, 1, 3) for x in (got.together, got.alone)]
    assert coupling_rate(*blurred, got.box_a, got.box_b) > 1.05


def test_a_rate_over_nothing_is_zero_and_has_a_gradient():
    maps = torch.zeros(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    got = coupling_rate(maps, maps, LEFT.expand(2, 4), RIGHT.expand(2, 4))
    assert got.tolist() == [0, 0]
    assert torch.autograd.grad(got.sum(), maps)[0].isfinite().all()


# ----------------------------------------------------------------------------- positional bias


@given(st.data(), sizes(high=4))
def test_the_same_features_at_nine_places_have_similarity_one(data, size):
    shape = (*data.draw(batches()), data.draw(st.integers(1, 3)), *size)
    one = data.draw(tensors(shape, 0.1, 2), label="features")
    got = mean_cosine_similarity(one.repeat(*[1] * (len(shape) - 2), 3, 3))
    torch.testing.assert_close(got, torch.ones_like(got))


@given(st.data(), sizes(high=3), st.floats(0.1, 10))
def test_positional_bias_is_the_mean_cosine_of_the_pooled_thirds(data, size, scale):
    shape = (*data.draw(batches()), 3, 3 * size[0], 3 * size[1])
    maps = data.draw(tensors(shape), label="features")
    got = mean_cosine_similarity(maps)
    assert got.shape == shape[:-3]
    for index in np.ndindex(shape[:-3]):
        thirds = torch.nn.functional.avg_pool2d(maps[index], size).flatten(1).T
        others = torch.cat([thirds[:4], thirds[5:]])
        want = torch.cosine_similarity(thirds[4:5], others, dim=-1).mean()
        torch.testing.assert_close(got[index], want)
    torch.testing.assert_close(mean_cosine_similarity(maps * scale), got)


@given(tensors((4, 5, 5), 0.5, 2))
def test_features_that_know_the_border_are_less_alike(one):
    maps = one.repeat(1, 3, 3)
    maps[:, 0] = torch.tensor([2.0, 0.0, -2.0, 0.0])[:, None]
    assert mean_cosine_similarity(maps) < 1 - 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_at_nine_places_are_as_alike(dtype):
    one = torch.randn(64, 14, 14, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = mean_cosine_similarity(one.repeat(1, 3, 3))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(1, abs=1e-5)


def test_the_diagnostics_refuse_what_does_not_fit():
    maps, place = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4)
    with pytest.raises(TypeError, match="coupling_images: argument 'objects_b'"):
        coupling_images(maps, maps[..., :3])
    with pytest.raises(TypeError, match="coupling_rate: argument 'alone'"):
        coupling_rate(maps, maps[:, :2], place, place)
    with pytest.raises(TypeError, match="coupling_rate: argument 'box_b'"):
        coupling_rate(maps, maps, place, place[:1])
    with pytest.raises(ValueError, match="the map is 0 x 4"):
        mean_cosine_similarity(maps[:, :, :0])


# --------------------------------------------------------------------------------------- PCA


def test_colors_are_the_stretched_components_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([5.0, 3.0, 2.0, 0.5, 0.1])[:, None, None]
    maps = torch.randn(2, 5, 4, 3, generator=generator) * scale
    got = pca_colors(maps).movedim(1, -1).reshape(-1, 3).double()
    want = torch.from_numpy(PCA(3).fit_transform(maps.movedim(1, -1).reshape(-1, 5)))
    want = (want - want.amin(0)) / (want.amax(0) - want.amin(0))
    for one, other in zip(got.T, want.T, strict=True):
        # The sign of a component is free.
        off = min((one - other).abs().max(), (1 - one - other).abs().max())
        assert off < 1e-4


@given(st.data())
def test_colors_are_between_zero_and_one(data):
    shape = data.draw(st.sampled_from([(1, 1, 2, 2), (2, 3, 3, 2), (1, 5, 2, 4), (3, 2, 1, 1)]))
    got = pca_colors(data.draw(tensors(shape, dtype=torch.float32), label="maps"))
    assert got.shape == (shape[0], 3, *shape[2:])
    assert ((got >= 0) & (got <= 1)).all()


@given(tensors((1, 5, 1, 2), dtype=torch.float32))
def test_components_that_do_not_exist_are_zero(maps):
    got = pca_colors(maps)  # two cells lie on one line
    assert got[0, 0, 0].sort().values.tolist() == [0, 1]
    assert (got[0, 1:] == 0).all()


@given(st.floats(-10, 10, width=32))
def test_constant_features_have_one_color(value):
    assert (pca_colors(torch.full((2, 4, 3, 3), value)) == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_count_as_zero(value):
    maps = torch.rand(2, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    spoiled, zeroed = maps.clone(), maps.clone()
    spoiled[1, 2, 0, 1], zeroed[1, 2, 0, 1] = value, 0
    assert torch.equal(pca_colors(spoiled), pca_colors(zeroed))
    assert torch.equal(pca_colors(spoiled.double()), pca_colors(zeroed))


@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (2, 0, 2, 2), (2, 4, 0, 2), (1, 1, 1, 1)])
def test_nothing_to_paint_is_black(shape):
    got = pca_colors(torch.zeros(shape))
    assert got.shape == (shape[0], 3, *shape[2:])
    assert (got == 0).all()


# ------------------------------------------------------------------------------------- health


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def turn(generator, d):
    return torch.linalg.qr(gaussian(generator, d, d)).Q


@given(st.integers(1, 8), st.integers(1, 6), st.floats(-4, 4), generators())
def test_the_effective_rank_knows_no_turn_no_scale_and_no_shift(n, d, exponent, generator):
    rows = gaussian(generator, n, d)
    rank = effective_rank(rows)
    assert 1 - 1e-9 <= rank <= max(1, min(n - 1, d)) + 1e-9
    moved = rows @ turn(generator, d) * 10.0**exponent + gaussian(generator, d)
    torch.testing.assert_close(effective_rank(moved), rank, rtol=1e-7, atol=0)
    torch.testing.assert_close(effective_rank(rows.float()).double(), rank, rtol=1e-4, atol=0)
    plain = effective_rank(rows, centered=False)
    assert 1 - 1e-9 <= plain <= min(n, d) + 1e-9
    turned = effective_rank(rows @ turn(generator, d) * 10.0**exponent, centered=False)
    torch.testing.assert_close(turned, plain, rtol=1e-7, atol=0)


@given(st.integers(0, 5), st.integers(6, 8), generators())
def test_the_effective_rank_is_that_of_planted_directions(rank, d, generator):
    basis = turn(generator, d)[:rank]
    rows = torch.cat([basis, -basis, torch.zeros(3, d)]).double()
    torch.testing.assert_close(effective_rank(rows + 1).item(), float(max(rank, 1)))


@given(batches(), st.integers(0, 6), st.integers(1, 4), generators())
def test_the_mean_cosine_is_that_of_all_pairs(batch, n, d, generator):
    rows = gaussian(generator, *batch, n, d)
    unit = rows / rows.norm(dim=-1, keepdim=True)
    cosines = (unit @ unit.mT).sum((-2, -1)) - n
    got = off_diagonal_cosine(rows)
    torch.testing.assert_close(got, cosines / max(1, n * (n - 1)), rtol=0, atol=1e-12)
    assert (got >= -1 / max(1, n - 1) - 1e-12).all()


def test_the_mean_cosine_reaches_its_limits():
    same = torch.tensor([1.0, 2.0]).expand(5, 2)
    assert abs(off_diagonal_cosine(same) - 1) < 1e-6
    simplex = torch.eye(5, dtype=torch.float64) - 1 / 5
    assert abs(off_diagonal_cosine(simplex) + 1 / 4) < 1e-12
    assert off_diagonal_cosine(torch.zeros(3, 2)) == 0


@st.composite
def map_sets(draw, least=1):
    images, (h, w), d = draw(st.integers(least, 5)), draw(sizes(high=3)), draw(st.integers(1, 4))
    return gaussian(draw(generators()), images, d, h, w)


@given(map_sets(), generators(), st.floats(-3, 3))
def test_the_share_of_the_position_is_an_analysis_of_variance(maps, generator, exponent):
    rows = map_to_rows(maps).numpy()
    between = len(rows) * ((rows.mean(0) - rows.mean((0, 1))) ** 2).sum()
    total = ((rows - rows.mean((0, 1))) ** 2).sum()
    share = position_share(maps, adjusted=False)
    if total > 1e-12:
        np.testing.assert_allclose(share.item(), between / total, rtol=0, atol=1e-9)
    assert -1e-12 <= share <= 1 + 1e-12
    turned = map_to_rows(maps) @ turn(generator, maps.shape[1]) * 10.0**exponent
    turned = rows_to_map(turned + gaussian(generator, maps.shape[1]), maps.shape[-2:])
    for adjusted in (False, True):
        got = position_share(turned, adjusted=adjusted)
        want = position_share(maps, adjusted=adjusted)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_planted_position_code_shows_and_noise_does_not():
    generator = torch.Generator().manual_seed(0)
    place = gaussian(generator, 1, 4, 7, 7)
    noise = gaussian(generator, 40, 4, 7, 7)
    assert abs(position_share(noise)) < 0.02
    assert position_share(noise, adjusted=False) > 0.02
    assert abs(position_share(noise + place) - 0.5) < 0.1
    assert position_share(place.expand(40, 4, 7, 7)) == 1
    assert position_share(torch.full((3, 4, 7, 7), 0.1)) == 0
    assert position_share(noise[:1]) == 0


@given(st.integers(0, 99), st.floats(0, 3))
def test_the_share_of_the_position_is_that_of_a_planted_code(seed, strength):
    place = gaussian(seeded(seed), 1, 4, 7, 7)
    noise = gaussian(seeded(seed + 100), 40, 4, 7, 7)
    spread = (place - place.mean((-2, -1), keepdim=True)).square().mean() * strength**2
    got = position_share(noise + strength * place)
    torch.testing.assert_close(got, spread / (spread + 1), rtol=0, atol=0.05)


@given(st.integers(2, 6), generators(), st.floats(-3, 3), st.floats(0.5, 5))
def test_cosines_and_outliers_know_no_turn_and_no_scale(d, generator, exponent, factor):
    rows = gaussian(generator, 3, 4, d)
    turned = rows @ turn(generator, d) * 10.0**exponent
    # A cosine has no length: each row may have a scale of its own.
    own_scale = 10 ** gaussian(generator, 3, 4, 1)
    found = off_diagonal_cosine(turned.flatten(0, 1) * own_scale.flatten(0, 1))
    torch.testing.assert_close(found, off_diagonal_cosine(rows.flatten(0, 1)), rtol=0, atol=1e-9)
    shares = [norm_outliers(rows_to_map(x, (2, 2)), factor=factor) for x in (rows, turned)]
    assert shares[0] == shares[1]


@given(st.integers(2, 8), generators(), st.floats(0, 0.5))
def test_features_that_shrink_towards_one_vector_become_alike(d, generator, rest):
    noise = gaussian(generator, 30, d)
    vector = gaussian(generator, d)
    vector = vector / vector.norm() * d**0.5
    spread = 1 - off_diagonal_cosine(vector + rest * noise)
    # Each row is within asin(r) of the vector, so two of them are within twice that angle.
    largest = (rest * noise).norm(dim=-1).max() / vector.norm()
    assert spread <= 2 * largest**2 + 1e-12


@given(st.integers(0, 30), st.integers(0, 9), st.floats(0.5, 5))
def test_outliers_are_counted_against_the_median(tokens, large, factor):
    rows = torch.ones(1, tokens + 1, 1)
    large = min(large, tokens // 3)
    rows[:, :large] = 10
    share = norm_outliers(rows_to_map(rows, (1, tokens + 1)), factor=factor)
    want = large / (tokens + 1) if factor >= 1 else 1.0
    torch.testing.assert_close(share.item(), want, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="factor is 0; give one above 0"):
        norm_outliers(torch.ones(1, 1, 1, 1), factor=0)


@settings(max_examples=6)
@given(st.integers(2, 6), generators(), st.floats(-2, 2))
def test_the_structure_score_knows_no_turn_and_no_scale(d, generator, exponent):
    rows = gaussian(generator, 5, 6, d)
    moved = rows @ turn(generator, d) * 10.0**exponent
    found = []
    for x in (rows, moved):
        maps = rows_to_map(x, (2, 3))
        options = {"local_clusters": 2, "global_clusters": 3, "group": 2}
        found.append(dense_structure_score(maps, **options, generator=seeded(1)))
    for one, other in zip(*found, strict=True):
        assert one.isfinite()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
    inter, intra, dimension, score = found[0]
    torch.testing.assert_close(score, inter - intra + dimension)
    assert 0 < dimension <= 1 + 1e-9


def test_clusters_far_apart_score_higher_than_noise_and_a_collapse_lower():
    generator = torch.Generator().manual_seed(0)
    noise = gaussian(generator, 16, 8, 6, 6)
    kinds = gaussian(generator, 12, 8)[torch.randint(12, (16, 6, 6), generator=generator)]
    clustered = kinds.movedim(-1, 1) + 0.05 * noise
    collapsed = 1 + 0.01 * noise[:, :1].expand_as(noise)
    scores = [dense_structure_score(x, generator=seeded()) for x in (clustered, noise, collapsed)]
    assert scores[0].score > scores[1].score
    assert scores[1].dimension > 2 * scores[2].dimension


def test_the_structure_score_has_whole_and_partial_groups():
    maps = gaussian(torch.Generator().manual_seed(0), 3, 4, 1, 2)
    maps[0, 0, 0, 0] = torch.nan
    assert all(x.isfinite() for x in dense_structure_score(maps, group=2))
    for name in ("local_clusters", "global_clusters", "group"):
        with pytest.raises(ValueError, match=f"{name} is 0; give 1 or more"):
            dense_structure_score(maps, **{name: 0})


def known(name):
    return {key: torch.from_numpy(np.asarray(x)) for key, x in np.load(DATA / name).items()}


def test_the_parts_of_the_structure_score_are_the_known_numbers():
    golden = known("dse_unit_0.npz")
    tokens = l2_normalize(golden["features"])
    groups = tokens.unflatten(0, (-1, int(golden["group"]))).flatten(1, 2)
    scale = _token_scale(tokens)
    labels = golden["group_labels"]
    found = {
        "scale": scale,
        "inter": _separation(groups, labels, 5).mean() / scale,
        "intra_image": _radius(tokens, golden["image_labels"], 3).mean() / scale,
        "intra_group": _radius(groups, labels, 5).mean() / scale,
        "dimensionality": _dimension(tokens, golden["permutation"]),
    }
    for name, value in found.items():
        torch.testing.assert_close(value, golden[name], rtol=1e-10, atol=1e-10)


def test_health_is_the_known_numbers():
    golden = known("health_0.npz")
    rows = golden["features"]
    maps = rows_to_map(rows, (4, 5))
    found = {
        "position_share": position_share(maps, adjusted=False),
        "position_share_adjusted": position_share(maps),
        "outlier_share_3x_median": norm_outliers(maps),
        "mean_cosine_all": off_diagonal_cosine(rows.flatten(0, 1)),
        "mean_cosine_within_images": off_diagonal_cosine(rows).mean(),
        "effective_rank": effective_rank(rows.flatten(0, 1), centered=False),
        "effective_rank_centered": effective_rank(rows.flatten(0, 1)),
    }
    for name, value in found.items():
        torch.testing.assert_close(value, golden[name], rtol=1e-10, atol=1e-10)


def test_the_views_of_an_affinity_may_have_two_dtypes():
    rows1, rows2 = torch.rand(3, 4).double(), torch.rand(5, 4)
    got = affinity_matrix(rows1, rows2)
    torch.testing.assert_close(got, affinity_matrix(rows1, rows2.double()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("patch", [0, -1, 5])
def test_a_patch_that_is_none_of_the_images_is_refused(patch):
    with pytest.raises(ValueError, match=f"layer_features: patch is {patch}; give 1 to 4"):
        layer_features(nn.Conv2d(3, 2, 1), torch.rand(1, 3, 4, 6), [""], patch=patch)
