"""Prometheus metrics of an API process, on vLLM's own ``/metrics``. What each means stands in ``docs/metrics.md``.

They are made when a process begins to serve, not on import: with several API processes vLLM names the folder through
which prometheus_client adds them up before it starts them. The engines' side comes with each answer's payload.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from nezha_vllm.pointer import published_at

if TYPE_CHECKING:
    from nezha_vllm.frontend.answers import Answer
    from nezha_vllm.frontend.options import Plan
    from nezha_vllm.frontend.service import Service
    from nezha_vllm.payload import RankedIds

OUTCOMES = ("answered", "refused", "overloaded", "failed", "disconnected")
SHORTAGES = ("min_score", "beams", "rules", "catalogue")
SWAPS = ("swapped", "refused")
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"  # set by vLLM for several API processes
SIZED_RULES = ("exclude_items", "allow_items", "exclude_history", "segments", "exclude_segments")

COUNTS = (0, 1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 4096)
WIDTHS = tuple(1 << bit for bit in range(13))
LIST_SIZES = (0, 1, 10, 100, 1_000, 10_000, 65_536)
STAGE_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
# vLLM's own histogram begins at 0.3 s, which is a hundred requests
REQUEST_SECONDS = (
    *(0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)


class Metrics:
    """All metrics; one object a process. An answer costs a dozen increments, 1 µs each."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        requests = Counter(
            "nezha_requests",
            "Requests to /v1/completions and /invocations that have ended, by outcome.",
            ["outcome"],
            registry=registry,
        )
        short = Counter(
            "nezha_short_answers",
            "Prompts answered with fewer items than asked for, by reason.",
            ["reason"],
            registry=registry,
        )
        rule_size = Histogram(
            "nezha_rule_size",
            "Entries of a rule's list, of the answered prompts that have the rule.",
            ["rule"],
            buckets=LIST_SIZES,
            registry=registry,
        )
        self._requests = {outcome: requests.labels(outcome) for outcome in OUTCOMES}
        self._short = {reason: short.labels(reason) for reason in SHORTAGES}
        self._rule_size = {rule: rule_size.labels(rule) for rule in SIZED_RULES}
        self._seconds = Histogram(
            "nezha_request_seconds",
            "Time of an answered request, from its headers to the last byte of its answer.",
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        self._items = Histogram(
            "nezha_items_returned", "Items of an answered prompt.", buckets=COUNTS, registry=registry
        )
        self._widths = Histogram(
            "nezha_beam_width", "Beam width of an answered prompt.", buckets=WIDTHS, registry=registry
        )
        self._drafted = Counter("nezha_beams_drafted", "Beams finished by the draft stage.", registry=registry)
        self._valid = Counter(
            "nezha_beams_valid", "Finished beams that are catalogue items, eligible under the rules.", registry=registry
        )
        self._draft = Histogram(
            "nezha_draft_stage_seconds",
            "Time of the draft stage in the step that answered a prompt, for all prompts of the step together.",
            buckets=STAGE_SECONDS,
            registry=registry,
        )
        self._unknown = Counter(
            "nezha_unknown_excluded_items",
            "IDs in exclude_items that the catalogue does not hold, of answered prompts.",
            registry=registry,
        )
        self._version = Gauge(
            "nezha_catalogue_info",
            "API processes that answer from this version of the catalogue; 0 or no series for one that they have left.",
            ["version"],
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._catalogue_items = Gauge(
            "nezha_catalogue_items",
            "Items of the catalogue in use.",
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self._catalogue_ids = Gauge(
            "nezha_catalogue_semantic_ids",
            "Distinct semantic IDs of the catalogue in use.",
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self._published = Gauge(
            "nezha_catalogue_published_timestamp_seconds",
            "Unix time at which the catalogue in use was published to its store, or saved; time() less it is the age.",
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        swaps = Counter(
            "nezha_catalogue_swaps",
            "Generations of the catalogue store that a running server has taken up or refused.",
            ["result"],
            registry=registry,
        )
        self._swaps = {result: swaps.labels(result) for result in SWAPS}
        self._shown: str | None = None

    def count(self, outcome: str, seconds: float) -> None:
        """A request has ended with one of ``OUTCOMES``, so many seconds after its headers came."""
        self._requests[outcome].inc()
        if outcome == "answered":
            self._seconds.observe(seconds)

    def record(self, plan: Plan, ids: RankedIds, answer: Answer) -> None:
        """A prompt was answered."""
        self._items.observe(len(answer.item_ids))
        self._widths.observe(plan.beam_width)
        self._drafted.inc(ids.num_drafted)
        self._valid.inc(ids.num_valid)
        if ids.draft_seconds:
            self._draft.observe(ids.draft_seconds)
        if answer.shortage is not None:
            self._short[answer.shortage].inc()
        for rule, size in plan.rules.sizes.items():
            self._rule_size[rule].observe(size)
        if plan.rules.unknown:
            self._unknown.inc(plan.rules.unknown)

    def count_swap(self, result: str) -> None:
        """The server has gone to another generation, or not: one of ``SWAPS``. For one API process to tell."""
        self._swaps[result].inc()

    def show_catalogue(self, service: Service) -> None:
        """Tell which catalogue this process answers from; call it again when that changes."""
        catalogue = service.catalogue
        if self._shown not in (None, catalogue.version):
            self._version.labels(self._shown).set(0)
            if MULTIPROCESS not in os.environ:  # else a process cannot take it out of its file
                self._version.remove(self._shown)
        self._shown = catalogue.version
        self._version.labels(catalogue.version).set(1)
        self._catalogue_items.set(catalogue.num_items)
        self._catalogue_ids.set(catalogue.num_ids)
        with suppress(OSError):  # replaced a moment ago
            self._published.set(published_at(service.settings.catalogue, catalogue.version))


_active: Metrics | None = None


def serve(service: Service) -> None:
    """Make this process's metrics: it is about to answer requests over HTTP."""
    global _active
    if _active is None:
        _active = Metrics()
    _active.show_catalogue(service)


def active() -> Metrics | None:
    """This process's metrics; None offline and with ``--disable-log-stats``."""
    return _active
