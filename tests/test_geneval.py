"""GenEval's rules on hand-made detections: every tag hit, missed and half right; the geometry of relations."""

import pytest
from densegrpo.engine.rewards.geneval import RELATIONS, Detection, judge, problems, relations
from hypothesis import given
from hypothesis import strategies as st

NAMES, COLORS = ("circle", "square"), ("red", "blue")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def thing(name, color="red", x=0.0, y=0.0, size=2.0):
    """A detection centred at (x, y)."""
    return Detection(name, color, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def want(name, count=1, **more):
    return {"class": name, "count": count} | more


RED_LEFT_OF_BLUE = {
    "include": [want("circle", color="red", position=["left of", 1]), want("square", color="blue")],
    "exclude": [want("circle", 2), want("square", 2)],
}
ONE = {"include": [want("circle")]}
TWO = {"include": [want("circle"), want("square")]}
THREE = {"include": [want("circle", 3)], "exclude": [want("circle", 4)]}
RED = {"include": [want("circle", color="red")]}
TWO_RED = {"include": [want("circle", 2, color="red")]}
BOTH = {"include": [want("circle", color="red"), want("square", color="blue")]}


@pytest.mark.parametrize(
    ("metadata", "found", "strict", "partial"),
    [
        pytest.param(ONE, [thing("circle")], 1, 1, id="single object"),
        pytest.param(ONE, [], 0, 0, id="nothing there"),
        pytest.param(ONE, [thing("square")], 0, 0, id="another object"),
        pytest.param(ONE, [thing("circle"), thing("square")], 1, 1, id="other objects are welcome"),
        pytest.param(ONE, [thing("circle")] * 5, 0, 0, id="far too many: 0, not -3 as in the reference"),
        pytest.param(TWO, [thing("circle"), thing("square")], 1, 1, id="two objects"),
        pytest.param(TWO, [thing("square")], 0, 0.5, id="one of two objects"),
        pytest.param(THREE, [thing("circle")] * 3, 1, 1, id="counting"),
        pytest.param(THREE, [thing("circle")] * 2, 0, 2 / 3, id="one too few"),
        pytest.param(THREE, [thing("circle")] * 4, 0, 2 / 3, id="one too many"),
        pytest.param(RED, [thing("circle")], 1, 1, id="colour"),
        pytest.param(RED, [thing("circle", "blue")], 0, 0.5, id="wrong colour"),
        pytest.param(RED, [thing("square")], 0, 0, id="colour of another object"),
        pytest.param(RED, [thing("circle", "blue"), thing("circle")], 0, 0, id="the best has another colour"),
        pytest.param(TWO_RED, [thing("circle"), thing("circle", "blue")], 0, 0.75, id="one of two in the colour"),
        pytest.param(TWO_RED, [thing("circle")], 0, 0.5, id="a missing object has no colour"),
        pytest.param(TWO_RED, [thing("circle")] * 3, 0, 0.75, id="only as many colours as asked count"),
        pytest.param(BOTH, [thing("circle"), thing("square", "blue")], 1, 1, id="two colours"),
        pytest.param(BOTH, [thing("circle", "blue"), thing("square", "red")], 0, 0.5, id="colours swapped"),
        pytest.param(
            RED_LEFT_OF_BLUE, [thing("circle", x=-5), thing("square", "blue", x=5)], 1, 1, id="relation and colours"
        ),
        pytest.param(
            RED_LEFT_OF_BLUE, [thing("circle", x=5), thing("square", "blue", x=-5)], 0, 4 / 5, id="wrong relation"
        ),
        pytest.param(
            RED_LEFT_OF_BLUE, [thing("circle", x=-5), thing("square", x=5)], 0, 4 / 5, id="relation, wrong colour"
        ),
        pytest.param(RED_LEFT_OF_BLUE, [thing("circle")], 0, 2 / 5, id="a relation to nothing fails"),
        pytest.param(RED_LEFT_OF_BLUE, [], 0, 0, id="an empty picture has no relation"),
    ],
)
def test_what_is_there_is_judged_by_what_was_asked_for(metadata, found, strict, partial):
    assert judge(found, metadata) == pytest.approx((strict, partial))


def test_excluded_objects_fail_the_strict_score_only():
    metadata = {"include": [want("circle")], "exclude": [want("square", 2)]}
    for num_squares, strict in [(0, 1), (1, 1), (2, 0), (3, 0)]:
        assert judge([thing("circle")] + [thing("square")] * num_squares, metadata) == (strict, 1)


def test_of_too_many_objects_the_first_are_taken_for_relations():
    metadata = {"include": [want("circle", position=["above", 1]), want("square")]}
    good, bad, square = thing("circle", y=-5), thing("circle", y=5), thing("square")
    assert judge([good, bad, square], metadata).partial == pytest.approx((0 + 1 + 1) / 3)
    assert judge([bad, good, square], metadata).partial == pytest.approx((0 + 0 + 1) / 3)


def test_a_relation_must_hold_for_all_pairs():
    metadata = {"include": [want("circle", 2, position=["left of", 1]), want("square", 2)]}
    squares = [thing("square", x=10), thing("square", x=20)]
    assert judge([thing("circle", x=0), thing("circle", x=3), *squares], metadata).strict == 1
    assert judge([thing("circle", x=0), thing("circle", x=15), *squares], metadata).strict == 0


def test_the_relation_may_point_to_an_earlier_clause():
    metadata = {"include": [want("square"), want("circle", position=["below", 0])]}
    assert judge([thing("circle", y=5), thing("square")], metadata).strict == 1
    assert judge([thing("circle", y=-5), thing("square")], metadata).strict == 0


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-5, 0, {"left of"}),
        (5, 0, {"right of"}),
        (0, -5, {"above"}),
        (0, 5, {"below"}),
        (-5, -5, {"left of", "above"}),
        (5, 5, {"right of", "below"}),
        (-5, -1, {"left of"}),
        (0, 0, set()),
        (0.3, 0.3, set()),
    ],
)
def test_relations_follow_the_direction_between_centres(x, y, expected):
    """Boxes 2 x 2; y points down; an offset below a tenth of both widths, 0.4, is none."""
    assert relations(thing("circle", x=x, y=y), thing("square")) == expected


@pytest.mark.parametrize(("x", "holds"), [(0.39, False), (0.41, False), (0.79, False), (0.81, True), (3.0, True)])
def test_a_tenth_of_both_widths_is_taken_off_the_offset(x, holds):
    """The remaining offset must be more than half of the whole: (x - 0.4) / x > 0.5 from x = 0.8 on."""
    assert ("right of" in relations(thing("circle", x=x), thing("square"))) is holds


@pytest.mark.parametrize(("x", "expected"), [(0.0009, set()), (0.0015, {"right of"})])
def test_less_than_a_thousandth_is_no_offset_even_of_tiny_boxes(x, expected):
    """A tenth of both widths is 0.0002 here; the published rule looks at the unit of boxes, pixels."""
    assert relations(thing("circle", x=x, size=0.001), thing("square", size=0.001)) == expected


coordinates = st.floats(-20, 20)
things = st.builds(thing, st.just("circle"), st.just("red"), coordinates, coordinates, st.floats(0.5, 8))


@given(a=things, b=things)
def test_relations_are_those_of_the_published_rule_and_opposite_seen_from_the_other(a, b):
    found = relations(a, b)
    assert relations(b, a) == {OPPOSITE[r] for r in found}
    assert not {"left of", "right of"} <= found
    assert not {"above", "below"} <= found
    centres = [((d.box[0] + d.box[2]) / 2, (d.box[1] + d.box[3]) / 2) for d in (a, b)]
    offset = [p - q for p, q in zip(*centres, strict=True)]
    sizes = [(a.box[i + 2] - a.box[i]) + (b.box[i + 2] - b.box[i]) for i in (0, 1)]
    revised = [max(abs(o) - 0.1 * s, 0) * (1 if o > 0 else -1) for o, s in zip(offset, sizes, strict=True)]
    norm = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    dx, dy = (r / norm if norm else 0 for r in revised)
    if all(abs(r) < 1e-3 for r in revised):
        dx = dy = 0
    expected = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    assert found == {name for name, holds in expected.items() if holds}


@given(a=things, b=things, scale=st.floats(0.5, 4))
def test_the_unit_of_boxes_does_not_matter(a, b, scale):
    def bigger(d):
        return d._replace(box=tuple(scale * v for v in d.box))

    far = max(abs(p - q) for p, q in zip(a.box, b.box, strict=True)) > 1
    assert not far or relations(bigger(a), bigger(b)) == relations(a, b)


@given(
    found=st.lists(st.builds(thing, st.sampled_from(NAMES), st.sampled_from(COLORS), coordinates, coordinates)),
    metadata=st.sampled_from([ONE, TWO, THREE, RED, TWO_RED, BOTH, RED_LEFT_OF_BLUE]),
)
def test_scores_are_between_0_and_1_and_strict_means_all_parts(found, metadata):
    strict, partial = judge(found, metadata)
    assert strict in (0, 1)
    assert 0 <= partial <= 1
    assert strict == 0 or partial == 1


@pytest.mark.parametrize("metadata", [ONE, TWO, THREE, RED, TWO_RED, BOTH, RED_LEFT_OF_BLUE])
def test_good_metadata_has_no_problems(metadata):
    assert problems(metadata, NAMES, COLORS) is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no 'include' clauses; use a .jsonl file"),
        ({"include": []}, "no 'include' clauses"),
        ({"include": "circle"}, "no 'include' clauses"),
        ({"include": ["circle"]}, "clause 'circle' is not an object"),
        ({"include": [want("dog")]}, "class 'dog' is not one of circle, square"),
        ({"include": [{"count": 1}]}, "class None is not one of"),
        ({"include": [want("circle", 0)]}, "count 0 is not a whole number above 0"),
        ({"include": [want("circle", 1.5)]}, "count 1.5 is not a whole number above 0"),
        ({"include": [want("circle", True)]}, "count True is not a whole number above 0"),
        ({"include": [{"class": "circle"}]}, "count None is not"),
        ({"include": [want("circle", color="pink")]}, "color 'pink' is not one of red, blue"),
        ({"include": [want("circle", position=["near", 0])]}, "position ['near', 0] is not [one of left of, right of"),
        ({"include": [want("circle", position=["above", 1])]}, "position ['above', 1]"),
        ({"include": [want("circle", position=["above", 0])]}, "index of another clause"),
        ({"include": [want("circle", position=["above", -1])]}, "position ['above', -1]"),
        ({"include": [want("circle", position="above")]}, "position 'above'"),
        ({"include": [want("circle")], "exclude": [want("dog")]}, "class 'dog'"),
        ({"include": [want("circle")], "exclude": [{"class": "circle"}]}, "count None is not"),
        ({"include": [want("circle")], "exclude": {"class": "circle"}}, "is not a list of clauses"),
    ],
)
def test_bad_metadata_is_named_before_training(metadata, message):
    assert message in problems(metadata, NAMES, COLORS)


def test_there_are_four_relations():
    assert set(RELATIONS) == set(OPPOSITE)
