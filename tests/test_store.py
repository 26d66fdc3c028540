"""A catalogue store: what is published is served, what is wrong is refused, and the old version stays."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from nezha_vllm import store_files
from nezha_vllm.catalogue import ITEMS, KEYS, MANIFEST, Catalogue, CatalogueError, load_keys
from nezha_vllm.manifest import checksum
from nezha_vllm.pointer import CURRENT, VERSIONS, Pointer, is_version_name, published_at, read_pointer, write_pointer
from nezha_vllm.store import FILES, Store
from nezha_vllm.store_status import status

SIZES = (3, 4, 5)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch) -> None:
    """Waiting for the disk guards against power failures, which no test here makes; it is most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def catalogue(items: range, seed: int = 0, version: str | None = None) -> Catalogue:
    codes = np.random.default_rng(seed).integers(0, 3, (1000, 3))[list(items)]
    names = [f"film {number}" for number in items]
    return Catalogue.build(names, codes, SIZES, metadata={"title": names}, version=version)


def saved(folder: Path, items: range, **options) -> Path:
    catalogue(items, **options).save(folder)
    return folder


@pytest.fixture
def store(tmp_path) -> Store:
    """Two versions: ``one`` of 20 items, then ``two`` of 30, which is current."""
    store = Store(tmp_path / "store")
    for name, count in (("one", 20), ("two", 30)):
        store.publish(saved(tmp_path / name, range(count), version=name))
    return store


def test_a_store_loads_as_its_current_version(store):
    assert Catalogue.load(store.folder).version == "two"
    assert load_keys(store.folder)[1] == "two"
    assert Catalogue.load(store.folder).items.equals(catalogue(range(30)).items)


def test_each_publication_is_the_next_in_the_sequence(store, tmp_path):
    assert (store.pointer().sequence, store.pointer().previous) == (2, "one")
    pointer, swapped = store.publish(saved(tmp_path / "three", range(31), version="three"))
    assert swapped
    assert (pointer.version, pointer.sequence, pointer.previous) == ("three", 3, "two")
    assert pointer == read_pointer(store.folder)


def test_publishing_the_same_content_again_changes_nothing(store, tmp_path):
    before = store.pointer()
    assert store.publish(tmp_path / "two") == (before, False)
    assert store.pointer() == before


def test_rollback_goes_to_the_previous_version_and_back(store):
    assert (store.rollback().version, store.pointer().sequence) == ("one", 3)
    assert Catalogue.load(store.folder).num_items == 20
    assert store.rollback().version == "two"


def test_a_version_is_as_old_as_the_pointer_says(store, tmp_path):
    source = saved(tmp_path / "three", range(31), version="three")
    for file in source.iterdir():
        os.utime(file, (1, 1))
    store.publish(source, move=True)
    assert published_at(store.folder, "three") == pytest.approx(time.time(), abs=5)
    store.rollback("two")
    assert published_at(store.folder, "two") == datetime.fromisoformat(store.pointer().time).timestamp()
    assert published_at(store.folder, "three") == 1
    (store.folder / CURRENT).write_text("{")
    assert published_at(store.folder, "three") == 1


def test_a_clock_that_goes_back_a_year_changes_no_order(store, tmp_path, monkeypatch):
    class Earlier(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(days=365)

    monkeypatch.setattr("nezha_vllm.store.datetime", Earlier)
    before = store.pointer().sequence
    store.publish(saved(tmp_path / "three", range(31), version="three"), keep=2)
    pointer = store.pointer()
    assert (pointer.version, pointer.sequence) == ("three", before + 1)
    assert published_at(store.folder, "three") < time.time() - 364 * 86400
    assert sorted(store.names()) == ["one", "three", "two"]
    store.publish(saved(tmp_path / "four", range(32), version="four"), keep=2)
    assert sorted(store.names()) == ["four", "three", "two"], "the oldest goes, by the order of publication"


def test_rollback_takes_a_version_by_name(store, tmp_path):
    store.publish(saved(tmp_path / "three", range(31), version="three"))
    assert store.rollback("one").previous == "three"
    for name, message in (("one", "current one already"), ("nine", "no version nine"), ("../one", "is no version")):
        with pytest.raises(CatalogueError, match=message):
            store.rollback(name)


def test_lost_items_beyond_the_limit_are_refused(store, tmp_path):
    fewer = saved(tmp_path / "fewer", range(3, 33), version="fewer")
    with pytest.raises(CatalogueError, match=r"10\.0% of the items of current version two are missing.*--force"):
        store.publish(fewer)
    assert [path.name for path in (store.folder / VERSIONS).iterdir() if path.name == "fewer"] == []
    assert store.publish(fewer, max_lost=0.1)[1]
    assert store.publish(saved(tmp_path / "few", range(3), version="few"), force=True)[1]


def test_other_codebook_sizes_are_refused_even_if_forced(store, tmp_path):
    Catalogue.build([f"film {n}" for n in range(30)], np.zeros((30, 2), int), (3, 4)).save(tmp_path / "other")
    with pytest.raises(CatalogueError, match=r"codebook sizes are \[3, 4\].*\[3, 4, 5\].*another store"):
        store.publish(tmp_path / "other", force=True)


def test_codes_that_no_item_had_before_are_published_and_found(store, tmp_path):
    old = catalogue(range(30))
    names = [*old.ids.to_pylist(), "brand new"]
    Catalogue.build(names, [*old.codes.tolist(), [2, 3, 4]], SIZES).save(tmp_path / "new")
    store.publish(tmp_path / "new")
    loaded = Catalogue.load(store.folder)
    assert loaded.codes_of("brand new") == [2, 3, 4]
    assert loaded.codec.key(np.array([2, 3, 4])) in load_keys(store.folder)[2]


def test_old_versions_are_kept_and_older_ones_removed(store, tmp_path):
    for number, name in enumerate(["one", "two", *(f"v{number}" for number in range(5))]):
        if number > 1:
            store.publish(saved(tmp_path / name, range(31 + number), version=name), keep=2)
        os.utime(store.folder / VERSIONS / name, (number, number))  # far apart, whatever the clock's grain
    assert store.names() == ["v4", "v3", "v2"]
    store.rollback("v2")
    store.publish(saved(tmp_path / "last", range(40), version="last"), keep=1)
    assert store.names() == ["last", "v2"]


def test_moving_takes_the_source_away_once_it_is_published(store, tmp_path):
    source = saved(tmp_path / "three", range(31), version="three")
    inode = (source / ITEMS).stat().st_ino
    store.publish(source, move=True)
    assert not source.exists()
    assert (store.folder / VERSIONS / "three" / ITEMS).stat().st_ino == inode
    source = saved(tmp_path / "bad", range(3), version="bad")
    with pytest.raises(CatalogueError, match="are missing"):
        store.publish(source, move=True)
    assert Catalogue.load(source).num_items == 3
    with pytest.raises(CatalogueError, match="leave out --move"):
        store.publish(store.folder / VERSIONS / "one", move=True)


def test_a_store_can_be_published_to_another(store, tmp_path):
    other = Store(tmp_path / "other")
    assert other.publish(store.folder)[0].version == "two"
    assert Catalogue.load(other.folder).num_items == 30


def test_other_content_under_a_known_name_is_refused(store, tmp_path):
    with pytest.raises(CatalogueError, match="has another version two"):
        store.publish(saved(tmp_path / "again", range(33), version="two"))


def test_a_damaged_current_version_is_repaired_by_publishing_it_again(store, tmp_path):
    damage(store.folder / VERSIONS / "two" / ITEMS, random.Random(0))
    with pytest.raises(CatalogueError, match=ITEMS):
        Catalogue.load(store.folder)
    pointer, swapped = store.publish(tmp_path / "two")
    assert swapped
    assert (pointer.version, pointer.previous) == ("two", "one")
    assert Catalogue.load(store.folder).num_items == 30


def test_beside_a_damaged_current_version_another_is_published_only_by_force(store, tmp_path):
    damage(store.folder / VERSIONS / "two" / ITEMS, random.Random(0))
    new = saved(tmp_path / "three", range(31), version="three")
    with pytest.raises(CatalogueError, match="add --force"):
        store.publish(new)
    assert store.publish(new, force=True)[1]


def test_a_damaged_pointer_is_refused_and_mended_by_naming_a_version(store):
    before = store.pointer().sequence
    (store.folder / CURRENT).write_bytes(b"{")
    for use in (lambda: Catalogue.load(store.folder), store.rollback):
        with pytest.raises(CatalogueError, match=r"CURRENT is damaged.*rollback --to"):
            use()
    assert store.rollback("one").sequence > before
    assert Catalogue.load(store.folder).version == "one"


@pytest.mark.parametrize("name", ["../two", "/tmp", "", ".", "..", "a/b", "a\\b", ".hidden", "two\n", "a" * 65, "é"])
def test_a_pointer_is_no_path(store, name):
    assert not is_version_name(name)
    write_pointer(store.folder, Pointer(name, "0", 9, None, "now"))
    with pytest.raises(CatalogueError, match="CURRENT is damaged"):
        Catalogue.load(store.folder)


@pytest.mark.parametrize("sequence", [-1, 2**63, 10**400, 1.0, True, "1", None])
def test_a_pointer_counts(store, sequence):
    write_pointer(store.folder, Pointer("two", "0", sequence, None, "now"))
    with pytest.raises(CatalogueError, match="CURRENT is damaged"):
        read_pointer(store.folder)


@pytest.mark.parametrize("name", [CURRENT, f"{VERSIONS}/two/{MANIFEST}"])
def test_a_pointer_or_manifest_without_end_is_not_read_to_its_end(store, name):
    with (store.folder / name).open("r+b") as file:
        file.truncate(1 << 40)  # of which the disk holds nothing
    with pytest.raises(CatalogueError, match="more than 1048576 bytes"):
        Catalogue.load(store.folder)


@pytest.mark.parametrize("name", [ITEMS, KEYS])
def test_a_file_of_another_size_is_not_read_at_all(store, name):
    with (store.folder / VERSIONS / "two" / name).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CatalogueError, match=f"{name} is damaged: its size"):
        Catalogue.load(store.folder)


@pytest.mark.parametrize("error", [PermissionError, OSError(errno.ESTALE, "stale file handle")])
def test_a_store_that_cannot_be_reached_is_a_damaged_pointer(store, monkeypatch, error):
    def fail(path):
        raise error

    monkeypatch.setattr(Path, "is_symlink", fail)
    with pytest.raises(CatalogueError, match="CURRENT is damaged"):
        read_pointer(store.folder)


@pytest.mark.parametrize("what", [VERSIONS, f"{VERSIONS}/two", f"{VERSIONS}/two/{ITEMS}", CURRENT])
def test_symbolic_links_inside_a_store_are_refused(store, tmp_path, what):
    inside, outside = store.folder / what, tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    with pytest.raises(CatalogueError, match=r"is no (regular file|folder)"):
        Catalogue.load(store.folder)


def test_a_version_that_cannot_name_a_folder_is_refused(store, tmp_path):
    with pytest.raises(CatalogueError, match=r"cannot name a folder"):
        store.publish(saved(tmp_path / "x", range(30), version="../../etc"))


def test_a_second_publisher_is_turned_away(store, tmp_path):
    with store_files.locked(store.folder), pytest.raises(CatalogueError, match="another process is publishing"):
        store.publish(tmp_path / "one")
    with store_files.locked(store.folder):
        assert Catalogue.load(store.folder).version == "two"


@pytest.mark.parametrize("there", ["catalogue", "thesis"])
def test_other_folders_do_not_become_stores(tmp_path, there):
    source, folder = saved(tmp_path / "source", range(9)), tmp_path / "it"
    if there == "catalogue":
        saved(folder, range(9))
    else:
        folder.mkdir()
        (folder / "thesis.txt").touch()
    with pytest.raises(CatalogueError, match="name another folder"):
        Store(folder).publish(source)
    with pytest.raises(CatalogueError, match="is no catalogue store"):
        Store(folder).rollback()


def test_status_tells_roles_and_problems(store):
    (store.folder / VERSIONS / "one" / MANIFEST).write_text("{")
    pointer, versions = status(store)
    assert pointer == store.pointer()
    found = {version.version: version for version in versions}
    assert (found["two"].role, found["two"].items, found["two"].problem) == ("current", 30, None)
    assert found["one"].role == "previous"
    assert f"{MANIFEST} is damaged" in found["one"].problem


def test_verify_checks_every_version(store):
    assert store.verify() == {"two": None, "one": None}
    damage(store.folder / VERSIONS / "one" / KEYS, random.Random(0))
    assert KEYS in store.verify()["one"]
    assert store.verify("two") == {"two": None}


def damage(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
    else:
        for _ in range(rng.choice((1, 1, 3))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def edit(path: Path, rng: random.Random) -> None:
    """Change a field and let the checksum vouch for it."""
    fields = json.loads(path.read_text())
    name = rng.choice([name for name in fields if name != "checksum"])
    fields[name] = rng.choice([None, 1, -1, 2**70, "x", "../x", [], {}, [1, 2], {"items.arrow": 5}])
    fields["checksum"] = checksum(fields)
    path.write_text(json.dumps(fields))


def swap(one: Path, other: Path) -> None:
    aside = one.with_name(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_damages_are_never_served_and_never_crash(store, tmp_path, count):
    rng = random.Random(count)
    versions = store.folder / VERSIONS
    content = Catalogue.load(store.folder).items
    refused = 0
    for number in range(count):
        copy = tmp_path / f"damaged-{number}"
        shutil.copytree(store.folder, copy)
        two, one = copy / VERSIONS / "two", copy / VERSIONS / "one"
        kind = rng.choice(("bytes", "bytes", "bytes", "edit", "swap files", "swap versions", "remove"))
        paths = [copy / CURRENT, *(two / name for name in FILES)]
        path = rng.choice(paths)
        if kind == "bytes":
            damage(path, rng)
        elif kind == "edit":
            edit(rng.choice(paths[:2]), rng)
        elif kind == "swap files":
            swap(*rng.choice([(two / name, one / name) for name in FILES] + [(two / ITEMS, two / KEYS)]))
        elif kind == "swap versions":
            swap(one, two)
        else:
            path.unlink()
        same = all((versions / "two" / name).read_bytes() == (two / name).read_bytes() for name in FILES if two.exists()
                   and (two / name).exists())  # fmt: skip
        try:
            loaded = Catalogue.load(copy)
            load_keys(copy)
        except CatalogueError:
            refused += 1
        else:  # the damage is none: a blank of JSON, or a field of the pointer that leads nowhere else
            assert loaded.items.equals(content), kind
            assert same or parsed(two / MANIFEST) == parsed(versions / "two" / MANIFEST), kind
            assert kind in ("bytes", "edit"), kind
        shutil.rmtree(copy)
    assert refused > 0.9 * count


def parsed(path: Path) -> dict:
    return json.loads(path.read_text())
