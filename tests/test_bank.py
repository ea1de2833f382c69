"""The bank against a deque, and what a run asks of it: halves, resumption, processes, negatives."""

import io
from collections import deque
from dataclasses import dataclass
from functools import partial

import harness
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import on_processes
from scipy import stats
from strategies import batches, generators, tensors, uniform, valid_rows
from torch import nn
from densekit import (
    Bank,
    all_gather,
    bank_negatives,
    info_nce,
    init_bank,
    push_to_bank,
    sample_keys,
)

# Python 3.12 warns of any fork beside threads; these children touch nothing that a thread holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

SHAPES = ((), (0,), (1,), (3,), (4, 2), (2, 0), (1, 2, 3))
"""Leading axes of what is pushed: nothing, one key, less than a bank, and more than one."""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@st.composite
def pushes(draw, dim, shapes=SHAPES):
    """Keys with the rows of them to use: all (None), or a mask whose axes may have size 1."""
    shape = draw(st.sampled_from(shapes))
    keys = draw(tensors((*shape, dim)))
    if draw(st.booleans()):
        return keys, None
    ones = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    mask = tuple(1 if one else size for one, size in zip(ones, shape, strict=True))
    return keys, draw(valid_rows(mask))


@st.composite
def banks(draw):
    """A bank, empty, partly filled or full, the oldest row anywhere."""
    size, dim = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    bank = init_bank(size, dim, dtype=torch.float64)
    return push_to_bank(bank, draw(tensors((draw(st.integers(0, 12)), dim))))


def rows_to_use(keys, valid):
    """The rows that a push adds, one by one."""
    valid = torch.ones(keys.shape[:-1], dtype=torch.bool) if valid is None else valid
    return keys[valid.expand(keys.shape[:-1])]


def oldest_first(bank):
    """The rows that hold a key, in the order in which they came."""
    full = bank.filled == len(bank.features)
    rows = bank.features.roll(-int(bank.cursor), 0) if full else bank.features
    return rows[: bank.filled]


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# --------------------------------------------------------------------------- first in, first out


@given(st.integers(1, 6), st.integers(1, 3), st.booleans(), generators(), st.data())
def test_a_bank_is_a_deque_of_bounded_length(size, dim, random, generator, data):
    bank = init_bank(size, dim, random=random, generator=generator, dtype=torch.float64)
    model, count = deque(bank.features if random else (), maxlen=size), 0
    for keys, valid in data.draw(st.lists(pushes(dim), max_size=6), label="pushes"):
        bank = push_to_bank(bank, keys, valid)
        rows = rows_to_use(keys, valid)
        model.extend(rows)
        count += len(rows)
        assert bank.filled == len(model)
        assert bank.cursor == count % size
        want = torch.stack([*model]) if model else torch.zeros(0, dim, dtype=torch.float64)
        assert torch.equal(oldest_first(bank), want)
        assert (bank.features[bank.filled :] == 0).all()


@given(banks(), st.data())
def test_pushing_in_two_parts_is_pushing_once(bank, data):
    keys, valid = data.draw(pushes(bank.features.shape[1], ((0,), (1,), (4,), (13,))), label="push")
    valid = torch.ones(len(keys), dtype=torch.bool) if valid is None else valid.expand(len(keys))
    cut = data.draw(st.integers(0, len(keys)), label="cut")
    once = push_to_bank(bank, keys, valid)
    assert_same(
        push_to_bank(push_to_bank(bank, keys[:cut], valid[:cut]), keys[cut:], valid[cut:]), once
    )


@given(banks(), st.data())
def test_what_is_not_valid_may_be_anything_and_adds_nothing(bank, data):
    keys, valid = data.draw(pushes(bank.features.shape[1], ((5,), (3, 4))), label="push")
    valid = torch.zeros(keys.shape[:-1]).bool() if valid is None else valid
    spoiled = torch.where(valid.expand(keys.shape[:-1])[..., None], keys, torch.nan)
    got = push_to_bank(bank, spoiled, valid)
    assert got.features.isfinite().all()
    assert_same(got, push_to_bank(bank, keys, valid))
    assert_same(push_to_bank(bank, spoiled, torch.zeros_like(valid)), bank)


@given(banks(), st.data())
def test_a_push_leaves_the_old_bank_and_the_keys_alone(bank, data):
    keys, valid = data.draw(pushes(bank.features.shape[1]), label="push")
    before, old = [x.clone() for x in bank], keys.clone()
    new = push_to_bank(bank, keys, valid)
    for x in new:
        x.fill_(9)  # not a view of the old one either
    assert_same(bank, before)
    assert torch.equal(keys, old)


def test_each_key_replaces_the_oldest():
    bank = init_bank(3, 1)
    states = []
    for keys in ([1.0], [2.0, 3.0], [], [4.0], [5.0, 6.0, 7.0, 8.0]):
        bank = push_to_bank(bank, torch.tensor(keys)[:, None])
        states.append((bank.features.flatten().tolist(), int(bank.cursor), int(bank.filled)))
    assert states == [
        ([1, 0, 0], 1, 1),
        ([1, 2, 3], 0, 3),
        ([1, 2, 3], 0, 3),
        ([4, 2, 3], 1, 3),
        ([7, 8, 6], 2, 3),
    ]


def test_one_valid_for_each_image_serves_all_of_its_keys():
    keys = torch.arange(6.0).view(3, 2, 1)
    bank = push_to_bank(init_bank(8, 1), keys, torch.tensor([[True], [False], [True]]))
    assert oldest_first(bank).flatten().tolist() == [0, 1, 4, 5]


def test_no_gradient_flows_into_a_bank():
    keys = torch.rand(3, 2, requires_grad=True)
    bank = push_to_bank(init_bank(4, 2), keys * 2)
    assert not any(x.requires_grad for x in bank)
    query = torch.rand(3, 2, requires_grad=True)
    loss = info_nce(query, query.detach(), bank_negatives(bank), temperature=0.2)
    assert torch.autograd.grad(loss, keys, allow_unused=True) == (None,)


@given(generators())
def test_a_bfloat16_bank_holds_the_rounded_keys_and_gives_a_loss(generator):
    keys = uniform(generator, 5, 8, low=-1, dtype=torch.float32)
    bank = push_to_bank(init_bank(4, 8, dtype=torch.bfloat16), keys)
    rounded = keys[1:].bfloat16()
    assert torch.equal(oldest_first(bank), rounded)
    assert (rounded.float() - keys[1:]).abs().max() <= 0.004 * keys.abs().max()
    query, key = (uniform(generator, 3, 8, low=-1, dtype=torch.float32) for _ in range(2))
    got = info_nce(query.requires_grad_(), key, bank_negatives(bank), temperature=0.2)
    assert got.dtype == torch.float32
    want = info_nce(query, key, rounded.float(), temperature=0.2)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(got, query)[0].isfinite().all()


def test_a_bank_stays_on_its_device_and_in_its_dtype():
    bank = init_bank(2, 3, dtype=torch.float16, device="meta")
    assert {x.device.type for x in bank} == {"meta"}
    bank = push_to_bank(init_bank(2, 3, dtype=torch.float16), torch.rand(1, 3, dtype=torch.float64))
    assert bank.features.dtype == torch.float16
    assert {bank.cursor.dtype, bank.filled.dtype} == {torch.int64}


# ------------------------------------------------------------------------------- random banks


def test_a_random_bank_is_full_of_unit_rows_in_every_direction():
    bank = init_bank(4000, 3, random=True, generator=seeded())
    assert (bank.cursor, bank.filled) == (0, 4000)
    torch.testing.assert_close(bank.features.norm(dim=-1), torch.ones(4000))
    # A coordinate of a uniform direction in space is uniform itself.
    for x in bank.features.T:
        assert stats.kstest(x, stats.uniform(-1, 2).cdf).pvalue > 1e-4
    again, other = (init_bank(4000, 3, random=True, generator=seeded(s)) for s in (0, 1))
    assert_same(again, bank)
    assert not torch.equal(other.features, bank.features)


def test_an_empty_bank_holds_zeros_and_no_key():
    bank = init_bank(3, 2)
    assert torch.equal(bank.features, torch.zeros(3, 2))
    assert (bank.cursor, bank.filled) == (0, 0)
    assert not bank_negatives(bank).valid.any()


# ---------------------------------------------------------------------------------- negatives


@given(banks(), generators())
def test_only_filled_rows_are_negatives(bank, generator):
    features, valid = bank_negatives(bank)
    assert torch.equal(features, bank.features)
    assert torch.equal(valid, torch.arange(len(valid)) < bank.filled)
    query, key = (uniform(generator, 3, features.shape[1], low=-1) for _ in range(2))
    got = info_nce(query, key, bank_negatives(bank), temperature=0.2)
    want = info_nce(query, key, oldest_first(bank), temperature=0.2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------- sampling


@given(st.data())
def test_sampled_keys_are_some_of_the_image_each_at_most_once(data):
    batch, n = data.draw(batches(), label="batch"), data.draw(st.integers(0, 6), label="n")
    count = data.draw(st.integers(0, n), label="count")
    ids = torch.arange(n, dtype=torch.float64)
    image = torch.arange(max(1, torch.Size(batch).numel()), dtype=torch.float64)
    image = image[: torch.Size(batch).numel()].view(*batch, 1).expand(*batch, n)
    keys = torch.stack([image, ids.expand(*batch, n)], -1)
    got = sample_keys(keys, count, generator=data.draw(generators(), label="generator"))
    assert got.shape == (*batch, count, 2)
    assert torch.equal(got[..., 0], image[..., :count])
    order = got[..., 1].sort(-1).values
    assert (order.diff(dim=-1) > 0).all()
    if count == n:
        assert torch.equal(order, ids.expand(*batch, n))


def test_every_choice_in_every_order_is_as_likely():
    keys = torch.arange(5.0)[:, None].expand(20_000, 5, 1)
    first, second = sample_keys(keys, 2, generator=seeded())[..., 0].long().unbind(-1)
    counts = torch.bincount(5 * first + second, minlength=25).view(5, 5)
    assert (counts.diagonal() == 0).all()
    pairs = counts[~torch.eye(5, dtype=torch.bool)]
    assert stats.chisquare(pairs).pvalue > 1e-4


def test_images_are_sampled_independently():
    keys = torch.arange(4.0)[:, None].expand(20_000, 2, 4, 1)
    one, other = sample_keys(keys, 1, generator=seeded())[..., 0, 0].long().unbind(-1)
    counts = torch.bincount(4 * one + other, minlength=16)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_a_generator_decides_the_sample():
    keys = torch.rand(6, 20, 2, generator=seeded())
    first, again, other = (sample_keys(keys, 4, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --------------------------------------------------------------------------------- compilation


def test_a_compiled_push_takes_any_number_of_keys_without_another_compilation():
    def step(bank, keys, valid, query):
        bank = push_to_bank(bank, keys, valid)
        return bank, info_nce(query, query + 1, bank_negatives(bank), temperature=0.2)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    bank = same = init_bank(7, 3)
    # Sizes that no other axis has: equal sizes would be taken for the same axis.
    for n, stance in ((5, "default"), (4, "fail_on_recompile"), (19, "fail_on_recompile")):
        keys, query = torch.rand(n, 3, generator=seeded(n)), torch.rand(2, 3, generator=seeded())
        valid = torch.arange(n) % 3 != 1
        bank, want = step(bank, keys, valid, query)
        with torch.compiler.set_stance(stance):
            same, got = compiled(same, keys, valid, query)
        assert_same(same, bank)
        torch.testing.assert_close(got, want)


# ---------------------------------------------------------------------------------- resumption


def used_bank(dtype=torch.float32):
    bank = init_bank(5, 3, dtype=dtype)
    for n in (4, 3):
        bank = push_to_bank(bank, torch.rand(n, 3, generator=seeded(n)))
    return bank


@dataclass
class Config:
    """What a run's folder asks for."""

    size: int = 5


def test_a_bank_comes_back_from_a_file():
    bank, file = used_bank(), io.BytesIO()
    torch.save(bank._asdict(), file)
    file.seek(0)
    assert_same(Bank(**torch.load(file)), bank)


def test_a_bank_itself_comes_back_from_a_file_of_weights_only():
    bank, file = used_bank(torch.bfloat16), io.BytesIO()
    torch.save({"banks": [bank]}, file)
    file.seek(0)
    (got,) = torch.load(file, weights_only=True)["banks"]
    assert type(got) is Bank
    assert_same(got, bank)


def resumed(rank, group, folder, banks, empty):
    """What the empty banks, and a tensor of theirs, hold once a run has resumed."""
    net, cursor = nn.Linear(1, 1), empty["wide"].cursor
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    world = harness.World(rank, group.size(), torch.device("cpu"))
    with harness.Run(folder, Config(), world) as run:
        run.resume(net, optimizer)
        run.save(1, net, optimizer, banks=banks)
    with harness.Run(folder, Config(), world) as run:
        assert run.resume(net, optimizer, banks=empty) == 1
    return empty, cursor


def test_banks_in_a_recipes_checkpoint_go_on_as_if_nothing_had_happened(tmp_path):
    banks = {"wide": used_bank(), "narrow": used_bank(torch.bfloat16), "empty": init_bank(5, 3)}
    empty = {name: init_bank(5, 3, dtype=bank.features.dtype) for name, bank in banks.items()}
    ((got, cursor),) = on_processes(1, resumed, tmp_path / "run", banks, empty)
    assert cursor == 2  # loaded in place
    more = torch.rand(4, 3, generator=seeded())
    for name, bank in banks.items():
        assert_same(got[name], bank)
        assert_same(push_to_bank(got[name], more), push_to_bank(bank, more))


# ----------------------------------------------------------------------------------- processes


def gathered_banks(rank, group, counts):
    """The bank after each step; a process has `counts[step][rank]` keys, tens digit its rank."""
    bank, states = init_bank(7, 1), []
    for step, count in enumerate(counts):
        ragged = len({*count}) > 1
        keys = 100.0 * step + 10 * rank + torch.arange(count[rank])[:, None]
        bank = push_to_bank(bank, all_gather(keys, group, ragged=ragged))
        states.append(bank)
    return states


@pytest.mark.parametrize("size", [1, 2])
def test_processes_that_push_gathered_keys_hold_one_bank_in_rank_order(size):
    counts = [[2, 2], [3, 0], [1, 2], [0, 0], [4, 5], [0, 1]]
    results = on_processes(size, gathered_banks, counts)
    bank = init_bank(7, 1)
    for step, count in enumerate(counts):
        keys = [100.0 * step + 10 * rank + i for rank in range(size) for i in range(count[rank])]
        bank = push_to_bank(bank, torch.tensor(keys)[:, None])
        for states in results:
            assert_same(states[step], bank)


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "value"), [("size", 0), ("size", -1), ("dim", 0), ("dtype", torch.int64)]
)
def test_a_bank_without_rows_or_numbers_is_refused(name, value):
    for random in (False, True):
        with pytest.raises(ValueError, match=f"bank.init_bank: {name} is {value}; give "):
            init_bank(**{"size": 2, "dim": 2, "random": random, name: value})


def test_keys_that_do_not_fit_are_refused():
    bank = init_bank(4, 3)
    for bad in (torch.zeros(2, 2), torch.zeros(1), torch.zeros(3, 4)):
        with pytest.raises(TypeError, match=r"bank\.push_to_bank: argument 'keys'.*d=3"):
            push_to_bank(bank, bad)
    for bad in (torch.zeros(2, 3).long(), torch.tensor(1.0), [[1.0, 2.0, 3.0]]):
        with pytest.raises(TypeError, match=r"bank\.push_to_bank: argument 'keys'"):
            push_to_bank(bank, bad)
    for bad in (
        torch.ones(3).bool(),
        torch.ones(2, 1).bool(),
        torch.ones(2),
        torch.ones(()).bool(),
    ):
        with pytest.raises(TypeError, match=r"bank\.push_to_bank: argument 'valid'"):
            push_to_bank(bank, torch.zeros(2, 3), bad)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_a_bank_counts_in_any_integer_dtype(dtype):
    wide, keys = used_bank(), torch.rand(4, 3, generator=seeded())
    narrow = wide._replace(cursor=wide.cursor.to(dtype), filled=wide.filled.to(dtype))
    assert_same(push_to_bank(narrow, keys), push_to_bank(wide, keys))
    assert_same(bank_negatives(narrow), bank_negatives(wide))


def test_what_is_no_bank_is_refused():
    bank = init_bank(4, 3)
    for field, value in (("cursor", torch.zeros(1).long()), ("filled", torch.tensor(0.5))):
        bad = bank._replace(**{field: value})
        for call in (partial(push_to_bank, bad, torch.zeros(2, 3)), partial(bank_negatives, bad)):
            with pytest.raises(TypeError, match=rf"argument 'bank\.{field}'"):
                call()


@pytest.mark.parametrize("count", [-1, 6])
def test_more_keys_than_there_are_cannot_be_sampled(count):
    with pytest.raises(ValueError, match=f"sample_keys: count is {count}, but there are 5 keys"):
        sample_keys(torch.zeros(2, 5, 3), count)


def test_a_bank_without_arithmetic_is_refused():
    with pytest.raises(ValueError, match=r"init_bank: dtype is torch.float8_e4m3fn; give one of"):
        init_bank(3, 2, dtype=torch.float8_e4m3fn)
