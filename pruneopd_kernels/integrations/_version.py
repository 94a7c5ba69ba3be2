"""Which versions of another package an integration is written for, said before anything of it is imported."""

from importlib import metadata


def refuse_another_version(integration: str, package: str, versions: str) -> None:
    """Raises ImportError, in one sentence, if `package` is not installed in one of `versions`.

    Args:
        integration: The module that needs it.
        package: Its name for pip.
        versions: Which ones will do, such as ">=1.16,<1.17"; pre-releases will not.
    """
    needs, command = f"{integration} needs {package}{versions}", f"pip install '{package}{versions}'"
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{needs}, which is not installed: {command}") from None
    from packaging.specifiers import SpecifierSet  # which TRL and verl both bring

    if not SpecifierSet(versions).contains(installed, prereleases=False):
        raise ImportError(f"{needs}, got {package} {installed}: {command}")
