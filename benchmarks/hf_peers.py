"""Systems in plain transformers and PyTorch: ``generate`` with beams, and NEZHA without an engine around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.stock import beside, stock_checkpoint
from benchmarks.workload import Cell, Workload
from nezha_vllm.draft_head import reference_beam_search
from nezha_vllm.hf.modeling import register_models

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _load(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    register_models()
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(DEVICE).eval()


class HuggingFaceBeamSearch:
    """``generate(num_beams=K)`` on the stock backbone: L decoding steps, no catalogue constraint."""

    prefix_caching = False

    def __init__(self, checkpoint: str) -> None:
        self.levels = Workload.of(checkpoint).levels
        self.model = _load(str(stock_checkpoint(checkpoint, beside(checkpoint))))

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Sequence[int]], cell: Cell) -> object:
        ids_NQ = torch.tensor(prompts, device=DEVICE)
        found = self.model.generate(
            ids_NQ,
            attention_mask=torch.ones_like(ids_NQ),
            num_beams=cell.beam_width,
            num_return_sequences=cell.beam_width,
            max_new_tokens=self.levels,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        return found.sequences.cpu(), found.sequences_scores.cpu()

    def close(self) -> None:
        pass


class HuggingFaceNezha:
    """``nezha_vllm.hf`` and the reference beam search: the same method and answers, without an engine or kernels."""

    prefix_caching = False

    def __init__(self, checkpoint: str) -> None:
        workload = Workload.of(checkpoint)
        self.placeholders = list(workload.config["placeholder_token_ids"])
        self.catalogue = workload.catalogue
        self.model = _load(checkpoint)
        self.keys_M = torch.from_numpy(self.catalogue.keys.copy()).to(DEVICE)
        self.code_drives = self.model.draft_head.code_drives()

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Sequence[int]], cell: Cell) -> object:
        ids_NQ = torch.tensor([[*ids, *self.placeholders] for ids in prompts], device=DEVICE)
        beams = reference_beam_search(
            self.model.draft_head,
            self.model.hidden_states_for(ids_NQ),
            self.keys_M,
            torch.full((len(prompts),), cell.beam_width, device=DEVICE),
            torch.ones(len(prompts), dtype=torch.bool, device=DEVICE),
            self.code_drives,
        )
        scores, rows = beams.scores_NK.cpu(), beams.index_NK[:, : cell.n].tolist()
        first_rows = (self.catalogue.rows_of_index(index)[0] for found in rows for index in found)
        return scores, [self.catalogue.item_id(row) for row in first_rows]

    def close(self) -> None:
        pass


SYSTEMS: dict[str, Any] = {"hf-beam": HuggingFaceBeamSearch, "hf-nezha": HuggingFaceNezha}
