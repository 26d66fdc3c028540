"""Parts scored by a pool of Ray actors.

``ray.data.llm`` keeps the first of a request's choices and drops its others (``vLLMOutputData``, Ray 2.60), so n
items do not come out of it. Ray Data's own ``map`` with a class has what else is needed: a pool of actors that grows
with the cluster, actors that start again elsewhere when a node is gone, and their parts with them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nezha_vllm.batch.engine import Recipe, Worker
from nezha_vllm.batch.parts import Part


@dataclass(frozen=True)
class Cluster:
    """Where and how workers run.

    Args:
        address: of a Ray cluster, as ``ray.init`` takes it: ``auto`` for this machine's, ``local`` for a new one.
        workers: at most so many engines; there is one at least.
        gpus, cpus: what Ray reserves for each.
    """

    address: str = "auto"
    workers: int = 1
    gpus: float = 1
    cpus: float = 1


class RayWorker:
    """A worker as a class for Ray Data: a row is a part."""

    def __init__(self, recipe: Recipe) -> None:
        self.worker = Worker(recipe)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part = Part(**row)
        return {"rows": part.rows, "errors": self.worker.run(part)}


def run_on_ray(
    parts: Sequence[Part], recipe: Recipe, cluster: Cluster, worker: type = RayWorker
) -> Iterator[tuple[int, int]]:
    """Rows and errors of each part as it is done, in any order.

    Raises ``ImportError`` without Ray, ``ValueError`` without a cluster at the address.
    """
    try:
        import ray
        from ray.data import ActorPoolStrategy, DataContext
    except ImportError as error:
        raise ImportError("Ray is not installed; pip install 'nezha-vllm[ray]'") from error

    if not ray.is_initialized():
        try:
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
        except ConnectionError as error:
            remedy = "begin one with `ray start --head`, or name `local` for a new one"
            raise ValueError(f"no Ray cluster at {cluster.address!r}: {remedy}") from error
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    dataset = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts)).map(
        worker,
        fn_constructor_args=(recipe,),
        compute=ActorPoolStrategy(min_size=1, max_size=cluster.workers, initial_size=cluster.workers),
        num_gpus=cluster.gpus or None,
        num_cpus=cluster.cpus,
    )
    for row in dataset.iter_rows():
        yield row["rows"], row["errors"]
