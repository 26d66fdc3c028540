"""Checks of what a user names on the command line, before anything slow starts."""

from __future__ import annotations

import socket
from pathlib import Path

from nezha_vllm.cli import UserError


def check_checkpoint(folder: str | Path) -> None:
    """Raise ``UserError`` unless it is a folder with a configuration; vLLM and the plugin check the rest."""
    if not Path(folder, "config.json").is_file():
        raise UserError(
            f"no checkpoint at {folder}: config.json is missing; make one with `nezha train` or `nezha init`"
        )


def check_port_is_free(host: str, port: int) -> None:
    """Raise ``UserError`` if nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port} ({error.strerror}); choose another with --port") from None
