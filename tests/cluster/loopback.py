"""Nodes of a cluster on this machine's loopback, for what needs no network of its own.

In: a folder, the DSN of an engine's database. Out: ``Nodes``. Always holds: they share a node key and an archive; every process
of theirs is gone after ``end``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cluster.acquaintance import know_each_other
from tests.crash.client import S3, Answer
from tests.crash.node import ROOT, Node, until

__all__ = ["LoopbackNode", "Nodes", "hiss", "until"]

_ROOT = (ROOT["HISS_ROOT_ACCESS_KEY"], ROOT["HISS_ROOT_SECRET_KEY"])
_SETTINGS = {"workers": "1", "arena_bytes": "96MiB", "shutdown_grace_s": "10"}


class LoopbackNode(Node):
    def __init__(self, folder: Path, name: str, environ: dict[str, str], **settings: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, environ, **{**_SETTINGS, "node_name": name, **settings})
        self.name = name

    def ask(
        self, method: str, path: str, query: str = "", body: bytes = b"", headers: dict[str, str] | None = None
    ) -> Answer:
        """One request on a connection of its own."""
        client = S3(self)
        try:
            return client.request(method, path, query, body, headers=headers)
        finally:
            client.close()

    def hiss(self, *arguments: str, code: int = 0) -> Any:
        """A command against this node, with --json; its document. Fails unless it ends with ``code``."""
        done = hiss(*arguments, "--data", str(self.paths.root), "--json")
        assert done.returncode == code, f"{done.returncode}: {done.stdout} {done.stderr}\n{self.tail()}"
        return json.loads(done.stdout) if done.stdout.strip() else done.stderr

    def get(self, path: str, keys: tuple[str, str] = _ROOT) -> tuple[int, Any]:
        """Of the control port."""
        import httpx

        answer = httpx.get(f"http://{self.host}:{self.port('control')}{path}", auth=keys, timeout=60)
        return answer.status_code, answer.json()

    def metric(self, name: str) -> float:
        import httpx

        text = httpx.get(f"http://{self.host}:{self.port('control')}/metrics", timeout=60).text
        return next(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"{name} "))


class Nodes:
    """``nodes.add("a")`` starts nothing; ``nodes.start("a")`` does and waits until it serves."""

    def __init__(self, folder: Path, dsn: str, **settings: str) -> None:
        self.folder = folder
        self.dsn = dsn
        self._settings = settings
        self._key = os.urandom(32)
        self._nodes: dict[str, LoopbackNode] = {}

    def __getitem__(self, name: str) -> LoopbackNode:
        return self._nodes[name]

    def add(self, name: str, environ: dict[str, str] | None = None, **settings: str) -> LoopbackNode:
        folder = self.folder / name
        shared = {"archive_dir": str(self.folder / "archive"), **self._settings, **settings}
        # The engine's address and its password are not for a command line.
        node = LoopbackNode(folder, name, {"HISS_CATALOG": self.dsn, **(environ or {})}, **shared)
        node.paths.root.mkdir(mode=0o700, exist_ok=True)
        if not node.paths.node_key.exists():
            with open(os.open(node.paths.node_key, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                file.write(self._key)
        self._nodes[name] = node
        return node

    def start(self, *names: str) -> list[LoopbackNode]:
        for name in names:
            if name not in self._nodes:
                self.add(name)
            self[name].start()
            self[name].ready()
        know_each_other([node for node in self._nodes.values() if node.running])
        return [self[name] for name in names]

    def make_bucket(self, name: str, **tags: str) -> None:
        """One with these settings (without their ``hiss.`` and with _ for -), which every node that runs knows."""
        rows = "".join(f"<Tag><Key>hiss.{key.replace('_', '-')}</Key><Value>{tags[key]}</Value></Tag>" for key in tags)
        running = [node for node in self._nodes.values() if node.running]
        assert running[0].ask("PUT", f"/{name}").ok
        assert running[0].ask("PUT", f"/{name}", "tagging=", f"<Tagging><TagSet>{rows}</TagSet></Tagging>".encode()).ok
        for node in running:
            # A listing sees everything that any node was answered before.
            assert node.ask("GET", f"/{name}", "list-type=2").ok

    def end(self) -> None:
        for node in self._nodes.values():
            node.end()


def hiss(*arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HISS_")}
    command = [sys.executable, "-m", "gateway.cli", *arguments]
    return subprocess.run(
        command, env={**clean, **(environ or {})}, capture_output=True, text=True, timeout=120, check=False
    )
