"""The journal's promises, at the level of files: whole batches or none, and nothing that was taken back ever returns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest import journal
from ingest.journal import FileOps, Journal, JournalDamaged, JournalLost

SIZE = 64 * 1024


def make(folder: Path, next_sequence: int = 1, *, ops: FileOps | None = None, size_bytes: int = SIZE) -> Journal:
    return Journal(folder, next_sequence, size_bytes=size_bytes, ops=ops)


def put(log: Journal, first_sequence: int, *payloads: bytes) -> int:
    """Append one batch a payload, of one entry each; the next sequence."""
    for payload in payloads:
        log.append(first_sequence, 1, payload)
        first_sequence += 1
    return first_sequence


def flush(log: Journal) -> None:
    covered = log.mark()
    log.flush()
    log.flushed(covered)


def content(folder: Path, after: int = 0) -> list[tuple[int, bytes]]:
    return [(frame.first_sequence, bytes(frame.payload)) for frame in journal.replay(folder, after)]


def newest(folder: Path) -> Path:
    return journal.files(folder)[-1].path


class FailingOps(FileOps):
    """Fails the n-th write or flush from now (1 is the next); ``short`` writes half of what it is given."""

    def __init__(self) -> None:
        self.fail_write = self.fail_flush = 0
        self.short = False
        self.flushes = 0

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        self.fail_write -= 1
        if self.fail_write == 0:
            os.pwrite(fd, data[: len(data) // 2], offset)
            raise OSError(5, "injected")
        return os.pwrite(fd, data[: max(1, len(data) // 2)] if self.short else data, offset)

    def flush(self, fd: int) -> None:
        self.flushes += 1
        self.fail_flush -= 1
        if self.fail_flush == 0:
            raise OSError(5, "injected")
        os.fdatasync(fd)


def test_batches_come_back_in_order_and_from_any_sequence_on(tmp_path: Path) -> None:
    log = make(tmp_path)
    log.append(1, 3, b"three entries")
    put(log, 4, b"d", b"e")
    flush(log)
    assert content(tmp_path) == [(1, b"three entries"), (4, b"d"), (5, b"e")]
    assert content(tmp_path, 2) == [(1, b"three entries"), (4, b"d"), (5, b"e")]
    assert content(tmp_path, 4) == [(5, b"e")]
    assert journal.last_sequence(tmp_path) == 5
    log.close()


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400), flip=st.integers(0, 255))
def test_a_torn_tail_is_cut_at_a_batch_boundary(tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int) -> None:
    folder = tmp_path_factory.mktemp("journal")
    log = make(folder)
    batches = [bytes([65 + i]) * (20 * i + 1) for i in range(5)]
    put(log, 1, *batches)
    log.close()
    path = newest(folder)
    damaged = bytearray(path.read_bytes())
    place = journal.HEADER_BYTES + cut
    # A power cut leaves any mixture: here one byte is wrong and nothing behind it was written.
    damaged[place] ^= flip
    damaged[place + 1 :] = bytes(len(damaged) - place - 1)
    path.write_bytes(damaged)
    found = content(folder)
    assert found == list(enumerate(batches, 1))[: len(found)]
    ends = [0]
    for batch in batches:
        ends.append(ends[-1] + 20 + len(batch))
    untouched = sum(end <= cut for end in ends[1:])
    assert len(found) >= untouched


def test_an_old_frame_behind_a_torn_one_never_comes_back(tmp_path: Path) -> None:
    log = make(tmp_path)
    put(log, 1, b"kept", b"torn", b"gone")
    log.close()
    path = newest(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"torn")] ^= 1
    path.write_bytes(damaged)
    # The same lengths again: in an append to the old file "gone" would follow in sequence and place.
    log = make(tmp_path, 2)
    put(log, 2, b"anew")
    log.close()
    assert content(tmp_path) == [(1, b"kept"), (2, b"anew")]


def test_a_start_makes_what_it_found_durable_in_a_new_file(tmp_path: Path) -> None:
    log = make(tmp_path)
    put(log, 1, b"a", b"b")
    log.close()
    before = newest(tmp_path)
    ops = FailingOps()
    log = make(tmp_path, 3, ops=ops)
    assert ops.flushes == 1
    assert not before.exists()
    assert content(tmp_path) == [(1, b"a"), (2, b"b")]
    log.close()


def test_a_start_refuses_an_index_that_knows_more_than_the_journal(tmp_path: Path) -> None:
    make(tmp_path).close()
    with pytest.raises(JournalDamaged):
        make(tmp_path, 7)


def test_short_writes_are_completed(tmp_path: Path) -> None:
    ops = FailingOps()
    log = make(tmp_path, ops=ops)
    ops.short = True
    put(log, 1, b"x" * 1000, b"y")
    assert content(tmp_path) == [(1, b"x" * 1000), (2, b"y")]
    log.close()


@pytest.mark.parametrize("kind", ["write", "flush"])
def test_a_failed_batch_is_void_and_accepted_ones_are_written_again(tmp_path: Path, kind: str) -> None:
    ops = FailingOps()
    log = make(tmp_path, ops=ops)
    put(log, 1, b"flushed")
    flush(log)
    put(log, 2, b"accepted")
    first = newest(tmp_path)
    if kind == "write":
        ops.fail_write = 1
        with pytest.raises(OSError, match="injected"):
            put(log, 3, b"refused")
    else:
        put(log, 3, b"refused")
        ops.fail_flush = 1
        with pytest.raises(OSError, match="injected"):
            log.flush()
    log.give_up(3)
    assert newest(tmp_path) != first
    assert content(tmp_path) == [(1, b"flushed"), (2, b"accepted")]
    put(log, 3, b"next")
    log.close()
    assert content(tmp_path) == [(1, b"flushed"), (2, b"accepted"), (3, b"next")]
    assert journal.files(tmp_path)[-1].first_sequence == 2


def test_beginning_a_file_survives_one_error_and_reports_a_lost_journal(tmp_path: Path) -> None:
    ops = FailingOps()
    log = make(tmp_path, ops=ops)
    ops.fail_flush = 1
    log.rotate(1)
    assert put(log, 1, b"a") == 2
    flush(log)
    log.close()

    class Broken(FileOps):
        def flush(self, fd: int) -> None:
            raise OSError(28, "no space")

    with pytest.raises(JournalLost, match="no space"):
        make(tmp_path, 2, ops=Broken())
    assert content(tmp_path) == [(1, b"a")]


def test_a_full_disk_gets_shorter_files(tmp_path: Path) -> None:
    class Small(FileOps):
        def write(self, fd: int, data: memoryview, offset: int) -> int:
            if offset >= 512 * 1024:
                raise OSError(28, "no space")
            return os.pwrite(fd, data, offset)

    log = make(tmp_path, ops=Small(), size_bytes=1 << 20)
    put(log, 1, b"a")
    assert content(tmp_path) == [(1, b"a")]
    log.close()


def test_rotation_continues_the_sequence_and_uses_the_prepared_file(tmp_path: Path) -> None:
    log = make(tmp_path)
    following = put(log, 1, b"a", b"b")
    flush(log)
    log.prepare()
    assert (tmp_path / "spare.new").exists()
    log.rotate(following)
    assert not (tmp_path / "spare.new").exists()
    put(log, following, b"c")
    assert [file.first_sequence for file in journal.files(tmp_path)] == [1, 3]
    assert content(tmp_path, 1) == [(2, b"b"), (3, b"c")]
    log.close()


def test_a_batch_larger_than_a_file_gets_a_file_of_its_size(tmp_path: Path) -> None:
    log = make(tmp_path)
    payload = os.urandom(3 * SIZE)
    assert not log.fits(len(payload))
    log.rotate(1, len(payload))
    assert log.fits(len(payload))
    put(log, 1, payload)
    assert content(tmp_path) == [(1, payload)]
    log.close()


def test_a_missing_or_damaged_file_in_the_chain_is_an_error(tmp_path: Path) -> None:
    log = make(tmp_path)
    for sequence in (1, 2, 3):
        put(log, sequence, b"entry")
        flush(log)
        log.rotate(sequence + 1)
    log.close()
    middle = journal.files(tmp_path)[1].path
    saved = middle.read_bytes()
    middle.unlink()
    with pytest.raises(JournalDamaged, match="ends before entry 2"):
        content(tmp_path)
    journal.files(tmp_path)[0].path.unlink()
    with pytest.raises(JournalDamaged, match="in no journal file"):
        content(tmp_path)
    middle.write_bytes(bytes(len(saved)))
    with pytest.raises(JournalDamaged, match="damaged header"):
        content(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = journal.FORMAT + 1
    monkeypatch.setattr(journal, "FORMAT", newer)
    make(tmp_path).close()
    monkeypatch.undo()
    with pytest.raises(JournalDamaged, match=f"format {newer}"):
        content(tmp_path)


def test_leftovers_of_a_crash_are_removed(tmp_path: Path) -> None:
    (tmp_path / "000001.new").write_bytes(b"half a file")
    (tmp_path / "spare.partial").write_bytes(b"half a file")
    log = make(tmp_path)
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.new"))
    log.close()
