"""`nezha catalogue`: from a table to a store and back, in words and in JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nezha_vllm import cli
from nezha_vllm.catalogue import Catalogue


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two tables; the second lacks one of 20 items, has a new one, and moves one."""
    monkeypatch.chdir(tmp_path)
    rows = [f"film-{n},{n % 4},{n // 4},Film {n},0" for n in range(20)]
    (tmp_path / "one.csv").write_text("\n".join(["item_id,c1,c2,title,weight", *rows]))
    rows[0], rows[1] = "new,3,4,New,0", "film-1,0,0,Film 1,2"
    (tmp_path / "two.csv").write_text("\n".join(["item_id,c1,c2,title,weight", *rows]))
    return tmp_path


def nezha(*arguments: str) -> int:
    return cli.main(["catalogue", *arguments])


def publish_both() -> None:
    assert nezha("build", "one.csv", "--codebook-sizes", "4,5", "--codes", "c1,c2", "--out", "one") == 0
    assert nezha("publish", "store", "one") == 0
    assert nezha("build", "two.csv", "--like", "store", "--codes", "c1,c2", "--out", "two", "--version", "v2") == 0
    assert nezha("publish", "store", "two", "--move") == 0


def test_from_a_table_to_a_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish_both()
    assert "version v2 is now current (sequence 2, previous" in capsys.readouterr().out
    assert Catalogue.load("store").metadata(0) == {"title": "Film 1"}  # film-1 has the larger weight
    assert not Path("two").exists()
    assert nezha("publish", "store", "store") == 0
    assert "was current already; nothing is changed" in capsys.readouterr().out


def test_status_verify_and_rollback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish_both()
    one = Catalogue.load("one").version
    capsys.readouterr()
    assert nezha("status", "store", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pointer"]["version"], found["pointer"]["previous"], found["pointer"]["sequence"]) == ("v2", one, 2)
    assert {version["version"]: version["items"] for version in found["versions"]} == {"v2": 20, one: 20}
    assert nezha("status", "store") == 0
    assert "previous" in capsys.readouterr().out
    assert nezha("rollback", "store") == 0
    assert f"version {one} is current again (sequence 3, previous v2)" in capsys.readouterr().out
    assert nezha("verify", "store") == 0
    assert nezha("verify", "one") == 0
    Path("store/versions/v2/items.arrow").write_bytes(b"")
    capsys.readouterr()
    assert nezha("verify", "store", "--json") == 1
    problems = json.loads(capsys.readouterr().out)
    assert problems[one] is None
    assert "items.arrow is damaged" in problems["v2"]
    assert nezha("rollback", "store") == 2
    assert "items.arrow is damaged" in capsys.readouterr().err


def test_diff_counts_and_names_items(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish_both()
    one = Catalogue.load("one").version
    capsys.readouterr()
    assert nezha("diff", f"store@{one}", "store", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"added": 1, "removed": 1, "moved": 1, "reweighted": 1, "regrouped": 0}
    examples = {"added": ["new"], "removed": ["film-0"], "moved": ["film-1"], "reweighted": ["film-1"], "regrouped": []}
    assert found["examples"] == examples
    assert nezha("diff", "one", "store") == 0
    assert "film-0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "one"], "is no catalogue store"),
        (["status", "nowhere"], "is no catalogue store"),
        (["rollback", "one"], "is no catalogue store"),
        (["publish", "store", "nowhere"], "no catalogue at"),
        (["publish", "store", "one", "--max-lost", "2"], "0 ≤ max_lost ≤ 1"),
        (["diff", "one", "store@nine"], "no version nine"),
        (["build", "one.csv", "--codebook-sizes", "4,x", "--out", "x"], "takes a size"),
        (["build", "one.csv", "--codebook-sizes", "4,5", "--out", "x"], "needs one column 'codes'"),
        (["build", "one.csv", "--codebook-sizes", "4,4", "--codes", "c1,c2", "--out", "x"], "in row 16 is out of"),
        (["verify", "one", "--version", "v1"], "--version names nothing"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    publish_both()
    assert nezha(*arguments) == 2
    assert message in capsys.readouterr().err
