"""What ComfyUI hosts need so that a MODEL can be trained in place and handed back as it was.

Written for hosts from 0.3.64 on; each function says which hosts it is for. Nothing here knows a model family.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from traceback import clear_frames
from typing import Any, ParamSpec, TypeVar

import comfy.model_management as host  # pyright: ignore[reportMissingImports]
import torch
from comfy.ldm.modules.attention import attention_pytorch  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

P = ParamSpec("P")
T = TypeVar("T")


def gives_memory_back(run: Callable[P, T]) -> Callable[P, T]:
    """Let the host have the memory of ``run`` however it ends; within it, its variables would still hold their own."""

    @wraps(run)
    def clean(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return run(*args, **kwargs)
        except BaseException as problem:
            forget(problem)
            raise
        finally:
            gc.collect()  # what refers to each other, such as optimizer and averaged weights
            host.soft_empty_cache()

    return clean


def forget(problem: BaseException | None) -> None:
    """Drop the variables of the functions that ``problem`` ended: activations, above all when memory ran out."""
    seen: set[int] = set()  # what was raised again may be its own cause
    while problem is not None and id(problem) not in seen:
        seen.add(id(problem))
        clear_frames(problem.__traceback__)
        problem = problem.__cause__ or problem.__context__


def clone(model: Any) -> Any:
    """A patcher of the same weights with its own options; where weights are lazy, one with plain weights."""
    try:
        return model.clone(disable_dynamic=True)
    except TypeError:  # hosts without dynamic VRAM do not know the argument
        return model.clone()


@contextmanager
def trainable(network: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Within it autograd works through ``network``; afterwards its hooks, methods and flags are as before."""
    with ExitStack() as stack:
        flags = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
        stack.callback(restore_flags, network, flags)
        stack.enter_context(host_in_training())
        for module in network.modules():
            if "Norm" in type(module).__name__:
                stack.callback(module.register_forward_pre_hook(copy_input).remove)
        for block in blocks(network) if checkpointing else ():
            stack.enter_context(checkpointed(block))
        yield


def restore_flags(network: nn.Module, flags: dict[str, bool]) -> None:
    """Set ``requires_grad`` of every parameter as it was."""
    with torch.inference_mode():  # elsewhere the flag of an inference tensor cannot be set
        for name, parameter in network.named_parameters():
            if parameter.requires_grad != flags[name]:
                parameter.requires_grad_(flags[name])


@contextmanager
def host_in_training() -> Iterator[None]:
    """Tell the host not to use operations without gradient; hosts that cannot be told get gradients for them."""
    if not hasattr(host, "in_training"):  # hosts before it came
        give_rope_a_gradient()
        yield
        return
    before, host.in_training = host.in_training, True
    try:
        yield
    finally:
        host.in_training = before


def give_rope_a_gradient() -> None:
    """comfy_kitchen's rotary embedding (hosts around 0.10) is linear: its gradient is the transposed rotation."""
    operations = torch.ops.comfy_kitchen
    if not hasattr(operations, "apply_rope") or "rope" in GIVEN:
        return

    def turned_back(gradient: Tensor, table: Tensor) -> Tensor:
        return operations.apply_rope1(gradient.contiguous(), table.transpose(-1, -2).contiguous())

    def keep_table(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:  # torch passes these by name
        ctx.save_for_backward(inputs[-1])

    def backward_one(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return turned_back(gradient, context.saved_tensors[0]), None

    def backward_two(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (table,) = context.saved_tensors  # once: checkpointing allows no second look
        return *(g if g is None else turned_back(g, table) for g in gradients), None

    for name, backward in (("apply_rope1", backward_one), ("apply_rope", backward_two)):
        torch.library.register_autograd(f"comfy_kitchen::{name}", backward, setup_context=keep_table)
    GIVEN.add("rope")


GIVEN: set[str] = set()
"""What this process was given once and for all."""


def copy_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Let a norm work on a copy: FLUX blocks go on to write into the tensor that its backward pass needs."""
    if not torch.is_grad_enabled() or not inputs or not isinstance(inputs[0], Tensor):
        return None
    return inputs[0].clone(), *inputs[1:]


def blocks(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the members of the network's lists of modules."""
    return [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]


@contextmanager
def checkpointed(block: nn.Module) -> Iterator[None]:
    """Compute the activations of ``block`` twice instead of keeping them."""
    forward, own = block.forward, block.__dict__.get("forward")

    def run(*args: Any, **kwargs: Any) -> Any:
        # The copies are made inside: blocks may write into their inputs, and are run a second time from them.
        return forward(*map(fresh, args), **{name: fresh(value) for name, value in kwargs.items()})

    def run_twice(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        kwargs = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.forward = run_twice
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


def fresh(value: Any) -> Any:
    """A copy of what a block may write into."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.clone()
    return dict(value) if isinstance(value, dict) else value


def make_plain(model: nn.Module) -> None:
    """Replace weights that were loaded under ``torch.inference_mode``, as nodes do, by equal ones autograd accepts.

    One at a time, so that memory does not double. Quantised weights of other classes are left alone: their
    layers make plain ones when they run.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if type(parameter) is nn.Parameter and parameter.is_inference():
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for name, buffer in module._buffers.items():
            if type(buffer) is Tensor and buffer.is_inference():
                module._buffers[name] = buffer.clone()


def plain(value: Any) -> Any:
    """The same value with inference tensors copied, also inside lists and dicts."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def use_differentiable_attention(patcher: Any) -> None:
    """Override whatever attention the host was started with: sage attention, for one, has no backward pass."""

    def attention(_: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return attention_pytorch(*args, **kwargs)

    patcher.model_options["transformer_options"]["optimized_attention_override"] = attention
