"""What every recommender must beat: popularity, and first-order Markov counts. Both rank all items."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence


class Popularity:
    """Items by the number of times they occur in training; equal counts by item ID."""

    def __init__(self, sequences: Sequence[Sequence[str]], item_ids: Sequence[str]) -> None:
        self.counts = Counter(item for items in sequences for item in items)
        self.order = sorted(item_ids, key=lambda item: (-self.counts[item], item))

    def recommend(self, history: Sequence[str]) -> list[str]:
        return self.order


class Markov:
    """Items by how often they came right after the last item of the history, then by popularity."""

    def __init__(self, sequences: Sequence[Sequence[str]], item_ids: Sequence[str]) -> None:
        self.popularity = Popularity(sequences, item_ids)
        self.next_counts: dict[str, Counter[str]] = defaultdict(Counter)
        for items in sequences:
            for item, following in itertools.pairwise(items):
                self.next_counts[item][following] += 1

    def recommend(self, history: Sequence[str]) -> list[str]:
        followers = self.next_counts[history[-1]] if history[-1] in self.next_counts else Counter()
        # sorting is stable: items with equal counts stay in order of popularity
        return sorted(self.popularity.order, key=lambda item: -followers[item])
