import itertools

import pytest
import torch

from comparison import differing
from implementations import each_of, of_one_process
from operators import example, of_op

OP = "opd_loss"
NEAR = {"rtol": 1e-5, "atol": 1e-7}


@each_of(OP, of_one_process)
@pytest.mark.parametrize("loss", ["topk_policy", "reverse_kl"])
def test_it_is_reliability_followed_by_the_loss(impl, loss):
    """Ids, drift and counts bit for bit, the rewards too; loss and gradient to rounding."""
    for packed, weight in itertools.product([False, True], [True, False]):
        arguments = example(OP, (2, 6), 300, packed=packed) | {"loss": loss}
        arguments |= {} if weight else {"weight": None}
        upstream = torch.randn(arguments["mask"].shape)
        whole = impl.run(OP, upstream, **arguments)
        scores = impl.run("reliability", **of_op("reliability", arguments))
        same = {name: whole[name] for name in scores if name != "rewards" or not weight}
        assert differing(same, {name: scores[name] for name in same}) == []
        given = {"topk_ids": whole["topk_ids"], "advantages": whole["rewards"], "weight": arguments["weight"]}
        given |= {} if weight else {"weight": scores["weight"]}
        alone = "topk_policy_loss" if loss == "topk_policy" else loss
        alone = impl.run(alone, upstream, **of_op(alone, arguments | given))
        for name in ("loss", "gradient"):
            torch.testing.assert_close(whole[name], alone[name], **NEAR)
        assert whole["gradient"].any()


@each_of(OP)
def test_acceptance_does_not_depend_on_the_metric(impl):
    arguments = example(OP, (2, 6), 300) | {"top_p": 0.5}
    by_overlap, by_mass = (impl.run(OP, **arguments | {"metric": metric}) for metric in ("overlap", "top_p"))
    assert differing({"accepted": by_overlap["accepted"]}, {"accepted": by_mass["accepted"]}) == []
    assert torch.equal(by_mass["drift"], ~by_mass["accepted"] & arguments["mask"]) and by_mass["accepted"].any()
    outside = impl.run(OP, **arguments | {"metric": "overlap", "token_ids": torch.full((2, 6), -100)})
    without = impl.run(OP, **arguments | {"metric": "overlap", "token_ids": None})
    assert not outside["accepted"].any() and not without["accepted"].any()
