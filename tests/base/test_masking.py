"""Secrets are masked before a text is cut, and in each part of it."""

from __future__ import annotations

import pytest

from backfire.base.masking import redacted, redacted_part

TEXT = "write to ann@web.de or 219-09-9999 today"


@pytest.mark.parametrize("start", range(len(TEXT)))
def test_no_part_of_a_text_shows_a_part_of_a_secret(start: int) -> None:
    for end in range(start + 1, len(TEXT) + 1):
        shown = redacted_part(TEXT, start, end)
        assert not any(part in shown for part in ("n@", "@w", "web", "19-", "-0", "99"))
    assert redacted_part(TEXT, 0, len(TEXT)) == redacted(TEXT)
    assert redacted_part(TEXT, 0, 8) == "write to"
