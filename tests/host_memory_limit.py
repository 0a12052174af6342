"""A node for the tests: a MODEL that runs out of memory above a number of rows. Loaded by the ComfyUI server."""

import torch


class MemoryLimit:
    """Raises what CUDA raises."""

    CATEGORY = "tests"
    FUNCTION = "limit"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), "rows": ("INT", {"default": 1})}}

    def limit(self, model, rows):
        limited = model.clone()

        def call(apply_model, given):
            if len(given["input"]) > rows:
                raise torch.OutOfMemoryError(f"{len(given['input'])} rows do not fit")
            return apply_model(given["input"], given["timestep"], **given["c"])

        limited.set_model_unet_function_wrapper(call)
        return (limited,)


NODE_CLASS_MAPPINGS = {"TestMemoryLimit": MemoryLimit}
