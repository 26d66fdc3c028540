"""Triton kernels, installed as ``nezha_vllm.kernels``. They know tensors only: no vLLM, no transformers."""

# Python started in the repository's root sees this folder as a top-level `kernels`, the name of a Hugging Face package
# that transformers imports when it is installed. Then the import goes on to that package.
if __name__ == "kernels":
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry).resolve() != _root])
    if _spec is not None and _spec.loader is not None:
        sys.modules["kernels"] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
