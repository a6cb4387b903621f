"""XML documents of the S3 API: a strict little reader for what clients send, a writer for what they get.

Reading goes through defusedxml (no DTD, no entities, no external references) and is bounded in bytes by the caller, in
elements and depth here; namespaces are dropped, since clients send Complete and Delete documents with and without.
Writing takes nested (name, value) pairs and always yields well-formed UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
ELEMENTS_MAX = 100_000
DEPTH_MAX = 8

Value: TypeAlias = "str | int | bool | Sequence[tuple[str, Value]] | None"

# Characters below U+0020 cannot appear literally in XML 1.0 and a bare CR would be normalised away: write references,
# as AWS does. Clients that must survive such keys ask for encoding-type=url.
_ESCAPES = {code: f"&#x{code:X};" for code in range(0x20) if code not in (0x09, 0x0A)}
_ESCAPES |= {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;", ord('"'): "&quot;", 0x7F: "&#x7F;"}
_ESCAPES |= {code: f"&#x{code:X};" for code in (0xFFFE, 0xFFFF)}
_ESCAPED = re.compile("[" + re.escape("".join(map(chr, _ESCAPES))) + "]")


class BadXml(ValueError):
    """The document is not well-formed, too deep, too large or not the one expected."""


def escape(text: str) -> str:
    # Most texts have nothing to escape, and to see that is ten times faster than to translate them.
    return text.translate(_ESCAPES) if _ESCAPED.search(text) else text


def document(name: str, children: Sequence[tuple[str, Value]], *, namespace: str = NAMESPACE) -> bytes:
    """A whole document. Values: text, numbers, booleans as ``true``/``false``, nested pairs; None leaves the element
    out."""
    out = ['<?xml version="1.0" encoding="UTF-8"?>\n<', name]
    if namespace:
        out.append(f' xmlns="{namespace}"')
    out.append(">")
    _write(children, out)
    out.append(f"</{name}>")
    return "".join(out).encode("utf-8", "surrogatepass")


def _write(children: Sequence[tuple[str, Value]], out: list[str]) -> None:
    for name, value in children:
        if value is None:
            continue
        out.append(f"<{name}>")
        if isinstance(value, str):
            out.append(escape(value))
        elif isinstance(value, bool):
            out.append("true" if value else "false")
        elif isinstance(value, int):
            out.append(str(value))
        else:
            _write(value, out)
        out.append(f"</{name}>")


def parse(body: bytes, root: str) -> Element:
    """The root element of a client's document, namespaces removed from every tag. Raises BadXml."""
    try:
        tree = fromstring(body, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError, LookupError) as error:
        raise BadXml(f"not well-formed: {error}") from None
    _strip(tree)
    if tree.tag != root:
        raise BadXml(f"expected <{root}>, not <{tree.tag}>")
    return tree


def _strip(tree: Element) -> None:
    seen = 0
    level: list[Element] = [tree]
    for _ in range(DEPTH_MAX):
        below: list[Element] = []
        for element in level:
            element.tag = element.tag.rpartition("}")[2]
            below.extend(element)
        seen += len(level)
        if seen > ELEMENTS_MAX:
            raise BadXml(f"more than {ELEMENTS_MAX} elements")
        if not below:
            return
        level = below
    raise BadXml(f"nested deeper than {DEPTH_MAX} elements")


def text(element: Element, name: str, default: str | None = None) -> str:
    """Text of a child element; BadXml when it is missing and there is no default. Blanks around it are the client's
    layout unless it is a key, which ``raw_text`` reads."""
    return raw_text(element, name, default).strip()


def raw_text(element: Element, name: str, default: str | None = None) -> str:
    child = element.find(name)
    if child is None:
        if default is None:
            raise BadXml(f"<{element.tag}> lacks <{name}>")
        return default
    return child.text or ""
