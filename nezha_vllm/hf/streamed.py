"""A safetensors file written one tensor at a time: a 3B checkpoint is made with the memory of its largest tensor."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_safetensors(
    path: str | os.PathLike[str],
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    make: Callable[[str], Tensor],
    track: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> None:
    """Write ``make(name)`` for each name of ``shapes``, cast to ``dtype``.

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
        for name in track(list(shapes)):
            tensor = make(name).to(dtype).contiguous()
            if tuple(tensor.shape) != tuple(shapes[name]):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shapes[name])}")
            file.write(memoryview(tensor.view(torch.uint8).reshape(-1).numpy()))
