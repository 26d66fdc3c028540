"""One call for a whole job: find the parts, score those that are missing, say what came of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nezha_vllm.batch.columns import Columns, find_columns
from nezha_vllm.batch.engine import Recipe, Worker, describe
from nezha_vllm.batch.output import Output
from nezha_vllm.batch.parts import Part, examine, find_files, parts_of
from nezha_vllm.batch.scorer import check_options

if TYPE_CHECKING:
    from nezha_vllm.batch.on_ray import Cluster

ROWS_PER_PART = 10_000  # about 7 s of an H100: what a killed worker loses


@dataclass(frozen=True)
class Progress:
    """``rows`` of ``total`` are done, ``errors`` of them as error rows, ``kept`` by earlier runs."""

    total: int
    rows: int
    errors: int
    kept: int


def score_parquet(
    checkpoint: str | os.PathLike[str],
    inputs: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    history: str = "history",
    prompt: str | None = None,
    options: Mapping[str, Any] | None = None,
    last: int | None = None,
    rows_per_part: int = ROWS_PER_PART,
    engine: Mapping[str, Any] | None = None,
    cluster: Cluster | None = None,
    on_begin: Callable[[Columns], None] = lambda columns: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Recommendations for every row of Parquet files, into a folder of Parquet files.

    Columns named as options of the API (``n``, ``beam_width``, ``exclude_items`` …) hold for their row. A row that
    the API would refuse gets the reason in its column ``error``. Stopped at any moment and called again with the same
    arguments, it does the parts that are missing; every row comes out once.

    Args:
        inputs: Parquet files with the same columns, or folders of them.
        history: the column of item IDs, oldest first. ``prompt`` names a column of texts instead.
        options: for rows that do not set them: ``n`` (default 10) and what ``vllm_xargs`` takes.
        last: how many of the latest items of a history to use; default: all.
        engine: arguments of ``vllm.LLM``.
        cluster: Ray workers; None scores with one engine in this process. Paths must be the same on all nodes.

    Raises:
        ValueError: input, options, catalogue or output folder, with the remedy.
    """
    inputs = list(inputs)
    files, schema = examine(find_files(inputs))
    columns, options = find_columns(schema, history, prompt), {"n": 10, **(options or {})}
    check_options(options, last)
    if rows_per_part < 1:
        raise ValueError(f"rows_per_part is {rows_per_part}, must be at least 1")
    folder = Path(checkpoint).absolute()
    output = Output(out)
    job = {
        "checkpoint": {"path": str(folder), "files": _files_of(folder)},
        "inputs": [[file.path, list(file.row_groups), file.footer] for file in files],
        "columns": {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(columns).items()
        },
        "options": options,
        "last": last,
        "rows_per_part": rows_per_part,
        "engine": dict(engine or {}),
        "catalogue": _catalogue_of(folder, engine or {}),
    }
    job = json.loads(json.dumps(job))  # as it will be read again
    for given in map(Path, inputs):
        if given.is_dir() and output.folder.is_relative_to(given.absolute()):
            raise ValueError(f"{output.folder} lies in the input {given}; name a folder elsewhere with --out")
    with output.locked():
        path, version = output.begin(job)["catalogue"]
        recipe = Recipe(str(folder), str(output.folder), columns, options, last, path, version, dict(engine or {}))
        on_begin(columns)
        return _finish(output, list(parts_of(files, rows_per_part)), recipe, cluster, on_progress)


def _finish(
    output: Output,
    parts: list[Part],
    recipe: Recipe,
    cluster: Cluster | None,
    on_progress: Callable[[Progress], None],
) -> Progress:
    """Score the parts that are not there."""
    total = sum(part.rows for part in parts)
    missing, errors, kept = [], 0, 0
    for part in parts:
        found = output.errors_of(part)
        if found is None:
            missing.append(part)
        else:
            errors, kept = errors + found, kept + part.rows
    progress = Progress(total, kept, errors, kept)
    on_progress(progress)
    if missing:

        def advance(rows: int) -> None:
            on_progress(replace(progress, rows=progress.rows + rows))

        for rows, wrong in _score(missing, recipe, cluster, advance):
            progress = Progress(total, progress.rows + rows, progress.errors + wrong, kept)
            on_progress(progress)
    lost = [part.name for part in missing if output.errors_of(part) is None]
    if lost or progress.rows != total:
        raise RuntimeError(f"{len(lost)} parts are missing in {output.folder}, {lost[:3]}; run it again")
    output.finish({"rows": total, "errors": progress.errors})
    return progress


def _score(
    parts: list[Part], recipe: Recipe, cluster: Cluster | None, advance: Callable[[int], None]
) -> Iterator[tuple[int, int]]:
    """Rows and errors of each part as it is done; ``advance`` hears of those in between, where that can be."""
    if cluster is not None:
        from nezha_vllm.batch.on_ray import run_on_ray

        yield from run_on_ray(parts, recipe, cluster)
        return
    worker = Worker(recipe)
    for part in parts:
        yield part.rows, worker.run(part, advance)


def _files_of(checkpoint: Path) -> dict[str, list[int]]:
    config = checkpoint / "config.json"
    if not config.is_file():
        raise ValueError(f"no checkpoint at {checkpoint}: config.json is missing; make one with `nezha train`")
    return {path.name: describe(path) for path in [config, *sorted(checkpoint.glob("*.safetensors"))]}


def _catalogue_of(checkpoint: Path, engine: Mapping[str, Any]) -> list[str]:
    """Folder and version: the one asked for, else the current one; of a store, the version's own folder.

    Raises ``CatalogueError``.
    """
    from nezha_vllm.manifest import CatalogueError, read_manifest
    from nezha_vllm.pointer import is_store, read_pointer, version_folder

    options = (engine.get("additional_config") or {}).get("nezha") or {}
    configured = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("catalogue", "catalogue")
    folder, asked = checkpoint / (options.get("catalogue") or configured), options.get("catalogue_version")
    if is_store(folder):
        folder = version_folder(folder, read_pointer(folder).version if asked is None else str(asked))
    version = read_manifest(folder)["version"]
    if asked not in (None, version):
        raise CatalogueError(f"catalogue {folder} is version {version}, but the job asks for {asked}")
    return [str(folder), version]
