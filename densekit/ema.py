"""Momentum update of a teacher: an exponential moving average of a student's weights."""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypeGuard

import torch
from torch import nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten
from densekit.typing import Tensor, typed

if TYPE_CHECKING:  # the import takes more than a second; who has a DTensor has taken it
    from torch.distributed.tensor import DTensor

__all__ = ["ema_update"]

Tree = nn.Module | dict | list | tuple
_PLAIN = (Tensor, nn.Parameter)


@typed
@torch.no_grad()
def ema_update(
    teacher: Tree,
    student: Tree,
    *,
    momentum: float,
    buffers: Literal["copy", "average", "keep"] = "copy",
    inplace: bool = True,
    generator: torch.Generator | None = None,
) -> Tree:
    r"""Move a teacher's tensors towards a student's, by an exponential moving average.

    $$
    \theta_t \leftarrow m \theta_t + (1 - m) \theta_s
    $$

    with the tensors $\theta_t$ of the teacher and $\theta_s$ of the student.

    Teacher and student are two modules whose parameters have the same names, such as a network and
    its deep copy; or two state dicts; or two other trees of dicts, lists and (named) tuples with
    the same structure. Sharded tensors (DTensor, `fully_shard`) stay sharded: each process updates
    its own part.

    Each number in memory moves once, even if several names or views refer to it. At its ends the
    mean is exact: a momentum of 0 copies the student and a momentum of 1 keeps the teacher, also
    where the other one is infinite or NaN. Between the ends an infinite or NaN value of either one
    reaches the mean as the formula says. Either all tensors are updated, or none.

    Args:
        teacher: The teacher. An update by 1 - m rounds to nothing in half precision, so keep the
            teacher in float32, or in bfloat16 with a generator.
        student: The student, in any floating dtype, on any device; it is not modified.
        momentum: Weight m of the old value.
        buffers: "copy" copies a module's buffers, such as batch-norm statistics, from the student;
            "average" averages the floating buffers and copies the others; "keep" keeps the
            teacher's. In a tree, a floating tensor is always averaged; integers are copied or kept.
        inplace: Modify the teacher's own tensors; otherwise they stay as they are, and new ones are
            returned.
        generator: Source of the stochastic rounding of a bfloat16 teacher, on its device. The mean
            is rounded up or down at random, so that its expectation is exact. It needs the same
            state on all processes.

    Returns:
        The teacher itself; or, if not in place, a new tree. For a module this is a dict of its
        parameters and buffers, as `torch.func.functional_call` accepts it.

    Raises:
        TypeError: Teacher and student do not correspond; or the teacher is in half precision
            (bfloat16 is allowed with a generator); or a tensor cannot be updated, since it is
            expanded, sparse, without values (on the device "meta") or made in inference mode.
            Nothing has been modified then.
        ValueError: The momentum is outside [0, 1].

    Examples:
        >>> teacher, student = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> _ = ema_update(teacher, student, momentum=0.0)
        >>> bool(teacher.weight == student.weight)
        True
        >>> ema_update({"w": torch.zeros(1)}, {"w": torch.ones(1)}, momentum=0.75, inplace=False)
        {'w': tensor([0.2500])}

    References:
        MoCo, Eq 2; DINO, Sec 3.1; CrOC, Sec 3.2; DUPR, Sec 3.2 (momentum backbone and heads).
    """
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"densekit.ema.ema_update: momentum is {momentum}; give a weight of the old value "
            "from 0 to 1."
        )

    olds, buffer_names = _tensors(teacher)
    news, _ = _tensors(student)
    _check_alike(olds, news)

    pairs = []
    for name, old in olds.items():
        new = news[name]
        floating = old.is_floating_point() or old.is_complex()
        averaged = floating and (buffers == "average" or name not in buffer_names)
        rule = "keep" if buffers == "keep" else "copy"
        if averaged or buffers != "keep":
            _check_pair(name, old, new, inplace=inplace)
        if averaged:
            _check_precision(name, old, momentum, generator)
            rule = _rule_of_mean(old, momentum)
        own_old, own_new = _local_parts(old, new, rule)
        pairs.append(_Pair(name, own_old, own_new, rule))

    if inplace:
        _write(pairs, momentum, generator)
        return teacher
    values = _new_values(pairs, momentum, generator)
    results = _sharded_as(olds, values)
    return results if isinstance(teacher, nn.Module) else _rebuild(teacher, results)


class _Pair(NamedTuple):
    """A tensor of the teacher, its student, and what becomes of it."""

    name: str
    old: Tensor
    new: Tensor
    rule: Literal["average", "round", "copy", "keep"]


def _rule_of_mean(old: Tensor, momentum: float) -> Literal["average", "round", "copy", "keep"]:
    """Choose how a mean is computed; at its ends only one of the two tensors counts.

    Its formula would be NaN there where the other one is infinite: zero times infinity.
    """
    if momentum == 1:
        return "keep"
    if old.dtype == torch.bfloat16:
        return "round"
    return "copy" if 1 - momentum == 1 else "average"


def _tensors(tree: Any) -> tuple[dict[str, Tensor], set[str]]:
    """Return a tree's tensors by name, and the names of a module's buffers, in one quick pass."""
    if not isinstance(tree, nn.Module):
        return _tree_tensors(tree), set()

    tensors = {}
    buffers = {}
    modules = [("", tree)]
    for prefix, module in modules:  # the list grows; named_modules() takes as long as the update
        for name, x in module._parameters.items():
            tensors[prefix + name] = x
        for name, x in module._buffers.items():
            buffers[prefix + name] = x
        modules += [(f"{prefix}{name}.", x) for name, x in module._modules.items() if x is not None]

    tensors |= buffers
    return {name: x for name, x in tensors.items() if x is not None}, set(buffers)


def _tree_tensors(tree: Any) -> dict[str, Tensor]:
    leaves, _ = tree_flatten_with_path(tree)
    if any(isinstance(leaf, nn.Module) for _, leaf in leaves):
        raise TypeError(
            "densekit.ema.ema_update: a tree contains a module; update each module "
            "by itself, or give a tree of state dicts."
        )

    return {keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def _rebuild(tree: Any, tensors: dict[str, Tensor]) -> Any:
    leaves, structure = tree_flatten_with_path(tree)
    return tree_unflatten([tensors.get(keystr(path), leaf) for path, leaf in leaves], structure)


# ---- checks: whatever may fail is looked at before anything is modified --------------------------


def _check_alike(olds: dict[str, Tensor], news: dict[str, Tensor]) -> None:
    for name, x in (*olds.items(), *news.items()):
        if type(x) in (UninitializedBuffer, UninitializedParameter):
            _refuse(name, "has no shape yet; call the module once before")
    if olds.keys() == news.keys() and all(x.shape == news[name].shape for name, x in olds.items()):
        return
    old_shapes = {(name, tuple(x.shape)) for name, x in olds.items()}
    new_shapes = {(name, tuple(x.shape)) for name, x in news.items()}
    name, shape = min(old_shapes ^ new_shapes)
    raise TypeError(
        f"densekit.ema.ema_update: teacher and student differ in {name} of shape {shape}; give "
        "a teacher that is a copy of the student."
    )


def _check_pair(name: str, old: Tensor, new: Tensor, *, inplace: bool) -> None:
    for x in (old, new):
        if x.layout != torch.strided:
            _refuse(name, f"has the layout {x.layout}; give dense tensors")
    if old.is_meta != new.is_meta:
        which = "teacher" if old.is_meta else "student"
        _refuse(name, f"of the {which} is on the device 'meta', where it has no values")
    if new.is_complex() and not old.is_complex():
        _refuse(name, "is complex in the student and real in the teacher")
    old_mesh = old.device_mesh if _is_sharded(old) else None
    new_mesh = new.device_mesh if _is_sharded(new) else None
    if old_mesh != new_mesh:
        _refuse(name, "is not sharded over the same devices in teacher and student")

    if not inplace or torch.compiler.is_compiling():
        return
    if old.is_inference() and not torch.is_inference_mode_enabled():
        _refuse(name, "of the teacher was made in inference mode and cannot change; clone it")
    if _repeats_memory(old):
        _refuse(name, "of the teacher is expanded: several elements share one number; clone it")


def _check_precision(
    name: str, old: Tensor, momentum: float, generator: torch.Generator | None
) -> None:
    if torch.finfo(old.dtype).bits >= 32:
        return
    if old.dtype != torch.bfloat16 or generator is None:
        raise TypeError(
            f"densekit.ema.ema_update: the teacher is in {old.dtype}, where an update of "
            f"{1 - momentum:g} rounds to nothing; keep it in float32 and cast a copy, or give "
            "a bfloat16 teacher a generator."
        )

    if generator.device.type != old.device.type and not old.is_meta:
        _refuse(name, f"is on the device {old.device} and the generator on {generator.device}")


def _refuse(name: str, problem: str) -> NoReturn:
    raise TypeError(f"densekit.ema.ema_update: {name} {problem}.")


def _repeats_memory(x: Tensor) -> bool:
    """Return whether elements of a tensor share memory, as those of an expanded tensor do."""
    if x.is_contiguous():
        return False
    axes = sorted((step, size) for size, step in zip(x.shape, x.stride(), strict=True) if size > 1)
    if _are_disjoint(axes):
        return False

    offsets = torch.zeros(1, dtype=torch.long, device="cpu")
    for step, size in axes:
        offsets = (offsets[:, None] + step * torch.arange(size, device="cpu")).flatten()
    return len(offsets.unique()) < x.numel()


def _are_disjoint(axes: Sequence[tuple[int, int]]) -> bool:
    """Return whether each axis steps over all elements of the axes with smaller steps."""
    reach = 0
    for step, size in axes:
        if step <= reach:
            return False
        reach += step * (size - 1)
    return True


# ---- sharded tensors: each process moves its own part --------------------------------------------


def _is_sharded(x: Tensor) -> "TypeGuard[DTensor]":
    return hasattr(x, "placements")


def _local_parts(old: Tensor, new: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Return this process's parts of two sharded tensors; other tensors stay as they are."""
    if rule == "keep" or not (_is_sharded(old) and _is_sharded(new)):
        return old, new
    if new.placements != old.placements:
        new = new.redistribute(old.device_mesh, old.placements)
    if any(placement.is_partial() for placement in old.placements):
        return old, new
    return old.to_local(), new.to_local()


def _sharded_as(olds: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make sharded tensors of the parts of those that were sharded; tied ones are one tensor."""
    results = {}
    known = {}
    for name, old in olds.items():
        value = values[name]
        if not _is_sharded(old) or _is_sharded(value):
            results[name] = value
            continue

        key = id(value), old.placements
        if key not in known:
            known[key] = type(old).from_local(
                value,
                old.device_mesh,
                old.placements,
                run_check=False,
                shape=old.shape,
                stride=old.stride(),
            )
        results[name] = known[key]
    return results


# ---- memory: each number moves once, under however many names and views --------------------------


def _place(x: Tensor) -> tuple[Hashable, Hashable]:
    """Identify the memory of a tensor, and the tensor's elements in this memory.

    `data_ptr()` does not: it is 0 for every tensor that wraps others, and raises within `vmap`.
    """
    if torch.compiler.is_compiling():
        return id(x), None

    plain = type(x) in _PLAIN
    if not plain and is_traceable_wrapper_subclass(x):
        inner = [_place(getattr(x, field)) for field in x.__tensor_flatten__()[0]]
        return tuple(memory for memory, _ in inner), (tuple(inner), x.shape)

    try:
        storage = x.untyped_storage()
    except NotImplementedError:  # x belongs to vmap or to another transform
        return _place(get_unwrapped(x))[0], id(x)
    address = storage.data_ptr() if plain else 0  # one for all that share an array of NumPy
    return address or storage._cdata, (x.dtype, x.storage_offset(), x.shape, x.stride())


def _by_memory(pairs: Sequence[_Pair]) -> tuple[list[_Pair], list[_Pair]]:
    """Split pairs into those whose memory no other tensor uses, and the others.

    Of several names of the same elements, the last one remains.
    """
    places = {_place(pair.old): pair for pair in pairs}
    students = {_place(pair.new)[0] for pair in pairs}
    uses = _counts([*(memory for memory, _ in places), *students])
    alone = [pair for (memory, _), pair in places.items() if uses[memory] == 1]
    together = [pair for (memory, _), pair in places.items() if uses[memory] > 1]
    return alone, together


def _counts(keys: Iterable[Hashable]) -> dict[Hashable, int]:
    """Count as `collections.Counter` does, which older compilers do not trace."""
    counts = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return counts


# ---- the update ----------------------------------------------------------------------------------


def _write(pairs: Sequence[_Pair], momentum: float, generator: torch.Generator | None) -> None:
    alone, together = _by_memory([pair for pair in pairs if pair.rule != "keep"])
    # Where tensors share memory, all new values are computed before the first is written.
    values = [_new_value(pair, momentum, generator) for pair in together]

    fused = []
    single = []
    for pair in alone:
        if pair.rule != "round" and _is_fused(pair.old):
            fused.append(pair)
        else:
            single.append(pair)
    _write_fused(fused, momentum)
    for pair in single:
        _write_single(pair, momentum, generator)

    for pair, value in zip(together, values, strict=True):
        pair.old.copy_(value)


def _write_single(pair: _Pair, momentum: float, generator: torch.Generator | None) -> None:
    _, old, new, rule = pair
    if rule == "copy":
        old.copy_(new)
    elif rule == "average" and _is_ordinary(old, new):
        old.lerp_(new.to(old.device, old.dtype), 1 - momentum)
    else:
        old.copy_(_new_value(pair, momentum, generator))


def _new_values(
    pairs: Sequence[_Pair], momentum: float, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """Compute new tensors, by name; those that shared memory share memory again."""
    places = [_place(pair.old) for pair in pairs]
    distinct = dict(zip(places, pairs, strict=True))  # of several names, the last one
    values = {place: _new_value(pair, momentum, generator) for place, pair in distinct.items()}
    uses = _counts(memory for memory, _ in distinct)
    without = {memory for (memory, _), x in values.items() if not _has_storage(x)}

    copies = {}
    for place, pair in distinct.items():
        memory, _ = place
        old = pair.old
        if uses[memory] == 1 or memory in without or _repeats_memory(old):
            continue
        shared = memory, old.dtype
        if shared not in copies:
            copies[shared] = _copy_of_memory(old)
        view = copies[shared].as_strided(old.shape, old.stride(), old.storage_offset())
        if pair.rule != "keep":
            view.copy_(values[place])
        values[place] = view

    return {pair.name: values[place] for place, pair in zip(places, pairs, strict=True)}


def _copy_of_memory(x: Tensor) -> Tensor:
    """Return a flat copy of the whole memory that a tensor is a view of."""
    size = x.untyped_storage().nbytes() // x.element_size()
    return x.as_strided((size,), (1,), 0).clone()


def _new_value(pair: _Pair, momentum: float, generator: torch.Generator | None) -> Tensor:
    _, old, new, rule = pair
    if rule == "keep":
        return old.clone()
    if rule == "copy":
        return new.to(old.device, old.dtype, copy=True)
    if rule == "average":
        return _mean(old, new.to(old.device, old.dtype), momentum)
    mean = _mean(old.float(), new.to(old.device).float(), momentum)
    return _round_stochastically(mean, generator)


def _mean(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    """Compute the mean of two tensors, also where a number is infinite or the difference overflows.

    `lerp` adds a share of the difference, so a teacher that equals its student stays as it is.
    Where this is not finite, the mean is the sum of two products.
    """
    if 1 - momentum == 1:
        return new.clone()
    mean = torch.lerp(old, new, 1 - momentum)
    if _is_ordinary(old, new):
        return mean
    return torch.where(mean.isfinite(), mean, momentum * old + (1 - momentum) * new)


def _is_ordinary(old: Tensor, new: Tensor) -> bool:
    """Return whether `lerp` is known to be finite; only a CPU can be asked without waiting for it.

    Where the difference overflows, the product of the numbers overflows too.
    """
    plain = type(old) in _PLAIN and type(new) in _PLAIN and _has_storage(old) and _has_storage(new)
    if not plain or old.device.type != "cpu" or old.is_complex():
        return False
    return math.isfinite(torch.dot(old.flatten(), new.to(old.device, old.dtype).flatten()))


def _is_fused(x: Tensor) -> bool:
    return x.device.type not in ("cpu", "meta") and _has_storage(x)


def _has_storage(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or is_functorch_wrapped_tensor(x):
        return False
    return type(x) in _PLAIN or not is_traceable_wrapper_subclass(x)


def _write_fused(pairs: Sequence[_Pair], momentum: float) -> None:
    """Write what `_new_value` computes, with few kernels: for tensors on an accelerator."""
    copied = [pair for pair in pairs if pair.rule == "copy"]
    if copied:
        torch._foreach_copy_([pair.old for pair in copied], [pair.new for pair in copied])

    for group in _in_groups([pair for pair in pairs if pair.rule == "average"]):
        olds = [pair.old for pair in group]
        news = [pair.new.to(pair.old.device, pair.old.dtype) for pair in group]
        means = torch._foreach_lerp(olds, news, 1 - momentum)
        sums = torch._foreach_mul(olds, momentum)
        torch._foreach_add_(sums, news, alpha=1 - momentum)
        finite = [torch.where(x.isfinite(), x, y) for x, y in zip(means, sums, strict=True)]
        torch._foreach_copy_(olds, finite)


def _in_groups(pairs: Sequence[_Pair]) -> list[list[_Pair]]:
    """Split pairs into groups of 2^26 numbers, or one tensor: new values take little memory."""
    groups = []
    size = 0  # of the last group
    for pair in pairs:
        number = pair.old.numel()
        if not groups or size + number > 2**26:
            groups.append([])
            size = 0
        groups[-1].append(pair)
        size += number
    return groups


def _round_stochastically(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Round float32 to bfloat16, up or down with probabilities that make the expectation exact."""
    integers = {"dtype": torch.int32, "device": x.device}
    noise = torch.randint(2**16, x.shape, generator=generator, **integers)
    rounded = ((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
