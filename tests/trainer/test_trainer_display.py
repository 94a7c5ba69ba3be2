"""What a person sees of a run: curves, and responses coloured by weight."""

import html
import io
import os
import re
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pruneopd_lab.samples import COLOURS, Sample, show, write_html
from pruneopd_lab.trackers import check_tracker, open_trackers
from pruneopd_trainer.config import TrainConfig
from trainer_models import refusal

CONFIG = TrainConfig()
EVALUATION = {"step": 0, "method": "prune", "time_s": 0.0, "accuracy": 0.25, "accuracy_se": 0.04}
STEP = {"step": 1, "method": "prune", "time_s": 2.0, "tokens_generated": 5000, "budget": 95, "overlap": 0.714,
        "loss": -0.5, "grad_norm": None, "band_overlap": [0.5, None]}  # fmt: skip


def curves(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)] for name in names}


def log_all(trackers, *records):
    for tracker in trackers:
        for record in records:
            tracker.log(record["step"], record)
        tracker.close()


def test_tensorboard_has_every_point_and_loses_those_after_the_step_that_a_run_continues_from(tmp_path, monkeypatch):
    log_all(open_trackers(CONFIG, tmp_path), EVALUATION, STEP, {"step": 2, "loss": 0.25}, {"step": 3, "loss": 0.5})
    monkeypatch.setattr("time.time", lambda: 4e9)  # event files are read in the order of their names, by the second
    log_all(open_trackers(CONFIG, tmp_path, continued=2), {"step": 3, "loss": 2.0})
    found = curves(tmp_path)
    assert found["training/loss"] == [(1, -0.5), (2, 0.25), (3, 2.0)]
    assert found["evaluation/accuracy"] == [(0, 0.25)]
    assert not any("band" in name for name in found), "only numbers become points"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_disk_that_fills_under_tensorboard_is_told_and_closing_does_not_hang(tmp_path, monkeypatch):
    monkeypatch.setattr("threading.excepthook", lambda error: None)  # TensorBoard's writing thread may fail as well
    before = set(threading.enumerate())
    (tracker,) = open_trackers(CONFIG, tmp_path)
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.unlink()
    events.symlink_to("/dev/full")
    said = refusal(tracker.log, 1, STEP)
    assert said == f"TensorBoard cannot write to {tmp_path / 'tensorboard'}: No space left on device"
    tracker.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)


@pytest.fixture
def calls(monkeypatch):
    """Stand in for both trackers' packages; return what a run asked of them."""
    calls = []

    class Run:
        id = "abc123"

        def log(self, numbers, step):
            if numbers.get("loss") == 13:
                raise ConnectionError("the line is down\nsince noon")
            calls.append((step, numbers))

        def finish(self):
            calls.append("finish")

    def init(**options):
        if options["config"]["seed"] == 13:
            raise PermissionError("no account\nlog in")
        calls.append(options)
        return Run()

    for name in ("trackio", "wandb"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init, __spec__="found"))
    return calls


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_the_numbers_and_continues(calls, tmp_path, name):
    """trackio knows a run by its name, wandb by an id."""
    config = replace(CONFIG, tracker=name)
    record = {"step": 3, "loss": 0.5, "method": "prune", "band_weight": [1.0]}
    log_all(open_trackers(config, tmp_path), record)
    log_all(open_trackers(config, tmp_path, continued=3))
    options = {"project": "pruneopd", "name": tmp_path.name, "config": config.to_dict()}
    first, again = {"resume": "never"}, {"resume": "allow"}
    if name == "wandb":
        options |= {"dir": str(tmp_path), "resume": "allow"}
        first, again = {"id": None}, {"id": "abc123"}
    assert calls == [options | first, (3, {"loss": 0.5}), "finish", options | again, "finish"]
    said = refusal(open_trackers, replace(config, seed=13), tmp_path)
    assert said == f"the tracker {name} does not start: no account"
    _, tracker = open_trackers(config, tmp_path)
    assert refusal(tracker.log, 1, {"loss": 13}) == f"the tracker {name} takes no more records: the line is down"


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("pruneopd_lab.trackers.find_spec", lambda name: None)
    check_tracker(CONFIG)
    said = refusal(open_trackers, replace(CONFIG, tracker="wandb"), tmp_path)
    assert said == "tracker = wandb needs the package wandb, which is not installed"
    assert list(tmp_path.iterdir()) == []


def sample(tokens, **change):
    count = len(tokens)
    values = {
        "prompt": "4 + 17 =", "tokens": tokens, "weights": [1.5] * count, "overlaps": [0.75] * count,
        "drifts": [False] * count, "answer": "21", "grade": 1.0, "finished": True,
    }  # fmt: skip
    return Sample(**{**values, **change})


def response_of(file):
    """Return the text of a page's only response as a browser shows it."""
    (response,) = re.findall("<p class='response'>(.*?)</p>", file.read_text(encoding="utf-8"), re.DOTALL)
    return html.unescape(re.sub("<[^>]*>", "", response))


def test_a_token_tells_position_weight_overlap_and_drift(tmp_path):
    file = tmp_path / "samples.html"
    shown = sample([" 7", "."], weights=[0.75, 0.0], overlaps=[0.875, 0.25], drifts=[False, True])
    write_html([shown], file, "step 20", w_base=0.5)
    text = file.read_text()
    first = f"<span style='background:{COLOURS[2]}' title='position 0, weight 0.750, overlap 0.875'> 7</span>"
    title = "position 1, weight 0.000, overlap 0.250, drift"
    assert f"{first}<span class='drift' style='background:{COLOURS[0]}' title='{title}'>.</span>" in text
    assert "2 tokens, finished, 1 drifts, mean weight 0.38, answer 21, grade 1" in text
    assert "http" not in text and "src=" not in text and "url(" not in text
    assert list(tmp_path.iterdir()) == [file]


TEXTS = st.text(st.one_of(st.sampled_from("<>&'\"{}%\n"), st.characters(exclude_categories=["C"])))
CONTROLS = st.text(st.characters(categories=["C"], exclude_characters="\n\t"), min_size=1)


@given(tokens=st.lists(TEXTS), prompt=TEXTS)
@example(tokens=["<b>", "&amp;", "</p>"], prompt="<b>&lt;")
def test_whatever_a_response_holds_is_text(tmp_path_factory, tokens, prompt):
    file = tmp_path_factory.getbasetemp() / "samples.html"
    write_html([sample(tokens, prompt=prompt, answer=prompt)], file, prompt, w_base=0.5)
    assert response_of(file) == "".join(tokens)
    tags = set(re.findall(r"<(\w+)", file.read_text(encoding="utf-8")))
    assert tags <= set("html head meta title style body h1 h2 div p span i article".split())


@given(token=CONTROLS)
def test_control_characters_reach_neither_page_nor_terminal(tmp_path_factory, token):
    file = tmp_path_factory.getbasetemp() / "samples.html"
    console = Console(file=io.StringIO(), width=80)
    shown = sample([token], prompt=token, answer=token)
    write_html([shown], file, token, w_base=0.5)
    show([shown], console, w_base=0.5)
    for text in (file.read_text(), console.file.getvalue()):
        assert not set(text) & set(token)
        assert "\N{REPLACEMENT CHARACTER}" * len(token) in text.replace("\n", "")
