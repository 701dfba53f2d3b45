"""Taking out the state of live objects, and bringing it back in place.

    saved = capture(state)   # a dict of what may change: networks, optimizers, arrays, generators, bandits, …
    restore(state, saved)    # the same objects, as they were

Nothing is replaced that a script may hold by name: tensors and arrays are copied into, objects get their attributes
back. So a learning rate that is a tensor stays that tensor, and a captured CUDA graph stays valid.
"""

import functools
import types
from collections import deque
from itertools import zip_longest

import numpy as np
import torch

PLAIN = frozenset((type(None), bool, int, float, str))
NO_STATE = (types.FunctionType, types.MethodType, types.ModuleType, functools.partial, type)  # that could be captured


def capture(x, copy=True):
    """The state of `x` as plain values and tensors of their own, which torch.load reads with `weights_only=True`.

    Of dicts and lists, that of all that is in them. Of modules, parameters and buffers; of optimizers, what they keep
    for each parameter, in the order of the parameters (not their learning rate); of any object, what its `state_dict`
    says, or every attribute whose name does not start with _. With `copy=False`, tensors are those of `x`: for whoever
    writes them to a file at once.

    Raises:
        TypeError: there is something in `x` of which this is not known.
    """
    if type(x) in PLAIN:
        return x
    if isinstance(x, np.random.Generator):  # early, for some are captured at every timestep
        state = x.bit_generator.state
        return state if state["bit_generator"] == "PCG64" else capture(state)  # others have arrays in it
    if isinstance(x, torch.Generator):
        return x.get_state()
    if isinstance(x, dict):
        return {name: value if type(value) in PLAIN else capture(value, copy) for name, value in x.items()}
    if isinstance(x, (list, tuple, deque)):
        return [value if type(value) in PLAIN else capture(value, copy) for value in x]
    if isinstance(x, np.generic):  # before floats: a np.float64 is one
        return x.item()
    if isinstance(x, (int, float, str)):
        return x
    if isinstance(x, torch.Tensor):
        return x.detach().clone() if copy else x.detach()
    if isinstance(x, np.ndarray):
        return {"class": "ndarray", "values": torch.from_numpy(x.copy())}
    if isinstance(x, torch.optim.Optimizer):
        return [capture(x.state[parameter], copy) for group in x.param_groups for parameter in group["params"]]
    if hasattr(x, "state_dict"):
        return capture(x.state_dict(), copy)
    if hasattr(x, "__dict__") and not isinstance(x, NO_STATE):
        return {"class": type(x).__name__} | capture(_attributes(x), copy)
    raise TypeError(f"there is no way to capture {type(x).__name__}")


def restore(x, saved):
    """Bring `x` back to what `capture` took out of it.

    Raises:
        ValueError: `saved` was taken out of something else, so far as can be seen.
    """
    if isinstance(x, torch.Tensor):
        x.data.copy_(saved)
    elif isinstance(x, np.ndarray):
        x[...] = revive(saved)
    elif isinstance(x, dict):
        for name in x.keys() - saved.keys():
            del x[name]
        for name, value in saved.items():
            x[name] = _restored(x.get(name), value)
    elif isinstance(x, (list, deque)):
        values = [_restored(now, then) for now, then in zip_longest(x, saved)][: len(saved)]
        x.clear()
        x.extend(values)
    elif isinstance(x, np.random.Generator):
        x.bit_generator.state = revive(saved)
    elif isinstance(x, torch.Generator):
        if len(saved) == len(x.get_state()):  # else it is of another device, and `x` stays as it was seeded
            x.set_state(saved)
    elif isinstance(x, torch.optim.Optimizer):
        parameters = [parameter for group in x.param_groups for parameter in group["params"]]
        for parameter, values in zip(parameters, saved, strict=True):
            restore(x.state[parameter], values)
    elif hasattr(x, "load_state_dict"):
        x.load_state_dict(revive(saved))
    else:
        if saved["class"] != type(x).__name__:
            raise ValueError(f"the state belongs to {saved['class']}, not to {type(x).__name__}")
        if getattr(x, "arms", None) != saved.get("arms"):
            raise ValueError(f"the state belongs to a bandit with the arms {saved.get('arms')}, not {x.arms}")
        for name, value in saved.items():
            if name != "class":
                setattr(x, name, _restored(getattr(x, name, None), value))


def check_in_place(name, x):
    """Raises TypeError for what cannot be brought back in place: a number, a word, a tuple; `name` says whose it is."""
    if type(x) in PLAIN or isinstance(x, (tuple, np.generic)):
        raise TypeError(f"{name}: {x!r} cannot be brought back in place; keep it in an array, a list or an object")


def _attributes(x):
    return {name: value for name, value in vars(x).items() if not name.startswith("_")}


def _restored(now, then):
    """`now` brought back to `then` if it can change, else what `then` was taken from."""
    if now is None or then is None or isinstance(now, (bool, int, float, str, tuple, np.generic)):
        return revive(then)
    if isinstance(now, np.ndarray) and np.shape(revive(then)) != now.shape:
        return revive(then)
    restore(now, then)
    return now


def revive(saved):
    """What `capture` made of plain values, arrays and tensors, as it was; tuples have become lists."""
    if isinstance(saved, dict):
        is_array = saved.get("class") == "ndarray"
        return saved["values"].numpy().copy() if is_array else {name: revive(value) for name, value in saved.items()}
    return [revive(value) for value in saved] if isinstance(saved, list) else saved


class Undoable:
    """Objects that a bad round can ruin, and a way back: `keep()` at the start of a round, `undo()` if it went wrong.

    Args:
        *objects: anything that `capture` knows and that can change: networks, optimizers, tensors, statistics.

    Raises:
        TypeError: an object is a plain value or a tuple.
    """

    def __init__(self, *objects):
        for x in objects:
            check_in_place("Undoable", x)
        self._objects = objects
        self._kept = None

    def keep(self):
        self._kept = capture(self._objects)

    def undo(self):
        """Go back to what was kept. Raises RuntimeError if nothing was."""
        if self._kept is None:
            raise RuntimeError("nothing was kept: call keep() first")
        for x, kept in zip(self._objects, self._kept):
            restore(x, kept)

    @property
    def is_finite(self):
        """Whether every number in the objects' tensors is finite."""
        return all(torch.isfinite(tensor).all() for tensor in _tensors(capture(self._objects, copy=False)))

    def state_dict(self):
        return {"now": self._objects, "kept": self._kept}

    def load_state_dict(self, state):
        for x, now in zip(self._objects, state["now"]):
            restore(x, now)
        self._kept = state["kept"]


def _tensors(captured):
    if isinstance(captured, torch.Tensor):
        yield captured
    elif isinstance(captured, (dict, list)):
        for value in captured.values() if isinstance(captured, dict) else captured:
            yield from _tensors(value)
