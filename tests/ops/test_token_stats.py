import hypothesis.strategies as st
import torch

import cases
from implementations import each_of
from operators import by_position, examples

OP = "token_stats"
run, check = by_position(OP)
seeds = st.integers(0, 2**31)


@each_of(OP)
def test_token_ids_that_are_not_tokens(impl):
    student, teacher, _ = cases.make("random", (cases.F32, cases.F32))
    token_ids = torch.tensor([[0, -1, -100], [900, 899, 2**31 - 1]], dtype=torch.int32)
    for ids in (token_ids, token_ids.long()):
        result = run(impl, student, teacher, token_ids=ids, vocab_size=900)
        for of_token in (result.student_token_logprob, result.teacher_token_logprob):
            assert of_token.isnan().tolist() == [[False, True, True], [True, False, True]]
    far = torch.full((2, 3), 2**40 + 1)  # in range if the upper half were dropped
    assert run(impl, student, teacher, token_ids=far).student_token_logprob.isnan().all()
    assert run(impl, student, teacher).student_token_logprob.isnan().all()


@each_of(OP)
def test_exchanging_student_and_teacher(impl):
    @examples(impl, count=0.5, seed=seeds)
    def holds(seed):
        student, teacher = (torch.randn(2, 600, generator=cases.generator(seed + i)) * 4 for i in range(2))
        one, other = run(impl, student, teacher), run(impl, teacher, student)
        assert torch.equal(one.student_topk_ids, other.teacher_topk_ids)
        assert torch.equal(one.overlap, other.overlap)
        for a, b in (("reverse_kl", "forward_kl"), ("student_on_teacher_logprobs", "teacher_on_student_logprobs")):
            torch.testing.assert_close(getattr(one, a), getattr(other, b), rtol=1e-6, atol=1e-6)
