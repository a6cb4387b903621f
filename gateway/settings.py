"""The settings of a node: one table with units, defaults, limits and one line of help each.

In: flags, ``HISS_*`` environment variables, a TOML file (in this order of precedence), and for the defaults that depend
on the machine its memory, cores and disk. Out: ``Settings`` with every value decided, and where each came from. A wrong
setting raises ``SettingsError``, which names it, its value and what is allowed; unknown settings are refused.

Sizes may be written ``1073741824`` or ``"1 GiB"``. Secrets are not settings: see gateway/users.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import re
import socket
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from gateway import machine
from ingest.action_settings import TARGET_SCHEMES

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
ENV_PREFIX = "HISS_"
ENV_OTHERS = frozenset(
    {
        "HISS_CONFIG",
        "HISS_DATA",
        "HISS_ROOT_ACCESS_KEY",
        "HISS_ROOT_SECRET_KEY",
        "HISS_CRASHPOINT",
        "HISS_CRASHPOINT_ONCE",
    }
    | {"HISS_ENDPOINT", "HISS_ACCESS_KEY", "HISS_SECRET_KEY", "HISS_CONTROL"}
)
"""Environment variables of that prefix that are not settings; so are all that start with HISS_TEST_ or HISS_BENCH_."""
REGIONS_PER_WORKER_MIN = 4


class SettingsError(ValueError):
    """``str()`` has one line for each wrong setting: its name, its value, where it came from, what is allowed."""


def _size(value: object) -> object:
    """``"64 MiB"`` -> 67108864; anything that is no such string is left to the integer check."""
    units = {"": 1, "B": 1, "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": TIB, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    units["TB"] = 10**12
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)):
        unit = units.get(match[2].upper())
        if unit is not None:
            return int(match[1]) * unit if "." not in match[1] else round(float(match[1]) * unit)
    return value


def _words(value: object) -> object:
    """A TOML list of words is the same as one string with spaces."""
    if isinstance(value, list) and all(isinstance(word, str) and " " not in word for word in value):
        return " ".join(value)
    return value


Words = Annotated[str, BeforeValidator(_words)]
Size = Annotated[int, BeforeValidator(_size)]
Absolute = Annotated[Path, AfterValidator(Path.absolute)]


def _setting(
    default: Any, unit: str, text: str, *, low: float | None = None, high: float | None = None, computed: str = ""
) -> Any:
    """One row of the table. ``computed`` says in words how a default of None is decided on this machine."""
    return Field(default, ge=low, le=high, description=text, json_schema_extra={"unit": unit, "computed": computed})


class Settings(BaseSettings):
    """The table. Made by ``load``; a child process gets it from ``Settings.of(boot.settings)``."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, validate_default=False)

    data_dir: Absolute = _setting(
        None, "path", "Folder of the node: catalogue, journal, segments, archive (flag --data)."
    )
    host: str = _setting("0.0.0.0", "address", "Address that all three ports listen on.")
    s3_port: int = _setting(9000, "port", "S3; 0 picks a free port, named in DATA/run/ports.json.", low=0, high=65535)
    control_port: int = _setting(
        9001, "port", "Control API, console, /metrics, feedback; 0 as above.", low=0, high=65535
    )
    dav_port: int = _setting(9002, "port", "WebDAV; 0 as above.", low=0, high=65535)
    tls_cert: Absolute | None = _setting(None, "path", "PEM certificate chain for all three ports; needs tls_key.")
    tls_key: Absolute | None = _setting(None, "path", "PEM private key; needs tls_cert.")
    domain: str = _setting("", "host name", "Serve buckets as BUCKET.domain too (virtual-host style).")
    region: str = _setting("us-east-1", "name", "S3 region the node answers as; signatures name it.")
    any_region: bool = _setting(
        False, "yes or no", "Take signatures that name another region, not only the node's (then: which one is right)."
    )
    allow_sigv2: bool = _setting(True, "yes or no", "Take requests signed with Signature Version 2 (HMAC-SHA1).")
    object_ownership: Literal["BucketOwnerEnforced", "BucketOwnerPreferred", "ObjectWriter"] = _setting(
        "BucketOwnerEnforced",
        "name",
        "Ownership of buckets that do not say: BucketOwnerEnforced switches access control lists off, as on AWS.",
    )
    block_public_access: bool = _setting(
        False, "yes or no", "Block public policies and lists in every bucket, whatever the bucket says."
    )

    catalog: str = _setting(
        "", "URL", "Engine of a cluster; empty: this node is alone. "
        "HISS_CATALOG or a file keep the password from the command line; PGPASSWORD works, too.",
    )  # fmt: skip
    node_name: str = _setting(None, "name", "What the node is called in its cluster.", computed="host name")
    failure_domain: str = _setting(
        "", "name", "What is likely to fail together with this node (rack, power feed): second copies go elsewhere."
    )
    advertise: str = _setting(
        "", "address", "Address or host name where other nodes reach this one; empty: host, or the host name."
    )

    workers: int = _setting(
        None, "processes", "Worker processes.", low=1, high=31, computed="cores, at most 8, as memory allows"
    )
    arena_region_bytes: Size = _setting(64 * MIB, "bytes", "One shared-memory region.", low=16 * MIB, high=256 * MIB)
    arena_bytes: Size = _setting(
        None, "bytes", "Shared memory for bodies, all workers together; at least 4 regions a worker.",
        low=64 * MIB, high=TIB, computed="1/8 of memory, from 512 MiB to 16 GiB",
    )  # fmt: skip
    buffer_bytes: Size = _setting(
        None, "bytes", "Disk space for segments.", low=GIB, high=1024 * TIB,
        computed="half of the free space of DATA, from 1 GiB to 1 TiB",
    )  # fmt: skip
    segment_bytes: Size = _setting(
        None, "bytes", "One segment file.", low=16 * MIB, high=4 * GIB,
        computed="1 GiB, less where the buffer is small",
    )  # fmt: skip
    ingest_bytes_per_s: Size = _setting(
        0, "bytes/s", "What the node takes in, at most: reservations share it out; 0: not known, any rate may be reserved.",
        low=0, high=TIB,
    )  # fmt: skip
    etag: Literal["checksum", "md5"] = _setting(
        "checksum", "name", "ETag of buckets that do not say: derived from CRC64NVME, or MD5."
    )
    max_object_bytes: Size = _setting(5 * TIB, "bytes", "Largest object in one PUT.", low=MIB, high=50 * TIB)
    max_connections: int = _setting(8192, "connections", "Open connections of one worker.", low=8, high=65536)
    head_timeout_s: float = _setting(20.0, "s", "Longest time a request head may take.", low=0.1, high=600)
    body_idle_timeout_s: float = _setting(60.0, "s", "Longest silence inside a body.", low=0.1, high=3600)
    body_rate_bytes_per_s: int = _setting(
        500, "bytes/s", "Slowest pace of a body, on average over each body_idle_timeout_s.", low=1, high=GIB
    )
    keepalive_timeout_s: float = _setting(120.0, "s", "Longest idle time between requests.", low=0.1, high=3600)

    archive_dir: Absolute = _setting(None, "path", "Root of the POSIX archive.", computed="DATA/archive")
    drain_parallel: int = _setting(4, "objects", "Objects drained or recalled at a time.", low=1, high=64)
    drain_bytes_per_s: Size = _setting(
        0, "bytes/s", "Most the drain reads and writes; 0 is unlimited.", low=0, high=TIB
    )
    recall_timeout_s: float = _setting(30.0, "s", "Longest a GET waits for a recall.", low=0.1, high=3600)
    evict_high: float = _setting(
        0.80, "fraction", "Fill of the buffer above which archived copies go.", low=0.05, high=1
    )
    evict_low: float = _setting(0.60, "fraction", "Fill of the buffer at which eviction stops.", low=0, high=0.99)

    kernels: Literal["on", "off", "unconfined"] = _setting(
        "on", "name", "Whether kernels run: on only where the machine can confine them, unconfined wherever it is."
    )
    kernel_batch_timeout_s: float = _setting(
        10.0, "s", "CPU time that one batch of frames may take.", low=0.1, high=600
    )
    kernel_cores: int = _setting(
        None, "cores", "Cores that kernels may count on beside a reserved stream (hiss.kernel-admission).", low=1,
        high=4096, computed="all of this machine's",
    )  # fmt: skip
    kernel_memory_bytes: Size = _setting(2 * GIB, "bytes", "Memory limit of one sandbox.", low=256 * MIB, high=TIB)

    feedback_zmq: str = _setting(
        "", "endpoint", "Publish all kernel feedback there, e.g. tcp://127.0.0.1:9003; empty: off. Anybody who "
        "reaches it reads it: an address that is not loopback needs feedback_zmq_key.",
    )  # fmt: skip
    feedback_zmq_key: Absolute | None = _setting(
        None, "path", "CURVE secret certificate of the publisher (pyzmq's *.key_secret); needs feedback_zmq_clients."
    )
    feedback_zmq_clients: Absolute | None = _setting(
        None, "path", "Folder of CURVE public certificates (*.key) of those who may subscribe."
    )
    feedback_targets: Words = _setting(
        "", "globs", "Where named actions may write, e.g. epics:BL1:SHUTTER* tango:p11/shutter/*; empty: nowhere.",
    )  # fmt: skip

    users_file: Absolute | None = _setting(None, "path", "users.toml, read at start and on SIGHUP (flag --users).")
    start_timeout_s: float = _setting(120.0, "s", "Longest a process may take until it is ready.", low=1, high=86400)
    restart_delay_max_s: float = _setting(
        10.0, "s", "Longest wait before a process that keeps dying is started again.", low=0.1, high=3600
    )
    shutdown_grace_s: float = _setting(
        30.0, "s", "Time each stage of a shutdown has before SIGKILL.", low=0.1, high=3600
    )
    notification_endpoints: Words = _setting(
        "", "endpoints", "Webhooks that buckets may report to, as NAME=URL: arn:hiss:sqs:::NAME; empty: none.",
    )  # fmt: skip
    lifecycle_day_s: int = _setting(
        86400, "s", "Length of a day of lifecycle rules and restores; shorter ones are for tests.", low=1, high=86400
    )
    lifecycle_scan_s: float = _setting(
        3600.0,
        "s",
        "Pause between two passes of lifecycle rules over the buckets that have some.",
        low=0.05,
        high=86400,
    )
    virtual_clock: Literal["off", "on"] = _setting(
        "off", "name", "For tests of lifecycle rules and object lock: DATA/run/clock moves the node's time."
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "name", "Least level that is logged.")
    log_format: Literal["text", "json"] = _setting("text", "name", "Shape of a log line.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # ``load`` merges the sources, so that it can say where a value came from; a child process must not read any.
        return (init_settings,)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Decided settings as they came through ``Boot.settings`` (``as_dict`` of the supervisor's)."""
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for msgpack and JSON."""
        return self.model_dump(mode="json")

    def shown(self) -> dict[str, Any]:
        """The same without passwords."""
        values = self.as_dict()
        values["catalog"] = re.sub(r"(://[^:/@]*:)[^@]*@", r"\1***@", self.catalog)
        return values

    @property
    def advertised(self) -> str:
        """Where other nodes reach this one, as a URL writes it."""
        address = self.advertise or (self.host if self.host not in ("0.0.0.0", "::", "") else self.node_name)
        return f"[{address}]" if ":" in address and not address.startswith("[") else address

    @property
    def regions_per_worker(self) -> int:
        return self.arena_bytes // self.workers // self.arena_region_bytes

    @property
    def feedback_target_globs(self) -> tuple[str, ...]:
        return tuple(self.feedback_targets.split())

    @property
    def feedback_schemes(self) -> tuple[str, ...]:
        """Protocols that some target may have: each has a process of its own."""
        globs = self.feedback_target_globs
        return tuple(scheme for scheme in TARGET_SCHEMES if any(glob.startswith(f"{scheme}:") for glob in globs))

    @property
    def notification_urls(self) -> dict[str, str]:
        """Endpoint -> URL."""
        return dict(word.split("=", 1) for word in self.notification_endpoints.split())

    @property
    def tls(self) -> bool:
        return self.tls_cert is not None


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A line of ``hiss settings`` and of the table in the documentation."""

    name: str
    unit: str
    default: str
    minimum: float | None
    maximum: float | None
    allowed: str
    help: str


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """``origins``: name -> ``flag``, ``environment``, the file's name, ``default`` or ``computed``."""

    settings: Settings
    origins: dict[str, str]


def table() -> list[Row]:
    """Every setting, in the order of the class."""
    return [_row(name, info) for name, info in Settings.model_fields.items()]


def human_bytes(count: float) -> str:
    """``67108864`` -> ``64 MiB``; numbers that are no whole unit stay exact."""
    for size, unit in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= size and count % size == 0:
            return f"{int(count // size)} {unit}"
    return str(int(count))


def load(
    flags: Mapping[str, Any],
    *,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
    host: machine.Machine | None = None,
) -> Loaded:
    """Merge the sources and decide every default. ``flags`` whose value is None were not given.

    Raises SettingsError. ``environ`` and ``host`` default to this process's environment and this machine.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    given = {name: value for name, value in flags.items() if value is not None}
    for origin, source in (
        (str(config), _from_file(config)),
        ("environment", _from_environment(os.environ if environ is None else environ)),
        ("flag", given),
    ):
        values.update(source)
        origins.update(dict.fromkeys(source, origin))
    _refuse_unknown(values, origins)
    if "data_dir" not in values:
        raise SettingsError("data_dir is not set: give the node's folder with --data DIR or HISS_DATA_DIR")
    _check(values, origins)
    for name, value in _computed(values, host or machine.this_machine(Path(values["data_dir"]))).items():
        values[name] = value
        origins[name] = "computed"
    settings = _check(values, origins)
    _check_relations(settings)
    return Loaded(settings, {name: origins.get(name, "default") for name in Settings.model_fields})


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: is not TOML: {error}") from None


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    return {
        name[len(ENV_PREFIX) :].lower(): value
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX) and name not in ENV_OTHERS and not name.startswith(("HISS_TEST_", "HISS_BENCH_"))
    }


def _refuse_unknown(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    known = list(Settings.model_fields)
    lines = []
    for name in values:
        if name not in Settings.model_fields:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else "`hiss settings` lists them all"
            lines.append(f"{name} (from {origins[name]}) is not a setting; {hint}")
    if lines:
        raise SettingsError("\n".join(lines))


def _check(values: Mapping[str, Any], origins: Mapping[str, str]) -> Settings:
    """Validate what is given so far; settings still to be computed are allowed to be missing."""
    try:
        return Settings(**values)
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            name = str(detail["loc"][0])
            row = _row(name, Settings.model_fields[name])
            origin = origins.get(name, "default")
            value = values.get(name, detail["input"])
            lines.append(f"{name} = {value!r} (from {origin}): allowed is {row.allowed}")
        raise SettingsError("\n".join(dict.fromkeys(lines))) from None


def _computed(values: Mapping[str, Any], host: machine.Machine) -> dict[str, Any]:
    """Defaults that depend on the machine, for those not given."""
    given = Settings(**values)
    computed: dict[str, Any] = {}

    def decide(name: str, value: Callable[[], Any]) -> Any:
        if name in values:
            return getattr(given, name)
        computed[name] = value()
        return computed[name]

    region_bytes = given.arena_region_bytes
    least = REGIONS_PER_WORKER_MIN * region_bytes
    workers = decide("workers", lambda: max(1, min(host.cores, 8, host.memory_bytes // 4 // least)))
    decide("kernel_cores", lambda: host.cores)
    wanted = min(max(host.memory_bytes // 8, 512 * MIB), 16 * GIB)
    # Whole regions, the same number for each worker: what is handed out is what the setting says.
    decide(
        "arena_bytes", lambda: max(wanted // workers // region_bytes, REGIONS_PER_WORKER_MIN) * region_bytes * workers
    )
    buffer = decide("buffer_bytes", lambda: min(max(host.disk_bytes // 2 // MIB * MIB, GIB), TIB))
    # Every slot (workers and drain) keeps three lifetime classes open and wants as many again to go on to.
    share = max(buffer // (6 * (workers + 1)), 16 * MIB)
    decide("segment_bytes", lambda: min(1 << (share.bit_length() - 1), GIB))
    decide("node_name", socket.gethostname)
    decide("archive_dir", lambda: given.data_dir / "archive")
    return computed


def _check_relations(settings: Settings) -> None:
    """Limits that concern two settings at once."""
    wrong = [*_wrong_files(settings), *_wrong_sizes(settings), *_wrong_feedback(settings), *_wrong_endpoints(settings)]
    wrong += _wrong_cluster(settings)
    ports = [port for port in (settings.s3_port, settings.control_port, settings.dav_port) if port]
    if len(set(ports)) != len(ports):
        wrong.append(f"s3_port, control_port, dav_port = {ports}: allowed are three different ports")
    if wrong:
        raise SettingsError("\n".join(wrong))


def _wrong_files(settings: Settings) -> Iterator[str]:
    if (settings.tls_cert is None) != (settings.tls_key is None):
        missing = "tls_key" if settings.tls_key is None else "tls_cert"
        yield f"{missing} is not set: tls_cert and tls_key come together"
    for name in ("tls_cert", "tls_key", "users_file"):
        path = getattr(settings, name)
        if path is not None and not os.access(path, os.R_OK):
            yield f"{name} = {str(path)!r}: allowed is a file that this user can read"


def _wrong_feedback(settings: Settings) -> Iterator[str]:
    endpoint = settings.feedback_zmq
    if endpoint and not re.fullmatch(r"tcp://(\[[0-9A-Fa-f:]+\]|[0-9A-Za-z.*-]+):([0-9]{1,5}|\*)|ipc://.+", endpoint):
        yield f"feedback_zmq = {endpoint!r}: allowed is tcp://ADDRESS:PORT or ipc://PATH"
    loopback = endpoint.startswith(("tcp://127.", "tcp://[::1]:", "tcp://localhost:", "ipc://"))
    if endpoint and not loopback and settings.feedback_zmq_key is None:
        yield (
            f"feedback_zmq = {endpoint!r}: allowed without feedback_zmq_key is a loopback address: whoever reaches it "
            "reads the feedback of every bucket"
        )
    if (settings.feedback_zmq_key is None) != (settings.feedback_zmq_clients is None):
        yield "feedback_zmq_key and feedback_zmq_clients come together: who publishes, and who may subscribe"
    for name in ("feedback_zmq_key", "feedback_zmq_clients"):
        path = getattr(settings, name)
        if path is not None and not os.access(path, os.R_OK):
            yield f"{name} = {str(path)!r}: allowed is what this user can read"
    for scheme, package in (("epics", "p4p"), ("tango", "tango")):
        if scheme in settings.feedback_schemes and importlib.util.find_spec(package) is None:
            yield f"feedback_targets names {scheme}: targets; install hiss-gateway[{scheme}] for them"
    for glob in settings.feedback_target_globs:
        if not glob.startswith(tuple(f"{scheme}:" for scheme in TARGET_SCHEMES)):
            yield f"feedback_targets = {glob!r}: allowed are globs that begin with epics: or tango:"


def _wrong_cluster(settings: Settings) -> Iterator[str]:
    if settings.catalog and not settings.catalog.startswith(("postgresql://", "postgres://")):
        yield "catalog: allowed is postgresql://USER:PASSWORD@HOST:PORT/DATABASE, or nothing for a node alone"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", settings.node_name):
        yield f"node_name = {settings.node_name!r}: allowed are 1 to 63 letters, digits and ._-, a letter or digit first"
    for name in ("advertise", "failure_domain"):
        if not re.fullmatch(r"[A-Za-z0-9.:_\[\]-]{0,255}", getattr(settings, name)):
            yield f"{name} = {getattr(settings, name)!r}: allowed are letters, digits and .:_-"


def _wrong_endpoints(settings: Settings) -> Iterator[str]:
    for word in settings.notification_endpoints.split():
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,80}=https?://[^/@\s]+(/\S*)?", word):
            yield f"notification_endpoints = {word!r}: allowed is NAME=http://… or NAME=https://…, without a user in the URL"


def _wrong_sizes(settings: Settings) -> Iterator[str]:
    workers, region_bytes, segment_bytes = settings.workers, settings.arena_region_bytes, settings.segment_bytes
    if region_bytes & (region_bytes - 1):
        yield f"arena_region_bytes = {region_bytes}: allowed is a power of two"
    if settings.regions_per_worker < REGIONS_PER_WORKER_MIN:
        least = REGIONS_PER_WORKER_MIN * workers * region_bytes
        yield (
            f"arena_bytes = {settings.arena_bytes}: allowed is at least {least} ({human_bytes(least)}) for "
            f"{workers} workers with regions of {human_bytes(region_bytes)}"
        )
    if segment_bytes % MIB:
        yield f"segment_bytes = {segment_bytes}: allowed is a whole number of MiB"
    if segment_bytes * 3 * (workers + 1) > settings.buffer_bytes:
        most = human_bytes(settings.buffer_bytes // (3 * (workers + 1)) // MIB * MIB)
        yield (
            f"segment_bytes = {segment_bytes}: allowed is at most {most} with buffer_bytes = "
            f"{settings.buffer_bytes} and {workers} workers (three open segments each, three for the drain)"
        )
    if not settings.evict_low < settings.evict_high:
        yield f"evict_low = {settings.evict_low}: allowed is less than evict_high = {settings.evict_high}"


_ALLOWED = {
    "path": "a path",
    "address": "an IP address or host name",
    "URL": "postgresql://USER:PASSWORD@HOST:PORT/DATABASE, or nothing",
    "endpoint": "tcp://ADDRESS:PORT or ipc://PATH",
    "endpoints": "NAME=URL, several with spaces between",
    "globs": "globs that begin with epics: or tango:",
}


def _row(name: str, info: FieldInfo) -> Row:
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    unit, computed = str(extra["unit"]), str(extra["computed"])
    low = next((float(str(item.ge)) for item in info.metadata if hasattr(item, "ge")), None)
    high = next((float(str(item.le)) for item in info.metadata if hasattr(item, "le")), None)
    shown = human_bytes if unit.startswith("bytes") else _number
    choices = getattr(info.annotation, "__args__", ()) if low is None and unit == "name" else ()
    if choices:
        allowed = " or ".join(str(choice) for choice in choices)
    elif low is not None and high is not None:
        whole = "a whole number of " if info.annotation is int else "a number of "
        allowed = f"{'a ' if unit == 'port' else whole}{unit} from {shown(low)} to {shown(high)}"
    else:
        allowed = _ALLOWED.get(unit, f"a {unit}")
    default = computed or (
        "" if info.default is None else shown(info.default) if low is not None else str(info.default)
    )
    return Row(name, unit, default, low, high, allowed, info.description or "")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)
