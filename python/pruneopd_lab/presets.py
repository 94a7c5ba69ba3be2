"""The models and the task of a preset, wherever a configuration names none of its own."""

from dataclasses import replace
from pathlib import Path

from pruneopd_trainer import models
from pruneopd_trainer.config import TrainConfig
from pruneopd_trainer.data import PromptFile, Task
from pruneopd_trainer.errors import TrainerError
from pruneopd_trainer.models import Pair, encode, load_model, load_tokenizer, make_pair

from .math_answers import MathAnswers
from .students import least_needed_layers, remove_layers, smollm2_folder
from .tasks import BilingualSums, ChainSums, WordProblems

TINY = Path(__file__).parent / "tiny"
TINY_STUDENTS = ("low", "high", "bilingual")
REMOVED_LAYERS = {"drop1": 1, "drop4": 4, "drop10": 10}
"""How many of SmolLM2's layers the students of the preset smollm2 lack."""
CUT_PROMPTS = 12
"""Word problems on which it is measured which layers are needed least."""


def load(config: TrainConfig, student: Path | None = None) -> tuple[Pair, Task]:
    """Load what a run needs, with the preset's models and prompts if the configuration names none; see `load_pair`."""
    return load_pair(config, student), load_task(config)


def load_pair(config: TrainConfig, student: Path | None = None) -> Pair:
    """Load the models of a run; `student` is a folder in place of the configuration's, such as a checkpoint's."""
    student, teacher = student or config.student, config.teacher
    if student is None:
        known = TINY_STUDENTS if config.preset == "tiny" else tuple(REMOVED_LAYERS)
        if config.pair not in known:
            rule = f"be one of {', '.join(known)} with the preset {config.preset}"
            raise TrainerError(f"TrainConfig: pair must {rule}, got {config.pair!r}")
    if config.preset == "tiny":
        student, teacher = student or TINY / config.pair, teacher or TINY / "teacher"
    if student is not None:
        return models.load_pair(replace(config, student=student, teacher=teacher or smollm2_folder()))

    smollm2, tokenizer = load_model(smollm2_folder(), "float32"), load_tokenizer(smollm2_folder())
    problems = WordProblems(seed=0)
    prompts = encode(tokenizer, [problems.held_out(index).prompt for index in range(CUT_PROMPTS)])
    [block] = least_needed_layers(smollm2, *prompts, [REMOVED_LAYERS[config.pair]])
    cut = remove_layers(smollm2, block)
    if teacher is not None:
        return make_pair(cut, load_model(teacher, config.teacher_precision), tokenizer, load_tokenizer(teacher))
    return make_pair(
        cut, smollm2.bfloat16() if config.teacher_precision == "bfloat16" else smollm2, tokenizer, tokenizer
    )


def load_task(config: TrainConfig) -> Task:
    """Load the prompts of a run: the file `config.data`, graded by math-verify, or the preset's."""
    if config.data is not None:
        return PromptFile(config.data, config.seed, MathAnswers)
    if config.preset == "smollm2":
        return WordProblems(config.seed)
    return BilingualSums(config.seed) if config.pair == "bilingual" else ChainSums(config.seed)
