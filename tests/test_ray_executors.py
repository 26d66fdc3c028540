"""vLLM's Ray executors with our worker and scheduler, on a real Ray cluster of this machine.

On CPUs through `ray_on_cpu`; on GPUs without: `pytest -m "gpu and ray"` on a machine with two.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from answers import Ranking, assert_same_answer, of_completion, of_output
from conftest import LEVELS, SERVING, start
from test_engine import N, ask, prompt_of
from test_metrics import scrape
from test_parallel import LENGTHS, requests_by_engine, two_gpus  # noqa: F401
from watching import healthy, until

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.server import Server, free_port
from nezha_vllm.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
ray = pytest.importorskip("ray", reason="pip install 'nezha-vllm[ray]'")

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster
    from vllm import LLM

TENSOR = ["--tensor-parallel-size", "2", "--distributed-executor-backend", "ray"]
DATA = ["--data-parallel-size", "2", "--data-parallel-size-local", "2", "--data-parallel-backend", "ray"]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every process started from here on."""
    folder = str(Path(__file__).with_name("ray_on_cpu"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Starts a cluster whose nodes have so many GPUs, and lets vLLM find it."""
    from ray.cluster_utils import Cluster

    started: list[Cluster] = []

    def nodes(*gpus: int) -> None:
        head = {"num_cpus": 2, "num_gpus": gpus[0]}
        started.append(Cluster(initialize_head=True, head_node_args=head))
        for more in gpus[1:]:
            started[0].add_node(num_cpus=2, num_gpus=more)
        monkeypatch.setenv("RAY_ADDRESS", started[0].address)

    yield nodes
    for found in started:
        found.shutdown()


def expected_of(engine: LLM, checkpoint: Path) -> list[Ranking]:
    return [of_output(output) for output in ask(engine, [prompt_of(length, checkpoint) for length in LENGTHS])]


@pytest.mark.usefixtures("on_cpu")
def test_tensor_parallel_workers_on_two_nodes_answer_as_one(
    llm: LLM, checkpoint: Path, tmp_path: Path, cluster: Callable[..., None]
) -> None:
    expected = expected_of(llm, checkpoint)
    cluster(1, 1)
    check_server(checkpoint, tmp_path, TENSOR, expected, "ray::RayWorkerProc", engines=1)


@pytest.mark.usefixtures("on_cpu")
def test_data_parallel_actors_answer_as_one(
    llm: LLM, checkpoint: Path, tmp_path: Path, cluster: Callable[..., None]
) -> None:
    expected = expected_of(llm, checkpoint)
    cluster(2)
    check_server(checkpoint, tmp_path, DATA, expected, "ray::EngineCoreActor", engines=2)


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("arguments", "actor", "engines"),
    [(TENSOR, "ray::RayWorkerProc", 1), (DATA, "ray::EngineCoreActor", 2)],
    ids=["tensor", "data"],
)
def test_ray_on_gpus_answers_as_one(
    checkpoint: Path, tmp_path: Path, cluster: Callable[..., None], arguments: list[str], actor: str, engines: int
) -> None:
    engine = start(checkpoint, gpu_memory_utilization=0.2)
    expected = expected_of(engine, checkpoint)
    engine.llm_engine.engine_core.shutdown()
    cluster(2)
    check_server(checkpoint, tmp_path, [*arguments, "--gpu-memory-utilization", "0.2"], expected, actor, engines)


def check_server(
    checkpoint: Path, folder: Path, arguments: Sequence[str], expected: Sequence[Ranking], actor: str, engines: int
) -> None:
    """Answers are the expected ones, a new catalogue is taken up, and the server ends when an actor is killed.

    It is killed with a request and another catalogue under way: an engine that waits for its answer must notice, too.
    """
    store, fewer = Store(folder / "store"), folder / "fewer"
    store.publish(checkpoint / "catalogue")
    old = Catalogue.load(checkpoint / "catalogue")
    Catalogue.build(old.item_ids(range(1000)), old.codes[:1000], LEVELS).save(fewer)
    options = {"nezha": {"catalogue": str(store.folder), "catalogue_poll_seconds": 0.5}}
    more = [*SERVING, "--enforce-eager", "--api-server-count", "1", "--additional-config", json.dumps(options)]
    more += arguments
    log = folder / "log.txt"
    with Server(checkpoint, free_port(), arguments=more, log=log) as server:
        server.wait_until_ready(timeout=400)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0)
        model = client.models.list().data[0].id

        engine = cycle(map(str, range(engines)))  # one at a time they would stay with the first

        def complete(prompt: Any) -> Any:
            tokens, to = prompt["prompt_token_ids"], {"X-data-parallel-rank": next(engine)}
            return client.completions.create(model=model, prompt=tokens, n=N, extra_headers=to)

        prompts = [prompt_of(length, checkpoint) for length in LENGTHS]
        for prompt, other in zip(prompts, expected, strict=True):
            assert_same_answer(of_completion(complete(prompt)), other)
        answered = requests_by_engine(server.url)
        assert len(answered) == engines
        assert all(answered.values())

        store.publish(fewer, force=True)
        until(lambda: scrape(server.url)["nezha_catalogue_items"] == 1000, 30, pause=0.2)
        for prompt in prompts:
            answer = complete(prompt)
            assert answer.nezha[0]["catalogue_version"] == Catalogue.load(fewer).version
            assert len(answer.choices) == N

        victim = actors(actor)[-1]
        os.kill(victim, signal.SIGSTOP)
        store.publish(checkpoint / "catalogue", force=True)
        time.sleep(3)  # all workers must answer before it is taken up
        assert scrape(server.url)["nezha_catalogue_items"] == 1000
        with ThreadPoolExecutor(engines) as pool:
            asked = [pool.submit(complete, prompts[-1]) for _ in range(engines)]  # a request for each engine
            time.sleep(1)
            assert not all(found.done() for found in asked)
            os.kill(victim, signal.SIGKILL)
            until(lambda: server.process.poll() is not None or not healthy(server.url), 60, pause=0.2)
            assert any(isinstance(found.exception(), openai.APIError) for found in asked)


def actors(title: str) -> list[int]:
    """Process ids of Ray's actors of a class, among the processes that this one started."""
    found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in found if _title(pid).startswith(title) and os.getpid() in _ancestors(pid)]


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        found.append(pid)
    return found
