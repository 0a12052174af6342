"""Who may import whom. Read the table as documentation."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# top-level folder -> sibling folders it may import
ALLOWED = {"engine": set(), "nodes": {"engine"}}
COMFY = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "server", "nodes", "execution"}
COMFY_FILES = "engine/models/comfy*.py"
FILES = sorted(p for folder in ALLOWED for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path):
    relative = path.relative_to(ROOT)
    folder, depth = relative.parts[0], len(relative.parts) - 1
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level > depth:
            sibling = (node.module or "").split(".")[0]
            assert sibling in ALLOWED[folder], f"{relative}:{node.lineno} {folder} may not import {sibling}"
        names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            top = (name or "").split(".")[0]
            assert top not in {"engine", "densegrpo"}, f"{relative}:{node.lineno} use a relative import"
            assert folder != "nodes" or top != "torch", f"{relative}:{node.lineno} math belongs in the engine"
            if folder == "engine" and not relative.match(COMFY_FILES):
                assert top not in COMFY, f"{relative}:{node.lineno} the engine must run without ComfyUI"


def test_every_package_is_listed_in_pyproject():
    """Setuptools cannot discover packages when the root is the package."""
    folders = {p.parent.relative_to(ROOT) for f in ALLOWED for p in (ROOT / f).rglob("__init__.py")}
    expected = {"densegrpo"} | {".".join(("densegrpo", *f.parts)) for f in folders}
    listed = (ROOT / "pyproject.toml").read_text().split("packages = [")[1].split("]")[0]
    assert {line.strip(' ",') for line in listed.split("\n") if line.strip()} == expected
