"""The settings table: precedence, units, computed defaults, and errors that say what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway import machine
from gateway.settings import GIB, MIB, Settings, SettingsError, human_bytes, load, table

BIG = machine.Machine(cores=64, memory_bytes=512 * GIB, disk_bytes=8 << 40)
SMALL = machine.Machine(cores=2, memory_bytes=2 * GIB, disk_bytes=GIB)


def refused(flags: dict[str, object], environ: dict[str, str] | None = None, config: Path | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load({"data_dir": "/data", **flags}, environ=environ or {}, config=config, host=BIG)
    return str(caught.value)


def test_nothing_is_needed_but_the_folder() -> None:
    settings = load({"data_dir": "/data"}, environ={}, host=BIG).settings
    assert (settings.s3_port, settings.control_port, settings.dav_port) == (9000, 9001, 9002)
    assert settings.workers == 8
    assert settings.arena_bytes == 16 * GIB
    assert settings.buffer_bytes == 1 << 40
    assert settings.segment_bytes == GIB
    assert settings.archive_dir == Path("/data/archive")


def test_a_small_machine_gets_defaults_that_fit_together() -> None:
    settings = load({"data_dir": "/data"}, environ={}, host=SMALL).settings
    assert settings.arena_bytes == 512 * MIB
    assert settings.regions_per_worker >= 4
    assert settings.buffer_bytes == GIB
    assert settings.segment_bytes * 3 * (settings.workers + 1) <= settings.buffer_bytes


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "hiss.toml"
    config.write_text('s3_port = 1\ncontrol_port = 2\ndav_port = 3\netag = "md5"\nsegment_bytes = "64 MiB"\n')
    environ = {"HISS_S3_PORT": "11", "HISS_CONTROL_PORT": "12", "HISS_ROOT_SECRET_KEY": "x", "HISS_BENCH_ROUNDS": "3"}
    loaded = load({"data_dir": "/data", "s3_port": 21, "dav_port": None}, environ=environ, config=config, host=BIG)
    settings, origins = loaded.settings, loaded.origins
    assert (settings.s3_port, settings.control_port, settings.dav_port) == (21, 12, 3)
    assert (origins["s3_port"], origins["control_port"], origins["dav_port"]) == ("flag", "environment", str(config))
    assert (origins["host"], origins["arena_bytes"]) == ("default", "computed")
    assert settings.segment_bytes == 64 * MIB


def test_a_child_process_gets_the_same_settings_without_reading_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load({"data_dir": "/data", "drain_bytes_per_s": "1.5 GB"}, environ={}, host=BIG).settings
    monkeypatch.setenv("HISS_S3_PORT", "1")
    assert Settings.of(settings.as_dict()) == settings
    assert settings.drain_bytes_per_s == 1_500_000_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"s3_port": 70000}, "s3_port = 70000 (from flag): allowed is a port from 0 to 65535"),
        ({"etag": "sha1"}, "etag = 'sha1' (from flag): allowed is checksum or md5"),
        ({"segment_bytes": "9 GiB"}, "segment_bytes = '9 GiB' (from flag): allowed is a whole number of bytes from"),
        ({"segment_bytes": "lots"}, "segment_bytes = 'lots' (from flag): allowed is"),
        ({"workrs": 2}, "workrs (from flag) is not a setting; did you mean workers?"),
        ({"tls_cert": "/proc/version"}, "tls_key is not set: tls_cert and tls_key come together"),
        ({"tls_cert": "/no", "tls_key": "/proc/version"}, "tls_cert = '/no': allowed is a file that this user"),
        ({"evict_low": 0.8}, "evict_low = 0.8: allowed is less than evict_high = 0.8"),
        ({"workers": 8, "arena_bytes": "1GiB"}, "arena_bytes = 1073741824: allowed is at least 2147483648 (2 GiB)"),
        ({"arena_region_bytes": "48MiB"}, "arena_region_bytes = 50331648: allowed is a power of two"),
        ({"s3_port": 5, "dav_port": 5}, "allowed are three different ports"),
        ({"feedback_zmq": "9003"}, "feedback_zmq = '9003': allowed is tcp://ADDRESS:PORT or ipc://PATH"),
        ({"feedback_zmq": "tcp://0.0.0.0:9003"}, "allowed without feedback_zmq_key is a loopback address"),
        ({"feedback_zmq_key": "/proc/version"}, "feedback_zmq_key and feedback_zmq_clients come together"),
        ({"feedback_targets": "BL1:SHUTTER"}, "'BL1:SHUTTER': allowed are globs that begin with epics: or tango:"),
    ],
)  # fmt: skip
def test_a_wrong_setting_names_itself_its_value_and_what_is_allowed(flags: dict[str, object], message: str) -> None:
    assert message in refused(flags)


def test_errors_name_their_source_and_come_all_at_once(tmp_path: Path) -> None:
    config = tmp_path / "hiss.toml"
    config.write_text("workers = 99\n")
    lines = refused({}, {"HISS_KERNELS": "maybe"}, config).splitlines()
    assert f"workers = 99 (from {config}): allowed is a whole number of processes from 1 to 31" in lines
    assert "kernels = 'maybe' (from environment): allowed is on or off or unconfined" in lines
    assert "s3prt (from environment) is not a setting" in refused({}, {"HISS_S3PRT": "1"})


def test_a_config_file_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    assert refused({}, config=tmp_path / "none.toml").endswith("none.toml: cannot be read: No such file or directory")
    (tmp_path / "bad.toml").write_text("s3_port = = 3")
    assert "bad.toml: is not TOML:" in refused({}, config=tmp_path / "bad.toml")


def test_every_row_has_a_unit_a_line_of_help_and_limits_where_it_is_a_number() -> None:
    for row in table():
        assert row.unit, row.name
        assert row.help.endswith("."), row.name
        words = ("path", "name", "address", "host name", "URL", "endpoint", "endpoints", "globs", "yes or no")
        if row.unit not in words:
            assert row.minimum is not None, row.name
            assert row.maximum is not None, row.name


def test_sizes_are_shown_in_the_largest_whole_unit() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1024, 64 * MIB, GIB + 1)] == [
        "0",
        "1023",
        "1 KiB",
        "64 MiB",
        "1073741825",
    ]
