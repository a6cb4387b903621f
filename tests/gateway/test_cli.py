"""Commands as an operator runs them: answers on stdout, one line of complaint on stderr, exit codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.cli import main

Hiss = Callable[..., Any]


NO_NODE = "no node runs on /nowhere; start one with `hiss serve --data /nowhere`"


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ("kernel vhdl x.py", 2, "Missing option '-o' / '--output'; `hiss kernel vhdl --help` shows what there is"),
        ("bogus", 2, "No such command 'bogus'; `hiss --help` shows what there is"),
        ("serve", 2, "data_dir is not set: give the node's folder with --data DIR or HISS_DATA_DIR"),
        ("serve --data x --set workers", 2, "--set workers: write it as NAME=VALUE; `hiss settings` lists the names"),
        ("serve --data x --s3-port 70000", 2, "s3_port = 70000 (from flag): allowed is a port from 0 to 65535"),
        ("serve --data x --config /none.toml", 2, "/none.toml: cannot be read: No such file or directory"),
        ("status --data /nowhere", 4, NO_NODE),
        (
            "status --control http://gw:9001",
            2,
            "no credentials: give --data DIR, or set HISS_ACCESS_KEY and HISS_SECRET_KEY",
        ),
        ("run status ftp://b/run42 --data /nowhere", 2, "'ftp://b/run42' is no place: write it as s3://BUCKET/PREFIX"),
        ("run status b/run42 --data /nowhere", 4, NO_NODE),
        ("run list s3://b --data /nowhere", 4, NO_NODE),
        ("send s3://b/p", 2, "give at least one file and a place: hiss send FILE... s3://BUCKET/PREFIX"),
        ("send --parallel 0 x s3://b/p", 2, "Invalid value for '--parallel': "),
        ("user list --data /nowhere", 4, NO_NODE),
        ("user show-root --data /nowhere", 4, "/nowhere has no root keys: it was never started"),
        ("catalog backup /nowhere/x --data /nowhere", 2, "/nowhere holds no catalogue"),
        ("fsck --data /nowhere", 2, "/nowhere holds no catalogue"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, code: int, complaint: str
) -> None:
    for name in [name for name in os.environ if name.startswith("HISS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["hiss", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert (ended.value.code, line[: 6 + len(complaint)]) == (code, f"hiss: {complaint}")


def test_a_folder_that_cannot_be_used_is_named(hiss: Hiss) -> None:
    done = hiss("serve", "--data", "/proc/nowhere")
    assert done.returncode == 5
    complaint = "hiss: /proc/nowhere: cannot be used as data folder: No such file or directory"
    assert done.stderr.splitlines() == [complaint]


def test_a_node_that_does_not_answer_is_named(hiss: Hiss) -> None:
    keys = {"HISS_ACCESS_KEY": "a", "HISS_SECRET_KEY": "b"}
    done = hiss("status", "--control", "http://127.0.0.1:9", environ=keys)
    assert done.returncode == 4
    assert done.stderr.startswith("hiss: http://127.0.0.1:9 does not answer")


def test_settings_say_where_each_value_comes_from(hiss: Hiss, tmp_path: Path) -> None:
    config = tmp_path / "hiss.toml"
    config.write_text('etag = "md5"\n')
    arguments = ("--config", str(config), "--set", "drain_parallel=7", "--json")
    done = hiss("settings", *arguments, environ={"HISS_WORKERS": "1"})
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert (rows["etag"]["value"], rows["etag"]["origin"]) == ("md5", str(config))
    assert (rows["workers"]["value"], rows["workers"]["origin"]) == (1, "environment")
    assert (rows["drain_parallel"]["value"], rows["drain_parallel"]["origin"]) == (7, "flag")
    assert (rows["s3_port"]["origin"], rows["arena_bytes"]["origin"]) == ("default", "computed")
    assert rows["s3_port"]["maximum"] == 65535
    table = hiss("settings", "--markdown").stdout
    assert "| `segment_bytes` | bytes | 1 GiB, less where the buffer is small | a whole number of bytes from" in table


def test_status_and_drain_of_a_node(real_node: Any) -> None:
    done = real_node.hiss("status", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document["state"] == "serving"
    assert "secret" not in done.stdout
    table = real_node.hiss("status")
    assert table.returncode == 0
    assert "catalogue  ok" in table.stdout
    drain = json.loads(real_node.hiss("drain", "--json").stdout)
    assert drain["failing_objects"] == 0


def test_users_come_and_go(real_node: Any, hiss: Hiss) -> None:
    added = real_node.hiss("user", "add", "visitor", "--grant", "write:scan42:raw/", "--name", "A Visitor", "--json")
    keys = json.loads(added.stdout)
    listed = real_node.hiss("user", "list", "--json")
    assert keys["secret_key"] not in listed.stdout
    visitor = next(user for user in json.loads(listed.stdout) if user["id"] == "visitor")
    assert (visitor["name"], visitor["grants"], visitor["root"]) == ("A Visitor", ["write:scan42:raw/"], False)
    assert [(pair["access_key"], pair["enabled"]) for pair in visitor["keys"]] == [(keys["access_key"], True)]
    as_visitor = {"HISS_ACCESS_KEY": keys["access_key"], "HISS_SECRET_KEY": keys["secret_key"]}
    control = ("--control", real_node.url("control"))
    assert hiss("drain", *control, environ=as_visitor).returncode == 0
    twice = real_node.hiss("user", "add", "visitor")
    assert (twice.returncode, twice.stderr) == (
        2,
        "hiss: user 'visitor' is there already; `hiss user list` shows it\n",
    )
    assert real_node.hiss("user", "disable", "visitor").returncode == 0
    refused = hiss("drain", *control, environ=as_visitor)
    assert refused.returncode == 2
    assert "the credentials were refused" in refused.stderr
    assert "root cannot be disabled" in real_node.hiss("user", "disable", "root").stderr
    assert "write it as ACCESS:BUCKET[:PREFIX]" in real_node.hiss("user", "add", "x", "--grant", "all").stderr


def test_a_user_s_keys_are_rotated_without_a_gap(real_node: Any, hiss: Hiss, tmp_path: Path) -> None:
    old = json.loads(
        real_node.hiss("user", "add", "rotator", "--grant", "read:*", "--email", "r@x.org", "--json").stdout
    )
    new = json.loads(real_node.hiss("user", "key", "create", "rotator", "--json").stdout)
    control = ("--control", real_node.url("control"))

    def code(keys: dict[str, str]) -> int:
        environ = {"HISS_ACCESS_KEY": keys["access_key"], "HISS_SECRET_KEY": keys["secret_key"]}
        return hiss("drain", *control, environ=environ).returncode

    assert (code(old), code(new)) == (0, 0)
    assert real_node.hiss("user", "key", "disable", "rotator", old["access_key"]).returncode == 0
    assert (code(old), code(new)) == (2, 0)
    assert real_node.hiss("user", "key", "delete", "rotator", old["access_key"]).returncode == 0
    taken = real_node.hiss("user", "add", "other", "--email", "R@X.org")
    assert "is the address of user 'rotator' already" in taken.stderr
    policy = tmp_path / "policy.json"
    policy.write_text('{"Statement": {"Effect": "Allow", "Action": "s3:*", "Resource": "*", "Principal": "*"}}')
    assert "cannot have Principal" in real_node.hiss("user", "policy", "put", "rotator", "all", str(policy)).stderr
    policy.write_text('{"Statement": {"Effect": "Allow", "Action": "s3:CreateBucket", "Resource": "*"}}')
    assert real_node.hiss("user", "policy", "put", "rotator", "own", str(policy)).returncode == 0
    shown = json.loads(real_node.hiss("user", "show", "rotator").stdout)
    assert list(shown["policies"]) == ["own"]
    assert [pair["access_key"] for pair in shown["keys"]] == [new["access_key"]]


def test_a_run_nobody_sent_is_not_safe_and_a_bucket_that_is_none_is_an_error(real_node: Any) -> None:
    done = real_node.hiss("run", "status", "s3://no-such-bucket/run/")
    assert done.returncode == 2
    assert "there is no such bucket" in done.stderr


def test_back_up_and_check(real_node: Any, tmp_path: Path) -> None:
    file = tmp_path / "catalogue.sqlite"
    done = real_node.hiss("catalog", "backup", str(file), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["size_bytes"] == file.stat().st_size
    again = real_node.hiss("catalog", "backup", str(file))
    assert (again.returncode, "is there already" in again.stderr) == (2, True)
    restored = real_node.hiss("catalog", "restore", str(file))
    assert (restored.returncode, "stop it first" in restored.stderr) == (3, True)
    checked = real_node.hiss("fsck", "--json")
    assert checked.returncode == 0, checked.stdout
    assert json.loads(checked.stdout)["sound"] is True
