"""What bad input raises.

The Python functions promise ValueError and TypeError, the raw operators RuntimeError. So each error is both.
"""


class InvalidValue(ValueError, RuntimeError):  # noqa: N818 (named for what it says)
    """A shape, a device or a value that is not allowed."""


class InvalidType(TypeError, RuntimeError):  # noqa: N818
    """A dtype or a Python type that is not allowed."""
