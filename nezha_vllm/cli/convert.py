"""Turn a checkpoint of the public NEZHA code into a checkpoint folder of this project.

    nezha convert WWW2026-checkpoint --out nezha
    nezha convert WWW2026-checkpoint --valid-set data/ava_sid3.pt --index Beauty.index.json --out nezha

Reads config.json, weights, tokenizer and the set of valid semantic IDs. That set knows no item IDs: they come from an
index file (item → <a_12> <b_7> …) where there is one; without, an item's ID is the integer of its semantic ID.
"""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "a checkpoint of the public NEZHA code -> one of ours"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="PUBLIC", help="folder of the public code")
    parser.add_argument("--out", type=Path, required=True, metavar="CKPT", help="checkpoint folder to write or replace")
    parser.add_argument("--valid-set", type=Path, metavar="FILE", help="default ava_sid3.pt in PUBLIC")
    parser.add_argument("--index", type=Path, metavar="FILE", help="item IDs: JSON, item → list of code tokens")
    parser.add_argument("--index-offset", type=int, default=0, metavar="N", help="add N to the item IDs in --index")


def run(arguments: argparse.Namespace) -> int:
    from nezha_vllm.folders import check_replaceable

    check_replaceable(arguments.out, "config.json")

    from rich.console import Console

    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.hf.checkpoint import write_checkpoint
    from nezha_vllm.hf.public_format import VALID_SET, public_config, public_weights, valid_set
    from nezha_vllm.tokenize.index_files import read_index

    config, tokenizer = public_config(arguments.checkpoint)
    path = arguments.valid_set or arguments.checkpoint / VALID_SET
    codes = valid_set(path, config.codec)
    integers = config.codec.encode(codes)
    if arguments.index:
        item_ids, item_codes = read_index(arguments.index, arguments.index_offset)
        known = set(integers.tolist())
        stray = [
            item
            for item, integer in zip(item_ids, config.codec.encode(item_codes), strict=True)
            if int(integer) not in known
        ]
        if stray:
            raise ValueError(
                f"{len(stray):,} items of {arguments.index} have semantic IDs that {path} lacks, such as item "
                f"{stray[0]!r}; take both from one run of the public code"
            )
    else:
        distinct = sorted(set(integers.tolist()))
        item_ids, item_codes = [str(integer) for integer in distinct], config.codec.decode(distinct)
    catalogue = Catalogue.build(item_ids, item_codes, config.codebook_sizes)
    weights = public_weights(arguments.checkpoint, config)
    dtype = weights["model.embed_tokens.weight"].dtype
    write_checkpoint(arguments.out, config, tokenizer, catalogue, weights=weights, dtype=dtype)
    console = Console(stderr=True)
    unnamed = len(set(integers.tolist())) - catalogue.num_ids
    if unnamed:
        console.print(
            f"{unnamed:,} semantic IDs of {path} have no item in {arguments.index} and are left out",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"{arguments.out}: {config.num_hidden_layers} layers of {config.hidden_size}, {catalogue.num_items:,} items on "
        f"{catalogue.num_ids:,} semantic IDs of sizes {config.codebook_sizes}",
        highlight=False,
        soft_wrap=True,
    )
    return 0
