"""Whether an interrupted run can go on: same options, data, catalogue and model, and a checkpoint that is whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

if TYPE_CHECKING:
    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.config import NezhaConfig
    from nezha_vllm.training.options import TrainingOptions

NOTE = "run.json"
LAST_WRITTEN = "trainer_state.json"  # of a checkpoint of the Trainer


def identity(
    options: TrainingOptions,
    catalogue: Catalogue,
    config: NezhaConfig,
    sequences: Sequence[Sequence[str]],
    teachers: Sequence[str] = (),
) -> str:
    """What makes two runs the same, as JSON; ``teachers``: digests of them, wherever their folders lie."""
    data = hashlib.sha256(json.dumps(sequences).encode()).hexdigest()
    chosen = asdict(options) | {"teachers": list(teachers)}
    parts = {"options": chosen, "catalogue": catalogue.version, "data": data, "model": config.to_dict()}
    return json.dumps(parts, default=str, sort_keys=True)


def resumable(run_folder: Path, run: str, needed: Sequence[str] = ()) -> str | None:
    """The last checkpoint of the run with this identity, or None; a folder of another run is cleared.

    ``needed``: files that are written behind the Trainer's own, without which a checkpoint is not whole.
    """
    note = run_folder / NOTE
    if not (note.is_file() and note.read_text(encoding="utf-8") == run):
        shutil.rmtree(run_folder, ignore_errors=True)
        run_folder.mkdir(parents=True)
        note.write_text(run, encoding="utf-8")
    while (last := get_last_checkpoint(str(run_folder))) is not None and not _is_whole(Path(last), needed):
        shutil.rmtree(last)
    return last


def _is_whole(checkpoint: Path, needed: Sequence[str]) -> bool:
    try:
        TrainerState.load_from_json(str(checkpoint / LAST_WRITTEN))
    except (OSError, ValueError, TypeError):
        return False
    return all((checkpoint / name).is_file() for name in needed)
