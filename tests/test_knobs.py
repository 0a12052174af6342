"""Options: every one is documented, bounded and checked, and a wrong one is named with what is allowed."""

from dataclasses import dataclass
from typing import Annotated

import pytest
from densegrpo.engine.advantage import GroupNorm
from densegrpo.engine.credit import broadcast_terminal, gain
from densegrpo.engine.kernels import CPS, EULER_MARUYAMA
from densegrpo.engine.knobs import Choice, Knob, Text, check, flag, options_of, suggest
from densegrpo.engine.learner import OptimizerSettings
from densegrpo.engine.lora import LoraSettings
from densegrpo.engine.loss import PolicyUpdate
from densegrpo.engine.models import load_model, model_options
from densegrpo.engine.models.tiny import DemoSettings
from densegrpo.engine.probe import FinalImage
from densegrpo.engine.recipes import RECIPES, make_recipe, parts_of, recipe_options
from densegrpo.engine.rewards import REWARDS, make_reward, reward_options
from densegrpo.engine.train import TrainSettings
from hypothesis import given
from hypothesis import strategies as st

every_recipe = pytest.mark.parametrize("name", sorted(RECIPES))


def cook(
    size: Annotated[int, Knob(2, 8, "how big")] = 4,
    heat: Annotated[float, Knob(0.0, 1.0, "how hot")] = 0.5,
    taste: Annotated[str, Choice(("sweet", "salty"), "how it tastes")] = "sweet",
    hot: Annotated[bool, flag("served hot")] = False,
    name: Annotated[str, Text("what it is called")] = "",
    secret: int = 3,
):
    """An owner of options."""


@dataclass(frozen=True, kw_only=True)
class Dish:
    size: Annotated[int, Knob(2, 8, "how big")] = 4
    secret: int = 3


OPTIONS = options_of(cook)


def test_only_annotated_parameters_are_options():
    assert list(OPTIONS) == ["size", "heat", "taste", "hot", "name"]
    assert OPTIONS["size"] == (int, Knob(2, 8, "how big"), 4)
    assert OPTIONS["hot"] == (bool, Choice((False, True), "served hot"), False)
    assert options_of(Dish) == {"size": OPTIONS["size"]}


@pytest.mark.parametrize(
    "given_options",
    [{}, {"size": 2}, {"size": 8}, {"heat": 1}, {"heat": 0.0}, {"taste": "salty"}, {"hot": True}, {"name": ""}],
)
def test_what_is_allowed_passes(given_options):
    check("cook", OPTIONS, given_options)


@pytest.mark.parametrize(
    ("given_options", "message"),
    [
        ({"size": 1}, r"^cook: size \(how big\) must be a whole number in 2..8, got 1$"),
        ({"size": 9}, "in 2..8, got 9"),
        ({"size": 4.0}, "must be a whole number in 2..8, got 4.0"),
        ({"size": "4"}, "must be a whole number in 2..8, got '4'"),
        ({"size": True}, "must be a whole number in 2..8, got True"),
        ({"size": None}, "must be a whole number in 2..8, got None"),
        ({"heat": 1.01}, r"heat \(how hot\) must be a number in 0.0..1.0, got 1.01"),
        ({"heat": float("nan")}, "must be a number in 0.0..1.0, got nan"),
        ({"heat": float("inf")}, "must be a number in 0.0..1.0, got inf"),
        ({"heat": False}, "must be a number in 0.0..1.0, got False"),
        ({"taste": "sour"}, r"taste \(how it tastes\) must be one of 'sweet', 'salty', got 'sour'"),
        ({"hot": 1}, r"hot \(served hot\) must be one of False, True, got 1"),
        ({"hot": "yes"}, "must be one of False, True, got 'yes'"),
        ({"name": 3}, r"name \(what it is called\) must be a text, got 3"),
        ({"siez": 4}, r"cook has no option 'siez' \(did you mean 'size'\?\); it has: size, heat, taste, hot, name"),
        ({"secret": 4}, "cook has no option 'secret'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_wrong_is_named_with_what_is_allowed(given_options, message):
    with pytest.raises(ValueError, match=message):
        check("cook", OPTIONS, given_options)


@given(value=st.integers() | st.floats())
def test_a_number_passes_exactly_when_it_is_in_its_range(value):
    problem = Knob(-1.5, 2.0, "tip").wrong(value, float)
    assert (problem is None) == (-1.5 <= value <= 2.0)


def test_suggestions_are_only_made_when_close():
    assert suggest("flow_gpro", RECIPES) == " (did you mean 'flow_grpo'?)"
    assert suggest("xyz", RECIPES) == ""


def declarations():
    """Everything that declares options, and how it is called in messages."""
    yield from ((f"recipe {name}", recipe_options(name)) for name in RECIPES)
    yield from ((f"reward {name}", reward_options(name)) for name in REWARDS)
    for owner in (GroupNorm, PolicyUpdate, LoraSettings, OptimizerSettings, TrainSettings, DemoSettings):
        yield owner.__name__, options_of(owner)


@pytest.mark.parametrize(("title", "options"), [pytest.param(*d, id=d[0]) for d in declarations()])
def test_every_option_has_a_tip_and_an_allowed_default(title, options):
    for name, option in options.items():
        assert option.limits.tip, f"{title}: {name}"
        check(title, options, {name: option.default})


@every_recipe
def test_a_recipe_shows_its_own_options_and_those_of_its_parts(name):
    options, recipe = recipe_options(name), RECIPES[name]()
    assert {"group_size", "noise", "clip_range", "kl_weight", "num_updates", "std_scope", "norm_axis"} <= set(options)
    assert options["kl_weight"].default == recipe.update.kl_weight
    assert options["num_updates"].default == recipe.update.num_updates
    assert options["std_floor"].default == recipe.normalise.std_floor
    parts = [set(options_of(type(part))) for part in parts_of(name).values()]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(options)


def comparable(recipe):
    """What of a recipe can be compared."""
    return recipe.explore, recipe.noise, recipe.probe, recipe.credit, recipe.normalise, recipe.update


@every_recipe
def test_a_recipe_without_options_is_the_recipe_itself(name):
    assert comparable(make_recipe(name)) == comparable(RECIPES[name]())


@every_recipe
def test_options_reach_the_part_they_belong_to(name):
    recipe = make_recipe(name, group_size=2, kernel="cps", std_scope="global", clip_range=0.25, ratio="guard")
    assert recipe.noise.step is CPS
    assert recipe.normalise.std_scope == "global"
    assert (recipe.update.clip_range, recipe.update.ratio) == (0.25, "guard")
    assert recipe.update.kl_weight == RECIPES[name]().update.kl_weight


def test_the_recipes_are_what_their_papers_say():
    """Defaults of the methods' tables."""
    flow, dense = make_recipe("flow_grpo"), make_recipe("dense_grpo")
    assert (flow.noise.step, flow.probe, flow.credit) == (EULER_MARUYAMA, FinalImage(), broadcast_terminal)
    assert (flow.update.kl, flow.update.kl_weight, flow.update.clip_range) == ("flow_grpo", 0.04, 1e-4)
    assert (flow.normalise.std_scope, flow.normalise.std_eps, flow.normalise.advantage_clip) == ("group", 1e-4, 5.0)
    assert dense.credit is gain
    assert comparable(dense)[-2:] == comparable(flow)[-2:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"group_size": 1},
            r"flow_grpo: group_size \(images compared with each other\) must be a whole number in 2..128, got 1",
        ),
        ({"nosie": 0.7}, r"flow_grpo has no option 'nosie' \(did you mean 'noise'\?\); it has: group_size, "),
        ({"kernel": "ode"}, "kernel .* must be one of 'sde', 'cps', got 'ode'"),
        ({"kl": "k3"}, "kl .* must be one of 'exact', 'flow_grpo', 'velocity', got 'k3'"),
        ({"clip_range": 0.0}, "clip_range .* must be a number in 1e-08..1.0, got 0.0"),
        ({"probe_evaluations": 2}, "flow_grpo has no option 'probe_evaluations'"),
    ],
    ids=lambda value: str(value)[:25],
)
def test_a_wrong_recipe_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_recipe("flow_grpo", **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_recipe("grpo"), "unknown recipe 'grpo'.*; known: dance_grpo, dense_grpo, flow_grpo"),
        (lambda: recipe_options("dense_gpro"), r"unknown recipe 'dense_gpro' \(did you mean 'dense_grpo'\?\)"),
        (
            lambda: make_reward("brightnes"),
            r"unknown reward 'brightnes' \(did you mean 'brightness'\?\); known: bri",
        ),
        (lambda: make_reward("brightness", target=2.0), r"reward brightness: target .* in 0.0..1.0, got 2.0"),
        (lambda: make_reward("jpeg", quality=3), "reward jpeg has no option 'quality'; it has: direction"),
        (lambda: load_model("demmo", LoraSettings(), 0), r"unknown model 'demmo' \(did you mean 'demo'\?\)"),
        (lambda: load_model("demo", LoraSettings(), 0, shift=0.0), "model demo: shift .* in 0.1..20.0, got 0.0"),
        (lambda: load_model("demo", LoraSettings(), 0, cfg=2.0), "model demo has no option 'cfg'.*; it has: guidance"),
    ],
)
def test_unknown_names_and_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_options_of_a_model_are_those_of_its_settings():
    assert model_options("demo") == options_of(DemoSettings)
