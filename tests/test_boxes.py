"""Box algebra against torchvision, and what makes no sense reported as not valid."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, boxes, degenerate_boxes, disjoint_views, overlapping_views
from torchvision import ops
from densekit import box_area, box_iou, boxes_valid, intersect_boxes


@st.composite
def box_pairs(draw):
    batch = draw(batches())
    return draw(boxes(batch)), draw(boxes(batch))


@given(boxes())
def test_boxes_that_enclose_an_area_are_valid(good):
    assert boxes_valid(good).all()


@given(degenerate_boxes())
def test_degenerate_boxes_are_not_valid_and_have_no_area(bad):
    assert not boxes_valid(bad).any()
    assert (box_area(bad) == 0).all()


@given(boxes())
def test_area_is_torchvisions(good):
    torch.testing.assert_close(
        box_area(good).flatten(), ops.box_area(good.reshape(-1, 4)), rtol=1e-12, atol=0
    )


@given(box_pairs())
def test_iou_is_torchvisions(pair):
    want = ops.box_iou(*(x.reshape(-1, 4) for x in pair)).diagonal()
    torch.testing.assert_close(box_iou(*pair).flatten(), want, rtol=1e-12, atol=0)


@given(box_pairs())
def test_intersection_and_iou_are_symmetric(pair):
    assert torch.equal(intersect_boxes(*pair), intersect_boxes(*pair[::-1]))
    torch.testing.assert_close(box_iou(*pair), box_iou(*pair[::-1]), rtol=1e-12, atol=0)


@given(boxes())
def test_a_box_meets_itself(good):
    assert torch.equal(intersect_boxes(good, good), good)
    assert (box_iou(good, good) == 1).all()


@given(box_pairs(), st.data())
def test_a_point_is_in_the_intersection_when_it_is_in_both(pair, data):
    points = data.draw(boxes((5,)), label="points")[:, :2]

    def holds(box):
        box = box[..., None, :]
        return ((box[..., :2] <= points) & (points < box[..., 2:])).all(-1)

    assert torch.equal(holds(intersect_boxes(*pair)), holds(pair[0]) & holds(pair[1]))


@given(overlapping_views())
def test_overlapping_boxes_share_a_valid_box(pair):
    shared = intersect_boxes(pair[0].box, pair[1].box)
    assert boxes_valid(shared).all()
    assert (box_iou(pair[0].box, pair[1].box) > 0).all()


@given(disjoint_views())
def test_disjoint_boxes_share_nothing(pair):
    assert (intersect_boxes(pair[0].box, pair[1].box) == 0).all()
    assert (box_iou(pair[0].box, pair[1].box) == 0).all()


@given(st.data())
def test_a_degenerate_box_shares_nothing_with_any(data):
    batch = data.draw(batches(), label="batch")
    good, bad = data.draw(boxes(batch)), data.draw(degenerate_boxes(batch))
    for pair in ((good, bad), (bad, good), (bad, bad)):
        assert (intersect_boxes(*pair) == 0).all()
        assert (box_iou(*pair) == 0).all()


@given(st.data())
def test_degenerate_boxes_have_zero_gradients(data):
    good, bad = data.draw(boxes((3,))), data.draw(degenerate_boxes((3,)))
    for pair in ((good, bad), (bad, good), (bad, bad)):
        pair = [x.clone().requires_grad_() for x in pair]
        total = intersect_boxes(*pair).sum() + box_iou(*pair).sum() + box_area(pair[0]).sum()
        for box, grad in zip(pair, torch.autograd.grad(total, pair), strict=True):
            assert grad.isfinite().all()
            assert (grad[~boxes_valid(box)] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_area_and_iou_of_an_image_do_not_overflow_in_half_precision(dtype):
    box = torch.tensor([0.0, 0.0, 2048.0, 1024.0], dtype=dtype)
    assert box_area(box) == 2048 * 1024
    assert box_iou(box, box) == 1
    assert box_area(box).dtype == torch.float32


@pytest.mark.parametrize("function", [box_iou, intersect_boxes])
def test_batches_that_differ_are_refused(function):
    with pytest.raises(TypeError, match=r"argument 'boxes2'.*batch=.*shape \(2, 4\)"):
        function(torch.zeros(3, 4), torch.zeros(2, 4))


@pytest.mark.parametrize("function", [boxes_valid, box_area])
@pytest.mark.parametrize(
    "bad", [torch.zeros(3, 5), torch.zeros(4).long(), torch.tensor(1.0), [0, 1]]
)
def test_what_is_no_box_is_refused(function, bad):
    with pytest.raises(TypeError, match=f"{function.__name__}: argument 'boxes'"):
        function(bad)
