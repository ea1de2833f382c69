"""Differentiable sorting: a fixed network of comparisons, each of which mixes its two values.

Half precision is converted to float32.
"""

import math
from typing import Literal, NamedTuple

import torch
from densekit.numerics import check_temperature, in_range, widened
from densekit.typing import Float, Scalar, Tensor, typed

__all__ = ["SoftSort", "soft_sort"]

Network = Literal["bitonic", "odd_even"]


class SoftSort(NamedTuple):
    """Values in ascending order, as far as the steepness separates them.

    Attributes:
        sorted: The mixed values; their sum is that of the values.
        plan: Share of each value (row) at each rank (column); rows and columns sum to 1.
    """

    sorted: Float[Tensor, "*batch n"]
    plan: Float[Tensor, "*batch n n"]


@typed
def soft_sort(
    values: Float[Tensor, "*batch n"], *, steepness: Scalar, network: Network = "bitonic"
) -> SoftSort:
    r"""Sort values in ascending order, so that gradients flow through the order.

    A sorting network compares fixed pairs of wires a and b, layer by layer. A comparison mixes the
    two values: with $\alpha = 1/2 + \arctan(s (b - a)) / \pi$ and the steepness $s$, the smaller
    one becomes $\alpha a + (1 - \alpha) b$ and the larger one $(1 - \alpha) a + \alpha b$. The plan
    is the product of all these mixtures, so `sorted = values @ plan`.

    The steepness counts against the spread of the values: values c times as large are sorted as by
    c times the steepness. As it grows, the result becomes that of `torch.sort`; values that are
    equal always mix in equal shares.

    Args:
        values: n values in each set.
        steepness: Steepness of the comparisons; as a tensor it gets a gradient, and is not checked.
        network: "bitonic" has `k (k + 1) / 2` layers, where `2^k` is the power of two from n on;
            "odd_even" compares neighbors only, has n layers, and mixes more.

    Returns:
        The sorted values and the plan, in at least float32.

    Raises:
        ValueError: The steepness is not above 0.

    Examples:
        >>> found = soft_sort(torch.tensor([3.0, 1.0, 2.0]), steepness=1e6)
        >>> found.sorted.round(decimals=3)
        tensor([1., 2., 3.])
        >>> found.plan.argmax(-1)  # the rank of each value
        tensor([2, 0, 1])

    References:
        Petersen et al., Monotonic Differentiable Sorting Networks, Eq 4 and Sec 4 (Cauchy).
    """
    check_temperature("sorting.soft_sort", steepness, "steepness")
    x = widened(values)
    n = x.shape[-1]
    steepness = in_range(steepness, x.dtype)
    plan = torch.eye(n, dtype=x.dtype, device=x.device).expand(*x.shape, n)
    partners, signs = _layers(n, network)
    indices = torch.tensor(partners, dtype=torch.long, device=x.device)
    for index, sign in zip(indices, x.new_tensor(signs), strict=True):
        other = x.index_select(-1, index)
        reach = steepness * sign * (other - x)
        one = torch.ones_like(reach)
        keep = torch.atan2(one, -reach) / math.pi  # 1/2 + atan(reach) / pi, exact near 0 too
        give = torch.atan2(one, reach) / math.pi
        x = keep * x + give * other
        swapped = plan.index_select(-1, index)
        plan = keep[..., None, :] * plan + give[..., None, :] * swapped
    return SoftSort(x, plan)


def _layers(n: int, network: Network) -> tuple[list[list[int]], list[list[float]]]:
    """List the layers of a network on n wires.

    Returns:
        For each layer, the partner of each wire; and 1 for each wire that gets the smaller value,
        -1 for the one that gets the larger. A wire without a partner is its own partner: its value
        is mixed with itself, which changes nothing.
    """
    partners = []
    signs = []
    pairs = _odd_even(n) if network == "odd_even" else _bitonic(n)
    for layer in pairs or [[]]:  # without a pair, the plan still has the values' graph
        partner = list(range(n))
        sign = [1.0] * n
        for smaller, larger in layer:
            partner[smaller] = larger
            partner[larger] = smaller
            sign[larger] = -1.0
        partners.append(partner)
        signs.append(sign)
    return partners, signs


def _odd_even(n: int) -> list[list[tuple[int, int]]]:
    """List the pairs (smaller, larger) of each layer: neighbors, every second one in turn."""
    return [[(i, i + 1) for i in range(layer % 2, n - 1, 2)] for layer in range(n)]


def _bitonic(n: int) -> list[list[tuple[int, int]]]:
    """List the pairs (smaller, larger) of each layer: sorted runs are merged two by two.

    The n wires are the last ones of a network whose size is a power of two; comparisons with a wire
    in front of them are left out.
    """
    stages = max(n - 1, 0).bit_length()
    missing = 2**stages - n
    layers = []
    for stage in range(stages):
        for distance in [2**power for power in range(stage, -1, -1)]:
            layer = []
            for i in range(missing, 2**stages - distance):
                if i & distance:
                    continue
                low = i - missing
                high = low + distance
                is_falling = (i >> (stage + 1)) & 1
                if is_falling:
                    layer.append((high, low))
                else:
                    layer.append((low, high))
            layers.append(layer)
    return layers
