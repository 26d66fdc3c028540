"""Teachers: packed they say what they say one prefix at a time, losses are their formula, and runs go on with them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_training import FAST, ITEMS, SHAPE, SIZES, catalogue, rings  # noqa: F401

from nezha_vllm import cli
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.config import METHODS, SOFTMAX_OVER
from nezha_vllm.hf.prompt import prompt_token_ids
from nezha_vllm.training import teachers as module
from nezha_vllm.training.fit import codes_of, fit
from nezha_vllm.training.item_embeddings import ItemEmbeddings
from nezha_vllm.training.item_loss import ItemLoss
from nezha_vllm.training.lesson import Codes, Lesson
from nezha_vllm.training.options import TrainingOptions
from nezha_vllm.training.packing import PackedCollator, packed, shortened
from nezha_vllm.training.sasrec import SasRecModel, SasRecOptions
from nezha_vllm.training.start import save_trained, starting_model
from nezha_vllm.training.teacher_models import SasRecTeacher
from nezha_vllm.training.teachers import TaughtCollator, Teachers, numbered

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (3, 6, 2, 4, 7, 5)
CPU = torch.device("cpu")


@pytest.fixture
def shared():
    """Two items an ID for two thirds of the IDs."""
    codes = [[n // 2 % 4, n // 8, 0] for n in range(16)] + [[n % 4, n // 4, 1] for n in range(8)]
    return Catalogue.build(ITEMS, codes, SIZES)


@pytest.fixture(scope="module")
def checkpoint(catalogue, rings, tmp_path_factory):  # noqa: F811
    """A folder trained with some options and method, each once."""
    made = {}

    def train(method="nezha", **options):
        key = method, *options.items()
        if key not in made:
            made[key] = tmp_path_factory.mktemp("teacher") / "teacher"
            model, tokenizer, dtype = starting_model("scratch", catalogue, SHAPE, 3, method)
            wanted = TrainingOptions(**(FAST | {"epochs": 1, "seed": 3} | options))
            fit(model, catalogue, rings.leave_one_out(), wanted, made[key].parent / "run", write=quiet)
            save_trained(made[key], model, tokenizer, catalogue, dtype, wanted)
        return made[key]

    return train


def quiet(line):
    pass


def pieces_of(catalogue):  # noqa: F811
    """Items, and the same as numbered codes."""
    generator = np.random.default_rng(1)
    items = [generator.choice(ITEMS, length).tolist() for length in LENGTHS]
    return items, numbered(codes_of(items, catalogue), items, catalogue)


def student(catalogue, method="nezha", softmax="codes", item_tokens=24, short=False):  # noqa: F811
    """In training mode, with item tokens of the first semantic IDs."""
    model, _, _ = starting_model("scratch", catalogue, SHAPE, 0, method, softmax)
    model.config.short_histories = short
    model.item_embeddings = ItemEmbeddings(model.config, catalogue.keys[:item_tokens], model.model.embed_tokens)
    with torch.no_grad():
        model.item_embeddings.own.weight.normal_(std=0.5)
    model.keys_M = torch.from_numpy(catalogue.keys.copy()) if softmax == "catalogue" else None
    return model.train()


def sasrec_teacher(catalogue, tokens, seed=0):  # noqa: F811
    """With random weights and opinions of its own; not trained."""
    torch.manual_seed(seed)
    options = SasRecOptions(hidden=32, layers=1, max_history=6)
    model = SasRecModel(catalogue.num_items, options)
    torch.nn.init.normal_(model.item.weight)
    return SasRecTeacher(model, options.heads, tokens, catalogue)


def taught_by(members, tokens, weight=0.5):
    """Teachers that were made already."""
    teachers = Teachers.__new__(Teachers)
    teachers.members, teachers.weight, teachers.codes = members, weight, Codes(tokens, CPU)
    return teachers


def by_place(pieces, targets):
    """Piece, items of history and place in the rows of every target."""
    rows, first, _ = packed([len(codes) - 1 for codes in pieces], targets)
    for piece, (row, place) in enumerate(zip(rows, first, strict=True)):
        for end in range(1, len(pieces[piece])):
            yield piece, end, targets * row + place + end - 1


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("prefix", [(), (1, 2)])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("nezha", {}),
        ("nezha", {"short_histories": True}),
        ("nezha", {"short_histories": True, "item_tokens": 10}),
        ("ar", {}),
    ],
)
def test_a_packed_checkpoint_says_what_it_says_of_one_prefix(catalogue, checkpoint, method, options, prefix, multiple):  # noqa: F811
    items, pieces = pieces_of(catalogue)
    folder = checkpoint(method, **options)
    own = student(catalogue)
    own.config.short_histories = bool(options.get("short_histories"))
    keys = module.NezhaTeacher.__init__  # what it checks is tested below
    del keys
    from nezha_vllm.training.start import load_trained

    tokens = load_trained(folder).model.item_tokens
    asked = TrainingOptions(teachers=(str(folder),))
    teachers = Teachers(asked, tokens, catalogue, SimpleNamespace(valid_history=[], valid_target=[]), CPU)
    [teacher] = teachers.members
    teacher.prefix = prefix
    codes = [piece[:, :-1] for piece in pieces]
    rest = {"row_multiple": multiple, "item_tokens": tokens, "item_dropout": 0.5, "item_token_dropout": 0.5}
    pack = TaughtCollator.of(PackedCollator(own.config, 6, **rest), teachers, shortened(codes, tokens, 0.0))
    batch = pack(pieces)
    found = teachers(batch, batch.get("labelled")).p_VI
    vectors = teacher.model.item_vectors()
    places = sorted(place for *_, place in by_place(codes, 6))
    assert multiple > 1 or places == batch["labelled"].tolist()
    for piece, end, place in by_place(codes, 6):
        prompt = torch.tensor([prompt_token_ids(teacher.model.config, codes[piece][:end], prefix, tokens)])
        expected = (teacher.model.first_hidden(prompt)[0] @ vectors.T).softmax(0)
        torch.testing.assert_close(found[place if multiple > 1 else places.index(place)], expected, atol=1e-5, rtol=1e-3)
    assert found.isfinite().all()
    assert (found[0] - found[1]).abs().max() > 1e-4
