"""A safetensors file written tensor by tensor: a checkpoint is made with the memory of its largest tensors."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_safetensors(
    path: str | os.PathLike[str],
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    make: Callable[[str], Tensor],
    track: Callable[[Sequence[str]], Iterable[str]] = iter,
    threads: int = 1,
) -> None:
    """Write ``make(name)`` for each name of ``shapes``, cast to ``dtype``.

    So many ``threads`` call ``make`` at once, and so many tensors are in memory, and one that is written.
    ``track`` wraps the names, for a progress bar. Raises ``ValueError`` if a tensor comes out in another shape.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, made in zip(track(list(shapes)), _ahead(make, list(shapes), threads), strict=True):
            tensor = made.to(dtype).contiguous()
            if tuple(tensor.shape) != tuple(shapes[name]):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shapes[name])}")
            file.write(memoryview(tensor.view(torch.uint8).reshape(-1).numpy()))


def _ahead(make: Callable[[str], Tensor], names: Sequence[str], threads: int) -> Iterator[Tensor]:
    """In the order of ``names``, made by ``threads`` threads in advance."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Tensor]] = deque()
        for name in names:
            waiting.append(pool.submit(make, name))
            if len(waiting) == threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
