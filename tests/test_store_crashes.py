"""A publisher that dies or finds the disk full, at any step: the old or the new version, never a mixture."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from nezha_vllm.catalogue import Catalogue, CatalogueError, load_keys
from nezha_vllm.pointer import VERSIONS
from nezha_vllm.store import FILES, Store

CALLS = [(os, name) for name in ("replace", "rename", "fsync", "open", "mkdir", "rmdir", "unlink", "link", "utime")]
CALLS += [(shutil, "copyfile"), (shutil, "rmtree")]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch) -> None:
    """Waiting for the disk guards against power failures, which no test here makes; it is most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def source(folder: Path, count: int) -> Path:
    """A catalogue of ``count`` items whose content tells the count."""
    codes = np.arange(count)[:, None] % [3, 4]
    names = [f"item-{number}-of-{count}" if number == 0 else f"item-{number}" for number in range(count)]
    Catalogue.build(names, codes, (3, 4), version=f"v{count}").save(folder)
    return folder


def loads_whole(store: Path) -> str:
    catalogue, (_, version, keys, *_) = Catalogue.load(store), load_keys(store)
    assert catalogue.version == version == f"v{catalogue.num_items}"
    assert f"item-0-of-{catalogue.num_items}" in catalogue.ids.to_pylist()
    np.testing.assert_array_equal(keys, catalogue.keys)
    return version


class Killed(BaseException):
    """Nothing of the process runs any more, its clean-up included."""


@contextmanager
def failing(at: int, make: Callable[[], BaseException], *, dead: bool) -> Iterator[list[str]]:
    """The ``at``-th file-system call raises; in a dead process all later ones do, too."""
    calls: list[str] = []

    def wrap(name: str, call: Callable) -> Callable:
        def wrapped(*arguments, **options):
            calls.append(name)
            if len(calls) == at or (dead and len(calls) > at):
                raise make()
            return call(*arguments, **options)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            patch.setattr(module, name, wrap(name, getattr(module, name)))
        yield calls


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize(("make", "dead"), [(Killed, True), (no_space, False), (no_space, True)])
def test_every_failing_step_leaves_the_old_or_the_new_version(tmp_path, make, dead, move):
    template = tmp_path / "template"
    for count in (10, 11, 12):
        Store(template).publish(source(tmp_path / f"s{count}", count), max_lost=1, keep=2)
    source(tmp_path / "new", 13)
    found = []
    for at in itertools.count(1):
        folder = tmp_path / f"store-{at}"
        shutil.copytree(template, folder)
        new = Path(shutil.copytree(tmp_path / "new", tmp_path / f"new-{at}"))
        ended = True
        with failing(at, make, dead=dead) as calls:
            try:
                Store(folder).publish(new, max_lost=1, keep=1, move=move)
            except (Killed, CatalogueError):
                ended = False
        found.append(loads_whole(folder))
        Store(folder).publish(source(tmp_path / "next", 14), max_lost=1, keep=1)
        assert loads_whole(folder) == "v14"
        assert sorted(os.listdir(folder)) == [".lock", "CURRENT", VERSIONS]
        assert {path.name for path in (folder / VERSIONS).iterdir()} <= {"v10", "v11", "v12", "v13", "v14"}
        assert len(Store(folder).names()) == 2
        shutil.rmtree(folder)
        if ended and len(calls) < at:
            break
    assert len(found) > 20
    if dead:
        assert found == sorted(found)  # once the new version is current it stays
    assert set(found) == {"v12", "v13"}


def test_a_full_disk_is_told_and_leaves_no_debris(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    store.publish(source(tmp_path / "old", 10))

    def fill(source_path, target):
        Path(target).write_bytes(Path(source_path).read_bytes()[:100])
        raise no_space()

    monkeypatch.setattr(shutil, "copyfile", fill)
    with pytest.raises(CatalogueError, match=r"No space left on device.*store is whole.*try again"):
        store.publish(source(tmp_path / "new", 11), max_lost=1)
    assert loads_whole(store.folder) == "v10"
    assert os.listdir(store.folder / VERSIONS) == ["v10"]


def test_a_copy_cut_short_is_refused(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    store.publish(source(tmp_path / "old", 10))
    copy = shutil.copyfile

    def cut(source_path, target):
        copy(source_path, target)
        os.truncate(target, os.stat(target).st_size - 1)

    monkeypatch.setattr(shutil, "copyfile", cut)
    with pytest.raises(CatalogueError, match="is damaged"):
        store.publish(source(tmp_path / "new", 11), max_lost=1)
    assert loads_whole(store.folder) == "v10"


def publish_on_and_on(store: Path, sources: list[Path]) -> None:
    os.fsync = lambda descriptor: None  # quick_disk, in a process of its own
    for folder in itertools.cycle(sources):
        Store(store).publish(folder, max_lost=1, keep=1)


@pytest.mark.slow
def test_publishers_killed_at_random_moments_leave_one_whole_version(tmp_path):
    context = multiprocessing.get_context("forkserver")
    # what this file imports, and what PyArrow does: pandas takes a second
    context.set_forkserver_preload(["numpy", "pandas", "pytest", "nezha_vllm.store"])
    sources = [source(tmp_path / f"s{count}", count) for count in range(10, 20)]
    store, rng, found, debris = tmp_path / "store", random.Random(0), set(), 0
    Store(store).publish(sources[0])
    for _ in range(120):
        rng.shuffle(sources)
        publisher = context.Process(target=publish_on_and_on, args=(store, sources), daemon=True)
        before = Store(store).pointer().sequence
        publisher.start()
        waited = time.monotonic() + 20
        while Store(store).pointer().sequence < before + 1 and time.monotonic() < waited:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        publisher.kill()
        publisher.join()
        found.add(loads_whole(store))
        debris += any(path.name.startswith(".") for path in (store / VERSIONS).iterdir())
    assert len(found) > 5
    assert debris > 5  # the kills did meet publishers at work
    Store(store).publish(source(tmp_path / "last", 25), max_lost=1, keep=1)
    assert loads_whole(store) == "v25"
    assert len(os.listdir(store / VERSIONS)) == 2
    assert {name for path in (store / VERSIONS).iterdir() for name in os.listdir(path)} == set(FILES)
