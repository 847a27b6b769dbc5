"""How a program ends: a user's mistake is one line and exit status 2; a fault of ours shows where it happened."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

# What says that something given can't be used: values, files, addresses, a learning rate under which the run diverges.
# All others (KeyError, TypeError, AssertionError, RuntimeError …) are faults of the program.
USERS = (ValueError, OSError, FloatingPointError)
TRACEBACK = "--traceback"
PATIENCE = 5  # seconds in which the first rank's end ends the others


def one_line(error: BaseException) -> str:
    """What an exception says, on one line; of one that no line of ours raised, also how to see more."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.strerror}: {error.filename}"
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    ours = place is None or place.tb_frame.f_globals.get("__name__", "").split(".")[0] in ("nanollada", "__main__")
    more = "" if ours else f" ({type(error).__name__}; {TRACEBACK} shows where)"
    return " ".join(text.split()) + more


def _is_other_rank() -> bool:
    return os.environ.get("RANK", "0") != "0"


def end(message: str) -> NoReturn:
    """
    Prints `error: …` and exits with status 2. Of several ranks that end alike, the first one prints: the launcher
    stops the others while they wait; one that still lives then is alone with its error and prints it.
    """
    if _is_other_rank():
        time.sleep(PATIENCE)
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def run_program(main: Callable[[list[str]], object], argv: list[str] | None = None) -> NoReturn:
    """
    Runs a program's `main` with the command line, and exits with the status that it returns, if it returns one; 2 for
    a user's mistake, 130 for Ctrl-C.

    Args:
        main (`Callable`): Takes the words behind the program's name. From Python it raises what this catches.
        argv (`list[str]`, *optional*): Those words. Defaults to this process's.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        status = main([word for word in words if word != TRACEBACK])
    except KeyboardInterrupt as stop:
        if text := str(stop) or ("" if _is_other_rank() else "interrupted"):
            print(text, file=sys.stderr, flush=True)
        raise SystemExit(130) from None  # as a shell has it
    except BrokenPipeError:  # whoever read the output has seen enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except USERS as error:
        if TRACEBACK in words:
            traceback.print_exception(error)
        end(one_line(error))
    raise SystemExit(status if isinstance(status, int) else 0)
