"""ComfyUI entry point.

Nothing heavy is imported here: ComfyUI calls ``comfy_entrypoint``, and only then are the nodes
(and ``comfy``) imported. So ``import densegrpo`` also works headless and under pytest.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the ComfyExtension; called once by ComfyUI at start-up."""
    try:
        from .nodes import DenseGRPOExtension
    except Exception:
        import logging

        # The host reports a failing entry point in one line; whoever mends it needs the traceback.
        logging.getLogger("densegrpo").exception("DenseGRPO could not be loaded")
        raise
    return DenseGRPOExtension()
