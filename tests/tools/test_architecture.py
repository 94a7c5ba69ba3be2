"""Imports, read from the sources: no cycles, and none from a lower layer to a higher one."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The first are the lowest. A module may import from its own group and from those above it in this list.
DISTRIBUTIONS = [["pruneopd_kernels"], ["pruneopd_trainer"], ["pruneopd_lab"], ["bench", "scripts"]]
KERNELS = [["errors", "checks", "config"], ["formulas"], ["ops"], ["reference", "triton", "dispatch", "host"],
           ["budget", "drift", "rewards"], ["linear", "parallel"], ["integrations"], ["__main__"]]  # fmt: skip
# By import_module, when an operator is first called or torch looks for packages that extend it.
LATE = {
    (name, "pruneopd_kernels.dispatch.registration") for name in ("pruneopd_kernels", "pruneopd_kernels.ops._operator")
}
BENCH = [["operators"], ["measure"], ["report"], ["count", "studies"], ["__main__"]]
FOLDERS = {"pruneopd_kernels": ROOT, "bench": ROOT, "scripts": ROOT}
FOLDERS |= {path.name: path.parent for path in sorted((ROOT / "python").glob("pruneopd_*")) if path.is_dir()}
FILES = {
    ".".join(file.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): file
    for package, folder in FOLDERS.items()
    for file in sorted((folder / package).rglob("*.py"))
}


def imported(tree, package=""):
    """Yield the full name of each imported module, in functions too, except imports for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module or "", node.level, package)
            yield from (name if (name := f"{base}.{alias.name}") in FILES else base for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            yield from (absolute(name.lstrip("."), len(name) - len(name.lstrip(".")), package) for name in names)
        yield from imported(node, package)


def absolute(name, level, package):
    base = package.rsplit(".", level - 1)[0] if level else ""
    return ".".join(filter(None, [base, name]))


def imports_of(name):
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    return {other for other in imported(ast.parse(FILES[name].read_text()), package) if other != name}


IMPORTS = {name: {other for other in imports_of(name) if (name, other) not in LATE} for name in FILES}


def test_there_are_no_cycles():
    graphlib.TopologicalSorter({name: others & FILES.keys() for name, others in IMPORTS.items()}).prepare()


@pytest.mark.parametrize(("layers", "within"), [(DISTRIBUTIONS, ""), (KERNELS, "pruneopd_kernels."), (BENCH, "bench.")])
def test_no_import_goes_up(layers, within):
    height = {part: i for i, layer in enumerate(layers) for part in layer}
    parts = {name: name.removeprefix(within).partition(".")[0] for name in FILES if name.startswith(within)}
    assert {*parts.values()} <= height.keys(), "each part has a layer"
    pairs = [(name, other) for name in parts for other in sorted(IMPORTS[name] & parts.keys())]
    assert [f"{a} -> {b}" for a, b in pairs if height[parts[a]] < height[parts[b]]] == []


def test_only_dispatch_imports_the_reference():
    reference = "pruneopd_kernels.reference"
    found = {name for name, others in IMPORTS.items() if any(other.startswith(reference) for other in others)}
    assert {name for name in found if not name.startswith((reference, "pruneopd_kernels.dispatch."))} == set()


def test_the_package_never_imports_itself_by_name():
    """The kernel hub imports a copy under another name, without the integrations."""
    for name, file in FILES.items():
        if name.startswith("pruneopd_kernels") and ".integrations" not in name:
            own = [other for other in imported(ast.parse(file.read_text())) if other.startswith("pruneopd")]
            assert own == [], f"{name} imports {own}"


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_import_the_kernels_and_other_people_s_packages(example):
    own = {name.partition(".")[0] for name in imported(ast.parse(example.read_text()))} & {*FOLDERS, "tests"}
    assert own <= {"pruneopd_kernels"}
