"""ComfyUI nodes: translate widgets to engine calls, nothing more."""
