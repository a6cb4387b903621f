"""The exposition: sums over processes, histograms, a format that Prometheus itself accepts."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.metrics import Exposition, NodeCollector, ProcessRow, Reader
from ingest.counters import METRICS, Counters

PLAIN = "text/plain"


@pytest.fixture
def fd() -> Iterator[int]:
    made = Counters.create()
    yield made
    os.close(made)


def scrape(fd: int, *rows: ProcessRow) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(sample name, labels) -> value."""
    body, content_type = Exposition(NodeCollector(Counters(fd, 0), "1.2.3", lambda: rows)).render(PLAIN)
    assert content_type.startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_every_metric_is_there_with_help_and_type(fd: int) -> None:
    body, _ = Exposition(NodeCollector(Counters(fd, 0), "1.2.3")).render(PLAIN)
    text = body.decode()
    for metric in METRICS:
        assert f"# HELP {metric.name} {metric.help}\n" in text
        assert f"# TYPE {metric.name} {metric.kind}\n" in text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) >= {metric.name.removesuffix("_total") for metric in METRICS}
    assert families["hiss_build_info"].samples[0].labels == {"version": "1.2.3"}


def test_counters_and_gauges_of_processes_merge(fd: int) -> None:
    for slot, amount in ((0, 5.0), (3, 7.0), (39, 1.0)):
        counters = Counters(fd, slot)
        counters.cell("hiss_ingest_received_bytes_total").add(amount)
        counters.cell("hiss_arena_bytes").set(amount)
        counters.cell("hiss_buffer_capacity_bytes").set(amount)
        counters.cell("hiss_kernel_frames_total", "drop").add(amount)
    found = scrape(fd)
    assert found["hiss_ingest_received_bytes_total", ()] == 13
    assert found["hiss_arena_bytes", ()] == 13
    assert found["hiss_buffer_capacity_bytes", ()] == 7
    assert found["hiss_kernel_frames_total", (("verdict", "drop"),)] == 13
    assert found["hiss_kernel_frames_total", (("verdict", "keep"),)] == 0


def test_histograms_are_cumulative_over_processes(fd: int) -> None:
    for slot, values in ((0, [0.0001, 0.003, 0.003]), (1, [0.0005, 0.7, 1000.0])):
        histogram = Counters(fd, slot).histogram("hiss_http_request_seconds", "PutObject")
        for value in values:
            histogram.observe(value)
    found = scrape(fd)
    bounds = {
        dict(labels)["le"]: value
        for (name, labels), value in found.items()
        if name == "hiss_http_request_seconds_bucket" and ("operation", "PutObject") in labels
    }
    assert bounds["0.0005"] == 2  # a bound belongs to its bucket: le is "less or equal"
    assert bounds["0.0025"] == 2
    assert bounds["0.005"] == 4
    assert bounds["1.0"] == 5
    assert bounds["60.0"] == 5
    assert bounds["+Inf"] == 6
    put = (("operation", "PutObject"),)
    assert found["hiss_http_request_seconds_count", put] == 6
    assert found["hiss_http_request_seconds_sum", put] == pytest.approx(1000.7066)
    assert list(bounds.values()) == sorted(bounds.values())


def test_processes_are_measured_and_dead_ones_left_out(fd: int) -> None:
    rows = (ProcessRow("worker", 0, os.getpid()), ProcessRow("drain", 31, None), ProcessRow("zygote", 35, 2**22 + 1))
    found = scrape(fd, *rows)
    worker = (("role", "worker"), ("slot", "0"))
    assert found["hiss_process_resident_memory_bytes", worker] > 1e6
    assert found["hiss_process_cpu_seconds_total", worker] > 0
    assert found["hiss_process_open_fds", worker] > 2
    assert not [labels for name, labels in found if name == "hiss_process_open_fds" and labels != worker]


def test_openmetrics_is_answered_to_those_who_ask(fd: int) -> None:
    body, content_type = Exposition(NodeCollector(Counters(fd, 0), "1")).render(
        "application/openmetrics-text; version=1.0.0"
    )
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_totals_for_the_status(fd: int) -> None:
    Counters(fd, 0).cell("hiss_kernel_frames_total", "keep").add(2)
    Counters(fd, 1).cell("hiss_kernel_frames_total", "drop").add(3)
    reader = Reader(Counters(fd, 0))
    assert reader.total("hiss_kernel_frames_total") == 5
    assert reader.by_label("hiss_kernel_frames_total") == {"keep": 2, "drop": 3, "replace": 0, "unreduced": 0}
    with pytest.raises(KeyError):
        reader.value("hiss_absent")


def test_promtool_has_nothing_to_say(fd: int) -> None:
    promtool = shutil.which("promtool")
    if promtool is None and os.environ.get("CI") != "true":
        pytest.skip("promtool is not installed")
    assert promtool is not None, "promtool is not installed"
    Counters(fd, 0).histogram("hiss_flush_seconds").observe(0.01)
    body, _ = Exposition(NodeCollector(Counters(fd, 0), "1", lambda: [ProcessRow("worker", 0, os.getpid())])).render(
        PLAIN
    )
    done = subprocess.run([promtool, "check", "metrics"], input=body, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
