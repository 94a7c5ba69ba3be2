"""The versions of another package that an integration is written for, checked before anything of it is imported."""

from importlib import metadata


def refuse_another_version(integration: str, package: str, versions: str) -> None:
    """Raise ImportError unless a package's version fits a specifier such as ">=1.16,<1.17"; no pre-release does."""
    needs, command = f"{integration} needs {package}{versions}", f"pip install '{package}{versions}'"
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{needs}, which is not installed: {command}") from None
    from packaging.specifiers import SpecifierSet  # a dependency of both TRL and verl

    if not SpecifierSet(versions).contains(installed, prereleases=False):
        raise ImportError(f"{needs}, got {package} {installed}: {command}")
