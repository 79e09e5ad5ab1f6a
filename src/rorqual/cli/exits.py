"""How the command ends, and the flag that shows why."""

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # as a shell reports SIGINT
EXIT_BROKEN_PIPE = 141  # as a shell reports SIGPIPE
DEBUG_FLAG = "--debug"  # may stand anywhere before a `--`
