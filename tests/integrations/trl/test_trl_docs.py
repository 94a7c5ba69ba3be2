"""The recipes of docs/integrations/trl.md, the example and the benchmark run with tiny models."""

from pathlib import Path

import datasets
import pytest
from test_trl_server import Client
from tiny_pair import model, prompts, teacher_of, tokenizer
from trl.experimental import server_distillation
from trl.generation import vllm_client

import trl
from bench.report import rows as results
from bench.studies import trl as bench
from test_documentation import blocks

ROOT = Path(__file__).parents[3]
RECIPES = blocks(ROOT / "docs/integrations/trl.md", "python", "py")
SMALL = {
    "use_cpu": True, "bf16": False, "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=["local", "server"])
def test_a_recipe_runs(tmp_path, monkeypatch, recipe):
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
    line, code = recipe
    code = code.replace("2048", "8").replace("1024", "4").replace("12288", "16")
    namespace = {}
    exec(compile("\n" * (line - 1) + code, "trl.md", "exec"), namespace)
    records = [record for record in namespace["trainer"].state.log_history if "grad_norm" in record]
    assert [record["step"] for record in records] == [1, 2] and records[0]["prune/budget"] == 8


def test_the_example_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import trl_opd

    trl_opd.main(["--steps", "1", "--output-dir", str(tmp_path)])
    head, first = capsys.readouterr().out.strip().splitlines()[-2:]
    assert head.split() == ["step", "loss", "overlap", "drift_rate", "effective_length", "budget"]
    step, loss, overlap, drift, length, budget = map(float, first.split())
    assert (step, budget) == (1, 85)
    assert 0 < loss < 10 and 0.3 < overlap < 1 and 0 < drift < 1 and 0 < length <= 85


# --- python -m bench trl, at a size that shows no speed --------------------------------------------------------------

MEASURED = "--positions 32 --hidden 8 --vocabulary 200 --seconds 0 --rounds 1 --device cpu".split()


def test_a_measurement_writes_a_row_for_each_loss(tmp_path):
    file = tmp_path / "trl.jsonl"
    for _ in range(2):  # the second run replaces the rows of the first
        assert bench.main([*MEASURED, "--file", str(file)]) == 0
    rows = results.load(file)
    assert [row["loss"] for row in rows] == ["trl", "reverse_kl", "topk_policy", "divergence"]
    assert rows[0]["times_faster_than_trl"] == 1
    assert all(row["median_ms"] > 0 and row["trl"].startswith("1.16") for row in rows)
