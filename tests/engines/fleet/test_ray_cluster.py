"""The connection to Ray, and a local cluster that ends with its run."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from optimal_sampling.config import FleetConfig
from optimal_sampling.engines.fleet.ray_cluster import Cluster
from optimal_sampling.errors import ConfigError, MissingDependencyError
from tests.engines.fleet.test_kill import are_gone, finish, plain, start, wait_for
from tests.generate.test_kill import lines, size

pytest.importorskip("ray", reason="needs the extra ray")
pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("ray")]


def test_nobody_answers():
    """Guards: two minutes of silence and a signal, which is what Ray's own attempt ends with."""
    with pytest.raises(ConfigError, match=r"'127.0.0.1:1' \(Connection refused\).*ray start"):
        Cluster("127.0.0.1:1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match="no Ray within 2 s"):
            Cluster(address, answer_seconds=2.0)


def test_ray_is_not_installed(monkeypatch):
    """Guards: an ImportError from inside, without the command that helps."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[ray\]'"):
        Cluster("auto")


class HalfStarted:
    """A Ray that gives up at its first start, and leaves a process behind."""

    def __init__(self):
        self.starts, self.folders = [], []
        self._private = SimpleNamespace(worker=SimpleNamespace())

    def is_initialized(self):
        return False

    def init(self, address, _temp_dir, **arguments):
        assert address == "local"
        self.folders.append(Path(_temp_dir))
        self.starts.append(subprocess.Popen(["sleep", "60"]))
        if len(self.starts) == 1:
            raise Exception("The current node timed out during startup.")

    def shutdown(self):
        pass


def test_a_local_cluster_that_starts_at_the_second_attempt(monkeypatch):
    """Guards: an error on a busy machine, and a half of a cluster beside the whole one."""
    fake = HalfStarted()
    monkeypatch.setitem(sys.modules, "ray", fake)
    for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")
    cluster = Cluster("local")
    first, second = fake.starts
    assert first.wait(10) == -signal.SIGKILL
    assert second.poll() is None
    assert [each.exists() for each in fake.folders] == [False, True]
    cluster.close()
    assert second.wait(10) == -signal.SIGKILL
    assert not fake.folders[1].exists()


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:port", ""])
def test_addresses_that_are_none(address):
    """Guards: Ray's own client, which has other rules, and a minute's wait for a typing error."""
    with pytest.raises(ConfigError, match="ray must be local, auto, or HOST:PORT"):
        FleetConfig(ray=address)


def whole_tree(process):
    """A running command with all that it has started."""
    return psutil.Process(process.pid).children(recursive=True)


def session_folders(process):
    return [*Path(tempfile.gettempdir()).glob(f"optsamp-ray-{process.pid}-*")]


def listening(processes):
    """Addresses at which processes listen."""
    found = set()
    for each in processes:
        found |= {at.laddr.ip for at in each.net_connections("tcp") if at.status == "LISTEN"}
    return {address.removeprefix("::ffff:") for address in found}


def test_an_interrupted_local_cluster_leaves_nothing(tmp_path):
    """Guards: servers, actors and files of Ray that stay after Ctrl-C, and open ports."""
    process = start(tmp_path / "run", 2000, ray="local", workers=1)
    wait_for(lambda: size(tmp_path / "run"), seconds=300)
    tree = whole_tree(process)
    assert any("raylet" in each.name() for each in tree)
    assert listening(tree) == {"127.0.0.1"}
    assert session_folders(process)
    process.send_signal(signal.SIGINT)
    assert finish(process) == 130
    wait_for(lambda: are_gone(tree), seconds=10)
    assert not session_folders(process)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_of_a_local_cluster(tmp_path):
    """Guards: a cluster that outlives its driver; and its records, which the next call goes on."""
    folder = tmp_path / "run"
    process = start(folder, 300, ray="local", workers=2)
    wait_for(lambda: size(folder), seconds=300)
    tree, sessions = whole_tree(process), session_folders(process)
    process.kill()
    finish(process)
    wait_for(lambda: are_gone(tree) and not any(each.exists() for each in sessions), seconds=30)
    assert finish(start(folder, 300, ray="local", workers=1)) == 0
    assert lines(folder) == plain(tmp_path / "plain", 300)
