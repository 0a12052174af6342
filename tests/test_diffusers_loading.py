"""What users hand the diffusers back end: options, folders and hub ids, and what is wrong with them."""

import shutil
import socket

import diffusers
import pytest
import torch
from densegrpo.engine.knobs import check, options_of
from densegrpo.engine.lora import LoraSettings
from densegrpo.engine.models import load_model, model_settings
from densegrpo.engine.models.diffusers import DiffusersSettings
from densegrpo.engine.schedule import shifted_linear
from safetensors.torch import load_file
from tiny_pipelines import LORA, changed, folder_of, load, noise


def test_a_local_folder_is_used_without_any_connection(monkeypatch):
    def refuse(*_):
        raise AssertionError("connection attempted")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for family in ("sd3", "flux"):
        load(folder_of(family)).encode(["a"])


def test_a_hub_id_is_handed_to_diffusers_and_its_failure_explained(monkeypatch):
    asked = []

    def download(name, **_):
        asked.append(name)
        return folder_of("sd3")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    assert load("someone/tiny-sd3").folder == folder_of("sd3")
    assert asked == ["someone/tiny-sd3"]

    def gated(name, **_):
        raise OSError("401 Client Error.\nAccess is restricted")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", gated)
    with pytest.raises(ValueError, match=r"'someone/tiny-sd3' is no folder .* \(401 Client Error\.\); .*hf auth login"):
        load("someone/tiny-sd3")


def test_the_settings_have_tips_and_allowed_defaults():
    assert model_settings("diffusers") is DiffusersSettings
    for name, option in options_of(DiffusersSettings).items():
        assert option.limits.tip
        check("model diffusers", options_of(DiffusersSettings), {name: option.default})


def test_a_seed_and_the_loras_own_targets_reach_the_adapter():
    options = {"path": str(folder_of("sd3")), "dtype": "float32", "resolution": 64}
    lora = LoraSettings(rank=2, targets=r"attn\.to_q$")
    first, again, other = (load_model("diffusers", lora, seed, **options).lora for seed in (0, 0, 1))
    assert first.names == ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"]
    assert torch.equal(first.down[0], again.down[0])
    assert not torch.equal(first.down[0], other.down[0])


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("sd3", {"resolution": 72}, "resolution must be a multiple of 16, got 72; take 64 or 80"),
        ("sd3", {"resolution": 144}, "resolution 144 is too large for this model; it was made for at most 128"),
        ("sd3", {"guidance": 0.5}, r"guidance must be 0 \(usual for the model\) or at least 1, got 0.5"),
        ("sd3", {"guidance": 1.0, "cfg_grad": "detach"}, "cfg_grad 'detach' has no effect: this SD3 .* leave it out"),
        ("flux", {"cfg_grad": "detach"}, r"cfg_grad 'detach' has no effect: this FLUX.1 .* leave it out"),
    ],
)
def test_settings_that_the_model_cannot_follow_are_named(family, options, message):
    with pytest.raises(ValueError, match=f"model diffusers: {message}"):
        load(folder_of(family), **options)


@pytest.mark.parametrize(
    ("family", "file", "entries", "options", "message"),
    [
        ("sd3", "model_index.json", {"transformer": ["diffusers", "QwenImageTransformer2DModel"]}, {}, "QwenImageTr"),
        ("sd3", "model_index.json", {"transformer": [None, None], "_class_name": "SDXL"}, {}, "is a SDXL with transf"),
        ("flux", "model_index.json", {"tokenizer_3": ["transformers", "T5"]}, {}, "lacks the folders tokenizer_3; dow"),
        ("sd3", "model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, {}, "scheduler DDIMScheduler; sup"),
        ("sd3", "scheduler/scheduler_config.json", {"use_karras_sigmas": True}, {}, "use_karras_sigmas=True, .*single"),
        ("sd3", "scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, {}, "use_dynamic_shifting=True, wh"),
        ("flux", "scheduler/scheduler_config.json", {"time_shift_type": "linear"}, {}, "time_shift_type=linear, which"),
        ("flux", "scheduler/scheduler_config.json", {"shift_terminal": 0.02}, {}, "shift_terminal=0.02, which is not"),
    ],
)
def test_pipelines_that_are_not_supported_are_named(tmp_path, family, file, entries, options, message):
    with pytest.raises(ValueError, match=f"model diffusers: .*{message}"):
        load(changed(family, tmp_path, file, **entries), **options)


def test_an_unknown_scheduler_can_be_overruled(tmp_path):
    folder = changed("sd3", tmp_path, "scheduler/scheduler_config.json", use_karras_sigmas=True)
    assert torch.equal(load(folder, schedule="single_shift").schedule(4), shifted_linear(4, 3.0))


def test_a_model_distilled_without_guidance_has_none(tmp_path):
    folder = tmp_path / "schnell"
    shutil.copytree(folder_of("flux"), folder)
    network = diffusers.FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    diffusers.FluxTransformer2DModel(**config | {"guidance_embeds": False}).save_pretrained(folder / "transformer")
    model = load(folder)
    with torch.no_grad():
        v = model.velocity(noise(model, 1), torch.ones(1), model.encode(["a"]), torch.tensor([0]))
    assert v.isfinite().all()
    with pytest.raises(ValueError, match=r"guidance 3.5 has no effect: .*\(schnell\); leave it at 0"):
        load(folder, guidance=3.5)


def test_a_transformer_that_needs_an_input_image_is_refused(tmp_path):
    folder = tmp_path / "fill"
    shutil.copytree(folder_of("flux"), folder)
    network = diffusers.FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    diffusers.FluxTransformer2DModel(**config | {"in_channels": 384}).save_pretrained(folder / "transformer")
    with pytest.raises(ValueError, match="transformer takes 96 channels but the VAE makes 16: it expects an input"):
        load(folder)


def test_a_missing_path_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"path is empty; give a folder such as .* or a hub id such as"):
        DiffusersSettings().load(LORA, 0)
    for path in (tmp_path / "nothing", "~/nothing/here", "nothing"):
        with pytest.raises(ValueError, match=r"nothing.* does not exist; give a folder with model_index.json"):
            load(path)
    with pytest.raises(ValueError, match=r"has no model_index.json; .*from_single_file, then save_pretrained"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index.json is damaged: .*; download or save the model again"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("vae", "lacks the folders vae; download or save it again"),
        ("text_encoder_3", "lacks the folders text_encoder_3; download"),
        ("transformer/diffusion_pytorch_model.safetensors", r"transformer cannot be read \(.*\); download or save"),
        ("text_encoder/model.safetensors", r"sd3 cannot be read \(.*\); download or save the model again"),
    ],
)
def test_missing_pieces_are_named(tmp_path, lost, message):
    folder = changed("sd3", tmp_path, "model_index.json")
    shutil.rmtree(folder / lost) if (folder / lost).is_dir() else (folder / lost).unlink()
    with pytest.raises(ValueError, match=message):
        load(folder).encode(["a"])


@pytest.mark.parametrize("part", ["transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model"])
def test_a_cut_off_download_is_named(tmp_path, part):
    folder = changed("sd3", tmp_path, "model_index.json")
    file = folder / f"{part}.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{part.split('/')[0]} cannot be read \(.*\); download or save"):
        load(folder)


def test_weights_in_a_pickle_are_not_opened(tmp_path):
    folder = changed("sd3", tmp_path, "model_index.json")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(ValueError, match=r"vae cannot be read \(.*safetensors.*\); download or save"):
        load(folder)


def test_without_diffusers_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("densegrpo.engine.models.diffusers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "diffusers>=0\.35" "transformers>=4\.45"$'):
        load(folder_of("sd3"))
