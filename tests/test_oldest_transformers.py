"""The model rewards with the oldest transformers they support: its classes and files differ from today's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PINNED = (
    "transformers==4.46.3 tokenizers==0.20.3 huggingface_hub==0.26.5 requests==2.32.3 urllib3==2.2.3 "
    "certifi==2024.8.30 charset_normalizer==3.4.0 idna==3.10 regex==2024.11.6"
).split()
"""What transformers 4.46 needs beside the libraries of today: torch, numpy, safetensors, ..."""
PACKAGES = Path.home() / ".cache" / "densegrpo-transformers-4.46"
"""Installed once and outside the repository."""
FILES = (
    *("test_clip_rewards.py", "test_model_rewards.py", "test_imagereward.py", "test_aesthetic_siglip.py"),
    *("test_geneval_detector.py", "test_geneval_reward.py", "test_reward_files.py", "test_frozen_scores.py"),
)


@pytest.fixture(scope="module")
def oldest():
    """The folder that holds it."""
    if not (PACKAGES / "complete").exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--upgrade",
            "--target",
            str(PACKAGES),
        ]
        done = subprocess.run([*command, *PINNED], capture_output=True, text=True, timeout=600, check=False)
        if done.returncode != 0:
            pytest.skip(f"pip could not install transformers 4.46 into {PACKAGES}: {done.stderr.strip()[-300:]}")
        (PACKAGES / "complete").touch()
    return PACKAGES


@pytest.mark.slow
def test_model_rewards_work_with_the_oldest_transformers(oldest):
    paths = os.pathsep.join([str(oldest), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    found = subprocess.run(version, capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.strip() == "4.46.3"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(TESTS / name) for name in FILES)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=TESTS.parent, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 300
