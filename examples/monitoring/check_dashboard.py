"""Run every query of the dashboard against a Prometheus, and say which are wrong or find nothing.

Without --prometheus, print the queries as a rules file, for `promtool check rules`.
"""

from __future__ import annotations

import argparse
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

DASHBOARD = Path(__file__).with_name("grafana") / "dashboards" / "nezha.json"
VARIABLES = {"$__rate_interval": "1m", "$job": ".*", "$instance": ".*"}


def queries() -> Iterator[tuple[str, str]]:
    """Title of the panel and PromQL, variables filled in."""
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            yield panel["title"], query


def metrics() -> set[str]:
    """Names of the metrics that the queries read."""
    return {name for _, query in queries() for name in re.findall(r"\b(?:nezha_|vllm:)\w+", query)}


def samples(prometheus: str, query: str) -> int:
    """How many the query finds now. Raises ``ValueError`` with what Prometheus has against it."""
    url = f"{prometheus.rstrip('/')}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return len(json.load(answer)["data"]["result"])
    except urllib.error.HTTPError as error:
        raise ValueError(json.load(error)["error"]) from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", metavar="URL")
    prometheus = parser.parse_args().prometheus
    if prometheus is None:
        rules = [{"record": f"check:{number}", "expr": query} for number, (_, query) in enumerate(queries())]
        print(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}, indent=2))  # YAML, too
        return 0
    wrong = 0
    for title, query in queries():
        try:
            found = samples(prometheus, query)
        except ValueError as error:
            wrong += 1
            print(f"wrong    {title}: {query}: {error}")
        else:
            print(f"{found:<8} {title}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
