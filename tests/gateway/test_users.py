"""Users: users.toml, sealed secrets, the root pair, and that no secret shows anywhere."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from gateway import users
from gateway.logging import JsonLine, TextLine
from gateway.node_key import NodeKey, NodeKeyError
from gateway.users_file import read_file
from ingest.paths import NodePaths
from ingest.records import Grant, UserRecord

TOML = """
[[user]]
id = "daq"
name = "DAQ of P11"
access_key = "P11DAQ"
secret_key = "correct horse battery"
grants = ["write:scan*", "read:calib:dark/"]
"""


class UserTable:
    """The users of a catalogue, in memory: the two methods of the port that this room uses here."""

    def __init__(self) -> None:
        self.rows: dict[str, UserRecord] = {}
        self.writes = 0

    async def users(self) -> Sequence[UserRecord]:
        return list(self.rows.values())

    async def put_user(self, user: UserRecord) -> None:
        self.rows[user.user_id] = user
        self.writes += 1


@pytest.fixture
def paths(tmp_path: Path) -> NodePaths:
    paths = NodePaths(tmp_path / "data")
    paths.create()
    return paths


@pytest.fixture
def key(paths: NodePaths) -> NodeKey:
    return NodeKey.load_or_create(paths.node_key)


def users_file(folder: Path, text: str) -> Path:
    file = folder / "users.toml"
    file.write_text(text)
    file.chmod(0o600)
    return file


def test_the_node_key_is_private_and_lasting(paths: NodePaths, key: NodeKey) -> None:
    assert paths.node_key.stat().st_mode & 0o777 == 0o600
    sealed = key.seal("hush-hush", user_id="daq", access_key="P11DAQ")
    assert b"hush-hush" not in sealed
    assert NodeKey.load_or_create(paths.node_key).open(sealed, user_id="daq", access_key="P11DAQ") == "hush-hush"


def test_a_sealed_secret_opens_for_its_user_and_key_only(key: NodeKey, tmp_path: Path) -> None:
    sealed = key.seal("hush-hush", user_id="daq", access_key="P11DAQ")
    other = NodeKey.load_or_create(tmp_path / "other.key")
    for opener, user_id, access_key in ((key, "eve", "P11DAQ"), (key, "daq", "EVE"), (other, "daq", "P11DAQ")):
        with pytest.raises(NodeKeyError, match="was not sealed with this node's key"):
            opener.open(sealed, user_id=user_id, access_key=access_key)
    with pytest.raises(NodeKeyError):
        key.open(b"", user_id="daq", access_key="P11DAQ")


def test_a_key_file_that_others_may_read_or_that_is_damaged_is_refused(paths: NodePaths, key: NodeKey) -> None:
    paths.node_key.chmod(0o640)
    with pytest.raises(NodeKeyError, match="run chmod 600"):
        NodeKey.load(paths.node_key)
    paths.node_key.chmod(0o600)
    paths.node_key.write_bytes(b"short")
    with pytest.raises(NodeKeyError, match="is no node key"):
        NodeKey.load(paths.node_key)


async def test_users_go_into_the_catalogue_sealed_and_come_back(paths: NodePaths, key: NodeKey, tmp_path: Path) -> None:
    catalog = UserTable()
    root, made = users.root_keys(paths, key, {})
    assert made
    read = read_file(users_file(tmp_path, TOML))
    assert await users.apply(catalog, paths, key, root, read) == 2  # type: ignore[arg-type]
    daq = catalog.rows["daq"]
    assert daq.grants == (Grant("scan*", "", "write"), Grant("calib", "dark/", "read"))
    assert key.open_secret(daq, daq.keys[0]) == "correct horse battery"
    assert b"horse" not in msgspec.msgpack.encode(daq)
    assert catalog.rows["root"].root
    assert key.open_secret(catalog.rows["root"], catalog.rows["root"].keys[0]) == root.secret_key
    assert await users.apply(catalog, paths, key, root, read) == 0, "nothing changed, nothing is written"  # type: ignore[arg-type]


async def test_who_leaves_the_file_is_disabled_and_others_are_left_alone(
    paths: NodePaths, key: NodeKey, tmp_path: Path
) -> None:
    catalog = UserTable()
    root, _ = users.root_keys(paths, key, {})
    await users.apply(catalog, paths, key, root, read_file(users_file(tmp_path, TOML)))  # type: ignore[arg-type]
    await catalog.put_user(users.make_record(key, "visitor", users.new_keys()))
    assert await users.apply(catalog, paths, key, root, []) == 1  # type: ignore[arg-type]
    assert not catalog.rows["daq"].enabled
    assert catalog.rows["visitor"].enabled
    await users.apply(catalog, paths, key, root, read_file(users_file(tmp_path, TOML)))  # type: ignore[arg-type]
    assert catalog.rows["daq"].enabled


async def test_an_access_key_has_one_user(paths: NodePaths, key: NodeKey, tmp_path: Path) -> None:
    catalog = UserTable()
    root, _ = users.root_keys(paths, key, {})
    await catalog.put_user(users.make_record(key, "visitor", users.new_keys("P11DAQ")))
    with pytest.raises(users.UsersError, match="belongs to user 'visitor' already"):
        await users.apply(catalog, paths, key, root, read_file(users_file(tmp_path, TOML)))  # type: ignore[arg-type]
    with pytest.raises(users.UsersError, match="there twice"):
        read_file(users_file(tmp_path, TOML + TOML.replace('"daq"', '"daq2"')))


def test_root_keys_come_from_the_environment_or_stay_as_first_made(paths: NodePaths, key: NodeKey) -> None:
    first, made = users.root_keys(paths, key, {})
    assert made
    assert users.root_keys(paths, key, {}) == (first, False)
    given = {"HISS_ROOT_ACCESS_KEY": "admin", "HISS_ROOT_SECRET_KEY": "very secret"}
    assert users.root_keys(paths, key, given) == (users.KeyPair("admin", "very secret"), False)
    assert users.stored_root_keys(paths, key) == users.KeyPair("admin", "very secret")
    assert b"very secret" not in paths.credentials.read_bytes()
    with pytest.raises(users.UsersError, match="come together"):
        users.root_keys(paths, key, {"HISS_ROOT_ACCESS_KEY": "admin"})
    with pytest.raises(users.UsersError, match="secret key: allowed are 8 to 256"):
        users.root_keys(paths, key, {**given, "HISS_ROOT_SECRET_KEY": "short"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('id = "daq"', 'id = "d q"'), "user id 'd q': allowed are"),
        (('id = "daq"', 'id = "root"'), "its keys come from HISS_ROOT_ACCESS_KEY"),
        (('"correct horse battery"', '"horse"'), "user 'daq': secret key: allowed are 8 to 256"),
        (('secret_key = "correct horse battery"', ""), "user 'daq': give either secret_key or secret_key_file"),
        (('"write:scan*"', '"own:scan"'), "grant 'own:scan': write it as ACCESS:BUCKET[:PREFIX]"),
        (('name = "', 'nmae = "'), "Object contains unknown field `nmae`"),
        (("[[user]]", "[[user"), "is not TOML"),
    ],
)
def test_a_wrong_users_file_says_what_is_wrong_without_the_secret(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    with pytest.raises(users.UsersError) as caught:
        read_file(users_file(tmp_path, TOML.replace(*change)))
    assert message in str(caught.value)
    assert "horse" not in str(caught.value)


def test_a_secret_may_lie_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("in a file of its own\n")
    text = TOML.replace('secret_key = "correct horse battery"', f'secret_key_file = "{tmp_path / "secret"}"')
    assert read_file(users_file(tmp_path, text))[0].keys[0].pair.secret_key == "in a file of its own"


def test_a_readable_file_with_secrets_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = users_file(tmp_path, TOML)
    file.chmod(0o644)
    read_file(file)
    assert "others may read it (mode 0644)" in caplog.text
    assert "horse" not in caplog.text


def test_no_secret_in_a_repr_or_a_log_line(tmp_path: Path) -> None:
    user = read_file(users_file(tmp_path, TOML))[0]
    assert "horse" not in repr(user)
    for formatter in (TextLine("worker", 0), JsonLine("worker", 0)):
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        logger = logging.getLogger(f"test.{type(formatter).__name__}")
        logger.addHandler(handler)
        url = "GET /b/k?X-Amz-Credential=AK&X-Amz-Signature=abcdef0123"
        logger.warning("%s\r\nforged line", url, extra={"secret": "secret_key=hush-hush", "count": 3})
        line = stream.getvalue()
        assert "abcdef0123" not in line
        assert "hush-hush" not in line
        assert line.count("\n") == 1, "one record, one line"


@pytest.mark.parametrize("text", ["read:*", "write:scan42:raw/", "admin:a*:x:y"])
def test_grants_read_and_write_the_same(text: str) -> None:
    assert users.grant_text(users.parse_grant(text)) == text


ROTATING = """
[[user]]
id = "daq"
email = "daq@example.org"
canonical_id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789ABCDEF"

[[user.key]]
access_key = "OLD"
secret_key = "correct horse battery"
enabled = false

[[user.key]]
access_key = "NEW"
secret_key = "another good secret"

[[user.policy]]
name = "own"
document = '''{"Statement": {"Effect": "Allow", "Action": "s3:CreateBucket", "Resource": "*"}}'''
"""


async def test_a_user_of_the_file_may_have_several_pairs_and_policies(
    paths: NodePaths, key: NodeKey, tmp_path: Path
) -> None:
    catalog = UserTable()
    root, _ = users.root_keys(paths, key, {})
    await users.apply(catalog, paths, key, root, read_file(users_file(tmp_path, ROTATING)))  # type: ignore[arg-type]
    daq = catalog.rows["daq"]
    assert [(pair.access_key, pair.enabled) for pair in daq.keys] == [("OLD", False), ("NEW", True)]
    assert key.open_secret(daq, daq.keys[1]) == "another good secret"
    assert (daq.email, daq.canonical_id[-6:]) == ("daq@example.org", "abcdef")
    assert "s3:CreateBucket" in daq.policies["own"]
    assert catalog.rows["root"].canonical_id != daq.canonical_id
    assert await users.apply(catalog, paths, key, root, read_file(users_file(tmp_path, ROTATING))) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("daq@example.org", "daq at example"), "is no e-mail address"),
        (("ABCDEF", "ABC"), "canonical id: write 64 hex digits"),
        (("s3:CreateBucket", "s3:MakeBucket"), "policy 'own': Policy has invalid action"),
        (('"NEW"', '"OLD"'), "an access key is there twice"),
        (('id = "daq"', 'id = "anonymous"'), "means everybody who does not sign"),
    ],
)
def test_a_wrong_profile_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(users.UsersError, match=message):
        read_file(users_file(tmp_path, ROTATING.replace(*change)))


def test_records_of_before_users_had_several_pairs_are_read() -> None:
    old = {
        "user_id": "ada",
        "display_name": "Ada",
        "access_key": "AKADA",
        "secret": b"sealed",
        "grants": [],
        "root": False,
    }
    record = msgspec.convert(old, UserRecord)
    assert [(pair.access_key, pair.secret, pair.enabled) for pair in record.keys] == [("AKADA", b"sealed", True)]
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=UserRecord)
    assert again == record
    assert len(again.canonical_id) == 64
