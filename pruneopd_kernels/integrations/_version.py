"""The versions of another package that an integration is written for, checked before anything of it is imported."""

from importlib import metadata


def refuse_another_version(integration: str, package: str, versions: str) -> None:
    """Raise ImportError, in one sentence, unless one of `versions` of `package` is installed.

    Args:
        integration: The module that needs it.
        package: Its name for pip.
        versions: A specifier such as ">=1.16,<1.17"; pre-releases do not match.
    """
    needs, command = f"{integration} needs {package}{versions}", f"pip install '{package}{versions}'"
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{needs}, which is not installed: {command}") from None
    from packaging.specifiers import SpecifierSet  # a dependency of both TRL and verl

    if not SpecifierSet(versions).contains(installed, prereleases=False):
        raise ImportError(f"{needs}, got {package} {installed}: {command}")
