"""Calls that must raise on every rank before any communication."""

import tpkernels as tpk


def refusals(calls):
    """Name -> (exception type, its message, the collectives started) of each call, for comparison by `assert_refused`."""
    seen = {}
    for name, call in calls.items():
        kind, message = "nothing", "was raised"
        with tpk.log_collectives() as log:
            try:
                call()
            except Exception as error:
                kind, message = type(error).__name__, str(error)
        seen[name] = kind, message, [c.op for c in log]
    return seen


def assert_refused(results, expected):
    """`results`: refusals() of every rank; `expected`: name -> (exception type, words of its message), the same on all of them."""
    wrong = []
    for rank, seen in enumerate(results):
        assert seen.keys() == expected.keys()
        for name, (kind, *words) in expected.items():
            raised, message, log = seen[name]
            if raised != kind.__name__ or log or any(word not in message for word in words):
                wrong.append(
                    f"rank {rank}, {name}: {raised}: {message!r}, started {log}; expected {kind.__name__} with {words}"
                )
    assert not wrong, "\n".join(wrong)
