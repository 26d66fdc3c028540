"""The installed package: entry points, versions, and a folder called ``kernels`` that gets in nobody's way."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import nezha_vllm

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_entry_points_lead_to_the_plugin_and_the_command() -> None:
    plugin = next(entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "nezha")
    command = next(entry for entry in entry_points(group="console_scripts") if entry.name == "nezha")
    assert plugin.load() is nezha_vllm.register
    assert command.value == "nezha_vllm.cli:main"


def test_versions_agree() -> None:
    assert version("nezha-vllm") == nezha_vllm.__version__
    assert f"## {nezha_vllm.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_kernels_is_importable_under_its_own_name_only(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, nezha_vllm.kernels as k; print(k.__file__); "
        "s = u.find_spec('kernels'); print(s.origin if s else None)"
    )
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    ours, top = result.stdout.splitlines()
    assert top == "None" or not Path(top).is_relative_to(ROOT / "kernels"), "a top-level `kernels` is installed"
    assert Path(ours).name == "__init__.py"


def test_a_checkout_that_is_imported_from_where_it_lies_has_its_kernels() -> None:
    """`python -m benchmarks.quality` in a clone, say, after `pip install .`; without -S an editable one would help."""
    code = "import importlib.util as u; print(u.find_spec('nezha_vllm.kernels.score').origin)"
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, env=own, capture_output=True, text=True)
    assert result.stdout.strip() == str(ROOT / "kernels" / "score.py"), result.stderr


def test_an_installation_has_the_kernels_themselves(tmp_path: Path) -> None:
    argv = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, timeout=120)
    built = tmp_path / "lib" / "nezha_vllm" / "kernels"
    sources = {path.name: path.read_bytes() for path in (ROOT / "kernels").glob("*.py")}
    assert {path.name: path.read_bytes() for path in built.glob("*.py")} == sources


def test_transformers_finds_its_hub_kernels_from_the_repository_root() -> None:
    result = run_python("import sys; sys.path.insert(0, ''); import transformers.integrations.hub_kernels", ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("installed", [True, False])
def test_kernels_gives_way_to_the_hugging_face_package(tmp_path: Path, installed: bool) -> None:
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("from kernels.layer import Layer\n")
        (tmp_path / "kernels" / "layer.py").write_text("class Layer: pass\n")
    code = (
        f"import sys; sys.path[:0] = ['', {str(tmp_path)!r}]\n"
        "import kernels; print(hasattr(kernels, 'Layer'))\n"
        "import nezha_vllm.kernels as ours; print(ours is kernels)"
    )
    result = run_python(code, ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(installed), "False"]


def test_examples_are_python_that_compiles() -> None:
    for path in sorted((ROOT / "examples").glob("*.py")):
        ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_readme_names_the_two_commands() -> None:
    assert "```\nmake demo\nmake test\n```" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_documents_link_only_to_files_and_headings_that_exist() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")]
    local = [
        (document, *link.partition("#")[::2])
        for document in documents
        for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8"))
        if not link.startswith("http")
    ]
    assert any(heading for _, _, heading in local)
    for document, file, heading in local:
        target = document.parent / file if file else document
        assert target.exists(), f"{document.name} links to {file}"
        assert not heading or heading in headings(target), f"{document.name} links to {file}#{heading}"


def headings(document: Path) -> set[str]:
    """As a link names them: lower case, hyphens for blanks, no other punctuation."""
    lines = document.read_text(encoding="utf-8").splitlines()
    titles = (line.lstrip("#").strip().lower() for line in lines if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def test_no_file_is_two_ideas() -> None:
    sources = [path for folder in ("nezha_vllm", "kernels", "tests") for path in (ROOT / folder).rglob("*.py")]
    long = {
        str(path.relative_to(ROOT)): count for path in sources if (count := len(path.read_bytes().splitlines())) > 400
    }
    assert long == {}
