"""The same question asked of a server: what it ranks for every history, and how long each request took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from nezha_vllm import client
from nezha_vllm.training.evaluation import Track


@dataclass(frozen=True)
class Server:
    """``clients`` requests are under way at a time; latencies are those under this load."""

    url: str
    clients: int = 1


@dataclass(frozen=True)
class Served:
    """The best items of each history, and the milliseconds of each request."""

    items: list[list[str]]
    milliseconds: list[float]


def served_items(
    server: Server,
    histories: Sequence[Sequence[str]],
    *,
    n: int,
    max_history: int,
    beam_width: int,
    validity: str,
    catalogue_version: str,
    track: Track = iter,
) -> Served:
    """Ask for the n best items behind the last ``max_history`` items of each history.

    Raises ``ValueError`` if nothing answers at the URL, the server refuses, or it has another catalogue.
    """
    import openai

    asking = client.connect(server.url)
    try:
        model = asking.models.list().data[0].id

        def ask(items: Sequence[str]) -> client.Answer:
            options = {"beam_width": beam_width, "validity": validity}
            return client.recommend(asking, items[-max_history:], n, model, **options)

        answers = list(_in_parallel(ask, histories, server.clients, track))
    except openai.APIConnectionError:
        raise ValueError(f"no server answers at {server.url}; start one with `nezha serve`") from None
    except openai.APIStatusError as error:
        raise ValueError(f"the server at {server.url} refused a request: {error}") from None
    other = next((answer for answer in answers if answer.catalogue_version != catalogue_version), None)
    if other:
        raise ValueError(
            f"the server at {server.url} has catalogue {other.catalogue_version}, the checkpoint {catalogue_version}; "
            "start it with this checkpoint"
        )
    return Served(
        [[item.item_id for item in answer.items] for answer in answers], [answer.milliseconds for answer in answers]
    )


def _in_parallel(ask, histories: Sequence[Sequence[str]], clients: int, track: Track) -> Iterable[client.Answer]:
    with ThreadPoolExecutor(clients) as pool:
        answers = pool.map(ask, histories)
        for _ in track(range(len(histories))):
            yield next(answers)
