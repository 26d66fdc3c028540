"""`vllm bench serve` again and again without importing vLLM again: argument lists as JSON lines on the standard input.

It calls vLLM's own ``add_cli_args`` and ``main``; importing them takes longer than most measurements.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback


def serve_forever() -> None:
    replies = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        from vllm.benchmarks.serve import add_cli_args, main
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        print(json.dumps({"ready": True}), file=replies, flush=True)
        for line in sys.stdin:
            try:
                main(parser.parse_args(json.loads(line)))
                reply: dict[str, str | None] = {"error": None}
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                reply = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve_forever()
