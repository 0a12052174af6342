"""The diffusers back end on tiny pipelines: training sees what diffusers' own pipelines sample with, both families."""

import copy
import gc

import pytest
import torch
import transformers
from densegrpo.engine.data import Prompt
from densegrpo.engine.learner import Learner, OptimizerSettings
from densegrpo.engine.lora import export
from densegrpo.engine.recipes import make_recipe
from densegrpo.engine.rewards import Panel, make_reward
from densegrpo.engine.rollout import finish_by_ode
from densegrpo.engine.schedule import flux_shifted, sd3_twice_shifted, shifted_linear
from densegrpo.engine.train import TrainSettings, train
from safetensors.torch import load_file
from tiny_pipelines import PROMPTS, changed, folder_of, load, noise, packed, pipeline_of

both_families = pytest.mark.parametrize("family", ["sd3", "flux"])


def sampled(folder, family, start, guidance, num_steps, output):
    """What diffusers' pipeline makes of ``start`` [2, ...] and the first two prompts."""
    pipeline = pipeline_of(folder, family)
    result = pipeline(
        PROMPTS[:2],
        height=64,
        width=64,
        num_inference_steps=num_steps,
        guidance_scale=guidance,
        latents=packed(start) if family == "flux" else start,
        output_type=output,
    ).images
    return pipeline._unpack_latents(result, 64, 64, 8) if (family, output) == ("flux", "latent") else result


@pytest.mark.parametrize(
    ("family", "options", "guidance"),
    [
        ("sd3", {}, 4.5),
        ("sd3", {"guidance": 1.0}, 1.0),
        ("sd3", {"guidance": 7.0}, 7.0),
        ("flux", {}, 3.5),
        ("flux", {"guidance": 2.0}, 2.0),
    ],
)
def test_a_rollout_without_noise_is_what_diffusers_own_pipeline_samples(family, options, guidance):
    model = load(folder_of(family), **options)
    start = noise(model, 2)
    cond = model.encode(PROMPTS)
    ours = finish_by_ode(model, cond, start, model.schedule(4), torch.tensor([0, 1]))
    theirs = sampled(folder_of(family), family, start, guidance, 4, "latent")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, start, atol=0.1)


@both_families
def test_decoded_images_are_those_of_the_pipeline(family):
    model = load(folder_of(family))
    start = noise(model, 2)
    ours = model.decode(finish_by_ode(model, model.encode(PROMPTS), start, model.schedule(2), torch.tensor([0, 1])))
    guidance = model.guidance
    theirs = sampled(folder_of(family), family, start, guidance, 2, "pt")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert ours.std() > 0.01


def test_the_velocity_of_sd3_is_the_guided_output_of_its_transformer():
    model, pipeline = load(folder_of("sd3")), pipeline_of(folder_of("sd3"), "sd3")
    x, sigma = noise(model, 2), torch.tensor([0.9, 0.3])
    context, empty, pooled, empty_pooled = pipeline.encode_prompt(PROMPTS[:2], None, None)
    with torch.no_grad():
        ours = model.velocity(x, sigma, model.encode(PROMPTS), torch.tensor([2, 1]))
        conditional = pipeline.transformer(x, context, pooled, sigma * 1000).sample
        unconditional = pipeline.transformer(x, empty, empty_pooled, sigma * 1000).sample
    theirs = unconditional + 4.5 * (conditional - unconditional)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(conditional, unconditional, atol=1e-4)


def test_the_velocity_of_flux_is_the_output_of_its_transformer():
    model, pipeline = load(folder_of("flux")), pipeline_of(folder_of("flux"), "flux")
    x, sigma = noise(model, 2), torch.tensor([0.9, 0.3])
    context, pooled, text_ids = pipeline.encode_prompt(PROMPTS[:2])
    places = pipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)
    with torch.no_grad():
        ours = model.velocity(x, sigma, model.encode(PROMPTS), torch.tensor([2, 1]))
        theirs = pipeline.transformer(
            packed(x), context, pooled, sigma, places, text_ids, guidance=torch.full((2,), 3.5)
        ).sample
    torch.testing.assert_close(ours, pipeline._unpack_latents(theirs, 64, 64, 8), atol=1e-5, rtol=1e-5)


@both_families
def test_each_row_gets_its_own_prompt_and_batches_do_not_matter(family):
    model = load(folder_of(family))
    x, sigma, rows = noise(model, 1).expand(3, -1, -1, -1), torch.full((3,), 0.5), torch.tensor([1, 0, 2])
    cond = model.encode(PROMPTS)
    with torch.no_grad():
        together = model.velocity(x, sigma, cond, rows)
        alone = torch.cat([model.velocity(x[:1], sigma[:1], cond, rows[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1], together[2], atol=1e-6, rtol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-3


def text_encoders():
    """Those alive in this process."""
    return [id(o) for o in gc.get_objects() if issubclass(type(o), transformers.PreTrainedModel)]


@both_families
def test_the_text_encoders_are_gone_after_encoding_and_come_back_when_asked(family):
    model = load(folder_of(family))
    before = set(text_encoders())
    first = model.encode(PROMPTS)
    assert set(text_encoders()) <= before
    again = model.encode(["two dogs", "a blue fish"])
    place = first.place[1], again.place[0]
    torch.testing.assert_close(first.context[place[0]], again.context[place[1]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first.pooled[place[0]], again.pooled[place[1]], atol=1e-5, rtol=1e-5)


def test_equal_prompts_are_encoded_once_and_the_empty_one_only_for_guidance():
    assert len(load(folder_of("sd3")).encode(PROMPTS).context) == 3
    assert len(load(folder_of("sd3"), guidance=1.0).encode(PROMPTS).context) == 2
    assert len(load(folder_of("flux")).encode(PROMPTS).context) == 2


def test_many_prompts_are_encoded_in_batches():
    model = load(folder_of("flux"))
    prompts = [f"a {chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(35)]
    cond = model.encode(prompts)
    single = model.encode(prompts[20:21])
    torch.testing.assert_close(cond.context[20], single.context[0], atol=1e-5, rtol=1e-5)
    assert len(cond.context) == len(cond.pooled) == 35


def test_sd3_without_its_t5_works_as_in_the_pipeline(tmp_path):
    absent = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    folder = changed("sd3", tmp_path, "model_index.json", **absent)
    model = load(folder, guidance=1.0)
    pipeline = pipeline_of(folder, "sd3", **dict.fromkeys(absent))
    theirs = pipeline.encode_prompt(PROMPTS[:2], None, None, do_classifier_free_guidance=False)
    cond = model.encode(PROMPTS)
    torch.testing.assert_close(cond.context, theirs[0], atol=1e-5, rtol=1e-5)
    assert (cond.context[:, 77:] == 0).all()


@pytest.mark.parametrize("num_steps", [2, 10, 28])
def test_schedules_are_those_of_the_pipelines(tmp_path, num_steps):
    assert torch.equal(load(folder_of("sd3")).schedule(num_steps), sd3_twice_shifted(num_steps, 3.0))
    assert torch.equal(load(folder_of("flux")).schedule(num_steps), flux_shifted(num_steps, 16))
    for family in ("sd3", "flux"):
        model = load(folder_of(family), schedule="single_shift")
        assert torch.equal(model.schedule(num_steps), shifted_linear(num_steps, 3.0))
    schnell = changed("flux", tmp_path, "scheduler/scheduler_config.json", use_dynamic_shifting=False, shift=1.0)
    assert torch.equal(load(schnell).schedule(num_steps), shifted_linear(num_steps, 1.0))


@pytest.mark.parametrize(
    ("family", "entries"),
    [
        ("sd3", {"shift": 5.0}),
        ("flux", {"base_shift": 0.7, "max_shift": 1.4, "base_image_seq_len": 10, "max_image_seq_len": 100}),
        ("flux", {"use_dynamic_shifting": False, "shift": 1.7}),
    ],
)
def test_the_schedule_follows_the_scheduler_of_the_folder(tmp_path, family, entries):
    folder = changed(family, tmp_path, "scheduler/scheduler_config.json", **entries)
    pipeline = pipeline_of(folder, family)
    start = noise(load(folder), 2)
    latents = packed(start) if family == "flux" else start
    pipeline(PROMPTS[:2], height=64, width=64, num_inference_steps=3, latents=latents, output_type="latent")
    torch.testing.assert_close(load(folder).schedule(3), pipeline.scheduler.sigmas, atol=1e-6, rtol=0)


def trained(folder, **options):
    """A model whose LoRA is not zero."""
    model = load(folder, **options)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for up in model.lora.up:
            torch.nn.init.normal_(up, std=0.1)
    return model


def gradients(model, weight=1.0):
    cond = model.encode(PROMPTS)
    v = model.velocity(noise(model, 2), torch.tensor([0.9, 0.3]), cond, torch.tensor([0, 1]))
    (v.square().mean() * weight).backward()
    return torch.cat([p.grad.flatten() for p in model.lora.parameters()])


@both_families
@pytest.mark.parametrize("cfg_grad", ["full", "detach"])
def test_gradient_checkpointing_changes_memory_not_gradients(family, cfg_grad):
    options = {"cfg_grad": cfg_grad} if family == "sd3" else {}
    on = trained(folder_of(family), gradient_checkpointing=True, **options)
    off = trained(folder_of(family), gradient_checkpointing=False, **options)
    assert on.network.is_gradient_checkpointing
    assert not off.network.is_gradient_checkpointing
    torch.testing.assert_close(gradients(on), gradients(off), atol=1e-7, rtol=1e-5)


def test_the_unconditional_half_can_do_without_gradients():
    full, detached = trained(folder_of("sd3")), trained(folder_of("sd3"), cfg_grad="detach")
    assert not torch.allclose(gradients(full), gradients(detached), rtol=0.01)


@both_families
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_base_gives_float32_gradients_of_the_same_direction(family, dtype):
    """Also for a loss as small as GRPO's: float16 alone would round the gradient of each element to nothing."""
    exact = gradients(trained(folder_of(family)), 1e-5)
    model = trained(folder_of(family), dtype=dtype)
    half = gradients(model, 1e-5)
    assert {p.dtype for p in model.network.parameters()} == {getattr(torch, dtype)}
    assert {p.dtype for p in model.lora.parameters()} == {torch.float32}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in [*model.network.parameters(), *model.vae.parameters()])
    assert half.dtype == torch.float32
    assert torch.cosine_similarity(half, exact, dim=0) > {"bfloat16": 0.9, "float16": 0.99}[dtype]
    assert half.norm() == pytest.approx(exact.norm().item(), rel=0.05)


@both_families
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_iteration_of_densegrpo_moves_the_lora_and_nothing_else(family, dtype):
    model = load(folder_of(family), dtype=dtype, decode_batch=3)
    prompts = [Prompt(text, {}) for text in PROMPTS[:2]]
    learner = Learner(model.lora, OptimizerSettings())
    before = learner.state()
    frozen = {name: copy.deepcopy(part.state_dict()) for name, part in parts(model)}
    recipe = make_recipe("dense_grpo", group_size=3, num_updates=1)
    settings = TrainSettings(iterations=1, groups=2, num_steps=3, sample_batch=8, train_batch=4)
    panel = Panel([("brightness", make_reward("brightness"), 1.0)])
    (iteration,) = train(model, model.encode(PROMPTS[:2]), prompts, panel, recipe, learner, settings)
    named = {**iteration.stats, **iteration.stats.pop("rewards")["brightness"]}
    del named["rewards"], named["reward_correlation"]
    numbers = [v for value in named.values() for v in (value if isinstance(value, list) else [value])]
    assert torch.tensor(numbers).isfinite().all()
    assert iteration.stats["ratio"] == 1.0
    assert iteration.stats["transitions"] == 2 * 3 * 2
    assert iteration.stats["grad_norm"] > 0
    assert iteration.images.shape == (6, 3, 64, 64)
    assert any(not torch.equal(before[name], value) for name, value in learner.state().items() if "lora.up" in name)
    for name, part in parts(model):
        assert all(torch.equal(frozen[name][key], value) for key, value in part.state_dict().items())


def parts(model):
    return ("transformer", model.network), ("vae", model.vae)


def moved_copy(family, model, path):
    """Diffusers' own transformer with the exported LoRA added to its weights by hand."""
    network = pipeline_of(folder_of(family), family).transformer
    tensors = load_file(path)
    layers = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    assert layers == {f"transformer.{name}" for name in model.lora.names}
    for layer in layers:
        weight = network.get_submodule(layer.removeprefix("transformer.")).weight
        weight.data += tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
    return network


@both_families
def test_the_exported_lora_in_diffusers_gives_the_velocity_of_training(family, tmp_path):
    model = trained(folder_of(family), guidance=1.0 if family == "sd3" else 3.5)
    export(model.lora, tmp_path / "lora.safetensors", model.lora_prefix, {})
    inputs = noise(model, 2), torch.tensor([0.9, 0.3]), model.encode(PROMPTS), torch.tensor([0, 1])
    with torch.no_grad():
        ours = model.velocity(*inputs)
        with model.lora.disabled():
            untrained = model.velocity(*inputs)
        model.network, plain = moved_copy(family, model, tmp_path / "lora.safetensors"), model.network
        theirs = model.velocity(*inputs)
    assert plain is not model.network
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (ours - untrained).abs().max() > 1e-2


@both_families
def test_diffusers_loads_the_exported_lora(family, tmp_path):
    pytest.importorskip("peft")
    model = trained(folder_of(family))
    export(model.lora, tmp_path / "lora.safetensors", model.lora_prefix, {})
    pipeline = pipeline_of(folder_of(family), family)
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    inputs = noise(model, 2), torch.tensor([0.9, 0.3]), model.encode(PROMPTS), torch.tensor([0, 1])
    with torch.no_grad():
        ours = model.velocity(*inputs)
        model.network = pipeline.transformer
        torch.testing.assert_close(ours, model.velocity(*inputs), atol=1e-5, rtol=1e-5)


def test_the_layers_that_learn_are_those_of_flow_grpos_scripts():
    """The attention of the image and text streams; SD3.5's second attention (attn2) is left alone."""
    attention = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    last_of_sd3 = [name for name in attention if name != "to_add_out"]
    expected = [f"transformer_blocks.0.attn.{name}" for name in attention]
    assert load(folder_of("sd3")).lora.names == sorted(
        expected + [f"transformer_blocks.1.attn.{name}" for name in last_of_sd3]
    )
    forward = [f"transformer_blocks.0.{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2")]
    single = [f"single_transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    assert load(folder_of("flux")).lora.names == sorted(expected + forward + single)


def test_a_few_latents_are_decoded_at_a_time(monkeypatch):
    model = load(folder_of("sd3"), decode_batch=2)
    latents, sizes = noise(model, 5), []
    whole = load(folder_of("sd3"), decode_batch=5).decode(latents)
    decode = model.vae.decode
    monkeypatch.setattr(model.vae, "decode", lambda part, **kw: (sizes.append(len(part)), decode(part, **kw))[1])
    images = model.decode(latents)
    assert sizes == [2, 2, 1]
    assert (images.shape, images.dtype) == ((5, 3, 64, 64), torch.float32)
    assert images.min() >= 0
    assert images.max() <= 1
    torch.testing.assert_close(images, whole, atol=1e-5, rtol=1e-5)
