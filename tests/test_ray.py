"""A real Ray cluster of two nodes on this machine, with real engines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pyarrow as pa
import pytest
from answers import assert_same_answer, of_completion
from pyarrow import parquet
from test_batch import write_input

from nezha_vllm.server import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
ray = pytest.importorskip("ray", reason="pip install 'nezha-vllm[ray]'")

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

ENGINE = '{"dtype": "float32", "max_model_len": 1024}'
ROOT = Path(__file__).parents[1]
ROWS, ROWS_PER_PART = 3000, 25


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that takes no workers, and two nodes that take one each."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
    for _ in range(2):
        started.add_node(num_cpus=1, num_gpus=0)
    yield started
    started.shutdown()


def workers(cluster: Cluster) -> list[dict[str, Any]]:
    """Ray's word on the actors that score parts and live."""
    from ray._private.state import actors

    ray.init(address=cluster.address, log_to_driver=False)
    found = [actor for actor in actors().values() if "Map" in actor["ActorClassName"] and actor["State"] == "ALIVE"]
    ray.shutdown()  # a node that this process is connected to cannot be removed
    return found


def wait_for(condition: Callable[[], bool], job: subprocess.Popen[bytes], seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, f"the job ended with status {job.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_job_without_a_cluster_says_what_to_do(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where it would find one of this machine
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    command = [sys.executable, "-m", "nezha_vllm.cli", "batch", str(checkpoint)]
    command += [str(write_input(tmp_path / "in.parquet", 10)), "--out", str(tmp_path / "out"), "--ray", "auto"]
    found = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert found.returncode == 2
    assert "no Ray cluster at 'auto': begin one with `ray start --head`" in found.stderr


def test_a_job_outlives_a_worker_and_a_node_and_goes_on_after_its_driver(
    checkpoint: Path, tmp_path: Path, cluster: Cluster
) -> None:
    source, out = write_input(tmp_path / "in.parquet", ROWS, row_group_size=1000), tmp_path / "out"
    table = parquet.read_table(source)
    histories = table["history"].to_pylist()
    histories[17] = ["nobody"]
    parquet.write_table(table.set_column(1, "history", pa.array(histories)), source)
    command = [sys.executable, "-m", "nezha_vllm.cli", "batch", str(checkpoint), str(source), "--out", str(out)]
    command += ["--rows-per-part", str(ROWS_PER_PART), "--engine", ENGINE]
    command += ["--ray", cluster.address, "--workers", "2", "--gpus", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def parts() -> int:
        return len(list(out.glob("part-*")))

    job = subprocess.Popen(command, env=environment)
    wait_for(lambda: parts() >= 3, job)
    killed = workers(cluster)[-1]
    os.kill(killed["Pid"], signal.SIGKILL)
    others: list[dict[str, Any]] = []  # the second engine may still be starting

    def are_known() -> bool:
        others[:] = workers(cluster)
        return bool(others) and killed["Pid"] not in [worker["Pid"] for worker in others]

    wait_for(are_known, job)
    victim = others[0]["Address"]["NodeID"]
    [node] = [node for node in cluster.worker_nodes if node.node_id == victim]
    cluster.remove_node(node, allow_graceful=False)
    at_the_kill = parts()
    wait_for(lambda: parts() >= at_the_kill + 5, job)  # on the other node

    job.send_signal(signal.SIGKILL)
    job.wait()
    assert parts() < ROWS // ROWS_PER_PART, "the job was over before its driver was killed"
    assert not (out / "_SUCCESS").exists()

    again = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=600)
    assert again.returncode == 0
    assert "by an earlier run; 1 have an error" in again.stdout
    found = parquet.read_table(out).to_pylist()
    assert [row["user"] for row in found] == list(range(ROWS))
    assert [row["user"] for row in found if row["error"]] == [17]
    assert all(len(row["item_ids"]) == 10 for row in found if row["user"] != 17)
    assert not list(out.glob(".scratch*"))


def test_serve_scales_with_its_queue_and_outlives_a_node(
    checkpoint: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    monkeypatch.setenv("GPUS", "0")
    monkeypatch.setenv("CHECKPOINT", str(checkpoint))
    monkeypatch.setenv("ARGUMENTS", "--dtype float32 --enforce-eager --max-model-len 1024")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
    port = free_port()
    serve.start(http_options={"port": port, "location": "HeadOnly"})
    try:
        check_serve(cluster, f"http://127.0.0.1:{port}")
    finally:
        serve.shutdown()
        ray.shutdown()


def check_serve(cluster: Cluster, url: str) -> None:
    import ray_serve
    from ray import serve

    serve.run(ray_serve.app, name="nezha")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)
    model = client.models.list().data[0].id
    histories = ["".join(f"<item:item-{1 + (7 * at + step) % 1600}>" for step in range(5)) for at in range(16)]

    def complete(text: str) -> list[tuple[str, float]]:
        return of_completion(client.completions.create(model=model, prompt=text, n=5))

    expected = [complete(text) for text in histories]
    with pytest.raises(openai.BadRequestError, match="nobody"):
        complete("<item:nobody>")
    with ThreadPoolExecutor(16) as pool:
        for _ in range(200):
            for found, other in zip(pool.map(complete, histories), expected, strict=True):
                assert_same_answer(found, other)
            if "STARTING" in states():
                break
        else:
            pytest.fail("no second replica though requests queue up")
    deadline = time.monotonic() + 400
    while states().get("RUNNING", 0) < 2 and time.monotonic() < deadline:
        time.sleep(1)
    nodes = running()
    assert len(set(nodes.values())) == 2
    connected = ray.get_runtime_context().get_node_id()  # cannot be removed
    victim = next(node for node in cluster.worker_nodes if node.node_id in {*nodes.values()} - {connected})
    cluster.remove_node(victim, allow_graceful=False)
    failures = 0
    for text, other in zip(histories * 4, expected * 4, strict=True):
        try:
            assert_same_answer(complete(text), other)
        except (openai.APIStatusError, openai.APIConnectionError):
            failures += 1
    assert failures <= 4, "only what was under way may be lost"


def states() -> dict[str, int]:
    """How many replicas are in which state."""
    from ray import serve

    [deployment] = serve.status().applications["nezha"].deployments.values()
    return {str(getattr(state, "value", state)): count for state, count in deployment.replica_states.items()}


def running() -> dict[str, str]:
    """Node of each living replica."""
    from ray._private.state import actors

    found = [actor for actor in actors().values() if actor["State"] == "ALIVE" and "Nezha" in actor["ActorClassName"]]
    return {actor["ActorID"]: actor["Address"]["NodeID"] for actor in found}
