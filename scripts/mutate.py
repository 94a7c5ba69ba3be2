"""Makes one small mistake at a time in a copy of the sources, and shows which tier of tests notices it.

python -m scripts.mutate                    every mutation of scripts/mutations.py; hours, and it can be interrupted
python -m scripts.mutate --only math/drift  those of some files; --tier 1 only runs the fast tests
python -m scripts.mutate --check            whether each mutation still applies
python -m scripts.mutate --table            the results so far

`make test` and `make test-all` must have run here, so that there is an environment. Each copy is a folder under
build/mutate in which what has changed is compiled again; the CUDA library is left out. The tests closest to the mutated
file run first. A mutation that the first tier notices is noticed by the second, which includes it. Results are kept in
build/mutate/results.jsonl as long as no source changes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "mutate"
RESULTS = FOLDER / "results.jsonl"
MINUTES = {1: 15, 2: 60}  # a step that takes longer has noticed
SURVIVED = "SURVIVED"
NEAR = {  # sources -> the tests closest to them
    "pruneopd_kernels/parallel/": "tests/distributed",
    "": "tests/ops",
}
Result = dict[str, str]
RUNNING: set[subprocess.Popen[str]] = set()
STOPPING = threading.Event()  # what a test says now is no result


class InvalidMutationError(Exception):
    """It does not apply or does not compile, or the tests fail without it: nothing is known."""


def mutated(mutation: Mutation, root: Path = ROOT) -> str:
    """Return the text of the file with the mutation.

    Raises:
        InvalidMutationError: The file has the text never or more than once.
    """
    file = root / mutation.file
    text = file.read_text() if file.exists() else ""
    if (found := text.count(mutation.old)) != 1:
        raise InvalidMutationError(f"{title(mutation)}: {mutation.file} must have this once, has it {found} times")
    return text.replace(mutation.old, mutation.new)


def title(mutation: Mutation) -> str:
    old, new = (" ".join(text.split()) for text in (mutation.old, mutation.new))
    return f"{mutation.file}: {old} -> {new or 'nothing'}"


# --- a copy -------------------------------------------------------------------------------------------------------


def sources() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True).stdout.splitlines()
    return sorted(name for name in listed if (ROOT / name).is_file())


def digest_of_sources() -> str:
    digest = hashlib.sha256()
    for name in sources():
        digest.update(name.encode() + (ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def synchronise(copy: Path) -> None:
    """Make the copy equal to the sources. What is equal keeps its date, so that it is not compiled again."""
    wanted = set(sources())
    for path in copy.rglob("*"):
        name = path.relative_to(copy).as_posix()
        if path.is_file() and name not in wanted and not name.startswith(("build/", ".venv/")) and path.suffix != ".so":
            path.unlink()
    for name in wanted:
        target = copy / name
        if not target.exists() or target.read_bytes() != (ROOT / name).read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    if not (copy / ".venv").exists():
        (copy / ".venv").symlink_to(ROOT / ".venv")


@contextlib.contextmanager
def applied(mutation: Mutation, copy: Path) -> Iterator[None]:
    file, text = copy / mutation.file, mutated(mutation, copy)
    before = file.read_text()
    file.write_text(text)
    try:
        yield
    finally:
        file.write_text(before)  # with a new date, so that it is compiled again


# --- tests --------------------------------------------------------------------------------------------------------


def steps(file: str, tier: int, processes: int) -> list[list[str]]:
    """Return arguments of make, one list a step; `file` is what was mutated, or nothing."""
    near = next(tests for start, tests in NEAR.items() if file.startswith(start))
    options = f"-x -q -p no:cacheprovider -n {processes}" + (" --all" if tier == 2 else "")
    python = [["test-python", f"ARGS={options} {tests}".rstrip()] for tests in ([near] if file else []) + [""]]
    compiled = not file or file.startswith("csrc/")
    return [["test-cpp"], ["test-cuda"], *python] if tier == 2 and compiled else python


def make(copy: Path, arguments: Sequence[str], minutes: float) -> tuple[bool, str]:
    """Return whether make succeeded in time, and its output. It never installs anything."""
    stamps = [option for name in ("build", "dev") for option in ("-o", f".venv/stamps/{name}")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(copy), str(copy / "python")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PRUNEOPD_CUDA": "OFF",
        "PYTEST_ADDOPTS": "--deselect=tests/tools/test_mutate.py",  # which would notice every mutation by its text
    }
    child = subprocess.Popen(
        ["make", *stamps, *arguments], cwd=copy, env=environment, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    RUNNING.add(child)
    try:
        output, _ = child.communicate(timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        return False, f"more than {minutes:g} minutes"
    finally:
        end(child)
        RUNNING.remove(child)
    if STOPPING.is_set():
        raise InvalidMutationError("interrupted")
    return child.returncode == 0, output


def end(child: subprocess.Popen[str]) -> None:
    """End a process with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def noticed(copy: Path, file: str, tier: int, processes: int) -> str:
    """Return what failed, or SURVIVED."""
    built, output = make(copy, ["build"], MINUTES[2])
    if not built:
        raise InvalidMutationError(f"it does not compile: {output.strip().splitlines()[-1:]}")
    for arguments in steps(file, tier, processes):
        passed, output = make(copy, arguments, MINUTES[tier])
        if not passed:
            return first_failure(output, arguments[0])
    return SURVIVED


def first_failure(output: str, target: str) -> str:
    """Return the test that failed.

    Raises:
        InvalidMutationError: pytest was called wrongly or found no tests.
    """
    if re.search(r"^(ERROR: (usage|file or directory)|no tests ran)", output, re.MULTILINE):
        raise InvalidMutationError(f"pytest did not run: {output.strip().splitlines()[-3:]}")
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return found[1] if found else f"{target}: {' '.join(output.split()[-12:])}"[:160]


def try_out(mutation: Mutation, copy: Path, tiers: Sequence[int], processes: int, before: Result) -> Result:
    """Return what each tier said, starting from earlier results."""
    result: Result = dict(before)
    with applied(mutation, copy):
        for tier in tiers:
            if f"tier {tier}" not in result:
                early = result.get("tier 1", SURVIVED)
                known = early if tier == 2 and early != SURVIVED else ""
                result[f"tier {tier}"] = known or noticed(copy, mutation.file, tier, processes)
    return result


# --- all of them --------------------------------------------------------------------------------------------------


def load(digest: str) -> dict[str, Result]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["mutation"]: row["result"] for row in rows if row["sources"] == digest}


def table(results: dict[str, Result], mutations: Sequence[Mutation]) -> str:
    lines = ["| mutation | make test | make test-all |", "|---|---|---|"]
    for mutation in mutations:
        name = title(mutation)
        cells = [results.get(name, {}).get(f"tier {tier}", "") for tier in (1, 2)]
        lines.append(f"| `{name.replace('|', chr(92) + '|')}` | {' | '.join(cells)} |")
    counts = [
        sum(bool(result.get(f"tier {tier}", SURVIVED) != SURVIVED) for result in results.values()) for tier in (1, 2)
    ]
    return "\n".join(
        [*lines, "", f"{len(mutations)} mutations: {counts[0]} noticed by make test, {counts[1]} by make test-all"]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if the last tier that was asked for notices every mutation."""
    parser = argparse.ArgumentParser(prog="python -m scripts.mutate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="mutations that have it")
    parser.add_argument("--tier", type=int, choices=(1, 2), default=2, help="1: only the tests of make test")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at a time, a copy each")
    parser.add_argument("--trust", action="store_true", help="that the tests pass without a mutation")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(arguments)
    chosen = [one for one in MUTATIONS if not options.only or any(text in title(one) for text in options.only)]
    for mutation in chosen:
        mutated(mutation)
    digest = digest_of_sources()
    results = load(digest)
    if not options.check and not options.table:
        FOLDER.mkdir(parents=True, exist_ok=True)
        run(chosen, list(range(1, options.tier + 1)), options.jobs, options.trust, digest, results)
    if not options.check:
        print(table(results, chosen))
    missed = [one for one in chosen if results.get(title(one), {}).get(f"tier {options.tier}", SURVIVED) == SURVIVED]
    return 1 if missed and not options.check else 0


def run(
    chosen: Sequence[Mutation], tiers: Sequence[int], jobs: int, trust: bool, digest: str, results: dict[str, Result]
) -> None:
    copies: queue.Queue[Path] = queue.Queue()
    processes = max(1, (os.cpu_count() or 1) // jobs)
    for number in range(jobs):
        copy = FOLDER / str(number)
        copy.mkdir(exist_ok=True)
        synchronise(copy)
        if not make(copy, ["build", "build/tests-cuda/build.ninja"], MINUTES[2])[0]:
            raise InvalidMutationError("the sources do not compile without a mutation")
        copies.put(copy)
    for tier in [] if trust else tiers:
        if (failed := noticed(FOLDER / "0", "", tier, processes)) != SURVIVED:
            raise InvalidMutationError(f"tier {tier} fails without a mutation: {failed}")
        print(f"tier {tier} passes without a mutation", flush=True)

    def one(mutation: Mutation) -> None:
        name, copy, started = title(mutation), copies.get(), time.monotonic()
        try:
            results[name] = try_out(mutation, copy, tiers, processes, results.get(name, {}))
        except InvalidMutationError as error:
            print(f"INVALID {name}: {error}", flush=True)
            return
        finally:
            copies.put(copy)
        with open(RESULTS, "a") as lines:
            lines.write(json.dumps({"sources": digest, "mutation": name, "result": results[name]}) + "\n")
        print(f"{time.monotonic() - started:5.0f} s  {name}: {results[name]}", flush=True)

    left = [one for one in chosen if any(f"tier {tier}" not in results.get(title(one), {}) for tier in tiers)]
    pool = ThreadPoolExecutor(jobs)
    try:
        list(pool.map(one, left))
    except BaseException:  # an interruption: nothing that it started goes on
        STOPPING.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for child in list(RUNNING):
            end(child)
        raise


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as an interruption does
    try:
        sys.exit(main())
    except InvalidMutationError as error:
        sys.exit(f"mutate: {error}")
