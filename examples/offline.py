"""The same answer without a server, through vLLM's LLM class.

python examples/offline.py demo/checkpoint 50 172 181
"""

import sys

from vllm import LLM, SamplingParams


def main() -> None:
    checkpoint, *history = sys.argv[1:] or ["demo/checkpoint", "50", "172", "181"]
    llm = LLM(checkpoint)
    prompt = "".join(f"<item:{item_id}>" for item_id in history)
    [answer] = llm.generate(prompt, SamplingParams(n=5, extra_args={"beam_width": 50}))
    for rank, item in enumerate(answer.outputs, start=1):
        print(rank, item.text, round(item.cumulative_logprob, 3), list(item.semantic_id))


if __name__ == "__main__":  # vLLM starts its engine in a process of its own, which imports this file again
    main()
