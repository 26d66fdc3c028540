"""The catalogue's folder: damage is refused by name, and saving never leaves less than one whole catalogue."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from nezha_vllm import folders
from nezha_vllm.catalogue import ITEMS, KEYS, MANIFEST, Catalogue, CatalogueError, load_keys

FILES = (MANIFEST, ITEMS, KEYS)


def example(version: str = "one", count: int = 7) -> Catalogue:
    rng = np.random.default_rng(0)
    ids = [f"film {number} é" for number in range(count)]
    return Catalogue.build(ids, rng.integers(0, 3, (count, 3)), (3, 4, 5), metadata={"title": ids}, version=version)


@pytest.fixture
def folder(tmp_path) -> Path:
    example().save(tmp_path / "catalogue")
    return tmp_path / "catalogue"


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("intact") / "catalogue"
    example().save(path)
    return path


@given(st.data())
def test_damaged_bytes_are_refused_naming_the_file(intact, tmp_path_factory, data):
    name = data.draw(st.sampled_from(FILES))
    content = bytearray((intact / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans(), label="truncate"):
        del content[at:]
    else:
        content[at] ^= data.draw(st.integers(1, 255))
    damaged = tmp_path_factory.mktemp("damaged") / "catalogue"
    shutil.copytree(intact, damaged)
    (damaged / name).write_bytes(content)
    if name == MANIFEST and parses_the_same(content, intact):
        Catalogue.load(damaged)
        return
    with pytest.raises(CatalogueError, match=name):
        Catalogue.load(damaged)
    if name != ITEMS:
        with pytest.raises(CatalogueError, match=name):
            load_keys(damaged)


def parses_the_same(content: bytes, intact: Path) -> bool:
    """A blank more or less, or another kind of blank, is not damage."""
    try:
        return json.loads(content.decode()) == json.loads((intact / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        return False


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_with_a_remedy(folder, name):
    (folder / name).unlink()
    with pytest.raises(CatalogueError, match=rf"{name} is missing.*nezha tokenize"):
        Catalogue.load(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CatalogueError, match=r"no catalogue at .*nowhere"):
        Catalogue.load(tmp_path / "nowhere")


def reseal(folder: Path, change: Callable[[dict], object] = lambda manifest: None) -> None:
    """Make the manifest vouch for whatever the files hold now, as a faulty writer would."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    change(manifest)
    del manifest["checksum"]
    manifest["checksum"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def write_items(folder: Path, items: pa.Table) -> None:
    sink = pa.BufferOutputStream()  # the table may lie in the very file that is written
    with pa.ipc.new_file(sink, items.schema) as writer:
        writer.write_table(items)
    (folder / ITEMS).write_bytes(sink.getvalue())


def test_resealing_alone_changes_nothing(folder):
    reseal(folder)
    assert Catalogue.load(folder).num_items == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2 is not 1"),
        ({"format": "1"}, "format 1 is not 1"),
        ({"num_items": 8}, f"{ITEMS} has 7 items, {MANIFEST} promises 8"),
        ({"num_ids": 1}, f"{KEYS} has . semantic IDs, {MANIFEST} promises 1"),
        ({"codebook_sizes": [3, 4]}, ITEMS),
        ({"codebook_sizes": [3, 4, 6]}, f"{KEYS} and {ITEMS} disagree"),
        ({"codebook_sizes": [3, 4, 0]}, f"{MANIFEST} is damaged"),
        ({"codebook_sizes": None}, f"{MANIFEST} is damaged"),
        ({"files": {}}, f"{ITEMS} is missing"),
        ({"files": []}, f"{MANIFEST} is damaged.*files"),
        ({"shared_ids": "last"}, "shared_ids is 'last', must be one of"),
        ({"version": None}, f"{MANIFEST} is damaged.*version"),
        ({"num_items": "7"}, f"{MANIFEST} is damaged.*num_items"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(folder, change, message):
    reseal(folder, lambda manifest: manifest.update(change))
    with pytest.raises(CatalogueError, match=message):
        Catalogue.load(folder)


@pytest.mark.parametrize("field", ["format", "version", "codebook_sizes", "num_items", "num_ids", "files"])
def test_a_manifest_without_a_field_is_refused(folder, field):
    reseal(folder, lambda manifest: manifest.pop(field))
    with pytest.raises(CatalogueError, match=f"{MANIFEST}.*{field}"):
        Catalogue.load(folder)


@pytest.mark.parametrize("text", ["", "[]", "7", "null", "{}", '{"format": 1}', "\ufeff{"])
def test_a_manifest_that_is_none_is_refused(folder, text):
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(CatalogueError, match=f"{MANIFEST} is damaged"):
        Catalogue.load(folder)


@pytest.mark.parametrize(
    ("name", "faulty"),
    [
        ("keys", lambda keys: keys[::-1].copy()),
        ("keys", lambda keys: keys[:0]),
        ("keys", lambda keys: keys.astype(np.int32)),
        ("keys", lambda keys: keys + 1),
        ("first_row", lambda first: first[:0]),
        ("first_row", lambda first: first[:-1].copy()),
        ("first_row", lambda first: first + 1),
        ("first_row", lambda first: np.where(np.arange(len(first)) == 1, 0, first)),
        ("rows_by_id", lambda rows: rows[::-1].copy()),
        ("rows_by_id", lambda rows: np.zeros_like(rows)),
        ("rows_by_id", lambda rows: rows[:-1].copy()),
    ],
)
def test_arrays_that_break_the_format_are_refused(folder, name, faulty):
    arrays = load_file(folder / KEYS)
    save_file(arrays | {name: faulty(arrays[name])}, folder / KEYS)
    reseal(folder)
    with pytest.raises(CatalogueError, match=KEYS):
        Catalogue.load(folder)


def test_an_absent_array_is_refused(folder):
    arrays = load_file(folder / KEYS)
    save_file({"keys": arrays["keys"]}, folder / KEYS)
    reseal(folder)
    with pytest.raises(CatalogueError, match="first_row"):
        Catalogue.load(folder)


@pytest.mark.parametrize(
    "faulty",
    [
        lambda items: items.drop_columns(["weight"]),
        lambda items: items.set_column(0, "item_id", pa.array([None] * items.num_rows, pa.string())),
        lambda items: items.set_column(0, "item_id", pa.array(["same"] * items.num_rows)),
        lambda items: items.set_column(0, "item_id", pa.array([f"{row}>" for row in range(items.num_rows)])),
        lambda items: items.set_column(0, "item_id", pa.array([b"\xff"] * items.num_rows).view(pa.string())),
        lambda items: items.set_column(2, "weight", pa.array([float("nan")] * items.num_rows, pa.float32())),
        lambda items: items.append_column("weight", items["weight"]),
        lambda items: items.set_column(1, "codes", pa.array(range(items.num_rows))),
        lambda items: items.slice(1),
        lambda items: items.take(pa.array(range(items.num_rows))[::-1]),
    ],
)
def test_items_that_break_the_format_are_refused(folder, faulty):
    items = faulty(Catalogue.load(folder).items)
    write_items(folder, items)
    reseal(folder)
    with pytest.raises(CatalogueError, match=ITEMS):
        Catalogue.load(folder)


def test_items_of_one_semantic_id_out_of_order_are_refused(tmp_path):
    shared = Catalogue.build(["a", "b", "c"], [[0, 1]] * 3, (1, 2), weights=[3.0, 2.0, 1.0])
    shared.save(tmp_path / "it")
    items = shared.items.set_column(2, "weight", pa.array([3.0, 1.0, 2.0], pa.float32()))
    write_items(tmp_path / "it", items)
    reseal(tmp_path / "it")
    with pytest.raises(CatalogueError, match=f"{ITEMS}: items of one semantic ID are not in the order"):
        Catalogue.load(tmp_path / "it")


def save_watched(catalogue: Catalogue, folder: Path, at_line: Callable[[int], None]) -> None:
    """``save`` with a call before every line of this project that it runs."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.endswith(("catalogue.py", "manifest.py", "folders.py")):
            return None
        if event == "line":
            count += 1
            sys.settrace(None)
            at_line(count)
            sys.settrace(trace)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        catalogue.save(folder)
    finally:
        sys.settrace(before)


@pytest.fixture(params=["exchange", "no exchange"])
def system(request, monkeypatch) -> str:
    """A file system that can swap two names, and one that cannot."""
    if request.param == "no exchange":
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    return request.param


def test_a_save_stopped_at_any_line_leaves_the_old_or_the_new(tmp_path, system):
    found, last = set(), 1000
    for stop in range(1, last):
        folder = tmp_path / f"{stop}" / "catalogue"
        example("old").save(folder)

        def interrupt(line: int, stop: int = stop) -> None:
            if line == stop:
                raise KeyboardInterrupt

        try:
            save_watched(example("new", count=9), folder, interrupt)
            break
        except KeyboardInterrupt:
            found.add(Catalogue.load(folder).version)
    else:
        pytest.fail(f"save did not end within {last} lines")
    assert found == {"old", "new"}


def test_a_killed_process_leaves_the_old_or_the_new(tmp_path, system):
    """What lies on disk before each line is what a kill there would leave."""
    folder, found = tmp_path / "catalogue", []
    example("old").save(folder)

    def look(line: int) -> None:
        aside = [path for path in tmp_path.glob(".catalogue-old-*") if any(path.iterdir())]
        found.append(
            Catalogue.load(aside[0] if aside and system == "no exchange" and not folder.exists() else folder).version
        )

    save_watched(example("new", count=9), folder, look)
    assert found == sorted(found, reverse=True)
    assert set(found) == {"old", "new"}


def test_saving_leaves_nothing_beside_the_folder(tmp_path, system):
    folder = tmp_path / "deep" / "catalogue"
    for version in ("one", "two"):
        example(version).save(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["catalogue"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_a_server_of_another_user_may_read_what_was_saved(tmp_path):
    before = os.umask(0o027)  # for the owner and the group
    try:
        example("one").save(tmp_path / "catalogue")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "catalogue").iterdir()} == dict.fromkeys(
        FILES, 0o640
    )


def test_a_failed_save_keeps_the_old_and_leaves_nothing_beside(folder, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr("nezha_vllm.catalogue.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        example("two").save(folder)
    assert Catalogue.load(folder).version == "one"
    assert [path.name for path in folder.parent.iterdir()] == ["catalogue"]


def test_a_loaded_catalogue_survives_its_folder(folder):
    loaded = Catalogue.load(folder)
    example("two", count=3000).save(folder)
    assert loaded.items.equals(example().items)
    shutil.rmtree(folder)
    assert [loaded.item_id(loaded.row(f"film {number} é")) for number in range(7)] == [f"film {n} é" for n in range(7)]


def test_a_loaded_catalogue_can_be_saved_onto_itself(folder):
    Catalogue.load(folder).save(folder)
    assert Catalogue.load(folder).items.equals(example().items)


def test_saving_through_a_symbolic_link_keeps_the_link(folder):
    link = folder.parent / "current"
    link.symlink_to(folder)
    example("two").save(link)
    assert link.is_symlink()
    assert Catalogue.load(folder).version == "two"


def test_other_folders_are_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for target in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(CatalogueError, match="is no catalogue; name another folder"):
            example().save(target)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    example().save(tmp_path / "empty")
    assert Catalogue.load(tmp_path / "empty").num_items == 7


def test_a_reader_finds_one_whole_catalogue_while_others_are_saved(folder):
    """Every reader sees keys, items and version of one save, whichever step of the next one it meets."""
    versions = {"one": 7, "two": 3000}
    stop = threading.Event()

    def save_on_and_on() -> None:
        while not stop.is_set():
            for version, count in versions.items():
                example(version, count).save(folder)

    writer = threading.Thread(target=save_on_and_on)
    writer.start()
    try:
        found = [Catalogue.load(folder) for _ in range(100)]
        engines = [load_keys(folder) for _ in range(100)]
    finally:
        stop.set()
        writer.join()
    assert all(catalogue.num_items == versions[catalogue.version] for catalogue in found)
    assert {catalogue.version for catalogue in found} == set(versions)
    assert len({(version, len(keys)) for _, version, keys, *_ in engines}) <= 2
