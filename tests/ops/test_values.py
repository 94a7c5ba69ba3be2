"""Every operator on every implementation, held to its gold: outputs and gradients within their error budget."""

import comparison
import operators
from implementations import LOSSES, each


@operators.each_sample()
def test_table(op, impl, case, dtypes, variant):
    upstream, arguments = operators.sample(op, case, dtypes, variant)
    comparison.check(impl.run(op, upstream, **arguments), operators.answer_of_sample(op, case, dtypes, variant))


@each()
def test_random_calls(op, impl):
    @operators.examples(impl, arguments=operators.calls(op))
    def holds(arguments):
        operators.check(impl, op, least_size=0.0 if op in LOSSES else 1.0, **arguments)
