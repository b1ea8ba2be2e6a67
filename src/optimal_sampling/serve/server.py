"""Options of `optimal-sampling serve`, and the start of vLLM's OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

from optimal_sampling.config import Checked, MixtureConfig, ModelConfig, VllmOptions
from optimal_sampling.engines.vllm.cpu_threads import choose_threads
from optimal_sampling.engines.vllm.engine_arguments import engine_arguments, prepare_environment
from optimal_sampling.engines.vllm.start_failure import reason_passed_on
from optimal_sampling.errors import ConfigError, EngineError
from optimal_sampling.serve.request_body import LOOPBACK_NAMES, ServerSettings
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["KEY_VARIABLE", "ServeConfig", "serve"]

KEY_VARIABLE = "OPTIMAL_SAMPLING_API_KEY"
"""Environment variable with the API key. All users of a machine see command-line options."""

_GRACE = 1
"""Seconds in which responses that are complete can still be sent, after a signal."""


@dataclass(frozen=True)
class ServeConfig(Checked):
    """An OpenAI-compatible server of q*. The API key is read from OPTIMAL_SAMPLING_API_KEY."""

    models: ModelConfig = field(default_factory=ModelConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """Defaults of requests; temperature, top_p and top_k are each request's own."""
    engine: VllmOptions = field(
        default_factory=lambda: VllmOptions(batch_size=256, prefill_chunk=8192)
    )
    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs an API key."""
    port: int = 8000
    """Port to listen on."""
    served_model_name: str | None = None
    """Name that clients ask for; unset: the teacher's."""
    max_n: int = 64
    """Most completions, and most prompts, of one request."""
    max_body_bytes: int = 4 << 20
    """Largest request body."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("port", 1, 65535)
        self._check_range("max_n max_body_bytes", 1)
        for name, default in (("temperature", 1.0), ("top_p", 1.0), ("top_k", -1)):
            if getattr(self.mixture, name) != default:
                raise ConfigError(f"{name} is each request's own; the server has none")


def serve(config: ServeConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Run the server until it is stopped.

    Raises ConfigError, ModelError or MissingDependencyError before it starts, EngineError where
    vLLM's engine ends by an error.
    """
    key = environment.get(KEY_VARIABLE) or None
    if key is None and not _is_loopback(config.host):
        raise ConfigError(
            f"host {config.host} can be reached from elsewhere: set {KEY_VARIABLE} to an API key"
        )
    with _ended_by_signals():
        _serve(config, key)


def _serve(config: ServeConfig, key: str | None) -> None:
    prepare_environment()
    threads = choose_threads(config.engine.tensor_parallel_size)
    if threads:
        print(f"threads: {threads}", file=sys.stderr, flush=True)
    import uvloop

    models = config.models
    if models.granularity == "byte":
        raise ConfigError("the server mixes tokens; for bytes use generate --engine local")
    vocabulary = Vocabulary.load(
        models.student, models.teacher, models.trust_remote_code, revisions=models.revisions
    )
    arguments = _vllm_arguments(config, vocabulary)
    if "max_model_len" not in arguments:
        raise ConfigError(
            "the models' configs do not say how long a text may be: give max_model_len"
        )
    namespace = _namespace(config, arguments)
    namespace.optimal_sampling = ServerSettings(
        vocabulary=vocabulary,
        mixture=config.mixture,
        max_model_len=arguments["max_model_len"],
        api_key=key,
        max_n=config.max_n,
        max_body_bytes=config.max_body_bytes,
        hosts=LOOPBACK_NAMES | {config.host},
    )
    for tokenizer in (vocabulary.student_tokenizer, vocabulary.teacher_tokenizer):
        tokenizer("")  # its first call changes it, which must not happen in two threads
    uvloop.run(_run(namespace))


async def _run(namespace: Any) -> None:
    """vLLM's server until a signal ends it. Raises EngineError where its engine ended before.

    As vLLM's own `run_server`, which returns in both cases. After a signal, the engine ends at
    once; a stream that its client still reads would otherwise wait for tokens without end.
    """
    from vllm.entrypoints.launchers.api_server.entry import (
        build_and_serve,
        build_async_engine_client,
    )
    from vllm.entrypoints.launchers.launcher import setup_server

    address, listener = setup_server(namespace, reuse_port=False)
    stopped = False
    with contextlib.closing(listener):
        async with contextlib.AsyncExitStack() as stack:
            with reason_passed_on():
                client = await stack.enter_async_context(build_async_engine_client(namespace))
            shutdown = client.shutdown

            def stop(*args: Any, **kwargs: Any) -> None:
                nonlocal stopped
                stopped = True
                shutdown(*args, **kwargs)

            client.shutdown = stop  # the first thing that a signal does
            closing = await build_and_serve(
                client, address, listener, namespace, timeout_graceful_shutdown=_GRACE
            )
            ended = not stopped
        await closing
    if ended:
        raise EngineError("vLLM's engine ended; the reason is in the lines above")


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A signal ends this process at once, until vLLM has handlers in the event loop.

    A KeyboardInterrupt can be lost in what vLLM imports, and while its engine starts vLLM goes on
    after one, and waits ten minutes for the engine.
    """
    import psutil  # noqa: F401 - for the handler, which may run in the middle of an import

    def end(number: int, frame: FrameType | None) -> NoReturn:
        _end_at_once()

    before = {each: signal.signal(each, end) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is end:
                signal.signal(number, handler)


def _end_at_once() -> NoReturn:
    """End this process and those that it started."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    print("interrupted while vLLM was starting", file=sys.stderr, flush=True)
    os._exit(130)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _vllm_arguments(config: ServeConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """vLLM's engine arguments."""
    given: dict[str, Any] = {
        "disable_log_stats": False,
        "generation_config": "vllm",  # a model's own defaults would truncate q* unasked
        **config.engine.settings,
    }
    return engine_arguments(
        config.models, config.mixture, config.engine, vocabulary, given, full_batches=False
    )


def _namespace(config: ServeConfig, arguments: Mapping[str, Any]) -> Any:
    """Arguments of vLLM's server: its defaults with `arguments` and the options of the command.

    Raises ConfigError for a name that vLLM's parser does not know.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    own = {
        **arguments,
        "host": config.host,
        "port": config.port,
        "middleware": ["optimal_sampling.serve.middleware.RequestMiddleware"],
        "served_model_name": [config.served_model_name or config.models.teacher],
        "api_server_count": 1,
        "disable_fastapi_docs": True,
    }
    for name, value in own.items():
        if not hasattr(namespace, name):
            raise ConfigError(f"this version of vLLM has no server argument {name}")
        setattr(namespace, name, value)
    validate_parsed_serve_args(namespace)
    return namespace
