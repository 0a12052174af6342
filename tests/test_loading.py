import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

AS_COMFY = """
import importlib.util, sys
path = sys.argv[1]
name = path.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, path + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
assert not {"torch", "comfy", "numpy"} & set(sys.modules), "importing the package must be light"
from importlib import import_module
recipes = import_module(name + ".engine.recipes")
assert recipes.flow_grpo().noise.step.step.__module__ == name + ".engine.kernels"
assert "comfy" not in sys.modules and "torch" in sys.modules
assert not {"engine", "nodes", "diffusers", "accelerate", "matplotlib"} & set(sys.modules)
print("ok")
"""


def test_loads_by_path_as_comfyui_does():
    """ComfyUI's nodes.load_custom_node: the module's name is its path, dots replaced."""
    done = subprocess.run([sys.executable, "-c", AS_COMFY, str(ROOT)], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "ok", done.stderr
