"""An operator is declared once: a default and a rule that change there change everywhere."""

import processes

# Prints what each surface says of `reliability`: the default of w_drop, and how it refuses threshold=0.9.
CODE = """
import inspect
import torch
import pruneopd_kernels
from pruneopd_kernels import host, ops, parallel, reference

declared = ops.OPERATORS["reliability"]
logits = torch.zeros(1, 3, 20)
arrays = logits.numpy()

def refusal(function, *args):
    try:
        function(*args, threshold=0.9)
    except (RuntimeError, ValueError) as error:
        return str(error)

def default(function):
    return inspect.signature(function).parameters["w_drop"].default

schema = torch.ops.pruneopd.reliability.default._schema
of = lambda schema: next(one.default_value for one in schema.arguments if one.name == "w_drop")
line = lambda text: next(one.strip() for one in text.splitlines() if one.strip().startswith("w_drop:"))
print(of(schema), *map(default, (pruneopd_kernels.reliability, host.reliability, reference.reliability,
      parallel.reliability)))
print(*{line(inspect.getdoc(x)) for x in (pruneopd_kernels.reliability, host.reliability, reference.reliability)},
      sep="|")
for function in (pruneopd_kernels.reliability, torch.ops.pruneopd.reliability, reference.reliability):
    print(refusal(function, logits, logits))
print(refusal(host.reliability, arrays, arrays))
"""


RULE = """
    checks.scalars(op, a)
    if a.threshold > 0.8:
        checks.bad_value(op, "threshold", "be at most 0.8", a.threshold)
"""


def test_a_default_and_a_rule_change_in_one_place(tmp_path):
    package = tmp_path / "pruneopd_kernels"
    processes.copy_package(tmp_path)
    before = processes.run(code=CODE, root=tmp_path, cwd=tmp_path).splitlines()
    assert before[0].split() == ["0.01"] * 5 and len(before[1].split("|")) == 1
    assert before[2:] == ["None"] * 4
    for path, old, new in (
        ("config.py", "    w_drop: float = 0.01\n", "    w_drop: float = 0.25\n"),  # whose fields are the defaults
        ("ops/reliability.py", "        w_drop: ", "        w_drop: In this copy, "),
        ("ops/reliability.py", "    checks.scalars(op, a)\n", RULE),
    ):
        text = (package / path).read_text()
        assert text.count(old) == 1, (path, old)
        (package / path).write_text(text.replace(old, new))
    after = processes.run(code=CODE, root=tmp_path, cwd=tmp_path).splitlines()
    assert after[0].split() == ["0.25"] * 5
    assert len(after[1].split("|")) == 1 and after[1].startswith("w_drop: In this copy, ")
    assert after[2:] == ["reliability: threshold must be at most 0.8, got 0.9"] * 4
