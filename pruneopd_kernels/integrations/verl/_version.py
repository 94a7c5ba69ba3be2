"""Which verl these modules are written for, said before anything of it is imported."""

from importlib.metadata import PackageNotFoundError, version

_PACKAGE = __name__.rpartition(".")[0]

NEEDED = "verl>=0.9.1,<0.10"


def _refuse_another_version() -> None:
    try:
        installed = version("verl")
    except PackageNotFoundError:
        raise ImportError(f"{_PACKAGE} needs {NEEDED}, which is not installed: pip install '{NEEDED}'") from None
    from packaging.specifiers import SpecifierSet  # which verl itself needs

    if installed not in SpecifierSet(NEEDED.removeprefix("verl")):
        raise ImportError(f"{_PACKAGE} needs {NEEDED}, got verl {installed}: pip install '{NEEDED}'")


_refuse_another_version()
