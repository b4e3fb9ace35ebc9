"""Single linkage: the nearest two clusters become one, until no edge joins any two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Merge:
    """Two clusters that became one; each lists its members in the order in which they are drawn.

    Attributes:
        left: members of one.
        right: members of the other.
        height: length of the shortest edge between them.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    height: float


def single_linkage(
    n: int, edges: Iterable[tuple[float, int, int]]
) -> tuple[tuple[Merge, ...], tuple[tuple[int, ...], ...]]:
    """The merges of `n` points, shortest edge first, and the clusters that are left: one for each connected part.

    Args:
        n: points 0 to n - 1.
        edges: (length, point, point); points without an edge between them are never merged over it.

    Example:
        >>> merges, clusters = single_linkage(4, [(5.0, 0, 2), (1.0, 2, 3), (9.0, 0, 3)])
        >>> [(m.left, m.right, m.height) for m in merges], clusters
        ([((2,), (3,), 1.0), ((0,), (2, 3), 5.0)], ((0, 2, 3), (1,)))
    """
    cluster_of: dict[int, tuple[int, ...]] = {point: (point,) for point in range(n)}
    merges = []
    for length, first, second in sorted(edges):
        left, right = cluster_of[first], cluster_of[second]
        if left != right:
            merges.append(Merge(left, right, length))
            cluster_of |= dict.fromkeys(left + right, left + right)
    return tuple(merges), tuple(dict.fromkeys(cluster_of.values()))
