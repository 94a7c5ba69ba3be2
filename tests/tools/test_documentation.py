"""Every example in a docstring, in README.md and in docs/ runs; every link and make target in them exists."""

import doctest
import inspect
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import pruneopd_kernels
import reads
from pruneopd_kernels.ops import OPERATORS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HOOKS = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
GENERATED = {ROOT / "docs" / "operators" / f"{name}.md": HOOKS["page"](op) for name, op in OPERATORS.items()}
FUNCTIONS = [*OPERATORS, "opd_rewards", "sampled_drift", "next_drift_count", "linear_reliability", "linear_opd_loss",
             "linear_selected_logprobs", "PruneConfig", "ResponseBudget"]  # fmt: skip
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def blocks(page, *languages):
    """Return `(first line, text)` of the fenced blocks in these languages."""
    found, text = [], page.read_text()
    for match in re.finditer(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        indent, language, code = match.groups()
        if language in languages:
            line = text[: match.start(3)].count("\n") + 1
            found.append((line, re.sub(f"^{indent}", "", code, flags=re.MULTILINE)))
    return found


def run_doctest(test):
    """Run the examples; fail with doctest's own report."""
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(test, out=report.append, clear_globs=False)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings(name):
    """Each docstring has an example that runs, a one-line summary, arguments, returns and errors."""
    obj = getattr(pruneopd_kernels, name)
    tests = doctest.DocTestFinder().find(obj, name, module=sys.modules[obj.__module__], globs={})
    assert any(test.examples for test in tests), f"{name} has no example"
    for test in tests:
        run_doctest(test)
    first = obj.__doc__.strip().splitlines()[0]
    assert first.endswith(".") and len(first) < 121, first
    sections = ["Args:", "Raises:"] if name[0].isupper() else ["Args:", "Returns:", "Raises:"]
    assert [section for section in sections if section not in obj.__doc__] == []


def test_the_reference_has_every_public_name():
    """A directive of mkdocstrings names each; the build fails if the name does not exist."""
    text = "\n".join([*(path.read_text() for path in PAGES), *GENERATED.values()])
    described = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    shown = [pkgutil.resolve_name(target) for target in described if ".integrations." not in target]
    namespaces = [pruneopd_kernels, pruneopd_kernels.parallel]
    public = {f"{module.__name__}.{name}": getattr(module, name) for module in namespaces for name in module.__all__}
    del public["pruneopd_kernels.parallel"]  # whose functions are described one by one
    inside = [value for module in shown if inspect.ismodule(module) for value in vars(module).values()]
    assert [name for name, value in public.items() if not any(value is one for one in [*shown, *inside])] == []
    api = HOOKS["on_page_markdown"]((ROOT / "docs" / "api.md").read_text(), None, None, None)
    assert [name for name in pruneopd_kernels.__all__ if f"`{name}`" not in api] == []


def test_formulas_are_pictures():
    page = (ROOT / "docs" / "method.md").read_text()
    shown = HOOKS["on_page_markdown"](page, None, None, None)
    assert shown.count("<svg") == page.count("```math") > 0 and "```math" not in shown
    for picture in re.findall("<svg.*?</svg>", shown, re.DOTALL):
        assert re.findall(r'(?:href|src)="(?!#)[^"]*"', picture) == [], "a picture must load nothing"


def test_the_documented_step_reads_logits_as_rarely_as_possible():
    """Both models' logits have one width: the student's are read twice, the teacher's once."""
    _, code = blocks(ROOT / "docs" / "trainer.md", "python")[0]
    with reads.counted(500, None) as rows:
        exec(code, {})
    assert rows == {"S": 3 * 4 * 10, "W": 4 * 10}


@each_page
def test_python_examples(page, monkeypatch, tmp_path):
    """Run the blocks of a page in order, in one namespace."""
    if page.stem in ("hub", "trl", "verl"):
        return  # those on other packages run beside these, in tests/integrations
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code in blocks(page, "python", "py"):
        if code.lstrip().startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(code, namespace, page.name, str(page), line)
            run_doctest(test)
            namespace.update(test.globs)
        else:
            exec(compile("\n" * (line - 1) + code, page, "exec"), namespace)


@each_page
def test_links_and_make_targets_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        path = (page.parent / target).resolve()
        exists = re.match(r"[a-z]+:", target) or path.exists() or path in GENERATED
        assert exists, f"{page.name} links to {target}, which is not there"
    commands = "\n".join(code for _, code in blocks(page, "sh", "bash", "console", "shell", "text"))
    commands += "\n".join(re.findall(r"`(make [\w-]+)`", page.read_text()))
    for target in sorted(set(re.findall(r"\bmake ([a-z][\w-]*)", commands))):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"make {target}: {done.stderr}"


def test_means_over_no_tokens_are_0():
    """An empty micro-batch has no valid position, so divisions by the count clamp it."""
    texts = [*PAGES, *(ROOT / "examples").glob("*.py"), *(ROOT / "python").rglob("*.py")]
    divisors = [found for path in texts for found in re.findall(r"/ *\w*mask\.sum\(\)\S*", path.read_text())]
    assert len(divisors) >= 4 and all(".clamp(min=1)" in found for found in divisors)
