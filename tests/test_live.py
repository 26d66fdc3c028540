"""A running server follows its store: real processes, real publications, every answer checked against its version."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import Ranking, assert_same_answer
from conftest import BLOCK_SIZE, LEVELS

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.server import Server, free_port
from nezha_vllm.store import Store

pytestmark = pytest.mark.slow
N, POLL = 20, 0.1
HISTORIES = [[f"item-{number * 7 + step * 50 + 1}" for step in range(1 + number % 5)] for number in range(12)]


def versions_of(catalogue: Catalogue) -> dict[str, Catalogue]:
    """The checkpoint's own catalogue, and one with other codes, fewer items, and new ones on semantic IDs of no item.

    Histories mean other codes there, so that an answer made of two versions is one of neither.
    """
    names, codes = catalogue.ids.to_pylist(), catalogue.codes.copy()
    rng = np.random.default_rng(1)
    codes[::3] = np.stack([rng.integers(0, size, len(codes[::3])) for size in LEVELS], axis=1)
    kept = [row for row, name in enumerate(names) if int(name.removeprefix("item-")) < 1500]
    free = np.setdiff1d(np.arange(catalogue.codec.capacity), np.union1d(catalogue.keys, catalogue.codec.key(codes)))
    new = catalogue.codec.codes_of_key(rng.choice(free, 300, replace=False))
    found = {"one": catalogue}
    for version, more in (("two", new[:150]), ("three", new[150:])):
        ids = [names[row] for row in kept] + [f"{version}-{number}" for number in range(len(more))]
        segments = {name: np.arange(len(ids)) % 2 == 0 for name in catalogue.segments.names}
        of_version = np.concatenate([codes[kept], more])
        found[version] = Catalogue.build(ids, of_version, LEVELS, segments=segments, version=version)
    return found


def rankings(checkpoint: Path, catalogue: Catalogue) -> list[Ranking]:
    """What each history gets of this version, by transformers."""
    import torch

    from nezha_vllm.hf.modeling import NezhaLlamaForCausalLM
    from nezha_vllm.hf.recommend import recommend

    model = NezhaLlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return [
        [(item.item_id, item.score) for item in items] for items in recommend(model, HISTORIES, N, catalogue=catalogue)
    ]


@dataclass
class Live:
    """A server on a store, and the versions there are to publish."""

    url: str
    store: Store
    folders: dict[str, Path]
    expected: dict[str, list[Ranking]]
    log: Path
    process: int

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
            answer = self.post({"prompt": "<item:item-1>"})
            same = same + 1 if answer["choices"][0]["catalogue_version"] == version else 0

    def swaps(self) -> list[dict[str, Any]]:
        lines = self.log.read_text(errors="replace").splitlines()
        return [json.loads(line[line.index("{") :]) for line in lines if "NEZHA: catalogue {" in line]

    def check(self, history: int, choices: Sequence[dict[str, Any]]) -> str:
        """All of one version, and that version's answer; its name."""
        (version,) = {choice["catalogue_version"] for choice in choices}
        assert_same_answer([(choice["text"], choice["score"]) for choice in choices], self.expected[version][history])
        return version


@pytest.fixture(scope="module")
def live(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    store, folders, expected = Store(folder / "store"), {}, {}
    for version, catalogue in versions_of(Catalogue.load(checkpoint / "catalogue")).items():
        folders[version] = folder / version
        catalogue.save(folders[version])
        expected[catalogue.version] = rankings(checkpoint, catalogue)
    store.publish(folders["one"])
    options = {"nezha": {"catalogue": str(store.folder), "catalogue_poll_seconds": POLL}}
    arguments = ["--dtype", "float32", "--block-size", str(BLOCK_SIZE), "--max-model-len", "1024"]
    arguments += ["--additional-config", json.dumps(options), "--api-server-count", "2"]
    log = folder / "log.txt"
    with Server(checkpoint, free_port(), arguments=arguments, log=log) as running:
        running.wait_until_ready(timeout=240)
        yield Live(running.url, store, folders, expected, log, running.process.pid)


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
    first = live.store.pointer().version
    with Load(live) as load:
        for swap in (*["two", "three"] * 3, "back"):
            before = load.answered.copy()
            if swap == "back":
                swap = live.store.rollback().version
            else:
                live.publish(swap)
            live.wait_for(swap)
            deadline = time.monotonic() + 20
            while load.answered[swap] < before[swap] + 10 and time.monotonic() < deadline:
                time.sleep(0.05)
    assert sorted(load.answered) == sorted([first, "two", "three"])
    told = live.swaps()
    assert [(swap["result"], swap["version"]) for swap in told] == [
        ("swapped", version) for version in [*["two", "three"] * 3, "two"]
    ], "one line a swap, whatever the number of processes"
    assert all(swap["items"] and swap["seconds"] < 10 for swap in told)
