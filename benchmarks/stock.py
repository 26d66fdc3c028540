"""The peers' checkpoint: the backbone of a NEZHA checkpoint as an ordinary Llama or Qwen3, with the same weights.

python -m benchmarks.stock nezha-llama1b stock-llama1b
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors import safe_open

from nezha_vllm.folders import replacing
from nezha_vllm.hf.streamed import write_safetensors

ARCHITECTURES = {"nezha_llama": ("llama", "LlamaForCausalLM"), "nezha_qwen3": ("qwen3", "Qwen3ForCausalLM")}
NOT_THEIRS = {"codebook_sizes", "code_token_offsets", "placeholder_token_ids", "catalogue", "beam_width"}
NOT_THEIRS |= {"max_beam_width", "validity", "auto_map"}


def stock_checkpoint(checkpoint: str | Path, out: str | Path) -> Path:
    """Write ``out`` unless it is there already: backbone, tied output layer, tokenizer; no draft head, no catalogue.

    Raises ``ValueError`` for a folder that is no NEZHA checkpoint.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if (out / "config.json").is_file():
        return out
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] not in ARCHITECTURES:
        raise ValueError(f"{checkpoint} has a model of type {config['model_type']!r}, not one of {list(ARCHITECTURES)}")
    model_type, architecture = ARCHITECTURES[config["model_type"]]
    stock = {name: value for name, value in config.items() if name not in NOT_THEIRS}
    stock |= {"model_type": model_type, "architectures": [architecture], "tie_word_embeddings": True}
    with replacing(out, "config.json") as scratch:
        with safe_open(checkpoint / "model.safetensors", "pt") as weights:
            names = [name for name in weights.keys() if name.startswith("model.")]  # noqa: SIM118, not a dict
            shapes = {name: weights.get_slice(name).get_shape() for name in names}
            dtype = weights.get_tensor("model.norm.weight").dtype
            write_safetensors(scratch / "model.safetensors", shapes, dtype, weights.get_tensor)
        (scratch / "config.json").write_text(json.dumps(stock, indent=2) + "\n", encoding="utf-8")
        for file in checkpoint.glob("*token*"):
            shutil.copy(file, scratch)
    return out


def beside(checkpoint: str | Path) -> Path:
    """Where the peers of a checkpoint look for theirs."""
    folder = Path(checkpoint).absolute()
    return folder.with_name(f"{folder.name}-stock")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    arguments = parser.parse_args()
    print(stock_checkpoint(arguments.checkpoint, arguments.out))
