"""What docs/integrations/verl.md tells to set is read by verl's own configuration."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config

from pruneopd_kernels.integrations.verl import PruneLossConfig
from pruneopd_kernels.integrations.verl.budget import PruneTrainerSync

PAGE = Path(__file__).parents[3] / "docs/integrations/verl.md"
BLOCKS = [shlex.split(block) for block in re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)]
SETTINGS = [[word for word in block if re.match(r"\+?[\w.]+=", word)] for block in BLOCKS if block[0] != "export"]


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
