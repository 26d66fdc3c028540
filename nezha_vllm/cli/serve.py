"""Serve a checkpoint over the OpenAI API. This is `vllm serve`, with checks first and word when it is ready.

  nezha serve demo/checkpoint
  nezha serve demo/checkpoint --port 8080 --dtype float32 --max-num-seqs 64

Arguments that are not listed here go to vLLM as they are, if they stand behind CHECKPOINT: see `vllm serve --help`.
With --headless, engines alone run here, for the API of another machine (examples/two_nodes).
Two of vLLM's defaults are changed, unless you set them: no access log, and with a GPU several API processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

SUMMARY = "checkpoint -> a server that answers OpenAI completions with items"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder made by `nezha train` or `nezha init`")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s)")
    parser.set_defaults(passes_arguments_on=True)


def serving_defaults(arguments: Sequence[str], cores: int, has_gpu: bool) -> list[str]:
    """Arguments that suit short requests, to stand before the user's, which win.

    An access log is 0.1 ms a request. An API process spends 0.7 to 0.8 ms of its core on one (the engine stubbed),
    more than a GPU in a full batch should: one process for four cores, four at most. Beside an H100 eight gave the same
    requests/s as four, and a single request took 5.1 instead of 4.3 ms. On a CPU the engine needs
    the cores. A configuration file and data parallelism have counts of their own.
    """
    names = [argument.replace("_", "-").split("=", 1)[0] for argument in arguments]
    if "--config" in names:
        return []
    count = min(4, cores // 4) if has_gpu else 1
    own_count = any(name.startswith(("--data-parallel", "-dp", "--headless")) for name in names)
    return ["--disable-uvicorn-access-log"] + (
        ["--api-server-count", str(count)] if count > 1 and not own_count else []
    )


def run(arguments: argparse.Namespace) -> int:
    import os
    import signal
    from pathlib import Path

    from nezha_vllm.cli.checks import check_checkpoint, check_port_is_free
    from nezha_vllm.server import Server, ServerError

    check_checkpoint(arguments.checkpoint)
    headless = "--headless" in arguments.more
    if not headless:
        check_port_is_free(arguments.host, arguments.port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cores, has_gpu = len(os.sched_getaffinity(0)), Path("/dev/nvidiactl").exists()
    more = [*serving_defaults(arguments.more, cores, has_gpu), *arguments.more]
    try:
        with Server(arguments.checkpoint, arguments.port, arguments.host, more) as server:
            if headless:
                return server.process.wait() or 1  # vLLM ends with 0 when an engine has died; only signals end it well
            seconds = server.wait_until_ready()
            print(
                f"\nready after {seconds:.0f} s at {server.url}/v1. In another terminal:\n"
                f"  nezha recommend --url {server.url} --catalogue {arguments.checkpoint}/catalogue --history ID ID …\n"
                "Ctrl-C stops the server.\n",
                flush=True,
            )
            status = server.process.wait()
            # nobody asked it to; vLLM's own status is 0 when its engine has died, which no supervisor would start again
            print(f"nezha serve: the server ended by itself with status {status}; the reason stands above")
            return status or 1
    except KeyboardInterrupt:
        print("nezha serve: stopped")
        return 0
    except ServerError as error:
        print(f"nezha serve: {error}; the reason stands above")
        return 1
