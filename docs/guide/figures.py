"""The figures of the guide, as SVG: the pages run this file, and print what a function returns."""

import base64
import io

import torch
from PIL import Image
import densekit as dk
from densekit.scenes import sample_scenes
from densekit.viz import label_colors

H = 150
W = 200


def picture(pixels, x, y=0.0, scale=1.0):
    """An image (3, h, w) with values in [0, 1], whose corner is at x, y."""
    file = io.BytesIO()
    array = (pixels.permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(array).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    h, w = pixels.shape[-2:]
    return (
        f'<image x="{x}" y="{y}" width="{w * scale}" height="{h * scale}" '
        f'style="image-rendering: pixelated" href="data:image/png;base64,{data}"/>'
    )


def text(words, x, y, size=13):
    """A line of text, which begins at x, y."""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="currentColor">{words}</text>'


def rectangle(box, color, x=0.0, fill="none"):
    """A box (x1, y1, x2, y2), moved to the right by x."""
    x1, y1, x2, y2 = box.tolist()
    return (
        f'<rect x="{x + x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" '
        f'fill="{fill}" fill-opacity="0.5" stroke="{color}" stroke-width="2"/>'
    )


def dots(points, x):
    """Points in pixels, each with a color of its own."""
    circles = []
    for number, (px, py) in enumerate(points.tolist()):
        color = f"hsl({number * 360 // len(points)},90%,60%)"
        circles.append(
            f'<circle cx="{x + px:.1f}" cy="{py:.1f}" r="3" stroke="#000" fill="{color}"/>'
        )
    return "".join(circles)


def svg(parts, width, height, label):
    """The whole figure, which scrolls on a phone; the label is for those who do not see it."""
    return (
        f'<div style="overflow-x: auto"><svg viewBox="0 0 {width} {height}" width="100%" '
        f'style="min-width: 34em" role="img" aria-label="{label}">{"".join(parts)}</svg></div>'
    )


def scene(seed=6):
    """An image, (1, 3, H, W)."""
    return sample_scenes(1, (H, W), generator=torch.Generator().manual_seed(seed)).images


def frames_figure():
    """The same points in an image and in two views of it."""
    image = scene()
    side = 150
    view1 = dk.View(torch.tensor([[20.0, 20.0, 130.0, 130.0]]), torch.tensor([False]))
    view2 = dk.View(torch.tensor([[70.0, 40.0, 190.0, 140.0]]), torch.tensor([True]))
    points = dk.grid_points(dk.intersect_views(view1, view2).box, 4)
    parts = [picture(image[0], 0), dots(points[0], 0), text("image, two boxes", 0, 168)]
    parts += [rectangle(view1.box[0], "#fff"), rectangle(view2.box[0], "#ff0")]
    names = ("view 1 (white)", "view 2 (yellow, mirrored)")
    for number, (view, name) in enumerate(zip((view1, view2), names, strict=True)):
        x = W + 20 + number * (side + 20)
        parts.append(picture(dk.crop_views(image, view, side)[0], x))
        parts.append(dots(dk.image_to_view(view, points)[0] * side, x))
        parts.append(text(name, x, 168))
    return svg(parts, W + 2 * side + 40, 175, "Sixteen points in an image and in two views of it")


def valid_figure():
    """Pairs of views that overlap enough, too little, and not at all."""
    image = scene()
    first = torch.tensor([10.0, 15.0, 110.0, 135.0])
    seconds = ([60.0, 30.0, 180.0, 140.0], [95.0, 80.0, 190.0, 145.0], [125.0, 20.0, 195.0, 100.0])
    parts = []
    for number, sides in enumerate(seconds):
        x = number * (W + 20)
        second = torch.tensor(sides)
        flip = torch.tensor(False)
        overlap = dk.intersect_views(dk.View(first, flip), dk.View(second, flip))
        iou = float(dk.box_iou(first, second))
        parts.append(picture(image[0], x))
        if overlap.valid:
            parts.append(rectangle(overlap.box, "none", x, fill="#0f0"))
        parts += [rectangle(first, "#fff", x), rectangle(second, "#ff0", x)]
        parts.append(text(f"share an area: {bool(overlap.valid)}", x, 168))
        parts.append(text(f"IoU {iou:.2f}, enough for 0.2: {iou >= 0.2}", x, 186))
    return svg(parts, 3 * W + 40, 192, "Three pairs of views: enough, too little and no overlap")


def randomness_figure():
    """What was chosen, and what applying it gives."""
    image = scene()
    generator = torch.Generator().manual_seed(3)
    views = dk.sample_views((H, W), 4, scale=(0.08, 0.4), generator=generator)
    crops = dk.crop_views(image.expand(4, -1, -1, -1), views, 120)
    colors = ("#fff", "#ff0", "#0ff", "#f6f")
    parts = [picture(image[0], 0), text("chosen: four boxes", 0, 168)]
    for number, color in enumerate(colors):
        x = W + 20 + 130 * number
        parts.append(rectangle(views.box[number], color))
        parts.append(picture(crops[number], x))
        parts.append(rectangle(torch.tensor([0.0, 0.0, 120.0, 120.0]), color, x))
    parts.append(text("applied: four crops, of which some are mirrored", W + 20, 140))
    return svg(parts, W + 20 + 4 * 130, 175, "Four boxes in an image, and their crops")


def precision_figure():
    """How far coordinates move when they are rounded to half precision."""
    width = 640
    value = torch.arange(0, 1024, 0.25)
    parts = [
        f'<path d="M 40 10 V 130 H {40 + width}" stroke="currentColor" fill="none"/>',
        text("error in pixels", 48, 20),
        text("coordinate in pixels", 40 + width - 130, 160),
    ]
    parts += [text(x, 30 + width * x / 1024, 146, 11) for x in (0, 256, 512, 768, 1024)]
    parts += [text(y, 24, 134 - 55 * y, 11) for y in (0, 1, 2)]
    for row, (dtype, color) in enumerate(((torch.bfloat16, "#e50"), (torch.float16, "#09f"))):
        error = (value.to(dtype).float() - value).abs()
        most = error.unflatten(0, (-1, 32)).amax(-1)  # of each 8 pixels
        steps = [
            f"{40 + width * index / len(most):.1f} {130 - 55 * float(y):.1f}"
            for index, y in enumerate(most)
        ]
        parts.append(f'<path d="M {" L ".join(steps)}" stroke="{color}" fill="none"/>')
        name = str(dtype).removeprefix("torch.")
        parts.append(f'<g style="color:{color}">{text(name, 60, 45 + 18 * row)}</g>')
    return svg(parts, 40 + width + 20, 168, "Rounding error of coordinates in half precision")


def clusters_figure(images=4):
    """Classes and clusters of two views of scenes, as in the guide of clustering."""
    generator = torch.Generator().manual_seed(0)
    size = (96, 128)
    scenes = sample_scenes(images, size, generator=generator)
    pairs = dk.sample_view_pairs(
        size, images, min_overlap=0.4, scale=(0.5, 1.0), generator=generator
    )
    classes = int(scenes.labels.max()) + 1
    truth = torch.nn.functional.one_hot(scenes.labels, classes).movedim(-1, -3).float()
    views = (pairs.view1, pairs.view2)
    maps = [dk.crop_views(truth, view, 14) for view in views]
    noisy = [x + 0.2 * torch.randn(x.shape, generator=generator) for x in maps]
    tokens = torch.cat([dk.map_to_rows(x) for x in noisy], -2)
    positions = torch.cat([dk.coordinate_map(view, 14).flatten(-3, -2) for view in views], -2)
    weights = torch.ones(tokens.shape[:-1])
    start = dk.sample_tokens(weights, 12, generator=generator)
    found = dk.sinkhorn_merge(tokens, positions, weights, start, position_weight=1.0)
    pruned = dk.prune_clusters(dk.split_assignments(found.assignments))
    both = pruned.valid.gather(-1, pruned.labels.clamp(min=0).flatten(1))
    labels = torch.where(both.view_as(pruned.labels), pruned.labels, -1)

    parts = []
    names = (
        "view 1",
        "view 2",
        "classes of view 1",
        "of view 2",
        "clusters of view 1",
        "of view 2",
    )
    for image in range(images):
        crops = [dk.crop_views(scenes.images[image], dk.index_views(v, image), 98) for v in views]
        crops += [label_colors(x[image].argmax(0)).movedim(-1, 0) for x in maps]
        crops += [
            label_colors(labels[image, view].view(14, 14)).movedim(-1, 0) for view in range(2)
        ]
        for column, crop in enumerate(crops):
            x = 110 * column + 10 * (column // 2)
            parts.append(picture(crop, x, 106 * image, scale=98 / crop.shape[-1]))
            if image == 0:
                parts.append(text(names[column], x, 106 * images + 10, 12))
    return svg(parts, 680, 106 * images + 16, "Two views of scenes, their classes and clusters")
