"""The autoregressive language model, NEZHA's main rival: beam search with a forward pass of the backbone a code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from nezha_vllm.draft_head import Beams, among, finish, gather_beams, has_key, select

if TYPE_CHECKING:
    from nezha_vllm.hf.modeling import NezhaLlamaForCausalLM, NezhaQwen3ForCausalLM
    from nezha_vllm.item_scores import ItemScores

MAX_SCORES = 1 << 24  # elements of one [N, K, V] tensor of log-probabilities; batches beyond are searched in slices
NO_KEY = -1  # of a beam with a token that is no code of its level


def language_model_beam_search(
    model: NezhaLlamaForCausalLM | NezhaQwen3ForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor,
    keys_M: Tensor,
    width: int,
    stepwise: bool,
    item_scores: ItemScores | None = None,
) -> Beams:
    """The best semantic IDs behind prompts [N, Q], padded on the left, by the sum of their tokens' log-probabilities.

    Log-probabilities are those of the whole vocabulary V in both modes, as in transformers' ``generate`` with and
    without ``prefix_allowed_tokens_fn``; only with a softmax over the catalogue, ``stepwise`` has those of the codes
    that lead to an item. ``stepwise`` masks every step by the catalogue's prefixes; else every token competes at every
    step, L steps are taken, and beams that are no item are lost.
    """
    step = max(1, MAX_SCORES // (width * model.config.first_item_token))
    slices = [slice(start, start + step) for start in range(0, len(input_ids), step)]
    parts = [
        _search(model, input_ids[part], attention_mask[part], keys_M, width, stepwise, item_scores) for part in slices
    ]
    names = "index_NK", "log_probs_NKL", "scores_NK", "drafted_N", "valid_N"
    return Beams(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@torch.no_grad()
def _search(
    model: NezhaLlamaForCausalLM | NezhaQwen3ForCausalLM,
    input_ids_NQ: Tensor,
    mask_NQ: Tensor,
    keys_M: Tensor,
    width: int,
    stepwise: bool,
    item_scores: ItemScores | None,
) -> Beams:
    config, device, count = model.config, input_ids_NQ.device, len(input_ids_NQ)
    widths_N = torch.full((count,), width, device=device)
    cache, length_N1 = DynamicCache(config=config), mask_NQ.sum(1, keepdim=True)
    hidden_NBH = model.model(
        inputs_embeds=model.embedded(input_ids_NQ),
        attention_mask=mask_NQ,
        position_ids=(mask_NQ.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1:]
    first_NH = hidden_NBH[:, 0]
    key_NB = torch.zeros(count, 1, dtype=torch.long, device=device)
    score_NB = torch.zeros(count, 1, device=device)
    history_NBL = torch.zeros(count, 1, 0, device=device)
    # what a beam sees behind the prompt: of the drafted tokens, which all stay in the cache, its own ancestors
    sees_NBX = torch.zeros(count, 1, 0, dtype=torch.bool, device=device)
    sizes, suffixes = config.codec.codebook_sizes, config.codec.suffix_sizes
    for level, (start, size, suffix) in enumerate(zip(config.code_token_offsets, sizes, suffixes, strict=True)):
        log_p_NBC = model.next_token_log_probs(hidden_NBH)
        if stepwise:
            log_p_NBC = log_p_NBC[..., start : start + size]
        candidates = log_p_NBC.shape[2]
        code_C = torch.arange(candidates, device=device) - (0 if stepwise else start)
        child_NBC = key_NB[..., None] * size + code_C
        strays = ((code_C < 0) | (code_C >= size)) | (key_NB[..., None] == NO_KEY)
        child_NBC = child_NBC.masked_fill(strays, NO_KEY)
        if stepwise:
            allowed_NBC = has_key(keys_M, child_NBC * suffix, suffix)
            if config.softmax == "catalogue":
                log_p_NBC = among(log_p_NBC, allowed_NBC)
            log_p_NBC = log_p_NBC.masked_fill(~allowed_NBC, -torch.inf)
        total_NBC = score_NB[..., None] + log_p_NBC
        chosen_NK, alive_NK = select(total_NBC.flatten(1), widths_N)
        parent_NK, candidate_NK = chosen_NK // candidates, chosen_NK % candidates
        key_NB = child_NBC.flatten(1).gather(1, chosen_NK)
        score_NB = total_NBC.flatten(1).gather(1, chosen_NK).masked_fill(~alive_NK, -torch.inf)
        log_p_NK = log_p_NBC.flatten(1).gather(1, chosen_NK)
        history_NBL = torch.cat([gather_beams(history_NBL, parent_NK), log_p_NK[..., None]], dim=2)
        if level + 1 < len(sizes):
            beams = chosen_NK.shape[1]
            itself = torch.eye(beams, dtype=torch.bool, device=device).expand(count, -1, -1)
            sees_NBX = torch.cat([gather_beams(sees_NBX, parent_NK), itself], dim=2)
            prompt_NKQ = mask_NQ.bool()[:, None].expand(-1, beams, -1)
            hidden_NBH = model.model(
                input_ids=candidate_NK + (start if stepwise else 0),
                attention_mask=torch.cat([prompt_NKQ, sees_NBX], dim=2)[:, None],
                position_ids=(length_N1 + level).expand(-1, beams),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
    return finish(key_NB, score_NB, history_NBL, keys_M, (), item_scores, first_NH)
