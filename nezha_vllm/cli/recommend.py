"""Ask a running server what comes after a history, through the stock OpenAI client.

  nezha recommend --history 50 172 181 --catalogue demo/catalogue
  nezha recommend --user 42 --dataset demo/dataset --n 5 --beam-width 100

The history is item IDs, oldest first. With --user it is all that the user has in the data set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "a history of items -> a running server's ranked items"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--history", nargs="+", metavar="ID", help="item IDs, oldest first")
    who.add_argument("--user", metavar="ID", help="a user of the data set given by --dataset")
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="folder made by `nezha prepare`; gives titles too")
    parser.add_argument("--catalogue", type=Path, metavar="DIR", help="folder of the catalogue, for titles")
    parser.add_argument("--last", type=int, metavar="N", help="use only the N latest items of the history")
    parser.add_argument("--n", type=int, default=10, help="how many items to ask for (%(default)s)")
    parser.add_argument("--beam-width", type=int, metavar="K", help="default: the checkpoint's")
    parser.add_argument("--validity", choices=("stepwise", "final"), help="default: the checkpoint's")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is (%(default)s)")
    parser.add_argument("--model", help="model name at the server; default: its first")


def run(arguments: argparse.Namespace) -> int:
    import openai
    from rich.console import Console

    from nezha_vllm import client
    from nezha_vllm.cli import UserError
    from nezha_vllm.cli.titles import ranking, read_titles

    history, titles = arguments.history, {}
    if arguments.user is not None and arguments.dataset is None:
        raise UserError("--user needs --dataset DIR, the folder that `nezha prepare` made")
    if arguments.dataset is not None:
        from nezha_vllm.data.dataset import Dataset

        dataset = Dataset.load(arguments.dataset)
        titles = dict(zip(dataset.item_ids, dataset.items["title"].to_pylist(), strict=True))
        if arguments.user is not None:
            if arguments.user not in dataset.users:
                raise UserError(f"user {arguments.user!r} is not in {arguments.dataset}")
            history = dataset.sequences[dataset.users.index(arguments.user)]
    if arguments.catalogue is not None:
        titles = read_titles(arguments.catalogue)
    if arguments.last is not None:
        if arguments.last < 1:
            raise UserError(f"--last is {arguments.last}, must be at least 1")
        history = history[-arguments.last :]

    names = ("beam_width", "validity")
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    try:
        answer = client.recommend(client.connect(arguments.url), history, arguments.n, arguments.model, **options)
    except openai.APIConnectionError:
        raise UserError(f"no server at {arguments.url}; start one with `nezha serve CHECKPOINT`") from None
    except openai.APIStatusError as error:
        raise UserError(f"the server refused: {_message(error)}") from None

    console = Console()
    if titles:
        console.print("after: " + " · ".join(titles.get(item) or item for item in history[-5:]), highlight=False)
    console.print(ranking(answer.items, titles))
    if answer.reason:
        console.print(f"{len(answer.items)} of {arguments.n}: {answer.reason}", highlight=False)
    console.print(f"{answer.milliseconds:.1f} ms, catalogue {answer.catalogue_version}", highlight=False)
    return 0


def _message(error: object) -> str:
    body = getattr(error, "body", None)
    return str(body["message"]) if isinstance(body, dict) and "message" in body else str(error)
