"""Requests to a server of several engines: each engine's share, from the server's metrics.

python examples/data_parallel/shares.py http://127.0.0.1:8000 demo/checkpoint
"""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.client import prompt
from nezha_vllm.scrape import metrics_of

REQUESTS, CLIENTS = 200, 8


def main() -> None:
    url, checkpoint = sys.argv[1:] or ["http://127.0.0.1:8000", "demo/checkpoint"]
    catalogue = Catalogue.load(Path(checkpoint, "catalogue"))
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60)
    model = client.models.list().data[0].id
    chance = random.Random(0)
    items = catalogue.item_ids(range(catalogue.num_items))
    histories = [chance.choices(items, k=20) for _ in range(REQUESTS)]
    before = metrics_of(url, timeout=10)
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(
            clients.map(lambda history: client.completions.create(model=model, prompt=prompt(history), n=10), histories)
        )
    shares = metrics_of(url, timeout=10).since(before).by("vllm:request_success_total", "engine")
    for engine, answered in sorted(shares.items()):
        print(f"engine {engine}: {answered:.0f} of {REQUESTS} requests")


if __name__ == "__main__":
    main()
