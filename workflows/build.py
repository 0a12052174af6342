"""Writes every shipped workflow, for the canvas and for the API, from the one description, see shipped.py.

    python workflows/build.py                                  # rewrites workflows/*.json and workflows/api/*.api.json
    python workflows/build.py --host http://127.0.0.1:8188     # first learns the nodes anew from a running host

``tests/golden/object_info.json`` holds what a host (/object_info) says of the nodes used here. Only the canvas files
lie directly in this folder, because the host lists every ``workflows/*.json`` as a template, with the ``.jpg`` of the
same name as its picture. Those of the first steps are made from real runs, by hand; pictures.py draws the others.
"""

import argparse
import json
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graph import Graph, specs, to_api, to_canvas
from shipped import WORKFLOWS

FOLDER = Path(__file__).resolve().parent
CATALOGUE = FOLDER.parent / "tests" / "golden" / "object_info.json"
OURS = "DenseGRPO"
STOCK = (
    "CLIPTextEncode CheckpointLoaderSimple DualCLIPLoader EmptySD3LatentImage KSampler LoraLoaderModelOnly "
    "PreviewImage PrimitiveInt PrimitiveStringMultiline SaveImage TripleCLIPLoader UNETLoader VAEDecode VAELoader"
).split()
FILES = ("ckpt_name", "clip_name1", "clip_name2", "clip_name3", "lora_name", "unet_name", "vae_name")
"""Inputs that list files of one machine."""


def build(catalogue: Mapping[str, Any]) -> dict[str, str]:
    """Path below this folder -> text, of every file."""
    files = {}
    for name, make in WORKFLOWS.items():
        graph = Graph(catalogue)
        make(graph)
        files[f"{name}.json"] = json.dumps(to_canvas(graph), indent=1) + "\n"
        files[f"api/{name}.api.json"] = json.dumps(to_api(graph), indent=2) + "\n"
    return files


def known_nodes(everything: Mapping[str, Any]) -> dict[str, Any]:
    """Of a host's /object_info what matters here: our nodes and the stock ones used, without file lists."""
    names = sorted(name for name in everything if name.startswith(OURS)) + STOCK
    kept = ("input", "input_order", "output", "output_name", "output_is_list", "display_name", "output_node")
    found = {}
    for name in names:
        entry = json.loads(json.dumps({key: everything[name][key] for key in kept}))
        entry["input"].pop("hidden", None)
        entry["input_order"].pop("hidden", None)
        for input_name, spec in specs(entry):
            if input_name in FILES:
                spec[0] = [] if isinstance(spec[0], list) else spec[0]
            for options in spec[1:]:
                options.pop("tooltip", None)
                if input_name in FILES and "options" in options:
                    options["options"] = []
                if input_name in ("file", "reuse"):
                    options["options"] = [x for x in options["options"] if not x.endswith((".txt", ".jsonl", ".json"))]
        found[name] = entry
    return found


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", help="address of a running ComfyUI that has these nodes")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to; default: this one")
    arguments = parser.parse_args()
    if arguments.host:
        with urllib.request.urlopen(arguments.host.rstrip("/") + "/object_info", timeout=60) as answer:
            found = known_nodes(json.load(answer))
        CATALOGUE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for path, text in build(json.loads(CATALOGUE.read_text(encoding="utf-8"))).items():
        (arguments.out / path).parent.mkdir(parents=True, exist_ok=True)
        (arguments.out / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
