"""What the documents say about tables of the program is what the program says."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from ingest.bucket_settings import BucketSettings, parse
from ingest.counters import METRICS

ROOT = Path(__file__).parents[2]
OPERATIONS = (ROOT / "docs" / "OPERATIONS.md").read_text()


def test_the_settings_table_is_the_program_s(hiss: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    printed = hiss("settings", "--markdown")
    assert printed.returncode == 0
    assert printed.stdout.strip() in OPERATIONS, (
        "run `hiss settings --markdown` and put its table into docs/OPERATIONS.md"
    )


def test_every_metric_named_exists() -> None:
    named = set(re.findall(r"hiss_[a-z_]+", OPERATIONS))
    assert named
    assert named <= {metric.name for metric in METRICS}


def test_bucket_settings_named_exist() -> None:
    for tag, value in {
        "hiss.durability": "memory",
        "hiss.etag": "md5",
        "hiss.recall": "never",
        "hiss.drain-after-s": "1",
        "hiss.evict-after-s": "1",
        "hiss.archive-mode": "0640",
        "hiss.archive-group": "1",
        "hiss.archive-owner": "1",
    }.items():
        assert tag in OPERATIONS or tag.replace("hiss.archive", "") in OPERATIONS
        assert parse({tag: value}) != BucketSettings() or value == "0640"


def test_links_between_documents_lead_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_proxy_example_is_taken(peer: Callable[[str], str]) -> None:
    example = ROOT / "docs" / "examples" / "haproxy.cfg"
    done = subprocess.run(
        [peer("haproxy"), "-c", "-f", str(example)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
