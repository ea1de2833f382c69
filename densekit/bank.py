"""A bank of keys, first in, first out: the source of negatives in MoCo and related methods."""

from typing import NamedTuple

import torch
from densekit.numerics import check, fit_valid, refuse_maps, sample_uniform, take_rows
from densekit.typing import Bool, Float, Int, Tensor, typed

__all__ = ["Bank", "Negatives", "bank_negatives", "init_bank", "push_to_bank", "sample_keys"]


class Bank(NamedTuple):
    """The newest keys. A resumed run needs only the three tensors of the bank in the checkpoint.

    `torch.save(bank, path)` writes a bank that `torch.load(path)` reads, also with its default
    `weights_only=True`, in a program that imports densekit. For other programs save a dict of
    tensors, `torch.save(bank._asdict(), path)`, and read it with `Bank(**torch.load(path))`.

    Attributes:
        features: One key in each row; rows that have not been filled are zero.
        cursor: The row of the next key, which in a full bank is the row of the oldest key.
        filled: Number of rows that contain a key.
    """

    features: Float[Tensor, "size d"]
    cursor: Int[Tensor, ""]
    filled: Int[Tensor, ""]


torch.serialization.add_safe_globals([Bank])


class Negatives(NamedTuple):
    """Keys that a query's own key is contrasted with.

    Attributes:
        features: Keys, for example all rows of a bank.
        valid: True for the keys to use, for example the rows that have been filled.
    """

    features: Float[Tensor, "*shared m d"]
    valid: Bool[Tensor, "*shared m"]


@typed
def init_bank(
    size: int,
    dim: int,
    *,
    random: bool = False,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Bank:
    """Make a bank that is empty or full of random directions.

    Args:
        size: Number of rows; when all are filled, a new key replaces the oldest.
        dim: Length of a key.
        random: Fill the bank with random unit vectors, as MoCo does. They count as keys, and are
            easy negatives, until real keys replace them. An empty bank has no negatives at first.
        generator: Source of the random numbers, on the bank's device, in the same state on every
            process.
        dtype: Dtype of the rows; bfloat16 halves the memory, and changes a key by at most 0.4 %.
        device: Device of the bank.

    Returns:
        The bank.

    Raises:
        ValueError: The size or the length is not positive, or the dtype is not a floating dtype of
            16 bits or more.

    Examples:
        >>> bank = init_bank(65536, 128)
        >>> bank.features.shape, int(bank.filled)
        (torch.Size([65536, 128]), 0)

    References:
        MoCo, Sec 3.2 (dictionary as a queue); DUPR, Sec 3.2 (one for each level and kind).
    """
    check("bank.init_bank", "size", size, size >= 1, "1 or more")
    check("bank.init_bank", "dim", dim, dim >= 1, "1 or more")
    check("bank.init_bank", "dtype", dtype, dtype.is_floating_point, "a floating dtype")
    check("bank.init_bank", "dtype", dtype, dtype.itemsize > 1, "one of 16 bits or more")
    features = torch.zeros(size, dim, dtype=torch.float32, device=device)
    if random:
        rows = torch.randn(size, dim, generator=generator, dtype=torch.float32, device=device)
        features = torch.nn.functional.normalize(rows, dim=-1)
    filled = torch.tensor(size if random else 0, device=device)
    return Bank(features.to(dtype), torch.tensor(0, device=device), filled)


@typed
def push_to_bank(
    bank: Bank, keys: Float[Tensor, "*batch d"], valid: Bool[Tensor, "*valid"] | None = None
) -> Bank:
    """Add keys to a bank, in order; each key replaces the oldest one.

    Push keys that `l2_normalize` returned, and `info_nce(..., normalized=True)` need not normalize
    the whole bank in every step.

    Call it after the loss of a batch. A key that is pushed before is a negative of its own query,
    and then no loss of this query is below log 2 = 0.69, however well the two agree.

    The number of keys may vary between calls. If it exceeds the size of the bank, the last keys
    remain. Two calls with parts of the keys give the same bank as one call with all of them. To
    have the same bank on all processes, push the same keys on each: `push_to_bank(bank,
    all_gather(keys, group))`.

    Args:
        bank: The bank; it is not modified, and no gradient flows.
        keys: Keys, row by row over all leading axes; they are detached and converted to the bank's
            dtype.
        valid: Keys to add, of shape `*batch`; an axis may have size 1. By default all. One value
            for each image of keys (b, n, d) is `valid[:, None]`.

    Returns:
        The new bank.

    Raises:
        TypeError: The length of the keys is not that of the bank's keys, or `valid` does not match,
            or keys look like maps.

    Examples:
        >>> bank = push_to_bank(init_bank(2, 1), torch.tensor([[1.0], [2.0], [3.0]]))
        >>> bank.features.flatten(), int(bank.cursor), int(bank.filled)
        (tensor([3., 2.]), 1, 2)

    References:
        MoCo, Sec 3.2 and Algorithm 1; DUPR, Sec 3.2.
    """
    refuse_maps("bank.push_to_bank", "keys", keys)
    features, cursor, filled = bank
    size = features.shape[0]
    shape = keys.shape[:-1]
    valid = fit_valid("bank.push_to_bank", valid, shape)
    use = torch.ones(shape, dtype=torch.bool, device=keys.device) if valid is None else valid
    use = use.flatten()
    number = use.long().cumsum(0)  # numbers the keys to use, from 1
    count = use.long().sum()
    # A key that does not remain writes the newest key (or the row's own content) again, which
    # changes nothing.
    last = (cursor + count - 1) % size
    keys = keys.detach().reshape(-1, features.shape[1]).to(features.dtype)
    known = torch.cat([keys, features.index_select(0, last[None])])
    newest = torch.cat([torch.where(use, number, -1), number.new_zeros(1)]).argmax()
    stays = use & (number > count - size)
    row = torch.where(stays, (cursor + number - 1) % size, last)
    keys = torch.where(stays[:, None], keys, known.index_select(0, newest[None]))
    features = features.index_copy(0, row, keys)
    return Bank(features, (cursor + count) % size, (filled + count).clamp(max=size))


@typed
def bank_negatives(bank: Bank) -> Negatives:
    """Return the keys of a bank as negatives of `info_nce`; only filled rows are valid.

    The shape does not depend on the number of filled rows, so nothing is compiled twice and no
    device has to wait: `info_nce(query, key, bank_negatives(bank), temperature=0.2)`.

    Args:
        bank: The bank.

    Returns:
        All rows, and which of them contain a key.

    Examples:
        >>> bank = push_to_bank(init_bank(3, 1), torch.tensor([[1.0], [2.0]]))
        >>> bank_negatives(bank).valid
        tensor([ True,  True, False])

    References:
        MoCo, Sec 3.2; DUPR, Eq 5 and 6.
    """
    row = torch.arange(bank.features.shape[0], device=bank.features.device)
    return Negatives(bank.features, row < bank.filled)


@typed
def sample_keys(
    keys: Float[Tensor, "*batch n d"],
    count: int,
    *,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "*batch n"] | None = None,
) -> Float[Tensor, "*batch count d"]:
    """Randomly select `count` keys per image, without replacement.

    Pushing only a few keys per image into a bank keeps its keys for more steps.

    Args:
        keys: n keys for each image.
        count: Number of keys to select per image.
        generator: Source of the random numbers, on the keys' device.
        noise: Uniform numbers in [0, 1) from which the draw follows; by default they are drawn from
            `generator`.

    Returns:
        The selected keys, in random order.

    Raises:
        TypeError: The keys look like maps, or the shapes do not match.
        ValueError: The count is negative or above n.

    Examples:
        >>> sample_keys(torch.rand(8, 49, 128), 4).shape
        torch.Size([8, 4, 128])

    References:
        DUPR, Sec 3.2 (4 of the S x S patches of an image, for each level).
    """
    refuse_maps("bank.sample_keys", "keys", keys)
    n = keys.shape[-2]
    if not 0 <= count <= n:
        raise ValueError(
            f"densekit.bank.sample_keys: count is {count}, but there are {n} keys; give 0 to {n}."
        )
    draws = sample_uniform(keys.shape[:-1], keys, generator=generator, noise=noise)
    return take_rows(keys, draws.topk(count).indices)
