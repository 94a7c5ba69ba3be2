"""Other versions of TRL and verl are refused before they are imported; neither is installed here."""

import importlib
import sys
from importlib import metadata

import pytest

from pruneopd_kernels.integrations._version import refuse_another_version

PACKAGE = "pruneopd_kernels.integrations"


TRL, VERL = ("trl", ">=1.16,<1.17"), ("verl", ">=0.9.1,<0.10")


@pytest.mark.parametrize(
    ("package", "installed"),
    [(TRL, "1.15.2"), (TRL, None), (VERL, "0.9.2.dev0"), (VERL, "0.10.0")],
)
def test_another_version_is_refused_in_one_sentence(monkeypatch, package, installed):
    name, versions = package
    if installed is not None:
        monkeypatch.setattr(metadata, "version", {name: installed}.__getitem__)
    for module in [module for module in sys.modules if module.startswith(f"{PACKAGE}.{name}")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError) as error:
        importlib.import_module(f"{PACKAGE}.{name}")
    got = "which is not installed" if installed is None else f"got {name} {installed}"
    assert str(error.value) == f"{PACKAGE}.{name} needs {name}{versions}, {got}: pip install '{name}{versions}'"
    assert name not in sys.modules


@pytest.mark.parametrize("installed", ["0.9.1", "0.9.7", "0.9.2.post1"])
def test_its_fixes_are_taken(monkeypatch, installed):
    monkeypatch.setattr(metadata, "version", {"verl": installed}.__getitem__)
    refuse_another_version("the integration", *VERL)
