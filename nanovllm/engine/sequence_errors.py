"""Errors that end one sequence alone: of its finish rules, its pooler, its text."""

from nanovllm.engine.sequence import Sequence
from nanovllm.errors import describe, is_fault


def note_error(seq: Sequence, error: BaseException) -> None:
    """Let `seq` end with "abort" because of `error`, or have ended so; Ctrl-C goes on.

    What the error's traceback refers to is not kept.
    """
    if not is_fault(error):
        raise error
    if seq.error is None:
        seq.error = error
        for name in ("__traceback__", "__cause__", "__context__"):
            BaseException.__setattr__(error, name, None)  # its class may forbid it
        seq.stop_reason = describe(error)
        if seq.is_finished:
            seq.finish_reason = "abort"


def tell_rules(seq: Sequence, token_id: int) -> None:
    """Give the newest token to the finish rules; what one raises ends this sequence alone."""
    try:
        for rule in seq.finish_rules:
            ending = rule.on_token(token_id)
            if ending is not None and (seq.ending is None or seq.ending[1] is None):
                seq.ending = ending
    except BaseException as error:
        note_error(seq, error)
