"""A step of the recipes that have no test of it elsewhere: the same on any number of processes.

Elsewhere: test_densesiam.py, test_croc.py, test_dupr.py, test_d3ssl.py, test_adapt.py.
"""

from dataclasses import replace

import densesiam_segment
import harness
import minimal
import torch
from steps import step_on_part
import densekit as dk
from densekit.testing import assert_world_size_invariant


def images_of(count, side):
    draws = torch.Generator().manual_seed(0)
    return list(torch.rand(2, count, 3, side, side, generator=draws, dtype=torch.float64))


def test_a_step_of_the_minimal_recipe():
    config = minimal.Config(size=32, grid=3, batch=4, epochs=1, workers=0, device="cpu")
    torch.manual_seed(0)
    model = minimal.Minimal(config).double()
    pairs = dk.sample_view_pairs((64, 64), (4,), generator=harness.generator(0))
    views = [dk.View(view.box.double(), view.flip) for view in pairs[:2]]
    valid = torch.tensor([True, False, False, True])  # of four processes two have no pair

    def one_step(part, group):
        _, loss, gradients, _ = step_on_part(model, *part)
        return loss, gradients

    assert_world_size_invariant(one_step, (images_of(4, 32), views, valid))


def test_a_step_of_unsupervised_segmentation():
    # With other weights, the counts of the classes are those of one process.
    config = replace(
        densesiam_segment.PRESETS["demo"], image=32, size=32, aux=8, weighting="plain", device="cpu"
    )
    torch.manual_seed(0)
    model = densesiam_segment.Segmenter(config, 5).double()
    box = [[0.0, 0, 1, 1], [0.0, 0.38, 0.62, 1.0], [0.45, 0.2, 0.95, 0.7], [0.1, 0.1, 0.8, 0.6]]
    flip = torch.tensor([True, False, True, False])
    # Two images on each of four processes: of one image alone, torch's batch normalization has a
    # wrong gradient on a CPU, if the gradient of its output is laid out as rows (2.8 to 2.15).
    view = dk.View(torch.tensor(box, dtype=torch.float64).repeat(2, 1), flip.repeat(2))

    def one_step(part, group):
        (terms,), loss, gradients, _ = step_on_part(model, *part, True)
        terms = {name: dk.all_mean(x.detach(), group) for name, x in terms.items()}
        return dk.all_mean(loss, group), terms, gradients

    assert_world_size_invariant(one_step, (images_of(8, 32), view))
