"""Requests between nodes: how they are signed, and how a signature is checked. Pure: the time is given.

In: the node key that all nodes of a cluster share, what a request says. Out: the ``authorization`` field, or who sent it.
Always holds: method, path, query, Range, length and every ``x-hiss-`` field are covered; a signature holds WINDOW_S seconds
around its time; it is compared in constant time. The body is not covered (its end is not known when the head is sent):
whoever sends one compares the checksum that comes back.
"""

from __future__ import annotations

import dataclasses
import hmac
import re
from collections.abc import Iterable

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

WINDOW_S = 60
SCHEME = "HISS-NODE-HMAC-SHA256"
FIELD_PREFIX = "x-hiss-"
_INFO = b"hiss requests between nodes, 1"
_FORM = re.compile(rf"{SCHEME} node=(\d{{1,9}}), epoch=(\d{{1,18}}), time=(\d{{1,12}}), signature=([0-9a-f]{{64}})")
_COVERED = ("range", "content-length", "transfer-encoding")


class BadPeerSignature(Exception):
    """The request does not come from a node of this cluster, or too late; ``str()`` says which."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sender:
    """The node that signed a request, and which of its lives it is in."""

    node: int
    epoch: int


@dataclasses.dataclass(frozen=True, slots=True)
class PeerKey:
    """What requests are signed with: derived from the node key, so that neither gives the other away."""

    secret: bytes

    @classmethod
    def derived(cls, node_key: bytes) -> PeerKey:
        """HKDF (RFC 5869) with SHA-256."""
        return cls(HKDF(SHA256(), 32, salt=None, info=_INFO).derive(node_key))

    def sign(
        self, sender: Sender, method: str, target: str, fields: Iterable[tuple[str, str]], now_s: float
    ) -> tuple[str, str]:
        """The ``authorization`` field of a request. ``target``: path and query as on the wire; ``fields``: all others, with
        lower-case names."""
        who = f"node={sender.node}, epoch={sender.epoch}, time={int(now_s)}"
        return "authorization", f"{SCHEME} {who}, signature={self._signature(who, method, target, fields)}"

    def verify(
        self, authorization: str, method: str, target: str, fields: Iterable[tuple[str, str]], now_s: float
    ) -> Sender:
        """Who signed the request. Raises BadPeerSignature."""
        form = _FORM.fullmatch(authorization)
        if form is None:
            raise BadPeerSignature("the request is not signed as one between nodes")
        node, epoch, time_s, signature = form.groups()
        who = f"node={node}, epoch={epoch}, time={time_s}"
        if not hmac.compare_digest(signature, self._signature(who, method, target, fields)):
            raise BadPeerSignature("the signature is not of this cluster's key")
        if abs(now_s - int(time_s)) > WINDOW_S:
            raise BadPeerSignature(f"the request's time is more than {WINDOW_S} seconds from this node's")
        return Sender(int(node), int(epoch))

    def _signature(self, who: str, method: str, target: str, fields: Iterable[tuple[str, str]]) -> str:
        covered = sorted(
            f"{name}:{value.strip()}" for name, value in fields if name in _COVERED or name.startswith(FIELD_PREFIX)
        )
        text = "\n".join((who, method, target, *covered))
        return hmac.digest(self.secret, text.encode("utf-8", "surrogateescape"), "sha256").hex()


def is_signed(authorization: str) -> bool:
    """Does the field claim to be of a node? (Everybody else's requests are S3.)"""
    return authorization.startswith(SCHEME)
