"""What a rank does in the tests of `pruneopd_kernels.parallel`: importable by its process, which imports no tests."""

import warnings
from contextlib import ExitStack
from unittest import mock

import torch
from torch import distributed as dist

from pruneopd_kernels.ops import OPERATORS

SLICED = ("student_logits", "teacher_logits")


def outputs_of(group, op, arguments):
    """`parallel.<op>`'s outputs by name."""
    from pruneopd_kernels import parallel

    outputs = getattr(parallel, op)(**arguments, group=group)
    return dict(zip(OPERATORS[op].fields, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))


def sliced(group, op, widths, arguments, device=None):
    """The arguments with this rank's slices, the student's of a loss as a leaf that wants a gradient.

    What a teacher has more goes to the last rank.
    """
    rank = dist.get_rank(group)
    begin, end = sum(widths[:rank]), sum(widths[: rank + 1]) if rank < len(widths) - 1 else None
    arguments = {name: x[..., begin:end] if name in SLICED else x for name, x in arguments.items()}
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    if OPERATORS[op].saved:
        arguments["student_logits"] = arguments["student_logits"].detach().requires_grad_()
    return arguments


def call(group, op, widths, arguments, upstream=None, device=None):
    """The outputs; and of a loss the `gradient` of sum(upstream * loss) by this rank's slice, None: of ones."""
    arguments = sliced(group, op, widths, arguments, device)
    outputs = outputs_of(group, op, arguments)
    if OPERATORS[op].saved:
        upstream = torch.ones_like(outputs["loss"]) if upstream is None else upstream.to(device)
        (outputs["gradient"],) = torch.autograd.grad(outputs["loss"], arguments["student_logits"], upstream)
    return {name: x.detach().cpu() for name, x in outputs.items()}


def second_derivative(group, op, widths, arguments):
    """What the derivative of a gradient raises."""
    arguments = sliced(group, op, widths, arguments)
    loss = outputs_of(group, op, arguments)["loss"]
    (gradient,) = torch.autograd.grad(loss.sum(), arguments["student_logits"], create_graph=True)
    try:
        gradient.sum().backward()
    except RuntimeError as error:
        return str(error)
    return None


def modes(group, op, widths, arguments):
    """The loss under `no_grad`, with a teacher from inference mode, and called by compiled code; and a plain one."""
    arguments = sliced(group, op, widths, arguments)

    def loss_of(arguments):
        return outputs_of(group, op, arguments)["loss"]

    def with_gradient(loss):
        return loss.detach(), *torch.autograd.grad(loss.sum(), arguments["student_logits"])

    plain = with_gradient(loss_of(arguments))
    with torch.no_grad():
        silent = loss_of(arguments)
    with torch.inference_mode():
        teacher = {name: x.clone() for name, x in arguments.items() if name.startswith("teacher_")}
    inferred = with_gradient(loss_of(arguments | teacher))
    with warnings.catch_warnings():  # the compiler looks at the gradients of what has none
        warnings.simplefilter("ignore")
        compiled = with_gradient(torch.compile(lambda a: loss_of(a) * 1, backend="eager")(arguments))
    return plain, (silent, silent.requires_grad), inferred, compiled


COLLECTIVES = ("all_gather", "all_gather_object", "all_gather_into_tensor", "all_reduce", "broadcast", "all_to_all")


def count(group, op, widths, arguments):
    """What is sent in the forward and in the backward pass: `(collective, bytes of one rank's message)`."""
    arguments, sent = sliced(group, op, widths, arguments), []

    def counting(collective):
        def call(*args, **kwargs):
            sent.append((collective.__name__, args[1].nbytes if isinstance(args[1], torch.Tensor) else None))
            return collective(*args, **kwargs)

        return call

    with ExitStack() as patches:
        for name in COLLECTIVES:
            patches.enter_context(mock.patch.object(dist, name, counting(getattr(dist, name))))
        outputs = outputs_of(group, op, arguments)
        forward = sent.copy()
        if OPERATORS[op].saved:
            outputs["loss"].sum().backward()
    return forward, sent[len(forward) :]


def raised(group, op, of_rank):
    """`(type, words)` of what `parallel.<op>(**of_rank[rank])` raises, None if nothing."""
    arguments = dict(of_rank[dist.get_rank(group)])
    try:
        outputs_of(group, arguments.pop("op", op), arguments)
    except Exception as error:
        kind = next((kind for kind in (TypeError, ValueError) if isinstance(error, kind)), type(error))
        return kind.__name__, str(error)
    return None
