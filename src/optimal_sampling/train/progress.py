"""Loss, rate and time left while a model is trained: a bar on a terminal, lines on a pipe."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback

__all__ = ["TrainingProgress"]

_SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress(TrainerCallback):  # type: ignore[misc]
    """Shows what the trainer logs. Only in the main process."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: Progress | None = None
        self._first_step, self._first_tokens, self._started, self._due = 0, 0.0, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, and the bar on a terminal."""
        self._first_step, self._started, self._due = state.global_step, time.monotonic(), 0.0
        if state.is_world_process_zero and self._stream.isatty():
            self._bar = Progress(
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total} updates, {task.fields[status]}"),
                TimeElapsedColumn(),
                console=Console(file=self._stream),
            )
            self._bar.add_task("train", total=state.max_steps, status="")
            self._bar.start()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Show a log of the trainer."""
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self._line(f"validation loss {logs['eval_loss']:.4f} after {state.global_step} updates")
        if "loss" not in logs:
            return
        status = self._status(state, logs)
        last = state.global_step >= state.max_steps
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step, status=status)
        elif last or time.monotonic() >= self._due:
            self._due = time.monotonic() + _SECONDS_BETWEEN_LINES
            self._line(f"{state.global_step}/{state.max_steps} updates, {status}")

    def _line(self, text: str) -> None:
        """A line, above the bar where there is one."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.console.print(text)

    def _status(self, state: Any, logs: dict[str, Any]) -> str:
        seconds = time.monotonic() - self._started
        done = max(1, state.global_step - self._first_step)
        left = timedelta(seconds=round(seconds / done * (state.max_steps - state.global_step)))
        tokens = float(logs.get("num_tokens", 0))
        rate = f"{tokens / seconds:.0f} tokens/s" if seconds else ""
        return (
            f"loss {logs['loss']:.4f}, learning rate {logs['learning_rate']:.2g}, "
            f"{rate}, {done / max(seconds, 1e-9):.2f} updates/s, {left} left"
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
