"""The CrOC recipe: its losses against the paper's formulas. Its runs: test_recipes.py."""

import math
from dataclasses import replace
from pathlib import Path

import croc
import numpy as np
import pytest
import timm
import torch
from croc import PRESETS, CrOC, Views
from hypothesis import given
from hypothesis import strategies as st
from processes import on_processes
from torch import nn
from torch.nn.functional import cross_entropy, normalize
import densekit as dk
from densekit.testing import assert_world_size_invariant

SEEDS = torch.arange(3)  # of the images of `batch`
SMALL = replace(
    PRESETS["demo"], head=(32, 24, 16), tokens="values", start=4, batch=8, epochs=2, warmup=0.5,
    workers=0, log_every=1, save_every=3, views=Views(size=32), device="cpu",
)  # fmt: skip

# Wrong options, and how the sentence about each of them begins.
WRONG = [
    (["--freeze", "-1"], "--freeze is -1"),
    (["--freeze", "9"], "--freeze is 9"),
    (["--weights", " "], "--weights is empty"),
    (["--weights", "nowhere"], "nowhere does not exist"),
    (["--weights", "timm:no_such_net", "--freeze", "1"], "--weights is timm:no_such_net"),
    (["--arch", "vit_smal"], "--arch is vit_smal"),
    (["--arch", "vit_small_patch14_reg4_dinov2"], "--views.size is 64: give a multiple of 14, the"),
    (["--weights", "timm:resnet18"], "--weights is timm:resnet18"),
    (["--head", "4", "512", "512"], "--head is 4 512 512"),
    (["--head", "256", "1", "512"], "--head is 256 1 512"),
    (["--head", "256", "512", "0"], "--head is 256 512 0"),
    (["--alpha", "-1"], "--alpha is -1"),
    (["--alpha", "nan"], "--alpha is nan"),
    (["--start", "1"], "--start is 1"),
    (["--start", "129"], "--start is 129"),
    (["--position", "-1"], "--position is -1"),
    (["--position", "nan"], "--position is nan"),
    (["--max-clusters", "1"], "--max-clusters is 1"),
    (["--max-clusters", "-3"], "--max-clusters is -3"),
    (["--max-clusters", "13"], "--max-clusters is 13: give a number from 2 to 12"),
    (["--teacher-temperature", "0", "0.07", "30"], "--teacher-temperature is 0.0 0.07 30.0"),
    (["--teacher-temperature", "0.04", "nan", "30"], "--teacher-temperature is 0.04 nan 30.0"),
    (["--teacher-temperature", "0.04", "0.07", "-1"], "--teacher-temperature is 0.04 0.07 -1.0"),
    (["--batch", "1"], "--batch is 1"),
    (["--epochs", "0"], "--epochs is 0"),
    (["--lr", "-1"], "--lr is -1"),
    (["--lr", "nan"], "--lr is nan"),
    (["--warmup", "-1"], "--warmup is -1"),
    (["--weight-decay", "-0.1", "0.4"], "--weight-decay is -0.1 0.4"),
    (["--weight-decay", "0.04", "nan"], "--weight-decay is 0.04 nan"),
    (["--momentum", "1.5"], "--momentum is 1.5"),
    (["--momentum", "1"], "--momentum is 1.0: give a number from 0 to less than 1"),
    (["--momentum", "nan"], "--momentum is nan"),
    (["--drop-path", "1"], "--drop-path is 1"),
    (["--drop-path", "-0.1"], "--drop-path is -0.1"),
    (["--clip", "-1"], "--clip is -1"),
    (["--clip", "nan"], "--clip is nan"),
    (["--freeze-last", "-1"], "--freeze-last is -1"),
    (["--seed", "-1"], "--seed is -1"),
    (["--workers", "-1"], "--workers is -1"),
    (["--log-every", "0"], "--log-every is 0"),
    (["--save-every", "0"], "--save-every is 0"),
    (["--views.size", "0"], "--views.size is 0"),
    (["--views.scale", "1.0", "0.2"], "--views.scale is 1.0 0.2"),
    (["--views.scale", "0.0", "1.0"], "--views.scale is 0.0 1.0"),
    (["--views.scale", "0.2", "1.5"], "--views.scale is 0.2 1.5"),
    (["--views.hue", "0.6"], "--views.hue is 0.6"),
    (["--views.hue", "nan"], "--views.hue is nan"),
    (["--views.blur", "2.0", "0.1"], "--views.blur is 2.0 0.1"),
    (["--views.blur", "-1.0", "2.0"], "--views.blur is -1.0 2.0"),
    (["--views.blur", "0.1", "1e30"], "--views.blur is 0.1 1e+30"),
    (["--views.size", "36"], "--views.size is 36"),
]
# Python 3.12 warns of any fork beside threads; these children touch nothing that a thread holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
DATA = Path(__file__).parents[1] / "data"


def batch(count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    pairs = dk.sample_view_pairs((64, 64), (count,), generator=generator)
    views = [dk.View(view.box.to(dtype), view.flip) for view in pairs[:2]]
    return [torch.rand(count, 3, 32, 32, generator=generator, dtype=dtype) for _ in "12"], views


def distillation(student, teacher, center, tau):
    """Eq 4 and 6 of one pair of rows."""
    return cross_entropy(student / 0.1, ((teacher - center) / tau).softmax(-1))


def hard(plan, labels, view, cluster):
    """The part of each token of a view in a cluster: of its own tokens alone."""
    own = labels[view] == cluster
    return torch.where(own, plan.view(2, 16, -1)[view, :, cluster], 0.0)


def soft(plan, labels, view, cluster):
    """The same, of all tokens (Eq 2)."""
    return plan.view(2, 16, -1)[view, :, cluster]


@pytest.mark.parametrize(("alpha", "pooling"), [(1.0, hard), (0.5, soft)])
def test_the_losses_are_those_of_the_paper(alpha, pooling):
    torch.manual_seed(0)
    model = CrOC(replace(SMALL, alpha=alpha, pooling=pooling.__name__)).double()
    images, views = batch(dtype=torch.float64)
    with torch.no_grad():  # a teacher of its own, and centers that are not zero
        for parameter in model.teacher.parameters():
            parameter.add_(torch.randn_like(parameter) / 50)
    centers = {kind: torch.randn_like(model.get_buffer(kind)) / 10 for kind in ("image", "cluster")}
    for kind, center in centers.items():
        model.get_buffer(kind).copy_(center)
    loss, terms = model(images, views, 0.05, SEEDS)

    def head(network, kind, x):
        prototypes = normalize(network["last"][kind].weight, dim=-1)
        return normalize(network["mlp"](x), dim=-1) @ prototypes.T

    tokens = {}
    for name in ("student", "teacher"):
        network = getattr(model, name)
        features = [network["encoder"].forward_features(x) for x in images]
        tokens[name] = features
    (s1, s2), (t1, t2) = tokens["student"], tokens["teacher"]

    image = 0
    for s, t in ((s1, t2), (s2, t1)):
        s, t = head(model.student, "image", s[:, 0]), head(model.teacher, "image", t[:, 0])
        image += distillation(s, t, centers["image"], 0.05) / 2
    torch.testing.assert_close(terms["image"], image)

    # Values, keys and queries of the last block, by a hook; each image and head by itself.
    last, seen = model.teacher["encoder"].blocks[-1].attn, []
    handle = last.qkv.register_forward_hook(lambda *x: seen.append(x[-1]))
    for x in images:
        model.teacher["encoder"](x)
    handle.remove()
    q, k, v = torch.stack(seen).view(2, 3, 17, 3, 3, 32).unbind(3)  # view, image, token, head
    attention = torch.einsum("vihd,vinhd->vihn", q[:, :, 0], k) / 32**0.5
    weights = attention.softmax(-1)[..., 1:].permute(1, 2, 0, 3).flatten(2)
    noise = croc.harness.noise(SEEDS, weights.shape[1:], croc.START)
    starts = dk.sample_tokens(
        weights.float(), 4, noise=noise
    )  # the recipe's attention is in float32
    lengths = [torch.cat([x[0], x[1]])[:, 0].norm(dim=-1).mean() for x in tokens.values()]
    rows, found = [], 0
    for i in range(3):
        where = [dk.coordinate_map(dk.View(x.box[i], x.flip[i]), (4, 4)) for x in views]
        for h in range(3):
            z = torch.cat([v[0, i, 1:, h], v[1, i, 1:, h]])
            merged = dk.sinkhorn_merge(
                z, torch.cat(where).view(32, 2), weights[i, h].float().double(), starts[i, h]
            )
            plan = merged.assignments / merged.assignments.sum(1, keepdim=True)
            labels = plan.argmax(1).view(2, 16)
            found += merged.clusters.item()
            for c in set(labels[0].tolist()) & set(labels[1].tolist()):
                pooled = {}
                for name, length in zip(tokens, lengths, strict=True):
                    for view in range(2):
                        weight = pooling(plan, labels, view, c)[:, None]
                        mean = (weight * tokens[name][view][i, 1:]).sum(0) / weight.sum()
                        pooled[name, view] = normalize(mean, dim=0) * length
                rows.append(pooled)
    cluster = 0
    for one, other in ((0, 1), (1, 0)):
        s = torch.stack([row["student", one] for row in rows])
        t = torch.stack([row["teacher", other] for row in rows])
        s, t = head(model.student, "cluster", s), head(model.teacher, "cluster", t)
        cluster += distillation(s, t, centers["cluster"], 0.05) / 2
    torch.testing.assert_close(terms["cluster"], cluster)
    torch.testing.assert_close(loss, image + alpha * cluster)
    assert terms["clusters"] == found / 9
    assert terms["valid"] == len(rows) / 3
    for kind in centers:
        entropy, kl = terms[f"{kind}_entropy"], terms[f"{kind}_kl"]
        torch.testing.assert_close(entropy + kl, terms[kind].detach())
        assert 0 <= entropy <= math.log(len(centers[kind]))
        assert kl >= 0
        assert not torch.equal(model.get_buffer(kind), centers[kind])


def test_only_the_student_learns_and_only_it_drops_paths():
    torch.manual_seed(0)
    model = CrOC(replace(SMALL, drop_path=0.5))
    model.train()  # as a caller may do at any time
    loss, _ = model(*batch(), 0.07, SEEDS)
    loss.backward()
    for name, parameter in model.student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    pixels = torch.cat(batch()[0])
    first, again, other = (model.encode_student(pixels, SEEDS + k) for k in (0, 0, 3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    second = [croc.encode(model.teacher["encoder"], pixels)[0] for _ in "12"]
    assert torch.equal(*second)


def test_without_any_valid_cluster_the_loss_is_finite_and_carries_the_graph(monkeypatch):
    torch.manual_seed(0)
    prune = dk.prune_clusters

    def none(assignments):
        found = prune(assignments)
        return found._replace(assignments=found.assignments * 0, valid=found.valid & False)

    monkeypatch.setattr(dk, "prune_clusters", none)
    model = CrOC(SMALL)
    loss, terms = model(*batch(), 0.07, SEEDS)
    loss.backward()
    assert all(torch.as_tensor(term).isfinite() for term in terms.values())
    assert terms["cluster"] == terms["valid"] == 0
    assert torch.equal(model.cluster, torch.zeros(16))  # the center stays
    for name, parameter in model.student.named_parameters():
        assert parameter.grad is not None, name  # DDP waits for every one
        assert parameter.grad.isfinite().all(), name


def sample_the_heaviest(weights, count, noise):
    """Start tokens that no other image, process or random number can change."""
    return weights.topk(count).indices


def without_some_clusters(find_clusters):
    """Views that begin at 1000 pixels or beyond have no valid cluster."""

    def find(self, *tokens_and_views):
        counts, pruned = find_clusters(self, *tokens_and_views)
        views = tokens_and_views[-2]  # the seeds come last
        allowed = (views[0].box[:, 0] < 1000)[:, None, None]
        valid = pruned.valid & allowed
        kept = torch.where(valid[..., None, None, :], pruned.assignments, 0.0)
        return counts, pruned._replace(assignments=kept, valid=valid)

    return find


def in_double():
    """A model in float64 throughout: timm resamples positions in float32, so none are resampled."""
    model = CrOC(SMALL).double()
    for network in (model.student, model.teacher):
        network["encoder"].set_input_size(img_size=SMALL.views.size)
    model.teacher.requires_grad_(False)  # its positions are new parameters
    return model


def distributed_step(state, images, views, wrap=lambda model: model):
    """Loss, terms, gradients and centers after a step with these images."""
    model = in_double()
    model.load_state_dict(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrOC, "find_clusters", without_some_clusters(CrOC.find_clusters))
        patch.setattr(dk, "sample_tokens", sample_the_heaviest)
        network = wrap(model)
        loss, terms = network(images, views, 0.07, torch.arange(len(images[0])))
    loss.backward()
    terms = {name: term.detach() for name, term in terms.items()}
    gradients = [parameter.grad for parameter in model.student.parameters()]
    return loss.detach(), terms, gradients, model.image, model.cluster


def part_of_the_batch(rank, group, state, images, views):
    own = slice(rank, None, group.size())
    own_images = [x[own] for x in images]
    own_views = [dk.View(view.box[own], view.flip[own]) for view in views]
    ddp = nn.parallel.DistributedDataParallel
    return distributed_step(state, own_images, own_views, ddp)


def test_processes_have_the_loss_and_the_gradient_of_one():
    """They have different numbers of valid clusters: on four of them, one has none at all."""
    torch.manual_seed(0)
    model, (images, views) = in_double(), batch(4, torch.float64)
    with torch.no_grad():  # a teacher of its own, and centers that are not zero
        for parameter in model.teacher.parameters():
            parameter.add_(torch.randn_like(parameter) / 50)
    for kind in ("image", "cluster"):
        center = model.get_buffer(kind)
        center.copy_(torch.randn_like(center) / 10)
    views = [dk.View(view.box.clone(), view.flip) for view in views]
    for view in views:
        view.box[1] += 1000

    def one_step(part, group):
        ddp = nn.parallel.DistributedDataParallel
        loss, terms, *others = distributed_step(model.state_dict(), *part, ddp)
        cluster_terms = [terms[name] for name in ("cluster", "cluster_entropy", "cluster_kl")]
        has_valid = dk.all_sum(terms["valid"].double(), group) > 0
        return loss, cluster_terms, others, has_valid.double()

    assert_world_size_invariant(one_step, (images, views))
    _, terms, *_ = distributed_step(model.state_dict(), images, views)
    assert terms["valid"] > 0


def select_valid(distill):
    """`CrOC.distill` on the valid rows alone, which then have no axis for the images."""

    def selected(self, kind, student_rows, teacher_rows, temperature, valid=None):
        if valid is not None:
            student_rows, teacher_rows = student_rows[valid], teacher_rows[valid]
        return distill(self, kind, student_rows, teacher_rows, temperature)

    return selected


def selecting_part(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrOC, "distill", select_valid(CrOC.distill))
        return part_of_the_batch(*arguments)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_masked_clusters_are_the_selected_ones(size):
    """On four processes, one has no valid cluster at all."""
    torch.manual_seed(1)
    model, (images, views) = in_double(), batch(4, torch.float64)
    views = [dk.View(view.box.clone(), view.flip) for view in views]
    for view in views:
        view.box[1] += 1000
    arguments = (model.state_dict(), images, views)
    masked = on_processes(size, part_of_the_batch, *arguments)
    selected = on_processes(size, selecting_part, *arguments)
    assert masked[0][1]["cluster"] > 0
    torch.testing.assert_close(masked, selected)


@given(st.data())
def test_each_gradient_is_clipped_as_by_torch_alone(data):
    shapes = data.draw(st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4))
    largest = data.draw(st.floats(0.01, 10) | st.just(math.inf))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in [*shapes, [2]]]
    for parameter in parameters[:-1]:  # the last one has no gradient
        parameter.grad = torch.randn(parameter.shape) * 10 ** data.draw(st.integers(-9, 3))
    copies = [nn.Parameter(torch.zeros_like(x)) for x in parameters]
    for parameter, copy in zip(parameters, copies, strict=True):
        copy.grad = None if parameter.grad is None else parameter.grad.clone()

    norms = [nn.utils.clip_grad_norm_(x, largest) for x in copies]
    norm = croc.clip_each(parameters, largest)
    torch.testing.assert_close(norm, torch.stack(norms).norm())
    torch.testing.assert_close([x.grad for x in parameters[:-1]], [x.grad for x in copies[:-1]])
    assert parameters[-1].grad is None


def test_the_flags_of_the_authors_program_give_its_clusters_and_centroids(monkeypatch):
    """Golden vectors: three heads, fewer clusters than start tokens."""
    golden = dict(np.load(DATA / "croc_50_B2_H3_N49_d64_K5_ncm4_lp4_lam20_it5_cls_gauss.npz"))
    golden = {name: torch.from_numpy(values) for name, values in golden.items()}
    config = replace(
        SMALL, tokens="keys", token_weights="cosine", start=5, max_clusters=4, similarity="dot",
        merge="mass", cost_range="batch", normalize="columns",
    )  # fmt: skip
    keys = golden["tokens"].double().view(4, 3, 50, 64)  # (view, image), head
    last = golden["last_tokens"].double()
    corner, size = golden["crop_box_xywh"].split(2, -1)
    boxes = torch.cat([corner, corner + size], -1)  # (view, image)
    views = [dk.View(*view) for view in zip(boxes, golden["flip"], strict=True)]
    start = golden["init_idx"].view(2, 3, 5)
    monkeypatch.setattr(dk, "sample_tokens", lambda weights, count, noise: start)
    counts, pruned = CrOC(config).find_clusters(last, keys, keys, keys, views, SEEDS[:2])
    assert torch.equal(counts.flatten(), golden["chosen_K"])
    assert torch.equal(pruned.labels.flatten(2).flatten(0, 1), golden["hard_idx"].long())
    assert torch.equal(pruned.valid.flatten().nonzero()[:, 0], golden["valid"])

    masks = pruned.assignments.permute(2, 0, 3, 1, 4).flatten(3).flatten(0, 1)
    valid = pruned.valid.flatten(1).repeat(2, 1)
    for kind, tokens in (("c", last), ("s", golden["student_last_tokens"].double())):
        want = torch.cat([golden[f"{kind}1"], golden[f"{kind}2"]])
        rows = croc.pool_clusters(tokens, masks)[valid]
        torch.testing.assert_close(rows, want, rtol=0, atol=1e-6)  # its positions are float32


@pytest.mark.parametrize("changes", [{"position": math.inf}, {"choose_by": "semantic"}])
def test_the_options_of_the_clusters_leave_a_loss_and_valid_clusters(changes):
    torch.manual_seed(0)
    model = CrOC(replace(SMALL, **changes))
    loss, terms = model(*batch(), 0.07, SEEDS)
    loss.backward()
    assert all(torch.as_tensor(term).isfinite() for term in terms.values())
    assert terms["valid"] > 0
    assert all(x.grad.isfinite().all() for x in model.student.parameters())


def test_an_images_clusters_do_not_depend_on_its_neighbors(monkeypatch):
    torch.manual_seed(0)
    model, (images, views) = CrOC(SMALL), batch()
    starts = torch.rand(3, 3, 32).argsort(-1)[..., :4]
    encoded = croc.encode(model.teacher["encoder"], torch.cat(images))
    monkeypatch.setattr(dk, "sample_tokens", lambda weights, count, noise: starts)
    found, pruned = model.find_clusters(*encoded, views, SEEDS)
    for i in range(3):
        rows, own = [i, 3 + i], [dk.View(y.box[i : i + 1], y.flip[i : i + 1]) for y in views]
        monkeypatch.setattr(
            dk, "sample_tokens", lambda weights, count, noise, i=i: starts[i : i + 1]
        )
        alone, clusters = model.find_clusters(*(x[rows] for x in encoded), own, SEEDS[:1])
        assert torch.equal(alone[0], found[i])
        torch.testing.assert_close(clusters.assignments[0], pruned.assignments[i])


def test_the_picture_has_a_color_for_every_cluster(tmp_path):
    """Without the positional cost, nearly all of these start tokens remain clusters."""
    torch.manual_seed(0)
    config = replace(SMALL, start=128, position=0.0, views=Views(size=64))
    model, (_, views) = CrOC(config), batch()
    images = [torch.randn(3, 3, 64, 64) for _ in views]
    with torch.no_grad():
        croc.draw(model, images, views, SEEDS, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


@pytest.mark.parametrize("tokens", ["values", "keys", "queries", "last"])
@pytest.mark.parametrize("weights", ["attention", "cosine"])
def test_every_choice_of_tokens_and_weights_clusters(tokens, weights):
    torch.manual_seed(0)
    model, (images, views) = CrOC(replace(SMALL, tokens=tokens, token_weights=weights)), batch()
    encoded = croc.encode(model.teacher["encoder"], torch.cat(images))
    last, queries, keys, values = encoded
    given = {}

    def record(*arguments, **options):
        given["tokens"], given["weights"] = arguments[0], arguments[2]
        return merge(*arguments, **options)

    merge = dk.sinkhorn_merge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dk, "sinkhorn_merge", record)
        clusters, pruned = model.find_clusters(*encoded, views, SEEDS)
    heads = 1 if tokens == "last" else 3
    assert clusters.shape == (3, heads)
    assert pruned.labels.shape == (3, heads, 2, 16)
    kinds = {"queries": queries, "keys": keys, "values": values, "last": last[:, None]}
    chosen = kinds[tokens]
    first = torch.cat([chosen[1, :, 1:], chosen[4, :, 1:]], 1)  # image 1 in both views
    torch.testing.assert_close(given["tokens"][1], first)
    r = given["weights"] / given["weights"].sum(-1, keepdim=True)
    if weights == "cosine":
        patches, cls = normalize(chosen[:, :, 1:], dim=-1), normalize(chosen[:, :, :1], dim=-1)
        cosine = (patches * cls).sum(-1)
        r0 = (torch.cat([cosine[1], cosine[4]], 1) / 2).softmax(-1)
    else:
        scores = (queries[:, :, :1] * keys).sum(-1) / 32**0.5
        scores = scores.softmax(-1)[:, :, 1:]
        scores = scores.mean(1, keepdim=True) if tokens == "last" else scores
        r0 = torch.cat([scores[1], scores[4]], 1)
        r0 = r0 / r0.sum(-1, keepdim=True)
    torch.testing.assert_close(r[1], r0)


def test_the_encoder_is_timms():
    encoder = croc.build_encoder("vit_small_patch16_224", 0.1)
    plain = timm.create_model("vit_small_patch16_224", num_classes=0)
    plain.load_state_dict(encoder.state_dict())
    images = torch.rand(2, 3, 224, 224)
    tokens, *attention = croc.encode(encoder.eval(), images)
    torch.testing.assert_close(tokens, plain.eval().forward_features(images))
    assert [x.shape for x in attention] == [(2, 6, 197, 64)] * 3
    assert croc.to_map(tokens).shape == (2, 384, 14, 14)
    torch.testing.assert_close(croc.to_map(tokens)[0, :, 2, 5], tokens[0, 1 + 2 * 14 + 5])


def test_the_presets_are_the_papers():
    coco = PRESETS["coco"]
    assert (coco.batch, coco.epochs, coco.lr, coco.warmup) == (256, 300, 5e-4, 10)
    assert (coco.weight_decay, coco.momentum, coco.drop_path) == ((0.04, 0.4), 0.996, 0.1)
    assert (coco.clip, coco.freeze_last, coco.teacher_temperature[:2]) == (3.0, 1.0, (0.07, 0.07))
    assert (coco.arch, coco.head) == ("vit_small_patch16_224", (2048, 65536, 8192))
    assert (coco.alpha, coco.tokens, coco.token_weights) == (1.0, "values", "attention")
    assert (coco.start, coco.position) == (12, 4.0)
    assert (coco.max_clusters, coco.choose_by, coco.cost_range) == (None, "cost", "problem")
    assert (coco.similarity, coco.merge, coco.normalize) == ("cosine", "average", "rows")
    assert coco.views == Views(224, (0.25, 1.0), 0.1, (0.1, 2.0))
    imagenet = replace(coco, preset="imagenet", tokens="keys", position=3.0, batch=1024)
    assert PRESETS["imagenet"] == imagenet
    assert PRESETS["dino"] == replace(coco, preset="dino", alpha=0.0)


def test_the_schedules_reach_the_optimizer_and_the_teacher(tmp_path, monkeypatch):
    seen, updates = [], []
    step, update = torch.optim.AdamW.step, dk.ema_update

    def record(self, *arguments, **options):
        heads = [name for name, x in models[0].student["last"].named_parameters() if x.grad is None]
        seen.append([(g["lr"], g["weight_decay"]) for g in self.param_groups] + [len(heads)])
        sizes = [{x.ndim for x in group["params"]} for group in self.param_groups]
        assert min(sizes[0]) > 1
        assert sizes[1] == {1}
        return step(self, *arguments, **options)

    def follow(teacher, student, *, momentum):
        updates.append(momentum)
        return update(teacher, student, momentum=momentum)

    models = []
    monkeypatch.setattr(CrOC, "compile", lambda self, disable: models.append(self))
    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    monkeypatch.setattr(dk, "ema_update", follow)
    source = croc.harness.image_source
    monkeypatch.setattr(
        croc.harness, "image_source", lambda data, scenes, **_: source(data, scenes=16)
    )
    monkeypatch.setattr(croc, "evaluate", lambda *arguments: None)
    config = replace(
        SMALL, run=tmp_path, epochs=4, warmup=1.0, lr=0.32, weight_decay=(0.04, 0.4), momentum=0.9
    )
    croc.train(config)  # two steps an epoch: eight; lr 0.01
    lr = [row[0][0] for row in seen]
    assert lr[:3] == pytest.approx([0.0, 0.005, 0.01])
    assert lr[-1] < lr[3] < 0.01
    assert [row[1][0] for row in seen] == lr
    assert all(row[1][1] == 0 for row in seen)
    decay = [0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert [row[0][1] for row in seen] == pytest.approx(decay)
    assert [row[2] for row in seen] == [2, 2] + [0] * 6  # both last layers wait for an epoch
    assert updates == pytest.approx(
        [1 - (1 - 0.9) * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    )


def test_a_clip_of_zero_clips_nothing(tmp_path, monkeypatch):
    norms, step = {}, torch.optim.AdamW.step

    def record(self, *arguments, **options):
        parameters = [x for group in self.param_groups for x in group["params"]]
        each = [x.grad.norm() for x in parameters if x.grad is not None]
        norms.setdefault(clip, []).append(torch.stack(each))
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    source = croc.harness.image_source
    monkeypatch.setattr(
        croc.harness, "image_source", lambda data, scenes, **_: source(data, scenes=8)
    )
    monkeypatch.setattr(croc, "evaluate", lambda *arguments: None)
    for clip in (0.0, math.inf, 0.01):
        croc.train(replace(SMALL, run=tmp_path / str(clip), epochs=1, clip=clip))
    assert norms[0.0][0].max() > 0.02
    torch.testing.assert_close(norms[0.0], norms[math.inf], rtol=0, atol=0)
    assert norms[0.01][0].max() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
        ("vit_small_patch16_dinov3", {"img_size": 64}),
        ("vit_small_patch16_rope_mixed_224", {}),
        ("eva02_tiny_patch14_224", {}),
    ],
)
def test_registers_and_rotations_are_timms(arch, options, monkeypatch):
    """These queries, keys and values of the last block give what timm's attention gives."""
    if not timm.is_model(arch):
        pytest.skip("this timm has no such network")
    create = timm.create_model

    def create_small(name, **more):
        return create(name, depth=2, embed_dim=64, num_heads=2, **options, **more)

    monkeypatch.setattr(timm, "create_model", create_small)
    encoder = croc.build_encoder(arch, 0.0).eval()
    for value in encoder.parameters():
        value.data += torch.randn_like(value) / 10
    attention = encoder.blocks[-1].attn
    seen = []
    attention.register_forward_hook(
        lambda _, rows, more, found: seen.append((rows[0], more.get("rope"), found)),
        with_kwargs=True,
    )
    patch = encoder.patch_embed.patch_size[0]
    images = torch.rand(2, 3, 3 * patch, 3 * patch)
    with torch.no_grad():
        tokens, *found = croc.encode(encoder, images)
        rows, rope, wanted = seen[0]
        queries, keys, values = croc.attend(attention, rows, rope)
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values)
        mixed = attention.norm(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention.proj(mixed), wanted)
        plain = encoder.forward_features(images)
    prefix = encoder.num_prefix_tokens
    kept = [0, *range(prefix, prefix + 9)]
    torch.testing.assert_close(tokens, plain[:, kept])
    for kind, part in zip((queries, keys, values), found, strict=True):
        torch.testing.assert_close(part, kind[:, :, kept])
    assert croc.attention_weights(*found[:2]).shape == (2, 2, 10)
