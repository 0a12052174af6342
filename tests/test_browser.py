"""A real browser on a real ComfyUI: template browser, Run, progress, preview, and the page after a reload.

Needs ComfyUI (see comfy_host.py), node with npm, and Chromium (``CHROMIUM`` names it when it is not on the path).
Screenshots go to the folder ``DENSEGRPO_ARTEFACTS``, or to pytest's temporary folder.
"""

import json
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
from comfy_host import ROOT
from host_client import host, server  # noqa: F401

SCRIPT = Path(__file__).parent / "web" / "browser.mjs"
MODULES = Path.home() / ".cache" / "densegrpo-browser"
"""playwright-core, installed once and outside the repository; it downloads no browser."""
OURS = "/extensions/ComfyUI-DenseGRPO/"
DOCS = ROOT / "web" / "docs"


class Browser(NamedTuple):
    """What drives the page."""

    node: str
    chromium: str
    modules: Path


@pytest.fixture(scope="module")
def browser():
    tools = {name: shutil.which(name) for name in ("node", "npm")}
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
    missing = [name for name, path in tools.items() if path is None]
    missing += [] if Path(chromium).is_file() else [f"Chromium (not at {chromium}; set CHROMIUM)"]
    if missing:
        pytest.skip(f"the browser test needs {', '.join(missing)}")
    if not (MODULES / "node_modules" / "playwright-core").is_dir():
        MODULES.mkdir(parents=True, exist_ok=True)
        command = [tools["npm"], "install", "--prefix", str(MODULES), "--no-audit", "--no-fund", "playwright-core"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            pytest.skip(f"npm could not install playwright-core into {MODULES}: {done.stderr.strip()[-300:]}")
    return Browser(tools["node"], chromium, MODULES)


@pytest.fixture
def visit(browser, server, tmp_path):  # noqa: F811
    """What browser.mjs saw."""
    pictures = Path(os.environ.get("DENSEGRPO_ARTEFACTS") or tmp_path)
    pictures.mkdir(parents=True, exist_ok=True)
    command = [browser.node, str(SCRIPT), f"http://{server.address}", browser.chromium, str(browser.modules)]
    done = subprocess.run([*command, str(pictures)], capture_output=True, text=True, timeout=540, check=False)
    print("screenshots:", pictures)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.comfy
def test_the_quickstart_runs_from_the_template_browser_and_is_there_again_after_a_reload(visit):
    running, done = visit["running"], visit["done"]
    assert done["end"] == "execution_success", done["error"]
    assert visit["node"] in [node for node, _ in running["progress"]], "no progress on the Train Loop node"
    assert running["previews"] > 0
    assert running["preview"], "the Train Loop node shows no picture while it runs"
    assert not any("not running" in text for text in running["texts"])
    texts = "\n".join(done["texts"])
    assert "quickstart_demo: iteration 2 of 2" in texts
    assert "training reward" in texts
    assert "saved my_demo_lora_00001.safetensors" in texts
    assert any("quickstart_demo: iteration 2 of 2" in text for text in visit["reloaded"]["texts"])
    saved = json.dumps(visit["saved"])
    assert "iteration 2 of 2" not in saved, "texts on nodes do not belong into the saved workflow"
    assert "safetensors" not in saved
    before, lacking, ready = (visit["reward"][name] for name in ("before", "lacking", "ready"))
    assert lacking["text"].splitlines()[1:] == ["get them from somewhere", "package x is not installed"]
    assert visit["reward"]["copied"] == "get them from somewhere"
    assert lacking["height"] >= before["height"] + 4 * 15, "four lines of text, all of them to be seen"
    assert (ready["text"], ready["height"]) == ("ready", lacking["height"] - 3 * 15)
    assert [error for error in visit["errors"] if OURS in error] == []


@pytest.mark.comfy
def test_the_host_serves_a_help_page_for_every_node(server):  # noqa: F811
    ids = [name for name in server.get("/object_info") if name.startswith("DenseGRPO")]
    assert sorted(ids) == sorted(path.stem for path in DOCS.glob("*.md"))
    for node_id in ids:
        with urllib.request.urlopen(f"http://{server.address}{OURS}docs/{node_id}.md", timeout=30) as answer:
            assert answer.read() == (DOCS / f"{node_id}.md").read_bytes()


def test_help_pages_name_every_input_of_their_node():
    catalogue = json.loads((ROOT / "tests" / "golden" / "object_info.json").read_text(encoding="utf-8"))
    for node_id, node in catalogue.items():
        if node_id.startswith("DenseGRPO"):
            page = (DOCS / f"{node_id}.md").read_text(encoding="utf-8")
            inputs = {name for part in node["input"].values() for name in part}
            rows = {word for line in page.splitlines() if line.startswith("| ") for word in names(line)}
            assert inputs <= rows, f"{node_id}.md lacks {', '.join(sorted(inputs - rows))}"


def names(line):
    """What the first cell of a table's row names."""
    return line.split("|")[1].replace(",", " ").split()


def test_scripts_for_the_page_work():
    node = shutil.which("node")
    if node is None:
        pytest.skip("the tests of web/*.js need node")
    command = [node, "--test", str(Path(__file__).parent / "web" / "format.test.js")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
