"""A bank of keys, first in, first out: the negatives of MoCo and its family."""

from typing import NamedTuple

import torch
from densekit.numerics import fit_valid, sample_uniform, take_rows
from densekit.typing import Bool, Float, Int, Tensor, typed

__all__ = ["Bank", "Negatives", "bank_negatives", "init_bank", "push_to_bank", "sample_keys"]


class Bank(NamedTuple):
    """The newest keys. A checkpoint of its three tensors is all that a resumed run needs.

    Attributes:
        features: One key a row; rows that were never filled are zero.
        cursor: The row that the next key goes to, which is the oldest of a full bank.
        filled: How many rows hold a key.
    """

    features: Float[Tensor, "size d"]
    cursor: Int[Tensor, ""]
    filled: Int[Tensor, ""]


class Negatives(NamedTuple):
    """Keys that a loss tells the own key from.

    Attributes:
        features: Keys, such as all rows of a bank.
        valid: True for those to use, such as the rows that have been filled.
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
    """Make a bank, empty or full of random directions.

    Args:
        size: Rows; once they are full, a new key replaces the oldest.
        dim: Length of a key.
        random: Fill it with random unit vectors, as MoCo does. They count as keys, and as easy
            negatives, until real ones replace them; an empty bank has no negatives at first.
        generator: Source of the random numbers, on the bank's device; the same on every process.
        dtype: Of the rows; bfloat16 halves the memory, and a key in it is off by at most 0.4 %.
        device: Where to make it.

    Returns:
        The bank.

    Raises:
        ValueError: The size or the length is not positive, or the dtype is not a floating one.

    Examples:
        >>> bank = init_bank(65536, 128)
        >>> bank.features.shape, int(bank.filled)
        (torch.Size([65536, 128]), 0)

    References:
        MoCo, Sec 3.2 (dictionary as a queue); DUPR, Sec 3.2 (one for each level and kind).
    """
    if size < 1 or dim < 1 or not dtype.is_floating_point:
        raise ValueError(
            f"densekit.bank.init_bank: size is {size}, dim {dim} and dtype {dtype}; give at least "
            "one row and one number a row, of a floating dtype."
        )
    features = torch.zeros(size, dim, device=device)
    if random:
        rows = torch.randn(size, dim, generator=generator, device=device)
        features = torch.nn.functional.normalize(rows, dim=-1)
    filled = torch.tensor(size if random else 0, device=device)
    return Bank(features.to(dtype), torch.tensor(0, device=device), filled)


@typed
def push_to_bank(
    bank: Bank, keys: Float[Tensor, "*batch d"], valid: Bool[Tensor, "*valid"] | None = None
) -> Bank:
    """Add keys to a bank, in order; each replaces the oldest.

    The number of keys may vary from call to call and exceed the bank: then the last ones stay.
    Pushing in two parts is pushing once. So that all processes hold the same bank, push the same
    keys everywhere: `push_to_bank(bank, all_gather(keys, group))`.

    Args:
        bank: Left as it is; no gradient flows.
        keys: Keys, row by row over all leading axes; detached, and cast to the bank's dtype.
        valid: Keys to add, of shape `*batch` or broadcast to it; all when left out.

    Returns:
        The new bank.

    Raises:
        TypeError: The keys have another length than the bank's, or `valid` does not fit.

    Examples:
        >>> bank = push_to_bank(init_bank(2, 1), torch.tensor([[1.0], [2.0], [3.0]]))
        >>> bank.features.flatten(), int(bank.cursor), int(bank.filled)
        (tensor([3., 2.]), 1, 2)

    References:
        MoCo, Sec 3.2 and Algorithm 1; DUPR, Sec 3.2.
    """
    features, cursor, filled = bank
    size = features.shape[0]
    shape = keys.shape[:-1]
    valid = fit_valid("bank.push_to_bank", valid, shape)
    use = torch.ones(shape, dtype=torch.bool, device=keys.device) if valid is None else valid
    use = use.flatten()
    place = use.long().cumsum(0)  # from 1, among the keys to use
    count = use.long().sum()
    # A key that does not stay writes the newest one once more (or what is there): no change.
    last = (cursor + count - 1) % size
    keys = keys.detach().reshape(-1, features.shape[1]).to(features.dtype)
    known = torch.cat([keys, features.index_select(0, last[None])])
    newest = torch.cat([torch.where(use, place, -1), place.new_zeros(1)]).argmax()
    stays = use & (place > count - size)
    row = torch.where(stays, (cursor + place - 1) % size, last)
    keys = torch.where(stays[:, None], keys, known.index_select(0, newest[None]))
    features = features.index_copy(0, row, keys)
    return Bank(features, (cursor + count) % size, (filled + count).clamp(max=size))


@typed
def bank_negatives(bank: Bank) -> Negatives:
    """The keys of a bank as the negatives of `info_nce`: only the rows that have been filled.

    The shape does not depend on how full the bank is, so that nothing is compiled twice and no
    device waits: `info_nce(query, key, bank_negatives(bank), temperature=0.2)`.

    Args:
        bank: The bank.

    Returns:
        All rows, and which of them hold a key.

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
    keys: Float[Tensor, "*batch n d"], count: int, *, generator: torch.Generator | None = None
) -> Float[Tensor, "*batch count d"]:
    """Draw some keys of each image, without replacement, so that a bank does not turn too fast.

    Args:
        keys: n keys for each image.
        count: How many to draw.
        generator: Source of the random numbers, on the keys' device.

    Returns:
        The drawn keys, in random order.

    Raises:
        ValueError: The count is negative or above n.

    Examples:
        >>> sample_keys(torch.rand(8, 49, 128), 4).shape
        torch.Size([8, 4, 128])

    References:
        DUPR, Sec 3.2 (4 of the S x S patches of an image, for each level).
    """
    n = keys.shape[-2]
    if not 0 <= count <= n:
        raise ValueError(f"densekit.bank.sample_keys: count is {count} of {n} keys; give 0 to {n}.")
    draws = sample_uniform(keys.shape[:-1], keys, generator=generator)
    return take_rows(keys, draws.topk(count).indices)
