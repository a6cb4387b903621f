"""Cross-origin requests: a bucket's rules, the preflight answer, and the headers of an actual answer. Pure.

In: the document of PutBucketCors, and the Origin and Access-Control-Request-* headers of a browser. Out: the rules, validated
with AWS's codes, and the headers of the first rule that fits. Rules are stored as JSON of ``Rule``s (document ``cors``).
https://docs.aws.amazon.com/AmazonS3/latest/userguide/ManageCorsUsing.html, https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from __future__ import annotations

from xml.etree.ElementTree import Element

import msgspec

from ingest.bucket_documents import Form
from s3api import xml
from s3api.errors import S3Error
from s3api.http.message import Headers

RULES_MAX = 100
ID_CHARS_MAX = 255
METHODS = ("GET", "PUT", "POST", "DELETE", "HEAD")
_VARY = ("vary", "Origin, Access-Control-Request-Headers, Access-Control-Request-Method")


class Rule(msgspec.Struct, frozen=True, omit_defaults=True):
    methods: tuple[str, ...]
    origins: tuple[str, ...]
    headers: tuple[str, ...] = ()
    exposed: tuple[str, ...] = ()
    max_age_s: int | None = None
    id: str = ""


RULES: Form[tuple[Rule, ...]] = Form("cors", msgspec.json.Decoder(tuple[Rule, ...]).decode)


def parsed(body: bytes) -> tuple[Rule, ...]:
    """Rules of a CORSConfiguration. Raises BadXml, InvalidRequest."""
    tree = xml.parse(body, "CORSConfiguration")
    elements = tree.findall("CORSRule")
    if not elements:
        raise xml.BadXml("<CORSConfiguration> has no <CORSRule>")
    if len(elements) > RULES_MAX:
        raise S3Error(
            "InvalidRequest", f"The number of CORS rules should not exceed allowed limit of {RULES_MAX} rules."
        )
    return tuple(_rule(element) for element in elements)


def _rule(element: Element) -> Rule:
    methods, origins = _texts(element, "AllowedMethod"), _texts(element, "AllowedOrigin")
    headers, exposed = _texts(element, "AllowedHeader"), _texts(element, "ExposeHeader")
    if not methods or not origins:
        raise xml.BadXml("<CORSRule> needs <AllowedMethod> and <AllowedOrigin>")
    for method in methods:
        if method not in METHODS:
            raise S3Error(
                "InvalidRequest", f"Found unsupported HTTP method in CORS config. Unsupported method is {method}"
            )
    for name, pattern in (
        *(("AllowedOrigin", text) for text in origins),
        *(("AllowedHeader", text) for text in headers),
    ):
        if pattern.count("*") > 1:
            raise S3Error("InvalidRequest", f'{name} "{pattern}" can not have more than one wildcard.')
    for header in exposed:
        if "*" in header:
            raise S3Error(
                "InvalidRequest",
                f'ExposeHeader "{header}" contains wildcard. We currently do not support wildcard for ExposeHeader.',
            )
    # They are written into response headers.
    if not all(value.isascii() and value.isprintable() for value in (*origins, *headers, *exposed)):
        raise S3Error("InvalidRequest", "CORS rules take printable ASCII only")
    return Rule(methods, origins, headers, exposed, _max_age(element), _identity(element))


def _identity(element: Element) -> str:
    identity = xml.text(element, "ID", "")
    if len(identity) > ID_CHARS_MAX:
        raise S3Error("InvalidRequest", f"A rule's ID has at most {ID_CHARS_MAX} characters")
    return identity


def _texts(element: Element, name: str) -> tuple[str, ...]:
    return tuple(text for child in element.findall(name) if (text := (child.text or "").strip()))


def _max_age(element: Element) -> int | None:
    text = xml.text(element, "MaxAgeSeconds", "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise xml.BadXml("<MaxAgeSeconds> must be a number of seconds")
    return int(text)


def rendered(rules: tuple[Rule, ...]) -> bytes:
    """The CORSConfiguration document."""
    rows: list[tuple[str, xml.Value]] = []
    for rule in rules:
        row: list[tuple[str, xml.Value]] = [
            ("ID", rule.id or None),
            *(("AllowedMethod", method) for method in rule.methods),
            *(("AllowedOrigin", origin) for origin in rule.origins),
            *(("AllowedHeader", header) for header in rule.headers),
            *(("ExposeHeader", header) for header in rule.exposed),
            ("MaxAgeSeconds", rule.max_age_s),
        ]
        rows.append(("CORSRule", row))
    return xml.document("CORSConfiguration", rows)


def _fits(pattern: str, value: str) -> bool:
    head, star, tail = pattern.partition("*")
    if not star:
        return pattern == value
    return len(value) >= len(head) + len(tail) and value.startswith(head) and value.endswith(tail)


def _allowed(rule: Rule, origin: str, method: str, headers: list[str]) -> bool:
    return (
        method in rule.methods
        and any(_fits(pattern, origin) for pattern in rule.origins)
        and all(any(_fits(pattern.lower(), header) for pattern in rule.headers) for header in headers)
    )


def _answer(rule: Rule, origin: str, headers: list[str]) -> list[tuple[str, str]]:
    anybody = "*" in rule.origins
    answer = [
        ("access-control-allow-origin", "*" if anybody else origin),
        ("access-control-allow-methods", ", ".join(rule.methods)),
    ]
    if headers:
        answer.append(("access-control-allow-headers", ", ".join(headers)))
    if rule.exposed:
        answer.append(("access-control-expose-headers", ", ".join(rule.exposed)))
    if rule.max_age_s is not None:
        answer.append(("access-control-max-age", str(rule.max_age_s)))
    if not anybody:
        answer.append(("access-control-allow-credentials", "true"))
    answer.append(_VARY)
    return answer


def preflight(rules: tuple[Rule, ...] | None, headers: Headers, resource: str) -> list[tuple[str, str]]:
    """Headers of the answer to OPTIONS. ``resource``: BUCKET or OBJECT, for the refusal.

    Raises BadRequest for what is no preflight request, AccessForbidden where no rule allows it.
    """
    origin, method = headers.get("origin"), headers.get("access-control-request-method")
    if not origin:
        raise S3Error("BadRequest", "Insufficient information. Origin request header needed.")
    if method not in METHODS:
        raise S3Error("BadRequest", f"Invalid Access-Control-Request-Method: {method[:32] or 'null'}")
    fields = [("Method", method), ("ResourceType", resource)]
    if rules is None:
        raise S3Error("AccessForbidden", "CORSResponse: CORS is not enabled for this bucket.", fields=fields)
    asked = headers.get("access-control-request-headers").lower()
    wanted = [name.strip() for name in asked.split(",") if name.strip()]
    for rule in rules:
        if _allowed(rule, origin, method, wanted):
            return _answer(rule, origin, wanted)
    raise S3Error("AccessForbidden", fields=fields)


def actual(rules: tuple[Rule, ...] | None, method: str, headers: Headers) -> list[tuple[str, str]]:
    """What an answer to a request with an Origin carries beside itself; nothing where no rule allows it."""
    origin = headers.get("origin")
    # Some clients send the preflight's header with the request itself: then it names the method that counts.
    method = headers.get("access-control-request-method") or method
    for rule in rules or ():
        if _allowed(rule, origin, method, []):
            return _answer(rule, origin, [])
    return []
