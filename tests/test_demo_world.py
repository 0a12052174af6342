"""The demo model's world: prompts, pictures, the latent codec and the text encoding."""

from collections import Counter

import pytest
import torch
from densegrpo.engine.demo import codec, text
from densegrpo.engine.demo.scenes import (
    BACKGROUND,
    CELLS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SceneSampler,
    all_prompts,
    cell_table,
    is_held_out,
    layouts,
    prompt_lists,
)
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards import make_reward
from densegrpo.engine.rewards.geneval import problems

ENTRIES = list(all_prompts())
BY_PROMPT = {e["prompt"]: i for i, e in enumerate(ENTRIES)}


@pytest.fixture(scope="module")
def table():
    return cell_table()


@pytest.fixture(scope="module")
def book(table):
    """A codec fitted to 1000 pictures."""
    return codec.fit(paint(table, torch.arange(1000)))


def paint(table, index, seed=0):
    return SceneSampler(ENTRIES, table)(index, torch.Generator().manual_seed(seed))


def picture(table, prompt, num=1, seed=0):
    return paint(table, torch.full((num,), BY_PROMPT[prompt]), seed)


def colour_share(images, colour):
    """[B] share of pixels of exactly this colour."""
    value = torch.tensor(COLOURS[colour]).view(1, 3, 1, 1) / 255
    return ((images - value).abs().amax(1) < 1e-3).float().mean((1, 2))


def test_there_are_1170_different_prompts():
    assert len(ENTRIES) == len(BY_PROMPT) == 1170
    assert Counter(e["tag"] for e in ENTRIES) == {
        "single_object": 3,
        "counting": 3 * 3 + 18 * 3,
        "colors": 18,
        "two_object": 6,
        "color_attr": 18 * 12,
        "position": 18 * 12 * 4,
    }


def test_prompts_read_as_their_metadata_says():
    by = {e["prompt"]: e for e in ENTRIES}
    assert by["three red circles"]["include"] == [{"class": "circle", "count": 3, "color": "red"}]
    assert by["three red circles"]["exclude"] == [{"class": "circle", "count": 4}]
    assert by["a red circle above a blue square"]["include"] == [
        {"class": "circle", "count": 1, "color": "red", "position": ["above", 1]},
        {"class": "square", "count": 1, "color": "blue"},
    ]
    assert by["a circle"]["include"] == [{"class": "circle", "count": 1}]


def test_every_prompts_metadata_is_valid():
    assert all(problems(e, SHAPES, list(COLOURS)) is None for e in ENTRIES)


def test_a_fifth_of_the_compositions_is_held_out():
    held_out = [e for e in ENTRIES if is_held_out(e)]
    assert 0.17 < len(held_out) / len(ENTRIES) < 0.23
    assert not {"single_object", "two_object"} & {e["tag"] for e in held_out}
    assert {"counting", "colors", "color_attr", "position"} <= {e["tag"] for e in held_out}


def test_every_word_of_a_held_out_prompt_is_known_from_training():
    seen = {word for e in ENTRIES if not is_held_out(e) for word in e["prompt"].split()}
    assert {word for e in ENTRIES if is_held_out(e) for word in e["prompt"].split()} <= seen


def test_training_and_held_out_lists_share_nothing():
    seen, held_out = prompt_lists()
    assert not {e["prompt"] for e in seen} & {e["prompt"] for e in held_out}
    assert all(is_held_out(e) for e in held_out)
    assert not any(is_held_out(e) for e in seen)
    assert all(any("color" in c for c in e["include"]) for e in seen)
    for entries in (seen, held_out):
        assert len({e["prompt"] for e in entries}) == len(entries)
        assert Counter(e["tag"] for e in entries)["position"] == 80


def test_layouts_place_what_the_prompt_says():
    for entry in ENTRIES:
        found = layouts(entry)
        assert len(set(found)) == len(found) > 0
        counts = [c["count"] for c in entry["include"]]
        assert all([cells.count(n + 1) for n in range(len(counts))] == counts for cells in found)


@pytest.mark.parametrize("relation", sorted(RELATIONS))
def test_layouts_of_a_relation_are_all_that_satisfy_it(relation):
    """4 of 12 places: 2 in line and 2 across."""
    found = layouts(ENTRIES[BY_PROMPT[f"a red circle {relation} a blue square"]])
    assert len(found) == 4
    for cells in found:
        (x, y), (u, v) = CELLS[cells.index(1)], CELLS[cells.index(2)]
        assert {"left of": x < u, "right of": x > u, "above": y < v, "below": y > v}[relation]


@pytest.mark.parametrize(("prompt", "num"), [("a red circle", 4), ("two red circles", 6), ("four red circles", 1)])
def test_layouts_of_a_count_are_all_choices_of_cells(prompt, num):
    assert len(layouts(ENTRIES[BY_PROMPT[prompt]])) == num


def test_a_picture_shows_the_asked_colours_on_the_background(table):
    image = picture(table, "a red circle and a blue square", 8)
    assert image.shape == (8, 3, 64, 64)
    assert ((image >= 0) & (image <= 1)).all()
    corner = torch.tensor(BACKGROUND) / 255
    torch.testing.assert_close(image[:, :, 0, 0], corner.expand(8, 3))
    assert (colour_share(image, "red") > 0.05).all()
    assert colour_share(image, "blue").tolist() == pytest.approx([400 / 4096] * 8)
    assert all((colour_share(image, other) == 0).all() for other in ("green", "yellow", "purple", "black"))


def test_the_area_of_shapes_is_right(table):
    """Circle pi r^2, square 4 r^2, triangle 2 r^2 with r = 10, edges smoothed."""
    for shape, expected in (("circle", 314.16), ("square", 400), ("triangle", 200)):
        black, empty = table[5, SHAPES.index(shape), 40], table[6, 0, 0]
        alpha = (empty - black) / (empty[0, 0, 0] - black.min())
        assert alpha[0].sum().item() == pytest.approx(expected, rel=0.02)


def test_every_place_of_a_shape_is_inside_its_cell(table):
    frame = torch.ones(32, 32, dtype=torch.bool)
    frame[1:-1, 1:-1] = False
    background = torch.tensor(BACKGROUND).div(255)[:, None]
    assert (table[..., frame] - background).abs().max() < 1e-6
    torch.testing.assert_close(table[6], background[:, :, None].expand(*table[6].shape[:-3], 3, 32, 32))


def test_uncoloured_prompts_show_any_colour(table):
    images = picture(table, "a square", 60)
    shown = torch.stack([colour_share(images, colour) > 0 for colour in COLOURS])
    assert (shown.sum(0) == 1).all()
    assert shown.any(1).all()


def test_every_layout_is_equally_likely(table):
    images = picture(table, "a red circle", 400)
    cells = images.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    in_cell = (colour_share(cells, "red") > 0).view(400, 4)
    assert (in_cell.sum(1) == 1).all()
    assert ((in_cell.sum(0) > 70) & (in_cell.sum(0) < 130)).all()


def test_places_vary_and_the_seed_determines_the_picture(table):
    first, again, other = (picture(table, "a red circle", 30, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.flatten(1).unique(dim=0)) > 20


def test_latents_may_be_gathered_instead_of_pixels(table, book):
    """The codec works patch by patch, so encoding a picture equals gathering encoded cells."""
    latents = codec.encode(table.flatten(0, 2), book).unflatten(0, table.shape[:3])
    index = torch.arange(0, 1170, 17)
    torch.testing.assert_close(codec.encode(paint(table, index), book), paint(latents, index), atol=1e-5, rtol=1e-5)


def test_the_codec_keeps_what_a_picture_shows(table, book):
    """Colours, shapes and places survive; only fine detail of edges is lost."""
    index = torch.arange(0, 1170, 7)
    images = paint(table, index)
    latents = codec.encode(images, book)
    assert latents.shape == (len(index), 16, 8, 8)
    decoded = codec.decode(latents, book)
    assert (decoded - images).square().mean().sqrt() < 0.07
    checker = make_reward("shapes", score="strict")
    scores = [checker(RewardBatch(x, [""] * len(x), [ENTRIES[i] for i in index])).scores for x in (images, decoded)]
    assert scores[1].mean() > scores[0].mean() - 0.05


def test_encoding_undoes_decoding(book):
    """Of latents whose images stay in range: nothing is clamped."""
    latents = 0.05 * torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    lifted = {**book, "mean": torch.full_like(book["mean"], 0.5)}
    torch.testing.assert_close(codec.encode(codec.decode(latents, lifted), lifted), latents, atol=1e-5, rtol=0)


def test_latents_have_about_unit_variance_and_mean_zero(table, book):
    latents = codec.encode(paint(table, torch.arange(1000)), book)
    assert latents.square().mean().item() == pytest.approx(1, abs=0.02)
    assert latents.mean((0, 2, 3)).abs().max() < 0.05


def test_decoded_images_are_in_range_and_of_any_size(book):
    images = codec.decode(10 * torch.randn(2, 16, 4, 10), book)
    assert images.shape == (2, 3, 32, 80)
    assert (images.min(), images.max()) == (0, 1)


def test_words_become_tokens():
    assert text.tokens("a red circle") == text.tokens("Red, circle!") == text.tokens("the red circles")
    assert text.tokens("a red circle")[2:] == [text.PADDING] * 6
    assert text.tokens("") == text.tokens("the of a") == [text.PADDING] * 8
    assert len(text.tokens("one two three four five six seven eight nine ten")) == 8
    assert text.tokens("a red circle and a blue square") != text.tokens("a blue circle and a red square")


def test_every_prompt_of_the_world_is_told_apart():
    """No two words share a row of the table, and word order counts."""
    assert len({tuple(text.tokens(e["prompt"])) for e in ENTRIES}) == len(ENTRIES)
    words = {w for e in ENTRIES for w in e["prompt"].split()} - text.STOP_WORDS
    rows = {text.tokens(w)[0] for w in words}
    assert len(rows) == len({w[:-1] if len(w) > 3 and w.endswith("s") else w for w in words})
    assert text.PADDING not in rows


def test_text_is_encoded_by_word_and_place():
    tables = text.make_tables()
    context, pooled = text.encode(["a red circle", "a circle", ""], tables)
    assert context.shape == (3, 8, 64)
    assert pooled.shape == (3, 128)
    ids = text.tokens("a red circle")
    torch.testing.assert_close(context[0, 1], tables["word"][ids[1]] + tables["position"][1])
    torch.testing.assert_close(context[0, 1] - context[1, 0], tables["position"][1] - tables["position"][0])
    torch.testing.assert_close(context[2], tables["word"][0] + tables["position"])
    assert pooled.std().item() == pytest.approx(1.1, abs=0.3)


def test_a_prompt_is_encoded_the_same_beside_others():
    tables = text.make_tables()
    both, alone = text.encode(["a red circle", "a circle"], tables), text.encode(["a circle"], tables)
    for a, b in zip(both, alone, strict=True):
        torch.testing.assert_close(a[1:], b)


def test_the_tables_of_text_are_fixed_by_their_seed():
    first, again, other = text.make_tables(), text.make_tables(), text.make_tables(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["word"], other["word"])
