"""A real Ray cluster of two nodes on this machine, with real engines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from test_batch import write_input

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
ray = pytest.importorskip("ray", reason="pip install 'nezha-vllm[ray]'")

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

ENGINE = '{"dtype": "float32", "max_model_len": 1024}'
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


def test_a_job_outlives_a_node_and_goes_on_after_its_driver(checkpoint: Path, tmp_path: Path, cluster: Cluster) -> None:
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
    victim = workers(cluster)[0]["Address"]["NodeID"]
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
