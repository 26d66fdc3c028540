"""The demo's real users: whom to ask for, and how an answer is shown beside what they watched next."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from nezha_vllm import client
from nezha_vllm.cli.titles import ranking, read_titles
from nezha_vllm.data.dataset import Dataset

SHOWN = 3
WATCHED_SHOWN = 5


@dataclass(frozen=True)
class Viewer:
    """A user with all but the last item as the history; ``held_out`` is that last item, which training never saw."""

    user: str
    history: list[str]
    held_out: str


def draw(folder: Path, count: int, seed: int, latest: int) -> list[Viewer]:
    """``count`` users of the demo's data set, drawn at random, with the ``latest`` items of their histories."""
    split = Dataset.load(folder / "dataset").split()
    histories = split.history("test")
    chosen = random.Random(seed).sample(range(len(split.users)), min(count, len(split.users)))
    return [Viewer(split.users[at], histories[at][-latest:], split.test_target[at]) for at in chosen]


def ask(url: str, viewers: Sequence[Viewer], n: int) -> list[client.Answer]:
    """One request a viewer, one after the other; the first, which warms the server up, is asked twice."""
    server = client.connect(url)
    model = server.models.list().data[0].id
    client.recommend(server, viewers[0].history, n, model)
    return [client.recommend(server, viewer.history, n, model) for viewer in track(viewers, "asking", transient=True)]


def show(
    console: Console, catalogue: Path, viewers: Sequence[Viewer], answers: Sequence[client.Answer], n: int
) -> None:
    """Print the first answers, one with the held-out film in it if none of those has it, and the sum of all."""
    titles = read_titles(catalogue)
    hits = [_rank(viewer, answer) is not None for viewer, answer in zip(viewers, answers, strict=True)]
    shown = list(range(min(SHOWN, len(viewers))))
    extra = hits.index(True) if any(hits) and not any(hits[at] for at in shown) else None
    for at in shown:
        _show_one(console, titles, viewers[at], answers[at])
    if extra is not None:
        console.print("\nand, not drawn at random, the first user whose held-out film is found:")
        _show_one(console, titles, viewers[extra], answers[extra])
    milliseconds = statistics.median(answer.milliseconds for answer in answers)
    console.print(
        f"\n{len(viewers)} users drawn at random: the film they watched next, held out of the training, is among the "
        f"{n} recommended for {sum(hits)} of them. Median time of a request: {milliseconds:.1f} ms.",
        highlight=False,
    )


def _show_one(console: Console, titles: Mapping[str, str], viewer: Viewer, answer: client.Answer) -> None:
    watched = " · ".join(titles.get(item) or item for item in viewer.history[-WATCHED_SHOWN:])
    console.print(f"\nUser {viewer.user} watched last: {watched}", highlight=False)
    console.print(ranking(answer.items, titles, held_out=viewer.held_out))
    rank = _rank(viewer, answer)
    verdict = f"rank {rank}" if rank else "not among them"
    title = titles.get(viewer.held_out) or viewer.held_out
    console.print(f"held out: {title}: {verdict}; {answer.milliseconds:.1f} ms", highlight=False)


def _rank(viewer: Viewer, answer: client.Answer) -> int | None:
    """Place of the held-out item, from 1."""
    items = [item.item_id for item in answer.items]
    return items.index(viewer.held_out) + 1 if viewer.held_out in items else None
