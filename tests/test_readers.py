"""Readers of what people have: Amazon of three years, Yelp, CSV and Parquet, LETTER's files; the split by time."""

from __future__ import annotations

import argparse
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nezha_vllm.cli import prepare as prepare_verb
from nezha_vllm.data import dataset
from nezha_vllm.data.amazon import AmazonReader
from nezha_vllm.data.dataset import Dataset
from nezha_vllm.data.published import PUBLISHED, verdict
from nezha_vllm.data.sequence_files import SequenceReader
from nezha_vllm.data.tables import TableReader
from nezha_vllm.data.times import seconds
from nezha_vllm.data.yelp import YelpReader


def run_prepare(*words: object) -> int:
    parser = argparse.ArgumentParser()
    prepare_verb.add_arguments(parser)
    return prepare_verb.run(parser.parse_args([str(word) for word in words]))


def write_lines(path, rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


REVIEWS = [("u1", "B1", 100), ("u1", "B2", 50), ("u2", "B2", 70)]


def amazon_2014(folder):
    reviews = [{"reviewerID": u, "asin": i, "overall": 5.0, "unixReviewTime": t} for u, i, t in REVIEWS]
    # metadata of 2014 are Python literals, not JSON
    categories = "'categories': [['Beauty', 'Bath'], ['Beauty']]"
    meta = [f"{{'asin': 'B1', 'title': 'Kid\\'s Soap', 'also': '\\d', {categories}, 'brand': 'X'}}"]
    return write_lines(folder / "reviews_Beauty.json.gz", reviews), write_lines(folder / "meta_Beauty.json.gz", meta)


def amazon_2018(folder):
    reviews = [{"reviewerID": u, "asin": i, "unixReviewTime": t, "style": {"Size:": " L"}} for u, i, t in REVIEWS]
    meta = [{"asin": "B1", "title": "Kid's Soap", "category": ["Beauty", "Bath"], "brand": "X", "also_buy": ["B2"]}]
    return write_lines(folder / "Beauty.json.gz", reviews), write_lines(folder / "meta_Beauty.json.gz", meta)


def amazon_2023(folder):
    reviews = [
        {"user_id": u, "parent_asin": i, "asin": f"{i}-red", "timestamp": 10**12 + t * 1000} for u, i, t in REVIEWS
    ]
    meta = [
        {"parent_asin": "B1", "title": "Kid's Soap", "categories": ["Beauty", "Bath"], "store": "X", "images": [{}]}
    ]
    return write_lines(folder / "Beauty.jsonl", reviews), write_lines(folder / "meta_Beauty.jsonl", meta)


@pytest.mark.parametrize("year", [amazon_2014, amazon_2018, amazon_2023])
def test_amazon_reads_the_same_from_every_year(year, tmp_path):
    prepared = dataset.prepare(AmazonReader(*year(tmp_path)), "Beauty")
    assert prepared.users == ["u1", "u2"]
    assert prepared.sequences == [["B2", "B1"], ["B2"]]
    soap = next(row for row in prepared.items.to_pylist() if row["item_id"] == "B1")
    assert soap["title"] == "Kid's Soap"
    assert soap["genres"] == ["Beauty", "Bath"]
    assert soap["brand"] == "X"
    assert soap["text"] == "Kid's Soap. Genres: Beauty, Bath. brand: X."


def test_milliseconds_become_seconds(tmp_path):
    times = [found.time for found in AmazonReader(amazon_2023(tmp_path)[0]).interactions()]
    assert times == [10**9 + 100, 10**9 + 50, 10**9 + 70]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'reviewerID': ", "no JSON"),
        ("[1, 2]", "no JSON object"),
        ('{"reviewerID": "u", "unixReviewTime": 1}', "no parent_asin or asin"),
        ('{"reviewerID": "u", "asin": "B1", "unixReviewTime": "soon"}', "time 'soon' is no number"),
        ('{"reviewerID": "u", "asin": "B1"}', "time None is no finite number"),
        ('{"reviewerID": ["u"], "asin": "B1", "unixReviewTime": 1}', "no ID"),
        ("__import__('os').getcwd()", "no JSON"),
    ],
)
def test_a_broken_review_is_named_counted_and_skipped(line, reason, tmp_path):
    good = [{"reviewerID": u, "asin": i, "unixReviewTime": t} for u, i, t in REVIEWS]
    path = write_lines(tmp_path / "reviews.json", [*good, line])
    reader = AmazonReader(path, max_broken=0.5)
    assert len(list(reader.interactions())) == 3
    assert reader.broken.skipped == 1
    assert reader.broken.examples[0].startswith(f"{path}:4: ")
    assert reason in reader.broken.examples[0]
    with pytest.raises(ValueError, match="more than 1"):
        list(AmazonReader(path).interactions())


@pytest.mark.parametrize("names", [("review.json", "business.json"), ("yelp_academic_dataset_review.json.gz", "x")])
def test_yelp_reads_dates_and_businesses(names, tmp_path):
    rows = [
        {"user_id": "u", "business_id": "b", "date": "2019-03-02 10:00:00", "stars": 4},
        {"user_id": "u", "business_id": "a", "date": "2019-03-01 10:00:00", "stars": 1},
    ]
    write_lines(tmp_path / names[0], rows)
    write_lines(
        tmp_path / names[1],
        [{"business_id": "a", "name": "Sal's", "categories": "Pizza, Bars", "city": "Reno", "hours": None}],
    )
    prepared = dataset.prepare(YelpReader(tmp_path), "Yelp")
    assert prepared.sequences == [["a", "b"]]
    titles = {row["item_id"]: row["title"] for row in prepared.items.to_pylist()}
    assert titles == {"a": "Sal's" if names[1] == "business.json" else "a", "b": "b"}
    with pytest.raises(FileNotFoundError, match=r"no review\.json"):
        YelpReader(tmp_path / "absent")


TABLE = {"uid": [7, 7, 8], "sku": ["x,1", "y", "y"], "at": ["2024-01-02", "2024-01-01T10:00:00+02:00", "2024-01-03"]}


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz", "parquet"])
def test_tables_have_named_columns(ending, tmp_path):
    path, columns = tmp_path / f"log.{ending}", {"user": "uid", "item": "sku", "time": "at"}
    if ending == "parquet":
        pq.write_table(pa.table(TABLE | {"noise": [1, 2, 3]}), path)
    else:
        separator = "\t" if ending == "tsv" else ","
        rows = [separator.join([str(u), f'"{i}"', t]) for u, i, t in zip(*TABLE.values(), strict=True)]
        write_lines(path, [separator.join(TABLE), *rows])
    items = write_lines(tmp_path / "items.csv", ["sku,title", 'y,"A ""fine"" thing"'])
    prepared = dataset.prepare(TableReader(path, items, **columns), "log")
    assert prepared.users == ["7", "8"]
    assert prepared.sequences == [["y", "x,1"], ["y"]]
    assert 'A "fine" thing' in prepared.items["title"].to_pylist()
    with pytest.raises(ValueError, match=r"no column user_id, item_id; it has uid, sku, at"):
        dataset.prepare(TableReader(path, time=None), "log")
    assert next(TableReader(path, user="uid", item="sku", time=None).interactions()).time is None


def test_broken_rows_of_tables_are_named(tmp_path):
    path = write_lines(
        tmp_path / "log.csv", ["user_id,item_id,timestamp", "", "u,a,1", "u,b", 'u,"b"c,2', "u,,3", "u,c,4"]
    )
    reader = TableReader(path, max_broken=1)
    assert [found.item_id for found in reader.interactions()] == ["a", "c"]
    assert [example.split("log.csv:")[1][:2] for example in reader.broken.examples] == ["4:", "5:", "6:"]
    (tmp_path / "log.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        list(TableReader(tmp_path / "log.parquet").interactions())
    with pytest.raises(ValueError, match="a table is a"):
        TableReader(write_lines(tmp_path / "log.xlsx", ["x"]))
    pq.write_table(
        pa.table({"user_id": ["u", None], "item_id": ["a", "b"], "timestamp": [1, 2]}), tmp_path / "n.parquet"
    )
    reader = TableReader(tmp_path / "n.parquet", max_broken=1)
    assert len(list(reader.interactions())) == 1
    assert "n.parquet:2: no user_id" in reader.broken.examples[0]


def test_a_quote_that_is_not_closed_counts_for_all_it_takes_along(tmp_path):
    rows = [f"u,i{row},{row}" for row in range(40)]
    rows[30] = 'u,"i30,30'
    path = write_lines(tmp_path / "log.csv", ["user_id,item_id,timestamp", *rows])
    reader = TableReader(path, max_broken=1)
    assert len(list(reader.interactions())) == 30
    assert reader.broken.skipped == 10
    assert "log.csv:32: no CSV" in reader.broken.examples[0]


def test_a_row_of_parquet_that_python_cannot_hold_is_a_broken_line(tmp_path):
    days = pa.array([0, 10**8, 2], pa.int32()).cast(pa.date32())
    pq.write_table(
        pa.table({"user_id": ["u"] * 3, "item_id": ["a", "b", "c"], "timestamp": days}), tmp_path / "d.parquet"
    )
    reader = TableReader(tmp_path / "d.parquet", max_broken=1)
    assert list(reader.interactions()) == [("u", "a", 0.0), ("u", "c", 2 * 86400.0)]
    assert "d.parquet:2: date value out of range" in reader.broken.examples[0]


def test_times_are_seconds():
    assert seconds("1970-01-02") == seconds("86400") == seconds(86400) == 86400.0
    assert seconds("1970-01-01T02:00:00+02:00") == 0
    for wrong in ("nan", "yesterday", None, True, "1e999", 10**400):
        with pytest.raises(ValueError, match="time"):
            seconds(wrong)


def test_letter_files_and_offsets(tmp_path):
    write_lines(tmp_path / "S.inter.json", [{"0": [3, 1], "1": [1], "2": "x"}])
    write_lines(tmp_path / "S.item.json", [{"0": {"title": "Soap", "brand": "X"}, "2": {"title": "Comb"}}])
    reader = SequenceReader(tmp_path / "S.inter.json", tmp_path / "S.item.json", max_broken=1, item_offset=1)
    prepared = dataset.prepare(reader, "S")
    assert prepared.sequences == [["3", "1"], ["1"]]
    assert {row["item_id"]: row["title"] for row in prepared.items.to_pylist()} == {"1": "Soap", "3": "Comb"}
    assert "the items of user 2 are no list" in reader.broken.examples[0]


@pytest.fixture
def log(tmp_path):
    """One interaction a day for ten days by a, the last five by b, and one by c at the end."""
    rows = [f"a,i{day},{day}" for day in range(10)] + [f"b,i{day},{day}" for day in range(5, 10)] + ["c,i9,9"]
    return write_lines(tmp_path / "log.csv", ["user_id,item_id,timestamp", *rows])


def test_a_split_by_time_trains_on_what_came_before_all_that_is_held_out(log, tmp_path, capsys):
    words = ["--table", log, "--split", "time", "--valid-share", 0.25, "--test-share", 0.25, "--out", tmp_path / "out"]
    assert run_prepare(*words) == 0
    assert "split by time: 2 users train, 2 validate, 2 test" in capsys.readouterr().out
    loaded = Dataset.load(tmp_path / "out")
    valid_from, test_from = loaded.provenance["periods_from"]
    split = loaded.split()
    day = {f"i{number}": number for number in range(10)}
    assert all(day[item] < valid_from for items in split.train for item in items)
    assert all(valid_from <= day[item] < test_from for item in split.valid_target)
    assert all(day[item] >= test_from for item in split.test_target)
    assert split.users == ["a", "b"]  # c has no history
    for part in ("valid", "test"):
        for items, target in zip(split.history(part), split.target(part), strict=True):
            assert [day[item] for item in [*items, target]] == list(range(day[items[0]], day[target] + 1))


def test_times_filter_before_the_core_is_taken(log, tmp_path):
    run_prepare("--table", log, "--since", 5, "--until", 7, "--min-user", 2, "--out", tmp_path / "out")
    assert Dataset.load(tmp_path / "out").sequences == [["i5", "i6", "i7"]] * 2


def test_what_has_no_clock_is_not_cut_by_time(log, tmp_path):
    write_lines(tmp_path / "s.txt", ["u a b c"])
    for words in (
        ["--sequences", tmp_path / "s.txt", "--since", 1],
        ["--table", log, "--time-column", "none", "--split", "time"],
    ):
        with pytest.raises(ValueError, match="cannot be cut by time"):
            run_prepare(*words, "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="choose other shares"):
        run_prepare(
            "--table", log, "--split", "time", "--test-share", 0.95, "--valid-share", 0.01, "--out", tmp_path / "out"
        )
    with pytest.raises(ValueError, match="leave something to train"):
        run_prepare("--table", log, "--split", "time", "--test-share", 0.95, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_data_set_at_a_time(log, tmp_path):
    with pytest.raises(ValueError, match="one data set at a time"):
        run_prepare("--table", log, "--yelp", tmp_path, "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="--items goes with"):
        run_prepare("--yelp", tmp_path, "--items", log, "--out", tmp_path / "out")


def test_published_counts_are_compared():
    assert (
        verdict("x", PUBLISHED["Yelp of the NEZHA paper"])
        == "these are the published counts of Yelp of the NEZHA paper"
    )
    assert "Beauty of the NEZHA paper: 52,204 users" in verdict("my_beauty", dataset.Counts(1, 1, 1))
    assert verdict("shop", dataset.Counts(1, 1, 1)) == ""
