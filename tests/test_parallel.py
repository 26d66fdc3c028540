"""Several engines, and several workers of one engine, give the answers of one."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from answers import Ranking, assert_same_answer, of_completion, of_output
from conftest import MOVIES, in_process, make_checkpoint, serving, start
from test_engine import N, ask, prompt_of
from test_metrics import scrape
from test_startup import configure

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.engine.config_hook import PARENTS_VERSION, keep_worker_inside
from nezha_vllm.engine.cpu_cores import BIND, core_lists, share_cores
from nezha_vllm.engine.settings import ENGINES_HERE, workers_here

if TYPE_CHECKING:
    from vllm import LLM

NO_WORKERS = ["--distributed-executor-backend", "uni"]  # of several engines, each would have a process for its own
LENGTHS = (1, 2, 5, 9, 31, 32, 33, 64, 65, 100)


@pytest.mark.parametrize(
    ("cores", "num_workers", "expected"),
    [
        ([0, 1], 2, "0|1"),
        ([0, 2, 4, 6, 8, 10], 2, "0,2|6,8"),  # one core of each share is left to other processes
        ([0, 1, 2, 3, 4], 2, "0|2,3"),
        ([5], 3, "5|5|5"),
        ([0, 1], 3, "0|1|0"),
    ],
)
def test_workers_share_the_cores(cores: list[int], num_workers: int, expected: str) -> None:
    assert core_lists(cores, num_workers) == expected


@pytest.fixture
def no_list_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """None to begin with, and none left behind."""
    monkeypatch.setenv(BIND, "0")
    monkeypatch.delenv(BIND)


def test_a_list_of_cores_is_made_anew_for_every_engine_of_a_process(no_list_of_cores: None) -> None:
    share_cores(2, 1)
    assert os.environ[BIND].count("|") == 1
    share_cores(1, 3)
    assert os.environ[BIND].count("|") == 2
    share_cores(1, 1)
    assert BIND not in os.environ


def test_a_list_of_cores_that_the_user_has_set_stays(no_list_of_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BIND, "7|8")
    share_cores(2, 1)
    assert os.environ[BIND] == "7|8"


def test_an_engine_knows_of_the_others_on_its_machine(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ENGINES_HERE, BIND):
        monkeypatch.setenv(name, "0")
    parallel = configure(checkpoint, data_parallel_size=2).parallel_config
    parallel.reconfigure_for_independent_dp_rank()  # as vLLM does in the engine's process
    assert workers_here(parallel) == 2
    assert workers_here(configure(checkpoint).parallel_config) == 1


@pytest.mark.parametrize(
    ("options", "nezha", "expected"),
    [
        ({"data_parallel_size": 2}, {}, "uni"),
        ({"data_parallel_size": 2}, {"worker_process": True}, "mp"),
        ({"data_parallel_size": 2, "tensor_parallel_size": 2}, {}, "mp"),
        ({"distributed_executor_backend": "mp"}, {}, "mp"),  # a single engine's is what the user has asked for
    ],
    ids=str,
)
def test_several_engines_keep_their_only_worker_inside(
    checkpoint: Path, options: dict[str, Any], nezha: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called by itself: CPUs cannot do without that process, and the hook lets them have it."""
    for name in (ENGINES_HERE, BIND):
        monkeypatch.setenv(name, "0")
    config = configure(checkpoint, additional_config={"nezha": nezha}, **options)
    assert config.parallel_config.distributed_executor_backend == "mp"
    keep_worker_inside(config)
    assert config.parallel_config.distributed_executor_backend == expected


def test_a_worker_process_is_true_or_false(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="worker_process is 1, must be true or false"):
        configure(checkpoint, additional_config={"nezha": {"worker_process": 1}})


def test_pipeline_parallelism_is_refused_with_the_remedy(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="--pipeline-parallel-size: use --tensor-parallel-size"):
        configure(checkpoint, pipeline_parallel_size=2)


def test_api_processes_accept_only_the_catalogue_of_the_engines(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of several reads the folder anew: a version published meanwhile would name other items."""
    monkeypatch.setenv(PARENTS_VERSION, "of-the-engines")
    configure(checkpoint)  # an engine's own process takes what is there
    monkeypatch.setenv(PARENTS_VERSION, "of-the-engines")
    monkeypatch.setattr(multiprocessing.current_process(), "name", "ApiServer_1")
    with pytest.raises(ValueError, match="is to start with of-the-engines"):
        configure(checkpoint)


@pytest.mark.slow
@pytest.mark.usefixtures("no_list_of_cores")
def test_tensor_parallel_workers_answer_as_one(tmp_path: Path) -> None:
    """With item scores, for which each worker gathers all rows of the embeddings."""
    folder = make_checkpoint(tmp_path / "scored", item_tokens=500, item_score_weight=0.5)
    prompts = [prompt_of(length, folder) for length in LENGTHS]
    with in_process(folder) as one:
        expected = ask(one, prompts)
    two = start(folder, tensor_parallel_size=2)
    found = ask(two, prompts)
    two.llm_engine.engine_core.shutdown()
    for output, other in zip(found, expected, strict=True):
        assert_same_answer(of_output(output), of_output(other))


@pytest.mark.slow
@pytest.mark.timeout(600)  # six processes import vLLM
def test_data_parallel_engines_answer_as_one_and_end_together(llm: LLM, checkpoint: Path, tmp_path: Path) -> None:
    prompts = [prompt_of(length, checkpoint) for length in LENGTHS] * 4
    expected = [of_output(output) for output in ask(llm, prompts)]
    check_two_engines(checkpoint, tmp_path / "log.txt", prompts, expected, NO_WORKERS)


def check_two_engines(
    checkpoint: Path,
    log: Path,
    prompts: Sequence[Any],
    expected: Sequence[Ranking],
    more: Sequence[str] = (),
    workers: int | None = None,
) -> None:
    """Two engines behind one port: both work, answers are the expected ones, and the server ends when one is killed.

    Args:
        workers: how many have a process of their own, if that is to be checked.
    """
    with serving(checkpoint, log, "--enforce-eager", "--data-parallel-size", "2", *more) as server:
        server.wait_until_ready(timeout=500)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0)
        model = client.models.list().data[0].id

        def complete(prompt: Any, headers: dict[str, str] | None = None) -> Ranking:
            tokens = prompt["prompt_token_ids"]
            return of_completion(client.completions.create(model=model, prompt=tokens, n=N, extra_headers=headers))

        with ThreadPoolExecutor(8) as pool:
            for found, other in zip(pool.map(complete, prompts), expected, strict=True):
                assert_same_answer(found, other)
        answered = requests_by_engine(server.url)
        assert sorted(answered) == ["0", "1"]
        assert all(answered.values())
        assert sum(answered.values()) == len(prompts)
        counted = scrape(server.url)  # of two API processes, each with numbers of its own
        assert counted["nezha_requests_total|answered"] == counted["nezha_items_returned_count"] == len(prompts)
        assert counted[f"nezha_catalogue_info|{Catalogue.load(checkpoint / 'catalogue').version}"] == 2
        assert counted["nezha_catalogue_items"] == MOVIES

        for length in range(1, 13):  # one at a time, on one connection, so all from one API process
            complete(prompt_of(length, checkpoint))
        gained = [now - answered[engine] for engine, now in requests_by_engine(server.url).items()]
        assert sorted(gained) == [0, 12], "an idle server's engines take turns"

        for length in range(101, 106):  # new to both engines, and alone in its step: to the last bit
            prompt = prompt_of(length, checkpoint)
            of_engine = [complete(prompt, {"X-data-parallel-rank": rank}) for rank in ("0", "1")]
            assert of_engine[0] == of_engine[1]

        if workers is not None:
            assert sum("VLLM::Worker" in title for title in titles(server.process.pid).values()) == workers
        os.kill(engine_processes(server.process.pid)[1], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while server.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert server.process.poll() is not None, "the server lives on without one of its engines"
    assert "EngineCore_DP1 died" in log.read_text(errors="replace")


def requests_by_engine(url: str) -> dict[str, float]:
    """Finished requests of each engine, from the server's metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    counts: dict[str, float] = {}
    for line in lines:
        if match := re.match(r'vllm:request_success_total\{.*?engine="(\d+)".*\} ([\d.e+]+)$', line):
            counts[match[1]] = counts.get(match[1], 0.0) + float(match[2])
    return counts


def engine_processes(leader: int) -> list[int]:
    """Process ids of the engines in a server's process group, in order of their ranks."""
    found = {}
    for number, title in titles(leader).items():
        if match := re.search(r"EngineCore_DP(\d+)", title):
            found[int(match[1])] = number
    return [found[rank] for rank in sorted(found)]


def titles(leader: int) -> dict[int, str]:
    """What the processes of a process group call themselves."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == leader:
                found[int(entry.name)] = (entry / "cmdline").read_text()
        except (ProcessLookupError, FileNotFoundError):
            continue
    return found


@pytest.fixture
def two_gpus() -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.timeout(600)
def test_tensor_parallel_gpus_answer_as_one(two_gpus: None, checkpoint: Path, enforce_eager: bool) -> None:
    prompts = [prompt_of(length, checkpoint) for length in LENGTHS]
    answers = []
    for size in (1, 2):
        engine = start(checkpoint, tensor_parallel_size=size, enforce_eager=enforce_eager, gpu_memory_utilization=0.2)
        answers.append([of_output(output) for output in ask(engine, prompts)])
        lean = engine.collective_rpc("lean_steps")
        assert len(lean) == size
        assert len(set(lean)) == 1
        assert (lean[0] > 0) is not enforce_eager
        engine.llm_engine.engine_core.shutdown()
    for found, other in zip(answers[1], answers[0], strict=True):
        assert_same_answer(found, other)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True], ids=["inside", "apart"])
@pytest.mark.timeout(600)
def test_data_parallel_gpus_answer_as_one_and_end_together(
    two_gpus: None, checkpoint: Path, tmp_path: Path, apart: bool
) -> None:
    prompts = [prompt_of(length, checkpoint) for length in LENGTHS] * 4
    engine = start(checkpoint, gpu_memory_utilization=0.2)
    expected = [of_output(output) for output in ask(engine, prompts)]
    engine.llm_engine.engine_core.shutdown()
    more = ["--gpu-memory-utilization", "0.2"]
    if apart:
        more += ["--additional-config", '{"nezha": {"worker_process": true}}']
    check_two_engines(checkpoint, tmp_path / "log.txt", prompts, expected, more, 2 if apart else 0)
