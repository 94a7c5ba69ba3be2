"""How verl comes to know the loss, the kernel and the budget."""

import os
import subprocess
import sys
import textwrap

from transformers import Qwen3Config

PACKAGE = "pruneopd_kernels.integrations.verl"


def run(code, *arguments, **environment):
    """In a process of its own, as each of verl's is."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-4000:]


def test_by_external_modules():
    """Of the environment variable that verl looks at in each process: loaded while verl itself is being imported."""
    run(
        """
        import verl
        from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
        from verl.trainer.distillation.fsdp import losses
        from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY
        from verl.trainer.ppo.v1 import get_trainer_cls

        assert DISTILLATION_LOSS_REGISTRY["prune_opd"].__module__.startswith("pruneopd_kernels")
        assert get_trainer_cls("prune_opd").__name__ == "PruneTrainerSync"
        assert "prune_opd" in _agent_loop_registry
        assert losses.compute_forward_kl_topk.__module__.startswith("pruneopd_kernels")
        """,
        VERL_USE_EXTERNAL_MODULES=f"{PACKAGE}.budget,{PACKAGE}.patched",
    )


def test_by_the_models_external_lib(tmp_path):
    """Where each worker reads its model's configuration, before that of the loss."""
    Qwen3Config(num_hidden_layers=1, architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path)
    run(
        """
        import sys
        from verl.trainer.distillation.fsdp import losses
        from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY
        from verl.workers.config import DistillationLossConfig, HFModelConfig

        assert "prune_opd" not in DISTILLATION_LOSS_REGISTRY
        HFModelConfig(path=sys.argv[1], load_tokenizer=False, external_lib="pruneopd_kernels.integrations.verl")
        assert DistillationLossConfig(loss_mode="prune_opd").loss_settings.use_topk
        assert losses.compute_forward_kl_topk.__module__.startswith("verl"), "replaced on request alone"
        """,
        tmp_path,
    )
