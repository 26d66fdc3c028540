"""Servers on a Ray cluster: more of them when requests queue up, new ones where a node is gone.

pip install 'nezha-vllm[ray]'
CHECKPOINT=$PWD/demo/checkpoint serve run examples.ray_serve:app

Each replica runs `vllm serve` and passes requests on to it, so this is the API of docs/http-api.md.
"""

import os
from collections.abc import Mapping

import aiohttp
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from nezha_vllm.server import Server, free_port

QUEUED = 4  # requests of a replica, under way and waiting, that call for another one
OWN = {"host", "connection", "content-length", "content-encoding", "transfer-encoding"}  # headers of each connection


@serve.deployment(
    ray_actor_options={"num_cpus": 1, "num_gpus": float(os.environ.get("GPUS", "1"))},
    max_ongoing_requests=64,
    autoscaling_config={
        "min_replicas": 1,
        "max_replicas": 8,
        "target_ongoing_requests": QUEUED,
        "upscale_delay_s": 5,
        "downscale_delay_s": 300,
    },
    health_check_period_s=5,
)
class Nezha:
    def __init__(self, checkpoint: str, arguments: list[str]) -> None:
        self.server = Server(checkpoint, free_port(), arguments=arguments)
        self.server.__enter__()
        self.server.wait_until_ready()
        self.session: aiohttp.ClientSession | None = None

    async def __call__(self, request: Request) -> Response:
        if self.session is None:
            self.session = aiohttp.ClientSession(self.server.url)
        async with self.session.request(
            request.method,
            request.url.path,
            params=str(request.query_params),
            data=await request.body(),
            headers=self.others(request.headers),
        ) as answer:
            return Response(await answer.read(), answer.status, self.others(answer.headers))

    @staticmethod  # of the class, which Ray sends to its nodes; a function of this file would have to be there
    def others(headers: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in headers.items() if name.lower() not in OWN}

    def check_health(self) -> None:
        if self.server.process.poll() is not None:
            raise RuntimeError("vllm serve has ended")

    def __del__(self) -> None:
        self.server.stop()


app = Nezha.bind(os.environ.get("CHECKPOINT", "demo/checkpoint"), os.environ.get("ARGUMENTS", "").split())
