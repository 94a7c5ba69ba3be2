"""Checks what the compiler made of the loops over rows for each instruction set: python scripts/variants.py FOLDER...

A function that such an object file shares with the rest of the program, a template of the standard library say, can be
the copy that the linker keeps for everybody, and then the program stops on a processor without those instructions. So
an object may define nothing visible outside of its own namespace.
"""

import subprocess
import sys
from pathlib import Path

ISAS = ("avx2", "avx512")  # the portable one runs everywhere
OBJECTS = "CMakeFiles/row_pass_{}.dir/csrc/cpu/*.o"

# What nm calls data that belongs to one object: everything else can be seen or chosen by the linker.
LOCAL = set("tdbrn")


def shared_symbols(isa: str, object_file: Path) -> list[str]:
    """The visible definitions outside of the namespace of that instruction set."""
    listing = subprocess.run(
        ["nm", "--demangle", "--defined-only", str(object_file)], capture_output=True, text=True, check=True
    )
    symbols = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
    return [name for _, kind, name in symbols if kind not in LOCAL and f"pruneopd::{isa}::" not in name]


def names(build: Path, isa: str) -> list[str]:
    """What has been compiled for that instruction set."""
    return sorted(path.name for path in build.glob(OBJECTS.format(isa)))


def main(builds: list[str]) -> None:
    """End with one sentence if any object shares a symbol."""
    for build in map(Path, builds):
        portable = names(build, "portable")
        if not portable:
            sys.exit(f"{build} has no object files of the loops over rows: make build")
        for isa in ISAS:
            if names(build, isa) not in (portable, []):  # none on a processor of another kind
                sys.exit(f"{build} must have {', '.join(portable)} for {isa}, got {', '.join(names(build, isa))}")
            for path in build.glob(OBJECTS.format(isa)):
                if shared := shared_symbols(isa, path):
                    sys.exit(f"{path} must define nothing outside of pruneopd::{isa}, got {', '.join(shared)}")


if __name__ == "__main__":
    main(sys.argv[1:])
