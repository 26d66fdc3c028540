"""Run ``nezha`` commands one after another in one process: imports and the GPU's context, 5 to 10 s, are paid once.

python -m benchmarks.quality_steps '[["train", …], ["evaluate", …]]'
"""

from __future__ import annotations

import json
import sys


def main(commands: str) -> int:
    from nezha_vllm import cli

    for words in json.loads(commands):
        if status := cli.main(words):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
