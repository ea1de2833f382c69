"""Momentum update of a teacher: an exponential moving average of a student's weights."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from densekit.typing import Tensor, typed

__all__ = ["ema_update"]


@typed
@torch.no_grad()
def ema_update(
    teacher: nn.Module,
    student: nn.Module,
    *,
    momentum: float,
    buffers: Literal["copy", "average", "keep"] = "copy",
) -> None:
    """Move a teacher's parameters towards a student's, in place: `m teacher + (1 - m) student`.

    Both modules have parameters of the same names, such as a network and its deep copy. All
    tensors are updated in one fused pass.

    Args:
        teacher: Changed in place. Its parameters are float32 or float64: in half precision an
            update by 1 - m rounds to nothing.
        student: Left as it is; in any floating dtype.
        momentum: Weight of the old value m.
        buffers: "copy" the student's, such as batch-norm statistics, "average" the floating ones
            and copy the others, or "keep" the teacher's.

    Raises:
        TypeError: The modules' parameters or buffers do not correspond, or the teacher is in half
            precision.
        ValueError: The momentum is outside [0, 1].

    Examples:
        >>> teacher, student = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> ema_update(teacher, student, momentum=0.0)
        >>> bool(teacher.weight == student.weight)
        True

    References:
        CrOC, Sec 3.2 (teacher); MoCo, Eq 2; DINO, Sec 3.1.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"densekit.ema.ema_update: momentum is {momentum}; give the old value's weight, from 0 "
            "to 1."
        )
    kept, copied = _pairs(teacher.named_parameters(), student.named_parameters()), []
    if buffers != "keep":
        for pair in _pairs(teacher.named_buffers(), student.named_buffers()):
            averaged = buffers == "average" and pair[0].is_floating_point()
            (kept if averaged else copied).append(pair)
    if half := {old.dtype for old, _ in kept} - {torch.float32, torch.float64}:
        raise TypeError(
            f"densekit.ema.ema_update: the teacher is in {half.pop()}, where an update of "
            f"{1 - momentum:g} rounds to nothing; keep it in float32 and cast a copy."
        )
    for old, new in copied:
        old.copy_(new)
    if kept:
        news = [new.to(old.dtype) for old, new in kept]
        torch._foreach_lerp_([old for old, _ in kept], news, 1 - momentum)


def _pairs(
    teacher: Iterable[tuple[str, Tensor]], student: Iterable[tuple[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    olds, news = dict(teacher), dict(student)
    shapes = [{(name, tuple(x.shape)) for name, x in tensors.items()} for tensors in (olds, news)]
    for name, shape in sorted(shapes[0] ^ shapes[1]):
        raise TypeError(
            f"densekit.ema.ema_update: teacher and student differ in {name} of shape {shape}; make "
            "the teacher a deep copy of the student."
        )
    return [(old, news[name]) for name, old in olds.items()]
