"""The connected parts make a recipe: which one, with all its options, and what is said when there is none."""

import pytest
from densegrpo.engine.credit import TurningPoints
from densegrpo.engine.explore import Branches, Chains
from densegrpo.engine.knobs import options_of
from densegrpo.engine.noise import StepNoise
from densegrpo.engine.probe import EveryState, FasterTail, Granularities
from densegrpo.engine.recipes import RECIPES, make_recipe, recipe_options
from node_mapping import mapping

EVERY, STRIDES, FEWER = mapping.EVERY_STATE, mapping.GRANULARITIES, mapping.FEWER_STEPS


def defaults(*parts):
    """What the widgets of a node hold."""
    options = {name: option.default for part in parts for name, option in options_of(part).items()}
    return {name: value for name, value in options.items() if name != "noise_table"}


def chains(**changed):
    return {"num_steps": 10, **defaults(Chains, StepNoise), **changed}


def branches(**changed):
    return {"num_steps": 10, **defaults(Branches, StepNoise), **changed}


def probe(states):
    return mapping.probe_of({**defaults(EveryState, Granularities, FasterTail), "states": states})


def credit(mode):
    return mapping.credit_of({**defaults(TurningPoints), "mode": mode})


PARTS = {
    "flow_grpo": (chains(), None, None),
    "flow_grpo_fast": (chains(window="random"), None, None),
    "dance_grpo": (chains(noise_shape="constant"), None, None),
    "mix_grpo": (chains(window="sliding"), None, None),
    "mix_grpo_flash": (chains(window="sliding"), probe(FEWER), None),
    "dense_grpo": (chains(), probe(EVERY), None),
    "tempflow_grpo": (branches(), None, None),
    "g2rpo": (branches(), probe(STRIDES), None),
    "tp_grpo": (chains(), probe(EVERY), credit("turning points")),
}
MORE = [
    ("dance_grpo", (chains(train_fraction=0.5), None, None)),
    ("flow_grpo", (chains(kernel="cps"), None, None)),
    ("mix_grpo", (chains(window="fixed", noise_shape="constant"), None, None)),
    ("mix_grpo_flash", (chains(window="fixed"), probe(FEWER), None)),
    ("dense_grpo", (chains(window="sliding"), probe(EVERY), None)),
    ("dense_grpo", (chains(), probe(EVERY), credit("plain gains"))),
]


def test_every_recipe_can_be_made_from_parts():
    assert PARTS.keys() == RECIPES.keys()


@pytest.mark.parametrize(("name", "parts"), [*PARTS.items(), *MORE])
def test_the_parts_decide_the_recipe_and_hand_over_every_option(name, parts):
    method = mapping.method_of(*parts)
    assert method["name"] == name
    made = make_recipe(**method)
    given = {k: v for part in parts for k, v in (part or {}).items() if k != "num_steps"}
    assert method == {"name": name, **given}
    for part in (made.explore, made.noise, made.probe, made.credit):
        for key in given.keys() & options_of(type(part)).keys():
            assert getattr(part, key) == given[key], key


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_update_is_left_to_the_recipe(name):
    given = mapping.method_of(*PARTS[name])
    recipe = RECIPES[name]()
    left = recipe_options(name).keys() - given.keys() - {"noise_table"}
    assert left == options_of(type(recipe.normalise)).keys() | options_of(type(recipe.update)).keys()


def test_a_noise_table_and_every_number_travel_on():
    table = {"kernel": "sde", "sigmas": [1.0, 0.5, 0.0], "rates": [0.7, 0.0]}
    given = mapping.method_of(chains(noise_table=table, group_size=5), probe(EVERY))
    assert make_recipe(**given).noise.noise_table == table
    assert make_recipe(**given).explore.group_size == 5
    assert "num_steps" not in given


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((branches(), probe(EVERY)), "Branch SDE Sampler does not go with .* 'every state': set its states to 'after"),
        ((branches(), probe(FEWER)), "Branch SDE Sampler does not go with .*fewer steps.*or use Dense SDE Sampler"),
        ((chains(), probe(STRIDES)), "several granularities' needs Branch SDE Sampler .*connect that one to sampler"),
        ((chains(), probe(FEWER)), "nothing to shorten: .*Set window of Dense SDE Sampler to 'sliding' or 'fixed'"),
        ((chains(), None, credit("turning points")), "needs the reward of every state: connect an ODE Reward Probe"),
        ((chains(), None, credit("plain gains")), "or take the assigner out"),
        ((branches(), probe(STRIDES), credit("turning points")), "Turning-Point Assigner needs the reward of every"),
        ((chains(window="fixed"), probe(FEWER), credit("turning points")), "Turning-Point Assigner needs the reward"),
        ((branches(), probe(EVERY), credit("turning points")), "Branch SDE Sampler does not go with"),
    ],
)
def test_what_no_recipe_covers_is_refused_with_what_to_connect(parts, message):
    with pytest.raises(ValueError, match=message):
        mapping.method_of(*parts)


def test_an_unknown_choice_is_refused_by_name():
    with pytest.raises(ValueError, match=r"states must be one of 'every state', .*, got 'all'"):
        probe("all")
    with pytest.raises(ValueError, match="mode must be one of 'turning points', 'plain gains', got 'gains'"):
        credit("gains")


def test_choices_of_the_nodes_name_options_of_the_engine():
    parts = {EVERY: EveryState, STRIDES: Granularities, FEWER: FasterTail}
    assert {choice: tuple(options_of(part)) for choice, part in parts.items()} == mapping.STATES
    assert mapping.ASSIGNMENTS[mapping.TURNING_POINTS] == tuple(options_of(TurningPoints))
