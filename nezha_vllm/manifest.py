"""The manifest that vouches for a catalogue's files: written last, read first."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from nezha_vllm.semantic_id import SemanticIdCodec

FORMAT = 1
MANIFEST = "manifest.json"
REBUILD = "write it again with Catalogue.save or `nezha tokenize`"
MAX_BYTES = 1 << 20  # of a manifest or a pointer; 256 names of segments are 200 KB at most
FIELDS = {"version": str, "num_items": int, "num_ids": int, "files": dict, "checksum": str}


class CatalogueError(ValueError):
    """A catalogue cannot be built, read or trusted; the message names the file and the remedy."""


def write_manifest(folder: Path, files: tuple[str, ...], **facts: Any) -> None:
    """Vouch for ``files`` as they are now, and for ``facts``."""
    manifest = {"format": FORMAT, **facts, "files": {name: _fingerprint(folder / name) for name in files}}
    manifest["checksum"] = checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def check_file(path: Path, manifest: dict[str, Any]) -> None:
    """Raise ``CatalogueError`` unless the file is the one that the manifest vouches for."""
    expected = manifest["files"].get(path.name)
    if expected is None or not path.is_file():
        raise CatalogueError(f"{path} is missing; {REBUILD}")
    try:
        # a file that has grown without end is not read to its end
        same = isinstance(expected, dict) and path.stat().st_size == expected.get("bytes")
        same = same and _fingerprint(path) == expected
    except OSError as error:
        raise CatalogueError(f"{path} cannot be read: {error}") from error
    if not same:
        raise CatalogueError(f"{path} is damaged: its size or checksum is not the one in {MANIFEST}; {REBUILD}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest, its own checksum verified. Raises ``CatalogueError``."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CatalogueError(
            f"no catalogue at {folder}: {path} is missing; build one with `nezha tokenize` or `nezha catalogue build`, "
            "or set `catalogue` in the checkpoint's config.json to its folder"
        )
    try:
        manifest = json.loads(read_small(path))
        if manifest["format"] != FORMAT:
            raise CatalogueError(f"{path}: format {manifest['format']} is not {FORMAT}, the one this version reads")
        SemanticIdCodec(manifest["codebook_sizes"])
        absent = FIELDS.keys() - manifest.keys()
        if absent:
            raise CatalogueError(f"{path}: {sorted(absent)} missing; {REBUILD}")
        wrong = sorted(name for name, kind in FIELDS.items() if type(manifest[name]) is not kind)
        if wrong:
            raise CatalogueError(f"{path} is damaged: {wrong} of a wrong type; {REBUILD}")
        if manifest["checksum"] != checksum(manifest):
            raise CatalogueError(f"{path} is damaged: its checksum does not match; {REBUILD}")
    except CatalogueError:
        raise
    except (KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        raise CatalogueError(f"{path} is damaged ({error!r}); {REBUILD}") from error
    return manifest


def read_small(path: Path) -> str:
    """A text that people could read. Raises ``ValueError`` rather than fill the memory with what is none."""
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    return content.decode()


def checksum(fields: dict[str, Any]) -> str:
    """SHA-256 of a JSON object without its field ``checksum``."""
    rest = {name: value for name, value in fields.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
