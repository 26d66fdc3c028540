"""What SECURITY.md promises of the code itself: nothing that is read can run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNS_WHAT_IT_READS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
FILES = [
    file for folder in ("nezha_vllm", "kernels", "examples", "benchmarks") for file in (ROOT / folder).rglob("*.py")
]


def misuses(source: str) -> list[str]:
    """Lines that read a format in which code can hide, or evaluate text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if RUNS_WHAT_IT_READS.intersection(name.split(".")[0] for name in names):
            found.append(ast.unparse(node))
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load" and options.get("weights_only") != "True":
            found.append(ast.unparse(node))
        if called in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system", "pd.read_pickle"):
            found.append(ast.unparse(node))
        if "True" in (options.get("allow_pickle"), options.get("shell"), options.get("trust_remote_code")):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_read_in_a_format_that_can_run(file: Path) -> None:
    assert misuses(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "import torch; torch.load('x')", "eval('1')",
        "torch.load('x', weights_only=False)", "np.load('x', allow_pickle=True)", "subprocess.run('ls', shell=True)",
    ],
)  # fmt: skip
def test_misuse_is_seen(source: str) -> None:
    assert misuses(source)


def test_weights_that_are_read_from_pickles_are_those_of_nezha_convert() -> None:
    """The public code's format; ``weights_only`` builds tensors and calls nothing else."""
    users = [file.name for file in FILES if "torch.load(" in file.read_text(encoding="utf-8")]
    assert users == ["public_format.py"]
