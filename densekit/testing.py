"""Checks that your tests call on your code: the same on any number of processes, right geometry.

`from densekit.testing import assert_world_size_invariant`. The checks run on CPUs, and need no test
framework: what is wrong is an AssertionError that says what to look for.
"""

import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map
from densekit.numerics import check
from densekit.typing import Float, Size, typed
from densekit.views import View, coordinate_map, full_view, image_to_view

__all__ = [
    "ViewGeometryCase",
    "assert_world_size_invariant",
    "check_photometry",
    "check_view_geometry",
    "view_geometry_cases",
]

Counts = tuple[int, ...]
"""The number of rows on each process."""


# ---- any number of processes ---------------------------------------------------------------------
class _Task(NamedTuple):
    """What every process of a group does."""

    function: Callable[[Any, Any], Any]
    batch: Any
    parameters: tuple[Tensor, ...]
    dim: int
    counts: Counts
    order: Tensor  # the rows of the first process, then those of the second, and so on
    shapes: list[torch.Size] | None  # of the results on one process; None: this is that one
    timeout: float


class _Found(NamedTuple):
    """What one process has found."""

    results: list[Tensor]
    of_batch: list[Tensor]  # gradients
    of_parameters: list[Tensor]


@typed
def assert_world_size_invariant(
    fn: Callable[..., Any],
    batch: Any,
    world_sizes: Sequence[int | Sequence[int]] = (1, 2, 4),
    *,
    parameters: Sequence[Tensor] = (),
    dim: int = 0,
    interleaved: bool = False,
    rtol: float = 1e-8,
    atol: float = 1e-8,
    timeout: float = 60.0,
    start_method: str | None = None,
) -> None:
    """Check that a function of a batch has the same results and gradients on several processes.

    Use it on a loss with negatives or statistics of all processes, and on a whole training step. It
    finds means of means over unequal numbers of valid entries, gradients that are off by the number
    of processes, and rows that a gather brings back in another order.

    The batch is split over the processes in order, and `fn(part, group)` is called on each of them.
    A result must either be the same on every process, and equal to that of one process with the
    whole batch, such as a loss that counts the entries of all processes; or it must be the rows of
    the part. Of a loss that is a mean over the rows of the part alone, return
    `all_mean(loss, group)`.

    The gradients are those of a fixed weighted sum of the results, averaged over the processes as
    DistributedDataParallel averages them: for the parameters, and for all tensors of the batch that
    require gradients. A function may call `backward` itself, and return the gradients as results.

    Make all draws beforehand, or from the rows, so that they do not depend on the process; put
    batch normalization into evaluation mode, unless it is synchronized; use float64. The groups
    are of gloo, on this machine's CPU. Where the system can fork, the function may be any closure;
    else it must be one that `pickle` takes.

    Args:
        fn: `fn(part, group)` returns tensors and numbers, in any nesting.
        batch: Tensors in any nesting; all that have an axis `dim` are split there. The others, and
            what is no tensor, are given to every process.
        world_sizes: Numbers of processes. In place of a number, the number of rows on each process,
            such as `(5, 0, 1)`.
        parameters: Tensors that the function uses, such as `tuple(model.parameters())`.
        dim: The axis of the rows.
        interleaved: Deal the rows in turn, one to each process, as torch's DistributedSampler does,
            instead of in whole parts.
        rtol: Allowed difference, relative to the value.
        atol: Allowed difference.
        timeout: Seconds after which processes that wait for each other are ended.
        start_method: "fork" or "spawn"; by default "fork", where there is one.

    Raises:
        AssertionError: A result or a gradient differs, or the processes do not end.
        ValueError: The tensors of the batch have different numbers of rows, the rows on the
            processes are not all rows of the batch, there is no process, or this process is in a
            group itself.
        torch.multiprocessing.ProcessRaisedException: The function fails. The message has the
            traceback of the process that failed first.

    Examples:
        >>> from densekit import all_mean, masked_mean
        >>> batch = torch.arange(6.0).double(), torch.tensor([True, True, True, False, True, True])
        >>> assert_world_size_invariant(lambda x, group: masked_mean(*x, group=group), batch, (2,))
        >>> wrong = lambda x, group: all_mean(masked_mean(*x), group)
        >>> try: assert_world_size_invariant(wrong, batch, (2,))
        ... except AssertionError as error: print(str(error)[:36])
        On 2 processes the result is another
    """
    if start_method is None:
        methods = torch.multiprocessing.get_all_start_methods()
        start_method = "fork" if "fork" in methods else "spawn"
    if start_method == "fork" and dist.is_initialized():
        raise ValueError(
            "densekit.testing.assert_world_size_invariant: this process is in a group, which its "
            "forks cannot leave; call torch.distributed.destroy_process_group() first."
        )
    rows = _number_of_rows(batch, dim)
    all_counts = [_rows_on_each(rows, size) for size in world_sizes]
    whole = torch.arange(rows)
    task = _Task(fn, batch, tuple(parameters), dim, (rows,), whole, None, timeout)
    (alone,) = _on_processes(task, start_method)
    shapes = [x.shape for x in alone.results]
    names = _names_of_leaves(batch)
    for counts in all_counts:
        order = _dealt_in_turn(counts) if interleaved else whole
        several = task._replace(counts=counts, order=order, shapes=shapes)
        found = _on_processes(several, start_method)
        _compare(alone, found, several, names, {"rtol": rtol, "atol": atol})


def _number_of_rows(batch: Any, dim: int) -> int:
    """The length of the axis `dim` of all tensors that have one."""
    lengths = {x.shape[dim] for x in tree_leaves(batch) if _has_rows(x, dim)}
    if len(lengths) != 1:
        raise ValueError(
            f"densekit.testing.assert_world_size_invariant: along the axis {dim} the tensors of "
            f"the batch have {sorted(lengths)} rows; give tensors of one number of rows."
        )
    return lengths.pop()


def _has_rows(x: Any, dim: int) -> bool:
    return isinstance(x, Tensor) and -x.ndim <= dim < x.ndim


def _rows_on_each(rows: int, size: int | Sequence[int]) -> Counts:
    """The number of rows on each process; those of a number of processes differ by one at most."""
    where = "testing.assert_world_size_invariant"
    if isinstance(size, int):
        check(where, "a number of processes", size, size >= 1, "1 or more")
        return tuple(len(part) for part in torch.arange(rows).tensor_split(size))
    counts = tuple(size)
    fits = len(counts) >= 1 and min(counts) >= 0 and sum(counts) == rows
    wanted = f"numbers of 0 or more, whose sum is {rows}"
    check(where, "the number of rows on each process", counts, fits, wanted)
    return counts


def _dealt_in_turn(counts: Counts) -> Tensor:
    """The rows of each process after each other, where they are dealt in turn."""
    turns = torch.cat([torch.arange(count) for count in counts])
    return turns.argsort(stable=True).argsort()


def _names_of_leaves(batch: Any) -> list[str]:
    """What an error calls the tensors of the batch that require gradients."""
    leaves, _ = tree_flatten_with_path(batch)
    tensors = [(path, x) for path, x in leaves if isinstance(x, Tensor) and x.requires_grad]
    return ["batch" + "".join(map(str, path)) for path, _ in tensors]


def _on_processes(task: _Task, start_method: str) -> list[_Found]:
    """What each process finds, in the order of ranks; the first error of one ends all."""
    size = len(task.counts)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        # Python warns of forks beside threads: these processes touch nothing that a thread holds.
        warnings.filterwarnings("ignore", "This process.*fork", DeprecationWarning)
        processes: Any = torch.multiprocessing.start_processes(
            _work, (task, name), nprocs=size, join=False, start_method=start_method
        )
        end = time.monotonic() + 2 * task.timeout
        while not processes.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() >= end:
                for process in processes.processes:
                    process.kill()
                raise AssertionError(f"On {size} processes the function does not end.")
        files = [Path(name, f"found-{rank}") for rank in range(size)]
        return [_Found(*torch.load(file, weights_only=True)) for file in files]


def _work(rank: int, task: _Task, folder: str) -> None:
    """Call the function on the part of one process."""
    torch.set_num_threads(1)
    size = len(task.counts)
    dist.init_process_group(
        "gloo",
        init_method=Path(folder, "store").as_uri(),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=task.timeout),
    )
    dist.barrier()  # who leaves before all are connected breaks the connections of the others
    try:
        part = tree_map(lambda x: _part(x, task, rank), task.batch)
        returned = tree_leaves(task.function(part, dist.group.WORLD))
        results = [torch.as_tensor(x) for x in returned if isinstance(x, Tensor | float | int)]

        shapes: list[Any] = [None] * size
        dist.all_gather_object(shapes, [x.shape for x in results])
        whole = shapes[0] if task.shapes is None else task.shapes
        leaves = [x for x in tree_leaves(part) if isinstance(x, Tensor) and x.requires_grad]
        inputs = [*leaves, *(x for x in task.parameters if x.requires_grad)]
        gradients = []
        if _misfit(shapes, whole) is None:  # else there is an error, which comes later
            gradients = _gradients(results, shapes, whole, inputs, task, rank)
        count = len(leaves)
        found = [x.detach() for x in results], gradients[:count], gradients[count:]
        torch.save(found, Path(folder, f"found-{rank}"))
        dist.barrier()
    except Exception:
        # A process that ends closes its connections, at which those that wait for it fail, too.
        # So it leaves a note before, and whoever finds a note is not the cause and ends quietly.
        try:
            Path(folder, "failed").touch(exist_ok=False)
        except FileExistsError:
            return
        raise
    finally:
        dist.destroy_process_group()


def _part(x: Any, task: _Task, rank: int) -> Any:
    """The rows of one process, as a leaf of its own graph."""
    if not isinstance(x, Tensor):
        return x
    if _has_rows(x, task.dim):
        dealt = x.detach().index_select(task.dim, task.order.to(x.device))
        x_part = dealt.split(list(task.counts), task.dim)[rank]
    else:
        x_part = x.detach()
    return x_part.clone().requires_grad_(x.requires_grad)


def _misfit(shapes: list[list[torch.Size]], whole: list[torch.Size]) -> str | None:
    """What is wrong with the shapes of the results on all processes; None: nothing."""
    counts = sorted({len(own) for own in (*shapes, whole)})
    if len(counts) > 1:
        return f"the function returns {counts} results"
    by_result = list(zip(*shapes, strict=True))
    for number, (of_result, expected) in enumerate(zip(by_result, whole, strict=True)):
        same = all(shape == expected for shape in of_result)
        if not same and _row_axis(of_result, expected) is None:
            found = ", ".join(str(tuple(shape)) for shape in of_result)
            return (
                f"the result {number} has the shapes {found}, which are neither {tuple(expected)}, "
                "as on one process, nor parts of it"
            )
    return None


def _row_axis(shapes: Sequence[torch.Size], whole: torch.Size) -> int | None:
    """The axis along which the results of all processes make up the whole; None if there is none.

    A result that is the same on every process has none.
    """
    if all(shape == whole for shape in shapes):
        return None
    for axis, length in enumerate(whole):
        others = [[n for i, n in enumerate(shape) if i != axis] for shape in (*shapes, whole)]
        has_axis = all(len(shape) == len(whole) for shape in shapes)
        same = all(other == others[-1] for other in others)
        if has_axis and same and sum(shape[axis] for shape in shapes) == length:
            return axis
    return None


def _gradients(
    results: list[Tensor],
    shapes: list[list[torch.Size]],
    whole: list[torch.Size],
    inputs: list[Tensor],
    task: _Task,
    rank: int,
) -> list[Tensor]:
    """The gradients of this process, of a weighted sum of all results.

    Their average over the processes is the gradient of one process. So what is a part of the rows
    counts as often as there are processes.
    """
    total = torch.zeros((), dtype=torch.float64)
    for number, result in enumerate(results):
        if not result.requires_grad:
            continue
        of_result = [own[number] for own in shapes]
        places = torch.arange(whole[number].numel(), dtype=torch.float64).view(whole[number])
        weight = torch.cos(places + number)
        axis = _row_axis(of_result, whole[number])
        if axis is not None:
            if len(task.order) == weight.shape[axis]:
                weight = weight.index_select(axis, task.order)
            parts = weight.split([shape[axis] for shape in of_result], axis)
            weight = parts[rank] * len(shapes)
        total = total + (result * weight.to(result.device, result.dtype)).sum()
    if not inputs or not total.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return list(torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True))


def _compare(
    alone: _Found,
    found: list[_Found],
    task: _Task,
    names: list[str],
    close: dict[str, float],
) -> None:
    """Raise an error where several processes have found another thing than one alone."""
    counts = task.counts
    size = len(counts)
    place = task.order.argsort()  # of each row
    where = f"On {size} processes"
    if len(set(counts)) > 1:
        where += f" with {', '.join(map(str, counts))} rows"
    whole = [x.shape for x in alone.results]
    misfit = _misfit([[x.shape for x in own.results] for own in found], whole)
    if misfit is not None:
        raise AssertionError(f"{where} {misfit}.")

    for number, expected in enumerate(alone.results):
        parts = [own.results[number] for own in found]
        axis = _row_axis([x.shape for x in parts], expected.shape)
        name = "the result" if len(whole) == 1 else f"the result {number}"
        if axis is not None:
            got = torch.cat(parts, axis)
            if len(place) == got.shape[axis]:
                got = got.index_select(axis, place)
            _assert_close(got, expected, f"{where} {name} is another", close)
            continue
        for rank, part in enumerate(parts):
            _assert_close(part, expected, f"{where} {name} is another on process {rank}", close)

    for number, expected in enumerate(alone.of_batch):
        parts = [own.of_batch[number] / size for own in found]
        if _has_rows(expected, task.dim):
            got = torch.cat(parts, task.dim).index_select(task.dim, place)
        else:
            got = torch.stack(parts).sum(0)
        message = f"{where} the gradient of {names[number]} is another"
        _assert_close(got, expected, message, close)
    for number, expected in enumerate(alone.of_parameters):
        got = torch.stack([own.of_parameters[number] / size for own in found]).sum(0)
        message = f"{where} the mean gradient of the parameter {number} is another"
        _assert_close(got, expected, message, close)


def _assert_close(got: Tensor, expected: Tensor, message: str, close: dict[str, float]) -> None:
    """Raise an error with this message, unless the tensors are close."""
    if got.dtype != expected.dtype:
        raise AssertionError(f"{message}: its dtype is {got.dtype}, not {expected.dtype}.")
    if torch.allclose(got, expected, **close, equal_nan=True):
        return
    differs = ~torch.isclose(got, expected, **close, equal_nan=True)
    first = differs.nonzero()[0].tolist()
    values = f"{got[tuple(first)].item():.9g}, not {expected[tuple(first)].item():.9g}"
    ratio = (got.double() * expected).sum() / expected.double().square().sum()
    hint = ""
    if torch.allclose(got.double(), expected * ratio, rtol=1e-6) and ratio.isfinite():
        hint = f"; all values are {ratio.item():.6g} times those of one process"
    raise AssertionError(
        f"{message}: {int(differs.sum())} of {differs.numel()} values, at {first} it is {values}"
        f"{hint}."
    )


# ---- geometry ------------------------------------------------------------------------------------
class ViewGeometryCase(NamedTuple):
    """A crop, and points of its image in both frames, which are worked out by hand.

    Attributes:
        name: What is special about it.
        size: Size `(h, w)` of the image in pixels.
        view: One view, without leading axes, in float64.
        in_image: Points `(n, 2)` in pixels.
        in_view: The same points in the view, `(n, 2)`, where its corners are (0, 0) and (1, 1).
    """

    name: str
    size: Size
    view: View
    in_image: Float[Tensor, "n 2"]
    in_view: Float[Tensor, "n 2"]


def view_geometry_cases() -> list[ViewGeometryCase]:
    """Read the golden vectors of view geometry: views, and points in the image and in the view.

    They are in `densekit/view_geometry.json`, which any language reads. Pixels count by their
    edges: the center of the first pixel is at (0.5, 0.5). There are crops, flips, resized and
    non-square views, views of one pixel, and pairs that are disjoint, touch, or are nested.

    Returns:
        The cases, in float64.

    Examples:
        >>> case = view_geometry_cases()[0]
        >>> case.name, case.size, case.in_image[0].tolist(), case.in_view[0].tolist()
        ('whole image', (4, 6), [0.0, 0.0], [0.0, 0.0])
    """
    rows = json.loads(Path(__file__).with_name("view_geometry.json").read_text(encoding="utf-8"))
    cases = []
    for row in rows:
        view = View(
            torch.tensor(row["box"], dtype=torch.float64),
            torch.tensor(row["flip"]),
            torch.tensor(row["vertical_flip"]),
        )
        in_image = torch.tensor(row["in_image"], dtype=torch.float64).view(-1, 2)
        in_view = torch.tensor(row["in_view"], dtype=torch.float64).view(-1, 2)
        size = tuple(row["size"])
        cases.append(ViewGeometryCase(row["name"], size, view, in_image, in_view))
    return cases


def _half_a_pixel(case: ViewGeometryCase, step: float) -> Tensor:
    return image_to_view(case.view, case.in_image + step)


def _without_flip(case: ViewGeometryCase) -> Tensor:
    return image_to_view(View(case.view.box, torch.tensor(False)), case.in_image)


def _mirrored_by_index(case: ViewGeometryCase) -> Tensor:
    """What a flip of pixel indices, w - 1 - x, does to positions."""
    one_pixel = 1 / (case.view.box[2:] - case.view.box[:2])
    flips = torch.stack([case.view.flip, case.view.vertical_flip])
    return case.in_view - torch.where(flips, one_pixel, 0.0)


_FAULTS: dict[str, Callable[[ViewGeometryCase], Tensor]] = {
    "x and y are swapped": lambda case: case.in_view.flip(-1),
    "the flip is ignored": _without_flip,
    "the flip is of pixel indices: it must mirror the edges": _mirrored_by_index,
    "it is half a pixel too small: pixels count by their edges, not by their centers": (
        lambda case: _half_a_pixel(case, -0.5)
    ),
    "it is half a pixel too large: pixels count by their edges, not by their centers": (
        lambda case: _half_a_pixel(case, 0.5)
    ),
    "it is in pixels of the crop, not in units of its sides": (
        lambda case: case.in_view * (case.view.box[2:] - case.view.box[:2])
    ),
}


@typed
def check_view_geometry(
    fn: Callable[..., Any], inverse: Callable[..., Any] | None = None, *, atol: float = 1e-6
) -> None:
    """Check your own map from the image to a view, on cases that are worked out by hand.

    Use it on what carries points or boxes through an augmentation pipeline: it finds positions that
    are half a pixel off, swapped axes, and flips that are ignored or mirror pixel indices.

    Args:
        fn: `fn(view, points)` maps points of the image, in pixels, to the view, whose corners are
            (0, 0) and (1, 1). The view has no leading axes, and the points have the shape (n, 2).
        inverse: `inverse(view, points)` maps them back, if there is such a function.
        atol: Allowed difference in units of the view's sides, and of the image's.

    Raises:
        AssertionError: A point is elsewhere. The message names the case, and the fault if it is one
            of the usual ones.

    Examples:
        >>> from densekit import View, image_to_view, view_to_image
        >>> check_view_geometry(image_to_view, view_to_image)
        >>> centers = lambda view, points: image_to_view(view, points + 0.5)
        >>> try: check_view_geometry(centers)
        ... except AssertionError as error: print(str(error).rsplit(": ")[-1])
        pixels count by their edges, not by their centers.
    """
    cases = view_geometry_cases()
    outcomes = [(case, torch.as_tensor(fn(case.view, case.in_image)).double()) for case in cases]
    wrong = [(case, got) for case, got in outcomes if not _is_close(got, case.in_view, atol)]
    if wrong:
        case, got = wrong[0]
        reason = _diagnosis(outcomes, atol)
        raise AssertionError(
            f"In the case {case.name!r} the points {case.in_image.tolist()} of the image are at "
            f"{got.tolist()} in the view, not at {case.in_view.tolist()}{reason}."
        )
    if inverse is None:
        return
    for case in cases:
        got = torch.as_tensor(inverse(case.view, case.in_view)).double()
        if not _is_close(got, case.in_image, atol * max(case.size)):
            raise AssertionError(
                f"In the case {case.name!r} the points {case.in_view.tolist()} of the view are at "
                f"{got.tolist()} in the image, not at {case.in_image.tolist()}."
            )


def _is_close(got: Tensor, expected: Tensor, atol: float) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=0, atol=atol)


def _diagnosis(outcomes: list[tuple[ViewGeometryCase, Tensor]], atol: float) -> str:
    """The usual fault that explains all outcomes, as the end of a sentence."""
    for sentence, fault in _FAULTS.items():
        if all(_is_close(got, fault(case), atol) for case, got in outcomes):
            return f": {sentence}"
    return ""


# ---- photometry ----------------------------------------------------------------------------------
@typed
def check_photometry(
    fn: Callable[..., Any],
    *,
    size: Size = (48, 64),
    draws: int = 8,
    tolerance: float = 0.2,
) -> None:
    """Check that the crops of a pipeline show what their views say.

    The pipeline is given an image whose colors are the coordinates of its pixels, so that each
    pixel of a crop tells which point of the image it shows. The geometry of the view says which it
    should show. A view that is half a pixel off, a forgotten flip and swapped axes are found, also
    where the two views of a pair share the fault.

    Switch off what changes colors. Resizing may be bilinear or bicubic, with or without
    antialiasing, and the colors may be bytes.

    Args:
        fn: `fn(image)` takes an image (3, h, w) of float32 in [0, 1] and returns pairs of a crop,
            (3, h, w) in [0, 1] or bytes, and its `View`, without leading axes. It may draw from
            torch's global generator, which is seeded for each draw.
        size: Size `(h, w)` of the image.
        draws: How often the pipeline is called.
        tolerance: Allowed mean offset, in pixels of the image and of the crop.

    Raises:
        AssertionError: A crop shows other points than its view says.
        ValueError: The tolerance is so large that half a pixel would pass, or there is no draw.

    Examples:
        >>> from densekit import crop_views, sample_views
        >>> def pipeline(image):
        ...     view = sample_views(image.shape[-2:], scale=(0.3, 0.8))
        ...     return [(crop_views(image, view, 32), view)]
        >>> check_photometry(pipeline)
    """
    where = "testing.check_photometry"
    fits = 0 < tolerance < 0.5
    check(where, "tolerance", tolerance, fits, "a number above 0, below half a pixel")
    check(where, "draws", draws, draws >= 1, "1 or more")
    height, width = size
    extent = torch.tensor([width, height], dtype=torch.float64)
    places = coordinate_map(full_view(size), size)  # (h, w, 2), in pixels
    shares = places / extent.float()
    image = torch.cat([shares, torch.zeros_like(shares[..., :1])], -1).movedim(-1, 0)
    for draw in range(draws):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw)
            pairs = fn(image.clone())
        for number, (crop, view) in enumerate(pairs):
            _check_crop(crop, view, extent, tolerance, f"The crop {number} of the draw {draw}")


def _check_crop(crop: Tensor, view: View, extent: Tensor, tolerance: float, name: str) -> None:
    """Compare the coordinates in the colors of a crop with those of its view."""
    shown = crop[:2].double().movedim(0, -1)
    if not crop.is_floating_point():
        shown = shown / 255
    shown = shown * extent
    exact = View(view.box.double(), view.flip, view.vertical_flip)
    said = coordinate_map(exact, (crop.shape[-2], crop.shape[-1]))

    # Near the border a filter that is wider than a pixel reaches over the edge.
    sides = exact.box[2:] - exact.box[:2]
    in_crop = torch.tensor([crop.shape[-1], crop.shape[-2]]) / sides  # pixels of the crop in one
    ring = [
        min(1 + math.ceil(2 * scale), side // 3)
        for scale, side in zip(in_crop.tolist(), (crop.shape[-1], crop.shape[-2]), strict=True)
    ]
    inner = slice(ring[1], crop.shape[-2] - ring[1]), slice(ring[0], crop.shape[-1] - ring[0])
    offsets = (shown - said)[inner].flatten(0, 1)
    offset = offsets.mean(0)
    largest = offsets.abs().mean(0)
    allowed = tolerance / in_crop.clamp(min=1)  # the smaller one of both pixels
    if (offset.abs() > allowed).any() or (largest > 0.5 + tolerance).any():
        x, y = offset.tolist()
        raise AssertionError(
            f"{name} shows points that are {x:.2f} pixels to the right and {y:.2f} pixels below "
            f"those that its view says, on average, and {largest.max().item():.2f} pixels away."
        )
