"""Hyperparameters by method and model."""

import json

import pytest
from densegrpo.engine import cli
from densegrpo.engine.config import make_config
from densegrpo.engine.profiles import MODELS, PROFILES, profile
from densegrpo.engine.recipes import RECIPES, make_recipe

every_profile = pytest.mark.parametrize("model", MODELS)
every_recipe = pytest.mark.parametrize("method", RECIPES)
OWN = {"name": "mine", "rewards": [{"name": "brightness"}], "prompts": ["a red circle"]}


@every_profile
@every_recipe
def test_every_method_has_a_profile_that_makes_a_configuration(method, model):
    config = make_config(OWN | {"profile": model, "method": {"name": method}})
    assert config.model["name"] == {"demo": "demo"}.get(model, "diffusers")
    assert make_recipe(**config.method)
    assert profile(method, model).source


def test_what_the_papers_print_stands_in_the_profiles():
    """methods.md sections 1-7 and table 10."""
    sd35 = {name: make_config(OWN | {"profile": "sd35", "method": {"name": name}}) for name in RECIPES}
    assert {c.training.num_steps for c in sd35.values()} == {10}
    assert {(c.lora.rank, c.lora.alpha, c.optimizer.lr, c.optimizer.ema_every) for c in sd35.values()} == {
        (32, 64.0, 3e-4, 8)
    }
    updates = {name: make_recipe(**c.method).update for name, c in sd35.items()}
    assert {name: u.clip_range for name, u in updates.items() if u.clip_range != 1e-4} == {
        "flow_grpo_fast": 1e-5,
        "tp_grpo": 1e-5,
    }
    assert {name: u.kl_weight for name, u in updates.items() if u.kl_weight} == {
        "flow_grpo": 0.04,
        "dense_grpo": 0.04,
        "mix_grpo": 0.001,
        "mix_grpo_flash": 0.001,
        "tempflow_grpo": 0.004,
        "tp_grpo": 1e-4,
    }
    groups = {name: make_recipe(**c.method).explore.group_size for name, c in sd35.items()}
    assert groups == dict.fromkeys(RECIPES, 24) | {"dance_grpo": 12, "tempflow_grpo": 6, "g2rpo": 12}
    flux = {name: make_config(OWN | {"profile": "flux", "method": {"name": name}}) for name in RECIPES}
    assert {name: c.training.num_steps for name, c in flux.items()} == {
        "flow_grpo": 6,
        "flow_grpo_fast": 6,
        "dance_grpo": 16,
        "mix_grpo": 25,
        "mix_grpo_flash": 25,
        "dense_grpo": 6,
        "tempflow_grpo": 10,
        "g2rpo": 16,
        "tp_grpo": 6,
    }


def test_every_recipe_and_every_profile_belong_together():
    assert set(PROFILES) == set(RECIPES)
    assert all(set(models) | {"demo"} == set(MODELS) for models in PROFILES.values())


def test_what_the_configuration_says_wins():
    config = make_config(
        OWN
        | {
            "profile": "sd35",
            "method": {"name": "flow_grpo", "kl_weight": 0.01},
            "model": {"name": "diffusers", "path": "my/model"},
            "training": {"groups": 2},
        }
    )
    assert config.method["kl_weight"] == 0.01
    assert (config.model["path"], config.model["resolution"]) == ("my/model", 512)
    assert (config.training.groups, config.training.num_steps) == (2, 10)


def test_a_profile_leaves_another_kind_of_model_alone():
    config = make_config(OWN | {"profile": "sd35", "method": {"name": "g2rpo"}, "model": {"name": "demo"}})
    assert config.model == {"name": "demo"}


def test_a_saved_configuration_needs_no_profile():
    config = make_config(OWN | {"profile": "sd35", "method": {"name": "g2rpo"}})
    assert "profile" not in json.loads(config.to_json())
    assert make_config(json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": "sd3"}, r"unknown profile 'sd3' \(did you mean 'sd35'\?\); known: sd35, flux, demo"),
        ({"method": {"name": "flow"}}, "unknown recipe 'flow'"),
        ({"method": None}, "method must be an object"),
        (
            {"method": {"name": "mix_grpo", "window_size": 30}},
            "a window that reaches to step 30 does not fit: of 10 denoising steps 9 can be noisy",
        ),
    ],
)
def test_a_wrong_profile_or_method_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        make_config(OWN | {"profile": "sd35", "method": {"name": "flow_grpo"}} | change)


def test_the_command_line_prints_a_method_and_its_profile(capsys):
    assert cli.main(["recipes", "g2rpo"]) == 0
    text = capsys.readouterr().out
    assert 'strides = "1, 2, 3"' in text
    assert '"profile": "flux"    arXiv 2510.01982' in text
    assert cli.main(["recipes", "g2rpo", "--profile", "flux"]) == 0
    printed = capsys.readouterr()
    assert make_config(OWN | json.loads(printed.out)).training.num_steps == 16
    assert "source: arXiv 2510.01982" in printed.err
