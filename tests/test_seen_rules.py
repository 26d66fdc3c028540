"""Long lists that come again: the same rules, without a look-up, as long as the catalogue is the same."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.frontend import seen_rules, short_way
from nezha_vllm.frontend.rules import NO_RULES
from nezha_vllm.frontend.seen_rules import LONG, SeenRules
from nezha_vllm.frontend.service import Service
from nezha_vllm.frontend.short_way import ShortWay

LISTED = [f"item-{number}" for number in range(0, 1000, 2)]


def catalogue(first: int = 0) -> Catalogue:
    ids = [f"item-{first + number}" for number in range(1000)]
    return Catalogue.build(ids, [[number % 40, number // 40] for number in range(1000)], [40, 40])


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A line for each time that rules are read."""
    lines: list[Any] = []
    read = short_way.read_rules
    monkeypatch.setattr(short_way, "read_rules", lambda *asked: lines.append(asked) or read(*asked))
    return lines


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch) -> ShortWay:
    settings: Any = SimpleNamespace(beam_width=50, max_beam_width=512, validity="stepwise", max_concurrent_requests=0)
    service = Service(settings, catalogue(), (0, 40), (80, 81), 82, 64)
    renderer = SimpleNamespace(current=service, service=service, encode=lambda prompt: [*prompt, 80, 81])
    processor = SimpleNamespace(get_num_unfinished_requests=lambda: 0)
    engine = SimpleNamespace(renderer=renderer, output_processor=processor, vllm_config=None)
    handler: Any = SimpleNamespace(engine_client=engine, models=SimpleNamespace(model_name=lambda: "nezha"))
    monkeypatch.setattr(short_way, "traces", lambda config: False)
    return ShortWay(handler, SimpleNamespace())


def body(prompt: list[int] | None = None, **fields: Any) -> bytes:
    return json.dumps({"prompt": prompt or [0, 40], "n": 5, **fields}).encode()


def test_the_same_options_again_need_no_look_up(way, reads):
    options = {"exclude_items": LISTED, "beam_width": 7}
    first, _ = way.read(body(vllm_xargs=options))
    again, tokens = way.read(body([1, 41], n=6, vllm_xargs=options))
    assert again.rules is first.rules
    assert len(reads) == 1
    assert (again.n, again.beam_width, tokens) == (6, 7, [1, 41, 80, 81])
    assert again.search()["positions"] == first.search()["positions"]
    assert way.read(body(n=8, vllm_xargs=options)) is None, "a beam of 7 has no 8 items"


def test_a_beam_search_is_as_wide_as_this_request_has_items(way, reads):
    options = {"allow_items": LISTED}
    widths = [way.read(body(n=n, use_beam_search=True, vllm_xargs=options))[0].beam_width for n in (5, 9)]
    assert (*widths, way.read(body(vllm_xargs=options))[0].beam_width, len(reads)) == (5, 9, 50, 1)


def test_what_is_left_out_of_a_history_is_looked_up_each_time(way):
    options = {"exclude_items": LISTED, "exclude_history": True}
    first, second = (way.read(body(prompt, vllm_xargs=options))[0] for prompt in ([1, 40], [3, 40]))
    assert first.rules.eligible.rows.tolist() != second.rules.eligible.rows.tolist()


def test_another_catalogue_has_nothing_of_the_one_before(way, reads):
    options = {"exclude_items": LISTED}
    way.read(body(vllm_xargs=options))
    way.renderer.service = way.renderer.current.with_catalogue(catalogue(first=500), "2")
    plan, _ = way.read(body(vllm_xargs=options))
    assert (plan.rules.unknown, len(reads)) == (250, 2)


@pytest.mark.parametrize("options", [{"allow_items": [*LISTED, "nobody"]}, {"exclude_items": [*LISTED, 1.5]}])
def test_refused_lists_are_refused_again(way, options):
    assert [way.read(body(vllm_xargs=options)) for _ in range(2)] == [None, None]


@pytest.mark.parametrize("options", ["[" * 5_000, "[" * 5_000 + "]" * 5_000, '{"exclude_items": [' + '"i", ' * 2_000])
def test_what_cannot_be_read_is_left_to_vllm(way, options):
    assert way.read(b'{"prompt": [1], "vllm_xargs": %s}' % options.encode()) is None


@pytest.mark.parametrize("options", ["null", "{}", '{"min_score": -3}'])
def test_a_long_prompt_has_the_options_that_it_has(way, options):
    plan, _ = way.read(b'{"prompt": [%s1], "vllm_xargs": %s}' % (b"1, " * LONG, options.encode()))
    assert plan.rules.min_score == (json.loads(options) or {}).get("min_score")
    assert not way.renderer.service.seen.bytes


def test_those_not_asked_for_longest_make_room(monkeypatch):
    monkeypatch.setattr(seen_rules, "MAX_BYTES", 3 * LONG)
    seen, asked = SeenRules(), [bytes([number]) * LONG for number in range(4)]
    for one in asked[:3]:
        seen.keep(one, {}, NO_RULES)
    assert seen.find(asked[0])
    seen.keep(asked[3], {}, NO_RULES)
    assert [bool(seen.find(one)) for one in asked] == [True, False, True, True]
    assert seen.bytes == 3 * LONG
    seen.keep(b"x" * 4 * LONG, {}, NO_RULES)
    assert not seen.bytes
