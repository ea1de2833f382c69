"""What no method owns: processes, seeds, images, the run folder, checkpoints, the way out.

A run folder holds config.json, metrics.jsonl, tensorboard/, pictures/, unreadable.txt, the encoder
of the newest checkpoint, and in checkpoints/ the two newest and those of the epochs to keep. The
process that holds the lock on `.lock` owns the folder.
"""

import codecs
import copy
import ctypes
import dataclasses
import errno
import fcntl
import gc
import hashlib
import importlib
import json
import math
import mmap
import multiprocessing
import os
import pathlib
import pickle
import re
import shutil
import signal
import socket
import string
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import islice
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dsd
from PIL import Image, ImageOps
from torch import Tensor, nn, optim
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
import densekit as dk

# These options may change when a run resumes: they say where and how it runs, not what it computes.
MAY_CHANGE = (
    *("run", "workers", "device", "log_every", "save_every", "keep"),
    *("warn_after", "give_up_after", "collective_timeout", "changed_data"),
)
RUN_FILES = {"config.json", "metrics.jsonl"}  # by them a folder is known as a run folder
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")


# ---- the way out -----------------------------------------------------------------------------
def printable(text: str) -> str:
    """The text with escapes such as \\x1b and \\n for what a terminal would act upon, or not show.

    Names of files come from anywhere: one may clear the screen, hide its end or fake a line. Bytes
    that are no UTF-8 are escaped as well. Applied a second time it changes nothing.
    """
    if text.isprintable():
        return text
    escaped = []
    for character in text:
        if character.isprintable():
            escaped.append(character)
        elif "\udc80" <= character <= "\udcff":  # how Python holds a byte that is no UTF-8
            escaped.append(f"\\x{ord(character) - 0xDC00:02x}")
        else:
            escaped.append(character.encode("unicode_escape").decode())
    return "".join(escaped)


class UserError(Exception):
    """Something that the user can put right, in one sentence, which is printable."""

    def __str__(self) -> str:
        return printable(super().__str__())


class NonFiniteError(Exception):
    """A term of the loss became infinite or NaN."""


def module_of(path: str) -> Any:
    """The file at this path as a module, whatever its name is: a copy of a recipe runs itself."""
    return importlib.import_module(Path(path).stem)


def one_line(error: BaseException) -> str:
    """What an error says, in one line without the full stop; its type where it says nothing."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without the full stop; else its type."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def main(function: Callable[[Any], None], config: Any) -> int:
    """Run `function(config)` and return the exit code.

    It is 0; 2 after a UserError, 3 after a NonFiniteError and 130 after Ctrl-C, each of which
    becomes one line on the standard error.
    """
    try:
        code, sentence = _outcome(function, config)
    except RuntimeError as error:
        # torch tells of a dead loader process in a signal handler, which may run at any moment:
        # also while another error is on its way out.
        if not is_of_dead_worker(error):
            raise
        code = 2
        sentence = loader_failure(error)

    if code != 0:
        print(printable(f"error: {sentence}"), file=sys.stderr)
    return code


def _outcome(function: Callable[[Any], None], config: Any) -> tuple[int, str]:
    """Run `function(config)`; the exit code, and what to say."""
    try:
        function(config)
    except UserError as error:
        return 2, _sentence_of(error)
    except NonFiniteError as error:
        return 3, str(error)
    except KeyboardInterrupt:
        return 130, "interrupted"
    except OSError as error:
        sentence = _sentence_of_file(error)
        if not sentence:
            raise
        return 2, sentence
    except RuntimeError as error:
        if not is_of_lost_process(error):
            raise
        return 2, "Another process of this run has ended: see its own message, if it left one."
    return 0, ""


def _sentence_of(error: UserError) -> str:
    """The sentence, which torch puts behind the traceback of a loader process, in the last line."""
    message = str(error)
    if not message.startswith("Caught UserError in "):
        return message
    *_, last_line = str(error.args[0]).strip().split("\n")
    return last_line.partition("UserError: ")[2]


def _sentence_of_file(error: OSError) -> str:
    """A file or a disk that fails, in one sentence; empty where the error is of something else."""
    message = str(error)
    if message.startswith("Caught ") and " in DataLoader worker" in message:
        *_, last_line = message.strip().split("\n")
        return f"A loader process has failed ({last_line.partition(': ')[2]})."
    reason = error.strerror or type(error).__name__
    if isinstance(error.filename, str | bytes):  # it may be a number
        name = os.fsdecode(error.filename)
        return f"{name} cannot be read or written ({reason}): check its place and your rights."
    return f"The disk has failed ({reason})." if error.errno in DISK_ERRORS else ""


# ---- options ---------------------------------------------------------------------------------
def check(allowed: bool, sentence: str) -> None:
    """A UserError with this sentence, unless the option's value is allowed."""
    if not allowed:
        raise UserError(sentence)


def check_finite(option: str, value: float) -> None:
    """Check a number that may be 0, such as a weight."""
    check(0 <= value < math.inf, f"{option} is {value}: give a finite number, 0 or more.")


def check_above_zero(option: str, value: float) -> None:
    """Check a number that may not be 0, such as a temperature."""
    check(0 < value < math.inf, f"{option} is {value}: give a finite number above 0.")


def check_output(option: str, path: Path) -> None:
    """A UserError, unless a file can be made or replaced here: work is not lost at its end.

    It is tried: permissions do not tell of a disk that is read-only.
    """
    trial = _temporary(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        is_new = not trial.exists()
        with trial.open("ab"):
            pass
        if is_new:
            trial.unlink()
    except OSError as error:
        raise UserError(
            f"{option} leads to {path}, which cannot be written ({error.strerror}): give another."
        ) from error


def as_typed(value: Any) -> str:
    """An option's value as it is typed on the command line: `(0.2, 1.0)` is `0.2 1.0`."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value)


def check_training(config: Any) -> None:
    """Check the options that the recipes share; each wrong one is a UserError of its own."""
    check(config.batch >= 2, f"--batch is {config.batch}: give 2 images or more.")
    check_finite("--lr", config.lr)
    check(config.workers >= 0, f"--workers is {config.workers}: give 0 or more.")
    check(config.log_every >= 1, f"--log-every is {config.log_every}: give 1 step or more.")
    check(config.save_every >= 1, f"--save-every is {config.save_every}: give 1 step or more.")
    check(0 <= config.seed < 2**63, f"--seed is {config.seed}: give a number from 0 to 2^63 - 1.")
    if hasattr(config, "value_range"):
        check_value_range(config.value_range)
    if hasattr(config, "warn_after"):
        check_patience(config)
    if hasattr(config, "collective_timeout"):
        timeout = config.collective_timeout
        check(
            timeout is None or 0 < timeout <= LONGEST_WAIT,
            f"--collective-timeout is {timeout}: give seconds above 0, up to {LONGEST_WAIT}.",
        )
    if hasattr(config, "epochs"):
        check(config.epochs >= 1, f"--epochs is {config.epochs}: give 1 or more.")
    if hasattr(config, "keep"):
        check(
            all(1 <= epoch <= config.epochs for epoch in config.keep),
            f"--keep is {as_typed(config.keep)}: give epochs from 1 to {config.epochs}, the last.",
        )
    if hasattr(config, "views"):
        check_view_options(config.views)


def check_patience(config: Any) -> None:
    """Check how long to wait; each wrong option is a UserError of its own."""
    check(
        config.warn_after > 0,
        f"--warn-after is {config.warn_after}: give seconds above 0, or inf for never.",
    )
    check(
        config.give_up_after > 0,
        f"--give-up-after is {config.give_up_after}: give seconds above 0, or inf for never.",
    )


def check_value_range(value_range: tuple[float, float] | None) -> None:
    """Check the range of the images whose files do not tell it."""
    if value_range is None:
        return
    low, high = value_range
    check(
        -math.inf < low < high < math.inf,
        f"--value-range is {as_typed(value_range)}: give two finite numbers, the lower first.",
    )


WIDEST_BLUR = 1000  # pixels


def check_view_options(views: Any) -> None:
    """Check the options of the augmented views; each wrong one is a UserError of its own."""
    check(views.size >= 1, f"--views.size is {views.size}: give 1 pixel or more.")
    low, high = views.scale
    check(
        0 < low <= high <= 1,
        f"--views.scale is {as_typed(views.scale)}: give two shares above 0, up to 1, the smaller "
        "first.",
    )
    check(0 <= views.hue <= 0.5, f"--views.hue is {views.hue}: give a number from 0 to 0.5.")
    low, high = views.blur
    check(
        0 <= low < high <= WIDEST_BLUR,
        f"--views.blur is {as_typed(views.blur)}: give two standard deviations in pixels, from 0 "
        f"to {WIDEST_BLUR}, the first below the second.",
    )


# ---- patience --------------------------------------------------------------------------------
LONGEST_WAIT = 10**8  # seconds, three years; more does not fit into what waits for processes
STOPPED = 5.0  # seconds; a process that oversleeps by more was stopped, as by Ctrl-Z


class Patience(NamedTuple):
    """How long to wait for what does not come, in seconds: --warn-after and --give-up-after."""

    warn_after: float = 60.0
    give_up_after: float = 600.0


PATIENCE = Patience()


class Watch:
    """Warns on the standard error where nothing happens in a `with`, and later ends the process.

    `progress` says that something has happened. A thread looks on, and ends the process by itself:
    nothing else can while the main thread waits for a disk that does not answer.

    Args:
        sentence: What has not happened, such as "No batch has come".
        patience: After how long to warn, and to end.
    """

    def __init__(self, sentence: str, patience: Patience):
        self._sentence = sentence
        self._patience = patience
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)

    def __enter__(self) -> "Watch":
        self.progress()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def progress(self) -> None:
        self._since = time.monotonic()

    def _look_on(self) -> None:
        warn_after, give_up_after = self._patience
        has_warned = False
        pause = 0.0
        looked = self._since
        while not self._ended.wait(pause):
            now = time.monotonic()
            if now - looked > pause + STOPPED:
                self.progress()
            looked = now

            waited = now - self._since
            if waited >= give_up_after:
                self._give_up()

            is_late = waited >= warn_after
            if is_late and not has_warned:
                say(
                    f"warning: {self._sentence} for {warn_after:g} seconds; after "
                    f"{give_up_after:g} the run ends (--give-up-after)."
                )
            has_warned = is_late
            pause = min(1.0, warn_after / 4, give_up_after / 4)

    def _give_up(self) -> None:
        say(
            f"error: {self._sentence} for {self._patience.give_up_after:g} seconds "
            "(--give-up-after): a disk may not answer, or a loader process may be stopped."
        )
        sys.stdout.flush()
        for child in multiprocessing.active_children():  # a stopped one would stay
            child.kill()
        os._exit(2)


def tell(*lines: str) -> None:
    """Lines on the standard output. Recipes print with this alone, since a line may hold a name."""
    for line in lines:
        print(printable(line))


def say(sentence: str) -> None:
    """A line on the standard error, which a progress bar makes way for."""
    tqdm.write(printable(sentence), file=sys.stderr)
    sys.stderr.flush()


def is_main_process() -> bool:
    """Whether this is the first process of torchrun, or the only one; before the group exists too.

    What one sentence says for all processes is said there.
    """
    return os.environ.get("RANK", "0") == "0"


_has_said = mmap.mmap(-1, 1)  # one byte, which processes that are forked off share


def say_once(sentence: str) -> None:
    """Print the first of these warnings on the standard error, and none after it.

    This counts over this process and those that are forked off it, whatever the sentence is.
    """
    if is_main_process() and not _has_said[0]:
        _has_said[0] = 1
        # Not `say`: a fork may have copied the lock of the progress bar while it was held.
        print(printable(f"warning: {sentence}"), file=sys.stderr, flush=True)


# ---- processes and randomness ----------------------------------------------------------------
# Where several things are drawn from keys of the same numbers, one of these ends the key of each.
COLORS = 1
STEP = 2
SHUFFLE = 3


class World(NamedTuple):
    """This process among all of them, and the device that it works on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


# Launchers that start several processes without telling them of each other: how many there are,
# and which of them this one is.
LAUNCHERS = {
    "srun": ("SLURM_NTASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
}


def check_launcher() -> None:
    """A UserError for several processes, or for one of several, that torchrun has not started."""
    if "RANK" in os.environ:
        missing = [x for x in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if x not in os.environ]
        check(
            not missing,
            f"RANK is set, and {' and '.join(missing)} not: start with torchrun, which sets all, "
            "or unset RANK for a single process.",
        )
        return
    for launcher, (size, rank) in LAUNCHERS.items():
        count = os.environ.get(size, "1")
        is_one_of_several = count.isdigit() and int(count) > 1 and rank in os.environ
        check(
            not is_one_of_several,
            f"{launcher} has started {count} processes ({size}), which would train without each "
            "other on one run folder: start with torchrun, once on each machine, or unset "
            f"{rank} for a single process.",
        )


LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused")


def is_of_lost_process(error: Exception) -> bool:
    """Whether torch says by this error that another process of the group has ended."""
    return any(words in str(error) for words in LOST)


def uses_cuda(device: str) -> bool:
    """Whether a run with this `--device` works on a GPU."""
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


@contextmanager
def process_group(
    device: str = "auto", collective_timeout: float | None = None, *, fixed_shapes: bool = False
) -> Iterator[World]:
    """Join the group that torchrun describes in the environment, or make a group of one.

    A collective operation may take `collective_timeout` seconds, by default as long as torch says.
    With `fixed_shapes`, cuDNN measures once which algorithms are the quickest for each shape.
    """
    check_launcher()
    use_cuda = uses_cuda(device)
    if use_cuda:
        if not torch.cuda.is_available():
            raise UserError("--device is cuda: no GPU is visible, give cpu.")
        own_device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(own_device)
        options = {"backend": "nccl", "device_id": own_device}
    else:
        own_device = torch.device("cpu")
        options = {"backend": "gloo"}
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))  # one core for the loader

    if collective_timeout is not None:
        options["timeout"] = timedelta(seconds=collective_timeout)
    started_by_torchrun = "RANK" in os.environ
    if not started_by_torchrun:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        dist.init_process_group(**options)
    except dist.DistNetworkError as error:
        raise UserError(
            f"The processes do not find each other ({first_line(error)}): another run may use "
            "this port, give torchrun another --master-port, or the right --master-addr."
        ) from error
    if not use_cuda:
        # With gloo, who leaves before all are connected breaks the connections of the others, and
        # these would report that in the place of what ended it.
        dist.barrier()
    measured_before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = fixed_shapes
    try:
        yield World(dist.get_rank(), dist.get_world_size(), own_device)
    finally:
        torch.backends.cudnn.benchmark = measured_before
        failed = sys.exc_info()[0] is not None
        could_hang = use_cuda and failed and dist.get_world_size() > 1  # NCCL waits for the others
        if not could_hang:
            dist.destroy_process_group()


def generator(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator whose stream depends on the key alone, such as (seed, epoch, index)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()  # torch uses 32 bits
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, torch's global CPU generator follows the key; outside it goes on as if untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator(*key).get_state())
        yield


def seed_step(seed: int, step: int, rank: int, stream: int = STEP) -> None:
    """Seed what a step draws on its device, so that a resumed run draws the same numbers."""
    torch.manual_seed(generator(seed, step, rank, stream).initial_seed())


def image_seeds(seed: int, step: int, indices: Tensor) -> Tensor:
    """A seed for what a step draws on the device for each image, int64 (b,); see `noise`.

    It depends on the three numbers alone: not on the process, the other images or the device. So
    any number of processes draws the same, and so does a run that resumes.
    """
    digest = hashlib.blake2b(repr((seed, step, STEP)).encode(), digest_size=8).digest()
    step_seed = int.from_bytes(digest, "little", signed=True)
    return _mix(indices * GOLDEN + step_seed)


def noise(seeds: Tensor, shape: Sequence[int], stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), float32 (b, *shape), which depend on the seed of each image alone.

    They are hashes of the seed, the stream and the place in the shape: the same on every device,
    in eager and in compiled mode. What is drawn beside something else needs a stream of its own.
    """
    return noises(seeds, {stream: shape})[stream]


def noises(seeds: Tensor, shapes: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
    """The `noise` of several streams, each of its own shape, in fewer operations."""
    own_seeds = [seeds + _wrapped(stream * GOLDEN) for stream in shapes]
    stream_seeds = _mix(torch.stack(own_seeds, 1))
    counts = [math.prod(shape) for shape in shapes.values()]
    # A compiler knows the range of these products, and refuses one that leaves int64.
    places = torch.arange(max(counts), device=seeds.device) * PLACE
    hashes = _mix(stream_seeds[..., None] + places)
    top_bits = (hashes >> 40) & (2**24 - 1)  # as many as a float32 holds
    numbers = top_bits.float() / 2**24

    drawn = {}
    for row, count, (stream, shape) in zip(numbers.unbind(1), counts, shapes.items(), strict=True):
        drawn[stream] = row[:, :count].reshape(len(seeds), *shape)
    return drawn


# The constants of SplitMix64, a generator that counts in steps of the first and mixes the bits; the
# second is the half of the first. In int64, products and sums keep their lowest 64 bits.
PLACE = 0x9E3779B9
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX1 = 0xBF58476D1CE4E5B9 - 2**64
MIX2 = 0x94D049BB133111EB - 2**64


def _wrapped(number: int) -> int:
    """The int64 of the lowest 64 bits of a number."""
    return (number + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """Hash each number, so that each bit of the result depends on all bits of the number."""
    # A shift to the right repeats the sign, which the mask removes.
    x = (x ^ ((x >> 30) & (2**34 - 1))) * MIX1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * MIX2
    return x ^ ((x >> 31) & (2**33 - 1))


def unit_rows(keys: Tensor) -> Tensor:
    """The keys of a run that resumes, of length one, as the recipes keep them.

    Older versions kept keys of any length, and normalized them in every step. Keys of length one
    keep their bits, and so do rows of zeros.
    """
    length = keys.norm(dim=-1, keepdim=True)
    is_rounded_unit = (length - 1).abs() < 1e-3
    return torch.where(is_rounded_unit, keys, dk.l2_normalize(keys))


def warn_of_norm(means: str, arch: str, model: nn.Module, world: World) -> None:
    """Say, once, where what is to give keys other batch statistics than their queries does not.

    Args:
        means: What is to do so, such as `--norm shuffled`.
        arch: The name of the encoder.
        model: The encoder, or what holds it.
        world: This process.
    """
    has_batch_norm = any(isinstance(x, nn.modules.batchnorm._BatchNorm) for x in model.modules())
    if not has_batch_norm:
        reason = f"{arch} has no batch normalization"
    elif world.size == 1:
        reason = (
            "there is one process, so a key has batch statistics of the same images as its query, "
            "which may recognize it by them; torchrun starts several"
        )
    else:
        return
    if world.is_main:
        say(f"warning: {means} has no effect: {reason}.")


def share_buffers(model: nn.Module) -> None:
    """Give each process the buffers of the first one, before all do parts of one work with them.

    On a CPU each process has batch statistics of its own. Those of the first one are saved.
    """
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


# ---- images ----------------------------------------------------------------------------------
def read_image(path: str | Path, value_range: tuple[float, float] | None = None) -> Tensor:
    """The file as an upright RGB image, uint8 (3, H, W); transparency is composited on white.

    Values of more than 8 bits are scaled from the range that the file tells. Where it tells none,
    as one of floats, it is `value_range`, by default a guess from the values.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is no regular file")  # a pipe would be waited for
    with Image.open(path) as file:
        tags = getattr(file, "tag_v2", {})  # of a TIFF
        samples = _tag(tags, SAMPLES_PER_PIXEL, 1)
        if samples > 2 and _tag(tags, PHOTOMETRIC, 1) <= 1:  # Pillow may read the first gray alone
            raise ValueError(f"it has {samples} channels, and a picture is gray or RGB")
        ImageOps.exif_transpose(file, in_place=True)
        image = file
        is_signed_byte = image.mode == "L" and _tag(tags, SAMPLE_FORMAT, UNSIGNED) == SIGNED
        if image.mode[0] in "IF" or is_signed_byte:  # `convert("RGB")` would clip the values
            image = _as_8_bit(image, tags, path, value_range)
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode != "RGB":
            image = image.convert("RGB")
        pixels = np.array(image)
    # The channels of a pixel stay side by side: torch resizes such bytes several times faster.
    return torch.from_numpy(pixels).permute(2, 0, 1)


# Tags of a TIFF, and values of two of them.
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262
SAMPLES_PER_PIXEL = 277
SAMPLE_FORMAT = 339
NO_DATA = 42113  # GDAL's: the value of pixels without data, as text
WHITE_IS_ZERO = 0
UNSIGNED = 1
SIGNED = 2
HUGE = 1e19  # floats above it are marks, such as of pixels without data


def _tag(tags: Any, number: int, default: Any) -> Any:
    """The value of a tag, for the first channel."""
    value = tags.get(number, default)
    return value[0] if isinstance(value, tuple) else value


def _as_8_bit(
    image: Image.Image, tags: Any, path: str | Path, value_range: tuple[float, float] | None
) -> Image.Image:
    """An image of floats, of signed values or of more than 8 bits, scaled to 0 ... 255."""
    values = np.asarray(image)
    bits = _tag(tags, BITS_PER_SAMPLE, 16)  # Pillow scales other formats to 16
    is_signed = _tag(tags, SAMPLE_FORMAT, UNSIGNED) == SIGNED
    if is_signed and bits == 8:
        values = values.view(np.int8)
    if not is_signed and bits == 32 and image.mode[0] == "I":
        values = values.view(np.uint32)
    values = values.astype(np.float64)

    has_data = np.abs(values) < HUGE  # NaN has none
    no_data = as_number(_tag(tags, NO_DATA, ""))
    has_data &= values != no_data
    values[values == no_data] = np.nan
    lowest = min(0.0, values.min(where=has_data, initial=0.0))
    highest = values.max(where=has_data, initial=0.0)

    tells_range = bits <= 16 and image.mode[0] != "F"
    if tells_range:
        low = lowest
        high = 2.0 ** (bits - is_signed) - 1
    elif value_range is not None:
        low, high = value_range
    else:
        low = lowest
        usual = [1.0] if image.mode == "F" else [255.0, 65535.0]
        high = min([x for x in usual if x >= highest], default=highest)
        say_once(
            f"{path} does not tell the range of its values: {low:g} to {high:g} is taken for it. "
            "Each such image gets a range of its own; give all of them the same with --value-range."
        )

    shares = np.clip((values - low) / (high - low), 0, 1)
    shares = np.nan_to_num(shares, nan=0.0)
    if _tag(tags, PHOTOMETRIC, 1) == WHITE_IS_ZERO:
        shares = 1 - shares
    return Image.fromarray((shares * 255).round().astype(np.uint8))


def as_number(text: Any) -> float:
    """The number that a tag holds as text; NaN where it holds none."""
    try:
        return float(str(text).strip("\0 "))
    except ValueError:
        return math.nan


def read_list(path: Path) -> list[str]:
    """The lines of a text file, without empty ones. Only a newline ends a line."""
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            content = os.fsencode(content.decode("utf-16"))
        except UnicodeError as error:
            raise UserError(f"The list {path} begins as UTF-16, but is none: {error}.") from error
    content = content.removeprefix(codecs.BOM_UTF8)
    lines = [os.fsdecode(line.removesuffix(b"\r")) for line in content.split(b"\n")]
    return [line for line in lines if line]


def list_images(
    folder: Path, patience: Patience = PATIENCE, extensions: tuple[str, ...] = EXTENSIONS
) -> list[str]:
    """The paths of the image files below a folder, relative to it, sorted; no hidden ones.

    Links are followed, but each folder is listed once: a link to one around it would go in circles.
    Of several paths to a folder, the one with the fewest links counts. Run folders are left out.
    """
    names = []
    listed = set()
    waiting = [""]
    with Watch(f"Listing the images below {folder} has not gone on", patience) as watch:
        while waiting:
            linked = []
            waiting.sort(reverse=True)  # the last one is the next
            while waiting:
                parent = waiting.pop()
                entries = _entries(folder / parent, listed, watch)
                if RUN_FILES.issubset(entry.name for entry in entries):
                    continue  # the pictures of a run folder are not to train on
                for entry in sorted(entries, key=lambda x: x.name, reverse=True):
                    name = f"{parent}{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{name}/")
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        linked.append(f"{name}/")
                    elif _is_image(entry, extensions):
                        names.append(name)
            waiting = linked
    return sorted(names)


def _entries(folder: Path, listed: set, watch: Watch) -> list[os.DirEntry]:
    """What lies in a folder, without hidden names; nothing, if it is listed already."""
    entries = []
    try:
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in listed:
            return []
        listed.add(identity)
        with os.scandir(folder) as found:
            for entry in found:
                watch.progress()
                if not entry.name.startswith("."):
                    entries.append(entry)
    except OSError as error:
        say(f"warning: {folder} is left out: {error.strerror}.")
    return entries


def _is_image(entry: os.DirEntry, extensions: tuple[str, ...]) -> bool:
    """Whether its name ends in one of the extensions, and it is a regular file.

    A link that leads nowhere counts too: reading it will name it as unreadable.
    """
    if not entry.name.lower().endswith(extensions):
        return False
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()


class FolderImages:
    """Every image file below a folder, sorted, no hidden ones; or those of a .txt list; or `names`.

    `source[i]` is an image, uint8 (3, H, W), and a "path: reason" of each unreadable file that was
    passed over before it. `value_range` is that of images whose file does not tell it.
    `extensions` are those of image files. `read` is for a subclass to change.
    """

    def __init__(
        self,
        folder: str | Path,
        names: Any = None,
        *,
        value_range: tuple[float, float] | None = None,
        patience: Patience = PATIENCE,
        extensions: tuple[str, ...] = EXTENSIONS,
    ):
        self.folder = Path(folder)
        self.value_range = value_range
        if self.folder.suffix == ".txt" and self.folder.is_file():
            names = names or read_list(self.folder)
            self.folder = self.folder.parent
        elif not self.folder.is_dir():
            raise UserError(f"The image folder {folder} does not exist or is not a folder.")

        if names is None:
            names = _listings.pop(os.path.realpath(self.folder), None)
            if extensions != EXTENSIONS:
                names = None  # they were listed without the other ones
        if names is None:
            names = list_images(self.folder, patience, extensions)
        names = [name for name in names if name]
        if not names:
            raise UserError(f"No image file ({' '.join(extensions)}) lies below {folder}.")
        # In one array, forked workers share the names; a list would be copied by each of them.
        self.names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self.names)

    def read(self, path: Path) -> Any:
        """The image of a file."""
        return read_image(path, self.value_range)

    def __getitem__(self, index: int) -> tuple[Any, tuple[str, ...]]:
        unreadable = []
        name = self.names[index]
        while len(unreadable) < len(self):
            path = self.folder / os.fsdecode(name)
            try:
                return self.read(path), tuple(unreadable)
            except UserError:  # the file is well, and of another kind than the others
                raise
            except Exception as error:  # broken bytes raise nearly anything
                unreadable.append(f"{path}: {one_line(error)}")
            name = self.names[(index + len(unreadable)) % len(self)]
        raise UserError(f"No image below {self.folder} is readable, such as {unreadable[0]}.")


class SceneImages(list):
    """A source of procedural scenes of 64 x 64 pixels; the i-th one is always the same."""

    def __init__(self, count: int):
        super().__init__()
        for number, start in enumerate(range(0, count, 64)):  # 64 at a time bound the memory
            part = min(64, count - start)
            drawn = dk.sample_scenes(part, (64, 64), generator=generator(0, number))
            self.extend((image, ()) for image in (drawn.images * 255).round().byte())


def image_source(
    data: Path | None,
    *,
    scenes: int,
    value_range: tuple[float, float] | None = None,
    patience: Patience = PATIENCE,
) -> Any:
    """The images below a folder or in a .txt list; without either, `scenes` procedural scenes."""
    if data is not None:
        return FolderImages(data, value_range=value_range, patience=patience)
    if not scenes:
        raise UserError("This preset trains on your images: name their folder with --data.")
    return SceneImages(scenes)


def normalize_images(
    images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor
) -> Tensor:
    """Images of 8 bits (b, 3, h, w) as floats, less the mean and divided by the deviation.

    Mean and standard deviation of each color are those of images in [0, 1].
    """
    # What is on the device already is not copied, so that nothing waits.
    mean_column = torch.as_tensor(mean, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    std_column = torch.as_tensor(std, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.sub_(mean_column * 255).div_(std_column * 255)


def unnormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalized images (b, 3, h, w) as pictures in [0, 1], on the CPU."""
    mean_column = torch.tensor(mean).view(3, 1, 1)
    std_column = torch.tensor(std).view(3, 1, 1)
    return (images.cpu() * std_column + mean_column).clamp(0, 1)


# ---- batches ---------------------------------------------------------------------------------
def batches_per_epoch(images: int, batch: int, world: World) -> int:
    """The number of whole batches in an epoch; `batch` counts the images of all processes."""
    if batch % world.size or batch < 2 * world.size:
        raise UserError(
            f"--batch is {batch}: give a multiple of the {world.size} processes, 2 images or more "
            "for each."
        )
    if batch > images:
        raise UserError(f"--batch is {batch}: give at most {images}, the number of images.")
    return images // batch


DYING = 1.0  # seconds; a loader process that breaks off its connections ends within them


def is_of_dead_worker(error: Exception) -> bool:
    """Whether torch says by this error that a loader process has died."""
    return str(error).startswith("DataLoader worker (pid")


def has_dead_worker(iterator: Iterator[Any]) -> bool:
    """Whether a loader process of a DataLoader's iterator is dead; a dying one is waited for."""
    workers = getattr(iterator, "_workers", ())  # there are none with --workers 0
    sentinels = [worker.sentinel for worker in workers]
    return bool(sentinels) and bool(connection.wait(sentinels, DYING))


def loader_failure(error: Exception) -> str:
    """A dead loader process, or a lack of shared memory, in one sentence."""
    return (
        f"The loader has failed ({one_line(error)}): the memory or /dev/shm may be too small, give "
        "more of it, a smaller --batch, fewer --workers, or --workers 0, which needs no /dev/shm."
    )


# Options of glibc's `mallopt`, and their values in bytes.
TRIM_THRESHOLD = (-1, 2**26)
MMAP_THRESHOLD = (-3, 2**25)  # the highest that it takes


def keep_memory() -> None:
    """Let this process keep up to 64 MB of what it frees, for the next image of about this size.

    Otherwise glibc returns the memory of each image to the system, which clears all of it again
    before it gives it out. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(*TRIM_THRESHOLD)
    mallopt(*MMAP_THRESHOLD)


def start_worker(_: int) -> None:
    """What every loader process does first: the `worker_init_fn` of a DataLoader."""
    gc.freeze()  # a dead process group, collected here, would wait for threads that a fork lacks
    keep_memory()
    os.setpgrp()  # a signal to all, as torchrun sends it, is for the main process to heed


def share_batch(items: Any) -> Any:
    """Move a batch to shared memory, in a loader process: the end of a DataLoader's `collate_fn`.

    torch would do so too, but in a thread whose errors get lost: where /dev/shm is too small, the
    main process would wait for ever.
    """
    if get_worker_info() is not None:
        try:
            tree_map_only(Tensor, Tensor.share_memory_, items)
        except RuntimeError as error:
            raise UserError(loader_failure(error)) from error
    return items


def load(loader: Iterable[Any], patience: Patience = PATIENCE) -> Iterator[Any]:
    """The batches of a DataLoader; a dead process of it is a UserError, and a slow one is named."""
    iterator = iter(loader)
    end = object()
    while True:
        try:
            with Watch("No batch of images has come", patience):
                items = next(iterator, end)
        except (RuntimeError, OSError, EOFError) as error:
            # A process that dies while it hands a tensor over is a connection that breaks off.
            if not (is_of_dead_worker(error) or has_dead_worker(iterator)):
                raise
            raise UserError(loader_failure(error)) from error
        if items is end:
            return
        yield items


IMAGES_PER_ITEM = 8  # what a loader process makes at a time, unless its batches are large
ITEMS_PER_BATCH = 32  # at most: each item needs file descriptors
BATCHES_AHEAD = 2


class LoaderPlan(NamedTuple):
    """What the loader processes of one process make, and how much of it may wait for a step."""

    images_per_item: int  # an item is a part of a batch
    items_per_batch: int
    items_per_worker: int  # that wait, or are being made


def plan_loader(images: int, workers: int) -> LoaderPlan:
    """How to share the batches of a process, of so many images each, among its workers."""
    even_share = math.ceil(images / max(1, workers))
    per_item = max(min(IMAGES_PER_ITEM, even_share), math.ceil(images / ITEMS_PER_BATCH))
    per_batch = math.ceil(images / per_item)
    per_worker = max(2, math.ceil(BATCHES_AHEAD * per_batch / max(1, workers)))
    return LoaderPlan(per_item, per_batch, per_worker)


def image_keys(
    images: int, batch: int, world: World, *, seed: int, start: int, stop: int
) -> Iterator[list[tuple[int, int]]]:
    """The (epoch, index) of each image that this process has in the steps `start` to `stop`.

    Every epoch has an order of its own, drawn from (seed, epoch). In a step all processes together
    have the same images, however many they are.
    """
    per_epoch = batches_per_epoch(images, batch, world)
    while start < stop:
        epoch, done = divmod(start, per_epoch)
        order = torch.randperm(images, generator=generator(seed, epoch))
        own = order[world.rank : per_epoch * batch : world.size].view(per_epoch, -1)
        own = own[done:][: stop - start]
        for indices in own:
            yield [(epoch, index) for index in indices.tolist()]
        start += len(own)


def _items(keys: Iterable[list[Any]], images_per_item: int) -> Iterator[list[Any]]:
    """Parts of the lists of keys, each of so many images; the last of a list may be smaller."""
    for batch_keys in keys:
        for first in range(0, len(batch_keys), images_per_item):
            yield batch_keys[first : first + images_per_item]


def _join(parts: Sequence[Any], join: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """Join the tensors of like parts by `join`, field by field; lists are put after each other."""
    first = parts[0]
    if isinstance(first, Tensor):
        return join(parts)
    if isinstance(first, list):
        return [entry for part in parts for entry in part]
    if isinstance(first, tuple):
        fields = [_join(column, join) for column in zip(*parts, strict=True)]
        return type(first)(*fields) if hasattr(first, "_fields") else tuple(fields)
    raise TypeError(f"An item is a tuple of tensors, tuples and lists; it holds {first!r}.")


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, which would move the channels of the images apart."""
    return torch.cat([part[None] for part in parts])


def _collate(images: list[Any]) -> Any:
    """The items of a few images as one, which a loader process hands over."""
    return share_batch(_join(images, _stack))


def _finish_batch(parts: Sequence[Any], normalize: tuple | None) -> list[Any]:
    """Put the parts of a batch together, on their device; the images become floats."""
    fields = _join(parts, torch.cat)
    batch = [list(field) if type(field) is tuple else field for field in fields]
    if normalize is not None:
        mean, std = normalize
        batch[0] = [normalize_images(x, mean, std) for x in batch[0]]
    return batch


def make_batch(
    dataset: Any, indices: Sequence[int], *, epoch: int = 0, normalize: tuple | None = None
) -> list[Any]:
    """The batch of these images in an epoch, on the CPU: see `batches`."""
    items = [dataset[epoch, index] for index in indices]
    return _finish_batch([_collate(items)], normalize)


def batches(
    dataset: Any,
    batch: int,
    world: World,
    *,
    seed: int,
    start: int,
    stop: int,
    workers: int = 0,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    patience: Patience = PATIENCE,
) -> Iterator[Any]:
    """The batches of steps `start` to `stop` for this process, on its device, epoch after epoch.

    `image_keys` deals the images; a resumed run goes on with the batch that comes next. The loader
    processes live until the last step, so that nothing waits at the end of an epoch. Each makes a
    few images at a time, `plan_loader` says how many.

    An item of the dataset is a tuple of tensors, of tuples of tensors, and of lists. In a batch
    each tensor has a leading axis of images, a tuple is a list of such tensors, and a list holds
    the entries of all images.

    Args:
        dataset: `dataset[epoch, index]` makes the item of one image, and draws from
            (seed, epoch, index) alone; `len(dataset)` is the number of images.
        batch: Images a step, over all processes.
        world: This process.
        seed: The run's seed.
        start: The first step.
        stop: The step before which to end.
        workers: Loader processes of this process; 0 loads in the process itself.
        normalize: Mean and standard deviation of each color, in [0, 1]. The first field, a tuple
            of images of 8 bits, then becomes floats on the device. Without it, it stays as it is.
        patience: How long to wait for a batch.
    """
    keys = image_keys(len(dataset), batch, world, seed=seed, start=start, stop=stop)
    plan = plan_loader(batch // world.size, workers)
    loader = DataLoader(
        dataset,
        batch_sampler=_items(keys, plan.images_per_item),
        num_workers=workers,
        prefetch_factor=plan.items_per_worker if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=start_worker,
        collate_fn=_collate,
        pin_memory=world.device.type == "cuda",
        generator=generator(seed),
    )
    columns = None
    if normalize is not None:  # on the device once, and not in every step
        columns = tuple(torch.tensor(x, device=world.device) for x in normalize)
    items = load(loader, patience)
    for _ in range(start, stop):
        parts = []
        for part in islice(items, plan.items_per_batch):
            move = partial(Tensor.to, device=world.device, non_blocking=True)
            parts.append(tree_map_only(Tensor, move, part))
        yield _finish_batch(parts, columns)


def progress(items: Iterable[Any], *, start: int, stop: int, world: World) -> tqdm:
    """A progress bar of at most 100 columns around the batches, on the main process."""
    hidden = not world.is_main
    columns = bar_width()
    return tqdm(items, total=stop, initial=start, disable=hidden, unit="step", ncols=columns)


def bar_width() -> int:
    """The columns of the terminal, at most 100, which is also the answer where there is none."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):  # a file, or what stands in for one
        columns = 0
    return min(100, columns or 100)


def show(bar: tqdm, values: dict[str, float], names: Sequence[str] = ()) -> None:
    """Show the loss and the first three of the named terms; the log has them all."""
    shown = {name: values[name] for name in ("loss", *names[:3]) if name in values}
    bar.set_postfix(shown, refresh=False)


# ---- the files that a run reads --------------------------------------------------------------
NAME_FILES = ("weights", "encoder", "annotations", "val_annotations")  # in words, not as a Path
LABELED = ("layout", "annotations", "split")  # options beside those of a folder with labels
LABEL_FILES = (".json", ".txt", ".xml", ".npz", ".csv", ".mat")
SAMPLE = 256  # files of a folder whose content counts
SAMPLE_BYTES = 2**26  # what is read of them, together

_listings: dict[str, list[str]] = {}  # the images of a folder, for the first one who asks


def fingerprint(
    config: Any,
    *,
    ignore: Sequence[str] = (),
    more: dict[str, Path] | None = None,
    extensions: tuple[str, ...] = EXTENSIONS,
    patience: Patience = PATIENCE,
) -> dict[str, dict[str, Any]]:
    """What there is where the options of a configuration name files, by the option.

    Args:
        config: A dataclass. Its options that are a Path name files, and those of `NAME_FILES`.
        ignore: Options that count for nothing, such as the run folder.
        more: Other files that the run reads, by a name for messages.
        extensions: Those of image files.
        patience: How long to wait for a disk.
    """
    found = {}
    for option, path, has_labels in _named_files(config):
        if option.split(".")[-1] in ignore:
            continue
        name = f"{option} {path}" if option in found else option  # it names several files
        found[name] = _look_at(path, has_labels, extensions, patience)
    for name, path in (more or {}).items():
        found[name] = _look_at(path, has_labels=False, extensions=extensions, patience=patience)
    return found


def _named_files(config: Any, prefix: str = "") -> list[tuple[str, Path, bool]]:
    """The options that name files, with what they name, and whether labels lie there, too."""
    named = []
    has_labels = any(hasattr(config, name) for name in LABELED)
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        name = prefix + option.name
        if dataclasses.is_dataclass(value):
            named += _named_files(value, f"{name}.")
        elif isinstance(value, Path):
            named.append((name, value, has_labels))
        elif option.name in NAME_FILES:
            words = (value,) if isinstance(value, str) else value or ()
            home = getattr(config, "data", None) if "annotations" in name else None
            # The last one has the option's own name, by which an older version noted it alone.
            for path in reversed(_paths(words, home)):
                named.append((name, path, False))
    return named


def _paths(words: Sequence[str], home: Path | None) -> list[Path]:
    """The files among words such as `timm:NAME:FILE`, a run folder, or names below `home`."""
    paths = []
    for word in words:
        kind, _, rest = word.partition(":")
        name = rest.partition(":")[2] if kind in ("timm", "torchvision", "random") else word
        if not name or name == "lite0":
            continue
        path = (home or Path()) / name
        in_run_folder = path / ENCODER
        if in_run_folder.is_file():
            paths.append(in_run_folder)
        elif path.is_file():
            paths.append(path)
    return paths


def _look_at(
    path: Path, has_labels: bool, extensions: tuple[str, ...], patience: Patience
) -> dict[str, Any]:
    """The place of a file or folder, how many names there are, and hashes of names and content."""
    place = {"path": os.path.realpath(path)}
    if path.is_file():
        return {**place, **_look_at_file(path, patience)}
    if not path.is_dir():
        return {**place, "missing": True}

    names = list_images(path, patience, extensions)
    if extensions == EXTENSIONS:
        _listings[place["path"]] = names
    files = [path / name for name in names]
    found = {"images": len(names), "names": _hash(map(os.fsencode, names))}
    if has_labels:
        label_files = _label_files(path, patience)
        found["label_files"] = len(label_files)
        found["label_names"] = _hash(os.fsencode(x.relative_to(path)) for x in label_files)
        found["labels"] = _content(label_files, patience)
    return {**place, **found, "content": _content(files, patience)}


def _look_at_file(path: Path, patience: Patience) -> dict[str, Any]:
    """Size and content of a file; of a list also how many names it has."""
    found: dict[str, Any] = {"bytes": path.stat().st_size}
    listed = []  # what belongs to the file
    if path.suffix == ".safetensors":
        listed = [path.with_suffix(".json")]
    if path.suffix == ".txt":
        try:
            names = read_list(path)
        except (UserError, OSError):  # whoever reads it says so
            names = []
        found["names_listed"] = len(names)
        listed = [path.parent / name for name in names]
    return {**found, "content": _content([path], patience), "listed": _content(listed, patience)}


def _label_files(folder: Path, patience: Patience) -> list[Path]:
    """The files below a folder that may hold labels, sorted; no hidden ones."""
    names = list_images(folder, patience, LABEL_FILES)
    return sorted(folder / name for name in names)


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _content(files: Sequence[Path], patience: Patience) -> str:
    """A hash of the content of some of the files, evenly chosen, and of parts of large ones."""
    stride = max(1, math.ceil(len(files) / SAMPLE))
    chosen = files[::stride]
    limit = SAMPLE_BYTES // max(1, len(chosen))
    parts = []
    with Watch("Reading the files that the options name has not gone on", patience) as watch:
        for file in chosen:
            watch.progress()
            parts.append(_sample(file, limit))
    return _hash(parts)


def _sample(file: Path, limit: int) -> bytes:
    """The size of a file and up to `limit` bytes of it, in 16 parts; its error, if it has one."""
    try:
        if not file.is_file():
            return b"is no file"
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            starts = [0] if size <= limit else [size * part // 16 for part in range(16)]
            parts = [size.to_bytes(8, "little")]
            for start in starts:
                opened.seek(start)
                parts.append(opened.read(limit // len(starts)))
            return b"".join(parts)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        return type(error).__name__.encode()


COUNTED = {
    "images": "images",
    "label_files": "label files",
    "names_listed": "names",
    "bytes": "bytes",
}


def _file_difference(old: dict[str, Any], new: dict[str, Any], then: str, now: str) -> str:
    """What differs in the files of an option, such as `24 images then, 40 now`; or nothing."""
    if old.get("missing") != new.get("missing"):
        return f"no such file or folder {now if new.get('missing') else then}"

    differences = []
    for key, noun in COUNTED.items():
        if key in old and key in new and old[key] != new[key]:
            differences.append(f"{old[key]} {noun} {then}, {new[key]} {now}")
            break  # the others follow from it
    if not differences and old.get("names") != new.get("names"):
        differences.append(f"images of other names {now}")
    if not differences and old.get("label_names") != new.get("label_names"):
        differences.append(f"label files of other names {now}")
    contents = ("content", "labels", "listed")
    if not differences and any(old.get(key) != new.get(key) for key in contents):
        differences.append(f"another content {now}")
    return " and ".join(differences)


def _changed_files(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The options whose files are no longer those of the old fingerprint, and how."""
    changes = []
    for option, now in new.items():
        then = old.get(option)
        if not isinstance(then, dict):
            continue  # an older version did not look at it
        differences = [_file_difference(then, now, "then", "now")]
        if then.get("path") != now["path"]:
            differences.insert(0, f"{then.get('path')} then, {now['path']} now")
        told = " and ".join(x for x in differences if x)
        if told:
            changes.append(f"{as_option(option)}: {told}")
    return "; ".join(changes)


def as_option(name: str) -> str:
    """The field `views.min_size` of a configuration as it is typed, `--views.min-size`."""
    return f"--{name.replace('_', '-')}"


# ---- checkpoints -----------------------------------------------------------------------------
ROW = "row.json"  # the sums, in a checkpoint, of the row of the log that is not complete yet
# The step of a checkpoint, and size and hash of each of its files; it is written last.
CHECKSUMS = "checksums.json"
ENCODER = "encoder.safetensors"
SIDE_CAR = "encoder.json"
CHECKPOINT = re.compile(r"step-([0-9]{8,})(-epoch-[0-9]+)?")


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint by its name, such as step-00000040-epoch-2; -1 for other names."""
    match = CHECKPOINT.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, in the order of their steps, whole or not."""
    found = [x for x in folder.glob("checkpoints/step-*") if step_of(x) >= 0 and x.is_dir()]
    return sorted(found, key=lambda x: (step_of(x), x.name))


def _checksum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
    return {"bytes": path.stat().st_size, "blake2b": digest}


def write_checksums(checkpoint: Path) -> None:
    """Write the checksums of all files of a checkpoint into it, and its step."""
    final = checkpoint.with_name(checkpoint.name.removeprefix("."))  # until it is whole
    sums: dict[str, Any] = {"step": step_of(final)}
    for path in sorted(checkpoint.iterdir()):
        if path.name != CHECKSUMS:
            sums[path.name] = _checksum(path)
    write(checkpoint / CHECKSUMS, json.dumps(sums, indent=2).encode())


def _read_row(checkpoint: Path) -> list[dict[str, Any]]:
    """What a checkpoint tells of its row of the log; those of older versions tell nothing."""
    path = checkpoint / ROW
    if not path.exists():
        return []
    parts = json.loads(path.read_bytes())
    for part in parts:
        count = len(part["terms"])
        are_names = all(isinstance(name, str) for name in part["terms"])
        are_sums = len(part["sums"]) > 0 and all(len(sums) == count for sums in part["sums"])
        numbers = [x for sums in part["sums"] for x in sums]
        check(
            are_names and are_sums and type(part["steps"]) is int and part["steps"] > 0,
            f"{ROW} holds no sums of a row",
        )
        check(
            all(type(x) in (int, float) and math.isfinite(x) for x in numbers),
            f"{ROW} holds a sum that is no finite number",
        )
    return parts


def damage_of(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty where nothing is."""
    try:
        if (checkpoint / CHECKSUMS).exists():
            sums = json.loads((checkpoint / CHECKSUMS).read_text())
            step = sums.pop("step", None)  # older versions noted none
            if step not in (None, step_of(checkpoint)):
                return f"it was renamed, and is of step {step}"
            for name, expected in sums.items():
                if not (checkpoint / name).is_file():
                    return f"{name} is missing"
                found = _checksum(checkpoint / name)
                if found["bytes"] != expected["bytes"]:
                    return f"{name} has {found['bytes']} bytes instead of {expected['bytes']}"
                if found != expected:
                    return f"{name} has another checksum"

        if not (checkpoint / ".metadata").is_file():
            return ".metadata is missing"
        metadata = PlainReader(checkpoint).read_metadata()
        for part in metadata.storage_data.values():
            file = checkpoint / part.relative_path
            if not file.is_file() or file.stat().st_size < part.offset + part.length:
                return f"{part.relative_path} is missing or too short"
        _read_row(checkpoint)
    except Exception as error:  # broken bytes raise nearly anything
        return first_line(error)
    return ""


class PlainUnpickler(pickle.Unpickler):
    """Reads the metadata of torch's distributed checkpoints, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        home = "torch.distributed.checkpoint"
        is_record = module == f"{home}.metadata" or (module, name) == (
            f"{home}.filesystem",
            "_StorageInfo",
        )
        if is_record and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in (("torch", "Size"), ("torch.serialization", "_get_layout")):
            return super().find_class(module, name)
        if module in ("pathlib", "pathlib._local") and name.endswith("Path"):
            return pathlib.PurePath  # which touches no disk
        raise pickle.UnpicklingError(
            f"the metadata names {module}.{name}, which is none of torch's"
        )


class PlainReader(dcp.FileSystemReader):
    """Reads a checkpoint whose metadata nobody has to trust."""

    def read_metadata(self, *_: Any, **__: Any) -> Any:
        with Path(self.path, ".metadata").open("rb") as file:
            metadata = PlainUnpickler(file).load()
        if not isinstance(metadata, dcp.Metadata):
            raise pickle.UnpicklingError(".metadata holds no metadata of a checkpoint")
        if metadata.storage_meta is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class PlainPlanner(dcp.DefaultLoadPlanner):
    """Loads what is no tensor, the state of the optimizer, as plain data alone."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        torch.load(value, weights_only=True)  # it refuses what could run code
        value.seek(0)
        super().load_bytes(read_item, value)


# What the disk says, whatever the file is.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE)

# What is raised where a checkpoint is of another model; the state of its optimizer may be anything.
UNFIT = (dcp.api.CheckpointException, ValueError, TypeError, LookupError, AttributeError)
WRITER_ERRORS = ("inline_container", "PytorchStreamWriter", "iostream error")  # of torch.save


def disk_failure(error: BaseException, folder: Path) -> str:
    """What a disk says of a failure below a folder; empty where the error is of something else."""
    if isinstance(error, dcp.api.CheckpointException):
        reasons = [disk_failure(failed, folder) for failed, _ in error.failures.values()]
        return next(filter(None, reasons), "")
    if isinstance(error, RuntimeError):  # torch.save counts the bytes that have arrived
        of_writer = any(words in str(error) for words in WRITER_ERRORS)
        inner = error.__cause__ or error.__context__
        told = disk_failure(inner, folder) if inner is not None else ""
        return (told or "a file was not written whole") if of_writer else ""
    if not isinstance(error, OSError):
        return ""
    name = error.filename
    is_named = isinstance(name, str | bytes)  # it may be a number
    file = Path(os.path.abspath(os.fsdecode(name))) if is_named else None
    is_inside = file is not None and file.is_relative_to(os.path.abspath(folder))
    if error.errno not in DISK_ERRORS and not is_inside:
        return ""
    reason = error.strerror or first_line(error)
    return f"{reason}: {file}" if is_inside else reason


# ---- the run folder --------------------------------------------------------------------------
def run_folder(recipe: str, config: Any, *more: str) -> Path:
    """`--run`, or runs/RECIPE-PRESET with what else tells runs apart, and the data's name."""
    if config.run:
        return config.run
    names = [recipe, config.preset, *more]
    if config.data:
        names.append(config.data.resolve().name)
    return Path("runs", "-".join(names))


def write(path: Path, content: bytes) -> None:
    """Make or replace a file: it is there whole or not at all."""
    temporary = _temporary(path)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:  # a disk that is full has more use for the space
        if error.filename is None:
            error.filename = str(path)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _temporary(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.tmp")


def _remove(folder: Path) -> None:
    """Remove a checkpoint: it is there whole or not at all."""
    hidden = folder.with_name(f".{folder.name}.old")
    folder.replace(hidden)
    shutil.rmtree(hidden)


def _flatten(tree: Any, name: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(tree, dict) or not tree:
        return {name: tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{name}.{key}" if name else key)
    return flat


def difference_of(old: dict[str, Any], new: dict[str, Any], ignore: Sequence[str] = ()) -> str:
    """The options that differ, such as `lr = 0.1, now 0.2`; empty where none does."""
    counted = [name for name in {**new, **old} if name not in ignore]
    differing = [name for name in counted if old.get(name) != new.get(name)]
    return ", ".join(f"{name} = {old.get(name)!r}, now {new.get(name)!r}" for name in differing)


def _tensors(state: Any) -> Any:
    """Nested dicts of the tensors themselves, which a checkpoint loads in place."""
    if isinstance(state, Tensor):
        return state
    if isinstance(state, nn.Module):
        return dsd.get_model_state_dict(state)
    fields = state._asdict() if hasattr(state, "_asdict") else state
    return {name: _tensors(value) for name, value in fields.items()}


LOCK = ".lock"  # in a run folder: who owns the folder holds the lock on it
PASSED_ON_WITHIN = 2.0  # seconds in which torchrun passes a signal on


def kept_epochs(config: Any, steps_per_epoch: int) -> dict[int, int]:
    """The epochs of --keep, by the step that ends each of them."""
    return {epoch * steps_per_epoch: epoch for epoch in config.keep}


FINGERPRINT = "fingerprint"  # in config.json: what there was where the options name files
# Between the processes of a run these may differ.
MAY_DIFFER = ("run", "workers", "device", "warn_after", "give_up_after", "changed_data")

_locks = set()  # the open files by which this process owns run folders


def _drop_locks() -> None:
    """What a fork does: the lock belongs to its parent, and would outlive it in a copy."""
    for file in _locks:
        file.close()
    _locks.clear()


os.register_at_fork(after_in_child=_drop_locks)


def _flock(file: Any) -> None:
    """Lock a file, or a BlockingIOError.

    A process that was forked off by one that is dead now may not have dropped its copy yet.
    """
    deadline = time.monotonic() + 1.0
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _unlock(file: Any) -> None:
    if not file.closed:  # a process that is just forked off may still have a copy
        fcntl.flock(file, fcntl.LOCK_UN)


def as_plain(content: Any) -> Any:
    """What JSON makes of it, with text for what is neither text nor a number that JSON has.

    So a path becomes text, and infinity too, which strict readers of JSON would refuse.
    """
    return json.loads(json.dumps(content, default=str), parse_constant=str)


def _read_config(path: Path) -> dict[str, Any]:
    """What a config.json holds."""
    try:
        content = json.loads(path.read_bytes(), parse_constant=str)  # see `as_plain`
        check(isinstance(content, dict), "it is no JSON object")
    except (ValueError, RecursionError, UserError) as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}): restore it, or choose another run "
            "folder with --run."
        ) from error
    return content


def _without(options: dict[str, Any], ignore: Sequence[str]) -> dict[str, Any]:
    """The options that count: `ignore` has the names of the others, whole or their last words."""
    ignored = {name for name in options if name in ignore or name.split(".")[-1] in ignore}
    return {name: value for name, value in options.items() if name not in ignored}


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """A line of the log; None where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    has_step = isinstance(row, dict) and type(row.get("step")) is int
    has_numbers = has_step and all(type(x) in (int, float) for x in row.values())
    return row if has_numbers else None


def patience_of(config: Any) -> Patience:
    """How long a run with this configuration waits; some have no option for it."""
    if hasattr(config, "warn_after"):
        return Patience(config.warn_after, config.give_up_after)
    return PATIENCE


class Run(ExitStack):
    """A folder, its log and its checkpoints, for a `with`; all processes call it alike.

    A folder with a run of the same `config` (a dataclass, but for the fields in `ignore`) goes on,
    and so does one whose run never got to `resume`; any other is a UserError. Call `resume` first,
    then `record` in each step, `take_means` for a row, `log` and `save`.

    The device is waited for in `take_means` and `check` alone, and in `save`, which checks as well.
    The values of a step stay on the device until then, and no state is saved that follows a value
    which is not finite.

    SIGTERM, SIGINT and SIGUSR1 ask a run to stop once it has made a step; before, and a second
    time, SIGTERM and SIGINT end it at once.

    The folder belongs to one run at a time, and that run knows its files: where the images, or
    what else its options name, have changed, it goes on with `changed_data` in its configuration
    alone. A disk that fails is a UserError, also where the code in the `with` writes to the folder.

    Args:
        folder: The run folder.
        config: The configuration, a dataclass.
        world: This process.
        ignore: Options that may change when the run resumes.
        files: Other files that the run reads than those of its options, by a name.
        extensions: Of the image files that it reads.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        world: World,
        ignore: Sequence = MAY_CHANGE,
        *,
        files: dict[str, Path] | None = None,
        extensions: tuple[str, ...] = EXTENSIONS,
    ):
        super().__init__()
        self.folder = Path(folder)
        self.world = world
        self._unreadable = set()
        self._totals = {}  # by the names of the terms: their sums, and their first bad steps
        self._counts = {}  # by the names of the terms: how many steps have recorded them
        self._sums = {}  # by the names of the terms: their sums in each process, when last read
        self._is_read = True  # whether all that is recorded has been read
        self._stop = False  # whether a signal came to this process
        self._all_stop = False  # whether one had come to any process when values were last read
        self._listens = False
        self._patient_group = None
        if world.size > 1:
            longest = timedelta(seconds=LONGEST_WAIT)
            self._patient_group = dist.new_group(backend="gloo", timeout=longest)

        self._checkpoints = []  # in the order of their steps
        self._content = b""  # of config.json
        try:
            found = fingerprint(
                config,
                ignore=ignore,
                more=files,
                extensions=extensions,
                patience=patience_of(config),
            )
            self._compare_processes(config, found)
            self._checkpoints = self._on_main(partial(self._prepare, config, found, ignore))
        except BaseException:
            self.close()
            raise

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> Any:
        _listings.clear()
        suppressed = False
        try:
            suppressed = super().__exit__(kind, error, trace)
        except OSError as closing:  # such as of the last rows of the curves
            if error is None:
                self._refuse_disk(closing)
                raise
        if error is not None:
            self._refuse_disk(error)
        return suppressed

    def _refuse_disk(self, error: BaseException) -> None:
        """Raise a UserError for a disk that fails; for another error do nothing."""
        reason = disk_failure(error, self.folder)
        if reason:
            raise UserError(self._disk_sentence(reason)) from error

    def _disk_sentence(self, reason: str) -> str:
        return f"The run folder {self.folder} cannot be read or written ({reason}); {self._kept()}."

    def _kept(self) -> str:
        if self._checkpoints:
            return f"the last good checkpoint is {self._checkpoints[-1]}"
        return "none is saved"

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """What `work()` returns on the main process; all get it, and a UserError of it as well."""
        found = None
        problem = ""
        if self.world.is_main:
            try:
                found = work()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = self._disk_sentence(disk_failure(error, self.folder) or first_line(error))
        if self.world.size > 1:
            answer = [found, problem]
            dist.broadcast_object_list(answer, src=0, group=self._patient_group)
            found, problem = answer
        if problem:
            raise UserError(problem)
        return found

    def _compare_processes(self, config: Any, found: dict[str, dict[str, Any]]) -> None:
        """The same UserError on all processes, where options or files differ between them."""
        if self.world.size == 1:
            return
        options = _flatten(as_plain(dataclasses.asdict(config)))
        own = _without(options, MAY_DIFFER)
        everywhere: list[Any] = [None] * self.world.size
        dist.all_gather_object(everywhere, (own, found), group=self._patient_group)

        differences = []
        first_options, first_files = everywhere[0]
        for rank, (other_options, other_files) in enumerate(everywhere):
            for name in {**first_options, **other_options}:
                first = first_options.get(name)
                other = other_options.get(name)
                is_file = name in first_files and name in other_files  # places may differ
                if first != other and not (is_file and name not in NAME_FILES):
                    differences.append(
                        f"{as_option(name)} is {first} on rank 0, {other} on rank {rank}"
                    )
            for name in {**first_files, **other_files}:
                first = first_files.get(name, {"missing": True})
                other = other_files.get(name, {"missing": True})
                told = _file_difference(first, other, "on rank 0", f"on rank {rank}")
                if told:
                    differences.append(f"{as_option(name)}: {told}")
        check(
            not differences,
            f"The processes of this run differ ({'; '.join(differences[:8])}): start all of them "
            "with the same options and the same files.",
        )

    def _prepare(
        self, config: Any, found: dict[str, dict[str, Any]], ignore: Sequence
    ) -> list[Path]:
        """Take the folder, which is made where missing; the checkpoints in it."""
        path = self.folder / "config.json"
        is_new = not path.exists()
        if is_new and (
            self.folder.is_file() or any(x.name[0] != "." for x in self.folder.glob("*"))
        ):
            raise UserError(
                f"The run folder {self.folder} is neither empty nor an earlier run's: choose "
                "another with --run."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        is_locked = self._lock_folder()

        new = as_plain({**dataclasses.asdict(config), FINGERPRINT: found})
        self._content = json.dumps(new, indent=2).encode()
        has_begun = path.exists() and (self.folder / "metrics.jsonl").exists()
        if path.exists():
            self._check_configuration(_read_config(path), new, config, ignore, has_begun)
        if not has_begun:  # else `resume` writes it
            write(path, self._content)

        if is_locked:  # or they may be of a save that goes on
            for leftover in self.folder.glob("checkpoints/.step-*"):  # of a save that was killed
                if leftover.is_dir():
                    shutil.rmtree(leftover)
        return find_checkpoints(self.folder)

    def _lock_folder(self) -> bool:
        """Take the lock, which is free again when this process has ended, whatever ends it."""
        file = (self.folder / LOCK).open("a+b", buffering=0)
        self.callback(file.close)
        try:
            _flock(file)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).decode(errors="replace")
            raise UserError(
                f"The run folder {self.folder} is in use by another process ({owner}): wait for "
                "its end, or choose another with --run."
            ) from None
        except OSError as error:
            say(
                f"warning: the file system of {self.folder} has no locks ({error.strerror}): make "
                "sure that no other process uses this run folder."
            )
            return False
        _locks.add(file)
        self.callback(_locks.discard, file)
        self.callback(_unlock, file)
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}".encode())
        return True

    def _check_configuration(
        self,
        old: dict[str, Any],
        new: dict[str, Any],
        config: Any,
        ignore: Sequence,
        has_begun: bool,
    ) -> None:
        """A UserError, unless the run in this folder has these options and these files."""
        # Of a file counts what it is, and not how an option calls it.
        named_files = [name for name, _, _ in _named_files(config) if name not in NAME_FILES]
        old_files = old.pop(FINGERPRINT, None)
        new_files = new.pop(FINGERPRINT)
        is_known = isinstance(old_files, dict)
        same_place = [name for name in named_files if is_known and name in old_files]

        old_options = _without(_flatten(old), ignore)
        new_options = _without(_flatten(new), ignore)
        difference = difference_of(old_options, new_options, same_place)
        is_other_recipe = old_options.keys() != new_options.keys()
        check(
            not difference or not (is_other_recipe or has_begun),
            f"The run folder {self.folder} holds a run with another configuration ({difference}): "
            "choose another with --run.",
        )
        if not has_begun:
            return
        if new_files and not is_known:
            say(
                f"warning: an older version has begun the run in {self.folder}, and has not noted "
                "its files: whether they have changed is not known."
            )
        changed = _changed_files(old_files, new_files) if is_known else ""
        may_change = getattr(config, "changed_data", None)
        other_way = "" if may_change is None else "go on with them by --changed-data, or "
        check(
            not changed or bool(may_change),
            f"The run folder {self.folder} holds a run on other files ({changed}): {other_way}"
            "choose another with --run.",
        )
        if changed:
            say(f"warning: the run in {self.folder} goes on with other files ({changed}).")

    def wait(self) -> None:
        """Wait for all processes, however long: one of them may evaluate the model meanwhile."""
        if self._patient_group is not None:
            dist.barrier(self._patient_group)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: optim.Optimizer,
        *,
        encoder: nn.Module | None = None,
        facts: dict[str, Any] | None = None,
        epoch: int | None = None,
        **extra: Any,
    ) -> None:
        """Save the state after `step` steps, and the encoder.

        Args:
            step: The number of steps that the model has made.
            model: The model.
            optimizer: Its optimizer.
            encoder: What `save_encoder` saves, beside the checkpoint and in the run folder.
            facts: What `save_encoder` needs to know of it, but for the step.
            epoch: The epoch that ends here, if its checkpoint is to be kept: see `kept_epochs`.
            extra: Other modules, tensors, NamedTuples or dicts of the state.
        """
        name = f"step-{step:08d}"
        if epoch is not None:
            name += f"-epoch-{epoch}"
        folder = self.folder / "checkpoints" / name
        temporary = folder.with_name(f".{name}")
        if self.world.is_main and temporary.exists():  # where no lock shows whose it is
            shutil.rmtree(temporary)
        self.wait()
        self.check()
        state = _tensors({"model": model, "extra": extra})
        # In a tuple it is one object to DCP: an optimizer without moments yet may load it.
        state["optimizer"] = (tree_map_only(Tensor, Tensor.cpu, optimizer.state_dict()),)
        # Where processes differ (batch-norm statistics) the first one's count, as in DDP.
        planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        try:
            dcp.save(state, checkpoint_id=temporary, planner=planner)
        except (dcp.api.CheckpointException, OSError, RuntimeError) as error:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            self._refuse_disk(error)
            raise

        def finish() -> None:
            write(temporary / ROW, json.dumps(self._row_so_far(), indent=2).encode())
            if encoder is not None:
                save_encoder(temporary / ENCODER, encoder, **(facts or {}), step=step)
            write_checksums(temporary)
            for old in find_checkpoints(self.folder):
                if step_of(old) == step:  # the same step again
                    _remove(old)
            temporary.replace(folder)
            self._publish_encoder(folder)
            passing = [x for x in find_checkpoints(self.folder) if "-epoch-" not in x.name]
            for old in passing[:-2]:
                _remove(old)

        self._on_main(finish)
        self._checkpoints = [folder]

    def _publish_encoder(self, checkpoint: Path) -> None:
        """Put the encoder of a checkpoint, if it has one, into the run folder.

        The weights hold the facts, too, and come last: where a reader finds a side-car of another
        step, the facts in the weights count.
        """
        for file in (SIDE_CAR, ENCODER):
            if (checkpoint / file).exists():
                write(self.folder / file, (checkpoint / file).read_bytes())

    def resume(self, model: nn.Module, optimizer: optim.Optimizer, **extra: Any) -> int:
        """Load the newest checkpoint in place, extras too, and return its step; 0 without one."""
        newest, parts = self._on_main(self._choose)
        step = 0
        last_row = -1  # a run without a checkpoint begins anew, and so does its log
        if newest is not None:
            self._checkpoints = [newest]
            step = last_row = step_of(newest)
            state = _tensors({"model": model, "extra": extra})
            state["optimizer"] = ()
            try:
                dcp.load(state, storage_reader=PlainReader(newest), planner=PlainPlanner())
                optimizer.load_state_dict(state["optimizer"][0])
            except UNFIT as error:
                reason = _reason_of(error)
                raise UserError(
                    f"The checkpoint {newest} does not fit this recipe ({reason}): resume it with "
                    "the code that wrote it, or choose another run folder with --run."
                ) from error
            self._continue_row(parts)
        self._on_main(partial(self._begin, newest, last_row))
        return step

    def _choose(self) -> tuple[Path | None, list[dict[str, Any]]]:
        """The newest checkpoint that is whole, and what it tells of its row of the log.

        One that is not whole is named, and put aside as `broken-step-...`.
        """
        broken = []
        for checkpoint in reversed(self._checkpoints):
            damage = damage_of(checkpoint)
            if damage:
                broken.append((checkpoint, damage))
                continue

            for newer, reason in broken:
                aside = newer.with_name(f"broken-{newer.name}")
                shutil.rmtree(aside, ignore_errors=True)
                newer.rename(aside)
                say(
                    f"warning: the checkpoint {newer} is broken ({reason}): it is now called "
                    f"{aside.name}, and the run goes on from {checkpoint.name}."
                )
            if not (checkpoint / CHECKSUMS).exists():
                say(
                    f"warning: {checkpoint} has no {CHECKSUMS}, as those of older versions: its "
                    "content is not verified."
                )
            return checkpoint, _read_row(checkpoint)

        told = "; ".join(f"{checkpoint.name}: {damage}" for checkpoint, damage in broken)
        check(
            not broken,
            f"No checkpoint in {self.folder / 'checkpoints'} is whole ({told}): restore one, or "
            "remove them to begin anew.",
        )
        return None, []

    def _begin(self, newest: Path | None, last_row: int) -> None:
        """What the main process does before the first step."""
        write(self.folder / "config.json", self._content)
        if newest is not None:
            self._publish_encoder(newest)  # which a kill may have prevented
        self._open_log(last_row)

    def _open_log(self, last_row: int) -> None:
        """Open the log behind the row of this step; later rows are of steps that are done again."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # a kill may halve the last one
        kept = []
        strange = 0
        for line in whole:
            row = _parse_row(line)
            if row is None:
                strange += 1
            elif row["step"] <= last_row:
                kept.append(line)
        if strange:
            say(f"warning: {strange} lines of {path} are no rows of a log, and are left out.")
        write(path, b"".join(kept))
        self._metrics = self.enter_context(path.open("a", buffering=1))
        self._curves = SummaryWriter(str(self.folder / "tensorboard"), purge_step=last_row + 1)
        self.callback(setattr, threading, "excepthook", threading.excepthook)
        threading.excepthook = partial(self._on_thread_error, threading.excepthook)
        self.callback(self._curves.close)

    def _on_thread_error(self, report: Callable[[Any], Any], failed: Any) -> None:
        """Report an error of a thread, unless it is of the curves: the next row raises it again."""
        if not disk_failure(failed.exc_value, self.folder):
            report(failed)

    def log(self, step: int, **terms: float | Tensor) -> None:
        """Append one row, on the main process."""
        if not self.world.is_main:
            return
        row = {name: _number(value) for name, value in terms.items()}
        self._metrics.write(json.dumps({"step": step, **row}) + "\n")
        for name, value in row.items():
            self._curves.add_scalar(name, value, step)

    def rows(self, *names: str) -> list[dict[str, float]]:
        """The logged rows that hold a number of each of these names, in order."""
        lines = (self.folder / "metrics.jsonl").read_bytes().splitlines()
        found = [_parse_row(line) for line in lines]
        return [row for row in found if row is not None and row.keys() >= set(names)]

    def record(self, step: int, terms: dict[str, Tensor]) -> None:
        """Note the terms of a step, on the device; all processes note the same ones.

        A term need not come in every step. Call it once the gradients are there: from now on,
        signals are heeded.
        """
        self._listen()
        names = tuple(terms)
        values = torch.stack([term.detach().double() for term in terms.values()])
        if names not in self._totals:
            self._totals[names] = values.new_zeros(2, len(names))
            self._totals[names][1] = math.inf
            self._counts[names] = 0

        sums, first_bad = self._totals[names]
        was_finite = sums.isfinite()
        # A sum that is not finite stays as it is, and tells the first such value.
        sums.copy_(torch.where(was_finite, sums + values, sums))
        first_bad.masked_fill_(was_finite & ~sums.isfinite(), step)
        self._counts[names] += 1
        self._is_read = False

    def check(self) -> None:
        """Wait for the device, and read; on all processes alike a NonFiniteError for a bad value.

        The row of the log goes on: its means do not depend on when this is called.
        """
        if self._is_read:
            return
        self._is_read = True
        totals = [total.flatten() for total in self._totals.values()]
        stop = torch.full((1,), float(self._stop), dtype=torch.float64, device=self.world.device)
        own = torch.cat([*totals, stop])
        numbers = dk.all_gather(own[None], dist.group.WORLD).tolist()  # a row for each process

        self._all_stop = any(row[-1] for row in numbers)
        self._sums = {}
        bad = []
        start = 0
        for names in self._totals:
            middle = start + len(names)
            end = middle + len(names)
            self._sums[names] = [row[start:middle] for row in numbers]
            for row in numbers:
                bad += zip(row[middle:end], names, row[start:middle], strict=True)
            start = end
        self._refuse_bad(bad)

    def _refuse_bad(self, terms: list[tuple[float, str, float]]) -> None:
        """Raise the error of the first bad step, if there is one; a term comes with its own."""
        first = min((step for step, _, _ in terms), default=math.inf)
        if first == math.inf:
            return
        values = {}
        for step, name, value in terms:
            if step == first:
                values[name] = values.get(name, 0.0) + value  # NaN and inf survive a sum
        named = ", ".join(f"{name} = {value}" for name, value in values.items())
        raise NonFiniteError(f"Not finite at step {int(first)}: {named}; {self._kept()}.")

    def take_means(self) -> dict[str, float]:
        """The mean of each term over the processes, and over the steps since the last call.

        It checks the values as `check` does. A term that not all of these steps have recorded has
        the mean over those that have.
        """
        self.check()
        sums = {}
        counts = {}
        for names, rows in self._sums.items():
            for name, parts in zip(names, zip(*rows, strict=True), strict=True):
                sums[name] = sums.get(name, 0.0) + sum(parts)
                counts[name] = counts.get(name, 0) + self._counts[names] * self.world.size
        self._totals = {}
        self._counts = {}
        self._sums = {}
        return {name: total / counts[name] for name, total in sums.items()}

    def _row_so_far(self) -> list[dict[str, Any]]:
        """What a resumed run needs of the row that is not complete; it has been read."""
        parts = []
        for names, sums in self._sums.items():
            parts.append({"terms": names, "steps": self._counts[names], "sums": sums})
        return parts

    def _continue_row(self, parts: list[dict[str, Any]]) -> None:
        """Go on with the row of a checkpoint."""
        for part in parts:
            names = tuple(part["terms"])
            sums = torch.tensor(part["sums"], dtype=torch.float64, device=self.world.device)
            # With another number of processes, each of them gets the mean.
            same_size = len(sums) == self.world.size
            own = sums[self.world.rank] if same_size else sums.mean(0)
            self._totals[names] = torch.stack([own, torch.full_like(own, math.inf)])
            self._counts[names] = part["steps"]
            self._is_read = False

    def _listen(self) -> None:
        """From the first step on, heed signals; before it there is nothing to save."""
        if self._listens:
            return
        self._listens = True
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            before = signal.signal(number, self._on_signal)
            self.callback(signal.signal, number, before)

    def _on_signal(self, number: int, _: object) -> None:
        self._stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C from now on is at once
        if number == signal.SIGTERM:
            # torchrun passes on the signal that a scheduler has sent to every process already.
            is_passed_on = "TORCHELASTIC_RUN_ID" in os.environ
            self._terminated = time.monotonic()
            next_handler = self._on_next_sigterm if is_passed_on else signal.SIG_DFL
            signal.signal(signal.SIGTERM, next_handler)

    def _on_next_sigterm(self, number: int, _: object) -> None:
        if time.monotonic() - self._terminated > PASSED_ON_WITHIN:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def stop_requested(self) -> bool:
        """Whether SIGTERM, SIGINT or SIGUSR1 asks to stop; the answer is the same everywhere.

        One process answers at once. Several have told each other when they last read the values.
        """
        self._listen()
        is_alone = self.world.size == 1
        return self._all_stop or (is_alone and self._stop)

    def note_unreadable(self, names: Iterable[str]) -> None:
        """Name each unreadable file once in unreadable.txt, which is opened for new ones alone."""
        if not names:
            return
        new = {printable(name).encode() for name in names} - self._unreadable
        if new:
            new -= self._read_unreadable()
            with (self.folder / "unreadable.txt").open("ab") as file:
                file.writelines(name + b"\n" for name in sorted(new))
            self._unreadable |= new

    @property
    def unreadable(self) -> int:
        """How many files are named in unreadable.txt, by all processes; it is read for this."""
        return len(self._read_unreadable())

    def _read_unreadable(self) -> set[bytes]:
        """Keep in mind what unreadable.txt names."""
        path = self.folder / "unreadable.txt"
        if path.exists():
            self._unreadable |= set(path.read_bytes().splitlines())
        return self._unreadable

    def picture_path(self, step: int, kind: str = "step") -> Path:
        """Where a picture of a step goes: pictures/step-000040.png, or pictures/KIND-000040.png."""
        path = self.folder / "pictures" / f"{kind}-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        return path


def print_probes(run: Run, more: str = "") -> None:
    """A line for each checkpoint that the encoder was probed at, if any; `more` ends the line."""
    line = "step {step:4}: probe mIoU {probe_miou:.3f}, most frequent class {prior_miou:.3f}" + more
    names = [name for _, name, _, _ in string.Formatter().parse(line) if name]
    rows = run.rows(*names)
    if rows:
        tell("At step 0 the network is random.")
    for row in rows:
        tell(line.format(**row))


def _reason_of(error: BaseException) -> str:
    """What an error says in one line; of a checkpoint, the first error of a process."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error)


def _number(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def save_encoder(
    path: Path,
    encoder: nn.Module,
    *,
    architecture: str,
    mean: Sequence[float],
    std: Sequence[float],
    method: str,
    **more: Any,
) -> None:
    """Save the weights as safetensors (plain keys, float32) with a JSON side-car.

    The weights hold the content of the side-car too, as metadata.
    """
    plain = copy.deepcopy(encoder).to(memory_format=torch.contiguous_format).cpu().float()
    facts = {
        "architecture": architecture,
        "mean": mean,
        "std": std,
        "color_order": "RGB",
        "method": method,
        "densekit": dk.__version__,
        **more,
    }
    metadata = {"format": "pt", "facts": json.dumps(facts)}
    write(path.with_suffix(".json"), (json.dumps(facts, indent=2) + "\n").encode())
    write(path, safetensors.torch.save(_tensors(plain), metadata))
