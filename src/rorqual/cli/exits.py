"""How the command ends, and the flag that shows why."""

EXIT_BAD_INPUT = 2
EXIT_SIGNAL = 128  # plus the number of the signal that ended it, as a shell reports it
EXIT_HUNG_UP = EXIT_SIGNAL + 1  # SIGHUP
EXIT_INTERRUPTED = EXIT_SIGNAL + 2  # SIGINT
EXIT_BROKEN_PIPE = EXIT_SIGNAL + 13  # SIGPIPE
EXIT_TERMINATED = EXIT_SIGNAL + 15  # SIGTERM
INTERRUPTED = "\nrorqual: interrupted"
DEBUG_FLAG = "--debug"  # may stand anywhere before a `--`
