"""vLLM's models with a draft head: the backbone runs unchanged, ``compute_logits`` hands its hidden states on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.platforms import current_platform

from nezha_vllm.draft_head import DraftHead
from nezha_vllm.engine.settings import weights_folder
from nezha_vllm.item_scores import ItemScores
from nezha_vllm.item_tokens import KEYS, ItemTokens, load_item_tokens

HEAD = "draft_head."


class _WithDraftHead(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        # on a GPU the backbone's dtype, with float32 sums; on a CPU float32, which costs little there
        dtype = vllm_config.model_config.dtype if current_platform.is_cuda_alike() else torch.float32
        self.draft_head = DraftHead(config.hidden_size, config.codebook_sizes, dtype=dtype)
        self.draft_head.over_catalogue = config.softmax == "catalogue"
        self.draft_head.requires_grad_(False)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Hidden states as they are: the sampler of this model reads states, not logits."""
        return hidden_states

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        head: dict[str, Tensor] = {}

        def backbone() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith(HEAD):
                    head[name.removeprefix(HEAD)] = tensor
                elif name != KEYS:  # read from the folder, see `item_scores`
                    yield name, tensor

        loaded = super().load_weights(backbone())
        expected = {name: tuple(tensor.shape) for name, tensor in self.draft_head.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in head.items()}
        if found != expected:
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise ValueError(
                f"model.safetensors: draft head weights {wrong} are missing, unexpected or of another shape than "
                "config.json's codebook_sizes and hidden_size ask for; make the checkpoint anew with `nezha train`"
            )
        self.draft_head.load_state_dict(head)
        return loaded | {HEAD + name for name in head}

    def item_scores(self, model_config: ModelConfig) -> ItemScores | None:
        """Of this checkpoint, None if it has none; every worker holds all rows that they need.

        Which items have tokens is read as the API process does it, whatever format the weights were loaded in.
        """
        config = self.config
        if not config.item_score_weight:
            return None
        tokens = load_item_tokens(weights_folder(model_config), config)
        embeddings = self.model.embed_tokens.weight.data
        if get_tensor_model_parallel_world_size() > 1:
            start = int(tokens.offsets.min())
            embeddings = tensor_model_parallel_all_gather(embeddings, dim=0)[start : config.vocab_size].clone()
            tokens = ItemTokens(tokens.keys, tokens.first - start, tokens.codec, (tokens.offsets - start).tolist())
        return ItemScores(tokens, embeddings, config.item_score_weight)

    @staticmethod
    def get_model_state_cls() -> type:
        from nezha_vllm.engine.model_state import NezhaModelState

        return NezhaModelState


class NezhaLlamaForCausalLM(_WithDraftHead, LlamaForCausalLM):
    pass


class NezhaQwen3ForCausalLM(_WithDraftHead, Qwen3ForCausalLM):
    pass
