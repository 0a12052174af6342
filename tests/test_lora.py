"""The adapter: nothing changes until it learns, it can be taken off, and the exported file does what training saw."""

import copy
from contextlib import suppress

import pytest
import torch
from densegrpo.engine.knobs import check, options_of
from densegrpo.engine.lora import Lora, LoraSettings, add_lora, attach, export
from densegrpo.engine.models.mmdit import MMDiT
from densegrpo.engine.models.tiny import DEFAULT_TARGETS
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

SETTINGS = LoraSettings(rank=3, alpha=6.0)


def network():
    """A random frozen transformer of SD3's architecture (weights with gradient take other kernels), and inputs."""
    torch.manual_seed(0)
    model = MMDiT(2, 8, 8, max_tokens=4)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.requires_grad_(False), (
        torch.randn(2, 16, 4, 4),
        torch.tensor([0.9, 0.3]),
        torch.randn(2, 5, 8),
        torch.randn(2, 8),
    )


def trained(model, targets=DEFAULT_TARGETS, settings=SETTINGS):
    """A LoRA whose B is not zero."""
    lora = add_lora(model, settings, targets)
    for up in lora.up:
        nn.init.normal_(up, std=0.05)
    return lora


def test_a_fresh_lora_changes_nothing():
    model, inputs = network()
    before = model(*inputs)
    lora = add_lora(model, SETTINGS, DEFAULT_TARGETS)
    assert torch.equal(model(*inputs), before)
    assert all((up == 0).all() for up in lora.up)
    assert all((down != 0).any() for down in lora.down)


def test_base_weights_and_names_stay_as_they_are():
    model, _ = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [name for name, _ in model.named_modules()]
    trained(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [name for name, _ in model.named_modules()] == modules


def test_disabled_it_is_exactly_the_untrained_model():
    model, inputs = network()
    before = model(*inputs)
    lora = trained(model)
    with lora.disabled():
        assert torch.equal(model(*inputs), before)
        with lora.disabled():
            assert torch.equal(model(*inputs), before)
        assert torch.equal(model(*inputs), before)
    assert not torch.allclose(model(*inputs), before)


def test_it_comes_back_after_an_error():
    model, _ = network()
    lora = trained(model)
    with suppress(KeyError), lora.disabled():
        raise KeyError
    assert lora.enabled


def test_removed_hooks_leave_the_model_bit_for_bit():
    model, inputs = network()
    before = model(*inputs)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "attn" in name}
    lora = Lora(layers, 2, 2.0, 0)
    for up in lora.up:
        nn.init.ones_(up)
    hooks = attach(lora, model)
    assert not torch.allclose(model(*inputs), before)
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(*inputs), before)
    assert not any(m._forward_hooks for m in model.modules())


def test_each_layer_gets_its_low_rank_update():
    """Y = W x + b + (alpha / rank) B A x, by hand on one layer."""
    model = nn.Sequential(nn.Linear(4, 5))
    lora = trained(model, "0")
    x = torch.randn(7, 4)
    weight = model[0].weight + 2.0 * lora.up[0] @ lora.down[0]
    torch.testing.assert_close(model(x), x @ weight.T + model[0].bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_is_float32_and_the_output_keeps_its_dtype(dtype):
    model = nn.Sequential(nn.Linear(4, 5)).to(dtype)
    lora = trained(model, "0")
    assert {p.dtype for p in lora.parameters()} == {torch.float32}
    out = model(torch.randn(2, 4, dtype=dtype))
    assert out.dtype == dtype
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.ne(0).any() for p in lora.parameters())


def test_only_the_adapter_gets_gradients():
    model, inputs = network()
    lora = trained(model)
    model(*inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.ne(0).any() for p in lora.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (3, 6.0), (4, 1.0)])
def test_the_exported_file_merged_into_a_copy_does_what_training_saw(tmp_path, rank, alpha):
    model, inputs = network()
    plain = copy.deepcopy(model)
    lora = trained(model, settings=LoraSettings(rank=rank, alpha=alpha))
    export(lora, tmp_path / "lora.safetensors", "diffusion_model", {"iteration": "7"})
    tensors = load_file(tmp_path / "lora.safetensors")
    layers = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    assert layers == {f"diffusion_model.{name}" for name in lora.names}
    assert len(tensors) == 2 * len(layers)
    for layer in layers:
        down, up = (tensors[f"{layer}.lora_{half}.weight"] for half in "AB")
        assert (down.shape[0], up.shape[1]) == (rank, rank)
        plain.get_submodule(layer.removeprefix("diffusion_model.")).weight.data += up @ down
    torch.testing.assert_close(plain(*inputs), model(*inputs), atol=1e-6, rtol=1e-6)


def test_an_export_replaces_the_old_file_in_one_go_and_carries_its_notes(tmp_path):
    model, _ = network()
    lora, path = trained(model), tmp_path / "lora.safetensors"
    for number in ("1", "2"):
        export(lora, path, "transformer", {"iteration": number})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"iteration": "2"}
    assert [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]


def test_the_default_targets_of_the_demo_model_are_attention_and_mlp_of_both_streams():
    model, _ = network()
    lora = add_lora(model, SETTINGS, DEFAULT_TARGETS)
    layers = [
        *(f"0.{stream}.{layer}" for stream in ("context_block", "x_block") for layer in FULL),
        "1.context_block.attn.qkv",
        *(f"1.x_block.{layer}" for layer in FULL),
    ]
    assert lora.names == sorted(f"joint_blocks.{layer}" for layer in layers)


FULL = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def test_own_targets_win_over_the_default():
    model, _ = network()
    lora = add_lora(model, LoraSettings(rank=2, targets=r"x_block\.attn\.qkv$"), DEFAULT_TARGETS)
    assert lora.names == ["joint_blocks.0.x_block.attn.qkv", "joint_blocks.1.x_block.attn.qkv"]


def test_targets_that_match_nothing_are_an_error_with_examples():
    model = network()[0].requires_grad_(True)
    message = "targets 'to_q' match no linear layer; the model has, among others: t_embedder.mlp.0"
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoraSettings(targets="to_q"), DEFAULT_TARGETS)
    assert all(p.requires_grad for p in model.parameters())


def test_targets_that_are_no_regular_expression_are_an_error():
    model, _ = network()
    with pytest.raises(ValueError, match=r"lora: targets '\(attn' is not a regular expression: .*position 0"):
        add_lora(model, LoraSettings(targets="(attn"), DEFAULT_TARGETS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"lora: rank \(rank of the update of each layer\) must be a whole number in 1..512, got 0"),
        ({"rank": 2.5}, "rank .* must be a whole number in 1..512, got 2.5"),
        ({"alpha": -1.0}, "alpha .* must be a number in 0.0..4096.0, got -1.0"),
        ({"targets": 3}, "targets .* must be a text, got 3"),
        ({"rnak": 4}, r"lora has no option 'rnak' \(did you mean 'rank'\?\); it has: rank, alpha, targets"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        check("lora", options_of(LoraSettings), options)


def test_a_seed_determines_the_start_and_every_layer_starts_differently():
    """A is Gaussian with spread 1 / rank."""

    def downs(seed):
        return list(add_lora(network()[0], SETTINGS, r"attn\.qkv", seed).down)

    first, again, other = downs(0), downs(0), downs(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len({tuple(a.flatten().tolist()) for a in first}) == len(first) == 4
    assert torch.cat(first).std().item() == pytest.approx(1 / SETTINGS.rank, rel=0.1)


def test_building_it_leaves_the_global_generator_alone():
    model, _ = network()
    state = torch.get_rng_state()
    add_lora(model, SETTINGS, DEFAULT_TARGETS)
    assert torch.equal(torch.get_rng_state(), state)
