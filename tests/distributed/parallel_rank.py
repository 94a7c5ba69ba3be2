"""What a rank does in the tests of `pruneopd_kernels.parallel`: importable by its process, which imports no tests."""

import warnings

import torch
from torch import distributed as dist

SLICED = ("student_logits", "teacher_logits")


def sliced(group, widths, arguments):
    """The arguments with this rank's slices of the logits; what a teacher has more goes to the last rank."""
    rank = dist.get_rank(group)
    begin, end = sum(widths[:rank]), sum(widths[: rank + 1]) if rank < len(widths) - 1 else None
    arguments = {name: x[..., begin:end] if name in SLICED else x for name, x in arguments.items()}
    if end is None and "teacher_logits" in arguments:  # the student's own end is that of its tensor
        assert arguments["student_logits"].shape[-1] == widths[-1]
    return arguments


def call(group, op, widths, arguments, device=None):
    """`parallel.<op>` of all arguments by name, whose logits are cut into widths."""
    from pruneopd_kernels import parallel

    arguments = on_device(sliced(group, widths, arguments), device)
    result = getattr(parallel, op)(**arguments, group=group)
    return type(result)(*(x.cpu() for x in result)) if isinstance(result, tuple) else result.cpu()


def call_loss(group, op, widths, arguments, upstream, device=None):
    """The outputs, and the gradient of `sum(upstream * loss)` by this rank's slice."""
    from pruneopd_kernels import parallel

    arguments = on_device(sliced(group, widths, arguments), device)
    logits = arguments.pop("student_logits").detach().requires_grad_()
    outputs = getattr(parallel, op)(logits, **arguments, group=group)
    loss = outputs[0] if isinstance(outputs, tuple) else outputs
    assert loss.requires_grad
    (gradient,) = torch.autograd.grad(loss, logits, upstream.to(loss.device))
    outputs = tuple(outputs) if isinstance(outputs, tuple) else (outputs,)
    return tuple(x.detach().cpu() for x in outputs), gradient.cpu()


def on_device(arguments, device):
    if device is None:
        return arguments
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def call_on_gpu(group, op, widths, arguments):
    return call(group, op, widths, arguments, device="cuda")


def call_loss_on_gpu(group, op, widths, arguments, upstream):
    return call_loss(group, op, widths, arguments, upstream, device="cuda")


def second_derivative(group, op, widths, arguments):
    """What the derivative of a gradient raises."""
    from pruneopd_kernels import parallel

    arguments = sliced(group, widths, arguments)
    logits = arguments.pop("student_logits").detach().requires_grad_()
    outputs = getattr(parallel, op)(logits, **arguments, group=group)
    loss = outputs[0] if isinstance(outputs, tuple) else outputs
    (gradient,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    try:
        gradient.sum().backward()
    except RuntimeError as error:
        return str(error)
    return None


def modes(group, op, widths, arguments):
    """The loss under `no_grad`, with a teacher from inference mode, and called by compiled code; and a plain one."""
    from pruneopd_kernels import parallel

    arguments = sliced(group, widths, arguments)
    teacher = {name: x for name, x in arguments.items() if name.startswith("teacher_")}
    logits = arguments["student_logits"].detach().requires_grad_()
    arguments = {**arguments, "student_logits": logits, "group": group}

    def loss_of(arguments):
        outputs = getattr(parallel, op)(**arguments)
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def with_gradient(loss):
        return loss.detach(), *torch.autograd.grad(loss.sum(), logits)

    plain = with_gradient(loss_of(arguments))
    with torch.no_grad():
        silent = loss_of(arguments)
    with torch.inference_mode():
        teacher = {name: x.clone() for name, x in teacher.items()}
    inferred = with_gradient(loss_of(arguments | teacher))
    with warnings.catch_warnings():  # the compiler looks at the gradients of what has none
        warnings.simplefilter("ignore")
        compiled = with_gradient(torch.compile(lambda a: loss_of(a) * 1, backend="eager")(arguments))
    return plain, (silent, silent.requires_grad), inferred, compiled


class Counter:
    """Counts what is sent inside: `(collective, bytes of one rank's message)`, through whatever it is asked for."""

    COLLECTIVES = ("all_gather", "all_gather_object", "all_gather_into_tensor", "all_reduce", "broadcast", "all_to_all")

    def __enter__(self):
        self.sent, self.before = [], {name: getattr(dist, name) for name in self.COLLECTIVES}
        for name, collective in self.before.items():
            setattr(dist, name, self._counting(name, collective))
        return self.sent

    def _counting(self, name, collective):
        def counting(first, second=None, *args, **kwargs):
            size = second.nbytes if isinstance(second, torch.Tensor) else None
            self.sent.append((name, size))
            return collective(first, *([] if second is None else [second]), *args, **kwargs)

        return counting

    def __exit__(self, *_):
        for name, collective in self.before.items():
            setattr(dist, name, collective)


def count(group, op, widths, arguments):
    """What is sent in the forward pass, and in the backward pass of a loss."""
    from pruneopd_kernels import parallel

    arguments = sliced(group, widths, arguments)
    is_loss = op not in ("reliability", "token_stats")
    if is_loss:
        arguments["student_logits"] = arguments["student_logits"].detach().requires_grad_()
    with Counter() as forward:
        result = getattr(parallel, op)(**arguments, group=group)
    with Counter() as backward:
        if is_loss:
            (result if isinstance(result, torch.Tensor) else result.loss).sum().backward()
    return forward, backward


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
