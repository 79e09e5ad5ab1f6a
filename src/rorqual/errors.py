"""Errors a user can mend: what was wrong, where, what was found and expected, how to fix it."""

from __future__ import annotations

from collections.abc import Sequence

MAX_LISTED = 20


class RorqualError(Exception):
    """Base of every error that is the input's fault; the command line prints it and exits with
    2.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.found, self.expected, self.fix = (
            what,
            where,
            found,
            expected,
            fix,
        )
        parts = [f"{where}: {what}" if where is not None else what]
        if found is not None:
            parts.append(f"  found:    {found}")
        if expected is not None:
            parts.append(f"  expected: {expected}")
        if fix is not None:
            parts.append(f"  fix:      {fix}")
        super().__init__("\n".join(parts))

    def with_(
        self,
        *,
        where: object = None,
        expected: object = None,
        fix: str | None = None,
        error: type[RorqualError] | None = None,
    ) -> RorqualError:
        """The same, and what the caller knows better; `error` is another kind for it."""
        return (error or type(self))(
            self.what,
            where=self.where if where is None else where,
            found=self.found,
            expected=self.expected if expected is None else expected,
            fix=self.fix if fix is None else fix,
        )


class ConfigError(RorqualError):
    """A configuration file or a value in it."""


class CheckpointError(RorqualError):
    """A checkpoint folder: weights, index or metadata."""


class TokenizerError(RorqualError):
    """A tokenizer file, a chat template or a conversation that it cannot render."""


class DataError(RorqualError):
    """A corpus, a token shard or its manifest."""


class TrainingError(RorqualError):
    """A training run that cannot go on: non-finite loss, a checkpoint of another recipe."""


class UsageError(RorqualError):
    """A combination of arguments that has no meaning."""


class EngineOverloaded(RorqualError):  # noqa: N818  it says what is, and the fault is nobody's
    """The engine has as many requests as it may take, or takes none any more."""


class ClientOverloaded(EngineOverloaded):
    """One client has its share of the places; others are free."""


class AnswerClosed(EngineOverloaded):
    """The engine was closed before the answer was complete."""


class EngineFailed(RorqualError):  # noqa: N818  it says what is, as EngineOverloaded does
    """The engine cannot go on: its thread ended, or step after step fails."""


def listing(items: Sequence[object]) -> str:
    """The first 20 items on a line, then how many more there are."""
    shown = ", ".join(str(item) for item in items[:MAX_LISTED])
    more = len(items) - MAX_LISTED
    return f"{shown} and {more} more" if more > 0 else shown
