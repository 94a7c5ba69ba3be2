"""What a rank does in the tests of `pruneopd_kernels.parallel`: importable by its process, which imports no tests."""

import functools
import warnings
from contextlib import ExitStack
from unittest import mock

import torch
from torch import distributed as dist

from pruneopd_kernels import linear_opd_loss
from pruneopd_kernels.ops import OPERATORS

SLICED = ("student_logits", "teacher_logits", "logits")


def outputs_of(group, op, arguments):
    """`parallel.<op>`'s outputs by name."""
    from pruneopd_kernels import parallel

    outputs = getattr(parallel, op)(**arguments, group=group)
    return dict(zip(OPERATORS[op].fields, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))


def own(group, widths):
    """This rank's part of the vocabulary. What a teacher has more goes to the last rank."""
    rank = dist.get_rank(group)
    return slice(sum(widths[:rank]), sum(widths[: rank + 1]) if rank < len(widths) - 1 else None)


def sliced(group, op, widths, arguments, device=None):
    """The arguments with this rank's slices, those that have a gradient as a leaf that wants one."""
    part = own(group, widths)
    arguments = {name: x[..., part] if name in SLICED else x for name, x in arguments.items()}
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    if OPERATORS[op].saved:
        leaf = OPERATORS[op].tensors[0]
        arguments[leaf] = arguments[leaf].detach().requires_grad_()
    return arguments


def gradient_of(op, arguments, outputs, into=None, **options):
    """By this rank's slice, from what comes in by each differentiable output; None: ones."""
    names = OPERATORS[op].differentiable
    results = [outputs[name] for name in names]
    into = [torch.ones_like(x) for x in results] if into is None else [into[name] for name in names]
    (gradient,) = torch.autograd.grad(results, arguments[OPERATORS[op].tensors[0]], into, **options)
    return gradient


def call(group, op, widths, arguments, into=None, device=None):
    """The outputs; and where some are differentiable, the `gradient`."""
    arguments = sliced(group, op, widths, arguments, device)
    outputs = outputs_of(group, op, arguments)
    if OPERATORS[op].saved:
        into = into and {name: x.to(device) for name, x in into.items()}
        outputs["gradient"] = gradient_of(op, arguments, outputs, into)
    return {name: x.detach().cpu() for name, x in outputs.items()}


HEADS = ("student_weight", "teacher_weight", "student_bias", "teacher_bias")
STUDENT = ("student_hidden", "student_weight", "student_bias")


def linear(group, widths, arguments, wanted=STUDENT):
    """The outputs of `linear_opd_loss` by name, and the gradients of the loss's sum by what is wanted.

    Each rank has its rows of the heads; without any widths, one process has them all.
    """
    from pruneopd_kernels import parallel

    if widths:
        part = own(group, widths)
        arguments = {n: x[part] if n in HEADS and x is not None else x for n, x in arguments.items()}
    wanted = [name for name in wanted if arguments[name] is not None]
    arguments |= {name: arguments[name].detach().clone().requires_grad_() for name in wanted}
    function = functools.partial(parallel.linear_opd_loss, group=group) if widths else linear_opd_loss
    outputs = function(**arguments)._asdict()
    gradients = torch.autograd.grad(outputs["loss"].sum(), [arguments[name] for name in wanted]) if wanted else ()
    return {name: x.detach() for name, x in outputs.items()}, dict(zip(wanted, gradients, strict=True))


def linear_count(group, widths, arguments, chunk_bytes=None):
    """The names of the collectives of a call of `linear_opd_loss` and its backward pass, and the outputs."""
    from pruneopd_kernels.linear import _chunks

    with ExitStack() as patches:
        if chunk_bytes:
            patches.enter_context(mock.patch.object(_chunks, "CHUNK_BYTES", chunk_bytes))
        sent = counted(patches)
        outputs, _ = linear(group, widths, arguments)
    return [name for name, _ in sent], outputs


def second_derivative(group, op, widths, arguments):
    """What the derivative of a gradient raises."""
    arguments = sliced(group, op, widths, arguments)
    gradient = gradient_of(op, arguments, outputs_of(group, op, arguments), create_graph=True)
    try:
        gradient.sum().backward()
    except RuntimeError as error:
        return str(error)
    return None


def modes(group, op, widths, arguments):
    """A loss under `no_grad`, with a teacher from inference mode, and called by compiled code; and a plain one."""
    arguments = sliced(group, op, widths, arguments)

    def loss_of(arguments):
        return outputs_of(group, op, arguments)[OPERATORS[op].differentiable[0]]

    def with_gradient(loss):
        return loss.detach(), *torch.autograd.grad(loss.sum(), arguments[OPERATORS[op].tensors[0]])

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


def counted(patches):
    """A list that grows by `(collective, bytes of one rank's message)` with each call."""
    sent = []

    def counting(collective):
        def call(*args, **kwargs):
            message = args[1] if len(args) > 1 else None
            sent.append((collective.__name__, message.nbytes if isinstance(message, torch.Tensor) else None))
            return collective(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        patches.enter_context(mock.patch.object(dist, name, counting(getattr(dist, name))))
    return sent


def count(group, op, widths, arguments):
    """What is sent in the forward and in the backward pass."""
    arguments = sliced(group, op, widths, arguments)
    with ExitStack() as patches:
        sent = counted(patches)
        outputs = outputs_of(group, op, arguments)
        forward = sent.copy()
        if OPERATORS[op].saved:
            gradient_of(op, arguments, outputs)
    return forward, sent[len(forward) :]


def rows_read(group, op, widths, arguments):
    """How many rows of this rank's slices a forward and a backward pass read and write, per position."""
    import reads

    arguments = sliced(group, op, widths, arguments)
    width, positions = widths[dist.get_rank(group)], arguments["student_logits"][..., 0].numel()
    with reads.counted(width, None) as forward:
        outputs = outputs_of(group, op, arguments)
    with reads.counted(width, None) as backward:
        gradient_of(op, arguments, outputs)
    return [{name: n / positions for name, n in rows.items()} for rows in (forward, backward)]


def raised(group, op, of_rank):
    """`(type, words)` of what `parallel.<op>(**of_rank[rank])` raises, None if nothing."""
    from pruneopd_kernels import parallel

    arguments = dict(of_rank[dist.get_rank(group)])
    try:
        getattr(parallel, arguments.pop("op", op))(**arguments, group=group)
    except Exception as error:
        kind = next((kind for kind in (TypeError, ValueError) if isinstance(error, kind)), type(error))
        return kind.__name__, str(error)
    return None
