"""One training run: sequences and a catalogue in, the best model out; interrupted runs go on where they stopped."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainingArguments

from nezha_vllm.item_scores import WEIGHTS
from nezha_vllm.training.averages import FILE, Averages
from nezha_vllm.training.evaluation import HeldOut
from nezha_vllm.training.graphs import fuse_norms
from nezha_vllm.training.item_embeddings import ItemEmbeddings, frequent_keys
from nezha_vllm.training.item_loss import ItemLoss
from nezha_vllm.training.metrics import ndcg
from nezha_vllm.training.options import TrainingOptions
from nezha_vllm.training.packing import PackedCollator, Segments, shortened
from nezha_vllm.training.regularise import add_dropout, add_head_dropout, tie_codes
from nezha_vllm.training.resume import identity, resumable
from nezha_vllm.training.teachers import TaughtCollator, Teachers, numbered
from nezha_vllm.training.trainer import EpochLine, NezhaTrainer

if TYPE_CHECKING:
    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.data.dataset import Split
    from nezha_vllm.training.evaluation import NezhaModel

GPU_ROWS = 8  # rows of a batch come in multiples, so that few shapes occur (see StepGraphs)
VALIDATION_BEAMS = 10  # the ten best need no more, and it runs every epoch
ITEM_SCORE_BEAMS = 50  # they need some to choose from


def codes_of(sequences: Sequence[Sequence[str]], catalogue: Catalogue) -> list[Tensor]:
    """Item IDs → codes [items, L] a sequence. Raises ``UnknownItemError``."""
    codes = {item: catalogue.codes_of(item) for item in dict.fromkeys(item for items in sequences for item in items)}
    return [torch.tensor([codes[item] for item in items]) for items in sequences]


def fit(
    model: NezhaModel,
    catalogue: Catalogue,
    split: Split,
    options: TrainingOptions,
    run_folder: Path,
    *,
    prefix: Sequence[int] = (),
    teacher_cache: Path | None = None,
    write: Callable[[str], None] = tqdm.write,
) -> NezhaTrainer:
    """Train ``model`` in place on ``split.train``; it ends with the weights that validated best.

    Args:
        split: its validation items also choose what item scores count beside codes, ``config.item_score_weight``.
        run_folder: where the Trainer keeps its checkpoints. If one of the same run is there, training goes on from it;
            one of another run is removed. The caller removes the folder when the result is safe.
        teacher_cache: where SASRec lies once it is trained as a teacher; the run folder without it.
    """
    if options.level_weights and len(options.level_weights) != model.config.num_levels:
        raise ValueError(
            f"{len(options.level_weights)} level weights, the catalogue has {model.config.num_levels} levels"
        )
    if options.short_histories and not (options.item_tokens or model.config.num_item_tokens):
        raise ValueError("short histories are made of item tokens: ask for some, or leave --short-histories out")
    if options.teachers and not (options.item_tokens or model.config.num_item_tokens):
        raise ValueError("teachers know items by their tokens: ask for some, or leave --teacher out")
    codes = codes_of(split.train, catalogue)
    segments = Segments(codes, options.max_history)
    if options.item_tokens and not model.config.num_item_tokens:
        keys = frequent_keys(segments.sequences, model.config.codec, options.item_tokens)
        model.config.short_histories = options.short_histories
        model.item_embeddings = ItemEmbeddings(model.config, keys, model.model.embed_tokens)
    arguments = _arguments(options, run_folder, len(segments))
    device = arguments.device
    multiple = GPU_ROWS if device.type == "cuda" else 1
    collator = PackedCollator(
        model.config,
        options.max_history,
        tuple(prefix),
        options.item_dropout,
        device,
        multiple,
        model.item_tokens,
        options.item_token_dropout,
        shortened(segments.sequences, model.item_tokens, options.item_token_dropout),
    )
    if device.type == "cuda":
        fuse_norms(model)
    add_dropout(model, options.dropout, options.dropout_by)
    add_head_dropout(model, options.head_dropout)
    model.label_smoothing, model.level_weights = options.label_smoothing, options.level_weights
    if options.tie_codes:
        tie_codes(model, options.tie_codes)
    if model.config.softmax == "catalogue":
        model.keys_M = torch.from_numpy(catalogue.keys.copy()).to(device)
    model.config.item_score_weight = 0.0  # until the weight is chosen, at the end
    if options.item_loss and model.item_tokens is not None:
        model.item_loss = ItemLoss(model.item_tokens, options.item_loss).to(device)
    ask: dict[str, Any] = {"max_history": options.max_history, "prefix": prefix, "item_tokens": model.item_tokens}
    valid = HeldOut(model.config, catalogue, split.valid_history, split.valid_target, **ask)
    teachers = None
    if options.teachers and model.item_tokens is not None:
        teachers = Teachers(options, model.item_tokens, catalogue, split, device)
    with arguments.main_process_first(local=False):
        run = identity(options, catalogue, model.config, split.train, teachers.digests if teachers else ())
        last = resumable(run_folder, run, [FILE] if options.average else [])
        if teachers:
            teachers.learn(teacher_cache or run_folder, write)
    collate: PackedCollator | TaughtCollator = collator
    if teachers:
        collate = TaughtCollator.of(collator, teachers, shortened(segments.sequences, model.item_tokens, 0.0))
        segments = Segments(numbered(codes, split.train, catalogue), options.max_history)
        model.teachers = teachers

    def validate() -> dict[str, float]:
        with averages.used() if averages else nullcontext():
            model.copy_tied_codes()
            return {"loss": valid.loss(model), "ndcg@10": best_ndcg()}

    def best_ndcg() -> float:
        if model.item_loss is None:
            return ndcg(valid.ranks(model, VALIDATION_BEAMS), 10)
        return max(valid.ndcg_by_weight(model, ITEM_SCORE_BEAMS, (0.0, *WEIGHTS)).values())

    trainer = NezhaTrainer(
        options,
        validate,
        model=model,
        args=arguments,
        train_dataset=segments,
        eval_dataset=[],
        data_collator=collate,
        callbacks=[EpochLine(write), *([EarlyStoppingCallback(options.patience)] if options.patience else [])],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar)
    averages = Averages(model, options.average) if options.average else None
    if averages:
        trainer.add_callback(averages)
    if averages and last:
        averages.load(last)
    trainer.train(resume_from_checkpoint=last)
    if averages and trainer.state.best_model_checkpoint:
        averages.load(trainer.state.best_model_checkpoint)
        averages.put()
    model.copy_tied_codes()
    model.teachers = None
    if model.item_loss is not None:
        found = valid.ndcg_by_weight(model, ITEM_SCORE_BEAMS, (0.0, *WEIGHTS))
        model.config.item_score_weight, model.item_loss = max(found, key=lambda weight: found[weight]), None
        trainer.ndcg_by_weight = found
    model.settle_item_tokens()
    return trainer


class _Bar(ProgressCallback):
    """The Trainer's bar, named and without its dictionaries."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **arguments: Any) -> None:
        super().on_train_begin(args, state, control, **arguments)
        if self.training_bar is not None:
            self.training_bar.set_description("training")

    def on_log(self, *_: object, **__: object) -> None:
        pass


def _arguments(options: TrainingOptions, run_folder: Path, rows: int) -> TrainingArguments:
    strategy, steps = "epoch", 0
    if options.validate_every > 1:
        world = int(os.environ.get("WORLD_SIZE", 1))
        strategy, steps = "steps", options.validate_every * math.ceil(rows / (options.batch_size * world))
    arguments = TrainingArguments(
        output_dir=str(run_folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.warmup,  # below 1: a share of all steps
        max_grad_norm=1.0,
        use_cpu=not torch.accelerator.is_available(),  # else processes of torchrun on CPUs would each train alone
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        eval_strategy=strategy,
        eval_steps=steps or None,
        save_strategy=strategy,
        save_steps=steps or 500,
        logging_strategy=strategy,
        logging_steps=steps or 500,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{options.select}",
        greater_is_better=options.select != "loss",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,  # the collator brings batches to the device
        logging_nan_inf_filter=False,  # it would wait for the GPU at every step
        report_to="none",
        seed=options.seed,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs through torchrun, not by threads that split each batch
    return arguments
