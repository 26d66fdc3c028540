"""Teachers: trained recommenders whose distributions over items are targets beside the true ones (``--teacher``).

What is learnt of them is in ``lesson``, how each reads and answers in ``teacher_models``. They read a history as it is,
whatever the student's has lost to dropout.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nezha_vllm.training.lesson import Codes, Lesson
from nezha_vllm.training.options import TrainingOptions, sasrec_seed
from nezha_vllm.training.sasrec import SasRec, SasRecModel, SasRecOptions
from nezha_vllm.training.teacher_models import NezhaTeacher, Reader, SasRecTeacher

if TYPE_CHECKING:
    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.data.dataset import Split
    from nezha_vllm.item_tokens import ItemTokens
    from nezha_vllm.training.packing import PackedCollator


class Teachers:
    """All teachers of a run: ``teachers(batch, labelled)`` → the mean of their distributions.

    They are no part of the model: it neither trains nor saves them. Made in two steps, so that wrong ones are refused
    before the run folder is touched, where SASRec may lie. Neither step draws from torch's global generators.

    ``digests``: what each was made of, which makes a run another.
    """

    def __init__(
        self, options: TrainingOptions, tokens: ItemTokens, catalogue: Catalogue, split: Split, device: torch.device
    ) -> None:
        self.weight, self.tokens, self.catalogue = options.teacher_weight, tokens, catalogue
        self.split, self.device = split, device
        positions = max(SasRecOptions.max_history, options.max_history)
        seeds = {name: sasrec_seed(name, options.seed) for name in options.teachers}
        sasrecs = [SasRecOptions(seed=one, max_history=positions) for one in seeds.values() if one is not None]
        folders = [name for name, seed in seeds.items() if seed is None]
        with self._own_random():
            self.members: list[NezhaTeacher | SasRecTeacher] = [
                NezhaTeacher(folder, tokens, catalogue, device) for folder in folders
            ]
        self.digests = [_digest_of_folder(Path(folder)) for folder in folders]
        if len(set(self.digests)) < len(folders):
            raise ValueError(f"--teacher {' '.join(folders)}: the same weights more than once, name each once")
        self.sasrecs = {
            _digest_of(asdict(one), catalogue.version, split.train, split.valid_history, split.valid_target): one
            for one in sasrecs
        }
        self.digests += self.sasrecs
        self.codes = Codes(tokens, device)

    def learn(self, folder: Path, write: Callable[[str], None]) -> None:
        """Train what is asked for of SASRec and not in ``folder`` yet; of several processes one does."""
        items = self.catalogue.item_ids(range(self.catalogue.num_items)) if self.sasrecs else []
        for digest, options in self.sasrecs.items():
            path = folder / f"sasrec-{digest[:16]}.safetensors"
            with self._own_random(), _alone(path):
                if not path.is_file():
                    valid = self.split.valid_history, self.split.valid_target
                    made = SasRec(self.split.train, items, *valid, options, self.device, write)
                    partial = path.with_suffix(".partial")
                    save_file(made.model.state_dict(), partial)
                    partial.replace(path)
                model = SasRecModel(len(items), options).to(self.device)
            model.load_state_dict(load_file(path))
            self.members.append(SasRecTeacher(model, options.heads, self.tokens, self.catalogue))

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor], labelled: Tensor | None) -> Lesson:
        total_VI = None
        for teacher, name in zip(self.members, self.names, strict=True):
            own = {key.removeprefix(name): value for key, value in batch.items() if key.startswith(name)}
            hidden_VH = teacher.hidden(**own).flatten(0, 1)
            p_VI = teacher.probabilities(hidden_VH if labelled is None else hidden_VH[labelled])
            total_VI = p_VI if total_VI is None else total_VI.add_(p_VI)
        assert total_VI is not None, "no teacher has learnt"
        return Lesson(total_VI.div_(len(self.members)), self.weight, self.codes)

    @property
    def names(self) -> list[str]:
        """Before the names of what each reads; those that read the same share it."""
        reads = [teacher.reads for teacher in self.members]
        return [f"teacher{reads.index(one)}_" for one in reads]

    def _own_random(self) -> Any:
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])


@dataclass(frozen=True)
class TaughtCollator:
    """Numbered pieces → the student's arguments of ``forward``, and behind them what its teachers read."""

    student: PackedCollator
    readers: Mapping[str, Reader]

    @classmethod
    def of(cls, student: PackedCollator, teachers: Teachers, short_rows: bool) -> TaughtCollator:
        """``short_rows``: see ``PackedCollator``, where every item stands as its token."""
        pairs = zip(teachers.names, teachers.members, strict=True)
        return cls(student, {name: teacher.reader(student, short_rows) for name, teacher in pairs})

    def __call__(self, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
        where = self.student.where(pieces)
        batch = self.student([codes[:, :-1] for codes in pieces], where)
        with torch.random.fork_rng([]):  # what the student draws next is what it would without teachers
            for name, reader in self.readers.items():
                batch |= {name + key: value for key, value in reader(pieces, where).items()}
        return batch


def numbered(codes: Sequence[Tensor], sequences: Sequence[Sequence[str]], catalogue: Catalogue) -> list[Tensor]:
    """Codes of sequences with the items' catalogue rows as one more column [items, L + 1]; single items are left out.

    SASRec tells items that share a semantic ID apart.
    """
    pairs = [(one, items) for one, items in zip(codes, sequences, strict=True) if len(items) >= 2]
    return [torch.cat([one, torch.tensor(catalogue.rows(items))[:, None]], 1) for one, items in pairs]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time makes this file; the lock of one that dies is free again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest_of_folder(folder: Path) -> str:
    digests = []
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return _digest_of(digests)
