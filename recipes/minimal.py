"""A complete method in one short file: the views of an image agree at the same points.

    python recipes/minimal.py                   # on procedural scenes: one to two minutes on a CPU
    python recipes/minimal.py --data FOLDER     # on your images
    torchrun --nproc-per-node 8 -- recipes/minimal.py --data FOLDER

Run the same command again to resume. The method is SimSiam, but at points instead of whole images.
Copy this file to write a method of your own: docs/recipes/minimal.md goes through it.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Config:
    data: Path | None = None  # Folder of images, also in its subfolders; it can run without.
    run: Path = Path("runs/minimal")  # Run folder.
    arch: str = "tiny"  # A network of timm with several levels, such as resnet50, or tiny.
    # Weights to start from: timm:NAME, torchvision:NAME, lite0, a file, a run folder; without them
    # the network is random.
    weights: str | None = None
    freeze: int = 0  # Keep the stem and this many stages, or blocks of a ViT, as they start.
    size: int = 64  # Side of the square views, in pixels.
    grid: int = 7  # Points that are compared along each side of the shared region.
    batch: int = 32  # Images per step, over all processes.
    epochs: int = 4  # Passes over the images.
    lr: float = 0.2  # Learning rate.
    seed: int = 0  # Seed of all random numbers.
    workers: int = 1  # Loader processes of each training process.
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU, where there is one.
    log_every: int = 20  # Steps between two rows of the log.
    save_every: int = 1000  # Steps between two checkpoints.
    changed_data: bool = False  # Go on with a run although its images or other files have changed.


def read_options() -> Config:
    """Read the command line."""
    return tyro.cli(Config, description=__doc__)


if __name__ == "__main__":
    # The options are read before torch is imported, so that --help answers at once. This file then
    # runs a second time, as a module, and that time also the part below. The script itself ends at
    # sys.exit.
    config = read_options()
    import harness

    recipe = harness.module_of(__file__)
    sys.exit(harness.main(recipe.train, config))

import harness
import torch
from downstream import encoders, health
from downstream.crops import crop_bytes
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms
import densekit as dk


def check_options(config: Config) -> None:
    """Raise a UserError of one sentence for a wrong option, before any data is read."""
    harness.check_training(config)
    harness.check(config.size >= 8, f"--size is {config.size}: give 8 pixels or more.")
    harness.check(config.grid >= 1, f"--grid is {config.grid}: give 1 or more.")
    encoders.check_start(config)
    encoders.check_maps(config, "--size", config.size)


# ==== views =======================================================================================
augment = transforms.Compose(
    [
        transforms.ColorJitter(0.4, 0.4, 0.4, 0.1),
        transforms.RandomGrayscale(p=0.2),
    ]
)


class TwoViews:
    """Two augmented crops of each image, and the `View` of each crop."""

    def __init__(self, source, config: Config):
        self.source = source
        self.config = config

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        image, unreadable = self.source[index]
        size = tuple(image.shape[-2:])
        seed = self.config.seed

        generator = harness.generator(seed, epoch, index)
        pairs = dk.sample_view_pairs(size, min_overlap=0.1, generator=generator)
        views = (pairs.view1, pairs.view2)
        if epoch == 0:
            dk.check_views(dk.stack_views(views), size)

        crops = [crop_bytes(image, view, self.config.size) for view in views]
        # The colors need other random numbers than the views.
        with harness.seeded(seed, epoch, index, harness.COLORS):
            augmented = tuple(augment(crop) for crop in crops)
        return augmented, views, pairs.valid, torch.tensor(index), list(unreadable)


# ==== model =======================================================================================
class Minimal(nn.Module):
    """An encoder, a projector and a predictor, which act on each cell of a feature map."""

    def __init__(self, config: Config, initial: encoders.Start | None = None):
        super().__init__()
        initial = initial or encoders.read_start(config)
        self.mean = initial.mean
        self.std = initial.std
        self.grid = config.grid
        self.encoder = encoders.build_start(initial, levels=1)
        channels = self.encoder.feature_info[-1]["num_chs"]
        self.projector = nn.Sequential(
            nn.Conv2d(channels, 256, kernel_size=1, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(),
            nn.Conv2d(256, 256, kernel_size=1, bias=False),
            nn.BatchNorm2d(256, affine=False),
        )
        self.predictor = nn.Sequential(
            nn.Conv2d(256, 64, kernel_size=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 256, kernel_size=1),
        )

    # ==== loss ====================================================================================
    def forward(self, images: list[Tensor], views: list[dk.View], valid: Tensor) -> Tensor:
        """The loss of a batch of this process."""
        maps = [encoders.last_map(self.encoder, x) for x in images]
        projections = [self.projector(x) for x in maps]
        predictions = [self.predictor(x) for x in projections]

        # The same points of each image, where its two views overlap enough.
        points = dk.grid_pairs(*views, self.grid, valid=valid)
        places = [points.points1, points.points2]
        teachers = [dk.gridsample(x, place) for x, place in zip(projections, places, strict=True)]
        students = [dk.gridsample(x, place) for x, place in zip(predictions, places, strict=True)]
        losses = dk.symmetric_loss(
            dk.negative_cosine, students, teachers, points.valid, reduction="none"
        )
        # The mean is over the valid points of all processes.
        return dk.masked_mean(losses, points.valid, group=torch.distributed.group.WORLD)


# ==== evaluation ==================================================================================
def probe(model: Minimal) -> float:
    """How well a linear layer on the frozen features segments procedural scenes, as mIoU."""
    normalize = transforms.Normalize(model.mean, model.std)
    device = encoders.device_of(model)

    def features(scenes: Tensor) -> Tensor:
        return encoders.last_map(model.encoder, normalize(scenes).to(device))

    model.eval()
    score = dk.probe_scenes(features)
    model.train()
    return float(score.miou)


# ==== loop ========================================================================================
def train(config: Config) -> None:
    check_options(config)
    initial = encoders.read_start(config)
    group = harness.process_group(config.device, fixed_shapes=True)
    with group as world, harness.Run(config.run, config, world) as run:
        source = harness.image_source(config.data, scenes=2048)
        dataset = TwoViews(source, config)
        steps = config.epochs * harness.batches_per_epoch(len(source), config.batch, world)

        torch.manual_seed(config.seed)
        model = Minimal(config, initial).to(world.device)
        encoders.freeze(model.encoder, config.freeze)
        ddp = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), config.lr, momentum=0.9, weight_decay=1e-4)
        step = run.resume(model, optimizer)

        batches = partial(
            harness.batches,
            dataset,
            world=world,
            seed=config.seed,
            workers=config.workers,
            normalize=(initial.mean, initial.std),
        )
        # The health is measured on six images of the main process.
        preview_batch = min(6 * world.size, config.batch)
        preview = next(batches(preview_batch, start=0, stop=1))
        monitor = health.Monitor(model.encoder, preview[0], run)
        if step == 0 and world.is_main:
            run.log(step, **monitor.measure_all())
            run.log(step, probe_miou=probe(model))
        run.wait()

        facts = {**initial.side_car(), "method": "minimal"}
        training_batches = batches(config.batch, start=step, stop=steps)
        bar = harness.progress(training_batches, start=step, stop=steps, world=world)
        for images, views, valid, _, unreadable in bar:
            lr = dk.cosine_schedule(step, steps, start=config.lr, end=0.0)
            optimizer.param_groups[0]["lr"] = lr
            loss = ddp(images, views, valid)
            optimizer.zero_grad()
            loss.backward()
            run.record(step, {"loss": loss})
            optimizer.step()
            step += 1

            run.note_unreadable(unreadable)
            # The device is waited for here alone. The run ends if a value was not finite.
            if step % config.log_every == 0:
                values = run.take_means()
                run.log(step, **values, **monitor.measure(), lr=lr, unreadable=run.unreadable)
                monitor.warn(step)

            due = step % config.save_every == 0 or step == steps
            if due:
                run.check()  # what follows a bad value is neither shown nor saved
                run.log(step, **monitor.measure_all())
                monitor.warn(step)
            stop = run.stop_requested()
            if due and world.is_main:
                run.log(step, probe_miou=probe(model))
            if due or stop:
                run.save(step, model, optimizer, encoder=model.encoder, facts=facts)
            if stop:
                return

        if world.is_main:
            for row in run.rows("probe_miou"):
                harness.tell(f"step {row['step']:4}: probe mIoU {row['probe_miou']:.3f}")
