"""A few cases of each target of tests/fuzz.py, and what longer runs of it have found."""

import fuzz
import pytest

# A command line may build a network, and a run folder is used twice.
CASES = {"command-lines": 6, "run-folders": 12, "configurations": 12}


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_wrong_input_is_checked_values_or_one_sentence(target):
    fuzz.fuzz(target, CASES.get(target, 25), seed=None, seconds=60.0, megabytes=500)
