"""``lightning-obc``: LightningCLI with ``compress``, ``search``, ``apply``, ``export``; ``report``, ``benchmark``."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, Optional

from lightning_obc.errors import OBCError

PLAIN = ("report", "benchmark")


def main(args: Optional[Sequence[str]] = None) -> Any:
    """Run the command line ``lightning-obc``, and return its parts.

    The current directory is importable, so that a ``class_path`` can name a user's own file. Errors of this package
    end the program with their message and status 1; all others keep their traceback.

    Args:
        args: The arguments; None means those of the process.

    Returns:
        The CLI object with ``model``, ``trainer`` and what the subcommand returned as ``result``; of ``report`` and
        ``benchmark`` that result alone.
    """
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)
    words = list(sys.argv[1:] if args is None else args)
    try:
        if words and words[0] in PLAIN:
            # Files are all they need: Lightning, seconds to import, stays out.
            from lightning_obc.cli.artifacts import run

            return run(words)
        from lightning_obc.cli.commands import OBCCLI

        return OBCCLI.start(None if args is None else words)
    except OBCError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def console() -> None:
    """Entry point of the console script: what it returned would become the exit status."""
    # Lightning's own use of torch, which nobody can do anything about; the process is ours.
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated")
    main()
