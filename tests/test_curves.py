"""The learning curve that a node shows."""

import numpy as np
import pytest
from densegrpo.engine.curves import COLOURS, WIDTH, plot
from PIL import ImageColor


def ink(picture, colour):
    """Rows and columns of the pixels of that colour."""
    return np.nonzero((np.asarray(picture) == ImageColor.getrgb(colour)).all(-1))


def names(count):
    return [f"held-out reward number {i}" for i in range(count)]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_names_stand_above_the_lines_in_their_colours(count):
    """All lines run along the top of the chart, where they would cross names that stand inside."""
    picture = plot("run", {name: [(0, 0.0), (1, 1.0), (10, 1.0)] for name in names(count)})
    line = ink(picture, COLOURS[count - 1])  # drawn last, it covers the others
    top = np.bincount(line[0]).argmax()  # the row of the line along the top
    for i in range(count - 1):
        assert ink(picture, COLOURS[i])[0].max() < top - 2, "only the name is left of the lines below"


def test_long_names_are_wrapped_and_none_is_lost():
    rows = [ink(plot("run", {name: [(0, 0.5)] for name in names(5)}), colour)[0].min() for colour in COLOURS[:5]]
    assert rows == sorted(rows)
    assert len({row // 12 for row in rows}) > 1, "five do not fit on one line"
    right = [ink(plot("run", {name: [(0, 0.5)] for name in names(5)}), colour)[1].max() for colour in COLOURS[:5]]
    assert max(right) < WIDTH - 1


def test_higher_is_higher_and_later_is_further_right():
    rows, columns = ink(plot("run", {"": [(0, 0.0), (10, 1.0)]}), COLOURS[0])
    assert rows[columns.argmin()] > rows[columns.argmax()]


def test_a_run_without_numbers_has_a_chart_too():
    assert plot("run", {}).width == WIDTH


def test_many_names_make_the_picture_higher_instead_of_the_chart_lower():
    few, many = (plot("run", {name: [(0, 0.0), (10, 1.0)] for name in names(count)}) for count in (1, 30))
    assert many.height > few.height + 200
    assert len({np.ptp(ink(picture, "#dddddd")[0]) for picture in (few, many)}) == 1
