"""Baselines that learn, the paired bootstrap, and the results file."""

from __future__ import annotations

import csv
import itertools
from concurrent.futures import ThreadPoolExecutor
from math import sqrt

import numpy as np
import pyarrow as pa
import pytest
import torch

from nezha_vllm.data.dataset import Dataset
from nezha_vllm.training.baselines import ItemKnn, Popularity
from nezha_vllm.training.comparison import Comparison, compare, differences
from nezha_vllm.training.metrics import gains, hits, ndcg, ranks_of, summary
from nezha_vllm.training.results import COLUMNS, append, data_hash
from nezha_vllm.training.sasrec import PADDING, SasRec, SasRecModel, SasRecOptions
from nezha_vllm.training.significance import paired_bootstrap

pytestmark = pytest.mark.usefixtures("one_thread")
ITEMS = [f"i{number:02}" for number in range(24)]
SMALL = SasRecOptions(
    hidden=32, layers=1, dropout=0.0, learning_rate=1e-2, batch_size=16, epochs=25, patience=25, max_history=4
)


@pytest.fixture(scope="module")
def rings():
    """Users walk round a ring of items in steps of one or of five."""
    sequences = [
        [ITEMS[(start + step * turn) % len(ITEMS)] for turn in range(12)] for start in range(24) for step in (1, 5)
    ]
    users = [f"u{number}" for number in range(len(sequences))]
    return Dataset("rings", users, sequences, pa.table({"item_id": ITEMS, "title": ITEMS, "text": ITEMS}))


def comparison(rows, options=None):
    seconds = dict.fromkeys(rows, 1.5)
    return Comparison("rings", "test", 48, 24, False, 6, 10, "v1", rows, seconds=seconds, options=options or {})


def test_item_knn_sums_cosines_over_the_history():
    rng = np.random.default_rng(0)
    names = list("abcdefg")
    sequences = [rng.choice(names, size=rng.integers(1, 6)).tolist() for _ in range(30)]
    met = {name: {user for user, items in enumerate(sequences) if name in items} for name in names}

    def similarity(one, other):
        return 0 if one == other else len(met[one] & met[other]) / sqrt(len(met[one]) * len(met[other]))

    knn, popular = ItemKnn(sequences, names), Popularity(sequences, names).order
    for history in (["a"], ["b", "b", "c"], list("gfe")):
        score = {name: sum(similarity(name, item) for item in set(history)) for name in names}
        found = knn.recommend(history)
        assert sorted(found) == names
        assert [score[name] for name in found] == pytest.approx(sorted(score.values(), reverse=True), abs=1e-6)
    assert knn.recommend(["never seen"]) == popular


def test_item_knn_keeps_the_nearest_neighbours_alone():
    sequences = [["a", "b"], ["a", "b"], ["a", "c"], ["c", "d"], ["d"], ["d"], ["d"]]
    assert ItemKnn(sequences, list("abcd")).recommend(["a"])[:2] == ["b", "c"]
    # c is no neighbour any more, so the rest is by popularity
    assert ItemKnn(sequences, list("abcd"), neighbours=1).recommend(["a"]) == ["b", "d", "a", "c"]


def test_sasrec_learns_and_keeps_the_best_epoch(rings):
    split, lines = rings.leave_one_out(), []
    model = SasRec(split.train, rings.item_ids, split.train, split.valid_target, SMALL, write=lines.append)
    best = max(float(line.rsplit(" ", 1)[1]) for line in lines)
    found = ndcg(ranks_of(split.valid_target, model.recommend_all(split.train, 10)), 10)
    assert found == pytest.approx(best, abs=1e-4)
    ranks = ranks_of(split.test_target, model.recommend_all(split.history("test"), 10))
    assert summary(ranks)["hit@5"] > 0.9
    assert len(model.recommend(split.train[0])) == len(ITEMS)


def test_sasrec_is_repeatable_and_leaves_the_random_state_alone(rings):
    split, short = rings.leave_one_out(), SasRecOptions(hidden=32, layers=1, epochs=2, batch_size=16, max_history=4)
    torch.manual_seed(5)
    untouched = torch.rand(1)
    torch.manual_seed(5)
    lists = [
        SasRec(split.train, ITEMS, split.train, split.valid_target, short).recommend_all(split.train[:4], 24)
        for _ in range(2)
    ]
    assert torch.rand(1) == untouched
    assert lists[0] == lists[1]


def test_sasrec_sees_neither_padding_nor_the_future():
    model = SasRecModel(9, SasRecOptions(hidden=32, max_history=6)).eval()
    plain = model(torch.tensor([[3, 4, 5]]))
    assert torch.allclose(model(torch.tensor([[3, 4, 5, PADDING, PADDING]]))[:, :3], plain, atol=1e-6)
    assert torch.allclose(model(torch.tensor([[3, 4, 9]]))[:, :2], plain[:, :2], atol=1e-6)
    assert not torch.allclose(model(torch.tensor([[2, 4, 5]]))[:, 2], plain[:, 2], atol=1e-3)


def test_the_bootstrap_agrees_with_resampling_users_one_by_one():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 30, 400), rng.integers(0, 36, 400)
    found = paired_bootstrap(gains(a, 10), gains(b, 10))
    gap = gains(a, 10) - gains(b, 10)
    means = gap[rng.integers(0, 400, (10_000, 400))].mean(1)
    assert found.mean == pytest.approx(gap.mean())
    assert [found.low, found.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=2e-3)
    assert found.p == pytest.approx(2 * min((means <= 0).mean(), (means >= 0).mean()), abs=0.03)


def test_the_bootstrap_pairs_users():
    a = np.tile([1.0, 0.0], 200)
    assert paired_bootstrap(a, a) == (0, 0, 0, 1)
    # a user's two figures stay together: the same small gain for everyone is certain, however users differ
    certain = paired_bootstrap(a + 0.01, a)
    assert certain.low == pytest.approx(0.01)
    assert certain.p < 0.001
    with pytest.raises(ValueError, match="pairs users"):
        paired_bootstrap(a, a[1:])


def test_metrics_are_means_over_users():
    ranks = np.array([0, 4, 9, 10])
    assert hits(ranks, 10).tolist() == [1, 1, 1, 0]
    assert gains(ranks, 10).mean() == pytest.approx(ndcg(ranks, 10))


def test_results_grow_by_one_line_a_run_whoever_writes(rings, tmp_path):
    path, figures = tmp_path / "deep" / "runs.csv", dict.fromkeys(("hit@5", "hit@10", "ndcg@5", "ndcg@10"), 0.25)
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(
                append,
                path,
                comparison(dict.fromkeys(("NEZHA", "popularity"), figures), {"NEZHA": {"seed": seed}}),
                rings,
            )
            for seed in range(8)
        ]
    for job in jobs:
        job.result()
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == COLUMNS
    assert sorted(line["seed"] for line in lines if line["method"] == "NEZHA") == [str(seed) for seed in range(8)]
    assert {line["data_hash"] for line in lines} == {data_hash(rings)}
    assert lines[0]["ndcg@10"] == "0.250000"
    assert lines[0]["seconds"] == "1.5"


def test_a_file_with_other_columns_is_no_results_file(rings, tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="name a new file"):
        append(path, comparison({}), rings)
    assert path.read_text() == "a,b\n1,2\n"


def test_the_data_hash_sees_the_order_of_items(rings):
    changed = [list(items) for items in rings.sequences]
    changed[3][:2] = changed[3][1::-1]
    hashes = {data_hash(Dataset("x", rings.users, order, rings.items)) for order in (rings.sequences, changed)}
    assert len(hashes) == 2


def test_unknown_baselines_are_named(rings):
    with pytest.raises(ValueError, match="no baseline magic"):
        compare(None, None, rings, part="test", max_history=6, baselines=["magic"])


def test_differences_show_every_baseline():
    gap = {metric: {"mean": 0.01, "low": 0.0, "high": 0.02, "p": 0.04} for metric in ("hit@10", "ndcg@10")}
    view = differences(
        Comparison("d", "test", 1, 1, False, 1, 1, "v", {}, against={"popularity": gap, "item kNN": gap})
    )
    assert view.row_count == 2
    cells = list(itertools.chain(*(column.cells for column in view.columns)))
    assert "+0.0100 (+0.0000 … +0.0200)" in cells
