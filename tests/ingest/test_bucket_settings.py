"""Bucket settings: which values of a tag are one, and which are refused."""

from __future__ import annotations

import pytest

from ingest import bucket_settings
from ingest.bucket_settings import BadSetting


@pytest.mark.parametrize("value", ["-1", "+1", " 1", "1_000", "1.0", "0x1", "nan", "", "\u0663", "\u00b2", "9" * 200])
def test_a_number_is_plain_decimal_digits(value: str) -> None:
    with pytest.raises(BadSetting, match="allowed is a whole number from 0 to"):
        bucket_settings.parse({"hiss.drain-after-s": value})


@pytest.mark.parametrize("value", ["0o640", "-640", "6_40", "648", "7777", ""])
def test_a_mode_is_plain_octal_digits(value: str) -> None:
    with pytest.raises(BadSetting, match="octal mode from 0400 to 0777"):
        bucket_settings.parse({"hiss.archive-mode": value})


def test_numbers_within_their_limits() -> None:
    settings = bucket_settings.parse({"hiss.drain-after-s": "3600", "hiss.archive-mode": "0750"})
    assert (settings.drain_after_s, settings.archive_mode) == (3600, 0o750)
