"""NEZHA on the transformers backbones: one prefill, L + 1 hidden states, a draft head.

Shape suffixes beyond those of ``draft_head``: Q tokens of a row, P targets of a row (1 when serving), V targets of the
batch that have labels, or all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, LlamaModel, PreTrainedModel, Qwen3Model
from transformers.modeling_outputs import ModelOutput
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3PreTrainedModel

from nezha_vllm.ablations import HEADS, WITHOUT_PLACEHOLDERS
from nezha_vllm.config import AUTOREGRESSIVE, NezhaConfig, NezhaLlamaConfig, NezhaQwen3Config, register_configs
from nezha_vllm.draft_head import among_items
from nezha_vllm.hf.recommend import Recommendation, recommend
from nezha_vllm.item_scores import ItemScores
from nezha_vllm.item_tokens import KEYS, ItemTokens, checked

if TYPE_CHECKING:
    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.training.item_embeddings import ItemEmbeddings
    from nezha_vllm.training.lesson import Lesson

IGNORED = -100


@dataclass
class NezhaOutput(ModelOutput):
    """``logits``: per level log-probabilities [V, T_l] of the targets, or None without labels."""

    loss: Tensor | None = None
    logits: tuple[Tensor, ...] | None = None
    hidden_states: Tensor | None = None


class _NezhaMixin(PreTrainedModel):
    """What both backbones share."""

    def _setup(self, config: NezhaConfig, backbone: type[PreTrainedModel]) -> None:
        config.check()
        self.model = backbone(config)
        if config.method != AUTOREGRESSIVE:
            self.draft_head = HEADS[config.method](config.hidden_size, config.codebook_sizes)
            self.draft_head.over_catalogue = config.softmax == "catalogue"
        # of training alone, see training.regularise, training.item_loss and training.teachers
        self.label_smoothing = 0.0
        self.level_weights: Sequence[float] = ()
        self.tied_codes: Sequence[str] = ()
        self.item_loss: nn.Module | None = None
        self.teachers: Callable[[Mapping[str, Tensor], Tensor | None], Lesson] | None = None
        self.keys_M: Tensor | None = None  # of the catalogue, on the model's device, for a softmax over it
        self.item_embeddings: ItemEmbeddings | None = None
        if config.num_item_tokens:
            self.register_buffer(KEYS, torch.zeros(config.num_item_tokens, dtype=torch.int64))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.RNNCell):
            bound = module.hidden_size**-0.5
            for parameter in module.parameters():
                if not getattr(parameter, "_is_hf_initialized", False):
                    nn.init.uniform_(parameter, -bound, bound)
        else:
            super()._init_weights(module)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        read_positions: Tensor | None = None,
        labels: Tensor | None = None,
        labelled: Tensor | None = None,
        **taught: Tensor,
    ) -> NezhaOutput:
        """Hidden states at the read positions and, with labels, the loss under teacher forcing.

        Args:
            input_ids: [N, Q].
            attention_mask: [N, Q] (1 = token, 0 = padding on either side) or [N, 1, Q, Q] (True = may attend).
            position_ids: [N, Q]; default counted from the 2-D mask. Required with a 4-D mask.
            read_positions: [N, P, S], indices of h_0 … h_L of each target; default the last S tokens, P = 1. S is
                L + 1; of the language model L, and what it reads behind the history are all codes but the last.
            labels: codes of the targets, [N, P, L] or [N, L]; targets with -100 do not count.
            labelled: positions [V] among the N · P targets of those that count; without them all are computed and
                V is N · P, a shape that does not hang on the labels.
            taught: what the model's teachers read, if it has some; in training alone.

        Returns:
            ``hidden_states`` [N, P, S, H], ``loss`` and ``logits``; the loss is the mean over targets and levels.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            if attention_mask.dim() != 2:
                raise ValueError("a 4-D attention_mask needs position_ids")
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        if read_positions is None:
            if attention_mask.dim() != 2:
                raise ValueError("a 4-D attention_mask needs read_positions")
            read_positions = self._last_positions(attention_mask, self.config.num_reads)[:, None]
        hidden_NQH = self.model(
            inputs_embeds=self.embedded(input_ids),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        if self.config.method in WITHOUT_PLACEHOLDERS:
            read_positions = read_positions[..., :1].expand_as(read_positions)
        first_N11 = hidden_NQH.shape[1] * torch.arange(len(input_ids), device=input_ids.device)[:, None, None]
        read_NPS = first_N11 + read_positions
        # the gradient of index_select is one kernel, that of indexing a sort
        hidden_NPSH = hidden_NQH.flatten(0, 1).index_select(0, read_NPS.flatten()).unflatten(0, read_NPS.shape)
        if labels is None:
            return NezhaOutput(hidden_states=hidden_NPSH)
        labels_NPL = labels if labels.dim() == 3 else labels[:, None]
        labels_VL, hidden_VSH = labels_NPL.flatten(0, 1), hidden_NPSH.flatten(0, 1)
        if labelled is not None:
            labels_VL, hidden_VSH = labels_VL[labelled], hidden_VSH[labelled]
        counts_V = labels_VL[:, 0] != IGNORED
        labels_VL = torch.where(counts_V[:, None], labels_VL, self._any_codes(labels_VL))
        logits = self.code_log_probs(hidden_VSH, labels_VL)
        lesson = self.teachers(taught, labelled) if self.teachers is not None and self.training else None
        loss = self._loss(logits, labels_VL, counts_V, lesson)
        if self.item_loss is not None:
            loss = loss + self.item_loss(hidden_VSH[:, 0], self.item_vectors(), labels_VL, counts_V, lesson)
        return NezhaOutput(loss, tuple(logits), hidden_NPSH)

    def embedded(self, ids: Tensor) -> Tensor:
        """Embeddings [..., H] of token ids, item tokens in training among them."""
        return self.model.embed_tokens(ids) if self.item_embeddings is None else self.item_embeddings(ids)

    @property
    def item_tokens(self) -> ItemTokens | None:
        """The semantic IDs that have a token in a prompt's history."""
        if self.item_embeddings is not None:
            return self.item_embeddings.tokens
        if not self.config.num_item_tokens:
            return None
        config: Any = self.config
        return checked(getattr(self, KEYS).cpu().numpy(), config, "this checkpoint")

    def item_vectors(self) -> Tensor:
        """Embeddings [I, H] of item tokens."""
        if self.item_embeddings is not None:
            return self.item_embeddings.rows()
        return self.model.embed_tokens.weight[self.config.first_item_token :]

    @property
    def item_scores(self) -> ItemScores | None:
        """What its searches put beams in order by, beside log-probabilities; with the weights of now."""
        return self.item_scores_of(self.config.item_score_weight) if self.config.item_score_weight else None

    @torch.no_grad()
    def item_scores_of(self, weight: float) -> ItemScores:
        """The same with any weight."""
        assert self.item_tokens is not None, "scores of items are products with the vectors of their tokens"
        embeddings = self.model.embed_tokens.weight
        if self.item_embeddings is not None:
            embeddings = torch.cat([embeddings, self.item_embeddings.rows()])
        return ItemScores(self.item_tokens, embeddings.detach(), weight)

    @torch.no_grad()
    def settle_item_tokens(self) -> None:
        """Make trained item tokens rows of the embeddings like any others."""
        if self.item_embeddings is None:
            return
        old, rows = self.model.embed_tokens, self.item_embeddings.rows()
        keys = torch.from_numpy(self.item_embeddings.tokens.keys).to(rows.device)
        self.item_embeddings = None
        weight = torch.cat([old.weight, rows.to(old.weight)])
        self.model.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=old.padding_idx)
        self.config.vocab_size, self.config.num_item_tokens = len(weight), len(rows)
        self.register_buffer(KEYS, keys)

    def code_log_probs(self, hidden_NSH: Tensor, codes_NL: Tensor, keys_M: Tensor | None = None) -> list[Tensor]:
        """Log-probabilities under teacher forcing: per level float32 [N, T_l].

        Those of the language model are a part of its distribution over the vocabulary, so they sum to less than 1,
        unless its softmax is over the catalogue. With that one, all codes must be those of items of ``keys_M``, by
        default the model's.
        """
        if self.config.method == AUTOREGRESSIVE:
            log_p_NLV = self.next_token_log_probs(hidden_NSH)
            levels = zip(self.config.code_token_offsets, self.config.codebook_sizes, strict=True)
            log_probs = [log_p_NLV[:, level, start : start + size] for level, (start, size) in enumerate(levels)]
        elif self.tied_codes:
            log_probs = functional_call(self.draft_head, self._tied_weights(), (hidden_NSH, codes_NL))
        else:
            log_probs = self.draft_head(hidden_NSH, codes_NL)
        if self.config.softmax != "catalogue":
            return log_probs
        keys_M = self.keys_M if keys_M is None else keys_M
        if keys_M is None:
            raise ValueError("config.json: softmax is 'catalogue', so set the model's keys_M to the catalogue's keys")
        return among_items(log_probs, codes_NL, keys_M)

    def _any_codes(self, codes: Tensor) -> Tensor:
        """[L], for targets that do not count: of an item where the softmax asks for one."""
        if self.keys_M is None:
            return torch.zeros_like(codes[0])
        codec = self.config.codec  # numbers, not tensors of them: a step's CUDA graph can copy nothing from the host
        levels = zip(codec.suffix_sizes, codec.codebook_sizes, strict=True)
        return torch.stack([self.keys_M[0] // suffix % size for suffix, size in levels])

    def next_token_log_probs(self, hidden: Tensor) -> Tensor:
        """The language model's log-probabilities float32 [..., V] of all V tokens; embeddings are its output layer.

        Item tokens are never predicted, and not among them.
        """
        output = self.model.embed_tokens.weight[: self.config.first_item_token]
        return F.linear(hidden, output).float().log_softmax(-1)

    def _loss(
        self,
        logits: Sequence[Tensor],
        labels_VL: Tensor,
        counts_V: Tensor,
        lesson: Lesson | None = None,
    ) -> Tensor:
        losses, shares = [], lesson.of_codes(labels_VL) if lesson else ()
        for level, log_p_VT in enumerate(logits):
            loss_V = -log_p_VT.gather(1, labels_VL[:, level, None])[:, 0]
            if self.label_smoothing:
                possible_VT = log_p_VT > -torch.inf
                mean_V = log_p_VT.where(possible_VT, 0).sum(1) / possible_VT.sum(1)
                loss_V = (1 - self.label_smoothing) * loss_V - self.label_smoothing * mean_V
            if lesson:
                loss_V = lesson.mixed(loss_V, log_p_VT, shares[level])
            losses.append((loss_V * counts_V).sum() / counts_V.sum())
        weights = self.level_weights or [1.0] * len(losses)
        return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)

    def _tied_weights(self) -> dict[str, Tensor]:
        """The draft head's weights that are rows of the backbone's embeddings: names within the head → [T_l, H]."""
        embeddings, tied = self.model.embed_tokens.weight, {}
        for level, (start, size) in enumerate(
            zip(self.config.code_token_offsets, self.config.codebook_sizes, strict=True)
        ):
            rows = embeddings[start : start + size]
            if "logit_heads" in self.tied_codes:
                tied[f"logit_heads.{level}.weight"] = rows
            if "code_embeddings" in self.tied_codes and level < len(self.draft_head.code_embeddings):
                tied[f"code_embeddings.{level}.weight"] = rows
        return tied

    @torch.no_grad()
    def copy_tied_codes(self) -> None:
        """Bring the head's own weights, which are searched and saved, up to the embeddings they are tied to."""
        if self.tied_codes:
            own = dict(self.draft_head.named_parameters())
            for name, rows in self._tied_weights().items():
                own[name].copy_(rows)

    def _last_positions(self, attention_mask: Tensor, width: int) -> Tensor:
        """Indices [N, width] of the last tokens that are no padding."""
        if int(attention_mask.sum(-1).min()) < width:
            raise ValueError(f"every prompt needs at least {width} tokens: one of history and what follows it")
        index_NQ = torch.arange(attention_mask.shape[1], device=attention_mask.device).expand_as(attention_mask)
        last_N1 = index_NQ.masked_fill(attention_mask == 0, -1).max(-1, keepdim=True).values
        return last_N1 + torch.arange(1 - width, 1, device=attention_mask.device)

    @torch.no_grad()
    def hidden_states_for(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """h_0 … h_L [N, S, H] of prompts [N, Q] that end with the placeholders, padded on either side.

        Prompts of the language model end with all codes of the target but the last, and S is L.
        """
        return self(input_ids, attention_mask).hidden_states[:, 0]

    def first_hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """h_0 [N, H] of prompts as they are served, [N, Q]."""
        if self.config.method != AUTOREGRESSIVE:
            return self.hidden_states_for(input_ids, attention_mask)[:, 0]
        # the last token's: a prompt may be a single one, which is too short for a target's other codes to be behind it
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self(input_ids, mask, read_positions=self._last_positions(mask, 1)[:, None]).hidden_states[:, 0, 0]

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        n: int,
        *,
        catalogue: Catalogue,
        beam_width: int | None = None,
        validity: str | None = None,
        prefix: Sequence[int] = (),
    ) -> list[list[Recommendation]]:
        """The n best items for each history of item IDs; see ``hf.recommend.recommend``."""
        return recommend(
            self, histories, n, catalogue=catalogue, beam_width=beam_width, validity=validity, prefix=prefix
        )


class NezhaLlamaForCausalLM(_NezhaMixin, LlamaPreTrainedModel):
    config_class = NezhaLlamaConfig
    config: NezhaLlamaConfig

    def __init__(self, config: NezhaLlamaConfig) -> None:
        super().__init__(config)
        self._setup(config, LlamaModel)


class NezhaQwen3ForCausalLM(_NezhaMixin, Qwen3PreTrainedModel):
    config_class = NezhaQwen3Config
    config: NezhaQwen3Config

    def __init__(self, config: NezhaQwen3Config) -> None:
        super().__init__(config)
        self._setup(config, Qwen3Model)


MODEL_CLASSES: dict[str, Any] = {"llama": NezhaLlamaForCausalLM, "qwen3": NezhaQwen3ForCausalLM}


def register_models() -> None:
    """Let ``AutoConfig`` and ``AutoModelForCausalLM`` read our checkpoints. Safe to call more than once."""
    register_configs()
    for model_class in MODEL_CLASSES.values():
        AutoModelForCausalLM.register(model_class.config_class, model_class, exist_ok=True)
