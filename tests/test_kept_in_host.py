"""In ComfyUI reward models stay as long as the host's cache holds the reward on a link, and no longer.

What is measured is in comfy_kept_cases.py. See comfy_host.py for the host.
"""

from pathlib import Path

import pytest
from comfy_host import host  # noqa: F401

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def measured(host, tmp_path_factory):  # noqa: F811
    """Case -> moment -> [how often models were loaded, models in memory, their patchers in memory]."""
    answer = tmp_path_factory.mktemp("kept") / "answer.json"
    return host.run(Path(__file__).with_name("comfy_kept_cases.py"), answer)


@pytest.mark.parametrize("moment", ["one", "the same", "another prompt"])
def test_a_graph_that_is_queued_again_does_not_load_again(measured, moment):
    assert measured["scoring"][moment] == [1, 1, 1]


def test_a_model_goes_before_that_of_another_reward_is_loaded(measured):
    assert measured["scoring"]["before it is loaded"] == [1, 0, 0]
    assert measured["scoring"]["another reward"] == [2, 1, 1]


def test_the_hosts_button_frees_the_models(measured):
    assert measured["scoring"]["freed"] == [2, 0, 0]
    assert measured["training"]["freed"][1:] == [0, 0]


def test_rewards_share_one_clip_until_the_last_of_them_goes(measured):
    assert measured["one_clip_for_several"] == {"all": [1, 1, 1], "one": [1, 1, 1], "none": [1, 0, 0]}


def test_a_training_holds_the_models_of_both_rewards_for_the_next_one(measured):
    assert measured["training"]["first"] == measured["training"]["again"] == [2, 2, 2]


def test_the_model_of_a_held_out_reward_goes_with_it_and_takes_the_other_along(measured):
    assert measured["training"]["another held-out reward"] == [3, 1, 1]


def test_other_nodes_hold_a_model_no_longer_than_its_reward(measured):
    for kind, states in measured["other_nodes"].items():
        assert states == [[1, 1, 1], [1, 0, 0]], kind


def test_what_a_choice_holds_changes_neither_what_it_equals_nor_how_it_reads(measured):
    assert measured["choices"]["equal"]
    assert measured["choices"]["text"] == "RewardChoice(entries=({'name': 'jpeg'},), mode='each')"


def test_combined_rewards_hold_what_their_parts_hold(measured):
    assert measured["choices"]["parts"] == [True, True]


def test_no_node_leaves_a_model_to_the_process(measured):
    assert measured["process"] == 0
