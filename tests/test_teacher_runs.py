"""Runs with teachers: they go on where they stopped, wrong teachers are refused, checkpoints note them."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_teachers import CPU, NO_SPLIT, checkpoint, quiet, student  # noqa: F401
from test_training import FAST, ITEMS, SHAPE, SIZES, catalogue, rings  # noqa: F401

from nezha_vllm import cli
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.item_index import UnknownItemError
from nezha_vllm.item_tokens import ItemTokens
from nezha_vllm.semantic_id import SemanticIdCodec
from nezha_vllm.training.evaluation import HeldOut
from nezha_vllm.training.fit import codes_of, fit
from nezha_vllm.training.item_embeddings import frequent_keys
from nezha_vllm.training.options import TrainingOptions
from nezha_vllm.training.resume import identity
from nezha_vllm.training.sasrec import SasRec
from nezha_vllm.training.start import load_trained, starting_model
from nezha_vllm.training.teacher_models import SasRecTeacher
from nezha_vllm.training.teachers import Teachers, _alone

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sasrec_runs(monkeypatch):
    """How often SASRec is trained, which takes three epochs of it."""
    made = []

    def quick(sequences, items, histories, valid, options, device, write):
        made.append(options)
        return SasRec(sequences, items, histories, valid, replace(options, epochs=3), device, write)

    monkeypatch.setattr("nezha_vllm.training.teachers.SasRec", quick)
    return made


def test_a_run_that_goes_on_has_its_teachers_again(catalogue, rings, tmp_path, checkpoint, sasrec_runs):  # noqa: F811
    split, folder = rings.leave_one_out(), str(checkpoint())
    options = TrainingOptions(**(FAST | {"epochs": 3, "dropout": 0.1, "item_dropout": 0.2, "seed": 5}))
    options = replace(options, teachers=("sasrec", folder, "sasrec:2"), max_history=60)

    def run(where, options=options, stop=None):
        def write(line):
            if line.startswith(f"epoch {stop}:"):
                raise KeyboardInterrupt

        model, _, _ = starting_model("scratch", catalogue, SHAPE, 0)
        fit(model, catalogue, split, options, tmp_path / where, write=write)
        assert model.teachers is None
        return model.state_dict()

    whole = run("whole")
    assert [(one.seed, one.max_history) for one in sasrec_runs] == [(5, 60), (2, 60)]
    with pytest.raises(KeyboardInterrupt):
        run("broken", stop=2)
    assert len(sasrec_runs) == 4
    again = run("broken")
    assert len(sasrec_runs) == 4
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, msg=name)
    other = run("broken", replace(options, teacher_weight=0.25))  # another run: from the start, SASRec, too
    assert len(sasrec_runs) == 6
    assert any(not torch.allclose(other[name], value) for name, value in whole.items())


def test_a_teacher_whose_weights_changed_is_another(catalogue, rings, checkpoint, tmp_path):  # noqa: F811
    folder = tmp_path / "teacher"
    shutil.copytree(checkpoint(), folder)
    tokens, split = load_trained(folder).model.item_tokens, rings.leave_one_out()
    options = TrainingOptions(teachers=("sasrec", str(folder)))
    config = student(catalogue).config

    def run(split, options=options):
        return identity(options, catalogue, config, [], Teachers(options, tokens, catalogue, split, CPU).digests)

    first = run(split)
    assert run(split) == first
    shutil.copytree(folder, tmp_path / "moved")
    assert run(split, replace(options, teachers=("sasrec", str(tmp_path / "moved")))) == first
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    second = run(split)
    assert second != first
    assert run(replace(split, valid_target=split.valid_target[::-1])) != second  # by which SASRec's epoch is chosen


@pytest.mark.parametrize(
    ("trained", "asked", "message"),
    [
        (None, {}, "neither `sasrec`, `sasrec:SEED` nor a folder with a config.json"),
        ({"item_tokens": 0}, {}, "has no item tokens: train it with those of this run, `--item-tokens 24`"),
        ({"item_loss": 0.0}, {}, "has not learnt what items are worth: train it with `--item-loss` above 0"),
        ({"item_tokens": 10}, {}, "has 10 item tokens, not the same as the 24 of this run: train it with the same"),
        ({}, {"short_histories": True}, "reads no short histories: train it with `--short-histories`, as this run"),
        ({"short_histories": True}, {}, "reads short histories: train it without `--short-histories`, as this run"),
        ({}, {"item_tokens": 0}, "teachers know items by their tokens: ask for some, or leave --teacher out"),
    ],
)
def test_who_cannot_teach_is_refused_before_an_earlier_run_is_touched(
    catalogue,  # noqa: F811
    rings,  # noqa: F811
    checkpoint,  # noqa: F811
    tmp_path,
    trained,
    asked,
    message,
):
    folder = tmp_path / "nobody" if trained is None else checkpoint(**trained)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("another run")
    options = TrainingOptions(**(FAST | {"teachers": (str(folder),)} | asked))
    model, _, _ = starting_model("scratch", catalogue, SHAPE, 0)
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(model, catalogue, rings.leave_one_out(), options, tmp_path / "run", write=quiet)
    assert (tmp_path / "run" / "run.json").read_text() == "another run"


def test_a_validation_item_out_of_the_catalogue_is_named_before_sasrec_is_trained(
    catalogue,  # noqa: F811
    rings,  # noqa: F811
    tmp_path,
    sasrec_runs,
):
    split = rings.leave_one_out()
    split = replace(split, valid_target=["nobody", *split.valid_target[1:]])
    model, _, _ = starting_model("scratch", catalogue, SHAPE, 0)
    with pytest.raises(UnknownItemError, match="item 'nobody' is not in the catalogue"):
        fit(model, catalogue, split, TrainingOptions(**FAST, teachers=("sasrec",)), tmp_path / "run", write=quiet)
    assert not sasrec_runs
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_catalogue_or_of_nobody_is_refused(catalogue, rings, checkpoint, tmp_path):  # noqa: F811
    tokens = load_trained(checkpoint()).model.item_tokens
    options = TrainingOptions(teachers=(str(checkpoint()),))
    other = Catalogue.build(ITEMS[::-1], catalogue.codes, SIZES)
    with pytest.raises(ValueError, match=f"{catalogue.version}, this run has {other.version}: train it with this one"):
        Teachers(options, tokens, other, NO_SPLIT, CPU)
    wider = SemanticIdCodec([8, 8, 8])
    with pytest.raises(ValueError, match=r"codebooks of \(4, 4, 4\), this catalogue of \(8, 8, 8\): train it with"):
        Teachers(options, ItemTokens(tokens.keys, 9, wider, (0, 0, 0)), catalogue, NO_SPLIT, CPU)
    again = f"{checkpoint().parent}/./{checkpoint().name}/"
    with pytest.raises(ValueError, match="the same weights more than once, name each once"):
        Teachers(replace(options, teachers=(str(checkpoint()), again)), tokens, catalogue, NO_SPLIT, CPU)
    foreign = tmp_path / "foreign"
    shutil.copytree(checkpoint(), foreign)
    (foreign / "training.json").unlink()
    with pytest.raises(ValueError, match="a teacher is a checkpoint made by `nezha train`"):
        Teachers(replace(options, teachers=(str(foreign),)), tokens, catalogue, NO_SPLIT, CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_weight": 0.0}, r"the teachers' weight must be in \(0, 1\], got 0.0"),
        ({"teacher_weight": 1.5}, "got 1.5"),
        ({"teachers": ("sasrec", "sasrec")}, "each once"),
        ({"teachers": ("sasrec", "sasrec:7"), "seed": 7}, "each once, got \\['sasrec', 'sasrec:7'\\]"),
        ({"teachers": ("sasrec:7", "sasrec:07")}, "each once"),
        ({"teachers": ("sasrec:",)}, "teacher 'sasrec:': behind `sasrec:` stands its seed, a whole number below 2"),
        ({"teachers": ("sasrec:-1",)}, "teacher 'sasrec:-1'"),
        ({"teachers": (f"sasrec:{2**63}",)}, "a whole number below 2"),
        ({"teachers": ("sasrec:" + 5000 * "9",)}, "a whole number below 2"),
        ({"teachers": ("",)}, "must be `sasrec`, `sasrec:SEED` or folders"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**options)


@pytest.mark.parametrize("method", ["nezha", "ar"])
def test_train_takes_teachers_and_notes_them(catalogue, rings, checkpoint, tmp_path, capsys, method, sasrec_runs):  # noqa: F811
    rings.save(tmp_path / "rings")
    catalogue.save(tmp_path / "catalogue")
    words = ["train", str(tmp_path / "rings"), str(tmp_path / "catalogue"), "--epochs", "1", "--out"]
    words += [str(tmp_path / "model"), "--teacher", "sasrec", str(checkpoint()), "--method", method]
    assert cli.main([*words, "--teacher-weight", "2"]) == 2
    assert "the teachers' weight must be in (0, 1], got 2.0" in capsys.readouterr().err
    assert not sasrec_runs
    assert cli.main([*words, "--teacher-weight", "0.25", "--short-histories"]) == 2
    assert "reads no short histories" in capsys.readouterr().err
    assert cli.main([*words, "--teacher-weight", "0.25"]) == 0
    assert len(sasrec_runs) == 1
    notes = json.loads((tmp_path / "model" / "training.json").read_text())
    assert notes["teachers"] == ["sasrec", str(checkpoint())]
    assert notes["teacher_weight"] == 0.25
    assert load_trained(tmp_path / "model").options["teachers"] == notes["teachers"]  # of results files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catalogue", "model", "rings"]
    asked = ["--baselines", "--beam-width", "5", "--results", str(tmp_path / "rows.csv")]
    assert cli.main(["evaluate", str(tmp_path / "model"), str(tmp_path / "rings"), *asked]) == 0
    for row in csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()):
        assert json.loads(row["config"])["teachers"] == ["sasrec", checkpoint().name]
        assert str(checkpoint().parent) not in str(row)


def test_a_students_items_become_its_teachers(catalogue, rings, tmp_path, monkeypatch, sasrec_runs):  # noqa: F811
    """Of one who always wants the same item; validation knows nothing of it."""
    split, found = rings.leave_one_out(), {}
    same = F.one_hot(torch.tensor([7]), len(ITEMS)).float()
    monkeypatch.setattr(SasRecTeacher, "probabilities", lambda self, hidden: same.repeat(len(hidden), 1))
    for weight in (0.1, 1.0):
        model, _, _ = starting_model("scratch", catalogue, SHAPE, 0)
        options = TrainingOptions(**(FAST | {"epochs": 3, "teachers": ("sasrec",), "teacher_weight": weight}))
        trainer = fit(model, catalogue, split, options, tmp_path / "run", write=quiet)
        ask = {"max_history": 6, "item_tokens": model.item_tokens}
        valid = HeldOut(model.config, catalogue, split.valid_history, split.valid_target, **ask)
        with torch.no_grad():
            hidden = model.first_hidden(*valid.batches[0][1:])
            found[weight] = (hidden @ model.item_vectors().T).softmax(1)[:, 7].mean().item()
        assert valid.loss(model) == pytest.approx(min(loss for _, loss, _ in trainer.validations), abs=1e-3)
    assert found[1.0] > 0.9
    assert found[0.1] < 0.3


def test_runs_of_the_same_data_and_seed_have_one_sasrec(catalogue, rings, tmp_path, sasrec_runs):  # noqa: F811
    rings.save(tmp_path / "rings")
    catalogue.save(tmp_path / "catalogue")
    words = ["train", str(tmp_path / "rings"), str(tmp_path / "catalogue"), "--epochs", "1", "--teacher", "sasrec"]
    cache = ["--teacher-cache", str(tmp_path / "teachers")]

    def weights(name, *more):
        assert cli.main([*words, "--out", str(tmp_path / name), *more]) == 0
        return load_file(tmp_path / name / "model.safetensors")

    alone, first = weights("alone"), weights("first", *cache)
    assert len(sasrec_runs) == 2
    again = weights("again", *cache)
    assert all(torch.equal(alone[name], one[name]) for one in (first, again) for name in alone)
    weights("language-model", *cache, "--method", "ar", "--teacher-weight", "0.2")
    assert len(sasrec_runs) == 2
    weights("other-seed", *cache, "--seed", "1")
    assert [options.seed for options in sasrec_runs] == [0, 0, 1]
    assert len([*(tmp_path / "teachers").glob("*.safetensors")]) == 2


def test_who_wants_the_same_sasrec_waits_for_it(catalogue, rings, tmp_path, sasrec_runs):  # noqa: F811
    split, model = rings.leave_one_out(), starting_model("scratch", catalogue, SHAPE, 0)[0]
    keys = frequent_keys(codes_of(split.train, catalogue), model.config.codec, 10**6)
    tokens = ItemTokens.of(keys, model.config)

    def teachers():
        return Teachers(TrainingOptions(teachers=("sasrec",)), tokens, catalogue, split, torch.device("cpu"))

    first, second = teachers(), teachers()
    first.learn(tmp_path, quiet)
    [path] = tmp_path.glob("*.safetensors")
    kept = path.rename(tmp_path / "kept")
    waiting = Thread(target=second.learn, args=(tmp_path, quiet))
    with _alone(path):
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        kept.rename(path)
    waiting.join(20)
    assert len(sasrec_runs) == 1
    assert torch.equal(second.members[0].items_JH, first.members[0].items_JH)


@pytest.mark.slow
def test_of_several_processes_the_first_trains_sasrec(catalogue, rings, tmp_path):  # noqa: F811
    rings.save(tmp_path / "rings")
    catalogue.save(tmp_path / "catalogue")
    words = ["train", tmp_path / "rings", tmp_path / "catalogue", "--out", tmp_path / "model", "--epochs", "1"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nezha_vllm.cli"]
    command = [sys.executable, *launch, *map(str, words), "--batch", "4", "--teacher", "sasrec"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (done.stdout + done.stderr).count("SASRec epoch 1:") == 1
    assert json.loads((tmp_path / "model" / "training.json").read_text())["teachers"] == ["sasrec"]
