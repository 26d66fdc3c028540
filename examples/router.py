"""Two servers behind vllm-router: how often a user's history is in the prefix cache of the server that gets it.

pip install vllm-router
python examples/router.py demo/checkpoint round_robin consistent_hash

Users come again and again, each time with a longer history. Prints the share of prompt tokens that the caches had.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from openai import OpenAI

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.client import prompt
from nezha_vllm.server import Server, free_port

USERS, VISITS, FIRST, MORE = 20, 6, 60, 4  # items of history at the first visit, and more with every other


def main() -> None:
    checkpoint, *policies = sys.argv[1:] or ["demo/checkpoint"]
    with ExitStack() as stack:
        servers = []
        for log in ("server-1.log", "server-2.log"):
            arguments = ["--block-size", "32", "--enable-prefix-caching"]
            servers.append(stack.enter_context(Server(checkpoint, free_port(), arguments=arguments, log=Path(log))))
            servers[-1].wait_until_ready(timeout=300)
        for policy in policies or ["round_robin", "consistent_hash"]:
            print(f"{policy}: {hit_rate(policy, checkpoint, [server.url for server in servers]):.0%} from the caches")


def hit_rate(policy: str, checkpoint: str, urls: Sequence[str]) -> float:
    port = free_port()
    command = ["vllm-router", "--worker-urls", *urls, "--policy", policy, "--port", str(port)]
    command += ["--prometheus-port", str(free_port()), "--log-level", "warning"]
    with open("router.log", "ab") as log:  # a line and more a request
        router = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60)
        wait_for(f"http://127.0.0.1:{port}/health", router)
        before = [tokens(url) for url in urls]
        visit_again_and_again(client, checkpoint, seed=policy)
        after = [tokens(url) for url in urls]
    finally:
        router.terminate()
        router.wait()
    asked, found = (sum(late[i] - early[i] for early, late in zip(before, after, strict=True)) for i in (0, 1))
    return found / asked


def visit_again_and_again(client: OpenAI, checkpoint: str, seed: str) -> None:
    catalogue = Catalogue.load(Path(checkpoint, "catalogue"))
    chance = random.Random(seed)
    items = catalogue.item_ids(range(catalogue.num_items))
    histories = {f"{seed}-{user}": chance.choices(items, k=FIRST + MORE * VISITS) for user in range(USERS)}
    for visit in range(VISITS):
        for user in chance.sample(sorted(histories), USERS):
            answer = client.completions.create(
                model=checkpoint,
                prompt=prompt(histories[user][: FIRST + MORE * visit]),
                n=5,
                user=user,
                extra_headers={"x-session-id": user},
            )
            assert len(answer.choices) == 5
            assert answer.nezha[0]["returned"] == 5  # our fields come through


def tokens(url: str) -> tuple[float, float]:
    """Prompt tokens looked up in the prefix cache and found there, from the server's metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    names = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
    queries, hits = (sum(map(float, re.findall(rf"^{name}{{.*}} (\S+)$", text, re.M))) for name in names)
    return queries, hits


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, "the router ended; router.log says why"
            time.sleep(0.2)
    raise TimeoutError(url)


if __name__ == "__main__":
    main()
