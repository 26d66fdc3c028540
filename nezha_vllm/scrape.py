"""Reading a server's ``/metrics`` and ``/v1/models``. Knows HTTP answers only: no torch, no vLLM."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

MAX_BYTES = 64 << 20  # of an answer: what is not a server's own would otherwise fill the memory


class ScrapeError(ValueError):
    """The server did not answer as a NEZHA server does; the message says what to do."""


Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Scrape:
    """Samples of one moment, or with `since` of the time between two."""

    samples: Mapping[tuple[str, Labels], float]

    @classmethod
    def parse(cls, text: str) -> Scrape:
        """Raises ``ValueError`` for what is not Prometheus's text format."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(text)
        return cls({(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples})

    def since(self, earlier: Scrape) -> Scrape:
        """What counters and histograms have grown by; only of those is it meaningful.

        One that has shrunk has begun anew, with the server.
        """
        before = {key: earlier.samples.get(key, 0.0) for key in self.samples}
        return Scrape({key: value - before[key] * (value >= before[key]) for key, value in self.samples.items()})

    def total(self, name: str, **labels: str) -> float | None:
        """Sum of the samples that have these labels among theirs; None if there is no such sample."""
        found = [value for value, known in self._named(name) if labels.items() <= dict(known).items()]
        return sum(found) if found else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums by the value of a label."""
        sums: dict[str, float] = {}
        for value, labels in self._named(name):
            key = dict(labels).get(label, "")
            sums[key] = sums.get(key, 0.0) + value
        return sums

    def mean(self, histogram: str, **labels: str) -> float | None:
        """None if nothing was observed."""
        count = self.total(f"{histogram}_count", **labels)
        return (self.total(f"{histogram}_sum", **labels) or 0.0) / count if count else None

    def quantile(self, histogram: str, share: float) -> float | None:
        """As Prometheus's ``histogram_quantile``: linear inside a bucket, the last bound if it lies beyond."""
        bounds = sorted((float(le), count) for le, count in self.by(f"{histogram}_bucket", "le").items())
        if not bounds or not bounds[-1][1] > 0:
            return None
        rank, low, below = share * bounds[-1][1], 0.0, 0.0
        for high, count in bounds:
            if count >= rank and count > below:
                return low if high == float("inf") else low + (high - low) * (rank - below) / (count - below)
            low, below = high, count
        return low

    def _named(self, name: str) -> list[tuple[float, Labels]]:
        return [(value, labels) for (known, labels), value in self.samples.items() if known == name]


def base_url(given: str) -> str:
    """``127.0.0.1:8000``, ``http://host:8000/v1`` and the like as the address of a server."""
    url = given if "://" in given else f"http://{given}"
    if not url.startswith(("http://", "https://")):
        raise ScrapeError(f"{given} is no address of a server; give one such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/metrics").removesuffix("/v1")


def metrics_of(url: str, timeout: float) -> Scrape:
    """Raises ``ScrapeError``."""
    text = _get(f"{url}/metrics", timeout)
    try:
        scrape = Scrape.parse(text)
    except ValueError:
        raise ScrapeError(f"{url}/metrics is not in Prometheus's format; is another program listening there?") from None
    if not any(name.startswith("nezha_") for name, _ in scrape.samples):
        raise ScrapeError(
            f"{url}/metrics has no metrics of NEZHA: the server has another model, or was started with "
            "--disable-log-stats"
        )
    return scrape


def models_of(url: str, timeout: float, api_key: str | None = None) -> list[str]:
    """Names of the models, as requests give them. Raises ``ScrapeError``."""
    text = _get(f"{url}/v1/models", timeout, api_key)
    try:
        return [str(model["id"]) for model in json.loads(text)["data"]]
    except (KeyError, TypeError, ValueError):
        raise ScrapeError(f"{url}/v1/models is no list of models; is another program listening there?") from None


def _get(url: str, timeout: float, api_key: str | None = None) -> str:
    try:
        request = urllib.request.Request(url)
        if api_key:
            request.add_unredirected_header("Authorization", f"Bearer {api_key}")
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            content = answer.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        remedy = {
            401: "give the key that it was started with: --api-key, or VLLM_API_KEY in the environment",
            404: "is it a vLLM server?",
        }
        raise ScrapeError(f"{url} answers {error.code}; {remedy.get(error.code, 'see its log')}") from None
    except TimeoutError:
        raise ScrapeError(f"{url} did not answer within {timeout:g} s; the server is overloaded or hangs") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise ScrapeError(f"{url} did not answer within {timeout:g} s; is the address right?") from None
        raise ScrapeError(f"no server at {url}: {_reason(error.reason)}") from None
    except (HTTPException, OSError, ValueError) as error:
        raise ScrapeError(f"{url} does not answer as a web server does: {error!r}") from None
    if len(content) > MAX_BYTES:
        raise ScrapeError(f"{url} sends more than {MAX_BYTES >> 20} MiB; is another program listening there?")
    return content.decode("utf-8", errors="replace")


def _reason(reason: Any) -> str:
    return str(getattr(reason, "strerror", None) or reason)
