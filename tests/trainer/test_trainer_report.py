"""Reports of runs that `made_up_runs.py` makes up, or whose numbers are written out here."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from made_up_runs import METHODS, THRESHOLDS, comparison, run_metrics, write_run
from pruneopd_lab import figures
from pruneopd_lab import report as module
from pruneopd_lab.report import report
from pruneopd_lab.run_groups import Run, comparisons, find_runs, read_metrics, read_run
from pruneopd_trainer.config import TrainConfig, write_config
from trainer_models import refusal, write_lines

BASE = TrainConfig(steps=2, eval_every=2)


def written(folder, config, *, accuracy=(0.1, 0.5), error=0.05, times=(10.0, 20.0), tokens=(1000, 1000), budget=100):
    """A run of two steps, evaluated before and after."""
    folder.mkdir(parents=True)
    write_config(config, folder / "config.yaml")
    metrics = run_metrics(replace(config, eval_every=2))[: len(times) + 1]
    for step, values in enumerate(metrics[1:]):
        values |= {"time_s": times[step], "tokens_generated": tokens[step], "tokens_kept": tokens[step] // 2,
                   "budget": budget, "overlap": 0.6 + 0.1 * step, "peak_memory_mib": 512.4}  # fmt: skip
    for values, found in zip([m for m in metrics if "accuracy" in m], accuracy, strict=False):
        values |= {"accuracy": found, "accuracy_se": error}
    write_lines(folder / "metrics.jsonl", *metrics)
    return folder


def cells(text):
    """The cells of a report's rows, by method, in ASCII but for what is easily told apart."""
    text = text.replace("\N{EN DASH}", "-").replace("\N{MULTIPLICATION SIGN}", "x")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    header, body = rows[0], [row for row in rows[1:] if not row[0].startswith((":--", "method"))]
    return {row[0]: dict(zip(header, row, strict=True)) for row in body}


def finished(*configs):
    """The comparisons of finished runs with these configurations."""
    return comparisons([Run(Path(str(n)), config, [{"step": config.steps}]) for n, config in enumerate(configs)])


def labels(*configs):
    return [group.label for found in finished(*configs) for group in found.groups]


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
    found = cells(text)
    assert list(found) == ["opd", "prune"]
    # sd of .4 .5 .9 is sqrt(.07), over sqrt(3)
    assert found["opd"] == {
        "method": "opd", "seeds": "3", "accuracy, % (Avg@1)": "60.0 ± 15.3", "difference to opd": "-", "time": "20 s",
        "tokens": "2k", "kept": "1k", "final M": "512", "overlap": "0.600 → 0.700", "MiB": "512",
    }  # fmt: skip
    # differences .04 and .10: mean .07, sd .06/sqrt(2), over sqrt(2) .03; times 10/20 and 14/20; tokens 900, 1100
    assert found["prune"] == {
        "method": "prune", "seeds": "2", "accuracy, % (Avg@1)": "52.0 ± 8.0", "difference to opd": "+7.0 ± 3.0",
        "time": "12 s (0.60x)", "tokens": "1k (0.50x)", "kept": "500", "final M": "105", "overlap": "0.600 → 0.700",
        "MiB": "512",
    }  # fmt: skip


def test_seeds_without_a_partner_have_no_difference(two_methods, undrawn):
    written(two_methods / "prune/7", replace(BASE, seed=7), accuracy=(0.1, 0.52))
    written(two_methods / "truncate/7", replace(BASE, seed=7, method="truncate"))
    found = cells(report([two_methods]))
    assert found["prune"]["difference to opd"] == "+7.0 ± 3.0 (2 of 3 seeds)"
    assert found["truncate"]["difference to opd"] == "-"


def test_one_seed_has_the_error_of_its_prompts(tmp_path, undrawn):
    written(tmp_path / "a", replace(BASE, method="opd"), accuracy=(0.1, 0.4), error=0.03)
    written(tmp_path / "b", BASE, accuracy=(0.1, 0.5), error=0.04)
    text = report([tmp_path])
    found = cells(text)
    assert found["opd"]["accuracy, % (Avg@1)"] == "40.0 ± 3.0*"
    assert found["prune"]["accuracy, % (Avg@1)"] == "50.0 ± 4.0*"
    assert found["prune"]["difference to opd"] == "+10.0 ± 5.0*"
    assert "with * that over the held-out prompts of the only seed" in text


def test_an_unfinished_run_stands_by_itself(two_methods, undrawn):
    written(two_methods / "prune/2", replace(BASE, seed=2), accuracy=(0.01,), times=(4.0,), tokens=(100,))
    text = report([two_methods])
    found = cells(text)
    assert list(found) == ["opd", "prune", "prune (seed 2, step 1 of 2)"]
    assert found["prune"]["seeds"] == "2"
    row = found["prune (seed 2, step 1 of 2)"]
    assert row["accuracy, % (Avg@1)"] == "1.0 ± 5.0* at step 0"
    assert row["difference to opd"] == "-"
    assert row["time"] == "4 s (0.40x)"
    assert module.UNFINISHED in text


def test_without_grades_agreement_takes_the_place_of_accuracy(tmp_path, undrawn):
    for seed in (0, 1):
        for method, shift in (("opd", 0.0), ("prune", -0.1 * (seed + 1))):
            folder = written(tmp_path / f"{method}{seed}", replace(BASE, method=method, seed=seed))
            metrics = read_metrics(folder / "metrics.jsonl")
            metrics[0] |= {"accuracy": None, "accuracy_se": None}
            metrics[2] |= metrics[0] | {"step": 2, "eval_reverse_kl": 0.4 + shift, "eval_overlap": 0.8 - shift}
            write_lines(folder / "metrics.jsonl", *metrics)
    text = report([tmp_path])
    assert "| method | seeds | reverse KL, nats | difference to opd | held-out overlap | difference to opd |" in text
    assert "| prune | 2 | 0.250 ± 0.050 | -0.150 ± 0.050 | 0.950 ± 0.050 | +0.150 ± 0.050 |" in text


def test_labels_say_what_is_not_usual():
    base = TrainConfig()
    configs = [replace(base, **changes) for changes in METHODS.values()]
    assert labels(*configs) == [
        "opd", "truncate", "random equal mass", "prune", "prune w_drop=0.05", "prune without weights",
        "prefix"]  # fmt: skip
    assert labels(replace(base, method="random", match="mass")) == ["random"]
    assert labels(replace(base, learning_rate=1e-5), base) == ["prune", "prune learning_rate=1e-05"]
    found = labels(*(replace(base, threshold=value) for value in (0.9, 0.5, 0.7, 0.6)))
    assert found == ["prune", "prune threshold=0.5", "prune threshold=0.6", "prune threshold=0.9"]
    assert labels(base, replace(base, seed=1), replace(base, seed=2, tracker="wandb")) == ["prune"]


def test_prefix_matched_seed_by_seed_is_one_group():
    prefix = TrainConfig(method="prefix")
    matched = [replace(prefix, seed=seed, final_length=200 + seed) for seed in (0, 1)]
    assert labels(TrainConfig(), *matched) == ["prune", "prefix"]
    lengths = [replace(prefix, seed=seed, final_length=length) for seed in (0, 1) for length in (200, 300)]
    assert labels(TrainConfig(), TrainConfig(method="opd"), *lengths) == [
        "opd", "prune", "prefix final_length=200", "prefix final_length=300"]  # fmt: skip


def test_pairs_are_never_mixed():
    base = TrainConfig()
    configs = [base, replace(base, pair="high"), replace(base, student=Path("a b/c")), replace(base, seed=1)]
    found = finished(*configs)
    assert [each.name for each in found] == ["tiny high", "tiny low", "tiny low student=a b/c"]
    assert [len(each.groups[0].runs) for each in found] == [1, 2, 1]


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
        (2, "[" * 100_000, "it must be a JSON object, got '" + "[" * 57 + "...'"),
        (1, "{}", "step must be an integer, got nothing"),
        (1, {"step": -1}, "step must be 0 or 1, got -1"),
        (3, {"step": 1}, "step must be 2, got 1"),
        (2, {"budget": True}, "budget must be a number, got True"),
        (2, {"overlap": "0.5"}, "overlap must be a number or null, got '0.5'"),
        (2, {"band_tokens": [1.0] * 15}, "band_tokens must be a list of 16 numbers, got [1.0, 1.0"),
        (2, {"band_weight": ["x"] * 16}, "band_weight must be a list of 16 numbers or nulls, got ['x', 'x'"),
    ],
)
def test_a_broken_line_is_named(tmp_path, number, line, words):
    folder = written(tmp_path / "a", BASE)
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[number - 1] = line if isinstance(line, str) else json.dumps(json.loads(lines[number - 1]) | line)
    file.write_text("\n".join(lines) + "\n")
    said = refusal(read_run, folder)
    assert said.startswith(f"the metrics {file}, line {number}: {words}")
    assert len(said) < len(f"the metrics {file}, line {number}: ") + 150


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


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A report of seven methods and five thresholds with two seeds, one run unfinished."""
    folder = comparison(tmp_path_factory.mktemp("drawn"), seeds=(0, 1), **METHODS, **THRESHOLDS)
    write_run(folder / "late", TrainConfig(seed=3), until=23)
    return folder, report([folder], folder / "out")


def colours(file):
    """How many pixels there are of each colour."""
    pixels = (matplotlib.image.imread(file)[..., :3] * 255).round().astype(int) @ [1 << 16, 1 << 8, 1]
    found, counts = np.unique(pixels, return_counts=True)
    return {f"#{colour:06X}": count for colour, count in zip(found.tolist(), counts.tolist(), strict=True)}


def test_all_figures_are_drawn(drawn):
    folder, text = drawn
    names = ["accuracy_by_step", "accuracy_by_time", "lengths", "overlap_by_depth", "threshold", "weight_by_position"]
    assert sorted(file.stem for file in (folder / "out" / "figures").iterdir()) == names
    for name in ("accuracy_by_step", "accuracy_by_time", "lengths", "overlap_by_depth"):
        found = colours(folder / "out" / "figures" / f"{name}.png")
        for method in ("opd", "truncate", "random", "prune", "prefix"):
            assert found.get(figures.COLOURS[method], 0) > 100, (name, method)
    saved = (folder / "out" / "report.md").read_text()
    assert saved.startswith(text.strip())
    links = re.findall(r"!\[[\w ]+\]\(([^)]+)\)", saved)
    assert sorted(links) == [f"figures/{name}.png" for name in names]


def test_evaluations_are_means_with_their_standard_error(two_methods):
    (found,) = comparisons(find_runs([two_methods]))
    (axes,) = figures.draw_evaluations(found, "time_s").axes
    opd, prune = axes.lines
    assert prune.get_xdata().tolist() == [0, 12]
    assert prune.get_ydata().tolist() == pytest.approx([0.1, 0.52])
    assert opd.get_ydata().tolist() == pytest.approx([0.1, 0.6])
    edges = axes.collections[1].get_paths()[0].vertices
    assert edges[edges[:, 0] == 12][:, 1].min() == pytest.approx(0.44)
    assert edges[edges[:, 0] == 12][:, 1].max() == pytest.approx(0.60)


@pytest.mark.parametrize(("until", "names"), [(0, ["accuracy_by_step", "accuracy_by_time"]), (-1, [])])
def test_a_run_that_has_just_begun(tmp_path, until, names):
    write_run(tmp_path / "a", TrainConfig(steps=40))
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(lines[: until + 1]))
    found = cells(report([tmp_path]))["prune (seed 0, step 0 of 40)"]
    assert found["final M"] == "-"
    assert sorted(file.stem for file in (tmp_path / "figures").iterdir()) == names


@pytest.mark.thorough
def test_pairs_have_their_own_figures_and_agreement_stands_for_grades(tmp_path):
    comparison(tmp_path, seeds=(0,), graded=False, opd={"method": "opd"}, high={"pair": "high"})
    report([tmp_path])
    names = {file.stem for file in (tmp_path / "figures").iterdir()}
    assert names >= {"agreement_by_time_tiny-low", "agreement_by_step_tiny-high", "weight_by_position_tiny-high"}
    assert "weight_by_position_tiny-low" not in names
