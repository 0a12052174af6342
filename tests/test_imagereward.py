"""ImageReward against the formulas of its package, and what is refused when it is loaded."""

import pytest
import torch
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards.clip import crop
from densegrpo.engine.rewards.files import ROOTS_VARIABLE
from densegrpo.engine.rewards.imagereward import ImageReward, blip_config, load_scorer, published, read_tokenizer
from tiny_clip import save_weights
from tiny_reward_models import BERT_VOCABULARY, SIZE, some_images, write_imagereward
from transformers import BlipTextModel, BlipVisionModel

PROMPTS = ["a red cat", "a dog", "", "a photo of a dog of a dog and " * 9]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv(ROOTS_VARIABLE, str(tmp_path))
    return tmp_path / "ImageReward"


@pytest.fixture
def model(root):
    return write_imagereward(root)


def scores(images, prompts=PROMPTS, **options):
    return ImageReward(**options)(RewardBatch(images, prompts, [{}] * len(prompts))).scores


def by_formula(model, folder, images, prompts):
    tokens = read_tokenizer(folder)(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert tokens["input_ids"].shape[1] == 35
    with torch.no_grad():
        return model(crop(images, SIZE), tokens["input_ids"], tokens["attention_mask"])


@pytest.mark.parametrize("size", [(48, 48), (40, 96), (20, 16)])
def test_it_is_bit_by_bit_what_the_published_formulas_give(root, model, size):
    images = some_images(4, *size)
    assert torch.equal(scores(images), by_formula(model, root, images, PROMPTS))


def test_padding_changes_nothing(root, model):
    """A prompt alone, unpadded, scores as among others of the fixed length."""
    images = some_images(2)
    tokens = read_tokenizer(root)(PROMPTS[:1], return_tensors="pt")
    assert tokens["input_ids"].tolist() == [[2, 5, 6, 7, 3]]
    with torch.no_grad():
        alone = model(crop(images[:1], SIZE), tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(scores(images, PROMPTS[:2])[:1], alone, atol=1e-4, rtol=1e-5)


def test_a_prompt_is_cut_at_35_tokens_and_read_in_lower_case(root, model):
    images = some_images(1).expand(4, -1, -1, -1)
    found = scores(images, ["a " * 33 + "cat", "a " * 33 + "dog", "a " * 32 + "cat", "A " * 32 + "CAT"])
    assert found[0] == found[1]
    assert found[1] != found[2]
    assert found[2] == found[3]


def test_the_score_depends_on_image_and_prompt_and_on_words_behind_others(root, model):
    """A causal mask would hide the later words from the first state, which is the one that is scored."""
    images = some_images(2)[[0, 0, 1]]
    assert scores(images, ["a cat", "a dog", "a cat"]).unique().numel() == 3


@pytest.mark.parametrize("layout", ["safetensors", "half", "wrapped"])
def test_other_layouts_of_the_file_give_the_same_score(root, model, layout):
    images, weights = some_images(4), dict(model.state_dict())
    expected = scores(images)
    (root / "ImageReward.pt").unlink()
    load_scorer.cache_clear()
    if layout == "safetensors":
        save_weights(root / "ImageReward.safetensors", weights)
    elif layout == "wrapped":
        torch.save({"state_dict": weights}, root / "ImageReward.pt")
    else:
        half = {name: v.half() if v.is_floating_point() else v for name, v in weights.items()}
        torch.save(half, root / "ImageReward.pt")
    if layout == "half":
        torch.testing.assert_close(scores(images), expected, atol=1, rtol=0.02)
        scorer = load_scorer(root / "ImageReward.pt", "float32", "swap")
        assert {weight.dtype for weight in scorer.model.parameters()} == {torch.float32}
    else:
        assert torch.equal(scores(images), expected)


def test_half_precision_weights_still_give_float32_scores(root, model):
    images = some_images(4)
    exact, half = scores(images), scores(images, precision="bfloat16")
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    assert torch.corrcoef(torch.stack([half, exact]))[0, 1] > 0.9


def test_the_last_layers_are_computed_in_float32(root, model, monkeypatch):
    scorer = load_scorer(root / "ImageReward.pt", "bfloat16", "swap")
    states, original = [], type(scorer.model).forward

    def listen(*given):
        states.append(original(*given))
        return states[-1]

    monkeypatch.setattr(type(scorer.model), "forward", listen)
    found = scores(some_images(4), precision="bfloat16")
    assert states[0].dtype == torch.bfloat16
    expected = (model.mlp.layers(states[0].float()).squeeze(1) - 0.16717362830052426) / 1.0333394966054072
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blip.visual_encoder.cls_token"), r"lacks blip\.visual_encoder\.cls_token; it is another"),
        (
            lambda w: [w.pop(n) for n in list(w) if "visual_encoder.blocks.1." in n],
            r"lacks blip\.visual_encoder\.blocks\.1\..*, .* and \d+ more; it is another model",
        ),
        (
            lambda w: [w.pop(n) for n in list(w) if "crossattention" in n],
            r"lacks blip\.text_encoder\.encoder\.layer\.0\.crossattention\.self\.query\.weight",
        ),
        (
            lambda w: w.update({"blip.visual_encoder.pos_embed": torch.zeros(1, 5, 32)}),
            r"other shapes than expected: blip\.visual_encoder\.pos_embed \(1, 5, 32\) instead of \(1, 17, 32\)",
        ),
        (lambda w: w.pop("mlp.layers.7.bias"), r"lacks mlp\.layers\.7\.bias"),
        (lambda w: w.update({"mlp.layers.0.weight": torch.zeros(1024, 7)}), r"\(1024, 7\) instead of \(1024, 24\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_named(root, model, change, message):
    weights = dict(model.state_dict())
    change(weights)
    torch.save(weights, root / "ImageReward.pt")
    with pytest.raises(ValueError, match=message):
        load_scorer.__wrapped__(root / "ImageReward.pt", "float32", "swap")
    (problem,) = ImageReward().validate(["a"], [{}])
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*BERT_VOCABULARY, "one", "two", "three", ""], rf"{len(BERT_VOCABULARY) + 4} words, the model knows"),
        ([word for word in BERT_VOCABULARY if word != "[SEP]"], r"words without \[SEP\], the model"),
        ([], r"without \[PAD\], \[UNK\], \[CLS\], \[SEP\]"),
    ],
)
def test_another_vocabulary_is_refused(root, model, words, message):
    (root / "vocab.txt").write_text("\n".join(words))
    (problem,) = ImageReward().validate(["a"], [{}])
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)
    with pytest.raises(ValueError, match=message):
        load_scorer.__wrapped__(root / "ImageReward.pt", "float32", "swap")


@pytest.mark.parametrize("file", ["ImageReward.pt", "vocab.txt"])
def test_a_missing_file_is_named_with_where_to_get_it(root, model, file):
    (root / file).unlink()
    (problem,) = ImageReward().validate(["a"], [{}])
    source = "zai-org/ImageReward ImageReward.pt" if file.endswith("pt") else "google-bert/bert-base-uncased vocab.txt"
    assert f"{root} has no " in problem
    assert f"hf download {source} --local-dir {root}" in problem


def test_a_pickle_with_code_is_refused(root, model):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"a": Evil()}, root / "ImageReward.pt")
    assert "holds more than tensors" in ImageReward().validate(["a"], [{}])[0]


def test_the_published_model_is_blip_large_with_bert_base(tmp_path):
    config = blip_config(tmp_path)
    with torch.device("meta"):
        vision, text = BlipVisionModel(config.vision_config), BlipTextModel(config.text_config, add_pooling_layer=False)
    millions = sum(w.numel() for part in (vision, text) for w in part.parameters()) / 1e6
    assert round(millions) == 445
    assert vision.get_parameter("embeddings.position_embedding").shape == (1, 197, 1024)
    assert text.get_parameter("embeddings.word_embeddings.weight").shape == (30524, 768)
    assert text.get_parameter("encoder.layer.11.crossattention.self.key.weight").shape == (768, 1024)
    assert (config.vision_config.layer_norm_eps, config.text_config.layer_norm_eps) == (1e-6, 1e-12)
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (16, 12)
    assert config.vision_config.hidden_act == config.text_config.hidden_act == "gelu"


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
        ("vision.embeddings.patch_embedding.bias", "blip.visual_encoder.patch_embed.proj.bias"),
        ("vision.encoder.layers.11.layer_norm2.weight", "blip.visual_encoder.blocks.11.norm2.weight"),
        ("vision.encoder.layers.3.self_attn.projection.bias", "blip.visual_encoder.blocks.3.attn.proj.bias"),
        ("vision.encoder.layers.3.mlp.fc2.bias", "blip.visual_encoder.blocks.3.mlp.fc2.bias"),
        ("vision.post_layernorm.weight", "blip.visual_encoder.norm.weight"),
        ("text.encoder.layer.0.output.dense.bias", "blip.text_encoder.encoder.layer.0.output.dense.bias"),
    ],
)
def test_the_names_are_those_of_the_published_checkpoint(own, expected):
    assert published(own) == expected
