"""Serve a checkpoint over the OpenAI API. This is `vllm serve`, with checks first and word when it is ready.

  nezha serve demo/checkpoint
  nezha serve demo/checkpoint --port 8080 --dtype float32 --max-num-seqs 64

Arguments that are not listed here go to vLLM as they are, if they stand behind CHECKPOINT: see `vllm serve --help`.
"""

from __future__ import annotations

import argparse

SUMMARY = "checkpoint -> a server that answers OpenAI completions with items"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder made by `nezha train` or `nezha init`")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s)")
    parser.set_defaults(passes_arguments_on=True)


def run(arguments: argparse.Namespace) -> int:
    import signal

    from nezha_vllm.cli.checks import check_checkpoint, check_port_is_free
    from nezha_vllm.server import Server, ServerError

    check_checkpoint(arguments.checkpoint)
    check_port_is_free(arguments.host, arguments.port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Server(arguments.checkpoint, arguments.port, arguments.host, arguments.more) as server:
            seconds = server.wait_until_ready()
            print(
                f"\nready after {seconds:.0f} s at {server.url}/v1. In another terminal:\n"
                f"  nezha recommend --url {server.url} --catalogue {arguments.checkpoint}/catalogue --history ID ID …\n"
                "Ctrl-C stops the server.\n",
                flush=True,
            )
            return server.process.wait()
    except KeyboardInterrupt:
        print("nezha serve: stopped")
        return 0
    except ServerError as error:
        print(f"nezha serve: {error}; the reason stands above")
        return 1
