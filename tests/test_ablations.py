"""What NEZHA is compared with: their equations, their beam search, their training, and that none is served."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from nezha_vllm.ablations import HEADS, LABELS
from nezha_vllm.beam import BeamSearch
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.config import METHODS
from nezha_vllm.data.dataset import Dataset
from nezha_vllm.engine.settings import ServerSettings
from nezha_vllm.training.comparison import compare
from nezha_vllm.training.fit import fit
from nezha_vllm.training.options import TrainingOptions
from nezha_vllm.training.start import load_trained, save_trained, starting_model

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = (4, 4, 4)
SHAPE = SimpleNamespace(family="llama", hidden=64, layers=1, heads=2, intermediate=None)
ITEMS = [f"i{number}" for number in range(24)]


@pytest.fixture(scope="module")
def catalogue():
    keys = np.random.default_rng(0).permutation(64)[: len(ITEMS)]
    return Catalogue.build(ITEMS, np.stack([keys // 16, keys // 4 % 4, keys % 4], axis=1), list(SIZES))


@pytest.fixture(scope="module")
def rings():
    """Users walk round a ring: the next item follows from the last."""
    sequences = [[ITEMS[(start + turn) % len(ITEMS)] for turn in range(10)] for start in range(len(ITEMS))]
    items = pa.table({"item_id": ITEMS, "title": ITEMS, "text": ITEMS})
    return Dataset("ring", [f"u{number}" for number in range(len(ITEMS))], sequences, items)


def test_every_method_has_a_head_and_a_label():
    assert set(METHODS) == set(LABELS) == {*HEADS, "ar"}


@pytest.mark.parametrize("method", HEADS)
def test_the_search_scores_as_teacher_forcing_does(method, catalogue):
    """A beam as wide as the catalogue is brute force over its items."""
    torch.manual_seed(1)
    head = HEADS[method](64, SIZES).requires_grad_(False)
    keys_M, hidden_NSH = torch.from_numpy(catalogue.keys.copy()), torch.randn(5, 4, 64)
    beams = BeamSearch(head, keys_M)(hidden_NSH, [64] * 5, [True] * 5)
    codes_ML = torch.stack([keys_M // 16, keys_M // 4 % 4, keys_M % 4], dim=1)
    for request in range(5):
        log_probs = head(hidden_NSH[request].expand(len(keys_M), -1, -1), codes_ML)
        score_M = sum(log_p.gather(1, codes_ML[:, level, None])[:, 0] for level, log_p in enumerate(log_probs))
        torch.testing.assert_close(beams.scores_NK[request][: len(keys_M)], score_M.sort(descending=True).values)


def test_without_context_the_codes_chosen_do_not_matter():
    hidden, one, other = torch.randn(1, 4, 64), torch.tensor([[0, 1, 2]]), torch.tensor([[3, 2, 2]])
    for method in HEADS:
        head = HEADS[method](64, SIZES)
        same = torch.equal(head(hidden, one)[2], head(hidden, other)[2])
        assert same == (method in ("nezha-1", "mtp")), method


def test_the_summed_state_adds_embeddings():
    head, state, codes = HEADS["nezha-3"](64, SIZES), torch.randn(3, 64), torch.tensor([0, 3, 1])
    torch.testing.assert_close(head.next_state(1, state, codes), state + head.code_embeddings[1].weight[codes])


@pytest.mark.parametrize("method", HEADS)
def test_placeholders_are_read_or_not(method, catalogue):
    model, _, _ = starting_model("scratch", catalogue, SHAPE, 0, method)
    ids = torch.tensor([[10, 11, 12, *model.config.placeholder_token_ids]])
    hidden_SH = model.eval().hidden_states_for(ids)[0]
    assert torch.equal(hidden_SH[0], hidden_SH[1]) == (method in ("nezha-2", "mtp"))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "nezha"])
def test_ablations_train_are_measured_and_are_not_served(method, catalogue, rings, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer, dtype = starting_model("scratch", catalogue, SHAPE, 0, method)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options = TrainingOptions(epochs=8, batch_size=8, learning_rate=1e-2, max_history=6, dropout=0, item_dropout=0)
    fit(model, catalogue, rings.leave_one_out(), options, tmp_path / "run", write=lambda line: None)
    # no parameter is there without a part in the loss
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
    save_trained(tmp_path / "model", model, tokenizer, catalogue, dtype, options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = compare(loaded, catalogue, rings, part="test", max_history=6, beam_width=10)
    assert found.model == LABELS[method]
    assert found.rows[LABELS[method]]["hit@10"] > found.rows["popularity"]["hit@10"]
    model_config = SimpleNamespace(hf_config=loaded.config)
    with pytest.raises(ValueError, match=f"method is '{method}'"):
        ServerSettings.from_vllm(SimpleNamespace(model_config=model_config, additional_config=None))


def test_checkpoints_are_compared_in_pairs(catalogue, rings, tmp_path):
    for folder, method, seed in (("a", "nezha", 0), ("b", "mtp", 0), ("c", "nezha", 1)):
        model, tokenizer, dtype = starting_model("scratch", catalogue, SHAPE, seed, method)
        save_trained(tmp_path / folder, model, tokenizer, catalogue, dtype, TrainingOptions(max_history=5, seed=seed))
    ours, *others = (load_trained(tmp_path / folder) for folder in "abc")
    ask = {"part": "test", "max_history": 5, "beam_width": 10, "baselines": []}
    found = compare(ours.model, ours.catalogue, rings, others=others, options=ours.options, **ask)
    assert list(found.rows) == ["MTP heads", "NEZHA: c", "NEZHA"]
    assert {name: options["seed"] for name, options in found.options.items()} == {
        "NEZHA": 0,
        "MTP heads": 0,
        "NEZHA: c": 1,
    }
    alone = compare(others[1].model, catalogue, rings, **ask)
    assert found.rows["NEZHA: c"] == alone.rows["NEZHA"]
    gap = found.against["NEZHA: c"]["hit@10"]["mean"]
    assert gap == pytest.approx(found.rows["NEZHA"]["hit@10"] - alone.rows["NEZHA"]["hit@10"])
    fewer = Catalogue.build(ITEMS[:20], catalogue.codes[catalogue.rows(ITEMS[:20])], list(SIZES))
    with pytest.raises(ValueError, match="b ranks other items"):
        compare(ours.model, catalogue, rings, others=[replace(others[0], catalogue=fewer)], **ask)


def test_final_validity_returns_fewer_items(catalogue, rings):
    model, _, _ = starting_model("scratch", catalogue, SHAPE, 0)
    ask = {"part": "test", "max_history": 6, "beam_width": 10}
    stepwise, final = (compare(model, catalogue, rings, **ask, validity=mode) for mode in ("stepwise", "final"))
    assert final.rows["NEZHA"]["hit@10"] < stepwise.rows["NEZHA"]["hit@10"]
    assert "validity checked at the end" in final.convention
    assert "validity" not in stepwise.convention


def test_a_checkpoint_does_not_change_its_method(catalogue, tmp_path):
    model, tokenizer, dtype = starting_model("scratch", catalogue, SHAPE, 0, "mtp")
    save_trained(tmp_path / "model", model, tokenizer, catalogue, dtype, TrainingOptions())
    again, _, _ = starting_model(str(tmp_path / "model"), catalogue, SHAPE, 0)
    assert again.config.method == "mtp"
    with pytest.raises(ValueError, match="checkpoint of mtp"):
        starting_model(str(tmp_path / "model"), catalogue, SHAPE, 0, "nezha")
    model.config.method = "magic"
    with pytest.raises(ValueError, match="method is 'magic'"):
        model.config.check()
