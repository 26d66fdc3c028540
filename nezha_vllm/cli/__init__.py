"""The ``nezha`` command: one module a verb, each with ``SUMMARY``, ``add_arguments(parser)`` and ``run(arguments)``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

VERBS = (
    "prepare",
    "tokenize",
    "train",
    "evaluate",
    "init",
    "convert",
    "catalogue",
    "serve",
    "recommend",
    "batch",
    "plan",
    "status",
    "demo",
)


class UserError(Exception):
    """Something the user can mend; printed as one line, without a traceback."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; a parsed result has ``verb`` and ``run``."""
    parser = argparse.ArgumentParser(
        prog="nezha",
        description="NEZHA generative recommendation on vLLM: interaction logs in, ranked catalogue items out.",
        epilog="The verbs in the order of use: prepare, tokenize, train, evaluate, serve, recommend, batch, plan. "
        "`nezha VERB --help` explains each.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in VERBS:
        module = import_module(f"nezha_vllm.cli.{name}")
        verb = verbs.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    parser = build_parser()
    arguments, more = parser.parse_known_args(argv)
    if more and not getattr(arguments, "passes_arguments_on", False):
        parser.error(f"unknown arguments for `nezha {arguments.verb}`: {' '.join(more)}")
    arguments.more = more
    try:
        return arguments.run(arguments) or 0
    except (UserError, ValueError, FileNotFoundError) as error:
        print(f"nezha {arguments.verb}: {error}", file=sys.stderr)
        return 2
    except KeyError as error:
        from nezha_vllm.item_index import UnknownItemError

        if not isinstance(error, UnknownItemError):
            raise
        print(f"nezha {arguments.verb}: {error}; make data set and catalogue of the same items", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nnezha {arguments.verb}: stopped; run it again to go on", file=sys.stderr)
        return 130
