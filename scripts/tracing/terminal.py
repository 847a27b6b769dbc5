"""Shows a text in the terminal while it comes about."""

import time

from nanollada.scripts.reporting.tables import require_rich
from nanollada.scripts.tracing.pieces import Replay
from nanollada.scripts.tracing.recorder import EDITS, TraceRecorder

NEWEST, EDITED, STRUCK = "bold black on bright_yellow", "black on bright_magenta", "strike bright_magenta"
STYLES = {"mask": "dim", "special": "dim italic", "bytes": "dim"}


class TerminalWatcher(TraceRecorder):
    """
    Also shows the text while it comes about: in a terminal the whole row, redrawn after each denoising step, with
    undecided tokens as dim blocks and the newest ones highlighted; elsewhere a line per denoising step. What a step
    takes away stands struck through before what it puts there (`old→new` without colours), and a token that replaced
    another keeps a colour. The tokens of an AR model are just written. The finished text is left to the caller (an AR
    model's stands there already).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        console (`rich.console.Console`, *optional*): Where to. Defaults to the standard output.
        delay (`float`, defaults to 0.0): Seconds to wait after each redrawn step.

    Raises:
        `ValueError`: if rich is missing; and as [`TraceRecorder`].
    """

    def __init__(self, tokenizer, console=None, delay: float = 0.0):
        require_rich("`watch`")
        from rich.console import Console

        super().__init__(tokenizer)
        self.replay, self.cells = Replay(self), []
        self.console = console or Console()
        self.delay = delay
        self.live = None
        self.written = ""

    def put(self, value):
        super().put(value)
        if self.steps and not self.is_diffusion:
            self._write()

    def put_draft(self, value):
        super().put_draft(value)
        if len(self.steps) == 1:
            self.replay.take(0, self.start, False)
        self.cells = self.replay.take(len(self.steps), list(self.ids), True)
        if not self.console.is_terminal:
            self.console.print(self.render(with_prompt=False), soft_wrap=True)
            return
        if self.live is None:
            from rich.live import Live

            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        self.live.update(self.render(), refresh=True)
        time.sleep(self.delay)

    def end(self):
        super().end()
        self.close()
        if self.steps and not self.is_diffusion:
            self._write(last=True)

    def close(self):
        """Gives the terminal back; also to be called when `generate` was interrupted."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _write(self, last: bool = False) -> None:
        """What is new, up to the last whole character."""
        text = self.tokenizer.decode(self.ids[len(self.prompt) :], skip_special_tokens=True)
        text = text if last else text.rstrip("\ufffd")
        self.console.file.write(
            text[len(self.written) :] + "\n" * last
        )  # as it is: rich would drop control characters
        self.console.file.flush()
        self.written = text

    def render(self, with_prompt: bool = True):
        """Counts and the row as `rich.text.Text`; without the prompt (unless it is filled) all in one line."""
        from rich.text import Text

        newest, mask = self.newest(len(self.steps)), self.tokenizer.mask_token_id
        places = sum(cell.when > 0 or cell.piece.kind == "mask" for cell in self.cells)
        text = Text().append(f"step {len(self.steps)}, {places - self.ids.count(mask)} of {places} tokens", "bold")
        counts = self.counts[-1]
        text.append("".join(f", {counts[name]} {name}" for name in EDITS if counts[name]), "bold")
        text.append("\n" if with_prompt else ": ")
        for column, cell in enumerate(self.cells):
            given = cell.when == 0 and cell.piece.kind != "mask"
            if given and not with_prompt and mask not in self.prompt:
                continue
            edited = EDITED if cell.was is not None and not given else ""
            style = edited or (NEWEST if column in newest else STYLES.get(cell.piece.kind, "dim" * given))
            arrow = "→" * (bool(cell.struck) and not self.console.is_terminal)
            for part, colour in ((cell.struck, STRUCK), (arrow, ""), (cell.piece.text, style)):
                text.append(part if with_prompt else part.replace("\n", "↵"), colour)
        return text
