"""Packages that may not be there."""

import sys
from pathlib import Path


def pip_install(*arguments: str) -> str:
    """The command that gets them into the Python that runs, which on the path may be another."""
    return " ".join([quoted(Path(sys.executable)), "-m pip install", *map(quoted, arguments)])


def quoted(argument: Path | str) -> str:
    """For a command line of any system: cmd knows double quotes only."""
    text = str(argument)
    return f'"{text}"' if any(sign in text for sign in " <>[]") else text
