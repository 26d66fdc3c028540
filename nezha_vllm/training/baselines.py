"""What every recommender must beat without training: popularity, first-order Markov counts, neighbours of items."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np


class Baseline:
    """Ranks all items of ``item_ids`` for a history, best first."""

    def recommend(self, history: Sequence[str]) -> list[str]:
        raise NotImplementedError

    def recommend_all(self, histories: Sequence[Sequence[str]], n: int) -> list[list[str]]:
        """The n best for each history."""
        return [self.recommend(history)[:n] for history in histories]


class Popularity(Baseline):
    """Items by the number of times they occur in training; equal counts by item ID."""

    def __init__(self, sequences: Sequence[Sequence[str]], item_ids: Sequence[str]) -> None:
        self.counts = Counter(item for items in sequences for item in items)
        self.order = sorted(item_ids, key=lambda item: (-self.counts[item], item))

    def recommend(self, history: Sequence[str]) -> list[str]:
        return self.order


class Markov(Baseline):
    """Items by how often they came right after the last item of the history, then by popularity."""

    def __init__(self, sequences: Sequence[Sequence[str]], item_ids: Sequence[str]) -> None:
        self.popularity = Popularity(sequences, item_ids)
        self.place = {item: place for place, item in enumerate(self.popularity.order)}
        self.next_counts: dict[str, Counter[str]] = defaultdict(Counter)
        for items in sequences:
            for item, following in itertools.pairwise(items):
                self.next_counts[item][following] += 1

    def recommend(self, history: Sequence[str]) -> list[str]:
        counts = self.next_counts.get(history[-1], Counter())
        followers = sorted(counts.keys() & self.place.keys(), key=lambda item: (-counts[item], self.place[item]))
        return followers + [item for item in self.popularity.order if item not in counts]

    def recommend_all(self, histories: Sequence[Sequence[str]], n: int) -> list[list[str]]:
        lists = {last: self.recommend([last])[:n] for last in {history[-1] for history in histories}}
        return [lists[history[-1]] for history in histories]


class ItemKnn(Baseline):
    """Items by their similarity, summed over the items of the history, then by popularity.

    Similar are items that the same users met: the cosine of their columns in the users × items matrix of zeros and
    ones, kept for the ``neighbours`` nearest of each item. The order of the history does not count.
    """

    def __init__(self, sequences: Sequence[Sequence[str]], item_ids: Sequence[str], neighbours: int = 100) -> None:
        from scipy import sparse

        self.order = np.array(Popularity(sequences, item_ids).order, object)
        self.column = {item: column for column, item in enumerate(self.order.tolist())}
        cells = [(user, self.column[item]) for user, items in enumerate(sequences) for item in set(items)]
        users, columns = np.array(cells, np.int64).reshape(-1, 2).T
        shape = len(sequences), len(self.order)
        met = sparse.csc_array((np.ones(len(cells), np.float32), (users, columns)), shape=shape)
        length_M = np.sqrt(np.maximum(met.sum(0), 1))
        cosine = (met.T @ met).tocsr()
        cosine.data /= length_M[cosine.indices] * np.repeat(length_M, np.diff(cosine.indptr))
        cosine.setdiag(0)
        for start, end in itertools.pairwise(cosine.indptr):
            row = cosine.data[start:end]
            if len(row) > neighbours:
                row[row < np.partition(row, -neighbours)[-neighbours]] = 0
        cosine.eliminate_zeros()
        self.similar = cosine

    def recommend(self, history: Sequence[str]) -> list[str]:
        return self.recommend_all([history], len(self.order))[0]

    def recommend_all(self, histories: Sequence[Sequence[str]], n: int) -> list[list[str]]:
        from scipy import sparse

        known = [
            (row, self.column[item]) for row, items in enumerate(histories) for item in set(items) & self.column.keys()
        ]
        rows, columns = np.array(known, np.int64).reshape(-1, 2).T
        asked = sparse.csr_array((np.ones(len(known), np.float32), (rows, columns)), (len(histories), len(self.order)))
        score = (asked @ self.similar).tocsr()
        score.sort_indices()
        found = []
        for start, end in itertools.pairwise(score.indptr):
            # the many without a score stay in their order, by popularity
            similar, values = score.indices[start:end], score.data[start:end]
            best = similar[np.argsort(-values, kind="stable")][:n]
            rest = np.setdiff1d(np.arange(min(len(self.order), n + len(similar))), similar)[: n - len(best)]
            found.append(self.order[np.concatenate([best, rest])].tolist())
        return found
