"""Integer arguments of any width: the same results, or one sentence of densekit's."""

import pytest
import torch
from test_contract import TABLE, build, run
from torch.utils._pytree import tree_leaves, tree_map

WIDTHS = (
    *(torch.int8, torch.int16, torch.int32),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
# Their sizes and cursors are signed.
SIGNED = {
    *("full_view", "sample_views", "sample_view_pairs", "view_from_relative", "views_valid"),
    *("bank_negatives", "push_to_bank"),
}


def integers(tree):
    return [x for x in tree_leaves(tree) if x.dtype == torch.long]


ROWS = [entry for entry in TABLE if integers(build(entry))]


@pytest.mark.parametrize("entry", ROWS, ids=[f"{entry.name}-{i}" for i, entry in enumerate(ROWS)])
def test_integers_of_any_width_give_the_same(entry):
    arguments = build(entry, () if "batched" in entry.without else (2,))
    want = run(entry, arguments)
    for dtype in WIDTHS:
        narrow = tree_map(lambda x, to=dtype: x.to(to) if x.dtype == torch.long else x, arguments)
        if not dtype.is_signed and entry.name in SIGNED:
            with pytest.raises(TypeError, match=r"^densekit\..* should be .*Int\[.* was given"):
                run(entry, narrow)
            continue
        got = run(entry, narrow)
        for one, other in zip(tree_leaves(got), tree_leaves(want), strict=True):
            assert torch.equal(one.to(other.dtype), other)
