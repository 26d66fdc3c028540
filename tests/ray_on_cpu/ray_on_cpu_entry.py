"""Apart, as the platform cannot be imported while vLLM looks for it."""


def platform() -> str:
    return "ray_on_cpu.RayOnCpu"
