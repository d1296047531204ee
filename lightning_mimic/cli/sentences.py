"""Commands end with a sentence, not with a traceback, where the input is at fault."""

import contextlib
from collections.abc import Iterator

from hydra.errors import InstantiationException
from omegaconf.errors import MissingMandatoryValue

from lightning_mimic.curation import CurationError
from lightning_mimic.ledger import LedgerError


@contextlib.contextmanager
def said(command: str) -> Iterator[None]:
    """Turns what is wrong with the input into the command's last line, with exit status 1.

    Args:
        command: Its name.
    """
    try:
        yield
    except MissingMandatoryValue as error:
        raise SystemExit(f"{command}: `{error.full_key}` is missing; `{command} --help` shows what it takes.") from None
    except InstantiationException as error:
        if not isinstance(error.__cause__, CurationError | LedgerError):
            raise
        raise SystemExit(f"{command}: {error.__cause__}") from None
    except (CurationError, LedgerError) as error:
        raise SystemExit(f"{command}: {error}") from None
