"""Schedules: ends, monotone, continuous, and the values of torch's schedulers."""

import math
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler
from densekit import cosine_schedule, linear_schedule, warmup_cosine

values = st.floats(-10, 10)
lengths = st.integers(1, 50)
both = pytest.mark.parametrize("schedule", [linear_schedule, cosine_schedule])


def near(value):
    return pytest.approx(value, rel=0, abs=1e-12)  # values of at most 10, a few roundings


@both
@given(steps=lengths, start=values, end=values, beyond=st.floats(0, 100))
def test_ends_are_reached_and_kept(schedule, steps, start, end, beyond):
    assert schedule(0, steps, start=start, end=end) == near(start)
    assert schedule(-beyond, steps, start=start, end=end) == near(start)
    assert schedule(steps, steps, start=start, end=end) == near(end)
    assert schedule(steps + beyond, steps, start=start, end=end) == near(end)


@both
@given(
    steps=st.floats(0, 1e300),
    start=st.floats(allow_nan=True),
    end=st.floats(allow_nan=True),
    beyond=st.floats(0, 1e300),
    share=st.floats(0, 1),
)
def test_ends_are_exact_whatever_the_other_end_is(schedule, steps, start, end, beyond, share):
    def same(one, other):
        return one == other or (math.isnan(one) and math.isnan(other))

    assert same(schedule(steps + beyond, steps, start=start, end=end), end)
    if steps > 0:
        assert same(schedule(-beyond, steps, start=start, end=end), start)
    if math.isfinite(start) and math.isfinite(end):  # the difference may overflow, a mean may not
        value = schedule(share * steps, steps, start=start, end=end)
        room = 1e-9 * max(abs(start), abs(end))
        assert min(start, end) - room <= value <= max(start, end) + room


@both
@given(steps=lengths, start=values, end=values, share=st.floats(0, 1))
def test_half_way_is_the_middle_and_both_halves_mirror(schedule, steps, start, end, share):
    assert schedule(steps / 2, steps, start=start, end=end) == near((start + end) / 2)
    one = schedule(share * steps, steps, start=start, end=end)
    other = schedule((1 - share) * steps, steps, start=start, end=end)
    assert one + other == pytest.approx(start + end, rel=0, abs=1e-10)


@both
@given(steps=lengths, start=values, end=values)
def test_values_run_from_one_end_to_the_other_in_small_steps(schedule, steps, start, end):
    ticks = [schedule(i * steps / 40, steps, start=start, end=end) for i in range(41)]
    moves = [(b - a) * (1 if end >= start else -1) for a, b in pairwise(ticks)]
    assert min(moves) >= -1e-12
    # The steepest slope of the cosine is pi/2 of the line's.
    assert max(moves) <= abs(end - start) / 40 * math.pi / 2 + 1e-12


@given(lengths, values, values, st.floats(0, 1))
def test_closed_forms(steps, start, end, share):
    linear = linear_schedule(share * steps, steps, start=start, end=end)
    assert linear == pytest.approx(start * (1 - share) + end * share, rel=0, abs=1e-10)
    cosine = cosine_schedule(share * steps, steps, start=start, end=end)
    weight = math.cos(math.pi * share / 2) ** 2
    assert cosine == pytest.approx(start * weight + end * (1 - weight), rel=0, abs=1e-10)


@both
def test_a_schedule_without_steps_is_at_its_end(schedule):
    for step in (-1, 0, 5):
        assert schedule(step, 0, start=1.0, end=0.25) == 0.25


def test_whole_numbers_are_taken_and_floats_given():
    for value in (
        linear_schedule(0, 4, start=1, end=2),
        cosine_schedule(4, 4, start=1, end=0),
        warmup_cosine(0, 4, peak=1, warmup=2, start=0),
    ):
        assert type(value) is float


# -------------------------------------------------------------------------- warm-up, cosine


@st.composite
def warmups(draw):
    steps = draw(st.integers(2, 50))
    warmup = draw(st.integers(0, steps - 1))
    return steps, {"warmup": warmup, **{k: draw(values) for k in ("peak", "start", "end")}}


@given(warmups(), st.floats(0, 1))
def test_warmup_cosine_is_a_line_and_then_a_cosine(case, share):
    steps, o = case
    step = share * steps
    if step < o["warmup"]:
        want = linear_schedule(step, o["warmup"], start=o["start"], end=o["peak"])
    else:
        left = steps - o["warmup"]
        want = cosine_schedule(step - o["warmup"], left, start=o["peak"], end=o["end"])
    assert warmup_cosine(step, steps, **o) == near(want)


@given(warmups())
def test_warmup_cosine_reaches_its_ends_and_its_peak(case):
    steps, o = case
    assert warmup_cosine(0, steps, **o) == near(o["start"] if o["warmup"] else o["peak"])
    assert warmup_cosine(o["warmup"], steps, **o) == near(o["peak"])
    assert warmup_cosine(steps, steps, **o) == near(o["end"])
    assert warmup_cosine(steps + 7, steps, **o) == near(o["end"])


@given(warmups())
def test_warmup_cosine_does_not_jump(case):
    steps, o = case
    at = o["warmup"]
    span = abs(o["peak"] - o["start"]) + abs(o["peak"] - o["end"])
    for nudge in (1e-6, -1e-6):
        moved = warmup_cosine(at + nudge, steps, **o)
        if at or nudge > 0:
            assert abs(moved - o["peak"]) <= 1e-6 * span * math.pi + 1e-12


# ---------------------------------------------------------------------------------- oracles


def torch_values(count, make, lr=0.3):
    """Learning rates that a scheduler of torch gives, step by step."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler = make(optimizer)
    rates = []
    with warnings.catch_warnings():
        # SequentialLR hands an epoch to the schedulers inside it, which torch itself deprecates.
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(count):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return rates


def test_cosine_is_torchs_annealing():
    want = torch_values(21, lambda o: lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.01))
    got = [cosine_schedule(i, 20, start=0.3, end=0.01) for i in range(21)]
    assert got == pytest.approx(want, rel=1e-9)


def test_linear_is_torchs():
    want = torch_values(25, lambda o: lr_scheduler.LinearLR(o, 0.1, 0.5, 20))
    got = [linear_schedule(i, 20, start=0.03, end=0.15) for i in range(25)]
    assert got == pytest.approx(want, rel=1e-9)


def test_warmup_cosine_is_torchs_two_in_sequence():
    def make(optimizer):
        line = lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, 15, eta_min=0.01)
        return lr_scheduler.SequentialLR(optimizer, [line, cosine], [5])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        want = torch_values(21, make)
    got = [warmup_cosine(i, 20, peak=0.3, warmup=5, start=0.03, end=0.01) for i in range(21)]
    assert got == pytest.approx(want, rel=1e-9)


# ----------------------------------------------------------------------------------- errors


@both
def test_a_negative_length_is_refused(schedule):
    with pytest.raises(ValueError, match="steps is -1"):
        schedule(0, -1, start=0.0, end=1.0)


@pytest.mark.parametrize(("steps", "warmup"), [(10, -1), (10, 11), (-1, 0)])
def test_a_warmup_that_does_not_fit_is_refused(steps, warmup):
    found = "steps is -1; give" if steps < 0 else f"warmup is {warmup}; give 0 to {steps}"
    with pytest.raises(ValueError, match=f"warmup_cosine: {found}"):
        warmup_cosine(0, steps, peak=1.0, warmup=warmup)


@pytest.mark.parametrize("bad", ["1", None, torch.tensor(1.0)])
def test_a_step_is_a_number(bad):
    with pytest.raises(TypeError, match="linear_schedule: argument 'step' should be float"):
        linear_schedule(bad, 10, start=0.0, end=1.0)
