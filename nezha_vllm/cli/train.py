"""Train NEZHA on a prepared data set and a catalogue; OUT is a checkpoint folder that vLLM serves.

    nezha train data/ml-100k data/ml-100k-catalogue --out nezha-ml-100k
    nezha train DATASET CATALOGUE --out nezha --backbone ./Llama-3.2-1B --epochs 20 --batch 32
    torchrun --nproc-per-node 8 -m nezha_vllm.cli train …            several GPUs

An interrupted run goes on from its last finished epoch when the same command is given again.
"""

from __future__ import annotations

import argparse

SUMMARY = "train a checkpoint from a data set and a catalogue"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nezha_vllm.semantic_id import SOFTMAX_OVER
    from nezha_vllm.training.options import TrainingOptions

    default = TrainingOptions()
    parser.add_argument("dataset", metavar="DATASET", help="folder made by `nezha prepare`")
    parser.add_argument("catalogue", metavar="CATALOGUE", help="folder made by `nezha tokenize`")
    parser.add_argument("--out", required=True, metavar="CKPT", help="checkpoint folder to write or replace")
    parser.add_argument(
        "--backbone",
        default="scratch",
        metavar="scratch|PATH",
        help="start from nothing (default), from a local Hugging Face folder, or from a folder of `nezha init`",
    )

    def option(name: str, kind: type, field: str, text: str) -> None:
        parser.add_argument(name, type=kind, dest=field, help=f"{text} (default {getattr(default, field)})")

    option("--epochs", int, "epochs", "passes over the data")
    option("--batch", int, "batch_size", "rows a step and device; a row trains up to --max-history targets")
    option("--lr", float, "learning_rate", "peak learning rate; with a backbone 1e-5")
    option(
        "--embedding-rate",
        float,
        "code_embedding_rate",
        "relative rate of code embeddings; with a backbone 100",
    )
    option("--cell-rate", float, "cell_rate", "relative rate of the cells; with a backbone 10")
    option("--weight-decay", float, "weight_decay", "weight decay; with a backbone 1e-5")
    option("--warmup", float, "warmup", "share of the steps with a rising learning rate")
    option("--max-history", int, "max_history", "items of history, in training and evaluation")
    option("--dropout", float, "dropout", "dropout of embeddings and blocks; with a backbone 0")
    parser.add_argument("--dropout-by", choices=("row", "token"), help="one mask a row (default), or one a token")
    option("--item-dropout", float, "item_dropout", "share of history items blotted out; with a backbone 0")
    option("--item-tokens", int, "item_tokens", "most frequent items that get a token of their own in histories")
    parser.add_argument(
        "--short-histories",
        action=argparse.BooleanOptionalAction,
        help="an item's token stands for all of its codes in a history, not for the last (default no); a checkpoint "
        "with item tokens that is trained on keeps its own",
    )
    option("--item-token-dropout", float, "item_token_dropout", "share of history items that show their codes instead")
    option("--head-dropout", float, "head_dropout", "dropout of code embeddings and of what the heads' outputs read")
    option("--label-smoothing", float, "label_smoothing", "share of the loss spread over all codes")
    option("--average", float, "average", "decay a step of averaged weights, which are what is kept; 0: none")
    option(
        "--item-loss",
        float,
        "item_loss",
        "weight of a loss over items with tokens, whose scores then count beside their codes; 0: codes alone",
    )
    parser.add_argument(
        "--teacher",
        nargs="+",
        dest="teachers",
        metavar="WHAT",
        help="recommenders whose distributions over items are targets, too: sasrec, which is trained first, with the "
        "run's seed (sasrec:SEED: with that one), or folders of checkpoints with the same catalogue and item tokens; "
        "of several the mean (default none)",
    )
    option("--teacher-weight", float, "teacher_weight", "share of the teachers in the targets of items and codes")
    parser.add_argument(
        "--teacher-cache",
        metavar="DIR",
        help="keeps SASRec there once it is trained, for other runs of the same data, catalogue and seed",
    )
    parser.add_argument(
        "--level-weights", type=_weights, metavar="W,W,…", help="of the levels' losses, relative (default equal)"
    )
    parser.add_argument(
        "--tie-codes", choices=("in", "out", "both"), help="what the head reads, predicts or both are the embeddings"
    )
    parser.add_argument(
        "--softmax",
        choices=SOFTMAX_OVER,
        help="over what a level's probabilities sum to one: all of its codes (codes, the default) or those that lead "
        "to an item (catalogue), which learns faster at first; a checkpoint that is trained on keeps its own",
    )
    option("--patience", int, "patience", "stop after so many validations without a better one; 0: never")
    option(
        "--validate-every", int, "validate_every", "epochs from one validation, and point to go on from, to the next"
    )
    option("--seed", int, "seed", "of weights, order and dropout")
    parser.add_argument(
        "--select", choices=("loss", "ndcg@10"), help=f"picks the best epoch (default {default.select})"
    )
    parser.add_argument(
        "--method",
        choices=("nezha", "nezha-1", "nezha-2", "nezha-3", "mtp", "ar"),
        help="what to train: nezha (default), or what it is compared with and is not served: its ablations, MTP heads, "
        "and ar, the autoregressive language model",
    )
    shape = parser.add_argument_group("shape of --backbone scratch")
    shape.add_argument("--family", choices=("llama", "qwen3"), default="llama")
    shape.add_argument("--hidden", type=int, default=64, help="hidden size (default %(default)s)")
    shape.add_argument("--layers", type=int, default=2, help="number of layers (default %(default)s)")
    shape.add_argument("--heads", type=int, default=2, help="attention heads; hidden / heads must be 32, 64, 96 or 128")
    shape.add_argument("--intermediate", type=int, help="size of the feed-forward layer (default 4 × hidden)")


def _weights(text: str) -> tuple[float, ...]:
    return tuple(float(weight) for weight in text.split(","))


def run(arguments: argparse.Namespace) -> int:
    from dataclasses import fields
    from pathlib import Path

    from nezha_vllm.data.dataset import Dataset
    from nezha_vllm.folders import check_replaceable
    from nezha_vllm.training.options import PRETRAINED, TrainingOptions

    out = Path(arguments.out).absolute()
    check_replaceable(out, "config.json")
    given = {field.name: getattr(arguments, field.name) for field in fields(TrainingOptions)}
    chosen = {name: value for name, value in given.items() if value is not None}
    chosen["teachers"] = tuple(arguments.teachers or ())
    options = TrainingOptions(**(chosen if arguments.backbone == "scratch" else PRETRAINED | chosen))
    dataset = Dataset.load(arguments.dataset)

    import shutil
    import time

    from rich.console import Console
    from transformers.utils import logging

    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.hf.prompt import prefix_token_ids
    from nezha_vllm.training.fit import fit
    from nezha_vllm.training.start import save_trained, starting_model

    logging.disable_progress_bar()  # of loading weights; the training bar stays
    console = Console(stderr=True, soft_wrap=True)
    catalogue = Catalogue.load(arguments.catalogue)
    model, tokenizer, dtype = starting_model(
        arguments.backbone,
        catalogue,
        arguments,
        options.seed,
        arguments.method,
        arguments.softmax,
        arguments.short_histories,
    )
    console.print(
        f"{dataset.name}: {dataset.counts}; {model.config.num_hidden_layers} layers of {model.config.hidden_size}"
    )
    started = time.perf_counter()
    run_folder = out.parent / f".{out.name}-training"
    trainer = fit(
        model,
        catalogue,
        dataset.split(),
        options,
        run_folder,
        prefix=prefix_token_ids(tokenizer, model.config),
        teacher_cache=Path(arguments.teacher_cache).absolute() if arguments.teacher_cache else None,
    )
    if trainer.is_world_process_zero():
        seconds = round(time.perf_counter() - started, 1)
        save_trained(out, model, tokenizer, catalogue, dtype, options, seconds, trainer.validations)
        shutil.rmtree(run_folder, ignore_errors=True)
        if found := trainer.ndcg_by_weight:
            shown = ", ".join(f"{weight:g}: {ndcg:.4f}" for weight, ndcg in found.items())
            weight = model.config.item_score_weight
            console.print(f"item scores count {weight:g} times, by NDCG@10 of the validation items ({shown})")
        console.print(f"checkpoint -> {out}")
    return 0
