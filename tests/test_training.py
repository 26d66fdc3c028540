"""Training: packing covers the data, the loss falls, the best weights are kept, runs resume, baselines and metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_callback import TrainerState

from nezha_vllm import cli
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.config import SOFTMAX_OVER
from nezha_vllm.data.dataset import Dataset
from nezha_vllm.training.averages import FILE
from nezha_vllm.training.baselines import Markov, Popularity
from nezha_vllm.training.comparison import BASELINES, compare, table, to_json
from nezha_vllm.training.evaluation import HeldOut, model_ranks, target_loss
from nezha_vllm.training.fit import codes_of, fit
from nezha_vllm.training.metrics import UNRANKED, ndcg, ranks_of, summary
from nezha_vllm.training.options import PRETRAINED, TrainingOptions
from nezha_vllm.training.packing import PackedCollator, Segments, packed
from nezha_vllm.training.resume import LAST_WRITTEN, NOTE, resumable
from nezha_vllm.training.start import save_trained, starting_model
from nezha_vllm.training.trainer import parameter_groups

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [4, 4, 4]
ITEMS = [f"i{number}" for number in range(24)]
SHAPE = SimpleNamespace(family="llama", hidden=64, layers=1, heads=2, intermediate=None)
FAST = {
    "epochs": 15,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "max_history": 6,
    "dropout": 0.0,
    "item_dropout": 0.0,
    "weight_decay": 0.0,
}


@pytest.fixture(scope="module")
def catalogue():
    keys = np.random.default_rng(0).permutation(64)[: len(ITEMS)]
    return Catalogue.build(ITEMS, np.stack([keys // 16, keys // 4 % 4, keys % 4], axis=1), SIZES)


@pytest.fixture(scope="module")
def rings():
    """Users walk round a ring of items in steps of one or of five: the next item follows from the last two."""
    users, sequences = [], []
    for start in range(len(ITEMS)):
        for step in (1, 5):
            users.append(f"u{start}-{step}")
            sequences.append([ITEMS[(start + step * turn) % len(ITEMS)] for turn in range(12)])
    items = pa.table({"item_id": ITEMS, "title": ITEMS, "text": ITEMS})
    return Dataset("rings", users, sequences, items)


def start(catalogue, seed=0, softmax=None):
    model, tokenizer, _ = starting_model("scratch", catalogue, SHAPE, seed, softmax=softmax)
    return model, tokenizer


@pytest.mark.parametrize("length", [2, 3, 7, 8, 20])
def test_pieces_are_parts_of_the_sequence_and_cover_every_target(length):
    codes = torch.arange(length)[:, None].expand(length, 3)
    pieces = Segments([codes, codes[:1]], max_history=6)
    assert len(pieces) == -(-(length - 1) // 6)
    seen = Counter()
    for _ in range(50):
        for index in range(len(pieces)):
            piece = pieces[index][:, 0]
            assert 2 <= len(piece) <= 7
            assert (piece.diff() == 1).all()
            seen.update(piece[1:].tolist())
    assert set(seen) == set(range(1, length))


@given(st.lists(st.integers(1, 7), min_size=1, max_size=40))
def test_pieces_share_rows_without_touching(lengths):
    row_of, first_of, count = packed(lengths, 7)
    places = [(row, first + at) for row, first, n in zip(row_of, first_of, lengths, strict=True) for at in range(n)]
    assert len(set(places)) == len(places)
    assert all(0 <= place < 7 for _, place in places)
    assert {row for row, _ in places} == set(range(count))
    # at most one row is less than half full, else two would have gone into one
    filled = Counter(row for row, _ in places)
    assert sum(used <= 3 for used in filled.values()) <= 1
    assert lengths != [7] * len(lengths) or row_of == list(range(len(lengths)))


@pytest.mark.parametrize("keep_shared", [False, True])
def test_validation_ranks_as_the_evaluation_does(catalogue, rings, keep_shared):
    split = rings.leave_one_out()
    if keep_shared:  # two items an ID
        catalogue = Catalogue.build(ITEMS, [[n // 2 % 4, n // 8, 0] for n in range(len(ITEMS))], [4, 4, 4])
    model, _ = start(catalogue)
    ask = {"max_history": 4}
    held_out = HeldOut(model.config, catalogue, split.valid_history, split.valid_target, batch_size=7, **ask)
    found = held_out.ranks(model, 10)
    expected = model_ranks(model, catalogue, split.valid_history, split.valid_target, beam_width=10, **ask)
    assert found.tolist() == expected.tolist()
    assert len(set(found.tolist())) > 2


def test_validation_may_come_every_few_epochs(catalogue, rings, tmp_path):
    lines = []
    options = TrainingOptions(**(FAST | {"epochs": 4, "validate_every": 2}))
    fit(start(catalogue)[0], catalogue, rings.leave_one_out(), options, tmp_path / "run", write=lines.append)
    assert [line.split(":")[0] for line in lines] == ["epoch 2", "epoch 4"]


@pytest.mark.parametrize("softmax", SOFTMAX_OVER)
def test_a_small_model_learns_the_data_by_heart(catalogue, rings, tmp_path, softmax):
    split = rings.leave_one_out()
    model, _ = start(catalogue, softmax=softmax)
    lines = []
    before = target_loss(model, catalogue, split.train, split.valid_target, max_history=6)
    trainer = fit(model, catalogue, split, TrainingOptions(**FAST), tmp_path / "run", write=lines.append)
    after = target_loss(model, catalogue, split.train, split.valid_target, max_history=6)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert after < 0.05 * before
    assert losses[-1] < losses[0] / 2
    ranks = model_ranks(model, catalogue, split.history("test"), split.test_target, max_history=6)
    assert (ranks == 0).all()
    assert len(lines) == FAST["epochs"]


def test_tied_codes_and_the_loss_over_items_leave_a_plain_checkpoint(catalogue, rings, tmp_path):
    split = rings.leave_one_out()
    model, _ = start(catalogue)
    names = set(model.state_dict())
    more = {
        "item_tokens": 0,
        "tie_codes": "both",
        "item_loss": 0.5,
        "level_weights": (2.0, 1.0, 1.0),
        "label_smoothing": 0.01,
    }
    fit(model, catalogue, split, TrainingOptions(**(FAST | more)), tmp_path / "run", write=lambda line: None)
    assert set(model.state_dict()) == names
    plain, _ = start(catalogue)  # nothing but the weights
    plain.load_state_dict(model.state_dict())
    ranks = model_ranks(plain, catalogue, split.history("test"), split.test_target, max_history=6)
    assert (ranks == 0).mean() > 0.9


def test_the_weights_that_validated_best_are_kept(catalogue, rings, tmp_path):
    split = rings.leave_one_out()
    model, _ = start(catalogue)
    # a learning rate this high spoils what the first epochs learn
    options = TrainingOptions(**(FAST | {"epochs": 6, "learning_rate": 0.1, "warmup": 0.5}))
    trainer = fit(model, catalogue, split, options, tmp_path / "run", write=lambda line: None)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    kept = target_loss(model, catalogue, split.train, split.valid_target, max_history=6)
    assert kept == pytest.approx(min(losses), abs=1e-5)


def test_averaged_weights_are_what_is_validated_and_kept(catalogue, rings, tmp_path):
    split = rings.leave_one_out()
    start_at, found = start(catalogue)[0], []
    for average in (0.0, 0.999999):
        model, _ = start(catalogue)
        options = TrainingOptions(**(FAST | {"epochs": 3, "average": average, "item_tokens": 0}))
        trainer = fit(model, catalogue, split, options, tmp_path / "run", write=lambda line: None)
        kept = target_loss(model, catalogue, split.train, split.valid_target, max_history=6)
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert kept == pytest.approx(min(losses), abs=1e-5)
        distance = sum((a - b).norm() for a, b in zip(model.parameters(), start_at.parameters(), strict=True))
        found.append((losses, float(distance.detach())))
    (own, own_distance), (averaged, averaged_distance) = found
    assert own != averaged
    assert 0 < averaged_distance < own_distance  # averages lag behind
    steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert steps[-1] < steps[0]


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_an_interrupted_run_ends_like_one_that_was_not(catalogue, rings, tmp_path, average):
    split = rings.leave_one_out()
    options = TrainingOptions(**(FAST | {"epochs": 4, "dropout": 0.1, "average": average}))

    def stop_after(epochs):
        def write(line):
            if line.startswith(f"epoch {epochs}:"):
                raise KeyboardInterrupt

        return write

    whole, _ = start(catalogue)
    expected = fit(whole, catalogue, split, options, tmp_path / "whole", write=lambda line: None).validations
    assert [epoch for epoch, _, _ in expected] == [1, 2, 3, 4]
    broken, _ = start(catalogue)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, catalogue, split, options, tmp_path / "broken", write=stop_after(3))
    (tmp_path / "broken" / "checkpoint-99").mkdir()  # as if stopped while it was written
    again, _ = start(catalogue)
    lines = []
    found = fit(again, catalogue, split, options, tmp_path / "broken", write=lines.append).validations
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert [line.split(":")[0] for line in lines] == ["epoch 3", "epoch 4"]
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)


def test_a_checkpoint_whose_averages_were_not_written_is_not_whole(tmp_path):
    (tmp_path / NOTE).write_text("run")
    first, last = (tmp_path / f"checkpoint-{number}" for number in (1, 2))
    for checkpoint in (first, last):
        checkpoint.mkdir()
        TrainerState().save_to_json(str(checkpoint / LAST_WRITTEN))
    assert resumable(tmp_path, "run") == str(last)
    (first / FILE).touch()
    assert resumable(tmp_path, "run", [FILE]) == str(first)
    assert not last.exists()


def test_users_without_items_change_nothing(catalogue, rings, tmp_path):
    split, found = rings.leave_one_out(), []
    for more in ([], [[], ITEMS[:1]]):
        model, _ = start(catalogue)
        some = replace(split, train=[*more, *split.train])
        options = TrainingOptions(**(FAST | {"epochs": 1}))
        fit(model, catalogue, some, options, tmp_path / "run", write=lambda line: None)
        found.append(model.item_tokens.keys.tolist())
    assert found[0] == found[1] == catalogue.keys.tolist()


def test_another_run_does_not_resume_from_the_first(catalogue, rings, tmp_path):
    split = rings.leave_one_out()
    for epochs in (1, 2):
        lines = []
        model, _ = start(catalogue)
        fit(
            model,
            catalogue,
            split,
            TrainingOptions(**(FAST | {"epochs": epochs})),
            tmp_path / "run",
            write=lines.append,
        )
        assert len(lines) == epochs


def test_a_checkpoint_keeps_its_softmax(catalogue, rings, tmp_path):
    saved = tmp_path / "model"
    for softmax in SOFTMAX_OVER:
        model, tokenizer, dtype = starting_model("scratch", catalogue, SHAPE, 0, softmax=softmax)
        save_trained(saved, model, tokenizer, catalogue, dtype, TrainingOptions())
        again, _, _ = starting_model(str(saved), catalogue, SHAPE, 0)
        assert again.config.softmax == softmax
        other = next(name for name in SOFTMAX_OVER if name != softmax)
        with pytest.raises(ValueError, match=f"with a softmax over {softmax}: leave --softmax out"):
            starting_model(str(saved), catalogue, SHAPE, 0, softmax=other)
        # and has a loss without being told of its catalogue
        assert target_loss(again, catalogue, rings.sequences, [ITEMS[0]] * len(rings.sequences), max_history=4) > 0
    assert start(catalogue)[0].config.softmax == "codes"
    with pytest.raises(ValueError, match="softmax is 'items', must be one of"):
        start(catalogue, softmax="items")


def test_train_notes_softmax_and_item_tokens_also_those_it_went_on_from(catalogue, rings, tmp_path, capsys):
    rings.save(tmp_path / "rings")
    catalogue.save(tmp_path / "catalogue")
    words = ["train", tmp_path / "rings", tmp_path / "catalogue", "--out", tmp_path / "model", "--epochs", "1"]
    assert cli.main([*map(str, words), "--softmax", "catalogue", "--item-tokens", "5"]) == 0
    config, notes = (json.loads((tmp_path / "model" / name).read_text()) for name in ("config.json", "training.json"))
    assert config["softmax"] == notes["softmax"] == "catalogue"
    assert config["num_item_tokens"] == notes["item_tokens"] == 5
    words = ["train", tmp_path / "rings", tmp_path / "catalogue", "--out", tmp_path / "more", "--epochs", "1"]
    words = [*map(str, words), "--backbone", str(tmp_path / "model")]
    assert cli.main([*words, "--softmax", "codes"]) == 2
    assert "a softmax over catalogue: leave --softmax out" in capsys.readouterr().err
    assert cli.main([*words, "--item-tokens", "0"]) == 0
    config, notes = (json.loads((tmp_path / "more" / name).read_text()) for name in ("config.json", "training.json"))
    assert config["softmax"] == notes["softmax"] == "catalogue"
    assert config["num_item_tokens"] == notes["item_tokens"] == 5


def test_short_histories_are_a_checkpoints_own(catalogue, rings, tmp_path, capsys):
    rings.save(tmp_path / "rings")
    catalogue.save(tmp_path / "catalogue")
    words = ["train", str(tmp_path / "rings"), str(tmp_path / "catalogue"), "--epochs", "1", "--out"]
    assert cli.main([*words, str(tmp_path / "none"), "--item-tokens", "0", "--short-histories"]) == 2
    assert "short histories are made of item tokens" in capsys.readouterr().err
    for name, asked, other in (("short", ["--short-histories"], "no-short"), ("codes", [], "short")):
        assert cli.main([*words, str(tmp_path / name), *asked]) == 0
        on = [*words, str(tmp_path / "more"), "--backbone", str(tmp_path / name)]
        assert cli.main([*on, f"--{other}-histories"]) == 2
        assert f"leave --{other}-histories out" in capsys.readouterr().err
        assert cli.main([*on, "--item-token-dropout", "0"]) == 0
        for file in ("config.json", "training.json"):
            assert json.loads((tmp_path / "more" / file).read_text())["short_histories"] == (name == "short")


def test_learning_rates_and_decay_by_part(catalogue):
    model, _ = start(catalogue)
    groups = parameter_groups(model, TrainingOptions(**(PRETRAINED | {"weight_decay": 0.1})))
    found = {id(member): group for group in groups for member in group["params"]}
    head = model.draft_head
    assert len(found) == len(list(model.parameters()))
    assert found[id(head.code_embeddings[0].weight)]["lr"] == pytest.approx(1e-3)
    assert found[id(head.cells[0].weight_hh)]["lr"] == pytest.approx(1e-4)
    assert found[id(head.cells[0].weight_hh)]["weight_decay"] == pytest.approx(1e-4)
    assert found[id(head.logit_heads[0].weight)]["lr"] == pytest.approx(1e-5)
    assert found[id(model.model.layers[0].mlp.up_proj.weight)]["weight_decay"] == pytest.approx(0.1)
    assert found[id(model.model.norm.weight)]["weight_decay"] == 0


def test_metrics_count_from_the_rank_of_the_target():
    ranks = ranks_of(["a", "b", "c", "d"], [["a"], ["x", "b"], list("uvwxyc"), ["z"]])
    assert ranks.tolist() == [0, 1, 5, UNRANKED]
    found = summary(ranks)
    assert found["hit@5"] == 0.5
    assert found["hit@10"] == 0.75
    assert found["ndcg@5"] == pytest.approx((1 + 1 / np.log2(3)) / 4)
    assert ndcg(ranks, 10) == pytest.approx((1 + 1 / np.log2(3) + 1 / np.log2(7)) / 4)


def test_baselines_rank_every_item_in_a_defined_order():
    sequences = [["a", "b", "c"], ["a", "b"], ["b", "c"], ["d", "a"]]
    assert Popularity(sequences, list("dcbae")).recommend([]) == list("abcde")
    markov = Markov(sequences, list("dcbae"))
    assert markov.recommend(["d", "b"]) == list("cabde")
    assert markov.recommend(["never seen"]) == list("abcde")


def test_comparison_treats_every_method_alike(catalogue, rings):
    model, _ = start(catalogue)
    kept = compare(model, catalogue, rings, part="test", max_history=6)
    assert list(kept.rows) == ["popularity", "Markov, first order", "NEZHA"]
    assert kept.rows["Markov, first order"]["hit@5"] == 1  # two followers an item
    without = compare(model, catalogue, rings, part="test", max_history=6, exclude_history=True)
    assert all(without.rows[name]["hit@10"] >= kept.rows[name]["hit@10"] for name in kept.rows)
    assert without.rows["NEZHA"]["hit@10"] > kept.rows["NEZHA"]["hit@10"]
    assert json.loads(to_json(kept))["rows"] == kept.rows
    assert table(kept).row_count == 3


def test_every_baseline_is_measured_and_set_against_the_model(catalogue, rings):
    model, _ = start(catalogue)
    found = compare(model, catalogue, rings, part="test", max_history=6, baselines=list(BASELINES))
    assert list(found.rows) == [*BASELINES.values(), "NEZHA"] == list(found.seconds)
    assert found.rows["SASRec, full cross-entropy"]["hit@10"] > found.rows["popularity"]["hit@10"]
    gap = found.against["Markov, first order"]["hit@5"]
    assert gap["mean"] == pytest.approx(found.rows["NEZHA"]["hit@5"] - 1)
    assert gap["low"] <= gap["mean"] <= gap["high"] < 0
    assert gap["p"] < 0.001


def test_codes_of_unknown_items_are_refused(catalogue):
    with pytest.raises(KeyError, match="nobody"):
        codes_of([["i0", "nobody"]], catalogue)
    with pytest.raises(ValueError, match="dropout"):
        TrainingOptions(dropout=1.0)


def test_item_dropout_blots_out_history_but_no_target(catalogue):
    model, _ = start(catalogue)
    codes = codes_of([ITEMS[:7]], catalogue)
    plain = PackedCollator(model.config, 6)(codes)
    torch.manual_seed(0)
    blotted = PackedCollator(model.config, 6, item_dropout=0.5)(codes)
    assert torch.equal(plain["labels"], blotted["labels"])
    changed = (plain["input_ids"] != blotted["input_ids"]).view(12, 3)
    assert 0 < changed[:6].all(1).sum() < 6
    assert torch.equal(changed.all(1), changed.any(1))
    assert not changed[6:].any()


@pytest.mark.slow
def test_processes_of_torchrun_train_one_model(catalogue, rings, tmp_path):
    rings.save(tmp_path / "rings")
    catalogue.save(tmp_path / "catalogue")
    words = ["train", tmp_path / "rings", tmp_path / "catalogue", "--out", tmp_path / "model", "--epochs", "1"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nezha_vllm.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, *map(str, words), "--batch", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("checkpoint -> ") == 1  # one of them writes
    assert (tmp_path / "model" / "config.json").is_file()
