"""Readers, ordering, filtering and the prepared data set's folder."""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nezha_vllm.cli import prepare as prepare_verb
from nezha_vllm.data import dataset, movielens
from nezha_vllm.data.dataset import Dataset
from nezha_vllm.data.recbole import RecBoleReader
from nezha_vllm.data.records import Interaction
from nezha_vllm.data.sequence_files import SequenceReader
from nezha_vllm.data.sequences import InteractionLog, core, ordered

needs_recbole = pytest.mark.skipif(find_spec("recbole") is None, reason=movielens.INSTALL)

INTER_HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
interactions = st.lists(
    st.builds(Interaction, st.sampled_from("uvw"), st.sampled_from("abcdef"), st.integers(0, 4).map(float)), max_size=60
)


def write_recbole(folder: Path, rows: list[str], items: list[str] | None = None, header: str = INTER_HEADER) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "shop.inter").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    if items is not None:
        header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
        (folder / "shop.item").write_text("\n".join([header, *items]) + "\n", encoding="utf-8")
    return folder


def good_rows(count: int) -> list[str]:
    return [f"u{row % 7}\ti{row % 5}\t1\t{row}" for row in range(count)]


def test_sequence_files_keep_their_order_and_shuffle_ties_of_gap_zero(tmp_path):
    (tmp_path / "shop.txt").write_text("7 b a c\n8 a b\t5 0\n9 c b a\t0 3 2\n")
    rows = [
        '{"id": 1, "title": "no one met it"}',
        '{"item_id": "a", "title": "Soap", "brand": "X", "tags": ["p", "q"]}',
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(rows))
    seen = set()
    for seed in range(12):
        reader = SequenceReader(tmp_path / "shop.txt", tmp_path / "items.jsonl")
        prepared = dataset.prepare(reader, "shop", ties="shuffle", seed=seed)
        assert prepared.sequences[0] == list("bac")
        assert prepared.sequences[2] == list("cba")
        seen.add("".join(prepared.sequences[1]))
        assert "".join(dataset.prepare(reader, "shop", ties="file").sequences[1]) == "ab"
    assert seen == {"ab", "ba"}
    soap = prepared.items.to_pylist()[0]
    assert soap["title"] == "Soap"
    assert soap["text"] == "Soap. brand: X. tags: p q."


@pytest.mark.parametrize(
    ("line", "reason"),
    [("7", "no items"), ("7 a b\t1", "1 gaps for 2"), ("7 a\t-1", "negative"), ("7 a\tx", "float"), ("7 a>", "'>'")],
)
def test_broken_sequences_are_left_out_whole_and_named(tmp_path, line, reason):
    path = tmp_path / "shop.txt"
    path.write_text("\n".join(["1 a b"] * 150 + [line, "2 b a"]))
    reader = SequenceReader(path)
    prepared = dataset.prepare(reader, "shop")
    assert prepared.users == ["1", "2"]
    assert reader.broken.skipped == 1
    assert f"{path}:151" in reader.broken.examples[0]
    assert reason in reader.broken.examples[0]
    path.write_text(f"1 a b\n{line}")
    with pytest.raises(ValueError, match=r"more than 1\.0%"):
        dataset.prepare(SequenceReader(path), "shop")


def test_prepare_reads_sequence_files(tmp_path, capsys):
    (tmp_path / "shop.txt").write_text("7 b a c\n8 a b\n")
    assert run_prepare("--sequences", tmp_path / "shop.txt", "--out", tmp_path / "out") == 0
    assert "shop: 2 users, 3 items, 5 interactions" in capsys.readouterr().out
    with pytest.raises(ValueError, match="goes with --sequences"):
        run_prepare("--recbole", tmp_path, "--items", tmp_path / "x", "--out", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no file"):
        run_prepare("--sequences", tmp_path / "absent", "--out", tmp_path / "out")


def run_prepare(*words: object) -> int:
    parser = argparse.ArgumentParser()
    prepare_verb.add_arguments(parser)
    return prepare_verb.run(parser.parse_args([str(word) for word in words]))


@needs_recbole
def test_movielens_has_the_published_counts():
    prepared = dataset.prepare(movielens.reader(), movielens.NAME)
    assert prepared.counts == movielens.PUBLISHED
    assert min(map(len, prepared.sequences)) == 20
    items = {item["item_id"]: item for item in prepared.items.to_pylist()}
    assert items["50"]["title"] == "Star Wars"
    assert items["50"]["year"] == 1977
    assert "Sci-Fi" in items["50"]["genres"]
    assert items["12"]["text"] == "The Usual Suspects (1995). Genres: Crime, Thriller."


def test_missing_movielens_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(movielens, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=re.escape(movielens.INSTALL)):
        movielens.installed_folder()


@pytest.mark.parametrize(
    ("stored", "natural"),
    [
        ("Usual Suspects, The", "The Usual Suspects"),
        ("Enfer, L'", "L'Enfer"),
        ("Visitors, The (Visiteurs, Les)", "The Visitors (Les Visiteurs)"),
        ("Bye Bye, Love", "Bye Bye, Love"),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly"),
        ("Seven (Se7en)", "Seven (Se7en)"),
    ],
)
def test_titles_read_naturally(stored, natural):
    assert movielens.natural_title(stored) == natural


def test_columns_may_come_in_any_order_and_gzipped(tmp_path):
    text = "timestamp:float\titem_id:token\tuser_id:token\n2\tb\tu\n1\ta\tu\n"
    (tmp_path / "x.inter.gz").write_bytes(gzip.compress(text.encode()))
    prepared = dataset.prepare(RecBoleReader(tmp_path), "x")
    assert prepared.users == ["u"]
    assert prepared.sequences == [["a", "b"]]


def test_a_cut_off_gzip_file_is_named(tmp_path):
    packed = gzip.compress("\n".join([INTER_HEADER, *good_rows(500)]).encode())
    for content in (packed[:-20], b"plain"):
        (tmp_path / "x.inter.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.inter\.gz is cut off or no gzip file"):
            list(RecBoleReader(tmp_path).interactions())


def test_without_timestamps_the_file_order_counts_if_asked_for(tmp_path):
    write_recbole(tmp_path, [f"u\t{item}" for item in "cab"], header="user_id:token\titem_id:token")
    assert dataset.prepare(RecBoleReader(tmp_path), "x", ties="file").sequences == [["c", "a", "b"]]


def test_items_without_a_record_and_records_nobody_met(tmp_path):
    write_recbole(tmp_path, ["u\ta\t1\t1", "u\tb\t1\t2"], ["a\tAlpha\t1990\tDrama War", "z\tZulu\t1991\tWar"])
    prepared = dataset.prepare(RecBoleReader(tmp_path), "x")
    assert prepared.items.to_pylist() == [
        {"item_id": "a", "title": "Alpha", "text": "Alpha (1990). Genres: Drama, War.", "year": 1990}
        | {"genres": ["Drama", "War"]},
        {"item_id": "b", "title": "b", "text": "", "year": None, "genres": None},
    ]
    assert prepared.provenance["items_without_record"] == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("u\ti", "2 columns instead of 4"),
        ("u\ti\t1\tnoon", "timestamp 'noon' is not a number"),
        ("u\ti\t1\tnan", "not finite"),
        ("\ti\t1\t5", "empty user or item ID"),
        ("u\ta>b\t1\t5", "has a '>'"),
    ],
)
def test_a_broken_line_is_named_counted_and_skipped(tmp_path, line, reason):
    rows = good_rows(300)
    rows.insert(100, line)
    reader = RecBoleReader(write_recbole(tmp_path, rows))
    assert len(list(reader.interactions())) == 300
    assert reader.broken.skipped == 1
    assert reader.broken.examples[0].startswith(f"{tmp_path / 'shop.inter'}:102: ")
    assert reason in reader.broken.examples[0]


def test_a_line_that_is_not_utf8_is_skipped(tmp_path):
    path = write_recbole(tmp_path, good_rows(300)) / "shop.inter"
    path.write_bytes(path.read_bytes() + b"u\t\xff\t1\t1\n")
    reader = RecBoleReader(tmp_path)
    assert len(list(reader.interactions())) == 300
    assert "302: not UTF-8" in reader.broken.examples[0]


def test_too_many_broken_lines_stop_the_run(tmp_path):
    write_recbole(tmp_path, [*good_rows(97), "x", "y", "z"])
    with pytest.raises(ValueError, match=r"3 of 101 lines are broken(.|\n)*shop.inter:99: 1 columns"):
        list(RecBoleReader(tmp_path).interactions())
    assert len(list(RecBoleReader(tmp_path, max_broken=0.05).interactions())) == 97


def test_a_hopeless_file_is_not_read_to_its_end(tmp_path):
    write_recbole(tmp_path, [*good_rows(1_500), *["x"] * 3_000])
    reader = RecBoleReader(tmp_path)
    with pytest.raises(ValueError, match="lines are broken"):
        list(reader.interactions())
    assert reader.broken.read < 1_600


@pytest.mark.parametrize("header", ["", "user_id\titem_id", "user_id:token\tthing:token", "user_id:token\titem_id:int"])
def test_a_header_that_cannot_be_read_is_an_error_of_line_1(tmp_path, header):
    write_recbole(tmp_path, ["u\ti"], header=header)
    with pytest.raises(ValueError, match=r"shop\.inter:[12]: "):
        list(RecBoleReader(tmp_path).interactions())


def test_a_folder_without_or_with_two_data_sets_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*\.inter file"):
        RecBoleReader(tmp_path)
    for name in ("one.inter", "two.inter.gz"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"one\.inter, two\.inter\.gz"):
        RecBoleReader(tmp_path)


@settings(deadline=None)
@given(interactions, st.sampled_from(["shuffle", "file"]), st.integers(0, 3))
def test_order_is_by_time_and_loses_nothing(stream, ties, seed):
    log = InteractionLog.collect(stream)
    users, sequences = ordered(log, core(log), ties, seed)
    assert users == list(dict.fromkeys(row.user_id for row in stream))
    for user, sequence in zip(users, sequences, strict=True):
        own = [row for row in stream if row.user_id == user]
        times = {time: Counter(row.item_id for row in own if row.time == time) for time in {row.time for row in own}}
        place = 0
        for time in sorted(times):
            size = times[time].total()
            assert Counter(sequence[place : place + size]) == times[time]
            place += size
        if ties == "file":
            assert sequence == [row.item_id for row in sorted(own, key=lambda row: row.time)]


def test_ties_depend_on_the_seed_alone():
    log = InteractionLog.collect(Interaction("u", f"i{row}", row // 20) for row in range(60))
    shuffled = [ordered(log, core(log), "shuffle", seed)[1] for seed in (0, 0, 1)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert shuffled[0] != ordered(log, core(log), "file")[1]


@settings(deadline=None)
@given(interactions, st.integers(0, 4), st.integers(0, 4))
def test_k_core_is_the_largest_set_that_meets_both_minima(stream, min_per_user, min_per_item):
    log = InteractionLog.collect(stream)
    kept = {row for row, keep in enumerate(core(log, min_per_user, min_per_item)) if keep}
    left = set(range(len(stream)))
    while True:  # taking away one offending interaction at a time ends at the same, largest set
        users = Counter(stream[row].user_id for row in left)
        items = Counter(stream[row].item_id for row in left)
        offending = [
            row
            for row in left
            if users[stream[row].user_id] < min_per_user or items[stream[row].item_id] < min_per_item
        ]
        if not offending:
            break
        left.remove(offending[0])
    assert kept == left


def test_a_filter_that_leaves_nothing_says_so(tmp_path):
    write_recbole(tmp_path, good_rows(10))
    with pytest.raises(ValueError, match="none of 10 interactions is left"):
        dataset.prepare(RecBoleReader(tmp_path), "x", min_per_user=100)


@settings(deadline=None)
@given(interactions)
def test_leave_one_out_holds_out_the_last_two(stream):
    log = InteractionLog.collect(stream)
    users, sequences = ordered(log, core(log))
    long = {user: items for user, items in zip(users, sequences, strict=True) if len(items) >= 3}
    prepared = Dataset("x", users, sequences, dataset._item_table([]))
    if not long:
        with pytest.raises(ValueError, match="no user has three items"):
            prepared.leave_one_out()
        return
    split = prepared.leave_one_out()
    assert split.users == list(long)
    for row, items in enumerate(long.values()):
        assert [*split.history("valid")[row], split.valid_target[row], split.test_target[row]] == items
        assert [*split.history("test")[row], split.test_target[row]] == items


def prepared_folder(tmp_path: Path) -> Path:
    source = write_recbole(tmp_path / "raw", good_rows(60), [f"i{n}\tTitle {n}\t199{n}\tDrama" for n in range(5)])
    assert run_prepare("--recbole", source, "--out", tmp_path / "out") == 0
    return tmp_path / "out"


def test_prepare_writes_what_load_reads(tmp_path, capsys):
    folder = prepared_folder(tmp_path)
    assert "raw: 7 users, 5 items, 60 interactions" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["items.parquet", "manifest.json", "sequences.parquet"]
    again = dataset.prepare(RecBoleReader(tmp_path / "raw"), "raw")
    loaded = Dataset.load(folder)
    assert loaded == again
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_failing_save_leaves_the_earlier_data_set(tmp_path, monkeypatch):
    folder = prepared_folder(tmp_path)
    before = Dataset.load(folder)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset.pq, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        before.save(folder)
    monkeypatch.undo()
    assert Dataset.load(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    folder = prepared_folder(tmp_path)
    diary = tmp_path / "diary"
    diary.mkdir()
    (diary / "today.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds other files"):
        run_prepare("--recbole", tmp_path / "raw", "--out", diary)
    assert (diary / "today.txt").read_text() == "dear"
    assert run_prepare("--recbole", tmp_path / "raw", "--out", folder) == 0


def test_nothing_to_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="name a source"):
        run_prepare("--out", tmp_path / "out")


@pytest.mark.parametrize("name", [dataset.MANIFEST, dataset.SEQUENCES, dataset.ITEMS])
def test_a_missing_or_damaged_file_is_named(tmp_path, name):
    folder = prepared_folder(tmp_path)
    (folder / name).write_bytes(b"not it")
    with pytest.raises(ValueError, match=r"cannot be read: (.|\n)*nezha prepare"):
        Dataset.load(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Dataset.load(folder)


def test_counts_that_differ_from_the_manifest_are_refused(tmp_path):
    folder = prepared_folder(tmp_path)
    manifest = json.loads((folder / dataset.MANIFEST).read_text())
    manifest["counts"]["users"] += 1
    (folder / dataset.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="promises 8 users"):
        Dataset.load(folder)
