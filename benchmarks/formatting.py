"""Numbers, sizes and cases as people write them."""

from __future__ import annotations

from typing import Any


def number(value: float, digits: int = 3) -> str:
    """Returns a number rounded to `digits` significant digits: "4.70", "12.3", "1,230".

    Example:
        >>> number(4.7), number(1234.5), number(473.2, 2)
        ('4.70', '1,230', '470')
    """
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    decimals = digits - 1 - exponent
    return f"{round(value, decimals):,.{max(0, decimals)}f}"


def seconds(value: float) -> str:
    """Returns a time in the unit that suits it: "1.20 s", "18.3 ms", "4.70 µs".

    Example:
        >>> seconds(0.0183), seconds(4.7e-6)
        ('18.3 ms', '4.70 µs')
    """
    if abs(value) >= 1:
        return f"{number(value)} s"
    if abs(value) >= 1e-3:
        return f"{number(1e3 * value)} ms"
    return f"{number(1e6 * value)} µs"


def times(value: float) -> str:
    """Returns a ratio: two decimals below 10, two significant digits from there on.

    Example:
        >>> times(1.508), times(473.2)
        ('1.51', '470')
    """
    return f"{value:.2f}" if 0.1 <= value < 9.995 else number(value, 2)


def ratio(summary: dict[str, float] | None) -> str:
    """Returns a ratio's median, 10th and 90th percentile: "470x (140-840)"; "" for None."""
    if summary is None:
        return ""
    low, high = times(summary["p10"]), times(summary["p90"])
    return f"{times(summary['median'])}x ({low}-{high})"


def size(count: int) -> str:
    """Returns a number of bytes: "4 KB", "16 MB"."""
    return f"{count >> 20} MB" if count >= 1 << 20 else f"{count >> 10} KB"


def tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count:,} tokens"


def case(params: dict[str, Any]) -> str:
    """Returns a case's parameters: "2 ranks, float32, 4 KB"."""
    words = []
    for key, value in params.items():
        if key == "bytes":
            words.append(size(value))
        elif isinstance(value, int):
            words.append(f"{value} {key}")
        else:
            words.append(value)
    return ", ".join(words)
