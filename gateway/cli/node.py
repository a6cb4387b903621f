"""Finding a node: its URLs and the credentials to use, from its data folder or from options and the environment.

In: ``--data`` (reads DATA/run/ports.json and the root keys; needs to be the node's user), or URLs with HISS_ACCESS_KEY and
HISS_SECRET_KEY. Out: ``Node``, with a client of the control API whose errors are ``CliError``s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.cli.options import SECRET_VARIABLE
from gateway.cli.output import CliError, ExitCode
from gateway.node_key import NodeKey
from gateway.users import KeyPair, stored_root_keys
from ingest.paths import NodePaths
from ingest.ports import Catalog

if TYPE_CHECKING:
    import httpx

_CATALOGUE_TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """Where a node answers. A URL is empty when it was neither given nor found."""

    s3_url: str
    control_url: str
    keys: KeyPair
    tls: ssl.SSLContext | None

    def control(self) -> httpx.Client:
        """A client of the control API; the caller closes it."""
        import httpx

        if not self.control_url:
            raise CliError("which node? give --data DIR of a running node, or --control URL")
        return httpx.Client(
            base_url=self.control_url,
            auth=(self.keys.access_key, self.keys.secret_key),
            verify=self.tls or True,
            timeout=httpx.Timeout(30.0, connect=5.0),
        )

    def ask(self, path: str, **params: str | int) -> Any:
        """GET a JSON document of the control API. Raises CliError."""
        return self._json("GET", path, params)

    def tell(self, path: str, **params: str | int) -> Any:
        """POST, and the JSON document that answers. Raises CliError."""
        return self._json("POST", path, params)

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """A JSON document there, if there is one, and the one that answers. Raises CliError."""
        return self._json(method, path, {}, body)

    def _json(self, method: str, path: str, params: dict[str, str | int], body: dict[str, Any] | None = None) -> Any:
        import httpx

        with self.control() as client:
            try:
                answer = client.request(method, path, params=params, json=body)
            except httpx.TransportError as error:
                raise CliError(f"{self.control_url} does not answer: {error}", ExitCode.NO_NODE) from None
        if answer.status_code in (401, 403):
            raise CliError(f"{path}: the credentials were refused; set HISS_ACCESS_KEY and {SECRET_VARIABLE}")
        try:
            document = answer.json()
        except ValueError:
            raise CliError(f"{path}: answered {answer.status_code} and no JSON; is it a control port?") from None
        if answer.status_code >= 400:
            detail = document.get("detail", document) if isinstance(document, dict) else document
            raise CliError(f"{path}: answered {answer.status_code}: {detail}")
        return document


def find(data: Path | None, *, control: str = "", endpoint: str = "", access_key: str = "", ca: Path | None) -> Node:
    """The node that the options mean; raises CliError when they do not say enough."""
    secret = os.environ.get(SECRET_VARIABLE, "")
    tls = None
    if ca is not None:
        try:
            tls = ssl.create_default_context(cafile=str(ca))
        except (OSError, ssl.SSLError) as error:
            raise CliError(f"--ca {ca}: is no PEM file of certificates ({error})") from None
    s3_url, control_url = endpoint, control
    if data is not None:
        ports = running(data)
        scheme = "https" if ports["tls"] else "http"
        host = _reachable(ports["host"])
        s3_url = s3_url or f"{scheme}://{host}:{ports['s3']}"
        control_url = control_url or f"{scheme}://{host}:{ports['control']}"
        if ports["tls"] and tls is None:
            # Its own folder named the port and the host is this one: the certificate's name need not fit.
            tls = ssl.create_default_context()
            tls.check_hostname = False
            tls.verify_mode = ssl.CERT_NONE
    if access_key and secret:
        keys = KeyPair(access_key, secret)
    elif access_key or secret:
        raise CliError(f"credentials need both: --access-key (or HISS_ACCESS_KEY) and {SECRET_VARIABLE}")
    elif data is not None:
        keys = root_keys(data)
    else:
        raise CliError(f"no credentials: give --data DIR, or set HISS_ACCESS_KEY and {SECRET_VARIABLE}")
    return Node(s3_url.rstrip("/"), control_url.rstrip("/"), keys, tls)


def running(data: Path) -> dict[str, Any]:
    """DATA/run/ports.json; raises CliError when no node runs there."""
    path = paths_of(data).ports
    try:
        ports = dict(json.loads(path.read_bytes()))
        os.kill(int(ports["pid"]), 0)
        return ports
    except PermissionError as error:
        if error.filename is None:  # it runs, as somebody else
            return ports
        raise CliError(f"{path}: may not be read by this user") from None
    except (OSError, ValueError, KeyError):
        raise CliError(f"no node runs on {data}; start one with `hiss serve --data {data}`", ExitCode.NO_NODE) from None


def root_keys(data: Path) -> KeyPair:
    """The root pair of a data folder; raises CliError when it was never started."""
    paths = paths_of(data)
    if not paths.credentials.exists():
        raise CliError(f"{data} has no root keys: it was never started", ExitCode.NO_NODE)
    keys = stored_root_keys(paths, NodeKey.load(paths.node_key))
    assert keys is not None
    return keys


@contextlib.asynccontextmanager
async def catalogue(paths: NodePaths) -> AsyncIterator[Catalog]:
    """The catalogue of the node that runs on ``paths.root``, over its socket."""
    running(paths.root)
    from ingest.catalog.client import CatalogClient

    async with CatalogClient(paths, timeout_s=_CATALOGUE_TIMEOUT_S) as catalog:
        yield catalog


def paths_of(data: Path) -> NodePaths:
    """The names in a data folder as the node itself uses them."""
    return NodePaths(data.absolute())


def _reachable(host: str) -> str:
    """An address to call a listener by: a wildcard listens on this host, too."""
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    return {"::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
