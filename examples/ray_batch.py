"""Batch scoring on a Ray cluster from Python; the command is `nezha batch --ray`.

pip install 'nezha-vllm[ray]'
python examples/ray_batch.py demo/checkpoint histories.parquet recommendations
"""

import sys

from nezha_vllm.batch.job import score_parquet
from nezha_vllm.batch.on_ray import Cluster


def main() -> None:
    checkpoint, source, out = sys.argv[1:]
    done = score_parquet(
        checkpoint,
        [source],
        out,
        options={"n": 20, "exclude_history": True},  # rows may set their own, in columns of these names
        cluster=Cluster("local", workers=1, gpus=0),  # "auto" for a cluster that runs; gpus=1 where there are GPUs
        on_progress=lambda progress: print(f"{progress.rows} of {progress.total}"),
    )
    print(f"{done.rows} rows, {done.errors} with an error")


if __name__ == "__main__":  # vLLM starts its engine in a process of its own, which imports this file again
    main()
