"""One answer everywhere: transformers reference, offline engine and HTTP, for histories of real people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import openai
import pytest
from answers import Ranking, assert_same_answer, of_completion, of_output
from conftest import in_process

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.data import movielens
from nezha_vllm.data.dataset import prepare

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.slow
USERS, N = 50, 20


@pytest.fixture(scope="module")
def histories() -> list[list[str]]:
    """The last 30 films or fewer of every 19th user."""
    try:
        reader = movielens.reader()
    except FileNotFoundError as error:
        pytest.fail(str(error))
    sequences = prepare(reader, movielens.NAME).sequences[::19][:USERS]
    assert len(sequences) == USERS
    return [[f"item-{film}" for film in sequence[-1 - number % 30 :]] for number, sequence in enumerate(sequences)]


@pytest.fixture(scope="module")
def prompts(histories: list[list[str]]) -> list[str]:
    return ["".join(f"<item:{item}>" for item in history) for history in histories]


@pytest.fixture(scope="module")
def expected(histories: list[list[str]], checkpoint: Path) -> list[Ranking]:
    """The reference, one history at a time."""
    from nezha_vllm.hf.modeling import NezhaLlamaForCausalLM

    model = NezhaLlamaForCausalLM.from_pretrained(checkpoint).eval()
    catalogue = Catalogue.load(checkpoint / "catalogue")
    rankings = [model.recommend([history], N, catalogue=catalogue)[0] for history in histories]
    return [[(item.item_id, item.score) for item in ranking] for ranking in rankings]


def test_offline_equals_the_reference(llm: LLM, prompts: list[str], expected: list[Ranking]) -> None:
    from vllm import SamplingParams

    outputs = llm.generate(prompts, SamplingParams(n=N), use_tqdm=False)
    for output, ranking in zip(outputs, expected, strict=True):
        assert_same_answer(of_output(output), ranking)


def test_http_equals_the_reference(server: str, prompts: list[str], expected: list[Ranking]) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=60, max_retries=0)
    model = client.models.list().data[0].id
    answer = client.completions.create(model=model, prompt=prompts, n=N)
    for number, ranking in enumerate(expected):
        assert_same_answer(of_completion(answer, number, N), ranking)


def test_bfloat16_stays_close_to_the_reference(checkpoint: Path, prompts: list[str], expected: list[Ranking]) -> None:
    from vllm import SamplingParams

    with in_process(checkpoint, dtype="bfloat16") as engine:
        outputs = engine.generate(prompts, SamplingParams(n=N), use_tqdm=False)
    shared = [
        len({item for item, _ in of_output(output)[:10]} & {item for item, _ in ranking[:10]}) / 10
        for output, ranking in zip(outputs, expected, strict=True)
    ]
    assert sum(shared) / len(shared) > 0.9


def test_an_evaluation_over_http_gives_the_ranks_of_the_reference(
    server: str, histories: list[list[str]], checkpoint: Path
) -> None:
    import pyarrow as pa

    from nezha_vllm.data.dataset import Dataset
    from nezha_vllm.training.comparison import compare
    from nezha_vllm.training.served import Server
    from nezha_vllm.training.start import load_trained

    ours = load_trained(checkpoint)
    ids = ours.catalogue.items["item_id"].to_pylist()
    found = ours.model.recommend([items[-10:] for items in histories], 20, catalogue=ours.catalogue)
    # a held-out item that is somewhere among the twenty best
    sequences = [
        ["item-1", *items[:-1], items[-1], answer[user % 20].item_id]
        for user, (items, answer) in enumerate(zip(histories, found, strict=True))
    ]
    items = pa.table(dict.fromkeys(("item_id", "title", "text"), ids))
    dataset = Dataset("films", [f"u{user}" for user in range(USERS)], sequences, items)
    ask = {"part": "test", "max_history": 10, "beam_width": 50, "baselines": []}
    result = compare(ours.model, ours.catalogue, dataset, server=Server(server, clients=4), **ask)
    assert result.ranks["NEZHA over HTTP"].tolist() == result.ranks["NEZHA"].tolist()
    assert result.rows["NEZHA"]["hit@10"] > 0.3
    assert 0 < result.latency["NEZHA over HTTP"]["p50_ms"] <= result.latency["NEZHA over HTTP"]["p99_ms"]
    with pytest.raises(ValueError, match="no server answers at http://127"):
        compare(ours.model, ours.catalogue, dataset, server=Server("http://127.0.0.1:9"), **ask)
