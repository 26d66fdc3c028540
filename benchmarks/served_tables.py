"""Markdown of ``latency.csv`` and ``throughput.csv``."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.markdown import NAMES, by, number, origin, systems_of, table, whole
from benchmarks.rows import Row

BOUND_MS = 30.0


def latency(rows: Sequence[Row], transport: str) -> str:
    """p50 and p99 of one request at a time: a line a prompt size and beam width, a pair of columns a system."""
    rows = [row for row in rows if row.transport == transport and row.load != "batch"]
    return "\n\n".join(_latency_of(model, found) for model, found in by(rows, "model"))


def _latency_of(model: str, rows: list[Row]) -> str:
    wide = [row for row in rows if row.system != "vllm-one-token"]
    systems = systems_of(wide)
    compared = {"nezha", "vllm-beam"} <= set(systems)
    heads = ["prompt tokens", "beam width", "items"]
    heads += [head for name in systems for head in (f"{NAMES[name]} p50", "p99")]
    lines = []
    for (prompt, width), cell in by(wide, "prompt_tokens", "beam_width"):
        ours = [row for row in cell if row.system.endswith("nezha")]
        for n in sorted({row.n or 0 for row in ours or cell}):
            # peers return all K beams, whatever we were asked for
            chosen = {row.system: row for row in cell if row.n == n or row not in ours}
            line = whole(prompt, width, n)
            for name in systems:
                row = chosen.get(name)
                line += [number(row.p50_ms, 2), number(row.p99_ms, 2)] if row else ["", ""]
            lines.append([*line, _apart(chosen)] if compared else line)
    text = f"**{model}**, milliseconds\n\n{table([*heads, 'p50 apart'] if compared else heads, lines)}"
    for row in rows:
        if row.system == "vllm-one-token" and row.p50_ms is not None:
            text += f"\n\nThe same vLLM, one token behind the same prompt ({row.prompt_tokens:,} tokens), no beams: "
            text += f"p50 {number(row.p50_ms, 2)}, p99 {number(row.p99_ms, 2)}."
    return f"{text}\n\n{origin(rows)}"


def _apart(chosen: dict[str, Row]) -> str:
    ours, theirs = (chosen[name].p50_ms if name in chosen else None for name in ("nezha", "vllm-beam"))
    return f"{theirs / ours:.1f} ×" if ours and theirs else ""


def throughput(rows: Sequence[Row]) -> str:
    """Over HTTP: most requests/s of the closed loop, and most with a bounded p99 of either loop."""
    rows = [row for row in rows if row.transport == "http" and row.requests_per_s is not None]
    heads = ["system", "prompt tokens", "beam width", "items", "most req/s", "clients", "p50 ms", "p99 ms"]
    heads += [f"req/s, p99 ≤ {BOUND_MS:g} ms", "Poisson arrivals, same bound"]
    texts = []
    for model, found in by(rows, "model"):
        lines = []
        for (prompt, width, n), cell in by(found, "prompt_tokens", "beam_width", "n"):
            for name in systems_of(cell):
                closed, opened = (
                    [r for r in cell if r.system == name and r.load == load] for load in ("closed", "open")
                )
                if closed:
                    best = max(closed, key=lambda row: row.requests_per_s or 0)
                    line = [
                        NAMES[name],
                        *whole(prompt, width, n),
                        number(best.requests_per_s),
                        *whole(best.concurrency),
                    ]
                    line += [number(best.p50_ms), number(best.p99_ms), number(bounded(closed)), number(bounded(opened))]
                    lines.append(line)
        texts.append(f"**{model}**\n\n{table(heads, lines, left=1)}\n\n{origin(found)}")
    return "\n\n".join(texts)


def bounded(rows: Sequence[Row], p99_ms: float = BOUND_MS) -> float | None:
    """Most requests/s without an error and with p99 within the bound."""
    kept = [row for row in rows if row.p99_ms is not None and row.p99_ms <= p99_ms and not row.errors]
    return max((row.requests_per_s or 0 for row in kept), default=None)


def summary(one: Sequence[Row], many: Sequence[Row], model: str = "llama-1b", prompt: int = 128) -> str:
    """What README shows of one model over HTTP: NEZHA as it is by default, wide and narrow, and stock vLLM.

    ``one``: rows of latency; ``many``: of throughput, where NEZHA's narrow search has K = 50. Empty without NEZHA's.
    """
    by_default = f"{model}, async scheduling"  # older rows without that label are of servers without it
    label = by_default if any(row.model == by_default for row in one) else model
    columns = [
        ("NEZHA, K = 512", "nezha", label, 512, 512),
        ("NEZHA, K = 10", "nezha", label, 10, 50),
        ("vLLM beam search, K = 10", "vllm-beam", model, 10, 10),
        ("vLLM, one token, no beams", "vllm-one-token", model, 1, 1),
    ]
    used: list[Row] = []
    lines: list[list[str]] = [["one client, p50"], ["most requests/s"], [f"with p99 ≤ {BOUND_MS:g} ms"]]
    for _, system, name, width, wide in columns:
        same = {"system": system, "model": name, "prompt_tokens": prompt, "transport": "http"}
        alone = [
            row for row in _having(one, **same, beam_width=width) if row.load != "batch" and row.p50_ms is not None
        ]
        loop = [row for row in _having(many, **same, beam_width=wide, load="closed") if row.requests_per_s is not None]
        used += alone + loop
        note = f"K = {wide}: " if wide != width else ""
        lines[0].append(f"{number(alone[-1].p50_ms)} ms" if alone else "–")
        lines[1].append(note + number(max(row.requests_per_s or 0 for row in loop), 0) if loop else "–")
        best = bounded(loop)
        lines[2].append("–" if best is None else note + number(best, 0))
    if not any(row.system == "nezha" for row in used):
        return ""
    heads = ["", *(head for head, *_ in columns)]
    return f"{table(heads, lines, left=1)}\n\n{origin(sorted(used, key=lambda row: row.date))}"


def _having(rows: Sequence[Row], **columns: object) -> list[Row]:
    return [row for row in rows if all(getattr(row, name) == value for name, value in columns.items())]


def batches(rows: Sequence[Row]) -> str:
    """Offline: requests/s of prompts handed over in one call."""
    rows = [row for row in rows if row.load == "batch" and row.requests_per_s is not None]
    texts = []
    for (model, transport), found in by(rows, "model", "transport"):
        systems = systems_of(found)
        lines = []
        for key, cell in by(found, "prompt_tokens", "beam_width", "concurrency"):
            speeds = {row.system: row.requests_per_s for row in cell}
            lines.append([*whole(*key), *(number(speeds[name]) if name in speeds else "" for name in systems)])
        heads = ["prompt tokens", "beam width", "prompts a call", *(f"{NAMES[name]}, req/s" for name in systems)]
        texts.append(f"**{model}**, {transport}\n\n{table(heads, lines)}\n\n{origin(found)}")
    return "\n\n".join(texts)


def agreement(rows: Sequence[Row]) -> str:
    """What two settings of the engine rank alike, a line a model and cell."""
    heads = ["model", "prompt tokens", "beam width", "items", "prompts", "shares that both have"]
    lines = [
        [row.model, *whole(row.prompt_tokens, row.beam_width, row.n, row.requests), row.note]
        for row in rows
        if row.note
    ]
    return f"{table(heads, lines, left=1)}\n\n{origin(rows)}" if lines else ""
