"""Which endpoint is read, and with which keys: what Dask workers are told, once, beside the graph.

In: the node a command speaks to. Out: ``Access``, with temporary keys that may only read the bucket (STS AssumeRole of one's own
role), or none: then a worker takes them from its environment. What always holds: the user's own secret never leaves the
command's process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import os
import re
import ssl
import time
from collections.abc import Mapping
from urllib.parse import urlencode, urlsplit

from gateway.cli.node import Node
from gateway.cli.options import SECRET_VARIABLE
from gateway.cli.output import CliError, ExitCode
from gateway.users import KeyPair

ACCOUNT = "000000000000"
VERSION = "2011-06-15"
SESSION_SECONDS = 43_200
"""The longest that AssumeRole gives."""
TIMEOUT_S = 30.0
ACCESS_VARIABLE = "HISS_ACCESS_KEY"
TOKEN_VARIABLE = "HISS_SESSION_TOKEN"


@dataclasses.dataclass(frozen=True, slots=True)
class Access:
    """``authority``: PEM of the authority that signed the endpoint's certificate. ``verified`` False: the certificate is not
    looked at (a node of the same machine). Without keys: from the environment of whoever reads."""

    endpoint: str
    region: str
    authority: str = ""
    verified: bool = True
    access_key: str = ""
    secret_key: str = dataclasses.field(default="", repr=False)
    token: str = dataclasses.field(default="", repr=False)

    def keys(self, environ: Mapping[str, str] = os.environ) -> tuple[KeyPair, str]:
        """With the session token, or nothing. Raises LookupError where the environment has none."""
        if self.access_key:
            return KeyPair(self.access_key, self.secret_key), self.token
        found = environ.get(ACCESS_VARIABLE, ""), environ.get(SECRET_VARIABLE, "")
        if not all(found):
            raise LookupError(f"{ACCESS_VARIABLE} and {SECRET_VARIABLE} are not in the environment of the Dask worker")
        return KeyPair(*found), environ.get(TOKEN_VARIABLE, "")

    def tls(self) -> ssl.SSLContext | None:
        if not self.endpoint.startswith("https:"):
            return None
        context = ssl.create_default_context(cadata=self.authority or None)
        if not self.verified:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def read_only(found: Node, bucket: str, region: str) -> tuple[str, str, str]:
    """(access key, secret key, session token) that read ``bucket`` and do nothing else, for SESSION_SECONDS. Raises CliError."""
    who = _ask(found, region, {"Action": "GetCallerIdentity"})
    allowed = {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Action": "s3:GetObject*", "Resource": f"arn:aws:s3:::{bucket}/*"},
            {"Effect": "Allow", "Action": "s3:ListBucket*", "Resource": f"arn:aws:s3:::{bucket}"},
        ],
    }
    made = _ask(
        found,
        region,
        {
            "Action": "AssumeRole",
            "RoleArn": f"arn:aws:iam::{ACCOUNT}:role/{_text(who, 'UserId')}",
            "RoleSessionName": "hiss-replay",
            "DurationSeconds": str(SESSION_SECONDS),
            "Policy": json.dumps(allowed),
        },
    )
    return _text(made, "AccessKeyId"), _text(made, "SecretAccessKey"), _text(made, "SessionToken")


def _ask(found: Node, region: str, form: Mapping[str, str]) -> str:
    import httpx

    body = urlencode({"Version": VERSION, **form}).encode()
    headers = {"host": urlsplit(found.s3_url).netloc, "content-type": "application/x-www-form-urlencoded"}
    signed = _signed(headers, body, found.keys, region)
    try:
        answer = httpx.post(
            found.s3_url + "/", content=body, headers=signed, verify=found.tls or True, timeout=TIMEOUT_S
        )
    except httpx.TransportError as error:
        raise CliError(f"{found.s3_url} does not answer: {error}", ExitCode.NO_NODE) from None
    if answer.status_code != 200:
        reason = _text(answer.text, "Message") or f"it answered {answer.status_code}"
        raise CliError(
            f"no temporary keys for the Dask workers: {reason}; give them keys in their environment and --credentials environment"
        )
    return answer.text


def _signed(headers: Mapping[str, str], body: bytes, keys: KeyPair, region: str) -> dict[str, str]:
    """Of a POST to /: SigV4 of the service ``sts``, whose payload is signed."""
    when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    signed = {**headers, "x-amz-date": when}
    names = sorted(signed)
    lines = "".join(f"{name}:{signed[name]}\n" for name in names)
    canonical = "\n".join(("POST", "/", "", lines, ";".join(names), hashlib.sha256(body).hexdigest()))
    scope = f"{when[:8]}/{region}/sts/aws4_request"
    to_sign = "\n".join(("AWS4-HMAC-SHA256", when, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    key = b"AWS4" + keys.secret_key.encode()
    for part in (when[:8], region, "sts", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    credential = f"Credential={keys.access_key}/{scope}, SignedHeaders={';'.join(names)}, Signature={signature}"
    return {**signed, "authorization": f"AWS4-HMAC-SHA256 {credential}"}


def _text(document: str, name: str) -> str:
    """Of an element without children."""
    found = re.search(f"<{name}>([^<]*)</{name}>", document)
    return found[1] if found else ""
