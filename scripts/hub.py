"""Makes a folder in the layout of Hugging Face's kernel hub, `build/hub/pruneopd-kernels`: `make hub`.

    kernels.get_local_kernel(Path("build/hub/pruneopd-kernels"))

`build/` has a variant with compiled operators for torch's stable ABI on the CPU, one for CUDA where there is nvcc, and
one for each without compiled code: the reference and Triton. Each is a copy of the package that the hub imports under a
name of its own, so that it may live beside an installed one; its operators are in `torch.ops.<that name>`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from scripts.wheels import ROOT, WORK, build, link_libraries, sdist, unpacked

OUT = ROOT / "build" / "hub" / "pruneopd-kernels"
NAME = "pruneopd_kernels"
STABLE_ABI = "torch-stable-abi211"
# For packages that the hub's variants cannot ask for.
LEFT_OUT = shutil.ignore_patterns("integrations", "__main__.py", "__pycache__", "*.so")


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.rmtree(WORK / "sdist", ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    source = unpacked(sdist(WORK / "sdist"))
    shutil.copytree(ROOT / "packaging" / "hub", OUT)
    shutil.copytree(source / NAME, OUT / "torch-ext" / NAME, ignore=LEFT_OUT)
    shutil.copy(ROOT / "LICENSE", OUT)

    glibc = link_libraries()
    for backend in ("cpu", "cuda"):
        write_variant(f"torch-{backend}", identity_of(source, f"{backend}_noarch"), source, {"type": backend}, [])
        identity = identity_of(source, backend)
        tree = build(source, glibc, "_cpp", PRUNEOPD_NAMESPACE=identity)
        if backend == "cpu":
            write_variant(f"{STABLE_ABI}-cpu-x86_64-linux", identity, source, {"type": "cpu"}, [tree / "_cpp.so"])
        elif not (tree / "without_cuda.txt").exists():
            build(source, glibc, "_cuda", PRUNEOPD_NAMESPACE=identity)
            (major, minor), archs = built_with(tree / "_cuda.so")
            variant, described = f"{STABLE_ABI}-cu{major}{minor}-x86_64-linux", {"type": "cuda", "archs": archs}
            write_variant(variant, identity, source, described, [tree / "_cpp.so", tree / "_cuda.so"])
    print(f"{OUT}: " + ", ".join(sorted(path.name for path in (OUT / "build").iterdir())))


def identity_of(source: Path, kind: str) -> str:
    """The name under which the hub imports a variant: of kind and sources, so that no two in a process share one."""
    files = sorted(path for folder in (NAME, "csrc") for path in (source / folder).rglob("*.*") if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return f"_{NAME}_{kind}_{digest[:10]}"


def built_with(library: Path) -> tuple[tuple[str, str], list[str]]:
    """The CUDA and the compute capabilities that the library names, as the hub writes them: 8.0, 10.0+PTX."""
    text = re.search(rb"(\d+)\.(\d+)((?: (?:sm|compute)_\d+)+)", library.read_bytes())
    if text is None:
        sys.exit(f"hub: {library} must say what it has code for")
    names = [name.split("_") for name in text[3].decode().split()]
    archs = {f"{number[:-1]}.{number[-1]}": "" for _, number in names}
    archs |= {f"{number[:-1]}.{number[-1]}": "+PTX" for kind, number in names if kind == "compute"}
    return (text[1].decode(), text[2].decode()), [f"{number}{ptx}" for number, ptx in archs.items()]


def write_variant(variant: str, identity: str, source: Path, backend: dict[str, Any], libraries: list[Path]) -> None:
    folder = OUT / "build" / variant
    shutil.copytree(source / NAME, folder, ignore=LEFT_OUT)
    for library in libraries:
        shutil.copy(library, folder)
    metadata = {
        "id": identity,
        "name": "pruneopd-kernels",
        "version": 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": digests(folder)},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path: hashlib.sha256(path.read_bytes()).digest() for path in files}
    return {path.relative_to(folder).as_posix(): base64.b64encode(value).decode() for path, value in hashes.items()}


if __name__ == "__main__":
    main()
