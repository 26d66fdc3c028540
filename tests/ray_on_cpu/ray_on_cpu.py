"""A platform plugin of vLLM: its CPU platform, for which Ray's GPUs, numbers that a node may claim, stand for workers.

vLLM 0.32 gives its CPU platform no Ray resource, and its Ray executors refuse it for that alone.
"""

from vllm.platforms.cpu import CpuPlatform


class RayOnCpu(CpuPlatform):
    ray_device_key = "GPU"
