"""The `typed` decorator: what it refuses, what it says, and when it is gone."""

import inspect
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jaxtyping
import pytest
import torch
import torch.fx.experimental.symbolic_shapes
from beartype.vale import Is
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
import densekit
from densekit import View, ViewPairs
from densekit.typing import Bool, Float, Integer, Scalar, Shaped, Size, Tensor, typed


class Record(NamedTuple):
    points: Float[Tensor, "*batch n 2"]
    valid: Bool[Tensor, "*batch"]


@typed
def scale(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], *, by: float = 2.0
) -> Float[Tensor, "n d"]:
    """Doc of scale."""
    return (x + y) * by


@typed
def pick(
    x: Float[Tensor, "*batch n"],
    valid: Bool[Tensor, "*batch n"] | None = None,
    *,
    mode: Literal["mean", "none"] = "mean",
    count: int = 1,
    size: int | Size = 1,
) -> Float[Tensor, "*batch n"]:
    return x


@typed
def unpack(record: Record, weight: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n 2"]:
    return record.points * weight[..., None]


@typed
def nested(pairs: ViewPairs) -> Bool[Tensor, "*batch"]:
    return pairs.valid


@typed
def outer(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n d"]:
    return scale(a, b)


@typed
def wrong_result(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return x[:-1]


@typed
def any_rest(x: Float[Tensor, " n"], *args, **kwargs) -> Float[Tensor, " n"]:
    return args[0] if args else x


X = torch.ones(2, 3)


def error(function, *args, **kwargs):
    with pytest.raises(TypeError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


# ----------------------------------------------------------------------------- what passes


def test_what_fits_is_computed():
    assert torch.equal(scale(X, X), 4 * X)
    assert torch.equal(scale(x=X, y=X, by=0.5), X)


def test_a_whole_number_is_a_float_but_no_float_is_whole():
    assert torch.equal(scale(X, X, by=1), 2 * X)
    assert "argument 'count' should be int" in error(pick, X, count=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float_is_every_floating_dtype(dtype):
    assert scale(X.to(dtype), X.to(dtype)).dtype == dtype


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 3), (2, 1, 0)])
def test_a_batch_may_have_any_number_of_axes(shape):
    assert pick(torch.zeros(shape)).shape == shape


def test_arguments_that_may_be_missing_may_be_missing():
    assert pick(X, None) is X
    assert pick(X, X > 0, size=(2, 3), mode="none") is X


def test_axes_are_bound_anew_in_every_call():
    for n in (1, 5, 2):
        assert scale(torch.ones(n, n), torch.ones(n, n)).shape == (n, n)


def test_functions_inside_bind_their_own_axes():
    @typed
    def transposed(x: Float[Tensor, "n d"]) -> Float[Tensor, "d n"]:
        return scale(x.mT, x.mT)  # here n and d are exchanged

    assert transposed(X).shape == (3, 2)


def test_unannotated_arguments_are_anything():
    assert torch.equal(any_rest(torch.ones(2), torch.zeros(2), "x", y=None), torch.zeros(2))


# ----------------------------------------------------------------- what the error must say


def test_wrong_rank():
    message = error(scale, torch.ones(3), X)
    assert "test_typing.scale: argument 'x'" in message
    assert 'Float[Tensor, "n d"]' in message
    assert "shape (3,) and dtype torch.float32 was given" in message


def test_wrong_axis_size_tells_the_sizes_bound_so_far():
    message = error(scale, X, torch.ones(2, 4))
    assert message == (
        "test_typing.scale: argument 'y' should be Float[Tensor, \"n d\"] with n=2, d=3, "
        "but a tensor of shape (2, 4) and dtype torch.float32 was given."
    )


def test_wrong_batch_tells_the_batch():
    message = error(unpack, Record(torch.ones(4, 5, 3, 2), torch.ones(4, 5).bool()), X)
    assert "argument 'weight'" in message
    assert "batch=(4, 5)" in message
    assert "n=3" in message
    assert "shape (2, 3)" in message


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.complex64])
def test_wrong_dtype(dtype):
    message = error(scale, X, X.to(dtype))
    assert "argument 'y'" in message
    assert f"dtype {dtype} was given" in message


def test_no_tensor():
    assert "argument 'x'" in error(scale, [[1.0, 2.0]], X)
    assert "argument 'x'" in error(scale, X.numpy(), X)
    assert "but None of type NoneType was given" in error(scale, None, X)


def test_field_of_a_record_of_wrong_size():
    message = error(unpack, Record(torch.ones(4, 3, 2), torch.ones(5).bool()), torch.ones(4, 3))
    assert "test_typing.unpack: argument 'record.valid'" in message
    assert "batch=(4)" in message
    assert "shape (5,)" in message


def test_field_of_a_record_of_wrong_dtype():
    message = error(unpack, Record(torch.ones(4, 3, 2), torch.ones(4)), torch.ones(4, 3))
    assert "argument 'record.valid' should be Bool" in message
    assert "torch.float32 was given" in message


def test_field_of_a_record_of_wrong_rank():
    message = error(unpack, Record(torch.ones(2), torch.ones(4).bool()), torch.ones(4, 3))
    assert "argument 'record.points'" in message


def test_sizes_of_a_record_bind_the_arguments_after_it():
    record = Record(torch.ones(4, 3, 2), torch.ones(4).bool())
    assert unpack(record, torch.ones(4, 3)).shape == (4, 3, 2)
    message = error(unpack, record, torch.ones(4, 2))
    assert "argument 'weight'" in message
    assert "n=3" in message


def test_a_tuple_is_no_record():
    message = error(unpack, (torch.ones(4, 3, 2), torch.ones(4).bool()), torch.ones(4, 3))
    assert "argument 'record' should be Record" in message
    assert "shape (4, 3, 2)" in message


def test_records_inside_records_are_checked():
    def view(n):
        return View(torch.zeros(n, 4), torch.zeros(n, dtype=torch.bool))

    assert nested(ViewPairs(view(2), view(2), torch.ones(2).bool())).shape == (2,)
    message = error(nested, ViewPairs(view(2), view(3), torch.ones(2).bool()))
    assert "argument 'pairs.view2'" in message
    message = error(nested, ViewPairs(view(2), view(2), torch.ones(3).bool()))
    assert "argument 'pairs.valid'" in message


def test_every_item_of_a_sequence_is_checked():
    @typed
    def stack(rows: Sequence[Tensor]) -> Float[Tensor, "n d"]:
        return torch.stack(list(rows))

    assert stack([X[0]] * 9).shape == (9, 3)
    assert stack((X[0],)).shape == (1, 3)
    for row in range(9):
        rows = [X[0]] * row + ["x"] + [X[0]] * (8 - row)
        assert "argument 'rows' should be Sequence[Tensor]" in error(stack, rows)


def test_argument_that_may_be_missing():
    message = error(pick, X, torch.ones(2).bool())
    assert "argument 'valid' should be Bool[Tensor, \"*batch n\"] or None" in message
    assert "n=3" in message
    assert "shape (2,)" in message


def test_python_number():
    assert "argument 'by' should be float" in error(scale, X, X, by="2")
    assert "'2' of type str was given" in error(scale, X, X, by="2")
    assert "argument 'by'" in error(scale, X, X, by=torch.tensor(2.0))


def test_word_of_a_choice():
    message = error(pick, X, mode="sum")
    assert "argument 'mode' should be Literal['mean', 'none']" in message
    assert "'sum' of type str was given" in message


def test_size():
    message = error(pick, X, size=(1.0, 2))
    assert "argument 'size' should be int or tuple[int, int]" in message
    assert "1.0" in message


@pytest.mark.parametrize(
    ("args", "kwargs", "part"),
    [((X,), {}, "'y'"), ((X, X, X), {}, "too many"), ((X, X), {"bye": 1}, "'bye'")],
)
def test_missing_surplus_and_unknown_arguments_name_the_function(args, kwargs, part):
    message = error(scale, *args, **kwargs)
    assert "test_typing.scale" in message
    assert part in message


def test_error_of_a_function_inside_names_that_function():
    message = error(outer, torch.ones(2, 3), torch.ones(4, 3))
    assert "test_typing.scale: argument 'y'" in message
    assert "n=2, d=3" in message
    assert "outer" not in message


def test_other_type_errors_from_inside_stay_as_they_are():
    @typed
    def broken(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        raise TypeError("the cause")

    assert error(broken, torch.ones(1)) == "the cause"


def test_wrong_result_names_the_function_and_what_came():
    message = error(wrong_result, torch.ones(3))
    assert "wrong_result" in message
    assert "argument '" not in message.splitlines()[0]
    assert "f32[2]" in message  # as jaxtyping writes float32 of shape (2,)
    assert "n" in message


def test_wrong_field_of_a_result():
    @typed
    def record(x: Float[Tensor, " n"]) -> Record:
        return Record(torch.zeros(2, 3, 2), torch.zeros(3, dtype=torch.bool))

    assert "return value" in error(record, torch.ones(3))


def test_wrong_result_does_not_blame_arguments_without_annotation():
    message = error(any_rest, torch.ones(2), torch.ones(3))
    assert "return value of test_typing.any_rest" in message.splitlines()[0]
    assert "argument 'args'" not in message


def test_long_tensors_are_not_printed():
    message = error(unpack, [torch.zeros(1000)] * 2, torch.ones(4, 3))
    assert len(message) < 500


# ------------------------------------------------------- a call like an earlier one passes again


def tensors(*ranks, dtypes=(torch.float32, torch.float64)):
    """Tensors of one or two cells a side: sizes are often equal, and calls often alike."""
    shapes = st.sampled_from(ranks).flatmap(lambda rank: st.tuples(*[st.integers(1, 2)] * rank))
    return st.builds(lambda shape, dtype: torch.zeros(shape).to(dtype), shapes, pick_of(*dtypes))


def pick_of(*values):
    return st.sampled_from(values)


class Nested(NamedTuple):
    record: Record
    other: Float[Tensor, "n d"] | None


class Text(str):
    """A text, but of another type."""


class Box:
    """A value whose type the checks do not know."""


POINTS = tensors(2, 3).map(lambda x: torch.cat([x[..., :1], x[..., :1]], -1))
RECORDS = st.builds(Record, POINTS, tensors(0, 1, dtypes=[torch.bool, torch.bool, torch.int64]))
HINTS = {  # hints, and values of which many fit
    Float[Tensor, "n d"]: tensors(2),
    Float[Tensor, "*batch d"]: tensors(1, 2, 3),
    Bool[Tensor, "*#batch d"]: tensors(1, 2, dtypes=[torch.bool]),
    Shaped[Tensor, "n 2*n"]: tensors(2, dtypes=[torch.int64, torch.float16]),
    Float[Tensor, "2 d"] | Integer[Tensor, " n"] | None: tensors(1, 2) | st.none(),
    Float[Tensor, "{number}"]: tensors(1),
    Tensor: tensors(0, 1).map(torch.nn.Parameter) | st.none(),
    torch.nn.Parameter: tensors(1).map(torch.nn.Parameter) | tensors(1),
    Scalar: pick_of(1.0, 2, True, "1") | tensors(0),
    Record: RECORDS,
    Nested: st.builds(Nested, RECORDS, st.none() | tensors(2)),
    Sequence[Tensor]: st.lists(pick_of(X, X, None), max_size=2),
    Sequence[str]: pick_of("ab", ["a"], ("a", "b"), ["a", 1], range(0), range(2)),
    Literal["mean", None]: pick_of("mean", None, "sum", Text("mean"), Text("sum")),
    Literal[1, 2]: pick_of(1, 2, 3, True),
    int | Size: pick_of(1, 2, True, 1.5, (1, 2), [1, 2], (1, 2.5), torch.Size([1, 2])),
    Annotated[int, Is[lambda number: number > 1]]: pick_of(1, 2, 3),
    torch.Generator | torch.dtype | None: pick_of(torch.Generator(), torch.int64, Box(), None),
    inspect.Parameter.empty: pick_of(None, "x", Box()),
}


def outcome(function, args, kwargs):
    """What a call returns, or the sentence with which it is refused."""
    try:
        return function(*args, **kwargs)
    except (TypeError, jaxtyping.AnnotationError) as refusal:
        return str(refusal)


@given(st.data())
def test_a_call_like_an_earlier_one_is_answered_as_if_it_were_the_first(data):
    hints = [data.draw(pick_of(*HINTS)) for _ in range(3)]
    result, calls = None, 0

    def function(x, y, *, number=1):
        nonlocal calls
        calls += 1
        return result

    names = zip(("x", "y", "return"), hints, strict=True)
    function.__annotations__ = {
        "number": int,
        **{name: hint for name, hint in names if hint is not inspect.Parameter.empty},
    }
    remembering = typed(function)
    before = [data.draw(HINTS[hint]) for hint in hints]
    for _ in range(5):
        x, y, result = before = [
            data.draw(st.just(value) | HINTS[hint])
            for value, hint in zip(before, hints, strict=True)
        ]
        args, kwargs = data.draw(
            pick_of(((x, y), {}), ((x,), {"y": y}), ((x, y), {"number": 2}), ((x,), {}))
        )
        calls = 0
        expected = outcome(typed(function), args, kwargs)
        wanted_calls, calls = calls, 0
        got = outcome(remembering, args, kwargs)
        assert got is expected or (isinstance(expected, str) and got == expected)
        assert calls == wanted_calls


def test_a_form_that_passed_tells_nothing_about_the_levels_of_vmap():
    batch = torch.rand(5, 2, 3)
    for _ in range(2):
        assert torch.vmap(scale)(batch, batch).shape == (5, 2, 3)
        assert "argument 'x'" in error(scale, batch, batch)
        assert torch.vmap(torch.vmap(torch.func.grad(lambda x: x.sum())))(batch).shape == (5, 2, 3)
        assert "argument 'x'" in error(torch.vmap(torch.vmap(scale)), batch, batch)


def test_fake_tensors_of_symbolic_sizes_are_checked_each_time():
    shapes = torch.fx.experimental.symbolic_shapes.ShapeEnv()
    with FakeTensorMode(shape_env=shapes) as mode:
        rows = mode.from_tensor(torch.ones(7, 3))  # of a symbolic number
        for _ in range(2):
            assert scale(rows, rows).shape == rows.shape
            assert "argument 'y'" in error(scale, rows, rows[:-1])


def test_calls_that_never_repeat_do_not_pile_up():
    for n in range(1000):
        scale(torch.empty(n, 1), torch.empty(n, 1))
    assert len(inspect.getclosurevars(scale).nonlocals["passed"]) <= 256


def test_the_compiler_stays_out_where_a_graph_broke():
    @typed
    def break_graph(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        torch._dynamo.graph_break()
        return scale(x, x)

    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: break_graph(x + 1) * 2, backend=backend, dynamic=True)
    for n in (2, 3, 2, 4):
        assert torch.equal(compiled(torch.ones(n, 3)), torch.full((n, 3), 16.0))
    assert len(graphs) <= 3  # before the break, after it, and after the call


# -------------------------------------------------------------------------- when it is gone


def refused_by(check):
    """True when a wrong size still raises the decorator's own error."""
    try:
        check(torch.ones(2, 3), torch.ones(1, 3))
    except TypeError as caught:
        return "argument 'y'" in str(caught)
    return False


def test_it_is_on_in_eager_mode():
    assert refused_by(scale)


def test_it_is_gone_under_compile():
    torch._dynamo.reset()
    compiled = torch.compile(scale, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X, X), scale(X, X))
    # Sizes that broadcast pass, as the bare function lets them.
    assert not refused_by(compiled)
    assert torch.equal(compiled(X, X[:1]), 4 * X)


def test_it_is_gone_under_export():
    class Scale(torch.nn.Module):
        def forward(self, x, y):
            return scale(x, y)

    exported = torch.export.export(Scale(), (X, X[:1])).module()
    assert torch.equal(exported(X, X[:1]), 4 * X)
    calls = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert {"aten.add.Tensor", "aten.mul.Tensor"} <= calls


def test_records_pass_compile_and_export():
    record = Record(torch.ones(4, 3, 2), torch.ones(4).bool())
    torch._dynamo.reset()
    compiled = torch.compile(unpack, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(record, torch.ones(4, 3)), unpack(record, torch.ones(4, 3)))


def test_it_checks_the_entry_under_vmap():
    batch = torch.rand(5, 2, 3)
    assert torch.equal(torch.vmap(scale)(batch, batch), 4 * batch)
    with pytest.raises(TypeError, match=r"argument 'y' .* n=2, d=3, .* shape \(2, 4\)"):
        torch.vmap(scale)(batch, torch.rand(5, 2, 4))


def test_it_checks_under_grad():
    grad = torch.func.grad(lambda x: scale(x, x).sum())(X)
    assert torch.equal(grad, 4 * torch.ones_like(X))


SWITCHED_OFF = """
import torch
from densekit.typing import Float, Tensor, typed

def bare(x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    return x

assert typed(bare) is bare

from densekit import image_to_view, negative_cosine
assert not hasattr(negative_cosine, "__wrapped__")
try:
    negative_cosine(torch.ones(4, 3), torch.ones(4, 2))
except RuntimeError:
    pass  # torch's own words, not ours
else:
    raise AssertionError("no error")
"""


def test_the_environment_variable_switches_it_off():
    root = Path(densekit.__file__).parents[1]
    env = {**os.environ, "DENSEKIT_TYPECHECK": "0", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", SWITCHED_OFF], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------- metadata


def test_name_doc_module_and_signature_are_the_functions():
    assert scale.__name__ == "scale"
    assert scale.__qualname__ == "scale"
    assert scale.__doc__ == "Doc of scale."
    assert scale.__module__ == __name__
    signature = inspect.signature(scale)
    assert list(signature.parameters) == ["x", "y", "by"]
    assert signature.parameters["by"].default == 2.0
    assert signature.parameters["x"].annotation.dim_str == "n d"
    assert inspect.signature(unpack).parameters["record"].annotation is Record


def test_the_bare_function_is_left_as_it_was():
    def bare(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return x

    before = dict(vars(bare)), inspect.signature(bare)
    assert typed(bare).__wrapped__ is bare
    assert (dict(vars(bare)), inspect.signature(bare)) == before


@pytest.mark.parametrize("name", densekit.__all__)
def test_every_public_function_is_typed_and_documented(name):
    member = getattr(densekit, name)
    assert member.__doc__
    if inspect.isfunction(member):
        assert inspect.isfunction(member.__wrapped__)
        signature = inspect.signature(member)
        assert signature.return_annotation is not inspect.Signature.empty


def test_the_aliases_are_jaxtypings():
    count, byte = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.uint8)
    assert isinstance(count, Integer[Tensor, "2"])
    assert isinstance(byte, Integer[Tensor, "2"])
    assert not isinstance(torch.zeros(2), Integer[Tensor, "2"])
    assert Float is jaxtyping.Float
    assert Bool is jaxtyping.Bool
