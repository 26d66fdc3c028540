"""Semantic IDs from an RQ-VAE, and from index files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_tokenize import run_tokenize, small_dataset

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.data.dataset import Dataset
from nezha_vllm.tokenize.index_files import read_index
from nezha_vllm.tokenize.report import neighbour_prefixes
from nezha_vllm.tokenize.rqvae import RqVaeOptions, rqvae


def test_rqvae_uses_its_codes_and_learns():
    rng = np.random.default_rng(0)
    # 16 clusters on a curved surface, far from the origin and of a scale that would drown the codebook loss
    centres = rng.normal(size=(16, 12)) * 300 + 5000
    points = (centres[rng.integers(0, 16, 400)] + rng.normal(size=(400, 12)) * 20).astype(np.float32)
    points -= points.mean(0)
    options = RqVaeOptions(widths=(32,), latent=8, epochs=60, batch_size=128, learning_rate=4e-3)
    found = rqvae(points, [8, 8, 8], options)
    assert found.codes.min() >= 0
    assert [len(np.unique(column)) for column in found.codes.T] == [8, 8, 8]
    untrained = rqvae(points, [8, 8, 8], RqVaeOptions(widths=(32,), latent=8, epochs=0))
    kept = found.variance_kept(points, found.codes)
    assert kept > 0.8 > untrained.variance_kept(points, untrained.codes)
    # a code names the centre nearest to what the levels before left over
    cost = found.last_level_cost(np.arange(400))
    assert (cost.argmin(1) == found.codes[:, -1]).mean() > 0.99
    again = rqvae(points, [8, 8, 8], options)
    assert (again.codes == found.codes).all()


def test_rqvae_with_more_codes_than_items_and_without_variance():
    options = RqVaeOptions(widths=(8,), latent=4, epochs=3)
    assert rqvae(np.ones((3, 5), np.float32), [16, 4], options).codes.shape == (3, 2)
    with pytest.raises(ValueError, match="finite"):
        rqvae(np.full((3, 5), np.nan), [4], options)


def test_the_verb_makes_rqvae_ids_without_collisions(tmp_path):
    small_dataset().save(tmp_path / "data")
    words = ["--codes", "6,6,12", "--text", "tfidf", "--quantizer", "rqvae"]
    assert run_tokenize(tmp_path / "data", "--out", tmp_path / "catalogue", *words) == 0
    assert Catalogue.load(tmp_path / "catalogue").num_ids == 40
    assert json.loads((tmp_path / "catalogue-report.json").read_text())["quantizer"] == "rqvae"


def write_index(path, codes):
    tokens = {
        key: [f"<{letter}_{code}>" for letter, code in zip("abc", row, strict=True)] for key, row in codes.items()
    }
    path.write_text(json.dumps(tokens))
    return path


def test_index_files_are_imported_as_they_are(tmp_path):
    data = small_dataset()
    data = Dataset(
        data.name,
        data.users,
        [[i[1:] for i in items] for items in data.sequences],
        data.items.set_column(0, "item_id", [[i[1:] for i in data.item_ids]]),
    )
    data.save(tmp_path / "data")
    codes = {str(item - 1): (item % 3, item % 5, item % 9) for item in range(40)}
    path = write_index(tmp_path / "index.json", codes)
    out = tmp_path / "catalogue"
    assert run_tokenize(tmp_path / "data", "--out", out, "--index", path, "--index-offset", 1) == 0
    catalogue = Catalogue.load(out)
    assert catalogue.codec.codebook_sizes == (16, 16, 16)
    assert catalogue.codes_of("7") == [1, 2, 7]
    assert run_tokenize(tmp_path / "data", "--out", out, "--index", path, "--index-offset", 1, "--codes", "3,5,9") == 0
    assert Catalogue.load(out).codec.codebook_sizes == (3, 5, 9)
    with pytest.raises(ValueError, match="--index-offset, or name the index"):
        run_tokenize(tmp_path / "data", "--out", out, "--index", path)
    with pytest.raises(ValueError, match="out of range"):
        run_tokenize(tmp_path / "data", "--out", out, "--index", path, "--index-offset", 1, "--codes", "4")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"0": ["<a_1>", "<c_2>"]}', "'<c_2>' is no code of level 2, such as <b_12>"),
        ('{"0": [1, 2], "1": [1]}', "item '1': 1 codes, the first item has 2"),
        ('{"0": []}', "no list of codes"),
        ('{"0": [-1]}', "-1 is no code"),
        ("{}", "holds no items"),
        ("[]", "no JSON object"),
        ("{", "no JSON"),
    ],
)
def test_index_files_that_cannot_be_read_say_why(content, said, tmp_path):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_index(tmp_path / "index.json")


def test_neighbours_share_the_prefixes_that_they_share():
    rng = np.random.default_rng(0)
    points = np.arange(60)[:, None] + rng.normal(size=(60, 1)) / 10
    codes = np.stack([np.arange(60) // 20, np.arange(60) // 5 % 4, rng.integers(0, 3, 60)], axis=1)
    expected = np.zeros(3)
    for row in range(60):
        other = min((at for at in range(60) if at != row), key=lambda at: abs(points[at, 0] - points[row, 0]))
        for level in range(3):
            expected[level] += (codes[row, : level + 1] == codes[other, : level + 1]).all() / 60
    assert neighbour_prefixes(points, codes) == pytest.approx(expected, abs=1e-4)
    # two items at one place are each other's nearest
    assert neighbour_prefixes(np.zeros((2, 3)), np.array([[1, 2], [1, 3]])) == [1.0, 0.0]


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_report_has_a_picture(ending, tmp_path):
    small_dataset().save(tmp_path / "data")
    words = ["--codes", "4", "--text", "tfidf", "--picture", tmp_path / f"deep/report.{ending}"]
    assert run_tokenize(tmp_path / "data", "--out", tmp_path / "catalogue", *words) == 0
    assert (tmp_path / f"deep/report.{ending}").stat().st_size > 5_000
    written = json.loads((tmp_path / "catalogue-report.json").read_text())
    assert len(written["neighbour_prefixes"]) == 3
    assert sum(int(size) * count for size, count in written["group_sizes"].items()) == 40
