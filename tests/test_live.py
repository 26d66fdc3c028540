"""A running server follows its store: real processes, real publications, every answer checked against its version."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from answers import assert_same_answer
from conftest import serving

from benchmarks.reliability import hangups
from benchmarks.reliability.clients import Clients, Tally
from benchmarks.reliability.kills import LONGEST, kill_under_load
from benchmarks.reliability.questions import Questions
from benchmarks.reliability.versions import Ranking, rankings, versions_of
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.client import prompt
from nezha_vllm.manifest import MANIFEST, checksum
from nezha_vllm.pointer import write_pointer
from nezha_vllm.scrape import metrics_of
from nezha_vllm.server import Server
from nezha_vllm.store import Store

pytestmark = pytest.mark.slow
N, POLL = 20, 0.1
HISTORIES = [[f"item-{number * 7 + step * 50 + 1}" for step in range(1 + number % 5)] for number in range(12)]


@dataclass
class Live:
    """A server on a store, and the versions there are to publish."""

    url: str
    store: Store
    folders: dict[str, Path]
    expected: dict[str, list[Ranking]]
    log: Path
    server: Server

    def questions(self, version: str) -> Questions:
        return Questions([prompt(history) for history in HISTORIES], {version: self.expected[version]}, N)

    def post(self, body: dict[str, Any], **headers: str) -> dict[str, Any]:
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/completions", data, {"Content-Type": "application/json"} | headers
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())

    def publish(self, version: str) -> None:
        self.store.publish(self.folders[version], force=True)

    def wait_for(self, version: str, seconds: float = 20) -> None:
        """Until no API process answers by another version: they do not see the pointer at the same moment."""
        deadline, same = time.monotonic() + seconds, 0
        while same < 12:
            assert time.monotonic() < deadline, f"{version} is not served, the log ends with {self.swaps()[-2:]}"
            try:
                answer = self.post({"prompt": "<item:item-1>"})
            except urllib.error.HTTPError as error:
                if error.code != 503:  # a long list is being answered
                    raise
                time.sleep(0.2)
                continue
            same = same + 1 if answer["choices"][0]["catalogue_version"] == version else 0

    def swaps(self) -> list[dict[str, Any]]:
        lines = self.log.read_text(errors="replace").splitlines()
        return [json.loads(line[line.index("{") :]) for line in lines if "NEZHA: catalogue {" in line]

    def refused(self) -> float:
        return metrics_of(self.url, 30).by("nezha_catalogue_swaps_total", "result")["refused"]

    def check(self, history: int, choices: Sequence[dict[str, Any]]) -> str:
        """All of one version, and that version's answer; its name."""
        (version,) = {choice["catalogue_version"] for choice in choices}
        assert_same_answer([(choice["text"], choice["score"]) for choice in choices], self.expected[version][history])
        return version


@pytest.fixture(scope="module")
def live(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    own = Catalogue.load(checkpoint / "catalogue")
    catalogues = versions_of(own, ["one", "two", "three"], keep=[item for history in HISTORIES for item in history])
    folders = {catalogue.version: folder / catalogue.version for catalogue in catalogues}
    for catalogue in catalogues:
        catalogue.save(folders[catalogue.version])
    store = Store(folder / "store")
    store.publish(folders["one"])
    options = {"nezha": {"catalogue": str(store.folder), "catalogue_poll_seconds": POLL, "max_concurrent_requests": 16}}
    arguments = ["--additional-config", json.dumps(options), "--api-server-count", "2"]
    log = folder / "log.txt"
    with serving(checkpoint, log, *arguments) as running:
        expected = rankings(checkpoint, catalogues, HISTORIES, N)
        running.wait_until_ready(timeout=400)
        yield Live(running.url, store, folders, expected, log, running)


@dataclass
class Load:
    """Clients that ask for everything again and again, by every way through the server; answers are checked."""

    live: Live
    answered: Counter[str] = field(default_factory=Counter)
    problems: list[BaseException] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Load:
        self.threads = [threading.Thread(target=self.ask, args=(seed,)) for seed in range(4)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        for thread in self.threads:
            thread.join(60)
        assert not self.problems, self.problems[0]

    def ask(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.done.is_set():
            try:
                self.one(rng)
            except BaseException as problem:
                self.problems.append(problem)
                return

    def one(self, rng: random.Random) -> None:
        asked = rng.sample(range(len(HISTORIES)), rng.choice([1, 1, 3]))
        prompts = ["".join(f"<item:{item}>" for item in HISTORIES[history]) for history in asked]
        headers = rng.choice([{}, {"X-Session-ID": "the long way"}])
        answer = self.live.post({"prompt": prompts if len(prompts) > 1 else prompts[0], "n": N}, **headers)
        versions = set()
        for place, history in enumerate(asked):
            versions.add(self.live.check(history, [c for c in answer["choices"] if c["index"] // N == place]))
        (version,) = versions
        assert {told["catalogue_version"] for told in answer["nezha"]} == versions
        self.answered[version] += 1


def test_every_answer_is_one_versions_while_others_are_published_and_taken_back(live: Live) -> None:
    swaps = ["two", "three", "two", "three", "one", "back"]
    with Load(live) as load:
        for number, swap in enumerate(swaps):
            before = load.answered.copy()
            if swap == "back":
                swaps[number] = swap = live.store.rollback().version
            else:
                live.publish(swap)
            live.wait_for(swap)
            deadline = time.monotonic() + 20
            while load.answered[swap] < before[swap] + 10 and time.monotonic() < deadline:
                time.sleep(0.05)
    assert load.answered.keys() == {"one", "two", "three"}
    told = live.swaps()
    assert [swap["version"] for swap in told] == swaps, "one line a swap, whatever the number of processes"
    assert all(swap["result"] == "swapped" and swap["items"] and swap["seconds"] < 30 for swap in told)


def test_new_items_on_codes_of_no_earlier_item_are_reached_in_a_running_server(live: Live) -> None:
    """Nothing of them was there when the model was made; they come back by name, and in histories."""
    live.publish("three")
    live.wait_for("three")
    new = [f"new-in-three-{number}" for number in range(5)]
    answer = live.post({"prompt": f"<item:{new[0]}>", "n": 4, "vllm_xargs": {"allow_items": new[1:], "beam_width": 50}})
    assert {choice["text"] for choice in answer["choices"]} == set(new[1:])
    assert any(item.startswith("new") for ranking in live.expected["three"] for item, _ in ranking)


def test_a_client_that_does_not_read_its_stream_holds_up_no_swap(live: Live) -> None:
    live.publish("one")
    live.wait_for("one")
    prompts = [f"<item:{HISTORIES[number % 12][0]}>" for number in range(40)]
    body = json.dumps({"prompt": prompts, "n": 400, "stream": True, "vllm_xargs": {"beam_width": 500}})
    host, port = live.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # of 16,000 events
        connection.connect((host, int(port)))
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
        for version in ("two", "three", "one"):
            live.publish(version)
            live.wait_for(version)


def promise_items(version: Path, store: Store, count: int) -> None:
    """Let a version's manifest say that it has so many, and the store's pointer vouch for that."""
    manifest = json.loads((version / MANIFEST).read_text()) | {"num_items": count, "num_ids": count}
    manifest["checksum"] = checksum(manifest)
    (version / MANIFEST).write_text(json.dumps(manifest))
    write_pointer(store.folder, replace(store.pointer(), manifest=manifest["checksum"]))


@pytest.mark.parametrize("what", ["keys.safetensors", "items.arrow", "manifest.json", "levels", "CURRENT", "memory"])
def test_what_cannot_be_taken_up_is_refused_in_one_line_and_the_old_version_serves_on(
    live: Live, tmp_path: Path, what: str
) -> None:
    """As if files were damaged behind a publication; all of a store's own checks come before that."""
    live.publish("one")
    live.wait_for("one")
    deadline = time.monotonic() + 20
    while (said := live.swaps()) and said[-1]["serving"] != "one":  # the line may come behind the first answers
        assert time.monotonic() < deadline
        time.sleep(0.05)
    told = len(said)
    other = Store(shutil.copytree(live.store.folder, tmp_path / "other"))
    name = f"bad-{what.split('.')[0].lower()}"
    sizes = [16, 24, 33] if what == "levels" else [16, 24, 32]
    Catalogue.build(["a"], [[1, 2, 3]], sizes, version=name).save(tmp_path / name)
    if what == "levels":
        (other.folder / "CURRENT").unlink()  # its publisher would refuse it
    other.publish(tmp_path / name, force=True)
    damaged = other.folder / ("CURRENT" if what == "CURRENT" else f"versions/{name}/{what}")
    if what not in ("levels", "memory"):
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 0x41
        damaged.write_bytes(data)
    shutil.copytree(other.folder / "versions" / name, live.store.folder / "versions" / name)
    if what == "memory":  # more items than fit beside those in use, by a manifest that the pointer vouches for
        promise_items(live.store.folder / "versions" / name, other, 10**12)
    good, counted = (live.store.folder / "CURRENT").read_bytes(), live.refused()
    os.replace(other.folder / "CURRENT", live.store.folder / "CURRENT")
    with Load(live) as load:
        deadline = time.monotonic() + 20
        while len(live.swaps()) == told and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(10 * POLL)
    assert load.answered.keys() == {"one"}
    (refusal,) = live.swaps()[told:]
    assert (refusal["result"], refusal["serving"]) == ("refused", "one")
    assert {"levels": "[16, 24, 33]", "memory": "MiB are available"}.get(what, what) in refusal["reason"]
    assert live.refused() == counted + 1
    (live.store.folder / "CURRENT").write_bytes(good)
    live.publish("two")
    live.wait_for("two")


async def all_at_once(address: tuple[str, int], path: str, questions: Questions, count: int) -> Counter[int]:
    """Statuses of requests whose last bytes are sent together, when all else has arrived: any machine is too slow."""
    streams = [await asyncio.open_connection(*address) for _ in range(count)]
    bodies = [questions.body(number % len(questions.prompts)) for number in range(count)]
    for (_, writer), body in zip(streams, bodies, strict=True):
        lines = [f"POST {path} HTTP/1.1", "Host: live", "Content-Type: application/json"]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
        writer.write(head.encode() + body[:-1])
        await writer.drain()
    await asyncio.sleep(0.5)
    for (_, writer), body in zip(streams, bodies, strict=True):
        writer.write(body[-1:])
    statuses: Counter[int] = Counter()
    for number, (reader, writer) in enumerate(streams):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        content = await reader.readexactly(int(re.search(r"content-length: (\d+)", head)[1]))
        statuses[status := int(head.split()[1])] += 1
        if status == 200:
            _, problem = questions.check(number % len(questions.prompts), content)
            assert problem is None
        else:
            assert "retry-after: 1\r\n" in head
        writer.close()
    return statuses


def test_a_burst_beyond_the_limit_is_told_to_come_back_and_what_is_answered_is_right(live: Live) -> None:
    async def burst(path: str) -> tuple[Counter[int], Tally]:
        questions, address = live.questions("two"), ("127.0.0.1", int(live.url.rpartition(":")[2]))
        during = await all_at_once(address, path, questions, 200)
        async with Clients(live.url, questions, path=path) as clients:
            return during, await clients.closed_loop(8, 0.5)

    live.publish("two")
    live.wait_for("two")
    for path in ("/v1/completions", "/invocations"):
        during, behind = asyncio.run(burst(path))
        assert during.keys() == {200, 503}
        assert not behind.problems
        assert behind.outcomes.keys() == {"200"}


def test_clients_that_leave_leave_nothing_behind(live: Live) -> None:
    live.publish("two")
    live.wait_for("two")
    files = hangups.open_files(live.server.process.pid)
    others, idle = asyncio.run(hangups.run(live.url, live.questions("two"), count=90, at_once=6))
    assert not others.problems
    assert others.outcomes.keys() == {"200"}
    assert idle < 10
    assert hangups.open_files(live.server.process.pid) <= files + 10
    assert "Traceback" not in live.log.read_text(errors="replace")


def test_a_killed_api_process_ends_the_server_and_nobody_waits_for_ever(live: Live) -> None:
    """The last test of this server."""
    live.publish("two")
    live.wait_for("two")
    tally, longest = asyncio.run(kill_under_load(live.server, live.questions("two"), "APIServer_0", clients=6))
    assert longest < LONGEST
    assert [problem for problem in tally.problems if not problem.startswith("status 5")] == []
    assert tally.outcomes["200"]
    assert live.server.process.poll() not in (None, 0)
