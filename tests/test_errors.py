"""What a caller adds to an error. Oracle: the same error written out."""

from __future__ import annotations

import pytest

from rorqual.errors import CheckpointError, ConfigError, RorqualError

INNER = ConfigError("is wrong", where="a.json", found="x", expected="y", fix="write y")


@pytest.mark.parametrize(
    ("outer", "same"),
    [
        (INNER.with_(), INNER),
        (
            INNER.with_(where="b", fix="ask"),
            ConfigError("is wrong", where="b", found="x", expected="y", fix="ask"),
        ),
        (
            INNER.with_(expected="z", error=CheckpointError),
            CheckpointError("is wrong", where="a.json", found="x", expected="z", fix="write y"),
        ),
    ],
)
def test_what_a_caller_knows_replaces_what_was_said(
    outer: RorqualError, same: RorqualError
) -> None:
    assert (type(outer), str(outer)) == (type(same), str(same))
