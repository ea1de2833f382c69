"""Schedules: pure functions of the training step, in plain Python numbers."""

import math

from densekit.typing import typed

__all__ = ["cosine_schedule", "linear_schedule", "warmup_cosine"]


@typed
def linear_schedule(step: float, steps: float, *, start: float, end: float) -> float:
    """Follow a straight line from `start` at step 0 to `end` at `steps`; it is constant outside.

    Both ends are exact, also where the other one is infinite or the difference overflows.

    Args:
        step: The step; it may be a fraction.
        steps: Length of the schedule in steps; with 0 the value is always `end`.
        start: Value at step 0.
        end: Value at `steps` and after.

    Returns:
        The value at the step.

    Raises:
        ValueError: `steps` is negative.

    Examples:
        >>> linear_schedule(5, 10, start=0.0, end=1.0)
        0.5

    References:
        Goyal et al. 2017, Sec 2.2 (warm-up).
    """
    share = _progress("linear_schedule", step, steps)
    if share in (0, 1) or not math.isfinite(end - start):
        return _mean(end, start, share)
    return start + (end - start) * share


@typed
def cosine_schedule(step: float, steps: float, *, start: float, end: float = 0.0) -> float:
    r"""Follow half a cosine from `start` at step 0 to `end` at `steps`; it is constant outside.

    From $a$ at the start to $b$ at the end, the value at the share $t$ of the steps is
    $b + (a - b) (1 + \cos \pi t) / 2$. Both ends are exact, also where the other one is infinite or
    the difference overflows.

    Args:
        step: The step; it may be a fraction.
        steps: Length of the schedule in steps; with 0 the value is always `end`.
        start: Value at step 0.
        end: Value at `steps` and after.

    Returns:
        The value at the step.

    Raises:
        ValueError: `steps` is negative.

    Examples:
        >>> cosine_schedule(5, 10, start=1.0)
        0.5

    References:
        Loshchilov and Hutter 2017 (SGDR), Eq 5.
    """
    share = (1 + math.cos(math.pi * _progress("cosine_schedule", step, steps))) / 2
    if share in (0, 1) or not math.isfinite(start - end):
        return _mean(start, end, share)
    return end + (start - end) * share


@typed
def warmup_cosine(
    step: float,
    steps: float,
    *,
    peak: float,
    warmup: float = 0,
    start: float = 0.0,
    end: float = 0.0,
) -> float:
    """Follow a line from `start` to `peak` for `warmup` steps, then half a cosine to `end`.

    Args:
        step: The step; it may be a fraction.
        steps: Length of the whole schedule in steps.
        peak: Value at the end of the warm-up.
        warmup: Length of the warm-up in steps.
        start: Value at step 0 if there is a warm-up.
        end: Value at `steps` and after.

    Returns:
        The value at the step.

    Raises:
        ValueError: The warm-up is negative or longer than the schedule.

    Examples:
        >>> [warmup_cosine(step, 30, peak=1.0, warmup=10) for step in (5, 10, 20)]
        [0.5, 1.0, 0.5]

    References:
        Goyal et al. 2017, Sec 2.2; Loshchilov and Hutter 2017, Eq 5.
    """
    _check_length("warmup_cosine", steps)
    if not 0 <= warmup <= steps:
        raise ValueError(
            f"densekit.schedules.warmup_cosine: warmup is {warmup}; give 0 to {steps}, the number "
            "of all steps."
        )
    if step < warmup:
        return linear_schedule(step, warmup, start=start, end=peak)
    return cosine_schedule(step - warmup, steps - warmup, start=peak, end=end)


def _mean(one: float, other: float, share: float) -> float:
    """Compute a mean whose ends are exact, and of which no difference overflows."""
    if share == 1:
        return float(one)
    return share * one + (1 - share) * other if share else float(other)


def _check_length(name: str, steps: float) -> None:
    if not steps >= 0:
        raise ValueError(
            f"densekit.schedules.{name}: steps is {steps}; give a length of 0 or more."
        )


def _progress(name: str, step: float, steps: float) -> float:
    _check_length(name, steps)
    if step <= 0 < steps:
        return 0.0
    return 1.0 if step >= steps or not steps else step / steps
