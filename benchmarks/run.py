"""Measure densekit against other libraries and plain loops, and print one Markdown table.

    python benchmarks/run.py                      # everything, some minutes on two cores
    python benchmarks/run.py --only geometry checks
    python benchmarks/run.py --only moco --threads 1 --cpu-time     # on a busy machine

Within a row the two sides take turns, and the median of the rounds counts, so that a busy machine
slows both alike. `memory` runs the training step on fake tensors: it needs neither a GPU nor the
memory that it counts.
"""

import argparse
import copy
import functools
import io
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import croc
import croc_loop
import d3ssl
import densesiam
import dupr
import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF
import densekit as dk
import densekit.typing
from densekit.hints import form_of
from densekit.scenes import sample_scenes
from densekit.typing import Float, Tensor, typed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
clock = time.perf_counter


def times(*functions: Callable[[], object], rounds: int = 15, calls: int = 1) -> list[float]:
    """Call the functions in turn, and return the median seconds of a call to each."""
    measured: list[list[float]] = [[] for _ in functions]
    for number in range(rounds + 1):
        for function, seconds in zip(functions, measured, strict=True):
            start = clock()
            for _ in range(calls):
                function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds.append((clock() - start) / calls)
    return [statistics.median(seconds) for seconds in measured]


def row(what: str, ours: str, rival: str, ratio: str) -> None:
    print(f"| {what} | {ours} | {rival} | {ratio} |", flush=True)


def against(what: str, ours: float, rival: float, name: str) -> None:
    row(what, f"{ours * 1e3:.2f} ms", f"{rival * 1e3:.2f} ms ({name})", f"{ours / rival:.2f} x")


def geometry() -> None:
    """Time sampling two views and mapping a grid into both, against loading and cropping."""
    files = []
    for image in sample_scenes(8, (480, 640)).images:
        file = io.BytesIO()
        Image.fromarray((image * 255).byte().movedim(0, -1).numpy()).save(file, "JPEG", quality=90)
        files.append(file)
    size, batch = (480, 640), 64
    pairs = dk.sample_view_pairs(size, (len(files),))

    def geometric(count: int) -> None:
        drawn = dk.sample_view_pairs(size, (count,))
        dk.grid_pairs(drawn.view1, drawn.view2, 7)

    def load_and_crop() -> None:
        for number, file in enumerate(files):
            pixels = torch.from_numpy(np.array(Image.open(file))).movedim(-1, 0)
            for view in pairs[:2]:
                x1, y1, x2, y2 = view.box[number].int().tolist()
                TF.resized_crop(pixels, y1, x1, y2 - y1, x2 - x1, [224, 224], antialias=True)

    whole, one, loading = times(
        lambda: geometric(batch), lambda: geometric(1), load_and_crop, rounds=40
    )
    loading /= len(files)
    for what, seconds in ((f"a batch of {batch}", whole / batch), ("a single image", one)):
        row(
            f"geometry of {what}, each image",
            f"{seconds * 1e6:.0f} us",
            f"{loading * 1e6:.0f} us (decode a 480 x 640 JPEG, crop two views)",
            f"{seconds / loading:.1%}",
        )


def checks() -> None:
    """Measure what `typed` adds to a call: in eager mode, switched off, and compiled."""

    def bare(x: Float[Tensor, "n d"]) -> None:
        return None

    def bare3(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], z: Float[Tensor, "n d"]) -> None:
        return None

    x = torch.ones(2, 3)
    one, three = typed(bare), typed(bare3)
    t0, t1, s0, s1 = times(
        lambda: bare(x), lambda: one(x), lambda: bare3(x, x, x), lambda: three(x, x, x), calls=2000
    )
    each = (s1 - s0 - t1 + t0) / 2
    row("`typed`, eager, one array", f"{(t1 - t0) * 1e6:.1f} us more", "bare function", "")
    row("`typed`, eager, each further array", f"{each * 1e6:.1f} us more", "bare function", "")
    code = (
        "import timeit, torch, densekit; from densekit.typing import typed;"
        "f = lambda x: None; g = typed(f); x = torch.ones(2, 3); n = 50000;"
        "a, b = (min(timeit.repeat(lambda: h(x), number=n, repeat=9)) / n for h in (g, f));"
        "print(f is g, (a - b) * 1e6)"
    )
    off = {**os.environ, "DENSEKIT_TYPECHECK": "0"}
    same, cost = subprocess.check_output([sys.executable, "-c", code], env=off, text=True).split()
    said = "the same function" if same == "True" else "another function"
    row("`typed`, DENSEKIT_TYPECHECK=0", f"{float(cost):.2f} us more", "bare function", said)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append([node.target for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    for function in (dk.l2_normalize, dk.l2_normalize.__wrapped__):
        torch._dynamo.reset()
        torch.compile(function, backend=backend, fullgraph=True)(x)
    equal = "same graph" if graphs[0] == graphs[1] else "another graph"
    row("`typed`, compiled", f"{len(graphs[0])} operations", f"{len(graphs[1])} operations", equal)
    for name, step in demo_steps().items():
        seen = checked_values(step)
        known = {}

        def check() -> None:
            for value in seen:
                known.get(densekit.typing._plainly(form_of)(value))

        alone, whole = times(check, step, rounds=9)
        row(
            f"`typed` in a step of {name}'s demo, {len(seen) // 2} calls",
            f"{alone * 1e3:.2f} ms",
            f"{whole * 1e3:.0f} ms (the step)",
            f"{alone / whole:.2%}",
        )


def demo_steps() -> dict[str, Callable[[], None]]:
    """Return a training step of the demos of DUPR and D3SSL."""
    config = dupr.PRESETS["demo"]
    images, views = inputs(config.batch, DEVICE, config.views.size)
    order = torch.arange(config.batch, device=DEVICE)
    pairs = dupr.DUPR(config).to(DEVICE)
    banks = pairs.init_banks(DEVICE)

    config = d3ssl.PRESETS["demo"]
    crops, places = inputs(config.batch, DEVICE, config.views.size)
    regions = d3ssl.D3SSL(config).to(DEVICE)
    low = 300 * torch.rand(config.batch, config.regions, 2, device=DEVICE)
    boxes = torch.cat([low, low + 180], -1)
    valid = torch.ones(boxes.shape[:-1], dtype=torch.bool, device=DEVICE)
    bank = dk.init_bank(config.bank, config.head[1], device=DEVICE)
    images_of_it = torch.arange(config.batch, device=DEVICE)

    def step_of_pairs() -> None:
        dk.ema_update(pairs.teacher, pairs.student, momentum=0.99, buffers="keep")
        pairs(images, views, banks, order, order)[0].backward()

    def step_of_regions() -> None:
        dk.ema_update(regions.teacher, regions.student, momentum=0.99, buffers="keep")
        regions(crops, places, boxes, valid, bank, images_of_it, images_of_it)[0].backward()

    return {"DUPR": step_of_pairs, "D3SSL": step_of_regions}


def checked_values(step: Callable[[], None]) -> list:
    """Return the arguments and results that `typed` looks at in a step, of forms known to it."""
    seen = []

    def noted(value: object) -> object:
        seen.append(value)
        return form_of(value)

    step()
    densekit.typing.form_of = noted
    step()
    densekit.typing.form_of = form_of
    return seen


def primitives() -> None:
    for d, side in ((2048, 7), (512, 7), (256, 56)):
        features = torch.rand(16, d, side, side, device=DEVICE, requires_grad=True)
        points = torch.rand(16, 49, 2, device=DEVICE)

        def ours() -> None:
            dk.gridsample(features, points).sum().backward()

        def rival() -> None:
            grid = points[:, :, None] * 2 - 1
            F.grid_sample(
                features, grid, align_corners=False, padding_mode="border"
            ).sum().backward()

        what = f"`gridsample`, 16 x {d} x {side} x {side} at 49 points, forward and backward"
        against(what, *times(ours, rival), "F.grid_sample")
    photos = ((64, 64), 48, 64), ((480, 640), 224, 8), ((3000, 4000), 224, 1)
    for (h, w), size, count in photos:
        images, view = torch.rand(count, 3, h, w, device=DEVICE), dk.sample_views((h, w), (count,))
        boxes = view.box.int().tolist()
        view = dk.View(view.box.to(DEVICE), view.flip.to(DEVICE))

        def ours() -> None:
            dk.crop_views(images, view, size)

        def rival() -> None:
            for image, (x1, y1, x2, y2) in zip(images, boxes, strict=True):
                TF.resized_crop(image, y1, x1, y2 - y1, x2 - x1, [size, size], antialias=True)

        what = f"`crop_views`, {count} x {h} x {w} to {size}"
        against(what, *times(ours, rival), "loop of torchvision's resized_crop")
        inside = dk.View(view.box * 0.999 + 0.3, view.flip)

        def fractional() -> None:
            dk.crop_views(images, inside, size)

        def dense() -> None:
            torch.vmap(functools.partial(dk.crop_views, size=size))(images, inside)

        what = f"{what}, fractional boxes"
        against(what, *times(fractional, dense, rounds=5), "products over the whole image")
    image, shares = torch.rand(3, 3000, 4000, device=DEVICE), (1.0, 0.25)
    flip = torch.tensor(False, device=DEVICE)
    corners = [torch.tensor([0.3, 0.3, 3999 * s, 2999 * s], device=DEVICE) for s in shares]
    large, small = times(
        *(lambda box=box: dk.crop_views(image, dk.View(box, flip), 224) for box in corners),
        rounds=5,
    )
    what = "`crop_views`, 1 x 3000 x 4000 to 224, a sixteenth of the area"
    against(what, small, large, "all of it, fractional boxes")
    query = torch.rand(16, 512, 128, device=DEVICE, requires_grad=True)

    def ours() -> None:
        dk.info_nce(query, query.detach(), temperature=0.1).backward()

    def rival() -> None:
        q, k = F.normalize(query, dim=-1), F.normalize(query.detach(), dim=-1)
        target = torch.arange(512, device=DEVICE).expand(16, 512)
        F.cross_entropy((q @ k.mT / 0.1).flatten(0, 1), target.flatten()).backward()

    what = "`info_nce`, 16 sets of 512, 128-d, forward and backward"
    against(what, *times(ours, rival), "F.cross_entropy on the matrix")
    start = time.perf_counter()
    sample_scenes(2048, (64, 64))
    seconds = time.perf_counter() - start
    row("`sample_scenes`, 64 x 64", f"{2048 / seconds:.0f} a second", "", "")


SETTINGS = {
    "SimSiam": (densesiam.Loss(dense=0.0, region=0.0), False),
    "DenseSiam without RegionSim": (densesiam.Loss(), False),
    "DenseSiam with RegionSim": (densesiam.Loss(), True),
}


def build(loss: densesiam.Loss) -> torch.nn.Module:
    return densesiam.DenseSiam(replace(densesiam.PRESETS["paper"], loss=loss))


def inputs(batch: int, device: torch.device, side: int = 224) -> tuple[list[Tensor], list[dk.View]]:
    pairs = dk.sample_view_pairs((480, 640), (batch,))
    images = [torch.rand(batch, 3, side, side, device=device) for _ in range(2)]
    views = [dk.View(view.box.to(device), view.flip.to(device)) for view in pairs[:2]]
    return images, views


def step() -> None:
    """Time a training step of each setting, with ResNet-50 and 224 pixels."""
    batch = 64 if DEVICE.type == "cuda" else 8
    images, views = inputs(batch, DEVICE)
    images = [x.contiguous(memory_format=torch.channels_last) for x in images]

    def stepper(loss: densesiam.Loss, with_region: bool) -> Callable[[], None]:
        model = build(loss).to(DEVICE, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-4)

        def function() -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
                total, _ = model(
                    images, views, with_region, torch.arange(len(images[0]), device=DEVICE)
                )
            optimizer.zero_grad()
            total.backward()
            optimizer.step()

        return function

    measured = times(*(stepper(*setting) for setting in SETTINGS.values()), rounds=5)
    for name, seconds in [*zip(SETTINGS, measured, strict=True)][1:]:
        against(f"a step of {name}, ResNet-50, batch {batch}", seconds, measured[0], "SimSiam")


def memory() -> None:
    """Count the peak memory of a training step of each setting on fake tensors: batch 64, bf16."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    peaks = []
    for loss, with_region in SETTINGS.values():
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = build(loss)
            optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
            tracker = MemTracker()
            tracker.track_external(model, optimizer)
            with tracker:
                for _ in range(2):  # the second step holds the momentum too
                    images, views = inputs(64, torch.device("cpu"))
                    with torch.autocast("cpu", torch.bfloat16):
                        total, _ = model(
                            images, views, with_region, torch.arange(len(images[0]), device=DEVICE)
                        )
                    total.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    tracker.reset_mod_stats()
            (peak,) = tracker.get_tracker_snapshot("peak").values()
            peaks.append(peak["Total"])
    for name, peak in [*zip(SETTINGS, peaks, strict=True)][1:]:
        row(
            f"peak memory of {name}, ResNet-50, batch 64",
            f"{peak / 1e9:.2f} GB",
            f"{peaks[0] / 1e9:.2f} GB (SimSiam)",
            f"{peak / peaks[0] - 1:+.1%}",
        )


def problem(images: int = 16, heads: int = 6, tokens: int = 392) -> tuple[Tensor, ...]:
    """Make tokens, positions, weights and start tokens, shaped as for a ViT-S/16 and two views."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(images, heads, 5, 64, generator=generator)
    kind = torch.randint(5, (images, heads, tokens), generator=generator)
    noise = torch.randn(images, heads, tokens, 64, generator=generator)
    z = kinds.gather(2, kind[..., None].expand(*kind.shape, 64)) + noise
    places = 224 * torch.rand(images, 1, tokens, 2, generator=generator)
    weights = torch.rand(images, heads, tokens, generator=generator)
    start = dk.sample_tokens(weights, 12, generator=generator)
    places = places.expand(images, heads, tokens, 2)
    return tuple(x.to(DEVICE) for x in (z, places, weights, start))


PROGRAM = {"similarity": "dot", "merge": "mass"}  # the variants that the loop implements


def assign(found: dk.MergedClusters) -> tuple[Tensor, Tensor]:
    """Return each view's assignments to the clusters of all heads, and which clusters are valid."""
    pruned = dk.prune_clusters(dk.split_assignments(found.assignments, normalize="columns"))
    return pruned.assignments.permute(0, 2, 3, 1, 4).flatten(-2), pruned.valid


def view_centroids(z: Tensor, places: Tensor, weights: Tensor, start: Tensor, last: Tensor):
    """Cluster the tokens of all heads; return the centroids of both views, in fixed shapes."""
    found = dk.sinkhorn_merge(z, places, weights, start, **PROGRAM)
    assignments, valid = assign(found)
    return dk.pool_masks(last, assignments, average=True), valid, found.clusters


def clustering() -> None:
    """Time CrOC's clustering against a plain loop: 16 images x 6 heads, 392 tokens, K 12 to 2."""
    given = problem()
    last = torch.randn(16, 2, 196, 384, device=DEVICE)
    flat = [x.flatten(0, 1) for x in given]
    start = time.perf_counter()
    compiled = torch.compile(view_centroids, fullgraph=True)
    ours, valid, clusters = compiled(*given, last)
    seconds = time.perf_counter() - start
    loop, rival_clusters = croc_loop.cluster(*given, last)
    assert torch.equal(clusters.flatten(), rival_clusters), "another K"
    # The loop lists the valid clusters by image and head; ours lie side by side in each image.
    same = ours.unflatten(2, (6, 12)).movedim(1, 0)[:, valid]
    torch.testing.assert_close(
        F.normalize(same, dim=-1), F.normalize(torch.stack(loop), dim=-1), rtol=0, atol=1e-4
    )
    measured = times(
        lambda: view_centroids(*given, last),
        lambda: compiled(*given, last),
        lambda: croc_loop.cluster(*given, last),
        lambda: dk.sinkhorn_merge(*given, **PROGRAM),
        lambda: croc_loop.merge_loop(*flat),
    )
    eager, quick, whole, merging, merge_loop = measured
    shape = "16 images x 6 heads, 392 tokens"
    against(f"clusters and view centroids, {shape}, eager", eager, whole, "plain loop")
    against(f"the same, compiled in {seconds:.0f} s", quick, whole, "plain loop")
    against(f"`sinkhorn_merge` alone, {shape}, eager", merging, merge_loop, "plain loop")
    found = dk.sinkhorn_merge(*given, **PROGRAM)
    assignments, _ = assign(found)
    weights, indices = croc_loop.prune(found.assignments.flatten(0, 1))
    product, gather = times(
        lambda: [dk.pool_masks(last, assignments, average=True) for _ in range(2)],
        lambda: [croc_loop.view_centroids(last, weights, indices, 6) for _ in range(2)],
    )
    against("view centroids of teacher and student", product, gather, "gather for each head")
    batch = 64 if DEVICE.type == "cuda" else 4
    model = croc.CrOC(croc.PRESETS["coco"]).to(DEVICE)
    images, views = inputs(batch, DEVICE)
    encoded = croc.encode(model.teacher["encoder"], torch.cat(images))

    def train() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss, _ = model(images, views, 0.07, torch.arange(len(images[0]), device=DEVICE))
        loss.backward()

    seeds = torch.arange(batch, device=DEVICE)
    step, locate = times(train, lambda: model.find_clusters(*encoded, views, seeds), rounds=5)
    row(
        f"clustering in a step of CrOC, ViT-S/16, batch {batch}",
        f"{locate * 1e3:.1f} ms",
        f"{step * 1e3:.0f} ms (forward and backward)",
        f"{locate / step:.1%}",
    )


def scale_plainly(cost: Tensor, reg: float, iterations: int) -> Tensor:
    """Sinkhorn as SwAV and lightly have it: quick, and NaN or inf for large or shifted logits."""
    plan = (-cost / reg).exp().T
    plan /= plan.sum()
    k, n = plan.shape
    for _ in range(iterations):
        plan /= plan.sum(1, keepdim=True)
        plan /= k
        plan /= plan.sum(0, keepdim=True)
        plan /= n
    return plan.T


def transport(reg: float = 0.5) -> None:
    """`sinkhorn` and `swav_codes` against plain scaling and POT's log form, 3 iterations."""
    import ot

    for n, k in ((4096, 300), (1024, 3000)):
        cost = torch.randn(n, k, device=DEVICE)
        row, col = (torch.full((size,), 1 / size, device=DEVICE) for size in (n, k))

        def ours() -> Tensor:
            return dk.sinkhorn(cost, reg=reg, iterations=3)

        def given() -> Tensor:
            return dk.sinkhorn(cost, row, col, reg=reg, iterations=3)

        def codes() -> Tensor:
            return dk.swav_codes(-cost, epsilon=reg, iterations=3)

        def plain() -> Tensor:
            return scale_plainly(cost, reg, 3)

        def logarithmic() -> Tensor:
            return ot.bregman.sinkhorn_log(row, col, cost, reg, numItermax=3, stopThr=0, warn=False)

        # Plain scaling scales the columns first.
        same = dk.sinkhorn(cost.T, reg=reg, iterations=3).T
        torch.testing.assert_close(plain(), same, rtol=1e-4, atol=0)
        torch.testing.assert_close(codes(), n * plain(), rtol=1e-4, atol=0)
        sides = ours, given, codes, plain, logarithmic
        own, with_masses, coded, quick, slow = times(*sides, rounds=30)
        what = f"`sinkhorn`, {n} x {k}, 3 iterations"
        against(what, own, quick, "plain scaling, as SwAV and lightly do")
        against(what, own, slow, "POT's sinkhorn_log")
        against(f"{what}, masses given", with_masses, slow, "POT's sinkhorn_log")
        what = f"`swav_codes`, {n} x {k}, 3 iterations"
        against(what, coded, quick, "plain scaling, as SwAV and lightly do")


def growth() -> None:
    """Time `sinkhorn_merge` for several numbers of tokens and of images."""
    sizes = [{"tokens": n} for n in (98, 196, 392, 784)] + [{"images": b} for b in (4, 8, 32)]
    problems = [problem(**size) for size in sizes]
    measured = times(*(lambda x=x: dk.sinkhorn_merge(*x) for x in problems))
    for (z, *_), seconds in zip(problems, measured, strict=True):
        b, h, n, _ = z.shape
        each = seconds / (b * h * n)
        what = f"`sinkhorn_merge`, {b} images x {h} heads, {n} tokens"
        row(what, f"{seconds * 1e3:.1f} ms", "", f"{each * 1e9:.0f} ns a token")


def moco() -> None:
    """Time what DUPR adds to MoCo v2: RoIAlign, the momentum update, the banks, a whole step."""
    for d, side in ((1024, 14), (2048, 7)):
        features = torch.rand(256, d, side, side, device=DEVICE, requires_grad=True)
        low = torch.rand(256, 2, device=DEVICE) / 2
        boxes = torch.cat([low, low + 0.2 + 0.3 * torch.rand(256, 2, device=DEVICE)], 1)
        rois = torch.cat([torch.arange(256, device=DEVICE)[:, None], boxes * side], 1)
        gradient = torch.rand(256, d, side, side, device=DEVICE)

        def ours() -> None:
            pooled = dk.roi_align(features, boxes[:, None], side).features[:, 0]
            torch.autograd.grad(pooled, features, gradient)

        def rival() -> None:
            options = {"sampling_ratio": 2, "aligned": True}
            pooled = torchvision.ops.roi_align(features, rois, side, **options)
            torch.autograd.grad(pooled, features, gradient)

        what = f"`roi_align`, 256 boxes, {d} x {side} x {side}, forward and backward"
        against(what, *times(ours, rival, rounds=5), "torchvision's roi_align")
    student = timm.create_model("resnet50").to(DEVICE)
    teacher = copy.deepcopy(student).requires_grad_(False)

    @torch.no_grad()
    def loop() -> None:
        for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
            old.mul_(0.999).add_(new, alpha=0.001)
        for old, new in zip(teacher.buffers(), student.buffers(), strict=True):
            old.copy_(new)

    measured = times(lambda: dk.ema_update(teacher, student, momentum=0.999), loop)
    against("`ema_update` of a ResNet-50", *measured, "loop over parameters and buffers")
    keys = torch.rand(1024, 128, device=DEVICE)
    bank = dk.push_to_bank(dk.init_bank(65536, 128, device=DEVICE), keys)

    def slice_assignment() -> None:
        bank.features[1024:2048] = keys

    measured = times(lambda: dk.push_to_bank(bank, keys), slice_assignment)
    against(
        "`push_to_bank`, 1024 keys to a bank of 65536 x 128", *measured, "slice assignment in place"
    )
    bank = dk.push_to_bank(bank, torch.rand(65536, 128, device=DEVICE))
    query = torch.rand(1568, 128, device=DEVICE, requires_grad=True)
    key = torch.rand(1568, 128, device=DEVICE)

    def dense() -> None:
        dk.info_nce(query, key, dk.bank_negatives(bank), temperature=0.2).backward()

    def joined() -> None:
        q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
        others = F.normalize(bank.features, dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ others.mT], 1) / 0.2
        F.cross_entropy(logits, torch.zeros(1568, dtype=torch.long, device=DEVICE)).backward()

    what = "`info_nce`, 8 x 196 patches against a bank of 65536 x 128"
    against(what, *times(dense, joined, rounds=7), "F.cross_entropy on joined logits")
    batch = 64 if DEVICE.type == "cuda" else 8
    images, views = inputs(batch, DEVICE)
    images = [x.contiguous(memory_format=torch.channels_last) for x in images]
    order = torch.arange(batch, device=DEVICE)

    def stepper(preset: str) -> Callable[[], None]:
        # Without autocast the products with the bank are in float32 too.
        precision = "bf16" if DEVICE.type == "cuda" else "fp32"
        config = replace(dupr.PRESETS[preset], precision=precision)
        model = dupr.DUPR(config).to(DEVICE, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.student.parameters(), 0.06, 0.9, weight_decay=1e-4)
        banks = model.init_banks(DEVICE)
        full = dk.l2_normalize(torch.rand(65536, 128, device=DEVICE))
        banks = {name: dk.push_to_bank(bank, full) for name, bank in banks.items()}

        def function() -> None:
            dk.ema_update(model.teacher, model.student, momentum=0.999, buffers="keep")
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
                loss, *_ = model(images, views, banks, order, order)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return function

    # Three calls a turn: each model then returns its memory and requests it again less often.
    measured = times(stepper("paper"), stepper("mocov2"), rounds=4, calls=3)
    against(f"a step of DUPR, ResNet-50, batch {batch}, full banks", *measured, "MoCo v2")


def cut_one_by_one(boxes: Tensor, draws: Tensor, beside: Tensor, images: Tensor) -> Tensor:
    """Apply PRC and PRM image by image and proposal by proposal, on slices of whole pixels."""
    images = images.clone()
    for image, own, draw, masks in zip(images, boxes, draws, beside, strict=True):
        cut = torch.zeros(image.shape[-2:], dtype=torch.bool, device=image.device)
        sides, numbers = own.round().int().tolist(), draw.tolist()
        area = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in sides]
        for k in sorted(range(len(area)), key=lambda k: -area[k]):
            (x1, y1, x2, y2), (rho, u, v) = sides[k], numbers[k]
            view = cut[y1:y2, x1:x2]
            lost = view.sum().item() / area[k]
            if lost > rho:
                view.zero_()
                lost = 0.0
            side = max(rho - lost, 0) ** 0.5
            w, h = int(side * (x2 - x1)), int(side * (y2 - y1))
            x, y = int(u * (x2 - x1 - w)), int(v * (y2 - y1 - h))
            view[y : y + h, x : x + w] = True
        for x1, y1, x2, y2 in masks.round().int().clamp(0, 224).tolist():
            cut[y1:y2, x1:x2] = True
        image.masked_fill_(cut, 0.0)
    return images


def regions() -> None:
    """Time D3SSL's region augmentations against loops: 64 images with 4 proposals each."""
    size, (images, others) = (224, 224), torch.rand(2, 64, 3, 224, 224, device=DEVICE)
    low = torch.rand(64, 4, 2, device=DEVICE) * 120
    boxes = torch.cat([low, low + 32 + torch.rand(64, 4, 2, device=DEVICE) * 60], -1)
    draws, beside = dk.sample_cutout(boxes), dk.sample_surrounding_boxes(boxes)
    shift = dk.sample_shift(boxes, size)
    pasted = dk.boxes_to_mask(dk.shift_boxes(boxes, shift), size)

    def cut() -> None:
        mask = dk.proposal_cutout(boxes, draws, size).mask | dk.boxes_to_mask(beside, size)
        dk.fill_mask(images, mask)

    def paste_one_by_one() -> None:
        result = others.clone()
        for image, onto, mask, (dx, dy) in zip(images, result, pasted, shift.tolist(), strict=True):
            moved = torch.roll(image, (int(dy), int(dx)), (-2, -1))
            onto[:, mask] = moved[:, mask]

    def loop() -> None:
        cut_one_by_one(boxes, draws, beside, images)

    cuts = times(cut, loop)
    pastes = times(lambda: dk.composite(images, others, pasted, shift), paste_one_by_one)
    against("PRC, PRM and the fill, 64 images of 224 x 224, 4 proposals", *cuts, "loop over slices")
    against("`composite`, 64 images of 224 x 224", *pastes, "loop of masked assignments")
    padded = [torch.cat([x, x.new_zeros(64, 396, x.shape[-1])], 1) for x in (boxes, draws)]
    used = (torch.arange(400, device=DEVICE) < 4).expand(64, 400)
    longer, alone = times(
        lambda: dk.proposal_cutout(*padded, size, used),
        lambda: dk.proposal_cutout(boxes, draws, size),
    )
    against("PRC of 64 x 4 proposals and 396 unused rows each", longer, alone, "the 4 alone")
    corner = torch.rand(400, 2, device=DEVICE) * 300
    many = torch.cat([corner, corner + 8 + torch.rand(400, 2, device=DEVICE) * 170], -1)
    rows = dk.sample_cutout(many)
    grown = times(
        *(lambda n=n: dk.proposal_cutout(many[:n], rows[:n], (480, 640)) for n in (100, 200, 400)),
        rounds=7,
    )
    for n, few, more in zip((200, 400), grown, grown[1:], strict=False):
        against(f"PRC of {n} proposals of an image of 480 x 640", more, few, "half of them")
    both = [sum(seconds) for seconds in zip(cuts, pastes, strict=True)]
    against("both: all region augmentations of this batch", *both, "the two loops")


def region_step() -> None:
    """Time the share of the region augmentations in a training step of D3SSL."""
    low = torch.rand(64, 4, 2, device=DEVICE) * 120
    boxes = torch.cat([low, low + 32 + torch.rand(64, 4, 2, device=DEVICE) * 60], -1)
    batch = 64 if DEVICE.type == "cuda" else 8
    config = d3ssl.PRESETS["paper"]
    model = d3ssl.D3SSL(config).to(DEVICE, memory_format=torch.channels_last)
    crops, _ = inputs(batch, DEVICE)
    whole = dk.full_view((224, 224), (batch,), device=DEVICE)
    valid = torch.ones(batch, 4, dtype=torch.bool, device=DEVICE)
    regions = crops, [whole, whole], boxes[:batch], valid
    bank = dk.push_to_bank(
        dk.init_bank(65536, 128, device=DEVICE), torch.rand(65536, 128, device=DEVICE)
    )
    order = torch.arange(batch, device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            model(*regions, bank, order, order)[0].backward()

    part, all_of_it = times(lambda: d3ssl.augment(*regions, order, config), step, rounds=5)
    row(
        f"region augmentation in a step of D3SSL, ResNet-50, batch {batch}",
        f"{part * 1e3:.1f} ms",
        f"{all_of_it * 1e3:.0f} ms (forward and backward)",
        f"{part / all_of_it:.1%}",
    )


def evaluation(count: int = 1_000_000) -> None:
    """Time k-means and Hungarian matching of a million tokens, and kNN in a large gallery."""
    import faiss
    from sklearn.cluster import MiniBatchKMeans

    faiss.omp_set_num_threads(torch.get_num_threads())
    classes, width = 27, 384
    labels = torch.randint(classes, (count,))
    tokens = torch.randn(count, width).mul_(3).add_(3 * torch.randn(classes, width)[labels])
    rows, inertia = tokens.numpy(), {}

    def score(name: str, centers: torch.Tensor, clusters: torch.Tensor) -> None:
        counts = dk.confusion_matrix(labels, clusters, classes=classes)
        dk.confusion_scores(dk.merge_clusters(counts, dk.match_clusters(counts)))
        if name not in inertia:
            some = slice(0, 100_000)
            inertia[name] = (tokens[some] - centers[clusters[some]]).square().sum().item()

    def ours() -> None:
        centers = dk.minibatch_kmeans(tokens, classes)
        score("densekit", centers, dk.nearest_centroids(tokens, centers))

    def by_faiss() -> None:
        found = faiss.Kmeans(width, classes, seed=0)
        found.train(rows)
        clusters = torch.from_numpy(found.index.search(rows, 1)[1][:, 0])
        score("faiss-cpu", torch.from_numpy(found.centroids), clusters)

    def by_sklearn() -> None:
        found = MiniBatchKMeans(classes, batch_size=4096, n_init=1, random_state=0).fit(rows)
        centers = torch.from_numpy(found.cluster_centers_)
        score("scikit-learn", centers, torch.from_numpy(found.labels_))

    own, *rivals = times(ours, by_faiss, by_sklearn, rounds=3)
    for name, seconds in zip(("faiss-cpu", "scikit-learn"), rivals, strict=True):
        ratio = f"inertia {inertia['densekit'] / inertia[name]:.3f} x"
        what = f"k-means and Hungarian matching, {count:,} x {width}, 27 clusters ({ratio})"
        against(what, own, seconds, name)
    gallery, queries = torch.randn(100_000, width, device=DEVICE), torch.randn(2048, width)
    known, some = torch.randint(80, (100_000,), device=DEVICE), queries.to(DEVICE)
    for k in (20, 200):

        def classify(k: int = k) -> None:
            dk.object_knn(some, known[:2048], gallery, known, classes=80, k=k)

        def bare(k: int = k) -> None:
            for part in some.split(2**27 // len(gallery)):
                (part @ gallery.mT).topk(k)

        what = f"`object_knn`, 2,048 objects, a gallery of 100,000 x {width}, k {k}"
        against(what, *times(classify, bare, rounds=7), "bare product and topk")


FUNCTIONS = (
    geometry,
    checks,
    primitives,
    clustering,
    transport,
    growth,
    moco,
    regions,
    region_step,
    evaluation,
    step,
    memory,
)
SECTIONS = {function.__name__: function for function in FUNCTIONS}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--threads", type=int, default=None, help="number of torch threads")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the seconds that the processor works"
    )
    arguments = parser.parse_args()
    if arguments.cpu_time:
        clock = time.process_time
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads\n")
    print("| what | densekit | rival | ratio |\n|---|---|---|---|")
    for section in arguments.only:
        SECTIONS[section]()
