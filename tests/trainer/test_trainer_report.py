"""Reports of runs whose numbers are written out here."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pruneopd_lab import report as module
from pruneopd_lab.report import report
from pruneopd_lab.run_groups import Run, comparisons, find_runs, read_metrics, read_run
from pruneopd_trainer.config import TrainConfig, write_config
from trainer_child import EVALUATION, STEP
from trainer_models import refusal, write_lines

BASE = TrainConfig(steps=2, eval_every=2)


def written(folder, config, *, accuracy=(0.1, 0.5), error=0.05, times=(10.0, 20.0), tokens=(1000, 1000), budget=100):
    """Write a run of two steps, evaluated before and after; return its folder."""
    folder.mkdir(parents=True)
    write_config(config, folder / "config.yaml")
    metrics = [{"step": 0, "time_s": 0.0}]
    for step, (time_s, generated) in enumerate(zip(times, tokens, strict=False), 1):
        values = {"step": step, "time_s": time_s, "tokens_generated": generated, "tokens_kept": generated // 2}
        metrics.append(STEP | values | {"budget": budget, "overlap": 0.5 + 0.1 * step, "peak_memory_mib": 512.4})
    for values, found in zip((metrics[0], metrics[-1]), accuracy, strict=False):
        values |= {**EVALUATION, "accuracy": found, "accuracy_se": error}
    write_lines(folder / "metrics.jsonl", *metrics)
    return folder


def rows(text):
    """Return the rows of a report below its heading, in ASCII except for what is easily told apart."""
    text = text.replace("\N{EN DASH}", "-").replace("\N{MULTIPLICATION SIGN}", "x")
    return [line for line in text.splitlines() if line.startswith("| ")][2:]


@pytest.fixture
def two_methods(tmp_path):
    """opd with seeds 0, 1, 2 and prune with seeds 0, 1."""
    for seed, accuracy in enumerate((0.40, 0.50, 0.90)):
        written(tmp_path / f"opd/{seed}", replace(BASE, method="opd", seed=seed), accuracy=(0.1, accuracy), budget=512)
    written(tmp_path / "prune/0", BASE, accuracy=(0.1, 0.44), times=(5.0, 10.0), tokens=(400, 500), budget=110)
    written(tmp_path / "prune/1", replace(BASE, seed=1), accuracy=(0.1, 0.60), times=(5.0, 14.0), tokens=(500, 600))
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(module, "draw", lambda comparison, folder, suffix: [])


def test_the_table_is_what_the_hand_computes(two_methods, undrawn):
    text = report([two_methods])
    assert (two_methods / "report.md").read_text() == text
    assert "| method | seeds | accuracy, % (Avg@1) | difference to opd | time | tokens | kept | final M |" in text
    # sd of .4 .5 .9 is sqrt(.07), over sqrt(3); differences .04 and .10: mean .07, sd .06/sqrt(2), over sqrt(2) .03;
    # times 10/20 and 14/20; tokens 900, 1100
    assert rows(text) == [
        "| opd | 3 | 60.0 ± 15.3 | - | 20 s | 2k | 1k | 512 | 0.600 → 0.700 | 512 |",
        "| prune | 2 | 52.0 ± 8.0 | +7.0 ± 3.0 | 12 s (0.60x) | 1k (0.50x) | 500 | 105 | 0.600 → 0.700 | 512 |",
    ]


def test_seeds_without_a_partner_have_no_difference(two_methods, undrawn):
    written(two_methods / "prune/7", replace(BASE, seed=7), accuracy=(0.1, 0.52))
    written(two_methods / "truncate/7", replace(BASE, seed=7, method="truncate"))
    written(two_methods / "prefix/0", replace(BASE, method="prefix"), accuracy=(0.1, 0.44))
    _, truncate, prune, prefix = rows(report([two_methods]))
    assert "| +7.0 ± 3.0 (2 of 3 seeds) |" in prune
    assert prefix.startswith("| prefix | 1 | 44.0 ± 5.0* | +4.0 ± 7.1* |"), "one seed has the error of its prompts"
    assert truncate.startswith("| truncate | 1 | 50.0 ± 5.0* | - |")


def test_an_unfinished_run_stands_by_itself(two_methods, undrawn):
    written(two_methods / "prune/2", replace(BASE, seed=2), accuracy=(0.01,), times=(4.0,), tokens=(100,))
    text = report([two_methods])
    _, prune, late = rows(text)
    assert prune.startswith("| prune | 2 |")
    assert late.startswith("| prune (seed 2, step 1 of 2) | 1 | 1.0 ± 5.0* at step 0 | - | 4 s (0.40x) |")
    assert module.UNFINISHED in text


def test_without_grades_agreement_takes_the_place_of_accuracy(tmp_path):
    for seed in (0, 1):
        for method, shift in (("opd", 0.0), ("prune", -0.1 * (seed + 1))):
            config = replace(BASE, method=method, seed=seed)
            folder = written(tmp_path / f"{method}{seed}", config, accuracy=(None, None))
            metrics = read_metrics(folder / "metrics.jsonl")
            metrics[2] |= {"eval_reverse_kl": 0.4 + shift, "eval_overlap": 0.8 - shift}
            write_lines(folder / "metrics.jsonl", *metrics)
    text = report([tmp_path])
    assert "| method | seeds | reverse KL, nats | difference to opd | held-out overlap | difference to opd |" in text
    assert "| prune | 2 | 0.250 ± 0.050 | -0.150 ± 0.050 | 0.950 ± 0.050 | +0.150 ± 0.050 |" in text
    assert (tmp_path / "figures" / "agreement_by_time.png").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{"method": "opd"}, {}, {"weights": False}, {"w_drop": 0.05}, {"method": "random", "match": "mass"}],
         ["opd", "random equal mass", "prune", "prune w_drop=0.05", "prune without weights"]),
        ([{"method": "random", "match": "mass"}], ["random"]),
        ([{"threshold": value} for value in (0.9, 0.5, 0.7)], ["prune", "prune threshold=0.5", "prune threshold=0.9"]),
        ([{}, {"seed": 1}, {"seed": 2, "tracker": "wandb"}], ["prune"]),
        # A prefix that is matched seed by seed is one group.
        ([{}, *({"method": "prefix", "seed": seed, "final_length": 200 + seed} for seed in (0, 1))],
         ["prune", "prefix"]),
        ([{"method": "prefix", "seed": seed, "final_length": length} for seed in (0, 1) for length in (200, 300)],
         ["prefix", "prefix final_length=300"]),
    ],
)  # fmt: skip
def test_labels_say_what_is_not_usual(changes, expected):
    configs = [replace(TrainConfig(), **change) for change in changes]
    runs = [Run(Path(str(n)), config, [{"step": config.steps}]) for n, config in enumerate(configs)]
    (found,) = comparisons(runs)
    assert [group.label for group in found.groups] == expected


def test_pairs_are_never_mixed(tmp_path):
    for name, changes in {"a": {}, "b": {"pair": "high"}, "c": {"student": Path("a b/c")}, "d": {"seed": 1}}.items():
        written(tmp_path / name, replace(BASE, **changes))
    found = comparisons(find_runs([tmp_path]))
    assert [each.name for each in found] == ["tiny high", "tiny low", "tiny low student=a b/c"]
    assert [len(each.groups[0].runs) for each in found] == [1, 2, 1]
    report([tmp_path])
    drawn = {file.stem for file in (tmp_path / "figures").glob("accuracy_by_step*")}
    assert drawn == {f"accuracy_by_step_tiny-{name}" for name in ("high", "low", "low-student=a-b-c")}


def test_the_same_run_twice_is_refused(two_methods):
    written(two_methods / "again", replace(BASE, seed=1))
    words = f"{two_methods}/again and {two_methods}/prune/1 are the same run: prune, seed 1"
    assert refusal(report, [two_methods]) == words
    # Folders within each other count once.
    assert len(find_runs([two_methods, two_methods / "prune", two_methods / "prune" / "0"])) == 6


@pytest.mark.parametrize(
    ("number", "line", "words"),
    [
        (2, '{"step": 1, "meth', 'it must be a JSON object, got \'{"step": 1, "meth\''),
        (1, "{}", "step must be an integer, got nothing"),
        (3, {"step": 1}, "step must be 2, got 1"),
        (2, {"budget": True}, "budget must be a number, got True"),
        (2, {"overlap": "0.5"}, "overlap must be a number or null, got '0.5'"),
        (2, {"band_tokens": [1.0] * 15}, "band_tokens must be a list of 16 numbers, got [1.0, 1.0"),
    ],
)
def test_a_broken_line_is_named(tmp_path, number, line, words):
    folder = written(tmp_path / "a", BASE)
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[number - 1] = line if isinstance(line, str) else json.dumps(json.loads(lines[number - 1]) | line)
    file.write_text("\n".join(lines) + "\n")
    assert refusal(read_run, folder).startswith(f"the metrics {file}, line {number}: {words}")


def test_half_a_line_is_left_out_and_numbers_that_are_none_are_refused(tmp_path):
    folder = written(tmp_path / "a", BASE)
    metrics = read_metrics(folder / "metrics.jsonl")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "method": "pr')
    assert read_run(folder).last_step == 2, "a line that is being written is left out"
    for value in (math.nan, math.inf, 10**400):
        write_lines(folder / "metrics.jsonl", *metrics[:2], metrics[2] | {"time_s": value})
        assert "line 3: " in refusal(read_run, folder)


def test_folders_that_are_no_runs(tmp_path):
    def said(*folders, out=None):
        return refusal(report, folders, out)

    assert said(tmp_path / "missing") == f"the folder {tmp_path}/missing is not there"
    assert said(tmp_path) == f"the folder {tmp_path} holds no run: there is no metrics.jsonl in it"
    run = written(tmp_path / "run", BASE)
    assert said(run, run) == "out must say where to write a report of 2 folders, got None"
    file = run / "config.yaml"
    assert said(run, out=file) == f"the report in {file} cannot be written: Not a directory"
    (run / "metrics.jsonl").write_bytes(b"\xff\n")
    assert said(run) == f"the metrics {run}/metrics.jsonl cannot be read: it is not UTF-8"
    file.unlink()
    assert "config.yaml cannot be read: No such file or directory" in said(run)


def test_all_figures_are_drawn(two_methods):
    """Also with a seed less at some thresholds, and with a run that is under way."""
    for threshold in (0.5, 0.9):
        written(two_methods / f"prune_{threshold}/0", replace(BASE, threshold=threshold))
    written(two_methods / "late", replace(BASE, seed=3), times=(4.0,))
    out = two_methods / "out"
    text = report([two_methods], out)
    names = ["accuracy_by_step", "accuracy_by_time", "lengths", "overlap_by_depth", "threshold", "weight_by_position"]
    assert sorted(file.stem for file in (out / "figures").iterdir()) == names
    saved = (out / "report.md").read_text()
    assert saved.startswith(text.strip())
    links = re.findall(r"!\[[\w ]+\]\(([^)]+)\)", saved)
    assert sorted(links) == [f"figures/{name}.png" for name in names]


def test_a_run_that_has_just_begun(tmp_path):
    run = written(tmp_path / "a", BASE, accuracy=(0.1,), times=())
    (row,) = rows(report([tmp_path]))
    assert row == "| prune (seed 0, step 0 of 2) | 1 | 10.0 ± 5.0* at step 0 | - | 0 s | 0 | 0 | - | - → - | - |"
    assert sorted(file.stem for file in (tmp_path / "figures").iterdir()) == ["accuracy_by_step", "accuracy_by_time"]
    (run / "metrics.jsonl").write_text("")
    report([tmp_path], tmp_path / "out")
    assert list((tmp_path / "out" / "figures").iterdir()) == []
