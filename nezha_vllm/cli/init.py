"""Make a NEZHA checkpoint folder: configuration, weights, tokenizer and catalogue.

    nezha init --backbone llama-1b --random-weights nezha-llama1b     the paper's shapes, random, for speed runs
    nezha init --backbone ./Llama-3.2-1B --catalogue catalogue nezha  a local Hugging Face folder, weights kept
    nezha init --backbone tiny --hidden 128 --layers 2 --random-weights small

A local folder keeps its weights and token ids; its tokenizer and embeddings grow by the code tokens and placeholders.
"""

from __future__ import annotations

import argparse

SUMMARY = "make a checkpoint: the paper's shapes with random weights, or from a local Hugging Face folder"
PAPER_ITEMS = 57_288


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to write; replaced if it exists")
    parser.add_argument(
        "--backbone",
        required=True,
        metavar="NAME|PATH",
        help="llama-1b, llama-3b, llama-8b, qwen3-0.6b, qwen3-1.7b, tiny, or a local Hugging Face folder",
    )
    parser.add_argument("--random-weights", action="store_true", help="for a named backbone; nothing is downloaded")
    parser.add_argument("--catalogue", metavar="DIR", help="catalogue folder to put in; its level sizes rule")
    parser.add_argument(
        "--random-items",
        type=int,
        default=PAPER_ITEMS,
        metavar="N",
        help="without --catalogue: size of a random one (default %(default)s)",
    )
    parser.add_argument("--levels", type=int, default=3, help="levels of the random catalogue (default %(default)s)")
    parser.add_argument("--codes", type=int, default=512, help="codes a level of the random one (default %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="of weights and random items (default %(default)s)")
    tiny = parser.add_argument_group("shape of --backbone tiny")
    tiny.add_argument("--family", choices=("llama", "qwen3"), default="llama")
    tiny.add_argument("--hidden", type=int, default=128, help="hidden size (default %(default)s)")
    tiny.add_argument("--layers", type=int, default=2, help="number of layers (default %(default)s)")
    tiny.add_argument("--heads", type=int, default=4, help="attention heads; hidden / heads must be 32, 64, 96 or 128")
    tiny.add_argument("--intermediate", type=int, help="size of the feed-forward layer (default 4 × hidden)")


def run(arguments: argparse.Namespace) -> int:
    import os

    import torch
    from rich.console import Console
    from rich.progress import track

    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.hf.backbones import BACKBONES, tiny_shape
    from nezha_vllm.hf.checkpoint import grown_config, grown_weights, scratch_config, write_checkpoint
    from nezha_vllm.hf.random_catalogue import random_catalogue

    name = arguments.backbone
    named = name == "tiny" or name in BACKBONES
    if named and not arguments.random_weights:
        raise ValueError(f"--backbone {name} has no weights here; add --random-weights, or name a local folder")
    if not named and not os.path.isdir(name):
        raise ValueError(f"--backbone {name}: neither a folder nor one of tiny, {', '.join(BACKBONES)}")
    if not named and arguments.random_weights:
        raise ValueError("--random-weights goes with a named backbone; a local folder keeps its weights")

    if arguments.catalogue:
        catalogue = Catalogue.load(arguments.catalogue)
    else:
        catalogue = random_catalogue(arguments.random_items, [arguments.codes] * arguments.levels, arguments.seed)
    sizes = list(catalogue.codec.codebook_sizes)
    weights = None
    if named:
        shape = BACKBONES.get(name) or tiny_shape(
            arguments.family,
            hidden_size=arguments.hidden,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.heads,
            intermediate_size=arguments.intermediate,
        )
        config, tokenizer = scratch_config(shape, sizes)
    else:
        config, tokenizer, first_new_token = grown_config(name, sizes)
        weights = grown_weights(name, config, first_new_token)
    console = Console(stderr=True)
    write_checkpoint(
        arguments.out,
        config,
        tokenizer,
        catalogue,
        weights=weights,
        dtype=getattr(torch, arguments.dtype),
        seed=arguments.seed,
        track=lambda names: track(names, "writing weights", console=console, total=len(names)),
    )
    console.print(
        f"{arguments.out}: {config.num_hidden_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size:,}"
        f", {catalogue.num_items:,} items on {catalogue.num_ids:,} semantic IDs of sizes {sizes}"
    )
    return 0
