"""torch's optimizers, ready for a rate that changes, for checkpoints and for CUDA graphs, and updates made with them.

optimizer = make_optimizer(args, network.parameters(), learning_rate, eps=1e-8)  # learning_rate: a tensor
update = make_update(args, optimizer, gradients)
losses = update(*minibatch)
"""

import functools
import inspect

import torch

from lrrl_utils.compiler import compiled
from lrrl_utils.state import capture, restore


def make_optimizer(args, parameters, learning_rate, eps):
    """The one that `args.optimizer` names, of `parameters` or groups of them, its moments made.

    Its rate is the tensor `learning_rate`: it changes in place, moments stay, a captured step is not captured again.
    `eps` is the ε of Adam and RMSProp.
    """
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=args.momentum, fused=True)
    elif args.optimizer in ("rmsprop", "centered-rmsprop"):
        options = {"centered": True} if args.optimizer == "centered-rmsprop" else {"momentum": args.momentum}
        options |= {"alpha": 0.95, "eps": eps, "capturable": learning_rate.is_cuda}
        optimizer = torch.optim.RMSprop(parameters, lr=learning_rate, **options)
    else:
        capturable = args.compile and learning_rate.is_cuda
        optimizer = torch.optim.Adam(parameters, lr=learning_rate, eps=eps, fused=True, capturable=capturable)
    make_moments(optimizer)
    return optimizer


def make_moments(optimizer):
    """Let `optimizer` make what it keeps for each parameter, so that `restore` has something to copy into.

    A step of zero gradients does it; parameters stay as they are, and the count of steps goes back to 0.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients, values = [parameter.grad for parameter in parameters], capture(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    restore(parameters, values)  # weight decay, if there is any, has moved them
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    reset_step_counts(optimizer)


def reset_step_counts(optimizer):
    """Let Adam count its steps from 0 again; its moments stay."""
    for values in optimizer.state.values():
        if isinstance(values.get("step"), int):
            values["step"] = 0
        elif "step" in values:
            values["step"].zero_()


def make_update(args, optimizer, gradients):
    """A function that makes a step of `optimizer` and returns what there is to log.

    `gradients(*inputs)` returns two things: a gradient or None for each parameter of the optimizer that requires it,
    in their order, and what there is to log. With `args.compile`, it is compiled; on a GPU, the whole update is a CUDA
    graph then. Inputs are tensors, of the same shapes each time.
    """
    parameters = [x for group in optimizer.param_groups for x in group["params"] if x.requires_grad]
    step, device = without_hooks(optimizer), parameters[0].device
    if args.compile:
        gradients = compiled(gradients, device)
        if isinstance(optimizer, torch.optim.RMSprop) and device.type == "cpu":
            step = compiled(step, device)  # the others have fused steps

    def update(*inputs):
        values, to_log = gradients(*inputs)
        for parameter, value in zip(parameters, values, strict=True):
            if value is not None and value.stride() != parameter.stride():
                value = torch.empty_like(parameter).copy_(value)  # fused steps take both in the order of memory
            parameter.grad = value
        step()
        return to_log

    if args.compile and device.type == "cuda":
        from tensordict.nn import CudaGraphModule

        return CudaGraphModule(update, warmup=3)
    return update


def without_hooks(optimizer):
    """`optimizer.step` without its hooks and the profiler's mark: on a small network they take longer than the step."""
    return torch.no_grad()(functools.partial(inspect.unwrap(type(optimizer).step), optimizer))


def relative_update(trained, optimizer, update, *inputs):
    """How far a step of `optimizer` moves its parameters at a learning rate of 1, relative to their norm: ‖Δθ‖ / ‖θ‖.

    `update(*inputs)` gives the gradient, and is undone. If that stays, steps come to the gradient (SGD) or its sign
    (Adam and RMSProp; with an ε of 0, not centred), over 1 − momentum. `trained` is what the update changes, an
    `Undoable`. Of several groups of parameters, the first counts.
    """
    parameters = optimizer.param_groups[0]["params"]
    trained.keep()
    norm = torch.cat([x.detach().flatten() for x in parameters]).norm()
    update(*inputs)
    gradient = torch.cat([x.grad.flatten() for x in parameters if x.grad is not None])
    trained.undo()
    step = gradient if isinstance(optimizer, torch.optim.SGD) else gradient.sign()
    return (step.norm() / norm).item() / (1 - optimizer.defaults.get("momentum", 0))


def step_share(optimizer):
    """What its ε leaves of the steps of Adam or RMSProp: the root mean square of √v / (√v + ε).

    v is what is remembered of a parameter's squared gradient (centred RMSProp: its variance); parameters without any do
    not count. 1 before the first step, and for SGD and others that remember none. Of several groups of parameters, the
    first counts.
    """
    squares = []
    for parameter in optimizer.param_groups[0]["params"]:
        kept = optimizer.state.get(parameter, {})
        if (square := kept.get("square_avg", kept.get("exp_avg_sq"))) is not None:
            squares.append((square - kept["grad_avg"] ** 2 if "grad_avg" in kept else square).flatten())
    if not squares:
        return 1.0
    squares = torch.cat(squares).double()
    shares = 1 / (1 + optimizer.defaults["eps"] / squares[squares > 0].sqrt())
    return shares.square().mean().sqrt().item() if len(shares) else 1.0
