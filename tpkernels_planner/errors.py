"""PlanError, and the checks of arguments that raise it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class PlanError(ValueError):
    """A request that cannot be planned. The message names the argument and what would do.

    Example:
        >>> from tpkernels_planner import plan
        >>> plan("llama-7b", gpus=0, global_batch=8)
        Traceback (most recent call last):
        ...
        tpkernels_planner.errors.PlanError: gpus must be a whole number of at least 1, got 0
    """


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """Check that `value` is a whole number of at least `least`.

    Raises:
        PlanError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PlanError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def unknown_name(kind: str, name: str, known: Iterable[str]) -> PlanError:
    """Make the error for a name that is not known; it lists the known names that look like it."""
    known = sorted(known)
    close = difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.4)
    hint = f"near it: {', '.join(close)}" if close else f"known: {', '.join(known)}"
    return PlanError(f"no {kind} is named {name!r}; {hint}")
