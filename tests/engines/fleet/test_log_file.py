"""Log files that do not grow for ever."""

from __future__ import annotations

import subprocess
import sys

from optimal_sampling.engines.fleet.log_file import LogTail, keep_short, last_lines

MOST = 1000


def test_a_log_that_grows_for_weeks(tmp_path):
    """Guards: a disk that is filled by warnings, lines that are lost in the middle, and a process
    that goes on writing to a file which is not the log any more.
    """
    log = tmp_path / "worker-0.log"
    code = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"
    with (
        log.open("ab") as out,
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=out, text=True
        ) as process,
    ):
        for number in range(500):
            before = log.stat().st_size
            process.stdin.write(f"line {number}\n")
            process.stdin.flush()
            while log.stat().st_size == before:
                pass
            keep_short(log, MOST)
            assert log.stat().st_size <= MOST
        process.stdin.close()
    older = tmp_path / "worker-0.log.1"
    assert older.stat().st_size <= MOST + len("line 500\n")
    kept = older.read_text() + log.read_text()
    first = int(kept.split()[1])
    assert kept == "".join(f"line {number}\n" for number in range(first, 500))


def test_last_lines_of_a_log_that_began_anew(tmp_path):
    """Guards: a worker that is given up without a word, because its log had just been emptied."""
    log = tmp_path / "worker-0.log"
    assert last_lines(log) == ""
    log.write_text("".join(f"line {number}\n" for number in range(200)))
    keep_short(log, MOST)
    assert log.read_text() == ""
    log.write_text("killed\n")
    assert last_lines(log).splitlines() == [
        f"    {log}:",
        *(f"    line {number}" for number in range(186, 200)),
        "    killed",
    ]


def test_a_tail_of_a_file_that_others_write(tmp_path):
    """Guards: a flood of lines that fills the disk of a machine or the memory of the driver."""
    path = tmp_path / "log"
    path.touch()
    with path.open("r+b", buffering=0) as file, path.open("ab", buffering=0) as out:
        tail = LogTail(file, MOST)
        out.write(b"a" * 600)
        assert tail.read() == b"a" * 600
        out.write(b"b" * 600)
        assert tail.read() == b"b" * 600
        assert path.stat().st_size == 0
        out.write(b"c" * 5000 + b"d" * MOST)
        assert tail.read() == b"[... 5000 bytes ...]\n" + b"d" * MOST
        assert tail.read() == b""
        out.write(b"e")
        assert tail.read() == b"e"
        assert path.stat().st_size == 1
