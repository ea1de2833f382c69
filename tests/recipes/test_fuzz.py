"""A few cases of each target of tests/fuzz.py, and what longer runs of it have found."""

import fuzz
import pytest

CASES = {"command-lines": 6}  # a command line may build a network


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_wrong_input_is_checked_values_or_one_sentence(target):
    fuzz.fuzz(target, CASES.get(target, 25), seed=None, seconds=60.0, megabytes=500)
