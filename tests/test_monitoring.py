"""examples/monitoring: what the dashboard and the alerts ask for is what a server has."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from types import ModuleType

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

FOLDER = Path(__file__).parents[1] / "examples" / "monitoring"


@pytest.fixture(scope="module")
def dashboard() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_dashboard", FOLDER / "check_dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alerts() -> set[str]:
    """Metrics that the alerts read."""
    return set(re.findall(r"\bnezha_\w+", (FOLDER / "alerts.yml").read_text(encoding="utf-8")))


def names(text: str) -> set[str]:
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def test_every_metric_of_ours_that_is_asked_for_exists(dashboard: ModuleType) -> None:
    from nezha_vllm.frontend.metrics import Metrics

    registry = CollectorRegistry()
    Metrics(registry)
    asked = {name for name in dashboard.metrics() | alerts() if name.startswith("nezha_")}
    there = {sample.name for family in registry.collect() for sample in family.samples}
    there |= {"nezha_catalogue_info"}  # has no sample before there is a catalogue
    assert len(asked) > 10
    assert asked <= there


def test_the_dashboard_shows_every_metric_of_ours(dashboard: ModuleType) -> None:
    from nezha_vllm.frontend.metrics import Metrics

    registry = CollectorRegistry()
    Metrics(registry)
    for family in registry.collect():
        assert any(name.startswith(family.name) for name in dashboard.metrics()), family.name


def test_every_query_of_the_dashboard_and_the_alerts_is_promql(dashboard: ModuleType) -> None:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    of_alerts = [rule["expr"] for group in groups for rule in group["rules"]]
    queries = [query for _, query in dashboard.queries()] + of_alerts
    assert len(queries) > 20
    for query in queries:
        promql_parser.parse(query)
        with pytest.raises(ValueError, match="promql"):
            promql_parser.parse(query + " by")


@pytest.mark.slow
def test_every_metric_that_is_asked_for_is_on_a_real_server(dashboard: ModuleType, server: str) -> None:
    there = names(urllib.request.urlopen(f"{server}/metrics").read().decode())
    assert dashboard.metrics() | alerts() <= there


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus")
def test_prometheus_takes_the_configuration_the_alerts_and_the_queries(tmp_path: Path) -> None:
    rules = tmp_path / "dashboard.yml"
    printed = subprocess.run(
        ["python3", "check_dashboard.py"], cwd=FOLDER, check=True, capture_output=True, text=True
    ).stdout
    rules.write_text(printed, encoding="utf-8")
    for arguments in (
        ["check", "config", "prometheus.yml"],
        ["check", "rules", str(rules)],
        ["test", "rules", "alerts_test.yml"],
    ):
        done = subprocess.run(["promtool", *arguments], cwd=FOLDER, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
