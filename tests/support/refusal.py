"""Calls that must raise on every rank before any communication."""

import tpkernels as tpk


def assert_refused(call, kind, *words):
    """Require that the call raises before any collective is started.

    Args:
        call: a function without parameters.
        kind: the exception's type.
        words: parts of its message.
    """
    raised = None
    with tpk.log_collectives() as log:
        try:
            call()
        except Exception as error:
            raised = error
    assert type(raised) is kind, f"{raised!r}, not {kind.__name__} with {words}"
    assert not log, f"{raised!r} after {log}"
    missing = [word for word in words if word not in str(raised)]
    assert not missing, f"{raised!r} without {missing}"
