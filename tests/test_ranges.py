"""What lrrl_utils/ranges.py promises: intervals as mathematics has them, wherever in a type they are."""

import math
from typing import Annotated, Literal

import pytest

from lrrl_utils.ranges import Count, Positive, PositiveShare, Rate, Seed, Share, intervals_of, is_in, without_intervals


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[1, inf)", (1, 1.5, 10**400), (0, 0.999, -1, math.inf, math.nan)),
        ("(0, 1]", (1e-300, 1, 1.0), (0, 0.0, 1.1, -math.inf)),
        ("(0, inf)", (5e-324, 1e308), (0, math.inf, math.nan)),
        ("[0, 1]", (0.0, -0.0, 1), (-1e-9, 1 + 1e-9)),
        ("[0, 1)", (0, 0.5), (1, 1.0)),
        ("[1e-06, 0.01]", (1e-6, 0.01), (9.9e-7, 0.0100001)),
    ],
)
def test_an_interval_holds_what_it_does_in_mathematics(interval, inside, outside):
    assert all(is_in(x, interval) for x in inside) and not any(is_in(x, interval) for x in outside)


@pytest.mark.parametrize(
    ("hint", "intervals", "bare"),
    [
        (int, [], int),
        (Count, ["[1, inf)"], int),
        (Annotated[float, "[0, 1]", 7], ["[0, 1]"], Annotated[float, 7]),
        (PositiveShare | None, ["(0, 1]"], float | None),
        (Count | Literal["auto"], ["[1, inf)"], int | Literal["auto"]),
        (tuple[Rate, ...], ["[1e-37, 1e+37]"], tuple[float, ...]),
        (tuple[Rate, Share] | None, ["[1e-37, 1e+37]", "[0, 1]"], tuple[float, float] | None),
        (tuple[Positive, ...] | Literal["all5"], ["(0, inf)"], tuple[float, ...] | Literal["all5"]),
        (Literal["[0, 1]"], [], Literal["[0, 1]"]),
        (Seed | Share, ["[0, 4294967295]", "[0, 1]"], int | float),
    ],
)
def test_intervals_are_found_in_a_type_and_taken_out_of_it(hint, intervals, bare):
    assert intervals_of(hint) == intervals and without_intervals(hint) == bare
