"""Selection as design and paper state it, one token at a time, in exact fractions: the oracle of the fast version."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def brute_force_selection(
    mass: Sequence[float],
    seen_by: Sequence[int],
    droppable: Sequence[bool],
    p: float,
    rule: str = "top_p",
    rank_by: str = "normalized",
) -> list[bool]:
    """The kept members of one row's droppable set. ``p`` and the masses are taken at their exact binary value."""
    members = [index for index, may_drop in enumerate(droppable) if may_drop]
    exact = {index: Fraction(mass[index]) for index in members}
    if not members:
        return [False] * len(mass)
    if rule == "threshold":
        floor = (1 - Fraction(p)) * max(exact.values())
        return [index in exact and exact[index] >= floor for index in range(len(mass))]
    size = top_p_size if rule == "top_p" else top_k_size
    count = size(list(exact.values()), Fraction(p))
    rank = {i: exact[i] / max(1, seen_by[i]) if rank_by == "normalized" else exact[i] for i in members}
    kept = set(sorted(members, key=lambda index: (-rank[index], index))[:count])
    return [index in kept for index in range(len(mass))]


def top_k_size(masses: Sequence[Fraction], p: Fraction) -> int:
    return math.ceil(p * len(masses))


def top_p_size(masses: Sequence[Fraction], p: Fraction) -> int:
    """Smallest count, at least 1, whose largest masses reach p of the total; all of them at p = 1."""
    if p == 1:
        return len(masses)
    target = p * sum(masses)
    reached, count = Fraction(0), 0
    for value in sorted(masses, reverse=True):
        reached, count = reached + value, count + 1
        if reached >= target:
            break
    return count
