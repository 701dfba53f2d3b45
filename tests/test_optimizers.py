"""What lrrl_utils/optimizers.py promises: moments change nothing, steps are torch's, an update has a size."""

import pytest
import torch
from torch import nn

from lrrl_utils.optimizers import (
    make_moments,
    make_optimizer,
    make_update,
    relative_update,
    reset_step_counts,
    step_share,
)
from lrrl_utils.state import Undoable, capture, restore
from tests.test_state import OPTIMIZERS, make_arguments, make_training, plain, tensors_of, through_a_file


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_comes_back_in_place_and_trains_on_to_the_same_bits(name):
    rng = torch.Generator().manual_seed(5)
    network, optimizer, train = make_training(name)
    learning_rate, tensors = optimizer.param_groups[0]["lr"], tensors_of(optimizer)
    train(3, rng)
    saved = through_a_file(capture([network, optimizer, rng]))
    train(4, rng)
    expected = plain(capture([network, optimizer]))
    for steps in (0, 5):  # over what it is now, and over what it has become since
        train(steps, rng)
        for x, then in zip((network, optimizer, rng), saved):
            restore(x, then)
        train(4, rng)
        assert plain(capture([network, optimizer])) == expected
    assert all(a is b for a, b in zip(tensors_of(optimizer), tensors, strict=True))
    assert optimizer.param_groups[0]["lr"] is learning_rate


def test_an_optimizer_of_two_groups_comes_back_in_the_order_of_its_parameters():
    def make():
        parameters = [nn.Parameter(torch.ones(size)) for size in (2, 3)]
        groups = [{"params": [x], "lr": torch.tensor(rate)} for x, rate in zip(parameters, (1e-2, 1e-3))]
        return parameters, make_optimizer(make_arguments("adam"), groups, torch.tensor(1e-4), eps=1e-8)

    parameters, optimizer = make()
    for n, parameter in enumerate(parameters, start=1):
        parameter.grad = torch.full_like(parameter, n)
    optimizer.step()
    _, other = make()
    restore(other, through_a_file(capture(optimizer)))
    assert [values["exp_avg"].shape for values in other.state.values()] == [(2,), (3,)]
    assert plain(capture(other)) == plain(capture(optimizer))
    assert [group["lr"].item() for group in other.param_groups] == pytest.approx([1e-2, 1e-3])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_making_moments_changes_no_parameter_nor_anything_that_training_comes_to(name):
    runs = []
    for makes in (False, True):
        network, optimizer, train = make_training(name)
        network[0].weight.grad = torch.ones_like(network[0].weight)
        gradient, before = network[0].weight.grad, plain(capture(network))
        optimizer.state.clear()
        if makes:
            make_moments(optimizer)
            assert plain(capture(network)) == before and network[0].weight.grad is gradient
            assert network[3].weight.grad is None
            assert name == "sgd without momentum" or len(tensors_of(optimizer)) >= len(list(network.parameters()))
        train(5, torch.Generator().manual_seed(1))
        runs.append(plain(capture([network, optimizer])))
    assert runs[0] == runs[1]


def test_moments_of_an_optimizer_that_lets_weights_decay_leave_them_alone_too():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1)
    make_moments(optimizer)
    assert parameter.tolist() == [1, 1, 1] and optimizer.state[parameter]["step"] == 0


def test_a_parameter_that_is_not_trained_needs_no_moments():
    frozen, free = torch.tensor(0.3), torch.tensor(0.7, requires_grad=True)
    optimizer = make_optimizer(make_arguments("adam"), [frozen, free], torch.tensor(1e-4), eps=1e-8)
    assert not optimizer.state.get(frozen) and optimizer.state[free] and frozen.grad is None
    restore(optimizer, through_a_file(capture(optimizer)))
    assert (frozen, free) == (torch.tensor(0.3), torch.tensor(0.7))


def test_steps_may_be_counted_in_plain_numbers():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    (parameter,) = optimizer.param_groups[0]["params"]
    optimizer.state[parameter] = {"step": 7, "mean": torch.ones(1)}
    reset_step_counts(optimizer)
    assert optimizer.state[parameter] == {"step": 0, "mean": torch.ones(1)}


def test_resetting_step_counts_leaves_moments_and_the_same_tensors():
    _, optimizer, train = make_training("adamrel")
    train(3, torch.Generator().manual_seed(1))
    tensors, moments = tensors_of(optimizer), [values["exp_avg"].clone() for values in optimizer.state.values()]
    reset_step_counts(optimizer)
    assert all(a is b for a, b in zip(tensors_of(optimizer), tensors, strict=True))
    assert {values["step"].item() for values in optimizer.state.values()} == {0}
    assert all(torch.equal(values["exp_avg"], then) for values, then in zip(optimizer.state.values(), moments))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_is_a_step_along_the_gradients_of_its_inputs(name):
    updated, by_hand = (torch.tensor([1.0, -2.0], requires_grad=True) for _ in range(2))
    frozen, steps = torch.tensor(0.3), []
    ours, theirs = (
        make_optimizer(make_arguments(name), [x, frozen], torch.tensor(0.1), eps=1e-8) for x in (updated, by_hand)
    )
    ours.register_step_post_hook(lambda *_: steps.append(1))
    update = make_update(make_arguments(name), ours, lambda scale: ([scale * updated.detach()], {"scale": scale}))
    for scale in (1.0, -0.5, 2.0):
        by_hand.grad = scale * by_hand.detach()
        theirs.step()
        assert update(torch.tensor(scale)) == {"scale": scale}
        assert updated.tolist() == by_hand.tolist() and frozen == torch.tensor(0.3)
    assert not steps  # hooks are left out


def test_as_many_gradients_are_needed_as_there_are_parameters():
    parameters = [torch.ones(2, requires_grad=True) for _ in range(2)]
    optimizer = make_optimizer(make_arguments("adam"), parameters, torch.tensor(0.1), eps=1e-8)
    with pytest.raises(ValueError, match="shorter"):
        make_update(make_arguments("adam"), optimizer, lambda: ([torch.ones(2)], None))()


@pytest.mark.parametrize(
    "name", sorted(OPTIMIZERS.keys() - {"centered-rmsprop"})
)  # its steps along one gradient grow for ever
def test_the_relative_update_is_what_steps_along_one_gradient_come_to_and_leaves_no_trace(name):
    parameters = [nn.Parameter(torch.full((3,), 2.0)), nn.Parameter(torch.tensor([[1.0], [-3.0]]))]
    parameters.append(nn.Parameter(torch.ones(2)))  # which has no gradient
    optimizer = make_optimizer(make_arguments(name), parameters, torch.tensor(1e-2), eps=1e-5)
    trained, rate = Undoable(*parameters, optimizer), optimizer.param_groups[0]["lr"]

    def update(scale):
        optimizer.zero_grad()
        (scale * (parameters[0].sum() - 2 * parameters[1].sum())).backward()
        optimizer.step()

    before = plain(capture([parameters, optimizer]))
    size = relative_update(trained, optimizer, update, 5.0)
    assert plain(capture([parameters, optimizer])) == before

    def vector():
        return torch.cat([x.detach().flatten() for x in parameters])

    norm, steps = vector().norm(), 200
    rate.fill_(1e-6)
    for _ in range(steps):
        theta = vector()
        update(5.0)
    assert size == pytest.approx(((vector() - theta).norm() / norm / 1e-6).item(), rel=0.05)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_step_share_is_what_an_epsilon_leaves_of_steps(name):
    moved = []
    for eps in (1e-12, 0.1):
        parameters = [nn.Parameter(torch.full((3,), 2.0)), nn.Parameter(torch.tensor([[1.0], [-3.0]]))]
        parameters.append(nn.Parameter(torch.ones(2)))  # which has no gradient
        optimizer = make_optimizer(make_arguments(name), parameters, torch.tensor(1e-6), eps=eps)
        assert step_share(optimizer) == 1.0
        for i in range(4000):
            for x, scale in zip(parameters, (0.1, 1.0)):  # the former are as small as the larger ε
                x.grad = torch.full_like(x, scale * (-1) ** i if name == "centered-rmsprop" else scale)
            before = torch.cat([x.detach().flatten() for x in parameters])
            optimizer.step()
        moved.append((torch.cat([x.detach().flatten() for x in parameters]) - before).norm().item())
    assert step_share(optimizer) == pytest.approx(moved[1] / moved[0], rel=0.05)
    assert (step_share(optimizer) < 0.9) != isinstance(optimizer, torch.optim.SGD)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.Rprop])
def test_an_optimizer_of_another_kind_or_without_moments_has_the_whole_step(optimizer):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = optimizer([parameter])  # as in a script that somebody has changed
    assert step_share(optimizer) == 1.0
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    assert (step_share(optimizer) < 1) == isinstance(optimizer, torch.optim.Adam)


def test_squares_that_overflow_leave_the_whole_step():
    optimizer = make_optimizer(make_arguments("rmsprop"), [nn.Parameter(torch.ones(1))], torch.tensor(1e-3), eps=0.01)
    optimizer.param_groups[0]["params"][0].grad = torch.tensor([1e30])
    optimizer.step()
    assert step_share(optimizer) == 1.0
