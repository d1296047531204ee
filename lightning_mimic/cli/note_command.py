"""The command that records a ledger, in the ledger's description."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback, LambdaCallback

from lightning_mimic.callbacks import GradMimic
from lightning_mimic.stores import hide_secrets


def note_command(program: str, words: Sequence[str]) -> Callback:
    """Return a callback that notes in the ledger which command records it, from which later ones are derived.

    Args:
        program: Name of the command.
        words: Its words; signatures of URLs are left out.
    """

    def note(trainer: Any, module: Any) -> None:
        for each in trainer.callbacks:
            if isinstance(each, GradMimic):
                each.reweighter.note({"program": program, "command": [hide_secrets(word) for word in words]})

    return LambdaCallback(on_train_start=note)
