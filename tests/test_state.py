"""What lrrl_utils/state.py promises: state goes out whole and comes back in place, a bad round is undone to the bit."""

import copy
import io
import math
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lrrl_utils.checkpoints import Checkpoints
from lrrl_utils.optimizers import make_optimizer
from lrrl_utils.rivals import all_bandits, make_bandit
from lrrl_utils.state import Undoable, capture, restore

OPTIMIZERS = {  # name: options
    "adam": {},
    "adamrel": {},
    "rmsprop": {"momentum": 0.9},
    "rmsprop without momentum": {"momentum": 0.0},
    "centered-rmsprop": {},
    "sgd": {"momentum": 0.9},
    "sgd without momentum": {"momentum": 0.0},
}


def plain(captured):
    """What `capture` gave, its tensors as lists, so that == compares it."""
    if isinstance(captured, torch.Tensor):
        return captured.tolist()
    if isinstance(captured, dict):
        return {name: plain(value) for name, value in captured.items()}
    return [plain(value) for value in captured] if isinstance(captured, list) else captured


def through_a_file(captured):
    """`captured` as it comes out of a checkpoint, which must not be able to run code."""
    file = io.BytesIO()
    torch.save(captured, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def make_arguments(name):
    return SimpleNamespace(**{"optimizer": name.split()[0], "compile": False, "momentum": 0.9} | OPTIMIZERS[name])


def make_training(name):
    """A network, its optimizer, and a function that makes some steps on data of a generator's."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = make_optimizer(make_arguments(name), network.parameters(), torch.tensor(1e-2), eps=1e-5)

    def train(steps, rng):
        for _ in range(steps):
            optimizer.zero_grad()
            network(torch.randn(8, 3, generator=rng)).square().mean().backward()
            optimizer.step()

    return network, optimizer, train


def tensors_of(optimizer):
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]


def test_without_copies_tensors_stay_those_that_they_are():
    network = nn.Linear(2, 3)
    shared, own = capture([network, Undoable(network)], copy=False), capture(network)
    network.weight.data.fill_(7.0)
    assert shared[0]["weight"].unique().tolist() == shared[1]["now"][0]["weight"].unique().tolist() == [7.0]
    assert 7.0 not in own["weight"].tolist()[0]


# --- there and back ---------------------------------------------------------------------------------------------------


class Statistics:
    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.count, self.name, self.mean, self.best = seed, f"of {seed}", rng.normal(size=3), None if seed == 1 else 2.5
        self.recent = deque(rng.normal(size=seed + 1).tolist(), maxlen=5)
        self.history = [[seed, float(n)] for n in range(seed)]
        self._hidden = seed


def make_objects(seed):
    torch.manual_seed(seed)
    return {
        "module": nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)),
        "tensor": torch.randn(2, requires_grad=True),
        "array": np.random.default_rng(seed).normal(size=(2, 3)),
        "array of truths": np.random.default_rng(seed).random(4) < 0.5,
        "array of integers": np.random.default_rng(seed).integers(100, size=4),
        "rng": np.random.default_rng(seed),
        "torch_rng": torch.Generator().manual_seed(seed),
        "deque": deque(range(seed), maxlen=5),
        "list": [1.0 * seed] * seed,
        "losses": {"a": torch.tensor(1.0 * seed), "b": torch.tensor([2.0 * seed])},
        "nested": [{"x": np.arange(3) + seed}, deque([seed])],
        "object": Statistics(seed),
        "bandit": make_bandit("peak", [1e-4, 1e-3], seed=seed),
    }


@pytest.mark.parametrize("name", make_objects(0))
def test_an_object_comes_back_in_place_from_a_file(name):
    now, then = make_objects(1)[name], make_objects(2)[name]
    saved = capture(then)
    assert plain(capture(now)) != plain(saved)
    reference = {"x": now}
    restore(reference, {"x": through_a_file(saved)})
    assert reference["x"] is now and plain(capture(now)) == plain(saved)


def test_attributes_come_back_in_place_but_for_those_that_start_with_an_underscore():
    now, then = Statistics(1), Statistics(3)
    mean, recent = now.mean, now.recent
    restore(now, through_a_file(capture(then)))
    assert now.mean is mean and now.recent is recent and recent.maxlen == 5 and (mean == then.mean).all()
    assert now.best == 2.5 and now.history == then.history and now._hidden == 1


def test_a_dict_of_tensors_that_was_empty_is_filled():
    losses = {}
    restore(losses, through_a_file(capture({"loss": torch.tensor(0.5)})))
    assert losses == {"loss": torch.tensor(0.5)}


def test_what_came_into_a_dict_since_goes_again():
    losses = {"a": torch.tensor(1.0)}
    saved = capture(losses)
    losses["b"] = torch.tensor(2.0)
    restore(losses, saved)
    assert losses == {"a": torch.tensor(1.0)}


def test_arrays_are_still_arrays_where_there_was_nothing_before():
    then, now = (SimpleNamespace(best=None, history=[]) for _ in range(2))
    then.best = np.arange(3.0)
    then.history += [np.ones(2), np.zeros(2)]
    restore(now, through_a_file(capture(then)))
    assert type(now.best) is np.ndarray and now.best.tolist() == [0, 1, 2]
    assert [type(x) for x in now.history] == [np.ndarray] * 2


def test_generators_go_on_alike():
    for name, draw in {"rng": lambda x: x.normal(size=9), "torch_rng": lambda x: torch.rand(9, generator=x)}.items():
        now, then = make_objects(1)[name], make_objects(2)[name]
        draw(then)
        restore(now, through_a_file(capture(then)))
        assert (draw(now) == draw(then)).all()


def test_what_was_captured_is_a_copy():
    objects = make_objects(2)
    saved = capture(objects)
    before = copy.deepcopy(plain(saved))
    for x in (objects["array"], objects["object"].mean, *objects["losses"].values(), objects["tensor"].data):
        x += 1
    objects["deque"].append(9)
    objects["module"](torch.randn(5, 2))
    objects["bandit"].pull()
    objects["bandit"].update(1.0)
    assert plain(saved) == before


@pytest.mark.parametrize(
    "x",
    [{1, 2}, b"bytes", object(), {"in": [1j]}, plain, Statistics, np],
    ids=["a set", "bytes", "an object", "something within", "a function", "a class", "a module"],
)
def test_what_cannot_be_captured_is_named(x):
    with pytest.raises(TypeError, match="no way to capture (set|bytes|object|complex|function|type|module)"):
        capture(x)


@pytest.mark.parametrize("name", all_bandits())
def test_the_state_of_another_bandit_is_refused(name):
    arms = [1e-4, 1e-3]
    other = make_bandit("lrrl" if name != "lrrl" else "uniform", arms)
    with pytest.raises(ValueError, match=f"belongs to {type(other).__name__}, not to"):
        restore({"agent": make_bandit(name, arms)}, {"agent": capture(other)})


def test_the_state_of_other_networks_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        restore(nn.Linear(2, 3), capture(nn.Linear(2, 4)))


# --- a way back -------------------------------------------------------------------------------------------------------


def make_undoable(name="adam"):
    network, optimizer, train = make_training(name)
    statistics, temperature = Statistics(2), torch.tensor(0.5, requires_grad=True)
    return Undoable(network, optimizer, statistics, temperature), network, optimizer, statistics, temperature, train


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_undo_goes_back_to_what_was_kept_as_often_as_it_is_asked_to(name):
    undoable, *objects, train = make_undoable(name)
    rng = torch.Generator().manual_seed(1)
    train(2, rng)
    undoable.keep()
    kept = plain(capture(objects))
    for _ in range(2):
        train(3, rng)
        objects[2].count, objects[2].mean[0] = 99, math.nan
        objects[3].data.fill_(math.inf)
        assert plain(capture(objects)) != kept
        undoable.undo()
        assert plain(capture(objects)) == kept


def test_undo_forgets_what_was_not_there_when_it_was_kept():
    statistics = Statistics(2)
    statistics.recent, statistics.best, statistics.extra = [[1.0]], None, None
    undoable = Undoable(statistics)
    undoable.keep()
    statistics.recent += [[2.0], {"a": 1}, torch.zeros(2)]
    statistics.best, statistics.extra = {"a": 1}, torch.zeros(2)
    undoable.undo()
    assert (statistics.recent, statistics.best, statistics.extra) == ([[1.0]], None, None)


def test_a_generator_of_another_device_stays_as_it_was_seeded():
    rng = torch.Generator().manual_seed(1)
    before = rng.get_state()
    restore(rng, torch.zeros(16, dtype=torch.uint8))  # what a GPU's has
    assert torch.equal(rng.get_state(), before)


@pytest.mark.parametrize("x", [5, 1.0, "word", True, None, (1, 2), np.float64(1)])
def test_what_cannot_be_brought_back_in_place_is_refused_at_once(x):
    with pytest.raises(TypeError, match="keep it in an array"):
        Undoable(torch.zeros(1), x)
    with pytest.raises(TypeError, match="count"):
        Checkpoints(SimpleNamespace(checkpoint_interval=0), {"count": x}, SimpleNamespace(folder=None), None)


def test_there_is_no_undoing_before_anything_was_kept():
    with pytest.raises(RuntimeError, match="keep"):
        make_undoable()[0].undo()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_anywhere_is_noticed(wrong):
    def ruin(n):
        undoable, network, optimizer, statistics, temperature, train = make_undoable()
        train(1, torch.Generator().manual_seed(1))
        assert undoable.is_finite
        parameter = network[3].weight
        tensor = [parameter, network[1].running_mean, optimizer.state[parameter]["exp_avg_sq"], temperature][n]
        tensor.data.view(-1)[-1] = wrong
        return undoable.is_finite

    assert [ruin(n) for n in range(4)] == [False] * 4


def test_both_what_is_now_and_what_was_kept_go_into_checkpoints():
    undoable, *objects, train = make_undoable()
    rng = torch.Generator().manual_seed(1)
    undoable.keep()
    train(2, rng)
    kept, now = plain(undoable._kept), plain(capture(objects))
    other, *others, _ = make_undoable()
    restore({"trained": other}, {"trained": through_a_file(capture(undoable))})
    assert plain(capture(others)) == now
    other.undo()
    assert plain(capture(others)) == kept != now
