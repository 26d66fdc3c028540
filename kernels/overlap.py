"""Programmatic dependent launch: a kernel is set up on the GPU while the one before it still runs.

Every kernel of a sequence calls `begin` before it touches memory, so all of them see what the ones before them wrote.
"""

import torch
import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    _KNOWN = True
except ImportError:  # an older Triton
    _KNOWN = False


def overlaps(device: torch.device) -> bool:
    """Whether launches on this device can overlap: from compute capability 9.0 on."""
    return _KNOWN and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def begin(OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
