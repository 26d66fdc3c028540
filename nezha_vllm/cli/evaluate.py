"""Hit and NDCG at 5 and 10 of a checkpoint beside baselines, Hit at 500 too with a beam that wide.

    nezha evaluate nezha-ml-100k data/ml-100k
    nezha evaluate nezha-ml-100k data/ml-100k --split valid --exclude-history
    nezha evaluate nezha-ml-100k data/ml-100k --baselines markov knn sasrec --intervals --results runs.csv
    nezha evaluate my-nezha data/mine --url http://127.0.0.1:8000 --clients 8
    nezha evaluate my-nezha data/mine --against my-ar my-mtp my-nezha-1 --beam-width 512 --intervals --alone 200

Leave-one-out, full ranking: every method ranks all items of the catalogue, and one held-out item a user counts.
Items of the history stay in every ranking, or with --exclude-history in none. The baselines learn from what the model
was trained on; SASRec is trained on the spot, which takes minutes. Writes CKPT-evaluation.json beside the checkpoint.
"""

from __future__ import annotations

import argparse

SUMMARY = "measure a checkpoint beside baselines"
BASELINES = ("popularity", "markov", "knn", "sasrec")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="folder made by `nezha train`")
    parser.add_argument("dataset", metavar="DATASET", help="folder made by `nezha prepare`")
    parser.add_argument("--split", choices=("test", "valid"), default="test", help="held-out items (%(default)s)")
    parser.add_argument("--beam-width", type=int, metavar="K", help="default: the checkpoint's, or its largest")
    parser.add_argument("--validity", choices=("stepwise", "final"), help="default: the checkpoint's; NEZHA-4 is final")
    parser.add_argument("--max-history", type=int, metavar="W", help="items of history; default as in training")
    parser.add_argument("--exclude-history", action="store_true", help="rank no item of the history")
    parser.add_argument(
        "--baselines",
        nargs="*",
        choices=BASELINES,
        default=["popularity", "markov"],
        help="methods beside the checkpoint (default popularity markov); sasrec is trained first",
    )
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="CKPT", help="further checkpoints, of other methods or seeds"
    )
    parser.add_argument("--url", metavar="URL", help="of a server of this checkpoint, asked the same as one more row")
    parser.add_argument("--clients", type=int, default=1, metavar="N", help="requests at a time, --url (%(default)s)")
    parser.add_argument("--alone", type=int, default=0, metavar="N", help="then ask N users one at a time, for latency")
    parser.add_argument("--intervals", action="store_true", help="show the differences with 95 %% intervals")
    parser.add_argument("--seed", type=int, default=0, help="of SASRec and the bootstrap (default %(default)s)")
    parser.add_argument("--results", metavar="FILE", help="add one line a method to this CSV")
    parser.add_argument("--run", dest="run_name", default="", metavar="NAME", help="name of these lines in --results")
    parser.add_argument("--ranks", metavar="FILE", help="write every user's rank by method, NumPy .npz, for intervals")
    parser.add_argument("--json", metavar="FILE", help="default CKPT-evaluation.json")


def run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from nezha_vllm.data.dataset import Dataset

    dataset = Dataset.load(arguments.dataset)

    from rich.console import Console
    from rich.progress import track
    from transformers.utils import logging

    from nezha_vllm.cli.checks import check_checkpoint
    from nezha_vllm.folders import write_atomically
    from nezha_vllm.training.comparison import compare, differences, table, to_json
    from nezha_vllm.training.results import append, save_ranks
    from nezha_vllm.training.served import Server
    from nezha_vllm.training.start import load_trained

    if arguments.clients < 1:
        raise ValueError(f"--clients must be at least 1, got {arguments.clients}")
    if arguments.alone < 0:
        raise ValueError(f"--alone is a number of users, got {arguments.alone}")
    folder, progress = Path(arguments.checkpoint), Console(stderr=True)
    for checkpoint in (folder, *arguments.against):
        check_checkpoint(checkpoint)
    logging.disable_progress_bar()
    ours = load_trained(folder)
    comparison = compare(
        ours.model,
        ours.catalogue,
        dataset,
        part=arguments.split,
        max_history=arguments.max_history or ours.max_history,
        beam_width=arguments.beam_width,
        validity=arguments.validity,
        exclude_history=arguments.exclude_history,
        prefix=ours.prefix,
        options=ours.options,
        others=[load_trained(Path(other)) for other in arguments.against],
        server=Server(arguments.url, arguments.clients) if arguments.url else None,
        alone=arguments.alone,
        baselines=arguments.baselines,
        seed=arguments.seed,
        track=lambda steps: track(steps, "ranking", console=progress, total=len(steps)),
        write=lambda line: progress.print(line, highlight=False),
    )
    Console().print(table(comparison))
    for row, found in comparison.latency.items():
        text = f"{row}: p50 {found['p50_ms']:.1f} ms, p99 {found['p99_ms']:.1f} ms, {found['clients']} at a time"
        Console().print(text, highlight=False)
    over_http = f"{comparison.model} over HTTP"
    if over_http in comparison.ranks:
        apart = int((comparison.ranks[over_http] != comparison.ranks[comparison.model]).sum())
        Console().print(f"ranks over HTTP: {apart:,} of {comparison.targets:,} differ", highlight=False)
    if arguments.intervals:
        Console().print(differences(comparison))
    path = Path(arguments.json) if arguments.json else folder.absolute().with_name(f"{folder.name}-evaluation.json")
    write_atomically(path, to_json(comparison))
    if arguments.ranks:
        save_ranks(arguments.ranks, comparison)
    if arguments.results:  # last: who sees the line finds everything else
        append(arguments.results, comparison, dataset, arguments.run_name)
    return 0
