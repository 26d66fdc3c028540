"""Checkpoints of the public NEZHA code (Applied-Machine-Learning-Lab/WWW2026_NEZHA), read field by field.

=============================================  ==================================================
theirs                                         ours
=============================================  ==================================================
``config.json``: ``docid_num``, ``offset``     ``codebook_sizes``, ``code_token_offsets``
``mtp_head.token_emb_list.{l}.weight``         ``draft_head.code_embeddings.{l}.weight``, l < L - 1
``mtp_head.transition.{l}.*``                  ``draft_head.cells.{l}.*``, l < L - 1
``mtp_head.logit_head_list.{l}.weight``        ``draft_head.logit_heads.{l}.weight``
``model.*``                                    the same
``lm_head.weight``                             left out: no logits over the vocabulary are made
``<sp_0>`` … of the tokenizer                  ``<sp_1>`` …, the same token ids
``ava_sid3.pt``: V of every valid item         the catalogue's semantic IDs
=============================================  ==================================================
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from nezha_vllm.config import ARCHITECTURES, CONFIG_CLASSES, NezhaConfig
from nezha_vllm.hf.modeling import MODEL_CLASSES
from nezha_vllm.semantic_id import SemanticIdCodec, code_token, placeholder_token

VALID_SET = "ava_sid3.pt"
FIELDS = ("docid_num", "offset", "use_mtp")
OWN_FIELDS = (*FIELDS, "max_sid", "old_vocab_size", "model_type", "architectures", "transformers_version", "auto_map")


def public_config(folder: Path) -> tuple[NezhaConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer. Raises ``ValueError`` that names the field, or ``FileNotFoundError``."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {folder}: config.json is missing")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    missing = [name for name in FIELDS if name not in stored]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: it is no checkpoint of the public NEZHA code")
    if stored["use_mtp"] is not True:
        raise ValueError(f"{path}: use_mtp is {stored['use_mtp']!r}: this checkpoint has no draft head to convert")
    family = stored.get("model_type")
    if family not in CONFIG_CLASSES:
        raise ValueError(f"{path}: model_type is {family!r}; NEZHA runs on {', '.join(sorted(CONFIG_CLASSES))}")
    sizes, offsets = (_whole_numbers(path, name, stored[name]) for name in ("docid_num", "offset"))
    if len(offsets) != len(sizes):
        raise ValueError(
            f"{path}: offset has {len(offsets)} entries, docid_num has {len(sizes)}; both have one a level"
        )
    old = stored.get("old_vocab_size")
    if old is not None and min(offsets) < old:
        raise ValueError(f"{path}: offset {offsets} reaches into the {old} tokens of the backbone, old_vocab_size")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    placeholders = _added_tokens(tokenizer, sizes, offsets, folder)
    # read by transformers, which knows the older names of a backbone's fields
    fields = AutoConfig.from_pretrained(folder).to_dict()
    fields = {name: value for name, value in fields.items() if name not in OWN_FIELDS}
    fields |= {
        "tie_word_embeddings": True,
        "codebook_sizes": sizes,
        "code_token_offsets": offsets,
        "placeholder_token_ids": placeholders,
        "architectures": [ARCHITECTURES[family]],
    }
    config = CONFIG_CLASSES[family](**fields)
    config.check()
    new_names = {f"<sp_{level}>": placeholder_token(level) for level in range(len(sizes))}
    return config, _renamed(tokenizer, new_names)


def _whole_numbers(path: Path, name: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(part) is int and part >= 0 for part in value):
        raise ValueError(f"{path}: {name} is {value!r}, must be a list of whole numbers, one a level")
    return value


def _added_tokens(tokenizer: PreTrainedTokenizerBase, sizes: list[int], offsets: list[int], folder: Path) -> list[int]:
    """Token ids of the placeholders, after a look at every code token."""
    vocabulary = tokenizer.get_vocab()
    for level, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        for code in range(size):
            token = code_token(level, code)
            if vocabulary.get(token) != offset + code:
                raise ValueError(
                    f"tokenizer of {folder}: token {token} has id {vocabulary.get(token)}, but offset and docid_num of "
                    f"config.json say {offset + code}; keep tokenizer and config.json of one checkpoint together"
                )
    absent = [f"<sp_{level}>" for level in range(len(sizes)) if f"<sp_{level}>" not in vocabulary]
    if absent:
        raise ValueError(f"tokenizer of {folder} has no placeholder {', '.join(absent)}")
    return [vocabulary[f"<sp_{level}>"] for level in range(len(sizes))]


def _renamed(tokenizer: PreTrainedTokenizerBase, names: Mapping[str, str]) -> PreTrainedTokenizerBase:
    """The tokenizer with added tokens under other names and the same ids. Its files are the only way to change one."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in Path(folder).glob("*.json"):
            content = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps(_with_names(content, names), ensure_ascii=False), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)


def _with_names(content: Any, names: Mapping[str, str]) -> Any:
    if isinstance(content, dict):
        return {names.get(key, key): _with_names(value, names) for key, value in content.items()}
    if isinstance(content, list):
        return [_with_names(part, names) for part in content]
    return names.get(content, content) if isinstance(content, str) else content


def public_weights(folder: Path, config: NezhaConfig) -> dict[str, Tensor]:
    """Weights under our names. Raises ``ValueError`` listing tensors that are missing, strange or of another shape."""
    stored = _tensors(folder)
    with torch.device("meta"):
        family = next(name for name, kind in CONFIG_CLASSES.items() if isinstance(config, kind))
        shapes = {name: tuple(value.shape) for name, value in MODEL_CLASSES[family](config).state_dict().items()}
    weights, strange = {}, []
    for name, tensor in stored.items():
        ours = our_name(name, config.num_levels)
        if ours is None:
            continue
        if ours in shapes:
            weights[ours] = tensor
        else:
            strange.append(name)
    missing = [name for name in shapes if name not in weights]
    if missing or strange:
        raise ValueError(
            f"{folder}: the weights do not fit config.json; missing: {', '.join(missing[:3]) or 'none'}, "
            f"unknown: {', '.join(strange[:3]) or 'none'}"
        )
    rows = weights["model.embed_tokens.weight"].shape[0]
    if rows != config.vocab_size:
        raise ValueError(f"{folder}: {rows} rows of embeddings, but vocab_size of config.json is {config.vocab_size}")
    wrong = [name for name, shape in shapes.items() if tuple(weights[name].shape) != shape]
    if wrong:
        raise ValueError(
            f"{folder}: {wrong[0]} is {tuple(weights[wrong[0]].shape)}, config.json asks for {shapes[wrong[0]]}"
        )
    return weights


def our_name(name: str, num_levels: int) -> str | None:
    """Our name of a tensor of theirs, None for one that is not used."""
    if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):
        return None
    match = re.fullmatch(r"mtp_head\.(token_emb_list|transition|logit_head_list)\.(\d+)\.(\w+)", name)
    if not match:
        return name
    part, level, rest = match[1], int(match[2]), match[3]
    if part == "logit_head_list":
        return f"draft_head.logit_heads.{level}.{rest}"
    if level == num_levels - 1:
        return None  # nothing follows the last level
    return f"draft_head.{'code_embeddings' if part == 'token_emb_list' else 'cells'}.{level}.{rest}"


def _tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"no weights in {folder}: neither *.safetensors nor pytorch_model*.bin")
    loaded = (torch.load(file, map_location="cpu", weights_only=True) for file in files)
    return {name: tensor for part in loaded for name, tensor in part.items()}


def valid_set(path: Path, codec: SemanticIdCodec) -> np.ndarray:
    """Codes [M, L] of the valid semantic IDs, in the order of the file. Raises ``ValueError``."""
    if not path.is_file():
        raise FileNotFoundError(f"no set of valid semantic IDs at {path}; name it with --valid-set")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is no file of torch.save with a tensor in it: {error}") from None
    if not isinstance(found, Tensor) or found.is_floating_point() or found.dim() != 1 or not len(found):
        shown = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{path} must hold one tensor of integers, one an item, got {shown}")
    integers = found.long().numpy()
    try:
        return codec.decode(integers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}, docid_num of config.json") from None
