"""The two ends of a training run: the model it starts from, the checkpoint folder it leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.config import AUTOREGRESSIVE, CONFIG_CLASSES
from nezha_vllm.folders import replacing
from nezha_vllm.hf.backbones import tiny_shape
from nezha_vllm.hf.checkpoint import grown_config, grown_weights, scratch_config
from nezha_vllm.hf.modeling import MODEL_CLASSES, register_models
from nezha_vllm.hf.prompt import prefix_token_ids
from nezha_vllm.hf.recommend import check_catalogue
from nezha_vllm.training.evaluation import Trained
from nezha_vllm.training.options import TrainingOptions

if TYPE_CHECKING:
    from nezha_vllm.training.evaluation import NezhaModel

TRAINING_NOTE = "training.json"


def starting_model(
    backbone: str,
    catalogue: Catalogue,
    shape: Any,
    seed: int,
    method: str | None = None,
    softmax: str | None = None,
    short_histories: bool | None = None,
) -> tuple[NezhaModel, PreTrainedTokenizerBase, torch.dtype]:
    """Model in float32, tokenizer, and the precision to save in.

    Args:
        backbone: ``scratch``, a local Hugging Face folder, or a NEZHA checkpoint.
        shape: ``family``, ``hidden``, ``layers``, ``heads`` and ``intermediate`` of a model from scratch.
        method: one of ``config.METHODS``; None is ``nezha``, or a NEZHA checkpoint's own.
        softmax: one of ``config.SOFTMAX_OVER``; None is ``codes``, or a NEZHA checkpoint's own.
        short_histories: what was asked for; a checkpoint with item tokens has its own, and is refused for another.
    """
    register_models()
    torch.manual_seed(seed)
    sizes = list(catalogue.codec.codebook_sizes)
    if backbone == "scratch":
        config, tokenizer = scratch_config(
            tiny_shape(
                shape.family,
                hidden_size=shape.hidden,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                intermediate_size=shape.intermediate,
            ),
            sizes,
        )
        config.method, config.softmax = method or "nezha", softmax or config.softmax
        return MODEL_CLASSES[shape.family](config), tokenizer, torch.float32
    if not (Path(backbone) / "config.json").is_file():
        raise ValueError(f"--backbone {backbone}: neither `scratch` nor a folder with a config.json")
    stored: Any = AutoConfig.from_pretrained(backbone)
    saved_dtype = stored.dtype if isinstance(stored.dtype, torch.dtype) else torch.float32
    if type(stored) in CONFIG_CLASSES.values():
        check_catalogue(stored, catalogue)
        if method not in (None, stored.method):
            raise ValueError(f"--backbone {backbone} is a checkpoint of {stored.method}: leave --method {method} out")
        if softmax not in (None, stored.softmax):
            raise ValueError(
                f"--backbone {backbone} is a checkpoint with a softmax over {stored.softmax}: leave --softmax out"
            )
        if stored.num_item_tokens and short_histories not in (None, stored.short_histories):
            has, asked = ("short", "no-short") if stored.short_histories else ("no short", "short")
            raise ValueError(
                f"--backbone {backbone} is a checkpoint with {has} histories: leave --{asked}-histories out"
            )
        model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(backbone), saved_dtype
    if method == AUTOREGRESSIVE and not stored.tie_word_embeddings:
        raise ValueError(
            f"--backbone {backbone}: --method {AUTOREGRESSIVE} reads the next token from the embeddings, but this "
            "model's output layer is another; use a backbone with tied embeddings, such as Llama 3.2 1B or Qwen3 0.6B"
        )
    config, tokenizer, first_new_token = grown_config(backbone, sizes)
    config.dtype, config.method, config.softmax = torch.float32, method or "nezha", softmax or config.softmax
    model = MODEL_CLASSES[stored.model_type](config)
    missing, unexpected = model.load_state_dict(grown_weights(backbone, config, first_new_token), strict=False)
    strange = [*unexpected, *(name for name in missing if not name.startswith("draft_head."))]
    if strange:
        raise ValueError(f"{backbone}: weights that do not fit its architecture: {strange[:3]}")
    return model, tokenizer, saved_dtype


def save_trained(
    folder: Path,
    model: NezhaModel,
    tokenizer: PreTrainedTokenizerBase,
    catalogue: Catalogue,
    dtype: torch.dtype,
    options: TrainingOptions,
    seconds: float | None = None,
    validations: Sequence[Sequence[float]] = (),
) -> None:
    """Write the checkpoint folder; it appears complete or not at all.

    ``training.json`` keeps the options, the model's method, softmax, number of item tokens, whether they shorten
    histories, weight of their scores and shape, the ``seconds`` that training took and until when, and the
    ``validations``: epoch, loss and NDCG@10 of each.
    """
    note = asdict(options) | {
        "method": model.config.method,
        "softmax": model.config.softmax,
        "item_tokens": model.config.num_item_tokens,
        "short_histories": model.config.short_histories,
        "item_score_weight": model.config.item_score_weight,
        "family": next(name for name, kind in CONFIG_CLASSES.items() if isinstance(model.config, kind)),
        "hidden": model.config.hidden_size,
        "layers": model.config.num_hidden_layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_seconds": seconds,
        "trained_until": datetime.now(UTC).isoformat(timespec="seconds"),
        "validations": [list(one) for one in validations],
    }
    with replacing(folder, "config.json") as scratch:
        weights: Any = model.to(dtype=dtype)  # type: ignore[call-arg]
        weights.save_pretrained(scratch, max_shard_size="1TB")
        tokenizer.save_pretrained(scratch)
        catalogue.save(scratch / model.config.catalogue)
        (scratch / TRAINING_NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def load_trained(folder: Path) -> Trained:
    """A checkpoint folder, on the GPU where there is one."""
    register_models()
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return Trained(
        Path(folder).name,
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        Catalogue.load(Path(folder) / model.config.catalogue),
        trained_history(folder),
        prefix_token_ids(AutoTokenizer.from_pretrained(folder), model.config),
        training_note(folder),
    )


def training_note(folder: Path) -> dict[str, Any]:
    """The options that a checkpoint was trained with; empty if it was not trained here."""
    note = Path(folder) / TRAINING_NOTE
    return json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}


def trained_history(folder: Path) -> int:
    """Items of history that a checkpoint was trained with."""
    return int(training_note(folder).get("max_history", TrainingOptions.max_history))
