"""Choices read off a fuzzer's bytes, so that small changes of the input are small changes of the request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def empty(self) -> bool:
        return self._at >= len(self._data)

    def number(self, below: int) -> int:
        """0 once the input has ended."""
        value = self._data[self._at] if not self.empty else 0
        self._at += 1
        return value % below

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.number(min(len(choices), 256))]

    def take(self, most: int) -> bytes:
        count = self.number(most + 1)
        found = self._data[self._at : self._at + count]
        self._at += count
        return found
