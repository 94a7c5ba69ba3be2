"""Several ranks with a part of the batch each: gradients of one process, and one response budget."""

import pytest
import torch

import data_parallel_rank


@pytest.mark.parametrize(("loss", "reduction"), [("topk_policy", "sum"), ("reverse_kl", "none")])
def test_two_ranks_have_the_gradients_of_one_process(ranks, loss, reduction):
    whole = data_parallel_rank.gradients(None, loss, reduction, is_whole=True)
    for of_rank in ranks.run(data_parallel_rank.gradients, loss, reduction, size=2):
        for one, other in zip(of_rank, whole, strict=True):
            assert other.any()
            torch.testing.assert_close(2 * one, other, rtol=1e-12, atol=1e-12)  # the mean over ranks


def test_response_budgets_sum_their_counts(ranks):
    # of each rank: hits 1 of 1 and 0 of 1; 0 of 3 and 1 of 1; nothing and 1 of 1; nothing and nothing; 0 and 0 of 1
    batches = [([400], [0]), ([0, 0, 0], [400]), ([], [400]), ([], []), ([0], [0])]
    assert ranks.run(data_parallel_rank.budgets, batches, size=2) == [[250, 250, 300, 300, 300]] * 2
