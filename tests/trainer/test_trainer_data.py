"""Tasks: prompts by number, refusals that name a file's line, grades."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pruneopd_lab import math_answers
from pruneopd_lab.math_answers import MathAnswers
from pruneopd_lab.presets import load_task
from pruneopd_lab.tasks import BilingualSums, ChainSums, WordProblems
from pruneopd_lab.tiny.chain_sum import Problem, solution
from pruneopd_lab.tiny.dialect import translate
from pruneopd_lab.tiny.tokenizer import make_tokenizer
from pruneopd_trainer.config import TrainConfig
from pruneopd_trainer.data import Example, PromptFile, read_lines
from pruneopd_trainer.train import from_folders, train
from trainer_models import refusal, write_lines


@pytest.fixture(scope="module")
def answers():
    return MathAnswers()


@pytest.mark.parametrize("task", [ChainSums, BilingualSums, WordProblems])
def test_examples_follow_from_their_number(task):
    one, same, other = task(0), task(0), task(1)
    numbers = [5, 0, 1003, 2]
    assert [one.example(number) for number in numbers] == [same.example(number) for number in reversed(numbers)][::-1]
    assert len({one.example(number).prompt for number in range(50)}) > 45
    assert one.example(3) != other.example(3)
    assert one.held_out(3) == other.held_out(3)
    held_out = {one.held_out(number).prompt for number in range(50)}
    assert not held_out & {one.example(number).prompt for number in range(50)}
    assert one.held_out_count is None
    if task is WordProblems:
        assert not one.graded
        words = "the task of the preset smollm2 is not graded"
        assert refusal(one.grade, Example("", None), "5", True) == words


def test_only_the_last_words_are_graded():
    right = ("answer 5 7", "start 4 . answer 1 2 wait answer 5 7", "answer 0 5 7")
    wrong = ("answer 5 7 .", "answer 7 5", "5 7", "answer 5 7 wait")
    for response in (*right, *wrong):
        assert ChainSums(0).grade(Example("50 + 7 =", "57"), response, True) == (response in right), response


def test_bilingual_sums_are_held_out_in_both_languages_and_answered_in_either():
    plain, task, tokenizer = ChainSums(0), BilingualSums(0), make_tokenizer()
    for number in range(10):
        ours, theirs = task.held_out(2 * number), task.held_out(2 * number + 1)
        assert ours == plain.held_out(number)
        assert (translate(theirs.prompt), theirs.answer) == ours
        assert not {"+", "-", "="} & set(theirs.prompt.split())
        assert task.example(2 * number) == plain.example(2 * number)
        assert translate(task.example(2 * number + 1).prompt) == plain.example(2 * number + 1).prompt
        text = tokenizer.decode(tokenizer(solution(Problem(*ours))).input_ids)
        for response in (text, translate(text)):
            assert task.grade(theirs, response, True) == 1.0
            assert task.grade(theirs, response, False) == 0.0
            assert task.grade(theirs._replace(answer=str(int(ours.answer) + 1)), response, True) == 0.0


@pytest.fixture
def numbered(tmp_path):
    return write_lines(tmp_path / "prompts.jsonl", *({"prompt": f"prompt {number}"} for number in range(25)))


def test_the_last_tenth_of_the_lines_is_held_out(numbered):
    task = PromptFile(numbered, seed=0)
    assert not task.graded
    assert task.held_out_count == 2
    assert [task.held_out(number).prompt for number in range(2)] == ["prompt 23", "prompt 24"]
    assert refusal(task.grade, task.example(0), "5", True) == "a file of prompts without answers is not graded"


def test_each_epoch_has_every_prompt_once_in_an_order_of_its_own(numbered):
    task = PromptFile(numbered, seed=0)
    epochs = [[task.example(number).prompt for number in range(start, start + 23)] for start in (0, 23, 46)]
    assert all(sorted(epoch) == sorted(f"prompt {number}" for number in range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [PromptFile(numbered, seed=1).example(number).prompt for number in range(23)] not in epochs
    assert PromptFile(numbered, seed=0).example(30) == task.example(30)


def test_blank_lines_a_byte_order_mark_and_other_keys_are_passed_over(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "one\\u2028line", "source": 3}\r\n\n  \n{"prompt": "\xc3\xa9"}')
    found = [(line.number, line.values["prompt"]) for line in read_lines(path, ("prompt",))]
    assert found == [(1, "one\u2028line"), (4, "é")]


GOOD = {"prompt": "p", "answer": "1"}
WRONG_LINES = {
    "no JSON": ("{", "each line must be a JSON object, got '{'"),
    "no object": ("[1]", "each line must be a JSON object, got '[1]'"),
    "nested too deeply": ("[" * 100_000, f"each line must be a JSON object, got '{'[' * 27}...{'[' * 28}'"),
    "no prompt": ({"answer": "1"}, 'each line must have a "prompt", got \'{"answer": "1"}\''),
    "an empty prompt": ({"prompt": " "}, "\"prompt\" must be text, got ' '"),
    "half a character": ('{"prompt": "\\ud800"}', "\"prompt\" must be text, got '\\ud800'"),
    "an answer that is null": ({"prompt": "p", "answer": None}, '"answer" must be text, got None'),
    "no answer": ({"prompt": "p"}, "there is no answer, but one in line 1"),
}


@pytest.mark.parametrize("wrong", WRONG_LINES)
def test_a_wrong_line_is_refused_with_its_number(tmp_path, wrong):
    line, words = WRONG_LINES[wrong]
    path = write_lines(tmp_path / "prompts.jsonl", GOOD, "", line)
    assert refusal(PromptFile, path, 0) == f"{path}, line 3: {words}"
    path = write_lines(tmp_path / "prompts.jsonl", {"prompt": "p"}, GOOD)
    assert refusal(PromptFile, path, 0) == f"{path}, line 2: there is an answer, but none in line 1"


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    assert refusal(PromptFile, tmp_path, 0) == f"the prompts {tmp_path} cannot be read: Is a directory"
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "\xff"}')
    assert refusal(PromptFile, file, 0) == f"the prompts {file} cannot be read: it is not UTF-8"
    write_lines(file, GOOD)
    words = f"{file} must have at least two prompts, one of them to hold out, got 1"
    assert refusal(PromptFile, file, 0) == words


def test_the_task_of_a_configuration(numbered):
    assert type(load_task(TrainConfig())) is type(load_task(TrainConfig(pair="high"))) is ChainSums
    assert isinstance(load_task(TrainConfig(pair="bilingual")), BilingualSums)
    assert isinstance(load_task(TrainConfig(preset="smollm2")), WordProblems)
    assert load_task(TrainConfig(seed=3)).example(0) == ChainSums(3).example(0)
    task = load_task(TrainConfig(data=numbered, seed=3))
    assert task.example(0) == PromptFile(numbered, 3).example(0)
    assert refusal(from_folders, TrainConfig()) == "TrainConfig: data must be a JSONL file, got None"


def test_a_group_advantage_needs_grades(numbered, tmp_path):
    config = TrainConfig(method="prune+grpo", group_size=2, data=numbered)
    said = refusal(train, config, tmp_path / "out", load=lambda config, student: (None, load_task(config)))
    assert said == f"TrainConfig: method prune+grpo needs answers to grade by, got none from {numbered}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("answer", "response", "grade"),
    [
        ("1/2", r"It is \boxed{0.5}.", 1.0),
        ("72", r"\boxed{72} no, \boxed{73}", 0.0),
        ("72", "it is 72", 0.0),
        ("72", r"\boxed{72}, and \boxed{2", 1.0),
        ("72", r"\boxed{1} or \boxed{\boxed{72}}", 1.0),
        ("$", r"\boxed{ $ }", 1.0),  # which math-verify cannot parse
        ("1" * 1001, r"\boxed{" + "1" * 1001 + "}", 0.0),
    ],
)
def test_a_boxed_answer_is_graded(tmp_path, answers, answer, response, grade):
    path = write_lines(tmp_path / "prompts.jsonl", {"prompt": "p", "answer": answer}, GOOD)
    assert not PromptFile(path, 0).graded
    task = PromptFile(path, 0, lambda: answers)
    assert task.graded
    assert task.grade(task.example(0), response, True) == grade
    assert task.grade(task.example(0), response, False) == 0.0


@pytest.mark.thorough
def test_an_answer_that_takes_for_ever_is_not_equal_and_the_next_is_compared():
    """The process ends while it multiplies one integer, when no signal handler would run."""
    answers = MathAnswers()
    started = time.perf_counter()
    assert not answers.equal("5", "9^{9^{9^9}}")
    assert 2 < time.perf_counter() - started < 10
    assert answers.equal("5", "5.0")


def test_answers_are_compared_from_any_thread(answers):
    with ThreadPoolExecutor(6) as pool:
        found = pool.map(lambda value: answers.equal("3", str(value)), range(6))
    assert list(found) == [value == 3 for value in range(6)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12, where there are other threads
def test_a_fork_has_a_process_of_its_own(answers):
    child = os.fork()
    if child == 0:
        os._exit(0 if answers.equal("1/2", "0.5") and not answers.equal("1", "2") else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert answers.equal("1/2", "0.5")
    answers._process.kill()
    answers._process.wait()
    assert answers.equal("2", "2.0"), "it is started again"


def test_the_process_ends_with_its_owner_and_is_told_if_it_cannot_be_started(monkeypatch):
    own = MathAnswers()
    process = own._process
    del own
    assert process.returncode is not None
    monkeypatch.setattr(math_answers.sys, "executable", "/bin/true")
    assert refusal(MathAnswers) == "math-verify cannot be started: its process ends at once"
