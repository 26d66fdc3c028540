"""Give every item of a prepared data set a semantic ID, by residual k-means or an RQ-VAE over its text and its company.

  nezha tokenize data/ml-100k --out data/ml-100k-catalogue
  nezha tokenize data/ml-100k --out data/small --codes 64,64,32 --text tfidf --cooccurrence-weight 2
  nezha tokenize data/beauty --out data/beauty-rqvae --quantizer rqvae
  nezha tokenize data/beauty --out data/beauty-letter --index Beauty.index.json --index-offset 1

Writes the catalogue folder and, beside it, OUT-report.json. Items that share an ID are dealt the last level's codes
anew, so that all differ, as far as the level sizes allow it; with --extra-level one more code tells them apart, with
--keep-shared nothing does. IDs of an index file (LETTER's format) stay as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "a prepared data set -> semantic IDs in a catalogue"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder written by `nezha prepare`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="catalogue folder to write")
    parser.add_argument("--levels", type=int, metavar="L", help="codes an item (default 3, or as many as --codes has)")
    parser.add_argument(
        "--codes",
        metavar="T",
        help="codebook size, or one a level: 256,256,128 (256; with --index the least that holds all codes)",
    )
    parser.add_argument(
        "--quantizer", choices=("kmeans", "rqvae"), default="kmeans", help="how IDs are found (%(default)s)"
    )
    parser.add_argument("--index", type=Path, metavar="FILE", help="take the IDs from it: JSON, item → <a_12> <b_7> …")
    parser.add_argument("--index-offset", type=int, default=0, metavar="N", help="add N to the item IDs in --index")
    parser.add_argument(
        "--text",
        choices=("auto", "minilm", "tfidf", "none"),
        default="auto",
        help="text features: all-MiniLM sentence embeddings, TF-IDF, or none; auto takes MiniLM where it is installed",
    )
    parser.add_argument("--text-weight", type=float, default=0.5, metavar="W", help="weight of the text (%(default)s)")
    parser.add_argument(
        "--cooccurrence-weight", type=float, default=1.0, metavar="W", help="weight of the company (%(default)s)"
    )
    parser.add_argument(
        "--window", type=int, default=20, metavar="N", help="items up to N places apart keep company (%(default)s)"
    )
    parser.add_argument(
        "--dimensions", type=int, default=64, metavar="N", help="width of the co-occurrence features (%(default)s)"
    )
    parser.add_argument(
        "--components",
        type=int,
        default=32,
        metavar="N",
        help="PCA of all features to N numbers; 0: none (%(default)s)",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the report: .svg, .png or .pdf; matplotlib")
    shared = parser.add_mutually_exclusive_group()
    shared.add_argument("--keep-shared", action="store_true", help="leave shared IDs as they were made")
    shared.add_argument("--extra-level", action="store_true", help="tell items of one ID apart by one more level")
    parser.add_argument("--seed", type=int, default=0, help="seed of k-means, RQ-VAE and SVD (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from nezha_vllm import catalogue, folders
    from nezha_vllm.data.dataset import Dataset
    from nezha_vllm.tokenize import build, picture, report
    from nezha_vllm.tokenize.features import FeatureOptions

    if arguments.index_offset and not arguments.index:
        raise ValueError("--index-offset goes with --index")
    sizes = codebook_sizes(arguments.codes or "256", arguments.levels)
    folders.check_replaceable(arguments.out, catalogue.MANIFEST)
    options = FeatureOptions(
        text=arguments.text,
        text_weight=arguments.text_weight,
        cooccurrence_weight=arguments.cooccurrence_weight,
        window=arguments.window,
        dimensions=arguments.dimensions,
        components=arguments.components,
        seed=arguments.seed,
    )
    if arguments.index and arguments.extra_level:
        raise ValueError("--extra-level is for IDs made here; IDs of an index file stay as they are")
    dataset = Dataset.load(arguments.dataset)
    if arguments.index:
        built = build.imported(dataset, sizes if arguments.codes else None, arguments.index, arguments.index_offset)
    else:
        built = build.tokenize(
            dataset,
            sizes,
            options,
            resolve_shared=not arguments.keep_shared,
            add_level=arguments.extra_level,
            quantizer=arguments.quantizer,
        )
    built.catalogue.save(arguments.out)
    path = build.report_path(arguments.out)
    folders.write_atomically(path, built.report_json())

    console = Console()
    neighbours = built.provenance.get("neighbour_prefixes", [])
    console.print(report.table(built.nearest, built.resolved, neighbours))
    if arguments.picture:
        picture.draw(arguments.picture, built.catalogue.codes, built.resolved, neighbours)
    console.print(f"catalogue {built.catalogue.version} -> {arguments.out}, report -> {path}", soft_wrap=True)
    return 0


def codebook_sizes(codes: str, levels: int | None) -> list[int]:
    """``256`` with 3 levels → [256, 256, 256]; ``256,128`` → [256, 128]. Raises ``ValueError``."""
    try:
        sizes = [int(size) for size in codes.split(",")]
    except ValueError:
        raise ValueError(f"--codes takes a size, or sizes with commas, such as 256,256,128; got {codes!r}") from None
    if min(sizes) < 1 or (levels is not None and levels < 1):
        raise ValueError(f"--codes and --levels must be at least 1, got {codes} and {levels}")
    if len(sizes) == 1:
        return sizes * (levels or 3)
    if levels not in (None, len(sizes)):
        raise ValueError(f"--codes names {len(sizes)} levels but --levels says {levels}; leave --levels out")
    return sizes
