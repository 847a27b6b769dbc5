"""A trace that one thread writes while another looks on."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from nanollada.scripts.tracing.recorder import TraceRecorder


class Stopped(Exception):
    """Nobody looks on any more."""


class LiveRecorder(TraceRecorder):
    """
    A [`TraceRecorder`] that says when there is more to see, and that ends a `generate` call nobody waits for.

    Attributes:
        changed (`threading.Event`): Set after each step.
        stopped (`threading.Event`): Once it is set, the next step raises [`Stopped`].
    """

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.changed, self.stopped = threading.Event(), threading.Event()

    def restart(self) -> None:
        """Starts the clock anew, right before `generate` is called."""
        self.started = time.perf_counter()

    def _change(self, start: int, ids: list[int]) -> None:
        super()._change(start, ids)
        self.changed.set()
        if self.stopped.is_set():
            raise Stopped


def follow(recorder: LiveRecorder, write: Callable[[], object]) -> Iterator[int]:
    """
    Runs `write` in a thread, and yields the number of steps whenever it has grown; steps that come faster than they
    are taken are skipped, the last one never. Closing it ends the call after its next step.

    Args:
        recorder ([`LiveRecorder`]): What `write` writes to.
        write (`Callable`): Calls `generate`.

    Raises:
        whatever `write` does.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        call = pool.submit(write)
        call.add_done_callback(lambda _: recorder.changed.set())
        try:
            yield from _news(recorder, call)
            call.result()
        finally:
            recorder.stopped.set()


def _news(recorder: LiveRecorder, call: Future) -> Iterator[int]:
    seen = 0
    while not call.done() or len(recorder.steps) > seen:
        recorder.changed.wait()
        recorder.changed.clear()
        if len(recorder.steps) > seen:
            seen = len(recorder.steps)
            yield seen
