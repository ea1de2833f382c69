"""Measure how fast a loader process makes views, and print one Markdown table.

    OMP_NUM_THREADS=1 python benchmarks/loader.py              # two minutes on one idle core
    python benchmarks/loader.py --only views workers --data FOLDER

The images are scikit-image's photographs as JPEGs of 480 x 640, or those of --data. The sections:

* `views`: a file to two views, by a recipe's dataset and by others. In each row the two sides take
  turns on each image, in one process with one thread, which keeps its memory as the loader
  processes do. The seconds are those that the processor works for it. The views of the recipes
  stay bytes, which the device makes floats of; the others end in normalized floats, and the
  careful one is measured up to the bytes, too.
* `draft`: what the `draft` mode of JPEG files would save and change.
* `workers`: images a second with 1 and 2 loader processes, and the wait at the end of an epoch.
* `memory`: what waits in shared memory, and what a loader process adds, against the formula.

The row against lightly comes only where it is installed; a sentence says where it is not.
"""

import argparse
import importlib.util
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

# The recipes come first: both they and the benchmarks have an adapt.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

import croc
import densesiam
import dupr
import harness
import numpy as np
import torch
import torchvision.transforms as v1
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import functional as pil
from torchvision.transforms import v2
import densekit as dk

SIZE = (480, 640)
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def row(what: str, ours: str, rival: str, ratio: str) -> None:
    print(f"| {what} | {ours} | {rival} | {ratio} |", flush=True)


# ---- images ----------------------------------------------------------------------------------
def make_photos(folder: Path) -> None:
    """Photographs as JPEG files; smooth noise where scikit-image is missing."""
    names = ("astronaut", "coffee", "chelsea", "rocket")
    has_photos = importlib.util.find_spec("skimage") is not None
    for number, name in enumerate(names):
        if has_photos:
            from skimage import data

            pixels = getattr(data, name)()
        else:
            noise = np.random.default_rng(number).integers(0, 256, (48, 64, 3))
            pixels = noise.astype(np.uint8)
        image = Image.fromarray(pixels).convert("RGB").resize(SIZE[::-1], Image.Resampling.BICUBIC)
        image.save(folder / f"{name}.jpg", quality=90)


# ---- the sides -------------------------------------------------------------------------------
class Method(NamedTuple):
    """The views of a recipe, in the words of any pipeline."""

    recipe: Any
    preset: str
    interpolation: str
    saturation: float
    blur: tuple[float, float]  # how likely it is, for each view
    solarize: tuple[float, float]

    @property
    def config(self) -> Any:
        return self.recipe.PRESETS[self.preset]


METHODS = {
    "DenseSiam": Method(densesiam, "paper", "bilinear", 0.4, (0.5, 0.5), (0.0, 0.0)),
    "CrOC": Method(croc, "coco", "bicubic", 0.2, (1.0, 0.1), (0.0, 0.2)),
    "DUPR": Method(dupr, "paper", "bilinear", 0.4, (0.5, 0.5), (0.0, 0.0)),
}


def our_views(method: Method, source: Any) -> Callable[[int, int], Any]:
    """What a loader process calls for each image."""
    dataset = method.recipe.TwoViews(source, method.config)
    return lambda epoch, index: dataset[epoch, index]


def pil_views(method: Method, source: Any, *, as_floats: bool = True) -> Callable[[int, int], Any]:
    """A careful pipeline of PIL calls, whose parameters Python's own generator draws."""
    views = method.config.views
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    resample = filters[method.interpolation]
    paths = [str(source.folder / os.fsdecode(name)) for name in source.names]
    side = views.size
    normalize = v1.Normalize(MEAN, STD, inplace=True)

    def jitter(image: Image.Image) -> Image.Image:
        factors = [random.uniform(0.6, 1.4), random.uniform(0.6, 1.4)]
        factors.append(random.uniform(1 - method.saturation, 1 + method.saturation))
        factors.append(random.uniform(-views.hue, views.hue))
        functions = (
            pil.adjust_brightness,
            pil.adjust_contrast,
            pil.adjust_saturation,
            pil.adjust_hue,
        )
        for number in random.sample(range(4), 4):
            image = functions[number](image, factors[number])
        return image

    def view(image: Image.Image, number: int) -> Tensor:
        box = box_of(image.height, image.width, views.scale)
        crop = image.resize((side, side), resample, box=box)
        if random.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if random.random() < 0.8:
            crop = jitter(crop)
        if random.random() < 0.2:
            crop = pil.to_grayscale(crop, 3)
        if random.random() < method.blur[number]:
            crop = crop.filter(ImageFilter.GaussianBlur(random.uniform(*views.blur)))
        if random.random() < method.solarize[number]:
            crop = ImageOps.solarize(crop, 128)
        if as_floats:
            return normalize(pil.to_tensor(crop))
        return torch.from_numpy(np.array(crop)).permute(2, 0, 1)

    def make(epoch: int, index: int) -> list[Tensor]:
        random.seed(1000 * epoch + index)
        with Image.open(paths[index]) as file:
            image = file.convert("RGB")
        return [view(image, number) for number in range(2)]

    return make


def box_of(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """The box of RandomResizedCrop, in plain Python."""
    for _ in range(10):
        area = height * width * random.uniform(*scale)
        ratio = (3 / 4) * (16 / 9) ** random.random()
        w = round((area * ratio) ** 0.5)
        h = round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left = random.randint(0, width - w)
            top = random.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


def former_views(method: Method, source: Any) -> Callable[[int, int], Any]:
    """The former path: `crop_views` of the image as floats, and views normalized as floats.

    Commit 5a338d8 made a whole batch at a time so. Its datasets ask the harness of that time for
    images, so the path is written again here, with today's `crop_views`.
    """
    config = method.config
    changes = [former_changes(method, number) for number in range(2)]
    normalize = v1.Normalize(MEAN, STD, inplace=True)

    def make(epoch: int, index: int) -> list[Tensor]:
        image, _ = source[index]
        generator = harness.generator(0, epoch, index)
        pairs = dk.sample_view_pairs(
            (image.shape[-2], image.shape[-1]), scale=config.views.scale, generator=generator
        )
        pixels = image / 255
        made = []
        for view, change in zip((pairs.view1, pairs.view2), changes, strict=True):
            crop = dk.crop_views(
                pixels, view, config.views.size, interpolation=method.interpolation
            )
            with harness.seeded(0, epoch, index):
                changed = change((crop.clamp(0, 1) * 255).round().byte())
            made.append(normalize(changed / 255))
        return made

    return make


def former_changes(method: Method, number: int) -> Callable[[Tensor], Tensor]:
    """The former changes of the colors of a view: torchvision's, on pictures of PIL."""
    sigma = torch.distributions.Uniform(*method.config.views.blur)

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(sigma.sample())))

    jitter = v2.ColorJitter(0.4, 0.4, method.saturation, method.config.views.hue)
    return v2.Compose(
        [
            v2.ToPILImage(),
            v2.RandomApply([jitter], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([blur], p=method.blur[number]),
            v2.RandomSolarize(128, p=method.solarize[number]),
            v2.PILToTensor(),
        ]
    )


def torchvision_views(source: Any) -> Callable[[int, int], Any]:
    """The list of transforms in MoCo v2's program."""

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    transform = v1.Compose(
        [
            v1.RandomResizedCrop(224, scale=(0.2, 1.0)),
            v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v1.RandomGrayscale(p=0.2),
            v1.RandomApply([blur], p=0.5),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
    )
    return on_files(source, lambda image: [transform(image), transform(image)])


def lightly_views(source: Any) -> Callable[[int, int], Any]:
    from lightly.transforms import MoCoV2Transform

    return on_files(source, MoCoV2Transform(input_size=224))


def on_files(source: Any, transform: Callable[[Image.Image], Any]) -> Callable[[int, int], Any]:
    paths = [str(source.folder / os.fsdecode(name)) for name in source.names]

    def make(epoch: int, index: int) -> Any:
        random.seed(1000 * epoch + index)
        torch.manual_seed(1000 * epoch + index)
        with Image.open(paths[index]) as file:
            image = file.convert("RGB")
        return transform(image)

    return make


# ---- the sections ----------------------------------------------------------------------------
def each_image(sides: list[Callable[[int, int], Any]], images: int, rounds: int) -> list[float]:
    """The processor's seconds for an image, by each side; they take turns on each image."""
    seconds = [0.0 for _ in sides]
    for epoch in range(rounds + 1):
        if epoch == 1:  # the first round warms up
            seconds = [0.0 for _ in sides]
        for index in range(images):
            for number, side in enumerate(sides):
                start = time.process_time()
                side(epoch, index)
                seconds[number] += time.process_time() - start
    return [x / (rounds * images) for x in seconds]


def against(what: str, ours: float, rival: float, name: str) -> None:
    row(what, f"{ours * 1e3:.2f} ms", f"{rival * 1e3:.2f} ms ({name})", f"{ours / rival:.2f} x")


def views(source: Any, rounds: int) -> None:
    """The recipes' own path against the others."""
    for name, method in METHODS.items():
        bytes_alone = partial(pil_views, as_floats=False)
        makers = (our_views, pil_views, bytes_alone, former_views)
        sides = [make(method, source) for make in makers]
        rivals = ["careful PIL", "careful PIL, up to the bytes", "the former path"]
        if name == "DUPR":
            sides.append(torchvision_views(source))
            rivals.append("torchvision's transforms, as in MoCo v2")
            if importlib.util.find_spec("lightly") is not None:
                sides.append(lightly_views(source))
                rivals.append("lightly's MoCoV2Transform")
            else:
                print("lightly is not installed: its row is left out.", file=sys.stderr)
        ours, *others = each_image(sides, len(source), rounds)
        for rival, seconds in zip(rivals, others, strict=True):
            against(f"two views of {name}, each image", ours, seconds, rival)


def draft(source: Any, rounds: int) -> None:
    """The `draft` mode decodes fewer coefficients, for a crop that is much larger than its view."""
    box = (0, 0, SIZE[1], SIZE[0])
    path = str(source.folder / os.fsdecode(source.names[0]))

    def decode(asked: tuple[int, int] | None) -> Image.Image:
        with Image.open(path) as file:
            if asked is not None:
                file.draft("RGB", asked)
            return file.convert("RGB")

    def crop(asked: tuple[int, int] | None) -> Tensor:
        image = decode(asked)
        scaled = tuple(x * image.width / SIZE[1] for x in box)
        view = image.resize((224, 224), Image.Resampling.BILINEAR, box=scaled)
        return torch.from_numpy(np.array(view))

    sides = [lambda *_: crop((224, 224)), lambda *_: crop(None)]
    quick, exact = each_image(sides, len(source), rounds)
    difference = (crop((224, 224)).int() - crop(None).int()).abs()
    what = "decode and crop a whole image with `draft`"
    against(what, quick, exact, "all coefficients")
    within = (difference <= 1).float().mean()
    row(what, f"{difference.max()} gray levels apart at most", "1 is allowed", f"{within:.0%} are")


class Many:
    """A source whose images come again and again."""

    def __init__(self, source: Any, count: int):
        self.source = source
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.source[index % len(self.source)]


def workers(source: Any, rounds: int) -> None:
    """Images a second, and the wait at the end of an epoch, of batches of DenseSiam."""
    per_epoch = 4
    batch = 32 if rounds > 1 else 4
    dataset = densesiam.TwoViews(Many(source, per_epoch * batch), densesiam.PRESETS["paper"])
    world = harness.World(0, 1, torch.device("cpu"))
    epochs = 5 if rounds > 1 else 2
    for count in (1, 2):
        stop = epochs * per_epoch
        made = harness.batches(dataset, batch, world, seed=0, start=0, stop=stop, workers=count)
        times = [time.perf_counter() for _ in made]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        mean = statistics.mean(gaps)
        at_ends = statistics.mean(gaps[per_epoch - 1 :: per_epoch])
        who = processes(count)
        row(f"DenseSiam's batches of {batch}, {who}", f"{batch / mean:.0f} images/s", "", "")
        row(
            f"wait for the first batch of an epoch, {who}",
            f"{at_ends * 1e3:.0f} ms",
            f"{mean * 1e3:.0f} ms (mean of all batches)",
            f"{at_ends / mean:.2f} x",
        )


def bytes_in_flight(workers: int, batch: int, side: int, views: int = 2) -> int:
    """The formula of the images that wait in shared memory, made by all processes."""
    plan = harness.plan_loader(batch, workers)
    return workers * plan.items_per_worker * plan.images_per_item * views * 3 * side**2


def memory(source: Any, rounds: int) -> None:
    """What waits in shared memory, and the memory of a loader process, against the formula."""
    side = 224
    batch = 64 if rounds > 1 else 8
    dataset = densesiam.TwoViews(Many(source, 4 * batch), densesiam.PRESETS["paper"])
    world = harness.World(0, 1, torch.device("cpu"))
    start_worker = harness.start_worker

    with tempfile.TemporaryDirectory() as folder:

        def note(number: int) -> None:
            """Start a loader process, and write down its id and its memory before the work."""
            start_worker(number)
            Path(folder, str(number)).write_text(f"{os.getpid()} {anonymous(os.getpid())}")

        for count in (1, 2):
            with mock.patch.object(harness, "start_worker", note):
                made = harness.batches(
                    dataset, batch, world, seed=0, start=0, stop=4, workers=count
                )
                next(made)
            started = [x.read_text().split() for x in sorted(Path(folder).iterdir())]
            pids = [int(pid) for pid, _ in started]
            waiting = settled(lambda pids=pids: in_shared_memory(pids))
            formula = bytes_in_flight(count, batch, side)
            row(
                f"in shared memory, batches of {batch}, {processes(count)}",
                f"{waiting / 1e6:.1f} MB",
                f"{formula / 1e6:.1f} MB (formula)",
                f"{waiting / formula:.2f} x",
            )
            grown = statistics.mean(anonymous(int(pid)) - int(before) for pid, before in started)
            row(f"memory of each of {processes(count)} beside it", f"{grown / 1e6:.0f} MB", "", "")
            made.close()


def processes(count: int) -> str:
    return "1 loader process" if count == 1 else f"{count} loader processes"


def settled(measure: Callable[[], int], pause: float = 0.5) -> int:
    """A number once it has stayed the same for three looks; the last one after a minute."""
    seen = []
    for _ in range(120):
        seen.append(measure())
        if len(seen) >= 3 and seen[-1] > 0 and len(set(seen[-3:])) == 1:
            break
        time.sleep(pause)
    return seen[-1]


def in_shared_memory(pids: list[int]) -> int:
    """The bytes of the tensors that these processes hold for another one."""
    sizes = {}
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
                status = link.stat()
            except OSError:  # it has just been closed
                continue
            if target.startswith("/dev/shm/torch_"):
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def anonymous(pid: int) -> int:
    """The bytes of a process that no other process and no file has."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [x for x in lines if x.startswith("RssAnon:")]
    return 1024 * int(line.split()[1])


SECTIONS = {"views": views, "draft": draft, "workers": workers, "memory": memory}


def main(only: list[str], rounds: int, data: Path | None) -> None:
    torch.set_num_threads(1)
    harness.keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            make_photos(Path(folder))
        source = harness.FolderImages(data or folder)
        print(f"torch {torch.__version__}, Pillow {Image.__version__}, one thread\n")
        print("| what | densekit | rival | ratio |\n|---|---|---|---|")
        for name in only:
            SECTIONS[name](source, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=40, help="times that each image is taken")
    parser.add_argument("--data", type=Path, help="a folder of images")
    arguments = parser.parse_args()
    main(arguments.only, arguments.rounds, arguments.data)
