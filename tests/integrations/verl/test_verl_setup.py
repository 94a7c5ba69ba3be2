"""How verl loads the loss, the kernel and the budget; the settings in docs/integrations/verl.md."""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from transformers import Qwen3Config
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config

from pruneopd_kernels.integrations.verl import PruneLossConfig
from pruneopd_kernels.integrations.verl.budget import PruneTrainerSync

PACKAGE = "pruneopd_kernels.integrations.verl"
PAGE = Path(__file__).parents[3] / "docs/integrations/verl.md"
BLOCKS = [shlex.split(block) for block in re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)]
SETTINGS = [[word for word in block if re.match(r"\+?[\w.]+=", word)] for block in BLOCKS if block[0] != "export"]


def run(code, *arguments, **environment):
    """Run code in a new process."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-4000:]


def test_by_external_modules():
    """Each process loads the modules of the environment variable while it imports verl."""
    run(
        """
        import verl
        from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
        from verl.trainer.distillation.fsdp import losses
        from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY
        from verl.trainer.ppo.v1 import get_trainer_cls

        assert DISTILLATION_LOSS_REGISTRY["prune_opd"].__module__.startswith("pruneopd_kernels")
        assert get_trainer_cls("prune_opd").__name__ == "PruneTrainerSync"
        loop = "pruneopd_kernels.integrations.verl.budget.BudgetAgentLoop"
        assert _agent_loop_registry["prune_opd"] == {"_target_": loop}
        assert losses.compute_forward_kl_topk.__module__.startswith("pruneopd_kernels")
        """,
        VERL_USE_EXTERNAL_MODULES=f"{PACKAGE}.budget,{PACKAGE}.patched",
    )


def test_by_the_models_external_lib(tmp_path):
    """Each worker loads `external_lib` with the model's configuration, before the loss's."""
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


def composed(settings):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings[0])
def test_settings_are_verls(settings):
    composed(settings)


def test_the_whole_command():
    (settings,) = [settings for settings in SETTINGS if len(settings) > 20]
    config = composed(settings)
    validate_config(config, need_reference_policy(config), need_critic(config))
    distillation = omega_conf_to_dataclass(config.distillation)
    assert type(distillation.distillation_loss) is PruneLossConfig
    (teacher,) = distillation.teacher_models.values()
    assert teacher.num_replicas == 2 and teacher.inference.engine_kwargs["vllm"]["max_logprobs"] == 16
    trainer = PruneTrainerSync(config)
    assert (trainer.budget.length, trainer.budget.maximum) == (2048, 12288)
    modules = config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES
    assert [["export", f"VERL_USE_EXTERNAL_MODULES={modules}"]] == [block for block in BLOCKS if block[0] == "export"]
