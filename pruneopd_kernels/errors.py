"""What bad input raises.

One check serves the Python functions, which promise ValueError and TypeError, and the raw operators, which promise
RuntimeError as the dispatcher does. So each error is both.
"""


class InvalidValue(ValueError, RuntimeError):  # noqa: N818 (named for what it says)
    """A shape, a device or a value that is not allowed."""


class InvalidType(TypeError, RuntimeError):  # noqa: N818
    """A dtype or a Python type that is not allowed."""
