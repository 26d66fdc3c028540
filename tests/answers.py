"""Comparing ranked answers that come from different paths through the code."""

from __future__ import annotations

from collections.abc import Sequence

TOLERANCE = 1e-4  # on scores, in float32: design of the project

Ranking = Sequence[tuple[str, float]]


def assert_same_answer(found: Ranking, expected: Ranking, tolerance: float = TOLERANCE) -> None:
    """Scores agree rank by rank, and so do items wherever the expected scores are further apart than the tolerance."""
    assert len(found) == len(expected)
    for rank, ((item, score), (other, reference)) in enumerate(zip(found, expected, strict=True)):
        assert abs(score - reference) <= tolerance, f"rank {rank}: {item} {score} against {other} {reference}"
        if item != other:
            near = {name for name, value in expected if abs(value - reference) <= 2 * tolerance}
            at_the_end = abs(expected[-1][1] - reference) <= 2 * tolerance
            assert item in near or at_the_end, f"rank {rank}: {item} is not among the items tied with {other}"


def of_output(output: object) -> list[tuple[str, float]]:
    """Ranking of a vLLM ``RequestOutput``."""
    return [(item.text, item.cumulative_logprob) for item in output.outputs]  # type: ignore[attr-defined]


def of_completion(completion: object, prompt: int = 0, n: int | None = None) -> list[tuple[str, float]]:
    """Ranking of one prompt of an OpenAI ``Completion``."""
    choices = completion.choices  # type: ignore[attr-defined]
    n = n or len(choices)
    return [(choice.text, choice.score) for choice in choices if choice.index // n == prompt]
