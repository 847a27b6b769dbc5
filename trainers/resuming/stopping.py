"""Ctrl-C and a scheduler's SIGTERM: a run ends behind a whole checkpoint, and says how it goes on."""

import os
import signal
import threading
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """
    A run was ended by a signal. `str()` says what was saved and, if known, how to go on.

    Attributes:
        saved (`str`): What was saved, in a line; empty on all ranks but the first, where nothing is to be printed.
        checkpoint (`str`, *optional*): The checkpoint to go on from.
        command (`str`, *optional*): The command that goes on.
    """

    def __init__(self, saved: str = "", checkpoint: str | None = None, command: str | None = None):
        self.saved, self.checkpoint, self.command = saved, checkpoint, command
        super().__init__(f"{saved}\nGo on with: {command}" if saved and command else saved)


class StopSignals:
    """
    While its body runs, the first SIGINT or SIGTERM is noted; the next one ends the process at once.

    Only the main thread may handle signals: in any other nothing is noted, and signals act as before.

    Attributes:
        requested (`bool`): Whether one came.
    """

    def __init__(self, announce: bool = True):
        self.requested, self._announce, self._before = False, announce, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number, frame):
        self.requested = True
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if self._announce:  # past Python's buffers, which this may have interrupted
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            os.write(2, f"\n{name}: the step is finished and saved; Ctrl-C once more ends at once\n".encode())


def leave_signals_alone(worker: int) -> None:
    """Of a data worker: a terminal sends Ctrl-C to it, too, and the step that is finished needs its rows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def interrupted(stop: KeyboardInterrupt, args, newest: str | os.PathLike | None, command: str | None) -> Interrupted:
    """
    How a run that a signal ended reports itself.

    Args:
        stop: What ended it: [`Interrupted`] behind a checkpoint, or a plain one, before training or behind it.
        args: The trainer's config.
        newest (`str`, *optional*): The newest checkpoint in the folder.
        command (`str`, *optional*): The command that goes on from it.
    """
    if args.process_index:
        return Interrupted()
    if isinstance(stop, Interrupted):
        return Interrupted(stop.saved, stop.checkpoint, command)
    if newest is None:
        return Interrupted("interrupted before anything was saved")
    return Interrupted(f"interrupted; {Path(newest)} is the newest checkpoint", str(newest), command)
