"""Which of several engines a request goes to, with vLLM's own choice behind ours."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.engine.core_client import DPLBAsyncMPClient

from nezha_vllm.frontend.home_engine import stay_home
from nezha_vllm.frontend.options import PLAN

ENGINES = [b"0", b"1", b"2"]
choose = stay_home(DPLBAsyncMPClient.__dict__["get_core_engine_for_request"])


def api_process(index: int, counts: Any = None) -> Any:
    """One of four, as vLLM makes it; ``counts``: waiting, running and the cache's use of each engine."""
    counts = counts or [[0, 0, 0.0] for _ in ENGINES]
    return SimpleNamespace(
        client_index=index,
        client_count=4,
        core_engines=ENGINES,
        lb_engines=counts,
        reqs_in_flight={},
        engine_inflight=Counter(),
        eng_start_index=len(ENGINES) * index // 4,
    )


def request(name: str = "a", ours: bool = True, rank: int | None = None) -> Any:
    params = SimpleNamespace(**({PLAN: object()} if ours else {}))
    return SimpleNamespace(request_id=name, sampling_params=params, pooling_params=None, data_parallel_rank=rank)


def one_at_a_time(process: Any, count: int, **kind: Any) -> list[int]:
    found = []
    for number in range(count):
        engine = choose(process, request(str(number), **kind))
        found.append(ENGINES.index(engine))
        process.reqs_in_flight.clear()
        process.engine_inflight.clear()
    return found


@pytest.mark.parametrize(("index", "home"), [(0, 0), (1, 1), (2, 2), (3, 0)])
def test_requests_that_come_one_at_a_time_stay_with_one_engine(index, home):
    assert one_at_a_time(api_process(index), 7) == [home] * 7
    last = [[0, 0, 0.0] for _ in ENGINES]
    last[home][1] = 1  # heard of while the request before was under way
    assert one_at_a_time(api_process(index, last), 7) == [home] * 7


def test_other_models_requests_are_vllms():
    assert len(set(one_at_a_time(api_process(1), 7, ours=False))) == len(ENGINES)


def test_a_busy_engine_and_a_second_request_are_vllms_to_judge():
    busy = [[0, 5, 0.0], [1, 1, 0.0], [0, 0, 0.0]]
    assert ENGINES.index(choose(api_process(1, busy), request())) == 2
    process = api_process(1)
    chosen = [ENGINES.index(choose(process, request(str(number)))) for number in range(3)]
    assert chosen[0] == 1
    assert sorted(chosen) == [0, 1, 2], "at once they are spread"


def test_a_client_may_name_the_engine():
    assert ENGINES.index(choose(api_process(1), request(rank=2))) == 2
