"""Momentum update of a teacher: an exponential moving average of a student's weights."""

from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten
from densekit.typing import Tensor, typed

__all__ = ["ema_update"]

Tree = nn.Module | dict | list | tuple


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
    """Move a teacher's tensors towards a student's: `m teacher + (1 - m) student`.

    Teacher and student are two modules whose parameters have the same names, such as a network and
    its deep copy; or two state dicts; or two other trees of dicts, lists and (named) tuples with
    the same structure. All tensors are updated in one fused pass.

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
        TypeError: Teacher and student do not correspond, or the teacher is in half precision
            (bfloat16 is allowed with a generator). Nothing has been modified then.
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
    (olds, fixed), (news, _) = _tensors(teacher), _tensors(student)
    _check_alike(olds, news)
    averaged, copied = [], []
    for name, old in olds.items():
        floating = old.is_floating_point() or old.is_complex()
        if floating and (buffers == "average" or name not in fixed):
            averaged.append(name)
        elif buffers != "keep":
            copied.append(name)
    narrow = [name for name in averaged if olds[name].dtype in (torch.bfloat16, torch.float16)]
    for dtype in {olds[name].dtype for name in narrow}:
        if dtype == torch.float16 or generator is None:
            raise TypeError(
                f"densekit.ema.ema_update: the teacher is in {dtype}, where an update of "
                f"{1 - momentum:g} rounds to nothing; keep it in float32 and cast a copy, or give "
                "a bfloat16 teacher a generator."
            )
    if not inplace:
        copies = {_memory(x): x.clone() for x in olds.values()}  # one copy of tied weights
        olds = {name: copies[_memory(x)] for name, x in olds.items()}
    averaged = [*{_memory(olds[name]): name for name in averaged}.values()]
    means = [olds[name].float() if name in narrow else olds[name] for name in averaged]
    if means:
        targets = [news[name].to(mean) for name, mean in zip(averaged, means, strict=True)]
        torch._foreach_lerp_(means, targets, 1 - momentum)
    if copied:
        torch._foreach_copy_([olds[name] for name in copied], [news[name] for name in copied])
    for name, mean in zip(averaged, means, strict=True):
        if name in narrow:
            olds[name].copy_(_round_stochastically(mean, generator))
    if inplace:
        return teacher
    return olds if isinstance(teacher, nn.Module) else _rebuild(teacher, olds)


def _tensors(tree: Any) -> tuple[dict[str, Tensor], set[str]]:
    """Return a tree's tensors by name, and the names of a module's buffers, in one quick pass."""
    if not isinstance(tree, nn.Module):
        leaves, _ = tree_flatten_with_path(tree)
        if any(isinstance(leaf, nn.Module) for _, leaf in leaves):
            raise TypeError(
                "densekit.ema.ema_update: a tree contains a module; update each module "
                "by itself, or give a tree of state dicts."
            )
        return {keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}, set()
    tensors, buffers, modules = {}, {}, [("", tree)]
    for prefix, module in modules:  # the list grows; named_modules() takes as long as the update
        for name, x in module._parameters.items():
            tensors[prefix + name] = x
        for name, x in module._buffers.items():
            buffers[prefix + name] = x
        modules += [(f"{prefix}{name}.", x) for name, x in module._modules.items() if x is not None]
    tensors |= buffers
    return {name: x for name, x in tensors.items() if x is not None}, {*buffers}


def _memory(x: Tensor) -> tuple:
    return x.data_ptr(), x.dtype, x.shape, x.stride()


def _rebuild(tree: Any, tensors: dict[str, Tensor]) -> Any:
    leaves, structure = tree_flatten_with_path(tree)
    return tree_unflatten([tensors.get(keystr(path), leaf) for path, leaf in leaves], structure)


def _check_alike(olds: dict[str, Tensor], news: dict[str, Tensor]) -> None:
    if olds.keys() == news.keys() and all(x.shape == news[name].shape for name, x in olds.items()):
        return
    shapes = [{(name, tuple(x.shape)) for name, x in tensors.items()} for tensors in (olds, news)]
    name, shape = min(shapes[0] ^ shapes[1])
    raise TypeError(
        f"densekit.ema.ema_update: teacher and student differ in {name} of shape {shape}; give "
        "a teacher that is a copy of the student."
    )


def _round_stochastically(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Round float32 to bfloat16, up or down with probabilities that make the expectation exact."""
    size, device = x.shape, x.device
    noise = torch.randint(2**16, size, generator=generator, dtype=torch.int32, device=device)
    rounded = ((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
