"""From a stream of interactions to one time-ordered sequence a user."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from nezha_vllm.data.records import Interaction

TIE_POLICIES = ("shuffle", "file")


class Counts(NamedTuple):
    """Size of a data set."""

    users: int
    items: int
    interactions: int

    def __str__(self) -> str:
        return f"{self.users:,} users, {self.items:,} items, {self.interactions:,} interactions"


@dataclass(frozen=True)
class InteractionLog:
    """Interactions in file order, by column. User and item numbers count first appearances."""

    user_ids: list[str]
    item_ids: list[str]
    user_N: np.ndarray
    item_N: np.ndarray
    time_N: np.ndarray

    @classmethod
    def collect(cls, interactions: Iterable[Interaction]) -> InteractionLog:
        users: dict[str, int] = {}
        items: dict[str, int] = {}
        user_N, item_N, time_N = array("q"), array("q"), array("d")
        for user, item, time in interactions:
            user_N.append(users.setdefault(user, len(users)))
            item_N.append(items.setdefault(item, len(items)))
            time_N.append(0.0 if time is None else time)
        numbers = np.array(user_N, np.int64), np.array(item_N, np.int64)
        return cls(list(users), list(items), *numbers, np.array(time_N, np.float64))


def core(
    log: InteractionLog, min_per_user: int = 0, min_per_item: int = 0, among_N: np.ndarray | None = None
) -> np.ndarray:
    """Mask [N] of the largest set of interactions in which every user and every item has at least so many (k-core).

    ``among_N`` is a mask of those to choose from, by default all.
    """
    kept_N = np.ones(len(log.user_N), bool) if among_N is None else among_N
    while True:
        per_user = np.bincount(log.user_N[kept_N], minlength=len(log.user_ids))
        per_item = np.bincount(log.item_N[kept_N], minlength=len(log.item_ids))
        still_N = kept_N & (per_user[log.user_N] >= min_per_user) & (per_item[log.item_N] >= min_per_item)
        if still_N.sum() == kept_N.sum():
            return kept_N
        kept_N = still_N


def ordered(
    log: InteractionLog, kept_N: np.ndarray, ties: str = "shuffle", seed: int = 0
) -> tuple[list[str], list[list[str]]]:
    """Users and their items in time order, users by first appearance.

    Interactions of one user at one time have no order. ``file`` keeps the file's, which may be sorted by item ID and
    then leaks the held-out item; ``shuffle`` draws one from ``seed``.
    """
    if ties not in TIE_POLICIES:
        raise ValueError(f"ties must be one of {TIE_POLICIES}, got {ties!r}")
    count = len(log.user_N)
    tie_break_N = np.random.default_rng(seed).permutation(count) if ties == "shuffle" else np.arange(count)
    order = np.lexsort((tie_break_N, log.time_N, log.user_N))
    order = order[kept_N[order]]
    user_N = log.user_N[order]
    items = np.array(log.item_ids, object)[log.item_N[order]].tolist()
    starts = np.flatnonzero(np.diff(user_N, prepend=-1)).tolist()
    users = [log.user_ids[user] for user in user_N[starts].tolist()]
    return users, [items[start:end] for start, end in pairwise([*starts, len(items)])]
