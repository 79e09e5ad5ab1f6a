"""The entry point: it imports nothing heavy, so that Ctrl-C while modules load is told too."""

from __future__ import annotations

import sys

from rorqual.cli.exits import DEBUG_FLAG, EXIT_INTERRUPTED, INTERRUPTED


def main() -> None:
    """Runs the command that `sys.argv` names; ends with SystemExit."""
    try:
        from rorqual.cli.verbs import run

        run()
    except KeyboardInterrupt:
        if DEBUG_FLAG in sys.argv:
            raise
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
