"""The demo's path on a slice of real logs: every verb, a real server, the stock client; one command each."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.compute as pc
import pytest

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.cli import main
from nezha_vllm.data.dataset import Dataset
from nezha_vllm.server import Server, free_port

pytestmark = pytest.mark.slow
USERS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset of 60 users, catalogue and a briefly trained checkpoint, each made by its verb."""
    folder = tmp_path_factory.mktemp("pipeline")
    assert main(["prepare", "movielens-100k", "--out", str(folder / "all")]) == 0
    whole = Dataset.load(folder / "all")
    sequences = [sequence[-40:] for sequence in whole.sequences[:USERS]]
    seen = {item for sequence in sequences for item in sequence}
    items = whole.items.filter(pc.is_in(whole.items["item_id"], pc.cast(list(seen), "string")))
    Dataset("slice", whole.users[:USERS], sequences, items).save(folder / "dataset")
    tokenize = ["tokenize", str(folder / "dataset"), "--out", str(folder / "catalogue")]
    assert main([*tokenize, "--text", "tfidf", "--codes", "16,16,32"]) == 0
    train = ["train", str(folder / "dataset"), str(folder / "catalogue"), "--out", str(folder / "checkpoint")]
    assert main([*train, "--epochs", "2", "--batch", "16"]) == 0
    return folder


def test_items_have_ids_of_their_own(folder: Path) -> None:
    catalogue = Catalogue.load(folder / "catalogue")
    report = json.loads((folder / "catalogue-report.json").read_text())
    assert catalogue.num_ids == catalogue.num_items == len(Dataset.load(folder / "dataset").item_ids)
    assert report


def test_evaluate_ranks_all_methods(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = ["evaluate", str(folder / "checkpoint"), str(folder / "dataset"), "--results", str(folder / "runs.csv")]
    evaluate += ["--intervals", "--baselines", "popularity", "markov", "knn"]
    assert main([*evaluate, "--against", str(folder / "checkpoint")]) == 0
    printed = capsys.readouterr().out
    for name in ("opularity", "Markov", "item kNN", "NEZHA", "NEZHA minus"):
        assert name in printed
    lines = (folder / "runs.csv").read_text().splitlines()
    assert len(lines) == 1 + 5
    assert "NEZHA: checkpoint" in lines[-2]
    assert '""epochs"": 2' in lines[-1]


def test_serve_and_recommend(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    user = Dataset.load(folder / "dataset").users[0]
    titles = Catalogue.load(folder / "catalogue").items["title"].to_pylist()
    with Server(folder / "checkpoint", free_port(), log=folder / "log.txt") as server:
        server.wait_until_ready(timeout=240)
        ask = ["recommend", "--user", user, "--dataset", str(folder / "dataset"), "--last", "20", "--url", server.url]
        assert main([*ask, "--n", "5"]) == 0
        table = capsys.readouterr().out
        assert main([*ask, "--n", "5", "--beam-width", "2"]) != 0
        refusal = capsys.readouterr()
    assert sum(title[:12] in table for title in titles) >= 5
    assert "beam_width" in refusal.err + refusal.out
