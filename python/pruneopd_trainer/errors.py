"""What a user can put right."""

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 1


class TrainerError(Exception):
    """Its text is one sentence: what is wrong, with which argument or file, and what was found there."""


def shown(value: Any) -> str:
    """Return a value as an error quotes it: shortened, because a file may hold anything."""
    return _SHORT.repr(value)


def reason(error: Exception) -> str:
    """Return the first line of what a library says is wrong."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip()
    line = (text or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else line[:197] + "..."
