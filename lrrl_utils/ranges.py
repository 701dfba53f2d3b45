"""Types of numbers within an interval, for the options of the programs: `gamma: Share = 0.99`."""

import types
from typing import Annotated, Union, get_args, get_origin

Count = Annotated[int, "[1, inf)"]
Whole = Annotated[int, "[0, inf)"]
Seed = Annotated[int, "[0, 4294967295]"]
Positive = Annotated[float, "(0, inf)"]
NonNegative = Annotated[float, "[0, inf)"]
Share = Annotated[float, "[0, 1]"]
PositiveShare = Annotated[float, "(0, 1]"]
Momentum = Annotated[float, "[0, 1)"]
Rate = Annotated[float, "[1e-37, 1e+37]"]  # of a float32
Window = Annotated[int, "[2, inf)"]


def is_in(x, interval):
    """Whether x is in an interval like "(0, 1]", as mathematics has it; NaN is in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    return low < x < high or (x == low and interval[0] == "[") or (x == high and interval[-1] == "]")


def intervals_of(hint):
    """The intervals in a type, also inside unions and tuples."""
    own = [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, str)]
    return own + [interval for part in get_args(hint) if part is not hint for interval in intervals_of(part)]


def without_intervals(hint):
    """The same type, for tyro, whose messages would show them."""
    if get_origin(hint) is Annotated:
        base, *notes = get_args(hint)
        notes = tuple(note for note in notes if not isinstance(note, str))
        return Annotated[(base, *notes)] if notes else base
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(map(without_intervals, get_args(hint)))]  # noqa: UP007
    if get_origin(hint) is tuple:
        return tuple[tuple(x if x is ... else without_intervals(x) for x in get_args(hint))]
    return hint
