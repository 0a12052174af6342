"""What Inspect Rollout draws and says: chains with their turning points, branches step by step."""

import pytest
import torch
from densegrpo.engine import filmstrip
from densegrpo.engine.credit import TurningPoints
from densegrpo.engine.data import Prompt, StepRewards
from densegrpo.engine.filmstrip import DOWN, ROWS, UP, chain_cell, look, turning_points, with_frame
from densegrpo.engine.lora import LoraSettings
from densegrpo.engine.models import load_model
from densegrpo.engine.recipes import make_recipe
from densegrpo.engine.rewards import make_panel

STEPS = 6
PROMPT = Prompt("a yellow circle and a green square", {})


@pytest.fixture(scope="module")
def demo():
    return load_model("demo", LoraSettings(rank=1), 0)


@pytest.fixture
def captions(monkeypatch):
    """The captions of the picture, row by row."""
    rows, draw = [], filmstrip.grid

    def grid(images, captions, columns, smallest):
        rows.extend(captions[i : i + columns] for i in range(0, len(captions), columns))
        return draw(images, captions, columns, smallest)

    monkeypatch.setattr(filmstrip, "grid", grid)
    return rows


SHAPES, BRIGHTNESS = {"name": "shapes", "score": "dense"}, {"name": "brightness"}


def seen(demo, name, rewards=(SHAPES,), **options):
    panel = make_panel(rewards, "each")
    recipe = make_recipe(name, **options)
    with torch.no_grad():
        cond = demo.encode([PROMPT.text])
        return recipe, look(demo, cond, PROMPT, panel, recipe, num_steps=STEPS, seed=1, batch=64)


def has(picture, colour):
    """Whether a colour of a frame is in a picture [1, H, W, 3]."""
    return bool((picture - torch.tensor(colour)).abs().amax(-1).lt(0.003).any())


@pytest.mark.parametrize("rewards", [(SHAPES,), (SHAPES, BRIGHTNESS)])
def test_turning_points_are_framed_named_and_counted(demo, captions, rewards):
    recipe, strip = seen(demo, "tp_grpo", rewards, group_size=6, noise=0.7, kernel="cps")
    marks = sum(caption.split(" agg ")[1:] != [] for row in captions for caption in row)
    counted = strip.report.splitlines()[0]
    assert marks > 0
    assert counted.startswith(f"turning points: {marks} of {6 * (STEPS - 1)} noisy steps (")
    assert has(strip.picture, UP)
    assert has(strip.picture, DOWN)
    if len(rewards) == 1:
        scored = StepRewards(strip.rewards, torch.ones(1))
        assert recipe.credit.mark(scored, torch.zeros(6).long()).sum() == marks


def test_without_an_assigner_nothing_is_framed(demo, captions):
    _, strip = seen(demo, "dense_grpo", group_size=10)
    assert "turning" not in strip.report
    assert not any("agg" in caption for row in captions for caption in row)
    assert not has(strip.picture, UP)
    assert (len(captions), len(captions[0])) == (ROWS, STEPS + 1)


def test_a_marked_cell_says_the_gain_to_the_end_the_others_their_own():
    reward = torch.tensor([0.5, 0.25, 1.0])
    turns = torch.tensor([False, True])
    cells = [chain_cell([0, 1, 2], i, reward, turns, torch.arange(3)) for i in range(3)]
    assert [cell.caption for cell in cells] == ["0: 0.50", "1: 0.25 (-0.25)", "2: 1.00 agg +0.75"]
    assert [cell.frame for cell in cells] == [None, None, UP]
    assert [cell.latent for cell in cells] == [0, 1, 2]
    falling = chain_cell([0, 1, 2], 1, torch.tensor([0.5, 0.25, 0.0]), torch.tensor([True, False]), torch.arange(3))
    assert (falling.caption, falling.frame) == ("1: 0.25 agg -0.50", DOWN)


def test_one_scored_state_puts_chains_side_by_side(demo, captions):
    _, strip = seen(demo, "flow_grpo", group_size=8)
    assert [len(row) for row in captions] == [4, 4]
    assert {caption.partition(":")[0] for row in captions for caption in row} == {str(STEPS)}
    assert strip.report.startswith(f"state {STEPS} of {STEPS}: mean reward ")
    captions.clear()
    seen(demo, "mix_grpo_flash", group_size=4, window="fixed", window_size=2)
    assert {caption.partition(":")[0] for row in captions for caption in row} == {"2"}


def test_branches_stand_step_by_step_with_their_distance_from_their_siblings(demo, captions):
    _, strip = seen(demo, "tempflow_grpo", group_size=5, num_seeds=2)
    assert [row[0].partition(":")[0] for row in captions] == [str(k) for k in range(STEPS - 1)]
    for row in captions:
        assert len(row) == 5
        offsets = [float(caption.partition("(")[2].rstrip(")")) for caption in row]
        assert sum(offsets) == pytest.approx(0, abs=0.03)
    lines = strip.report.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"branches at step {k}" for k in range(STEPS - 1)]
    siblings = strip.rewards[0, :5, -1]  # of the first seed, at the first step
    others = strip.rewards[0, 5 * (STEPS - 1) :][:5, -1]
    spread = (siblings.std(correction=0) + others.std(correction=0)) / 2
    assert float(lines[0].rpartition(" ")[2]) == pytest.approx(float(spread), abs=6e-4)


def test_every_granularity_has_its_row_and_line(demo, captions):
    _, strip = seen(demo, "g2rpo", group_size=4, branch_share=0.5, strides="1, 3")
    assert [row[0].partition(":")[0] for row in captions] == ["0/1", "0/3", "1/1", "1/3", "2/1", "2/3"]
    assert strip.report.splitlines()[1].startswith("branches at step 0, stride 3: mean ")
    assert strip.rewards.shape == (2, 12, STEPS + 1)
    assert (strip.rewards[0, 0, 1] - strip.rewards[1, 0, 1]).abs() > 1e-4, "both grids gave the same"
    height = strip.picture.shape[1] // 6
    fine, coarse = (strip.picture[0, n * height : (n + 1) * height - 20] for n in (0, 1))
    assert (fine - coarse).abs().max() > 0.05, "both rows show the same images"


def test_several_rewards_add_up_on_every_grid(demo):
    options = {"group_size": 4, "branch_share": 0.5, "strides": "1, 3"}
    both, one, other = (
        seen(demo, "g2rpo", rewards, **options)[1].rewards
        for rewards in ((SHAPES, {**BRIGHTNESS, "weight": 2.0}), (SHAPES,), (BRIGHTNESS,))
    )
    assert torch.allclose(both, one + 2 * other, equal_nan=True, atol=1e-6)


def test_many_steps_are_thinned_out_from_the_first_to_the_last(demo, captions):
    seen(demo, "g2rpo", group_size=2, branch_share=1.0, strides="1, 2, 3, 4")
    assert [row[0].partition(":")[0] for row in captions][::4] == ["0/1", "2/1", "4/1"]


def test_a_frame_covers_the_edge_alone():
    image = torch.zeros(3, 48, 48)
    framed = with_frame(image, UP)
    assert framed[:, 0, 0].tolist() == pytest.approx(UP)
    assert framed[:, 2:-2, 2:-2].abs().max() == 0
    assert with_frame(image, None) is image


def test_marks_of_other_credits_are_none():
    recipe = make_recipe("dense_grpo", group_size=2)
    plan = recipe.plan((1, 2, 2), torch.tensor([1.0, 0.5, 0.0]), (0, 0, 0))
    assert not turning_points(recipe, StepRewards(torch.zeros(1, 2, 3), torch.ones(1)), plan).any()
    assert isinstance(make_recipe("tp_grpo").credit, TurningPoints)
