"""benchmarks/evaluation.py: the formulas of the memory against small runs, and their laws."""

import sys

import pytest
from files import ROOT
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(ROOT / "benchmarks"))

import evaluation
from downstream.memory import Sizes, feature_bytes, peak_bytes

SMALL = {"images": {"train": 40, "val": 20}, "size": (192, 256), "encoded": (128, 128)}
QUICK = ("linear-seg", "kmeans-seg", "object-knn", "image-linear-map")

counts = st.integers(1, 3000)
sizes = st.builds(
    Sizes,
    fit=counts,
    test=counts,
    cells=st.integers(1, 3000),
    channels=st.integers(1, 2048),
    pooled=st.lists(st.integers(1, 2048), min_size=1, max_size=4).map(tuple),
    vectors=st.lists(st.integers(1, 9600), min_size=1, max_size=5).map(tuple),
    gallery=counts,
    objects=counts,
    half=st.booleans(),
    classes=st.integers(1, 200),
    clusters=st.integers(0, 300),
    pixels=st.integers(0, 10**7),
    image=st.integers(1, 10**6),
    batch=st.integers(1, 64),
    workers=st.integers(0, 8),
    draws=st.integers(1, 2000),
)


@pytest.mark.parametrize("protocol", QUICK)
def test_the_peak_of_a_small_run_is_that_of_the_formula(protocol, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "CELL", 8)
    monkeypatch.setattr(evaluation, "CHANNELS", 64)
    (ratio,) = evaluation.check([protocol], **SMALL)
    assert ratio == pytest.approx(1, abs=evaluation.TOLERANCE)


@pytest.mark.slow
def test_the_peaks_on_300_large_images_are_those_of_the_formulas():
    ratios = evaluation.check(list(evaluation.PROTOCOLS))
    assert ratios == pytest.approx([1] * len(ratios), abs=evaluation.TOLERANCE)


@given(sizes, st.sampled_from(evaluation.PROTOCOLS))
def test_a_peak_holds_the_features_and_grows_with_the_images(one, protocol):
    peak = peak_bytes(protocol, one)
    assert peak > feature_bytes(protocol, one)
    more = one._replace(fit=2 * one.fit, test=2 * one.test, gallery=2 * one.gallery)
    assert peak_bytes(protocol, more) >= peak
    assert peak_bytes(protocol, one._replace(half=False)) >= peak
    assert peak_bytes(protocol, one._replace(pixels=2 * one.pixels)) >= peak


def test_the_table_has_a_row_for_each_protocol(capsys):
    evaluation.table(list(evaluation.PROTOCOLS))
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(evaluation.PROTOCOLS)
    known = {*evaluation.evaluate.FITTED, "retrieval"}
    assert set(evaluation.PROTOCOLS) == known
