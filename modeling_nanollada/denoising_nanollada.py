"""The denoising loop: block by block, left to right, until nothing is masked."""

import itertools

import torch

from .canvas_nanollada import Canvas
from .expansion_nanollada import Expander
from .prediction_nanollada import Predictor
from .rule_nanollada import Step
from .rules_nanollada import expander_of
from .sampling_nanollada import Sampler


class Denoiser:
    """
    Decodes the rows of a canvas.

    Args:
        canvas ([`Canvas`]): The rows, prompt and masks.
        predictor ([`Predictor`]): Reads them with the model.
        sampler ([`Sampler`]): Decides what a step does.
        stopping_criteria (`StoppingCriteriaList`): Asked after each block.
        streamer (`BaseStreamer`, *optional*): Gets the finished columns after each block; see `generate`.
    """

    def __init__(self, canvas: Canvas, predictor: Predictor, sampler: Sampler, stopping_criteria, streamer=None):
        self.canvas, self.predictor, self.sampler = canvas, predictor, sampler
        self.stopping_criteria, self.streamer = stopping_criteria, streamer
        self.expander = None
        if expander_of(sampler.settings) is not None:
            self.expander = Expander(canvas, sampler, predictor.model.config)
        if sampler.rule.edit_tokens:
            canvas.refuse_masks_inside_prompts(sampler.rule.switch)

    def run(self) -> None:
        """Leaves the canvas without masks, but behind the end of rows that were stopped."""
        while self.canvas.undecided.any():
            self.decode(self.canvas.next_block())
            self.canvas.stop_by(self.stopping_criteria)
            if self.streamer is not None and (finished := self.canvas.take_finished_columns()).numel():
                self.streamer.put(finished.cpu())
        if self.streamer is not None:
            self.streamer.end()

    def decode(self, block: torch.BoolTensor) -> None:
        """Decodes the positions `block`, `[B, W]`, of all rows; each row has its own masks, steps and quota."""
        canvas, settings, revises = self.canvas, self.sampler.settings, self.sampler.rule.revises
        masked = block.sum(1)  # [B]
        steps = masked  # [B]
        end = (self.sampler.eos_ids, settings.early_stop, settings.eos_policy == "cut")
        if settings.steps is not None:  # more of them than masks are of use where decisions are taken back
            steps = torch.full_like(masked, settings.steps) if revises else masked.clamp(max=settings.steps)
        columns = self.window(block)
        self.sampler.start_block(len(block), columns.stop - columns.start)
        self.fill(block, columns, masked, steps, end)
        if self.sampler.editor is not None:
            self.edit(block, columns)
        canvas.stop_at_eos(*end)

    def window(self, block: torch.BoolTensor) -> slice:
        """The columns of the positions `block`, `[B, W]`, which the model is to read."""
        begin, last = (int(column) for column in block.any(0).nonzero()[:, 0].aminmax())
        columns = slice(begin, last + 1)
        self.predictor.start_block(block, columns)
        return columns

    def fill(self, block, columns, masked, steps, end) -> None:
        """Steps until the rule leaves a block's rows: with nothing masked, or when it says so."""
        canvas, revises = self.canvas, self.sampler.rule.revises
        finished = torch.zeros_like(canvas.ended)
        for index in itertools.count():
            at_work = (block & canvas.undecided).any(1)
            if self.sampler.rule.reads_all:
                at_work = block.any(1) & ~canvas.ended & ~finished
            elif revises:  # goes on with nothing masked, for some of it may change again
                at_work = block.any(1) & ~canvas.ended & (index < steps)
            rows = at_work.nonzero()[:, 0]  # [R]
            if len(rows) == 0:
                break
            if self.expander is not None:  # the number of masks is not known: one a step at least
                masked = steps = canvas.undecided.sum(1) + index
            done = self.step(block, columns, rows, masked=masked[rows], steps=steps[rows], index=index)
            if self.expander is not None and (block := self.expander.block).any():
                columns = self.window(block)
            finished[rows] = False if done is None else done
            if not revises:
                canvas.stop_at_eos(*end)

    def edit(self, block: torch.BoolTensor, columns: slice) -> None:
        """Edits what the positions `block`, `[B, W]`, hold, step by step; each row until nothing is left to edit."""
        canvas, editor = self.canvas, self.sampler.editor
        places, behind = canvas.editable(block, self.sampler.eos_ids)  # [B, W]
        editor.start(places[:, columns], canvas.ids[:, columns].clone())
        done = ~places.any(1)
        for index in range(self.sampler.settings.max_post_steps):
            rows = (~done).nonzero()[:, 0]  # [R]
            if len(rows) == 0:
                break
            done[rows] = self.edit_step(places, behind, columns, rows, index)

    def edit_step(self, places, behind, columns: slice, rows: torch.LongTensor, index: int):
        """One step of edits: which of the `rows` `[R]` are done. What is `behind` an end, `[B, W]`, has no say."""
        canvas, editor = self.canvas, self.sampler.editor
        window = editor.read(rows, index)  # [R, w]
        read = torch.zeros_like(places)
        read[rows, columns] = window
        ids, visible = canvas.ids.clone(), canvas.visible[rows, : canvas.length]
        canvas.ids[behind | read if editor.remasks else behind] = canvas.mask_token_id
        seen = canvas.ids[rows, : canvas.length]
        logits = self.sampler.shape(self.predictor.predict(read), seen, window.nonzero()[:, 0], visible)  # [N, V]
        canvas.ids = ids
        step = Step(
            rows,
            masked=places[rows].sum(1),
            steps=torch.full_like(rows, self.sampler.settings.max_post_steps),
            index=index,
            active=torch.zeros_like(window),
            decided=places[rows, columns],
            ids=ids[rows, columns],
            logits=logits,
            read=window,
        )
        decision = editor.decide(step, seen)
        canvas.apply(rows, columns, decision)
        self.show(read[:, : canvas.length], logits)
        return decision.finished

    def step(self, block: torch.BoolTensor, columns: slice, rows: torch.LongTensor, **counts) -> None:
        """One step of the `rows` `[R]` in their `block` `[B, W]`, whose `columns` are w; `counts` as in [`Step`]."""
        canvas = self.canvas
        active, decided = block & canvas.undecided, block & ~canvas.undecided  # [B, W]
        read = active
        if self.sampler.rule.reads_all:
            read = torch.zeros_like(block).index_copy(0, rows, block[rows])
        ids, visible = canvas.ids[rows, : canvas.length], canvas.visible[rows, : canvas.length]
        window = active[rows, columns]  # [R, w]
        # 1. Predict the masked positions of the block, N over all rows: none in some steps of a rule that revises.
        logits = torch.zeros(0, self.predictor.model.config.vocab_size, device=ids.device)
        if read.any():
            row_of = read[rows, columns].nonzero()[:, 0]  # [N]
            logits = self.sampler.shape(self.predictor.predict(read), ids, row_of, visible)  # [N, V]
            if self.expander is not None:
                logits = self.expander.exclude(rows, row_of, logits)
        # 2. Choose which of them to decide, and draw their tokens. The others stay masked.
        step = Step(
            rows,
            **counts,
            active=window,
            decided=decided[rows, columns],
            read=read[rows, columns],
            ids=ids[:, columns],
            before=canvas.tokens_before(rows, columns) if self.sampler.rule.reads_all else None,
            logits=logits,
        )
        decision = self.sampler.decide(step, ids)
        if self.expander is not None:
            decision = self.expander.limit(step, decision)
        canvas.apply(rows, columns, decision)
        origin, read = self.moved(rows, columns, decision), read[:, : canvas.length]
        if self.expander is not None:
            origin = self.expander.execute()
        self.show(read, logits, origin)
        return decision.finished

    def moved(self, rows: torch.LongTensor, columns: slice, decision) -> torch.LongTensor | None:
        """`[B, L]`: the column that each position's content stood in before; `None` if a decision moved nothing."""
        if decision.origin is None:
            return None
        origin = self.canvas.columns.repeat(len(self.canvas.ids), 1)
        origin[rows, columns] = (decision.origin + columns.start).masked_fill(decision.origin < 0, -1)
        return origin if bool((origin != self.canvas.columns).any()) else None

    def show(self, active: torch.BoolTensor, logits: torch.FloatTensor, origin=None) -> None:
        """
        Hands a step to the streamers that ask for it.

        Args:
            active (`torch.BoolTensor` of shape `(batch, length)`): The N positions that were read.
            logits (`torch.FloatTensor` of shape `(N, vocab_size)`): What was read.
            origin (`torch.LongTensor` of shape `(batch, length now)`, *optional*): If anything moved, the column that
                each position's content stood in before; negative: what came in.
        """
        columns = slice(self.canvas.put, None)
        if hasattr(self.streamer, "put_confidence"):
            confidence = torch.full(active.shape, torch.nan, dtype=torch.double, device=active.device)
            confidence[active] = logits.softmax(-1, dtype=torch.double).amax(-1)
            self.streamer.put_confidence(confidence[:, columns].cpu())
        if origin is not None and hasattr(self.streamer, "put_moves"):
            self.streamer.put_moves(origin[:, columns].clamp(min=-1).cpu())
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(self.canvas.ids[:, self.canvas.put : self.canvas.length].cpu())
