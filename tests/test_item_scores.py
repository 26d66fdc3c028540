"""What items are worth beside their codes: the products, their loss, the weight that training chooses, every search."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_checkpoint
from test_training import FAST, ITEMS, SHAPE, catalogue, rings  # noqa: F401
from transformers import AutoModelForCausalLM

from nezha_vllm import cli
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.draft_head import reference_beam_search
from nezha_vllm.hf.modeling import register_models
from nezha_vllm.hf.prompt import history_prompts
from nezha_vllm.hf.recommend import pad_left, search
from nezha_vllm.item_scores import ItemScores
from nezha_vllm.item_tokens import ItemTokens
from nezha_vllm.semantic_id import SemanticIdCodec
from nezha_vllm.training.evaluation import HeldOut
from nezha_vllm.training.fit import ITEM_SCORE_BEAMS, fit
from nezha_vllm.training.item_loss import ItemLoss
from nezha_vllm.training.metrics import ndcg
from nezha_vllm.training.options import TrainingOptions
from nezha_vllm.training.start import starting_model

pytestmark = pytest.mark.usefixtures("one_thread")
CODEC, OFFSETS, FIRST = SemanticIdCodec((3, 4, 5)), (2, 5, 9), 14
KEYS = CODEC.key(np.array([[0, 0, 1], [1, 3, 4], [2, 3, 4]]))


@pytest.fixture
def scores():
    torch.manual_seed(0)
    return ItemScores(ItemTokens(KEYS, FIRST, CODEC, OFFSETS), torch.randn(FIRST + len(KEYS), 8), 0.5)


def test_an_item_with_a_token_has_its_vector_another_its_codes_and_what_training_added_to_such(scores):
    asked = np.array([[2, 3, 4], [2, 3, 3], [0, 0, 1], [0, 0, 0]])
    hidden_XH, rows = torch.randn(4, 8), scores.embeddings
    beyond = [rows[FIRST] - rows[2] - rows[5] - rows[10], rows[FIRST + 2] - rows[4] - rows[8] - rows[13]]
    vectors = [rows[FIRST + 2], rows[4] + rows[8] + rows[12] + beyond[1]]
    vectors += [rows[FIRST], rows[2] + rows[5] + rows[9] + beyond[0]]
    expected = [0.5 * float(hidden @ vector) for hidden, vector in zip(hidden_XH, vectors, strict=True)]
    found = scores(hidden_XH, torch.from_numpy(CODEC.key(asked)))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_many_are_gathered_in_pieces(scores, monkeypatch):
    keys = torch.arange(60)
    hidden = torch.randn(60, 8)
    whole = scores(hidden, keys)
    monkeypatch.setattr("nezha_vllm.item_scores.MAX_ELEMENTS", 40)
    assert torch.equal(scores(hidden, keys), whole)


def test_the_loss_counts_targets_that_have_a_token():
    loss = ItemLoss(ItemTokens(KEYS, FIRST, CODEC, OFFSETS), 0.5)
    hidden_VH, items_IH = torch.randn(5, 8), torch.randn(3, 8)
    codes_VL = torch.tensor([[2, 3, 4], [0, 0, 1], [1, 3, 3], [1, 3, 4], [0, 0, 1]])
    counts_V = torch.tensor([True, True, True, True, False])
    expected = 0.5 * F.cross_entropy((hidden_VH @ items_IH.T)[[0, 1, 3]], torch.tensor([2, 0, 1]))
    torch.testing.assert_close(loss(hidden_VH, items_IH, codes_VL, counts_V), expected)
    assert loss(hidden_VH, items_IH, codes_VL, torch.zeros(5, dtype=torch.bool)) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("scores") / "scores", items=60, item_tokens=20, item_score_weight=0.5
    )


@pytest.fixture(scope="module")
def model(folder):
    register_models()
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("validity", ["stepwise", "final"])
def test_beams_that_cover_the_catalogue_are_in_the_order_of_codes_and_items(folder, model, validity):
    films = Catalogue.load(folder / "catalogue")
    keys = torch.from_numpy(films.keys.copy())
    history = [["item-3", "item-17"]]
    beams = search(model, history, catalogue=films, beam_width=512, validity=validity)
    hidden = model.hidden_states_for(*pad_left(history_prompts(model.config, films, history, (), model.item_tokens)))
    # codes alone, then every item by hand
    plain = reference_beam_search(model.draft_head, hidden, keys, torch.tensor([512]), torch.tensor([True]))
    log_p = dict(zip(plain.index_NK[0].tolist(), plain.scores_NK[0].tolist(), strict=True))
    embeddings, tokens = model.model.embed_tokens.weight.detach(), model.item_tokens
    every_IL = torch.from_numpy(tokens.codec.codes_of_key(tokens.keys) + tokens.offsets)
    beyond_IH = embeddings[tokens.first :] - embeddings[every_IL].sum(1)
    beyond = {code: beyond_IH[every_IL[:, 0] == code] for code in every_IL[:, 0].tolist()}
    totals = {}
    for index, key in enumerate(films.keys.tolist()):
        at = np.flatnonzero(tokens.keys == key)
        codes = tokens.codec.codes_of_key(np.array([key]))[0] + tokens.offsets
        vector = embeddings[torch.from_numpy(tokens.first + at if len(at) else codes)].sum(0)
        vector = vector if len(at) else vector + beyond.get(int(codes[0]), torch.zeros(1, embeddings.shape[1])).mean(0)
        totals[index] = log_p[index] + 0.5 * float(hidden[0, 0] @ vector)
    found = int(beams.valid_N[0])
    order = beams.index_NK[0, :found].tolist()
    assert order == sorted(order, key=lambda index: -totals[index])
    assert found == len(films.keys) or validity == "final"  # where other codes take up beams
    assert order != sorted(order, key=lambda index: -log_p[index]) or validity == "final"
    assert beams.scores_NK[0, :found].tolist() == pytest.approx([totals[index] for index in order], abs=1e-3)
    torch.testing.assert_close(beams.log_probs_NKL.sum(2)[0, :found], beams.scores_NK[0, :found])


@pytest.mark.parametrize(("method", "short"), [("nezha", False), ("mtp", True), ("ar", False), ("ar", True)])
def test_training_chooses_the_weight_that_ranks_best(catalogue, rings, tmp_path, method, short):  # noqa: F811
    model, _, _ = starting_model("scratch", catalogue, SHAPE, 0, method)
    split = rings.leave_one_out()
    split = replace(split, valid_history=[items[-1 - at % 3 :] for at, items in enumerate(split.valid_history)])
    options = TrainingOptions(**(FAST | {"epochs": 4, "short_histories": short}))
    fit(model, catalogue, split, options, tmp_path / "run", write=lambda line: None)
    ask = {"max_history": 6, "item_tokens": model.item_tokens}
    valid = HeldOut(model.config, catalogue, split.valid_history, split.valid_target, **ask)
    chosen, by_weight = model.config.item_score_weight, {}
    for weight in (0.0, 0.5, 4.0, chosen):
        model.config.item_score_weight = weight
        by_weight[weight] = ndcg(valid.ranks(model, ITEM_SCORE_BEAMS), 10)
    assert by_weight[chosen] == max(by_weight.values())
    model.config.item_score_weight = 0.0
    assert valid.ndcg_by_weight(model, ITEM_SCORE_BEAMS, list(by_weight)) == pytest.approx(by_weight)


def test_the_products_alone_learn_what_follows(catalogue, rings, tmp_path):  # noqa: F811
    """The vectors by which items are read are those by which they are predicted."""
    model, _, _ = starting_model("scratch", catalogue, SHAPE, 0)
    split = rings.leave_one_out()
    fit(model, catalogue, split, TrainingOptions(**FAST), tmp_path / "run", write=lambda line: None)
    valid = HeldOut(
        model.config, catalogue, split.valid_history, split.valid_target, max_history=6, item_tokens=model.item_tokens
    )
    model.config.item_score_weight = 0.0
    found = valid.ndcg_by_weight(model, len(ITEMS), [0.0, 1e6])
    assert min(found.values()) > 0.9


def test_train_says_and_keeps_the_weight(catalogue, rings, tmp_path, capsys):  # noqa: F811
    rings.save(tmp_path / "rings")
    catalogue.save(tmp_path / "catalogue")
    words = ["train", str(tmp_path / "rings"), str(tmp_path / "catalogue"), "--epochs", "2"]
    for name, more in (("with", []), ("codes", ["--item-loss", "0"]), ("plain", ["--item-tokens", "0"])):
        assert cli.main([*words, *more, "--out", str(tmp_path / name)]) == 0
        config, notes = (json.loads((tmp_path / name / file).read_text()) for file in ("config.json", "training.json"))
        weight = config["item_score_weight"]
        assert weight == notes["item_score_weight"]
        assert (f"item scores count {weight:g} times" in capsys.readouterr().err) == (name == "with")
        assert weight == 0 or name == "with"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"item_score_weight": -1.0}, "item_score_weight is -1.0, must be a number, 0 or positive"),
        ({"item_score_weight": float("nan")}, "item_score_weight is nan, must be a number, 0 or positive"),
        ({"item_score_weight": "0.5"}, "item_score_weight is '0.5', must be a number, 0 or positive"),
        ({"num_item_tokens": 0}, "item_score_weight is 0.5, but there are no item tokens; set it to 0"),
    ],
)
def test_a_weight_that_cannot_be_is_refused(folder, fields, message):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        config.check()
