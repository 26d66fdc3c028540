"""What a training run is made of. The defaults are the winners of a search on MovieLens 100K (docs/training.md)."""

from __future__ import annotations

from dataclasses import dataclass

SASREC = "sasrec"  # a teacher that is trained first, with the run's seed; with its own as sasrec:SEED


def sasrec_seed(teacher: str, seed: int) -> int | None:
    """The seed of a teacher that is SASRec in a run with ``seed``; None of another teacher. Raises ``ValueError``."""
    kind, colon, own = teacher.partition(":")
    if kind != SASREC:
        return None
    if colon and not (own.isascii() and own.isdigit() and len(own.lstrip("0")) < 20 and int(own) < 2**63):
        raise ValueError(f"teacher {teacher!r}: behind `{SASREC}:` stands its seed, a whole number below 2**63")
    return int(own) if colon else seed


@dataclass(frozen=True)
class TrainingOptions:
    """``*_rate`` are relative to ``learning_rate``; a batch counts rows of up to ``max_history`` targets each.

    ``item_tokens``: of the most frequent items, at most, see ``nezha_vllm.item_tokens``; 0 for none, and a checkpoint
    that is trained on keeps its own; ``short_histories``: whether each stands for all codes of its item, which such a
    checkpoint keeps, too. ``item_token_dropout``: see ``packing``.
    ``level_weights``: of the levels' losses, empty for equal ones. ``tie_codes``: see ``regularise.tie_codes``;
    ``item_loss``: weight of the loss of items that have a token, see ``nezha_vllm.item_scores``;
    ``teachers``: ``sasrec``, ``sasrec:SEED`` or folders of checkpoints, ``teacher_weight``: their share of the targets,
    see ``lesson``;
    ``average``: decay a step of averaged weights, 0 for none.
    """

    epochs: int = 14
    batch_size: int = 32
    learning_rate: float = 6e-3
    code_embedding_rate: float = 1.0
    cell_rate: float = 1.0
    weight_decay: float = 0.01
    warmup: float = 0.03
    max_history: int = 20
    dropout: float = 0.1
    dropout_by: str = "row"
    item_dropout: float = 0.2
    head_dropout: float = 0.0
    label_smoothing: float = 0.0
    level_weights: tuple[float, ...] = ()
    tie_codes: str = ""
    item_loss: float = 0.3
    teachers: tuple[str, ...] = ()
    teacher_weight: float = 0.5
    average: float = 0.0
    patience: int = 0
    validate_every: int = 1
    select: str = "loss"
    item_tokens: int = 100_000
    short_histories: bool = False
    item_token_dropout: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_history", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', ' ')} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"the learning rate must be positive, got {self.learning_rate}")
        if self.item_tokens < 0:
            raise ValueError(f"item tokens must be at least 0, got {self.item_tokens}")
        for name in (
            "dropout",
            "item_dropout",
            "item_token_dropout",
            "head_dropout",
            "label_smoothing",
            "average",
            "warmup",
        ):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', ' ')} must be in [0, 1), got {getattr(self, name)}")
        if self.item_loss < 0 or any(weight <= 0 for weight in self.level_weights):
            raise ValueError(f"weights of losses must be positive, got {self.level_weights} and {self.item_loss}")
        if not 0 < self.teacher_weight <= 1:
            raise ValueError(f"the teachers' weight must be in (0, 1], got {self.teacher_weight}")
        seeds = [sasrec_seed(one, self.seed) for one in self.teachers]
        once = {one if seed is None else seed for one, seed in zip(self.teachers, seeds, strict=True)}
        if len(once) < len(self.teachers) or not all(self.teachers):
            raise ValueError(
                f"teachers must be `{SASREC}`, `{SASREC}:SEED` or folders, each once, got {list(self.teachers)}"
            )
        if self.dropout_by not in ("row", "token"):
            raise ValueError(f"dropout by {self.dropout_by!r}, must be row or token")
        if self.tie_codes not in ("", "in", "out", "both"):
            raise ValueError(f"tie codes is {self.tie_codes!r}, must be in, out or both")
        if self.select not in ("loss", "ndcg@10"):
            raise ValueError(f"select is {self.select!r}, must be loss or ndcg@10")


# Rates of the paper's code; they belong to a pretrained backbone.
PRETRAINED = {
    "learning_rate": 1e-5,
    "code_embedding_rate": 100.0,
    "cell_rate": 10.0,
    "weight_decay": 1e-5,
    "dropout": 0.0,
    "item_dropout": 0.0,
}
