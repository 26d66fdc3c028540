"""Bad input becomes a 400 with the parameter's name: ``VLLMValidationError`` is what every vLLM version maps to that."""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError


def bad_request(parameter: str, message: str, value: Any = None) -> VLLMValidationError:
    """An error to raise; ``message`` says what is wrong and what to send instead."""
    return VLLMValidationError(f"{parameter}: {message}", parameter=parameter, value=value)
