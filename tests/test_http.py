"""The HTTP API: a real `vllm serve` process and the stock `openai` client."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from answers import assert_same_answer, of_completion
from watching import until

from nezha_vllm.catalogue import Catalogue

pytestmark = pytest.mark.slow

HISTORY = "<item:item-3><item:item-70><item:item-12>"


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=60, max_retries=0)


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def ask(client: openai.OpenAI, model: str, prompt: Any = HISTORY, n: int = 5, **options: Any) -> Any:
    xargs = {name: options.pop(name) for name in ("beam_width", "validity") if name in options}
    body = options.pop("extra_body", {}) | ({"vllm_xargs": xargs} if xargs else {})
    return client.completions.create(model=model, prompt=prompt, n=n, extra_body=body or None, **options)


def test_choices_are_catalogue_items_best_first(client: openai.OpenAI, model: str, checkpoint: Path) -> None:
    catalogue = Catalogue.load(checkpoint / "catalogue")
    answer = ask(client, model, n=10)
    scores = [choice.score for choice in answer.choices]
    assert scores == sorted(scores, reverse=True)
    for choice in answer.choices:
        assert choice.semantic_id == catalogue.codes_of(choice.text)
        assert choice.catalogue_version == catalogue.version
        assert choice.finish_reason == "stop"
    assert [choice.index for choice in answer.choices] == list(range(10))


def test_usage_counts_the_prompt_with_placeholders_and_the_codes_of_the_items(
    client: openai.OpenAI, model: str
) -> None:
    usage = ask(client, model, n=7).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3 * 3 + 3, 7 * 3, 33)


def test_text_codes_and_token_ids_are_one_prompt(client: openai.OpenAI, model: str, checkpoint: Path) -> None:
    catalogue = Catalogue.load(checkpoint / "catalogue")
    offsets = json.loads((checkpoint / "config.json").read_text())["code_token_offsets"]
    placeholders = json.loads((checkpoint / "config.json").read_text())["placeholder_token_ids"]
    codes = [catalogue.codes_of(name) for name in ("item-3", "item-70", "item-12")]
    text = "".join(f"<a_{a}><b_{b}><c_{c}>" for a, b, c in codes)
    token_ids = [offset + code for item in codes for offset, code in zip(offsets, item, strict=True)]
    expected = of_completion(ask(client, model))
    same = (text, text.replace("><", "> <"), text + "<sp_1><sp_2><sp_3>", token_ids, [*token_ids, *placeholders])
    for prompt in same:
        assert_same_answer(of_completion(ask(client, model, prompt)), expected)


def test_natural_language_may_stand_around_the_codes(client: openai.OpenAI, model: str) -> None:
    found = of_completion(ask(client, model, f"Recommend something new after {HISTORY}, please:"))
    assert len(found) == 5
    assert found != of_completion(ask(client, model))


def test_lists_of_prompts_are_answered_in_order(client: openai.OpenAI, model: str) -> None:
    prompts = ["<item:item-1>", "<item:item-2><item:item-3>", HISTORY]
    together = ask(client, model, prompts, n=4)
    assert [choice.index for choice in together.choices] == list(range(12))
    for number, prompt in enumerate(prompts):
        alone = of_completion(ask(client, model, prompt, n=4))
        assert_same_answer(of_completion(together, number, n=4), alone)


def test_a_short_answer_says_why_and_keeps_the_indices_of_the_other_prompts(client: openai.OpenAI, model: str) -> None:
    answer = ask(client, model, ["<item:item-1>", HISTORY], n=20, beam_width=20, validity="final")
    for number, summary in enumerate(answer.nezha):
        mine = [choice for choice in answer.choices if choice.index // 20 == number]
        assert len(mine) == summary["returned"] < 20
        assert "catalogue items" in summary["reason"]


def test_streaming_sends_one_chunk_a_choice(client: openai.OpenAI, model: str) -> None:
    expected = ask(client, model, ["<item:item-1>", HISTORY], n=3)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(client, model, ["<item:item-1>", HISTORY], n=3, **options))
    usage = chunks.pop().usage
    choices = sorted((chunk.choices[0] for chunk in chunks), key=lambda choice: choice.index)
    assert [choice.text for choice in choices] == [choice.text for choice in expected.choices]
    assert [choice.score for choice in choices] == pytest.approx([c.score for c in expected.choices], abs=1e-4)
    assert all(choice.catalogue_version and len(choice.semantic_id) == 3 for choice in choices)
    assert usage.completion_tokens == expected.usage.completion_tokens


def test_a_stream_tells_why_there_are_fewer_items(client: openai.OpenAI, model: str) -> None:
    prompts = ["<item:item-1>", HISTORY, "<item:item-9>"]
    short = {"n": 1, "beam_width": 1, "validity": "final"}
    plain = ask(client, model, prompts, **short)
    assert len(plain.choices) < 3, "one free beam is rarely an item"
    *choices, last = ask(client, model, prompts, **short, stream=True)
    assert [chunk.choices[0].index for chunk in choices] == [choice.index for choice in plain.choices]
    assert last.choices == []
    assert last.nezha == plain.nezha
    few = list(ask(client, model, n=20, beam_width=20, validity="final", stream=True))
    assert {chunk.nezha[0]["reason"] for chunk in few} == {few[0].nezha[0]["reason"]}


def test_logprobs_are_one_a_level_and_sum_to_the_score(client: openai.OpenAI, model: str) -> None:
    for choice in ask(client, model, logprobs=1).choices:
        assert choice.logprobs.tokens == [f"<{'abc'[i]}_{code}>" for i, code in enumerate(choice.semantic_id)]
        assert sum(choice.logprobs.token_logprobs) == pytest.approx(choice.score, abs=1e-5)


def test_beam_search_requests_of_vllm_clients_need_no_change(client: openai.OpenAI, model: str) -> None:
    beam = {"use_beam_search": True, "length_penalty": 1.0}
    found = of_completion(ask(client, model, n=8, extra_body=beam, temperature=0, max_tokens=3))
    assert_same_answer(found, of_completion(ask(client, model, n=8, beam_width=8)))
    streamed = [c.choices[0].text for c in ask(client, model, n=8, extra_body=beam, stream=True) if c.choices]
    assert streamed == [item for item, _ in found]


def test_sampling_settings_that_clients_send_by_default_change_nothing(client: openai.OpenAI, model: str) -> None:
    settings = {"temperature": 0.0, "top_p": 0.5, "seed": 3, "max_tokens": 300}
    assert_same_answer(of_completion(ask(client, model, **settings)), of_completion(ask(client, model)))


def test_32_concurrent_clients_get_what_each_would_get_alone(client: openai.OpenAI, model: str) -> None:
    prompts = [f"<item:item-{i + 1}>" * (1 + i % 9) for i in range(32)]
    alone = [of_completion(ask(client, model, prompt, beam_width=10 + 7 * i)) for i, prompt in enumerate(prompts)]
    with ThreadPoolExecutor(32) as pool:
        for _ in range(3):
            jobs = [pool.submit(ask, client, model, p, beam_width=10 + 7 * i) for i, p in enumerate(prompts)]
            for job, expected in zip(jobs, alone, strict=True):
                assert_same_answer(of_completion(job.result()), expected)


def metric(server: str, name: str, label: str = "") -> float:
    text = urllib.request.urlopen(f"{server}/metrics").read().decode()
    lines = [line for line in text.splitlines() if line.startswith(name) and label in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_a_client_that_disconnects_frees_its_requests(client: openai.OpenAI, model: str, server: str) -> None:
    def open_requests() -> float:
        return metric(server, "vllm:num_requests_running") + metric(server, "vllm:num_requests_waiting")

    def answered() -> float:
        return metric(server, "vllm:generation_tokens_total")

    def left() -> float:
        return metric(server, "nezha_requests_total", 'outcome="disconnected"')

    before, asked, left_before = answered(), 200, left()
    # histories that no cache has, so that the engine does not answer all before the server sees that the client is gone
    prompts = [f"<item:item-{1000 + number}>" * 300 for number in range(asked)]
    body = {"model": model, "prompt": prompts, "n": 1, "vllm_xargs": {"beam_width": 512}}
    connection = http.client.HTTPConnection(server.removeprefix("http://"))
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    until(lambda: open_requests() > 0 or answered() > before)
    connection.close()
    until(lambda: open_requests() == 0)
    assert answered() - before < asked, "the engine worked on for a client that was gone"
    until(lambda: left() == left_before + 1)
    assert len(ask(client, model).choices) == 5


def post(server: str, body: Any, **headers: str) -> tuple[dict[str, str], dict[str, Any]]:
    request = urllib.request.Request(f"{server}/v1/completions", json.dumps(body).encode())
    for name, value in ({"Content-Type": "application/json"} | headers).items():
        request.add_header(name, value)
    with urllib.request.urlopen(request) as response:
        return dict(response.headers), json.loads(response.read())


@pytest.mark.parametrize(
    "body",
    [
        {"n": 10},
        {"n": 50, "vllm_xargs": {"beam_width": 512}},
        {"n": 20, "vllm_xargs": {"beam_width": 20, "validity": "final"}},
        {"n": 1, "vllm_xargs": {"beam_width": 1, "validity": "final"}},
        {"n": 8, "use_beam_search": True, "temperature": 0, "max_tokens": 3},
        {"prompt": [5, 6, 7], "n": 3},
    ],
    ids=str,
)
def test_both_ways_through_the_server_give_one_response(server: str, model: str, body: dict[str, Any]) -> None:
    """A header that only vLLM's own handler reads sends a request there."""
    body = {"model": model, "prompt": HISTORY} | body
    short, long = post(server, body), post(server, body, **{"X-Session-ID": "any"})
    for _, answer in (short, long):
        assert answer.pop("id").startswith("cmpl-")
        assert abs(answer.pop("created") - time.time()) < 60
    assert json.dumps(short[1]) == json.dumps(long[1]), "the same fields in the same order"
    for headers in (short[0], long[0]):
        headers.pop("date"), headers.pop("content-length")
    assert short[0] == long[0]


def test_a_request_keeps_the_id_that_its_client_gave_it(server: str, model: str) -> None:
    body = {"model": model, "prompt": HISTORY}
    assert post(server, body, **{"X-Request-Id": "mine"})[1]["id"] == "cmpl-mine"


def test_single_requests_of_clients_that_disconnect_are_freed(server: str, model: str) -> None:
    before, asked = metric(server, "vllm:generation_tokens_total"), 60
    asked_for = {"model": model, "vllm_xargs": {"beam_width": 512}}
    connections = [http.client.HTTPConnection(server.removeprefix("http://")) for _ in range(asked)]
    for number, connection in enumerate(connections, 1):
        # histories that no cache has, so that the engine does not answer faster than clients leave
        body = json.dumps(asked_for | {"prompt": f"<item:item-{number}>" * 300})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        connection.close()  # at once: a busy machine would answer them all before the last is sent
    until(lambda: metric(server, "vllm:num_requests_running") + metric(server, "vllm:num_requests_waiting") == 0)
    assert len(post(server, {"model": model, "prompt": HISTORY, "n": 5})[1]["choices"]) == 5
    answered = metric(server, "vllm:generation_tokens_total") - before - 1
    assert answered < asked, "the engine worked on for clients that were gone"


REFUSALS: list[tuple[str, str, dict[str, Any]]] = [
    ("prompt", "not in the catalogue", {"prompt": "<item:nobody-sells-this>"}),
    ("prompt", "out of range", {"prompt": "<a_16>"}),
    ("prompt", "out of range", {"prompt": "<a_07>"}),
    ("prompt", "out of range", {"prompt": f"<a_{'9' * 5000}>"}),
    ("prompt", "level that does not exist", {"prompt": "<d_1>"}),
    ("prompt", "closing bracket", {"prompt": "<item:item-1><item:item-2"}),
    ("prompt", "placeholder before its end", {"prompt": "<item:item-1><sp_1><sp_2><sp_3><sp_1><sp_2><sp_3>"}),
    ("prompt", "token ids outside", {"prompt": [10**6]}),
    ("prompt", "empty", {"prompt": ""}),
    ("prompt", "empty", {"prompt": []}),
    ("prompt", "empty", {"prompt": "<sp_1><sp_2><sp_3>"}),
    ("prompt", "placeholder before its end", {"prompt": "<sp_1><item:item-1>"}),
    ("prompt", "takes 1020", {"prompt": "<item:item-1>" * 341}),
    ("n", "raise beam_width", {"n": 51}),
    ("n", "raise beam_width", {"n": 11, "extra_body": {"vllm_xargs": {"beam_width": 10}}}),
    ("n", "at least 1", {"n": 0}),
    ("n", "raise beam_width", {"n": 10**6}),
    ("beam_width", "send at most 512", {"extra_body": {"vllm_xargs": {"beam_width": 10**15}}}),
    ("beam_width", "send at most 512", {"extra_body": {"vllm_xargs": {"beam_width": 513}}}),
    ("beam_width", "whole number", {"extra_body": {"vllm_xargs": {"beam_width": 0}}}),
    ("beam_width", "whole number", {"extra_body": {"vllm_xargs": {"beam_width": "10"}}}),
    ("beam_width", "whole number", {"extra_body": {"vllm_xargs": {"beam_width": 7.5}}}),
    ("validity", "stepwise, final", {"extra_body": {"vllm_xargs": {"validity": "always"}}}),
    ("validity", "stepwise, final", {"extra_body": {"vllm_xargs": {"validity": ["final"]}}}),
    ("beam_widht", "takes beam_width, validity", {"extra_body": {"vllm_xargs": {"beam_widht": 10}}}),
    ("exclude_items", "inside vllm_xargs", {"extra_body": {"exclude_items": ["item-1"]}}),
    ("structured_outputs", "leave it out", {"extra_body": {"structured_outputs": {"regex": "a"}}}),
    ("response_format", "leave it out", {"extra_body": {"response_format": {"type": "json_object"}}}),
    ("prompt_logprobs", "prompt_logprobs", {"extra_body": {"prompt_logprobs": 1}}),
    ("echo", "leave it out", {"echo": True}),
    ("suffix", "leave it out", {"suffix": "x"}),
    ("presence_penalty", "leave it out", {"presence_penalty": 0.5}),
    ("frequency_penalty", "leave it out", {"frequency_penalty": 0.5}),
    ("repetition_penalty", "leave it out", {"extra_body": {"repetition_penalty": 1.5}}),
    ("stop", "leave it out", {"stop": ["x"]}),
    ("logit_bias", "leave it out", {"logit_bias": {"5": 1.0}}),
    ("bad_words", "leave it out", {"extra_body": {"bad_words": ["x"]}}),
    ("allowed_token_ids", "leave it out", {"extra_body": {"allowed_token_ids": [1]}}),
]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize(("parameter", "remedy", "request_body"), REFUSALS)
def test_bad_input_is_a_400_with_parameter_and_remedy_and_the_engine_lives_on(
    client: openai.OpenAI, model: str, parameter: str, remedy: str, request_body: dict[str, Any], stream: bool
) -> None:
    body = {"model": model, "prompt": HISTORY, "n": 5} | request_body
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**body, stream=stream)
    error = caught.value.body
    assert isinstance(error, dict)
    assert error["param"] == parameter
    assert remedy in error["message"]
    assert len(ask(client, model).choices) == 5


def test_half_a_surrogate_pair_is_refused(server: str, model: str) -> None:
    body = json.dumps({"model": model, "prompt": HISTORY + "\ud800"}).encode()  # JSON's escape; the client sends none
    request = urllib.request.Request(f"{server}/v1/completions", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="400") as caught:
        urllib.request.urlopen(request)
    assert "valid Unicode" in json.loads(caught.value.read())["error"]["message"]


def test_values_of_the_wrong_type_are_refused(client: openai.OpenAI, model: str) -> None:
    for body in ({"n": "many"}, {"prompt": {"a": 1}}, {"vllm_xargs": [1]}, {"vllm_xargs": {"beam_width": None}}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=model, prompt=HISTORY, extra_body=body)


def test_lora_adapters_are_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="my-lora", prompt=HISTORY)


def test_chat_and_responses_are_refused_with_the_way_to_ask(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="/v1/completions"):
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": HISTORY}])
    with pytest.raises(openai.BadRequestError, match="/v1/completions"):
        client.responses.create(model=model, input=HISTORY)


def test_a_prompt_of_the_longest_length_is_answered(client: openai.OpenAI, model: str) -> None:
    assert len(ask(client, model, "<item:item-1>" * 340).choices) == 5
    truncated = {"truncate_prompt_tokens": 9, "truncation_side": "left"}
    found = ask(client, model, "<item:item-1>" * 500 + HISTORY, extra_body=truncated)
    assert_same_answer(of_completion(found), of_completion(ask(client, model)))


@pytest.mark.parametrize("stream_options", [{}, {"logprobs": 0}], ids=["short way", "vLLM's handler"])
def test_rules_keep_items_out_of_the_answer(client: openai.OpenAI, model: str, stream_options: dict[str, Any]) -> None:
    def items(**xargs: Any) -> list[str]:
        body = {"vllm_xargs": xargs} if xargs else None
        answer = client.completions.create(model=model, prompt=HISTORY, n=10, extra_body=body, **stream_options)
        return [choice.text for choice in answer.choices]

    best = items()
    without = items(exclude_items=best[:4])
    assert without[:6] == best[4:]
    assert len(without) == 10
    assert items(allow_items=best[2:5]) == best[2:5]
    assert not {"item-3", "item-70", "item-12"} & set(items(exclude_history=True, beam_width=200))


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ({"exclude_items": "item-3"}, "exclude_items"),
        ({"allow_items": ["nobody"]}, "allow_items"),
        ({"exclude_history": "perhaps"}, "exclude_history"),
        ({"min_score": "low"}, "min_score"),
    ],
)
def test_rules_that_cannot_be_read_are_400s(client: openai.OpenAI, model: str, rule: dict[str, Any], name: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=model, prompt=HISTORY, n=5, extra_body={"vllm_xargs": rule})
    assert error.value.body["param"] == name
