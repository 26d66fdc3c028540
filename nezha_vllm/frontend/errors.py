"""Bad input becomes a 400 with the parameter's name: every vLLM version maps ``VLLMValidationError`` to that."""

from __future__ import annotations

from http import HTTPStatus

from vllm.exceptions import VLLMValidationError


def bad_request(parameter: str, message: str) -> VLLMValidationError:
    """An error to raise; ``message`` says what is wrong and what to send instead. vLLM adds the parameter's name."""
    return VLLMValidationError(message, parameter=parameter)


def unavailable(message: str) -> Exception:
    """A 503, for what another try can be spared; where vLLM has no error for it yet, a 500."""
    try:
        from vllm.exceptions import GracefulHTTPError
    except ImportError:
        return RuntimeError(message)
    return GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE)
