"""Make ``import densegrpo`` work from a bare checkout, exactly as ComfyUI would import it."""

import importlib.util
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(Path(__file__).resolve().parent))  # for gaussian_flow.py and its like

torch.set_num_threads(1)  # two cores, two test processes

if importlib.util.find_spec("densegrpo") is None:
    spec = importlib.util.spec_from_file_location("densegrpo", ROOT / "__init__.py")
    package = importlib.util.module_from_spec(spec)
    sys.modules["densegrpo"] = package
    spec.loader.exec_module(package)


def pytest_terminal_summary(terminalreporter):
    """Say plainly that nothing was tested inside ComfyUI: a line of dots and s does not."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "comfy" in report.keywords]
    reasons = [reason for report in skipped if "COMFYUI_PATH" in (reason := str(report.longrepr[2]))]
    if reasons:
        reason = reasons[0].removeprefix("Skipped: ")
        terminalreporter.write_line(f"HOST TESTS SKIPPED: {len(reasons)} of them; {reason}", yellow=True, bold=True)
