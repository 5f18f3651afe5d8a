"""What happens while a model runs, as lines on standard error: a spinner on a terminal, plain lines elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import Progress as Clock
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from compile_policy.cli.terminal import Terminal, clean
from compile_policy.errors import PolicyWarning
from compile_policy.events import Event, listening
from compile_policy.fallbacks import in_words


class Progress:
    """A sink for events. One component compiles at a time, so one spinner is enough."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self._clock: Clock | None = None
        self._said: set[str] = set()

    def __call__(self, event: Event) -> None:
        handle = getattr(self, f"_on_{event.kind}", None)
        if handle is not None:
            handle(event)

    def _on_compile_start(self, event: Event) -> None:
        text = f"compiling {event.component}"
        if not self.terminal.animated:
            self.terminal.note(f"{text} ...")
            return
        self.stop()
        self.terminal.close_line()
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._clock = Clock(*columns, console=self.terminal.err, transient=True)
        self._clock.add_task(clean(text), total=None)
        self._clock.start()

    def _on_compile_end(self, event: Event) -> None:
        self.stop()
        seconds = event.data.get("seconds")
        took = f" in {seconds:.1f} s" if isinstance(seconds, int | float) else ""
        blocks = f", {event.data['blocks']}" if event.data.get("blocks") else ""
        self.terminal.note(f"compiled {event.component}{took}{blocks}", style="green")

    def _on_loaded(self, event: Event) -> None:
        self.terminal.note(f"{event.component}: {event.message}", style="green")

    def _on_waiting(self, event: Event) -> None:
        self.terminal.note(f"{event.component or 'cache'}: {event.message}", style="yellow")

    def _on_unsaved(self, event: Event) -> None:
        self.terminal.note(f"{event.component}: {event.message}", style="dim")

    def _on_fallback(self, event: Event) -> None:
        self.stop()
        self.warn(in_words(event.component, str(event.data["reason"]), str(event.data["remedy"])))

    def _on_budget(self, event: Event) -> None:
        self.warn(f"{event.component}: {event.message}")

    def _on_new_entry(self, event: Event) -> None:
        self.terminal.note(f"{event.component}: {event.message}", style="yellow")

    def warn(self, message: str) -> None:
        """One warning; the same one, told by an event and by Python's warnings, is printed once."""
        if message in self._said:
            return
        self._said.add(message)
        self.terminal.warn(message)

    def stop(self) -> None:
        """Take the spinner away and give the cursor back."""
        if self._clock is not None:
            self._clock.stop()
            self._clock = None


@contextmanager
def progress(terminal: Terminal, *, debug: bool = False, shown: Progress | None = None) -> Iterator[Progress]:
    """Show events and our own warnings inside the block; warnings of other packages only with ``debug``."""
    shown = shown or Progress(terminal)

    def show(message: Warning | str, category: type[Warning], *where: Any, **_: Any) -> None:
        if issubclass(category, PolicyWarning):
            shown.warn(str(message))
        elif debug:
            terminal.warn(f"{category.__name__}: {message}")

    with warnings.catch_warnings(), listening(shown):
        warnings.simplefilter("default")
        warnings.showwarning = show
        try:
            yield shown
        finally:
            shown.stop()
