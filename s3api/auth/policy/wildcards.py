"""``*`` and ``?`` as policies use them: any run of characters, any one character. Linear time, whatever the pattern.

A regular expression with many stars can take exponential time on a hostile pattern; here each literal run between stars is
searched once, leftmost first, which is right for patterns that only have stars between runs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

# What ``literally`` made, while a pattern is cut at its stars. No document may hold these characters.
_STAR, _MARK = "\x01", "\x02"


class Glob:
    """One pattern. ``matches`` is true where the whole text is described by it."""

    __slots__ = ("_first", "_last", "_middle", "_stars", "pattern")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        hidden = pattern.replace("\0*", _STAR).replace("\0?", _MARK)
        runs = re.sub(r"\*+", "*", hidden).split("*")
        self._stars = len(runs) > 1
        self._first = _anchored(runs[0])
        self._last = _anchored(runs[-1])
        self._middle = tuple(_searcher(run) for run in runs[1:-1])

    def matches(self, text: str) -> bool:
        if not self._stars:
            length, same = self._first
            return len(text) == length and same(text, 0)
        start, at_start = self._first
        end, at_end = self._last
        stop = len(text) - end
        if stop < start or not at_start(text, 0) or not at_end(text, stop):
            return False
        for find in self._middle:
            start = find(text, start, stop)
            if start < 0:
                return False
        return True


def _anchored(run: str) -> tuple[int, Callable[[str, int], bool]]:
    if "?" not in run:
        plain = _plain(run)
        return len(run), lambda text, at: text.startswith(plain, at)
    pattern = _expression(run)
    return len(run), lambda text, at: pattern.match(text, at) is not None


def _searcher(run: str) -> Callable[[str, int, int], int]:
    """Finds the run between two places; returns the place behind it, or -1."""
    if "?" not in run:
        plain = _plain(run)

        def literal(text: str, start: int, stop: int) -> int:
            found = text.find(plain, start, stop)
            return found + len(run) if found >= 0 else -1

        return literal
    pattern = _expression(run)

    def single(text: str, start: int, stop: int) -> int:
        found = pattern.search(text, start, stop)
        return found.end() if found else -1

    return single


def _expression(run: str) -> re.Pattern[str]:
    return re.compile("".join("." if char == "?" else re.escape(_plain(char)) for char in run), re.DOTALL)


def _plain(run: str) -> str:
    return run.replace(_STAR, "*").replace(_MARK, "?")


def literally(text: str) -> str:
    """Text as a pattern that matches itself alone."""
    return text.replace("*", "\0*").replace("?", "\0?")


@functools.lru_cache(maxsize=4096)
def glob(pattern: str) -> Glob:
    return Glob(pattern)
