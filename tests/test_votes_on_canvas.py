"""Somebody votes in the page of a real ComfyUI: by mouse and keys, after a reload, in a second tab, until told to stop.

Needs what test_browser.py needs. Screenshots go to the folder ``DENSEGRPO_ARTEFACTS``, or to pytest's temporary folder.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from comfy_host import ROOT
from host_client import host, server  # noqa: F401
from PIL import Image
from test_browser import OURS, browser  # noqa: F401

SCRIPT = Path(__file__).parent / "web" / "votes_on_canvas.mjs"
WORKFLOW = ROOT / "workflows" / "human_votes.json"


def brightness(path):
    """Of an image file."""
    return float(np.asarray(Image.open(path).convert("RGB"), dtype=float).mean())


def votes_of(run):
    """Its answers, in order."""
    return [json.loads(line) for line in (run / "votes" / "votes.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.comfy
def test_votes_in_the_page_train_a_lora_and_stop_is_cancel(browser, server, tmp_path):  # noqa: F811
    pictures = Path(os.environ.get("DENSEGRPO_ARTEFACTS") or tmp_path)
    pictures.mkdir(parents=True, exist_ok=True)
    command = [browser.node, str(SCRIPT), f"http://{server.address}", browser.chromium, str(browser.modules)]
    command += [str(pictures), str(WORKFLOW)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    print("screenshots:", pictures)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])

    assert seen["voted"] == "execution_success"
    assert seen["waiting"].endswith(" left"), "after a reload the page knows that the run goes on"
    assert any("canvas: iteration 3 of 3" in text for text in seen["texts"])
    votes = votes_of(server.runs / "canvas")
    assert [vote["iteration"] for vote in votes] == [1, 2, 3]
    assert [vote["ballot"] is None for vote in votes] == [False, False, True]
    assert len({vote["voter"] for vote in votes}) == 1, "a reload and a second tab do not make another person"
    for vote in votes[:2]:
        bright = {name: brightness(server.runs / "canvas/votes/images" / f"{name}.png") for name in vote["images"]}
        assert vote["ballot"]["likes"] == [min(bright, key=lambda name: bright[name])]
    first, second, third = server.metrics("canvas")[1:]
    assert (first["masked"], first["unscored"]) == (second["masked"], second["unscored"]) == (0, 0)
    assert (third["masked"], third["unscored"], third["skipped"]) == (1, 0, 1), "a skipped group teaches nothing"
    assert (server.runs / "canvas" / "lora.safetensors").is_file()
    assert list((server.base / "models" / "loras").glob("my_human_votes_*.safetensors"))

    assert seen["stopped"] == seen["cancelled"] == "execution_interrupted"
    assert any(text.endswith("to go on: run_name canvas_stopped, resume on") for text in seen["goOn"])
    assert not any("left" in text for text in seen["goOn"]), "nothing runs any more"
    assert seen["resumed"] == "execution_success"
    assert [vote["iteration"] for vote in votes_of(server.runs / "canvas_stopped")] == [1, 2]
    assert [row["iteration"] for row in server.metrics("canvas_stopped")] == [0, 1, 2]
    assert [error for error in seen["errors"] if OURS in error] == []
