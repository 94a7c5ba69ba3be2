"""Builds what is published, into dist/: `make wheels`, or python -m scripts.wheels.

- the sdist, and from it alone all the rest;
- a pure wheel, the reference and Triton, for every platform and Python that no other wheel fits;
- a wheel for each Python with the CPU's libraries; what is compiled but for the module of that Python is compiled once;
- if there is nvcc, the CUDA library in a wheel of its own, `pruneopd-kernels-cuda13`, for any Python;
- sdist and wheel of `pruneopd-trainer`, which is plain Python.

Compiled files are linked with the libraries of glibc 2.28, which ziglang has for a linker: names and versions of their
symbols. auditwheel then grants manylinux_2_28. `--platform auto` links with this machine's, and takes the tag that
auditwheel grants: for a manylinux image, or where there is no ziglang.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

from pruneopd_kernels import __version__

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"
VERSIONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
# Where the Pythons are, besides the PATH: pyenv's folder, and a manylinux image's.
PLACES = ["~/.pyenv/versions/{version}.*/bin/python", "/opt/python/cp{digits}-cp{digits}/bin/python"]
GLIBC = "2.28"
PLATFORM = f"manylinux_{GLIBC.replace('.', '_')}_x86_64"
FROM_TORCH = ["libc10.so", "libtorch*.so"]


class Python(NamedTuple):
    command: str
    version: str
    suffix: str

    @property
    def tag(self) -> str:
        return f"cp{self.version.replace('.', '')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the files go")
    parser.add_argument("--python", nargs="+", help=f"interpreters; by default one for each of {', '.join(VERSIONS)}")
    parser.add_argument("--platform", default=PLATFORM, choices=[PLATFORM, "auto"], help="the tag to ask for")
    arguments = parser.parse_args()
    pythons = [ask(command) for command in arguments.python] if arguments.python else find_pythons()
    if importlib.util.find_spec("auditwheel") is None:
        sys.exit("wheels: auditwheel is missing: `make wheels` installs what it needs")
    out = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    glibc = link_libraries() if arguments.platform == PLATFORM else None

    source = unpacked(sdist(out))
    pure = pure_wheel(source, out)
    for python in pythons:
        tree = build(source, glibc, Python_EXECUTABLE=python.command)
        libraries = [tree / "_cpp.so", tree / f"_host{python.suffix}"]
        check_undefined(libraries[1])
        wheel = with_files(pure, libraries, "pruneopd_kernels", f"{python.tag}-{python.tag}")
        audit(wheel, arguments.platform, out)
    if not (tree / "without_cuda.txt").exists():  # an older library may lie there
        wheel = with_files(cuda_wheel(), [tree / "_cuda.so"], "pruneopd_kernels_cuda13", "py3-none")
        audit(wheel, arguments.platform, out)
    trainer(out)
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size / 2**20:6.2f} MiB  {path.name}")


# --- Pythons and glibc ------------------------------------------------------------------------------------------------


def find_pythons() -> list[Python]:
    found = {}
    for version in VERSIONS:
        patterns = [place.format(version=version, digits=version.replace(".", "")) for place in PLACES]
        paths = [path for pattern in patterns for path in sorted(glob.glob(os.path.expanduser(pattern)))]
        for command in filter(None, [shutil.which(f"python{version}"), *paths]):
            try:
                found[version] = ask(command)
                break
            except subprocess.CalledProcessError:  # a shim of pyenv for a version that is not switched on
                continue
    if missing := [version for version in VERSIONS if version not in found]:
        have = " ".join(python.command for python in found.values())
        sys.exit(f"wheels: found no Python {', '.join(missing)}: name those to build for, --python PATH... {have}")
    return list(found.values())


def ask(command: str) -> Python:
    """What an interpreter says of itself."""
    code = "import sys, sysconfig as s; print('%d.%d' % sys.version_info[:2], s.get_config_var('EXT_SUFFIX'))"
    done = subprocess.run([command, "-c", code], check=True, text=True, capture_output=True)
    return Python(command, *done.stdout.split())


def link_libraries() -> Path:
    """A folder of libraries to link with that know the symbols of that glibc; ziglang makes them when it links."""
    folder, cache = WORK / f"glibc-{GLIBC}", WORK / "zig"
    if not folder.exists():
        empty = WORK / "empty.c"
        empty.write_text("")
        command = ["cc", "-target", f"x86_64-linux-gnu.{GLIBC}", "-shared", "-o", str(WORK / "empty.so"), str(empty)]
        caches = {f"ZIG_{kind}_CACHE_DIR": str(cache) for kind in ("LOCAL", "GLOBAL")}
        run("ziglang", *command, environment=caches)
        made = [*cache.glob("o/*/lib*.so.*"), *cache.glob("o/*/libc_nonshared.a")]
        if not {"libc.so.6", "libc_nonshared.a"} <= {path.name for path in made}:
            sys.exit(f"wheels: this ziglang keeps its libraries of glibc elsewhere than in {cache}/o: install 0.17")
        folder.mkdir()
        for path in made:
            shutil.copy(path, folder / path.name)
            if path.suffix != ".a":
                (folder / f"{path.name.partition('.so')[0]}.so").symlink_to(path.name)
    return folder


# --- wheels -----------------------------------------------------------------------------------------------------------


def sdist(out: Path) -> Path:
    run("build", "--sdist", "--no-isolation", "--outdir", str(out), str(ROOT))
    (path,) = out.glob("*.tar.gz")
    return path


def unpacked(archive: Path) -> Path:
    """The sources as whoever has the sdist has them; their dates are kept, so what is compiled is compiled once."""
    shutil.rmtree(WORK / "source", ignore_errors=True)
    with tarfile.open(archive) as files:
        files.extractall(WORK / "source", filter="data")
    (source,) = (WORK / "source").iterdir()
    return source


def pure_wheel(source: Path, out: Path) -> Path:
    pip_wheel(source, out, {"PRUNEOPD_COMPILE": "OFF"})
    return out / f"pruneopd_kernels-{__version__}-py3-none-any.whl"


def cuda_wheel() -> Path:
    """The wheel of the CUDA library but for the library."""
    project = WORK / "cuda13"
    shutil.rmtree(project, ignore_errors=True)
    shutil.copytree(ROOT / "packaging" / "cuda13", project)
    shutil.copy(ROOT / "LICENSE", project)
    package = project / "pruneopd_kernels_cuda13"
    package.mkdir()
    text = f'"""The CUDA library of pruneopd-kernels, which finds it here."""\n\n__version__ = "{__version__}"\n'
    (package / "__init__.py").write_text(text)
    pip_wheel(project, WORK)
    return WORK / f"pruneopd_kernels_cuda13-{__version__}-py3-none-any.whl"


def trainer(out: Path) -> None:
    project = WORK / "trainer"
    shutil.rmtree(project, ignore_errors=True)
    shutil.copytree(ROOT / "python", project, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    run("build", "--no-isolation", "--outdir", str(out), str(project))


def pip_wheel(project: Path, out: Path, environment: dict[str, str] | None = None) -> None:
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    run("pip", "wheel", *options, str(project), environment=environment)


def build(source: Path, glibc: Path | None, target: str = "all", **settings: str) -> Path:
    """The folder with the compiled files. What other settings do not concern is not compiled again."""
    import ninja
    import pybind11
    import torch

    import cmake

    command, tree = str(Path(cmake.CMAKE_BIN_DIR) / "cmake"), WORK / "tree"
    settings = {
        "CMAKE_MAKE_PROGRAM": str(Path(ninja.BIN_DIR) / "ninja"),
        "PRUNEOPD_CUDA": os.environ.get("PRUNEOPD_CUDA", "AUTO"),
        "PRUNEOPD_GLIBC": str(glibc or ""),
        "PRUNEOPD_NAMESPACE": "pruneopd",
        "PRUNEOPD_TORCH": str(Path(torch.__file__).parent),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    } | settings
    configure = [command, "--log-level=WARNING", "-G", "Ninja", "-S", str(source), "-B", str(tree)]
    configure += ["-UPython_*", "-U_Python_*"]  # what was found for the Python before
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    for step in (configure, [command, "--build", str(tree), "--target", target]):
        if subprocess.run(step, stdout=subprocess.DEVNULL if step is configure else None).returncode != 0:
            sys.exit(f"wheels: cmake failed with {settings['Python_EXECUTABLE']}; its words stand above")
    return tree


def check_undefined(host: Path) -> None:
    """The module for NumPy leaves Python's symbols open; others would be found missing only when it is loaded."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", host], check=True, text=True, capture_output=True).stdout
    names = [line.split()[1] for line in listing.splitlines() if line.split()[0] == "U"]
    if other := [name for name in names if "@" not in name and not name.startswith(("Py", "_Py"))]:
        sys.exit(f"wheels: {host.name} must leave open no symbols but Python's, got {', '.join(other)}")


def with_files(pure: Path, files: list[Path], package: str, tag: str) -> Path:
    """A copy of a pure wheel with compiled files in its package."""
    folder = WORK / "contents"
    shutil.rmtree(folder, ignore_errors=True)
    run("wheel", "unpack", "--dest", str(folder), str(pure))
    (contents,) = folder.iterdir()
    for file in files:
        shutil.copy(file, contents / package)
    (description,) = contents.glob("*.dist-info/WHEEL")
    text = description.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
    description.write_text(text.replace("Tag: py3-none-any", f"Tag: {tag}-linux_x86_64"))
    run("wheel", "pack", "--dest-dir", str(WORK), str(contents))
    name = "-".join(pure.name.split("-")[:2])
    return WORK / f"{name}-{tag}-linux_x86_64.whl"


def audit(wheel: Path, platform: str, out: Path) -> None:
    """Copy the wheel with the platform's tag into `out`, or fail if it does not deserve it."""
    exclude = [option for name in FROM_TORCH for option in ("--exclude", name)]
    only = [] if platform == "auto" else ["--only-plat"]
    run("auditwheel", "repair", "--plat", platform, *only, *exclude, "--wheel-dir", str(out), str(wheel))


def run(module: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
    """One of the tools that are Python packages. auditwheel calls a program that lies beside this Python."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=WORK,  # not beside a folder that is called build, as one of the tools is
        env={**os.environ, "PATH": path, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\nwheels: {module} {arguments[0]} failed; its words stand above")


if __name__ == "__main__":
    main()
