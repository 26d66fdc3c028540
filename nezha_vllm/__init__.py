"""NEZHA generative recommendation on an unmodified vLLM."""

__version__ = "0.1.0"


def register() -> None:
    """vLLM's plugin entry point (group ``vllm.general_plugins``), called once in every vLLM process."""
    from nezha_vllm.engine.registration import register_with_vllm

    register_with_vllm()
