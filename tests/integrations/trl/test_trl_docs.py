"""The recipes of docs/integrations/trl.md and the example run, with tiny models in the place of those they name."""

import sys
from pathlib import Path

import datasets
import pytest
from tiny_pair import model, prompts, teacher_of, tokenizer
from trl.experimental import server_distillation
from trl.generation import vllm_client

import trl

ROOT = Path(__file__).parents[3]
sys.path += [str(ROOT / "python"), str(ROOT / "examples")]

import trl_opd  # noqa: E402
from test_trl_server import Client  # noqa: E402

from test_documentation import blocks  # noqa: E402

SMALL = {
    "use_cpu": True, "bf16": False, "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
}  # fmt: skip


@pytest.mark.parametrize("number", [0, 1])
def test_a_recipe_runs(tmp_path, monkeypatch, number):
    """Only the models, the prompts, the size of the batch and the lengths are smaller."""
    student = model(0)
    for name, one in (("Qwen/Qwen3-1.7B", student), ("Qwen/Qwen3-8B", teacher_of(student))):
        one.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: prompts())
    monkeypatch.setattr(
        vllm_client, "VLLMClient", type("VLLMClient", (Client,), {"teacher": teacher_of(student).eval()})
    )
    for module, name in ((trl, "DistillationConfig"), (server_distillation, "ServerDistillationConfig")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda original=original, **given: original(**{**given, **SMALL}))
    line, code = blocks(ROOT / "docs/integrations/trl.md", "python", "py")[number]
    code = code.replace("2048", "8").replace("1024", "4").replace("12288", "16")
    namespace = {}
    exec(compile("\n" * (line - 1) + code, "trl.md", "exec"), namespace)
    records = [record for record in namespace["trainer"].state.log_history if "grad_norm" in record]
    assert [record["step"] for record in records] == [1, 2]
    assert records[0]["prune/budget"] == 8


def test_the_page_has_two_recipes():
    assert len(blocks(ROOT / "docs/integrations/trl.md", "python", "py")) == 2


def test_the_example_runs(tmp_path, capsys):
    trl_opd.main(["--steps", "1", "--output-dir", str(tmp_path)])
    head, first = capsys.readouterr().out.strip().splitlines()[-2:]
    assert head.split() == ["step", "loss", "overlap", "drift_rate", "effective_length", "budget"]
    step, loss, overlap, drift, length, budget = map(float, first.split())
    assert (step, budget) == (1, 85)
    assert 0 < loss < 10
    assert 0.3 < overlap < 1
    assert 0 < drift < 1
    assert 0 < length <= 85
