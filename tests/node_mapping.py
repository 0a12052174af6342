"""``nodes/mapping.py`` without its package, which needs a host."""

import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location("mapping", Path(__file__).resolve().parents[1] / "nodes" / "mapping.py")
mapping = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mapping)
