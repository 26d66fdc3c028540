"""`examples/two_nodes`: an engine here, another elsewhere, one API. Both on loopback, from start to the loss of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from answers import assert_same_answer, of_completion, of_output
from conftest import LEVELS, PROCESSES, SERVING
from test_engine import N, ask, prompt_of
from test_metrics import scrape
from test_parallel import LENGTHS, NO_WORKERS, engine_processes, requests_by_engine
from watching import healthy, until

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.server import free_port
from nezha_vllm.store import Store

if TYPE_CHECKING:
    from vllm import LLM

EXAMPLE = Path(__file__).parents[1] / "examples" / "two_nodes"


@contextmanager
def running(script: str, arguments: Sequence[str], log: Path, **variables: Any) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {PROCESSES: "0"} | {name: str(value) for name, value in variables.items()}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [EXAMPLE / script, *arguments], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)  # which `nezha serve` passes on
        process.wait(timeout=30)


def wait_for(condition: Callable[[], bool], seconds: float, *machines: subprocess.Popen[bytes]) -> None:
    def watched() -> bool:
        assert all(process.poll() is None for process in machines), "a machine has ended"
        return condition()

    until(watched, seconds, pause=0.2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_machines_answer_as_one_follow_the_store_and_end_together(
    llm: LLM, checkpoint: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    store.publish(checkpoint / "catalogue")
    old = Catalogue.load(checkpoint / "catalogue")
    Catalogue.build(old.item_ids(range(1000)), old.codes[:1000], LEVELS).save(tmp_path / "fewer")
    options = {"nezha": {"catalogue": str(store.folder), "catalogue_poll_seconds": 0.5}}
    arguments = [*SERVING, *NO_WORKERS, "--enforce-eager", "--additional-config", json.dumps(options)]
    port = free_port()
    url, both = f"http://127.0.0.1:{port}", {"CHECKPOINT": checkpoint, "HEAD": "127.0.0.1", "RPC_PORT": free_port()}
    logs = tmp_path / "head.txt", tmp_path / "second.txt"
    with (
        running("head.sh", [*arguments, "--api-server-count", "1"], logs[0], PORT=port, **both) as head,
        running("second.sh", arguments, logs[1], **both) as second,
    ):
        wait_for(lambda: healthy(url), 500, head, second)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0)
        model = client.models.list().data[0].id

        engine = cycle(["0", "1"])  # one at a time they would stay with the first

        def complete(prompt: Any) -> Any:
            tokens, to = prompt["prompt_token_ids"], {"X-data-parallel-rank": next(engine)}
            return client.completions.create(model=model, prompt=tokens, n=N, extra_headers=to)

        prompts = [prompt_of(length, checkpoint) for length in LENGTHS] * 2
        for prompt, output in zip(prompts, ask(llm, prompts), strict=True):
            assert_same_answer(of_completion(complete(prompt)), of_output(output))
        answered = requests_by_engine(url)
        assert sorted(answered) == ["0", "1"]
        assert all(answered.values())
        assert sum(answered.values()) == scrape(url)["nezha_requests_total|answered"] == len(prompts)

        store.publish(tmp_path / "fewer", force=True)
        wait_for(lambda: scrape(url)["nezha_catalogue_items"] == 1000, 30, head, second)
        for prompt in prompts:
            answer = complete(prompt)
            assert answer.nezha[0]["catalogue_version"] == Catalogue.load(tmp_path / "fewer").version
            assert len(answer.choices) == N
        assert all(requests_by_engine(url)[engine] > before for engine, before in answered.items())

        [lost] = [pid for group in groups_of(second.pid) for pid in engine_processes(group)]
        os.kill(lost, signal.SIGKILL)
        wait_for(lambda: head.poll() is not None and second.poll() is not None, 40)
    assert "engine 1 is gone: its process has ended" in logs[0].read_text(errors="replace")


def groups_of(parent: int) -> list[int]:
    """Process groups of a process's children: `nezha serve` gives vLLM one of its own."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [os.getpgid(int(child)) for child in children]
