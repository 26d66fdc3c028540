"""Batch scoring: rows in, as many rows out, whatever is wrong with them and whenever the job is stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from answers import assert_same_answer, of_output
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from watching import assert_ends_with_parent

from nezha_vllm.batch.columns import OPTIONS, ColumnError, find_columns, options_of
from nezha_vllm.batch.engine import Recipe
from nezha_vllm.batch.job import Progress, score_parquet
from nezha_vllm.batch.output import JobError, Output
from nezha_vllm.batch.parts import InputError, InputFile, find_files, parts_of
from nezha_vllm.batch.scorer import Scorer
from nezha_vllm.catalogue import Catalogue, CatalogueError
from nezha_vllm.store import Store

if TYPE_CHECKING:
    from vllm import LLM

HISTORY = pa.field("history", pa.list_(pa.string()))


def history(*numbers: int) -> list[str]:
    return [f"item-{number}" for number in numbers]


def test_columns_are_history_options_and_the_rest() -> None:
    columns = find_columns(pa.schema([("user", pa.int64()), HISTORY, ("n", pa.int64()), ("segments", pa.null())]))
    assert (columns.source, columns.options, columns.kept) == ("history", ("n", "segments"), ("user",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([("items", pa.list_(pa.string()))], "no column 'history'.*--history"),
        ([("history", pa.string())], "lists of item IDs.*--prompt"),
        ([("history", pa.list_(pa.float64()))], "lists of item IDs"),
        ([HISTORY, ("scores", pa.string())], "scores.*rename"),
        ([HISTORY, ("user", pa.string()), ("user", pa.string())], "user.*twice"),
    ],
)
def test_unclear_columns_are_refused_with_the_remedy(fields: list[Any], message: str) -> None:
    with pytest.raises(ColumnError, match=message):
        find_columns(pa.schema(fields))


def test_options_are_those_of_the_api() -> None:
    from nezha_vllm.frontend import options

    assert set(OPTIONS) == {"n", *options.OPTIONS}


def test_gaps_that_pandas_leaves_are_options_not_set() -> None:
    row = {"n": 5.0, "beam_width": float("nan"), "min_score": -2.0, "max_per_id": 1.5, "segments": None}
    assert options_of(row, tuple(row)) == {"n": 5, "min_score": -2.0, "max_per_id": 1.5}


@given(groups=st.lists(st.lists(st.integers(0, 40), max_size=4), max_size=4), rows_per_part=st.integers(1, 50))
def test_parts_hold_every_row_once(groups: list[list[int]], rows_per_part: int) -> None:
    files = [InputFile(str(at), tuple(rows), "") for at, rows in enumerate(groups)]
    parts = list(parts_of(files, rows_per_part))
    found = [(part.path, part.row_group, row) for part in parts for row in range(part.first, part.first + part.rows)]
    expected = [
        (file.path, at, row) for file in files for at, rows in enumerate(file.row_groups) for row in range(rows)
    ]
    assert found == expected
    assert [part.number for part in parts] == list(range(len(parts)))


def test_folders_are_searched_for_parquet_files_that_are_not_hidden(tmp_path: Path) -> None:
    for name in ("b.parquet", "day=1/a.parquet", "_old/a.parquet", ".a.parquet", "a.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_files([tmp_path]) == [tmp_path / "b.parquet", tmp_path / "day=1/a.parquet"]
    for inputs, message in [
        ([tmp_path / "c"], "missing"),
        ([tmp_path / "_old" / "a.parquet"] * 2, "twice"),
        ([tmp_path / "empty"], "no .*parquet"),
    ]:
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=message):
            find_files(inputs)
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        InputFile.examine(tmp_path / "a.csv")


def write_input(path: Path, rows: int, row_group_size: int = 25) -> Path:
    """Users 0, 1 … with two items of the catalogue each."""
    table = pa.table({"user": range(rows), "history": [history(1 + row % 1600, 2 + row % 1600) for row in range(rows)]})
    parquet.write_table(table, path, row_group_size=row_group_size)
    return path


JOB = """
import sys, time
import pyarrow as pa
from nezha_vllm.batch import engine, job, scorer
from nezha_vllm.batch.columns import RESULTS

class Echo:  # in the place of an engine: the history as the answer
    def __init__(self, llm, columns, *rest): self.columns = columns
    def __call__(self, table):
        time.sleep(0.02)
        rows = [{"item_ids": row["history"]} for row in table.to_pylist()]
        arrays = [*table.select(self.columns.kept).columns, *pa.Table.from_pylist(rows, RESULTS).columns]
        return pa.Table.from_arrays(arrays, schema=self.columns.output_schema(table.schema))

scorer.Scorer, engine.Recipe.start = Echo, lambda recipe: None
checkpoint, source, out = sys.argv[1:]
job.score_parquet(checkpoint, [source], out, rows_per_part=10)
"""


def test_a_job_killed_again_and_again_has_every_row_once(checkpoint: Path, tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in.parquet", 600), tmp_path / "out"
    command = [sys.executable, "-c", JOB, str(checkpoint), str(source), str(out)]
    kills, chance = 0, random.Random(0)
    while not (out / "_SUCCESS").exists():
        job = subprocess.Popen(command)
        before = len(list(out.glob("part-*")))
        while job.poll() is None and len(list(out.glob("part-*"))) < before + 12:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.03)
        kills += job.poll() is None
        job.kill()
        assert job.wait() == -signal.SIGKILL or (job.returncode == 0 and (out / "_SUCCESS").exists())
    assert kills >= 3
    found = parquet.read_table(out).to_pylist()
    assert [row["user"] for row in found] == list(range(600))
    assert all(row["item_ids"] == history(1 + row["user"], 2 + row["user"]) for row in found)
    assert json.loads((out / "_SUCCESS").read_text()) == {"rows": 600, "errors": 0}
    assert not list(out.glob(".scratch*"))


ENGINE = """
import multiprocessing, os, time
from nezha_vllm.engine.parent import end_with_parent

def engine():
    end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=engine, name="EngineCore").start()
"""


def test_an_engine_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Otherwise the memory it holds is missing when the job is run again."""
    (tmp_path / "engine.py").write_text(ENGINE)
    assert_ends_with_parent([sys.executable, tmp_path / "engine.py"])


@pytest.fixture
def job(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of a job that starts no engine of its own."""

    class NoEngine:
        def __init__(self, recipe: Recipe) -> None:
            raise AssertionError("an engine was started")

    monkeypatch.setattr("nezha_vllm.batch.job.Worker", NoEngine)
    source = write_input(tmp_path / "in.parquet", 30)
    return {"checkpoint": checkpoint, "inputs": [source], "out": tmp_path / "out", "rows_per_part": 10}


def test_an_output_folder_takes_no_other_job(job: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="an engine"):
        score_parquet(**job)
    for changed in ({"options": {"n": 3}}, {"rows_per_part": 7}, {"last": 5}, {"engine": {"dtype": "float32"}}):
        with pytest.raises(JobError, match=f"other {next(iter(changed))}"):
            score_parquet(**(job | changed))
    write_input(tmp_path / "in.parquet", 31)
    with pytest.raises(JobError, match="other inputs"):
        score_parquet(**job)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").touch()
    with pytest.raises(JobError, match=r"thesis\.txt.*name a new folder"):
        score_parquet(**(job | {"out": tmp_path / "used"}))


def test_options_of_python_are_the_same_when_the_job_goes_on(job: dict[str, Any]) -> None:
    for _ in range(2):
        with pytest.raises(AssertionError, match="an engine"):
            score_parquet(**job, options={"segments": ("odd",)})


def test_a_job_uses_the_version_that_is_asked_for(job: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for version in ("one", "two"):
        Catalogue.build(["a", "b"], [[0, 0, 0], [1, 2, 3]], [16, 24, 32], version=version).save(tmp_path / version)
        store.publish(tmp_path / version)

    def begun(**options: str) -> list[str]:
        out = tmp_path / "-".join(["out", *options, *options.values()]).replace("/", "_")
        with pytest.raises(AssertionError, match="an engine"):
            score_parquet(**(job | {"out": out, "engine": {"additional_config": {"nezha": options}}}))
        return json.loads((out / "_job.json").read_text())["catalogue"]

    in_store = {"catalogue": str(store.folder)}
    assert begun(**in_store) == [str(store.folder / "versions" / "two"), "two"]
    assert begun(**in_store, catalogue_version="one") == [str(store.folder / "versions" / "one"), "one"]
    assert begun(catalogue=str(tmp_path / "one"), catalogue_version="one") == [str(tmp_path / "one"), "one"]
    for place in (store.folder, tmp_path / "one"):
        options = {"catalogue": str(place), "catalogue_version": "three"}
        with pytest.raises(CatalogueError, match="three"):
            score_parquet(**(job | {"engine": {"additional_config": {"nezha": options}}}))


def test_results_do_not_go_into_the_input(job: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lies in the input"):
        score_parquet(**(job | {"inputs": [tmp_path], "out": tmp_path / "out"}))


def test_a_second_process_is_turned_away(job: dict[str, Any]) -> None:
    with Output(job["out"]).locked(), pytest.raises(JobError, match="another process"):
        score_parquet(**job)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"options": {"top_p": 1}}, "top_p.*no options; there are n, beam_width"),
        ({"last": 0}, "last is 0"),
        ({"rows_per_part": 0}, "rows_per_part is 0"),
        ({"checkpoint": "/nowhere"}, "no checkpoint at /nowhere"),
        ({"inputs": []}, "no input"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    job: dict[str, Any], wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score_parquet(**(job | wrong))
    assert not job["out"].exists()


class NoItems:
    """An engine's place: takes requests and has no items for them."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def enqueue(self, prompts: list[dict[str, str]], params: Any, use_tqdm: bool) -> None:
        self.prompts += [prompt["prompt"] for prompt in prompts]

    def wait_for_completion(self, use_tqdm: bool) -> list[Any]:
        return [SimpleNamespace(outputs=[], nezha=SimpleNamespace(catalogue_version="one", reason="none"))
                for _ in self.prompts]  # fmt: skip


def test_columns_that_are_only_copied_may_hold_what_python_cannot() -> None:
    days = pa.array([1, 10**8, 2], pa.int32()).cast(pa.date32())
    zoned = pa.array([1, 2, 3], pa.timestamp("s", tz="Nowhere/At_all"))
    table = pa.table({"history": [history(at) for at in range(3)], "day": days, "seen": zoned})
    engine: Any = NoItems()
    found = Scorer(engine, find_columns(table.schema))(table)
    assert found["error"].null_count == 3
    assert found.select(["day", "seen"]).equals(table.select(["day", "seen"]))
    assert engine.prompts == ["<item:item-0>", "<item:item-1>", "<item:item-2>"]


def test_a_row_whose_option_cannot_be_read_is_an_error_row() -> None:
    days = pa.array([1, 10**8], pa.int32()).cast(pa.date32())
    table = pa.table({"history": [history(1), history(2)], "segments": days})
    engine: Any = NoItems()
    found = Scorer(engine, find_columns(table.schema))(table).to_pylist()
    assert "the row cannot be read" in found[1]["error"]


@pytest.mark.slow
def test_rows_are_answered_as_the_api_answers_them(llm: LLM) -> None:
    from vllm import SamplingParams

    rows: list[dict[str, Any]] = [
        {"history": history(3, 70, 12)},
        {"history": history(3, 70, 12), "exclude_history": True, "n": 5.0},
        {"history": history(9), "exclude_items": history(5, 6), "segments": ["odd"], "beam_width": 64.0},
        {"history": history(9, 10), "min_score": -6.0, "max_per_id": 1.0},
        {"history": history(9), "allow_items": history(5, 6, 7)},
    ]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"history": None}, "history is null"),
        ({"history": []}, "the prompt is empty"),
        ({"history": ["item-1", None]}, "history has None, which is no item ID"),
        ({"history": ["1><item:2"]}, "no item ID"),
        ({"history": ["nobody"]}, "'nobody' is not in the catalogue"),
        ({"history": history(*[1] * 600)}, "the prompt is too long"),
        ({"history": history(1), "n": 0.0}, "n must be a whole number"),
        ({"history": history(1), "n": 51.0}, "beam_width is 50"),
        ({"history": history(1), "segments": ["sweden"]}, "not a segment"),
        ({"history": history(1), "allow_items": ["nobody"]}, "'nobody' is not in the catalogue"),
    ]
    names = ("history", "exclude_history", "n", "exclude_items", "allow_items", "segments", "beam_width", "min_score")
    mixed = [row for pair in zip(rows + rows, [row for row, _ in wrong], strict=True) for row in pair]
    table = pa.Table.from_pylist([{name: row.get(name) for name in (*names, "max_per_id")} for row in mixed])
    found = Scorer(llm, find_columns(table.schema), {"n": 10})(table).to_pylist()
    assert len(found) == len(mixed)
    for row, result in zip(rows + rows, found[::2], strict=True):
        options = {name: int(value) if type(value) is float and name != "min_score" else value
                   for name, value in row.items() if name != "history"}  # fmt: skip
        params = SamplingParams(n=options.pop("n", 10), extra_args=options or None)
        text = "".join(f"<item:{item}>" for item in row["history"])
        [expected] = llm.generate([{"prompt": text}], params, use_tqdm=False)
        assert result["error"] is None
        assert_same_answer(list(zip(result["item_ids"], result["scores"], strict=True)), of_output(expected))
        assert [tuple(codes) for codes in result["semantic_ids"]] == [item.semantic_id for item in expected.outputs]
        assert result["reason"] == expected.nezha.reason
    for (_, message), result in zip(wrong, found[1::2], strict=True):
        assert message in result["error"]
        assert result["item_ids"] is None


@pytest.mark.slow
def test_a_stopped_job_goes_on_where_it_was(
    llm: LLM, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recipe, "start", lambda recipe: llm)
    source, out = write_input(tmp_path / "in.parquet", 40), tmp_path / "out"

    def stop(progress: Progress) -> None:
        if progress.rows == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_parquet(checkpoint, [source], out, rows_per_part=10, on_progress=stop)
    parts = sorted(out.glob("part-*"))
    times = [path.stat().st_mtime_ns for path in parts]
    os.truncate(parts[0], 100)  # as a power failure might
    result = score_parquet(checkpoint, [source], out, rows_per_part=10)
    assert (result.rows, result.kept) == (40, 10 * (len(parts) - 1))
    assert [path.stat().st_mtime_ns for path in parts[1:]] == times[1:]
    found = parquet.read_table(out)
    assert found["user"].to_pylist() == list(range(40))
    assert found["error"].null_count == 40
    assert set(found["catalogue_version"].to_pylist()) == {llm.llm_engine.renderer.service.catalogue.version}
