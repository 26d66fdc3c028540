"""Ask a running server for items with the stock OpenAI client.

nezha serve demo/checkpoint            # in another terminal
python examples/openai_client.py 50 172 181
"""

import sys

from openai import OpenAI

history = sys.argv[1:] or ["50", "172", "181"]  # item IDs, oldest first

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
model = client.models.list().data[0].id

completion = client.completions.create(
    model=model,
    prompt="".join(f"<item:{item_id}>" for item_id in history),
    n=5,
    extra_body={"vllm_xargs": {"beam_width": 50}},
)
for rank, choice in enumerate(completion.choices, start=1):
    print(rank, choice.text, round(choice.score, 3), choice.semantic_id)
