"""Bad input becomes a 400 with the parameter's name: every vLLM version maps ``VLLMValidationError`` to that."""

from __future__ import annotations

from http import HTTPStatus

from vllm.exceptions import VLLMValidationError

from nezha_vllm.catalogue import UnknownItemError

LONGEST_SHOWN = 80  # characters of a client's own value in a message


def bad_request(parameter: str, message: str) -> VLLMValidationError:
    """An error to raise; ``message`` says what is wrong and what to send instead. vLLM adds the parameter's name."""
    return VLLMValidationError(message, parameter=shortened(parameter))


def unavailable(message: str) -> Exception:
    """A 503, for what another try can be spared; where vLLM has no error for it yet, a 500."""
    try:
        from vllm.exceptions import GracefulHTTPError
    except ImportError:
        return RuntimeError(message)
    return GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE)


def unknown_item(parameter: str, error: UnknownItemError) -> VLLMValidationError:
    """An item that is asked for and that the catalogue lacks."""
    return bad_request(
        parameter,
        f"item {shown(error.args[0])} is not in the catalogue; leave it out or publish a catalogue that holds it",
    )


def shown(value: object) -> str:
    """A client's value for a message, which a client's megabytes must not fill."""
    return shortened(repr(value))


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
