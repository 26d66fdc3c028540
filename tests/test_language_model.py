"""The autoregressive language model: its packed rows, its two ways of decoding, its rows in a comparison."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nezha_vllm.ablations import FREE_LABEL, LABELS
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.config import SOFTMAX_OVER
from nezha_vllm.engine.settings import ServerSettings
from nezha_vllm.hf import language_model
from nezha_vllm.hf.backbones import tiny_shape
from nezha_vllm.hf.checkpoint import scratch_config
from nezha_vllm.hf.modeling import MODEL_CLASSES
from nezha_vllm.hf.prompt import code_token_ids, prompt_token_ids
from nezha_vllm.hf.recommend import search
from nezha_vllm.hf.tokenizer import byte_tokenizer
from nezha_vllm.training.comparison import compare, table
from nezha_vllm.training.evaluation import target_loss
from nezha_vllm.training.packing import IGNORED, PackedCollator
from nezha_vllm.training.results import COLUMNS, append
from nezha_vllm.training.start import starting_model

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = (5, 4, 6)


def tiny(family="llama", sizes=SIZES, softmax="codes"):
    torch.manual_seed(0)
    config, _ = scratch_config(tiny_shape(family, hidden_size=64, num_attention_heads=2), list(sizes))
    config.initializer_range, config.method, config.softmax = 0.2, "ar", softmax
    return MODEL_CLASSES[family](config).eval()


def catalogue_of(sizes, count, seed=0):
    keys = np.random.default_rng(seed).permutation(int(np.prod(sizes)))[:count]
    codes = np.stack(np.unravel_index(keys, sizes), axis=1)
    return Catalogue.build([f"i{number}" for number in range(count)], codes, list(sizes))


HISTORIES = [["i3"], ["i1", "i2", "i0", "i5"], ["i4", "i4"]]


@torch.no_grad()
def brute_force(model, prompt, answers, items=None):
    """Sum of the log-probabilities of every answer [A, L] of token ids behind the prompt, one row an answer.

    With the tokens [M, L] of all items, the logits of a token are set against those of the items' next ones alone.
    """
    rows = torch.cat([torch.tensor([prompt]).expand(len(answers), -1), answers], dim=1)
    hidden = model.model(input_ids=rows).last_hidden_state[:, len(prompt) - 1 : -1]
    logits = hidden @ model.model.embed_tokens.weight.T
    if items is not None:
        for row, answer in enumerate(answers):
            for level in range(answers.shape[1]):
                left = items[(items[:, :level] == answer[:level]).all(1), level]
                logits[row, level, torch.isin(torch.arange(logits.shape[2]), left, invert=True)] = -torch.inf
    return logits.log_softmax(-1).gather(2, answers[..., None])[..., 0].sum(1)


def prompt_of(model, catalogue, items):
    return prompt_token_ids(model.config, [catalogue.codes_of(item) for item in items])


@pytest.mark.parametrize("softmax", SOFTMAX_OVER)
@pytest.mark.parametrize("family", MODEL_CLASSES)
def test_constrained_beam_search_as_wide_as_the_catalogue_is_brute_force(family, softmax):
    model, catalogue = tiny(family, softmax=softmax), catalogue_of(SIZES, 40)
    beams = search(model, HISTORIES, catalogue=catalogue, beam_width=64, validity="stepwise")
    codes_ML = np.stack(np.unravel_index(catalogue.keys, SIZES), axis=1)
    tokens_ML = torch.from_numpy(code_token_ids(model.config, codes_ML))
    everything = tokens_ML if softmax == "catalogue" else None
    for row, items in enumerate(HISTORIES):
        expected = brute_force(model, prompt_of(model, catalogue, items), tokens_ML, everything).sort(descending=True)
        assert beams.index_NK[row, :40].tolist() == expected.indices.tolist()
        torch.testing.assert_close(beams.scores_NK[row, :40], expected.values, atol=1e-4, rtol=1e-5)
        summed = float(beams.scores_NK[row, :40].exp().sum())
        assert summed == pytest.approx(1, abs=1e-4) if softmax == "catalogue" else summed < 0.99
    assert beams.drafted_N.tolist() == beams.valid_N.tolist() == [40] * 3


def test_free_beam_search_competes_over_the_whole_vocabulary():
    """With two levels a beam as wide as the vocabulary is brute force over all pairs of tokens."""
    sizes = (5, 4)
    model, catalogue = tiny(sizes=sizes), catalogue_of(sizes, 12)
    vocabulary, first = model.config.vocab_size, model.config.code_token_offsets[0]
    with torch.no_grad():  # codes must win now and then
        model.model.embed_tokens.weight[first : first + 9] *= 3
    beams = search(model, HISTORIES, catalogue=catalogue, beam_width=vocabulary, validity="final")
    items = {tuple(tokens) for tokens in code_token_ids(model.config, catalogue.codes).tolist()}
    for row, history in enumerate(HISTORIES):
        prompt = torch.tensor(prompt_of(model, catalogue, history))
        every = torch.cat([prompt.expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], dim=1)
        with torch.no_grad():
            hidden = model.model(input_ids=every).last_hidden_state
            log_p = (hidden[:, -2:] @ model.model.embed_tokens.weight.T).log_softmax(-1)
        score_VV = log_p[:, 0].diagonal()[:, None] + log_p[:, 1]
        best = score_VV.flatten().topk(vocabulary)
        pairs = [divmod(index, vocabulary) for index in best.indices.tolist()]
        kept = [rank for rank, pair in enumerate(pairs) if pair in items]
        valid = int(beams.valid_N[row])
        assert valid == len(kept)
        torch.testing.assert_close(beams.scores_NK[row, :valid], best.values[kept], atol=1e-4, rtol=1e-5)
    assert beams.drafted_N.tolist() == [vocabulary] * 3
    assert 0 < int(beams.valid_N.sum()) < 3 * 12


@pytest.mark.parametrize("validity", ["stepwise", "final"])
def test_narrow_beams_do_not_depend_on_the_batch(validity, monkeypatch):
    model, catalogue = tiny(), catalogue_of(SIZES, 100)
    ask = {"catalogue": catalogue, "beam_width": 7, "validity": validity}
    together = search(model, HISTORIES, **ask)
    monkeypatch.setattr(language_model, "MAX_SCORES", 1)
    sliced = search(model, HISTORIES, **ask)
    for row, items in enumerate(HISTORIES):
        alone = search(model, [items], **ask)
        for found in (together, sliced):
            assert found.index_NK[row].tolist() == alone.index_NK[0].tolist()
            torch.testing.assert_close(found.scores_NK[row], alone.scores_NK[0], atol=1e-5, rtol=1e-5)
    known = together.index_NK >= 0
    torch.testing.assert_close(together.log_probs_NKL.sum(2)[known], together.scores_NK[known], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softmax", SOFTMAX_OVER)
@pytest.mark.parametrize("prefix", [(), (3, 1)])
def test_a_packed_row_equals_one_row_per_prefix(prefix, softmax):
    model, catalogue = tiny(softmax=softmax), catalogue_of(SIZES, 100)
    everything = None
    if softmax == "catalogue":
        model.keys_M = torch.from_numpy(catalogue.keys.copy())
        everything = torch.from_numpy(code_token_ids(model.config, catalogue.codes))
    sequences = [["i1", "i2", "i3", "i4", "i5", "i6", "i7"], ["i9", "i8"], ["i4", "i5", "i6", "i4"]]
    rows = [torch.tensor([catalogue.codes_of(item) for item in items]) for items in sequences]
    packed = PackedCollator(model.config, max_history=6, prefix=prefix)(rows)
    output = model(**packed)
    losses = []
    for codes in rows:
        for used in range(1, len(codes)):
            prompt = prompt_token_ids(model.config, codes[:used], prefix)
            answer = torch.from_numpy(code_token_ids(model.config, codes[used : used + 1]))
            losses.append(-brute_force(model, prompt, answer, everything) / 3)
    assert int((packed["labels"][..., 0] != IGNORED).sum()) == len(losses)
    torch.testing.assert_close(output.loss, torch.cat(losses).mean(), atol=1e-5, rtol=1e-5)
    histories, targets = [items[:-1] for items in sequences], [items[-1] for items in sequences]
    last = torch.cat([losses[index] for index in (5, 6, 9)])
    found = target_loss(model, catalogue, histories, targets, max_history=6, prefix=prefix)
    assert found == pytest.approx(float(last.mean()), abs=1e-5)


def test_item_dropout_leaves_the_targets_alone():
    model, catalogue = tiny(), catalogue_of(SIZES, 100)
    row = torch.tensor([catalogue.codes_of(f"i{number}") for number in range(7)])
    plain = PackedCollator(model.config, 6)([row])["input_ids"]
    torch.manual_seed(0)
    blotted = PackedCollator(model.config, 6, item_dropout=0.5)([row])["input_ids"]
    assert not torch.equal(plain[:, :18], blotted[:, :18])
    assert torch.equal(plain[:, 18:], blotted[:, 18:])
    assert plain[0, 18:20].tolist() == code_token_ids(model.config, row[1])[:2].tolist()


def test_a_comparison_shows_both_ways_of_decoding(tmp_path):
    import csv
    import json

    import pyarrow as pa

    from nezha_vllm.data.dataset import Dataset

    catalogue = catalogue_of(SIZES, 60)
    items = catalogue.items["item_id"].to_pylist()
    sequences = [[items[(start + turn) % 60] for turn in range(6)] for start in range(20)]
    dataset = Dataset(
        "ring", [f"u{u}" for u in range(20)], sequences, pa.table(dict.fromkeys(("item_id", "title", "text"), items))
    )
    model = tiny()
    ask = {"part": "test", "max_history": 5, "beam_width": 8}
    found = compare(model, catalogue, dataset, baselines=["popularity"], alone=3, **ask)
    free, constrained = found.rows[FREE_LABEL], found.rows[LABELS["ar"]]
    assert list(found.rows) == ["popularity", FREE_LABEL, LABELS["ar"]]
    assert free["valid"] < constrained["valid"] == 1
    assert "hit@500" in found.rows["popularity"]
    assert "hit@500" not in free
    assert found.model == LABELS["ar"]
    assert table(found).row_count == 3
    append(tmp_path / "runs.csv", found, dataset)
    with open(tmp_path / "runs.csv", newline="") as file:
        lines = {line["method"]: line for line in csv.DictReader(file)}
    assert list(lines["popularity"]) == COLUMNS
    assert [lines[name]["validity"] for name in found.rows] == ["", "final", "stepwise"]
    assert lines["popularity"]["valid"] == "" == lines[FREE_LABEL]["hit@500"]
    assert float(lines[FREE_LABEL]["valid"]) == pytest.approx(free["valid"], abs=1e-6)
    notes = [json.loads(lines[name]["config"]) for name in found.rows]
    assert [note["device"] for note in notes] == ["cpu"] * 3
    assert "latency" not in notes[0]
    assert all(0 < note["latency"]["p50_ms"] <= note["latency"]["p99_ms"] for note in notes[1:])
    only = compare(model, catalogue, dataset, baselines=[], validity="final", **ask)
    assert list(only.rows) == [FREE_LABEL]
    assert only.rows[FREE_LABEL] == free


@pytest.mark.parametrize("tied", [True, False])
def test_it_grows_from_a_local_backbone_with_tied_embeddings(tied, tmp_path):
    tokenizer = byte_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=tied, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    catalogue = catalogue_of(SIZES, 40)
    if not tied:
        with pytest.raises(ValueError, match="use a backbone with tied embeddings"):
            starting_model(str(tmp_path), catalogue, None, 0, "ar")
        return
    model, _, _ = starting_model(str(tmp_path), catalogue, None, 0, "ar")
    assert len(model.recommend([["i1"]], 5, catalogue=catalogue)[0]) == 5
    model_config = SimpleNamespace(hf_config=model.config)
    with pytest.raises(ValueError, match="method is 'ar'"):
        ServerSettings.from_vllm(SimpleNamespace(model_config=model_config, additional_config=None))
