import torch

import cases
from implementations import each_of
from operators import by_position

OP = "token_stats"
run, _ = by_position(OP)


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
