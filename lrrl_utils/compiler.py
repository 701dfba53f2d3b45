"""torch.compile with what a whole update needs: gradients inside the graph, and few checks at every call."""

import torch

from lrrl_utils.terminal import say


def keep_guards(guards):
    """Which of a compiled function's `guards` are checked at every call: those of its arguments and of numbers.

    Not those of modules' insides and of global names, which no update changes; they take a fifth of a small update.
    """
    return [not (guard.is_global or guard.orig_guard.source.is_unspecialized_nn_module()) for guard in guards]


def compiled(function, device):
    """`function` of tensors, compiled, torch.autograd.grad inside it included; on a GPU the caller captures it.

    Its arguments must keep their shapes. Where it cannot be compiled, for want of a C++ compiler, say, a line tells so
    and `function` goes on as it is.
    """
    torch._dynamo.config.trace_autograd_ops = True
    options = {"guard_filter_fn": keep_guards, "cpp_wrapper": device.type == "cpu"}
    fast = torch.compile(function, options=options, dynamic=False)

    def call(*args):
        nonlocal fast
        try:
            return fast(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().split("\n")[0]
            say(f"--compile: goes on without, {type(error).__name__}: {reason}", "stderr")
            fast = function
            return function(*args)

    return call
