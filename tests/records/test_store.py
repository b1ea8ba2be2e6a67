"""One worker's file: nothing acknowledged is lost, whatever ends the process."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimal_sampling.errors import RunFolderError, StorageError
from optimal_sampling.records.store import Lock, RecordFile, Scan, encode_line, is_locked


def open_file(path):
    scan = Scan(path)
    records = list(scan)
    file = RecordFile(path)
    file.open(scan)
    return file, records, scan


def write(path, records):
    file, _, _ = open_file(path)
    with file:
        for record in records:
            file.append(record)


def test_append_close_open(tmp_path, make_record):
    """Guards: records that are only in a buffer when the file is closed."""
    path = tmp_path / "records" / "main.jsonl"
    write(path, map(make_record, range(10)))
    write(path, map(make_record, range(10, 13)))
    assert [record["row_index"] for record in Scan(path)] == list(range(13))


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(data=st.data())
def test_a_tail_torn_at_any_byte_is_cut(tmp_path_factory, make_record, data):
    """Guards: appending after a torn line, which destroys two records, and cutting a whole one."""
    path = tmp_path_factory.mktemp("torn") / "main.jsonl"
    lines = [encode_line(make_record(number)) for number in range(3)]
    cut = data.draw(st.integers(0, len(lines[2]) - 1))
    rubbish = data.draw(st.sampled_from([b"", b"\x00" * 50, b'{"id":"', b"?\n"])) if cut else b""
    path.write_bytes(lines[0] + lines[1] + lines[2][:cut] + rubbish)
    file, records, scan = open_file(path)
    assert [record["row_index"] for record in records] == [0, 1]
    assert (scan.torn_lines > 0) == (cut > 0)
    assert scan.bad_lines == 0
    with file:
        file.append(make_record(2))
    assert path.read_bytes() == b"".join(lines)


def test_every_byte_of_the_last_line(tmp_path, make_record):
    """The same without chance: each of the offsets once."""
    path = tmp_path / "main.jsonl"
    lines = [encode_line(make_record(number)) for number in range(2)]
    for cut in range(len(lines[1])):
        path.write_bytes(lines[0] + lines[1][:cut])
        file, records, _ = open_file(path)
        file.close()
        assert len(records) == 1
        assert path.read_bytes() == lines[0]


def test_a_bad_line_in_the_middle_is_counted_and_kept(tmp_path, make_record):
    """Guards: truncating everything after a damaged line, or not telling."""
    path = tmp_path / "main.jsonl"
    lines = [encode_line(make_record(number)) for number in range(4)]
    lines[1] = lines[1].replace(b"answer", b"Answer")
    path.write_bytes(b"".join(lines))
    file, records, scan = open_file(path)
    file.close()
    assert [record["row_index"] for record in records] == [0, 2, 3]
    assert (scan.bad_lines, scan.torn_lines) == (1, 0)
    assert path.read_bytes() == b"".join(lines)


def test_a_bad_checksum_at_the_end_is_cut(tmp_path, make_record):
    """Guards: a line that is whole but wrong, as an interrupted write of two pages leaves it."""
    path = tmp_path / "main.jsonl"
    lines = [encode_line(make_record(number)) for number in range(2)]
    path.write_bytes(lines[0] + lines[1].replace(b"answer", b"\x00\x00\x00\x00\x00\x00"))
    file, records, scan = open_file(path)
    file.close()
    assert (len(records), scan.torn_lines) == (1, 1)
    assert path.read_bytes() == lines[0]


def test_a_foreign_file_is_left_alone(tmp_path):
    """Guards: cutting a file of the user's to nothing because none of its lines is ours."""
    path = tmp_path / "main.jsonl"
    path.write_text('{"problem": "1+1"}\n')
    with pytest.raises(RunFolderError, match="was not written by this program"):
        list(Scan(path))
    assert path.read_text() == '{"problem": "1+1"}\n'


def test_a_second_writer_is_told_who_writes(tmp_path, make_record):
    """Guards: two processes interleaving lines in one file."""
    path = tmp_path / "main.jsonl"
    file, _, _ = open_file(path)
    with (
        file,
        pytest.raises(
            RunFolderError, match=rf"main\.jsonl is being written .*pid {os.getpid()} on \S+"
        ),
    ):
        RecordFile(path)
    write(path, [make_record()])  # released with the first writer


def test_a_writer_waits_for_one_that_looks(tmp_path):
    """Guards: a run refused because `report` looked, in that instant, whether it is written."""
    Lock(tmp_path / "main.jsonl").release()
    looking = (tmp_path / ".main.lock").open()
    fcntl.flock(looking, fcntl.LOCK_SH)
    timer = threading.Timer(0.2, looking.close)
    timer.start()
    started = time.monotonic()
    lock = Lock(tmp_path / "main.jsonl")
    assert time.monotonic() - started > 0.1
    assert is_locked(tmp_path / "main.jsonl")
    lock.release()
    timer.join()


def test_the_lock_dies_with_its_process(tmp_path, make_record):
    """Guards: a lock file that outlives `kill -9` and blocks the run for ever."""
    path = tmp_path / "main.jsonl"
    code = f"""
        from pathlib import Path; import time
        from optimal_sampling.records.store import RecordFile
        file = RecordFile(Path({str(path)!r})); print("locked", flush=True); time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(RunFolderError, match=f"pid {process.pid} on"):
            RecordFile(path)
        process.kill()
    write(path, [make_record()])


@pytest.mark.parametrize("folder", ["file/records", "/proc/nowhere", "/dev/null/records"])
def test_an_unwritable_folder(tmp_path, folder):
    """Guards: a traceback instead of a message. (`chmod` would not stop root.)"""
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="choose another --output-dir"):
        RecordFile(tmp_path / folder / "main.jsonl")


FULL_DISK = """
    import resource, signal, sys
    from pathlib import Path
    from optimal_sampling.errors import StorageError
    from optimal_sampling.records.store import RecordFile, Scan
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    path = Path(sys.argv[1])
    file = RecordFile(path)
    scan = Scan(path); list(scan); file.open(scan)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    try:
        with file:
            for number in range(100):
                file.append({"id": f"{number:032x}", "text": "x" * 200})
                file.commit()
                print(number, flush=True)
    except StorageError as error:
        print(error)
"""


@pytest.mark.parametrize("room", [1, 300, 1000, 1001, 2500])
def test_a_full_disk_loses_nothing_acknowledged(tmp_path, room):
    """Guards: half a line at the end of a file on a full disk; here a limit of the file's size
    plays the disk.
    """
    path = tmp_path / "main.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(path), str(room)],
        capture_output=True,
        text=True,
        check=True,
    )
    *acknowledged, message = done.stdout.splitlines()
    scan = Scan(path)
    assert [int(record["id"], 16) for record in scan] == list(map(int, acknowledged))
    assert scan.size == scan.good_end <= room
    assert "every record acknowledged before is safe. Free some space" in message


def test_a_failed_write_is_taken_back(tmp_path, make_record, monkeypatch):
    """Guards: a partial line after ENOSPC, and a second StorageError out of closing the file."""
    path = tmp_path / "main.jsonl"
    real = os.pwrite
    file, _, _ = open_file(path)
    file.append(make_record(0))
    file.commit()

    def full(fd, data, offset):
        real(fd, data[:40], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)

    def fill():
        with file:
            file.append(make_record(1))
            file.commit()

    with pytest.raises(StorageError, match="No space left on device"):
        fill()
    assert path.read_bytes() == encode_line(make_record(0))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_in_a_write_repeats_nothing(tmp_path, make_record, monkeypatch, moment):
    """Guards: Ctrl-C between the write and its bookkeeping, after which closing writes the line
    again.
    """
    path = tmp_path / "main.jsonl"
    real, calls = os.fsync, []
    file, _, _ = open_file(path)

    def interrupted(fd):
        if moment == "after":
            real(fd)
        if not calls:
            calls.append(fd)
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)

    def run():
        with file:
            file.append(make_record(0))

    with pytest.raises(KeyboardInterrupt):
        run()
    assert [record["row_index"] for record in Scan(path)] == [0]


KILLED = """
    import sys
    from pathlib import Path
    from optimal_sampling.records.store import RecordFile, Scan
    path = Path(sys.argv[1])
    file = RecordFile(path)
    scan = Scan(path)
    numbers = [int(record["id"], 16) for record in scan]
    assert numbers == list(range(len(numbers))), numbers
    file.open(scan)
    for number in range(len(numbers), 1_000_000):
        file.append({"id": f"{number:032x}", "text": "x" * (number * 7919 % 5000)})
        if number % 7 == 0:
            file.commit()
            print(number, flush=True)
"""


def kill_loop(path, rounds, seed):
    """Kill at a random moment: of the start, and in every second round after a commit."""
    rng = random.Random(seed)
    acknowledged = -1
    for turn in range(rounds):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED), str(path)], stdout=subprocess.PIPE
        ) as it:
            said = it.stdout.readline().split() if turn % 2 else []
            time.sleep(rng.uniform(0.05, 0.4))
            it.send_signal(signal.SIGKILL)
            said += it.stdout.read().split()
        acknowledged = max([acknowledged, *map(int, said)])
        numbers = [int(record["id"], 16) for record in Scan(path)]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > acknowledged
    assert acknowledged > 0


def test_kill_at_random_moments(tmp_path):
    """Guards: a record that was acknowledged and is gone, one that is there twice, and a torn line
    in the middle.
    """
    kill_loop(tmp_path / "main.jsonl", 12, seed=1)


@pytest.mark.slow
def test_kill_at_random_moments_for_long(tmp_path):
    """The same, two hundred times."""
    for seed in range(10):
        kill_loop(tmp_path / f"{seed}.jsonl", 20, seed)
