"""Secrets are masked before a text is cut, and in each part of it."""

from __future__ import annotations

from typing import Any

import pytest

from backfire.base.masking import masked, redacted, redacted_part, secrets_in

TEXT = "write to ann@web.de or 219-09-9999 today"


@pytest.mark.parametrize("start", range(len(TEXT)))
def test_no_part_of_a_text_shows_a_part_of_a_secret(start: int) -> None:
    for end in range(start + 1, len(TEXT) + 1):
        shown = redacted_part(TEXT, start, end)
        assert not any(part in shown for part in ("n@", "@w", "web", "19-", "-0", "99"))
    assert redacted_part(TEXT, 0, len(TEXT)) == redacted(TEXT)
    assert redacted_part(TEXT, 0, 8) == "write to"


def test_of_many_secrets_no_word_is_shown_in_time_that_grows_with_the_text() -> None:
    class Counted(str):
        searches = 0

        def find(self, *args: Any) -> int:
            Counted.searches += 1
            return super().find(*args)

    every = [f"a{n}@web{n}.de or 10.{n % 200}.{n // 200}.7" for n in range(2000)]
    text = Counted(", ".join(every))
    hidden = masked(text, secrets_in(text))
    assert Counted.searches <= 1000
    shown = redacted_part(text, len(text) // 2, len(text))
    for one in (hidden, shown):
        assert not any(part in one for part in ("web1999", "a1999", "de", "10.", ".7"))
        assert one.count(" or ") > 900


def test_of_secrets_that_begin_together_the_longest_is_masked() -> None:
    text = "of 10.1.2.3@web.de or 10.1.2.3"
    assert redacted(text) == "of 10…(15 characters) or 10…(8 characters)"
