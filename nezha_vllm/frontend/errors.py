"""Bad input becomes a 400 with the parameter's name: every vLLM version maps ``VLLMValidationError`` to that."""

from __future__ import annotations

from vllm.exceptions import VLLMValidationError


def bad_request(parameter: str, message: str) -> VLLMValidationError:
    """An error to raise; ``message`` says what is wrong and what to send instead. vLLM adds the parameter's name."""
    return VLLMValidationError(message, parameter=parameter)
