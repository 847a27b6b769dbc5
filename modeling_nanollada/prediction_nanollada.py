"""Logits of open positions: from the whole row, from a window behind an exact cache, or from a frozen context."""

import itertools

import torch

from .cache_nanollada import BlockCache
from .canvas_nanollada import Canvas
from .generation_config_nanollada import require
from .rules_nanollada import edits_tokens
from .versions_nanollada import must_verify, verify_cached


def predictor(model, canvas: Canvas, settings):
    """The cheapest predictor that the settings allow."""
    name = settings.approximate_cache
    in_blocks = model.config.block_length is not None
    message = f"`approximate_cache` is for models without `config.block_length`, whose cache is exact, got {name!r}"
    require(name is None or not in_blocks, message)
    message = f"`approximate_cache` needs `use_cache`, got {name!r} and {settings.use_cache}"
    require(name is None or settings.use_cache, message)
    message = f"`approximate_cache` is for models without `config.label_shift`, got {name!r}"
    require(name is None or not model.config.label_shift, message)
    if name is not None:
        return FrozenContext(model, canvas, settings)
    return (CachedBlocks if in_blocks and settings.use_cache else WholeRows)(model, canvas, settings)


class Predictor:
    """
    Reads the canvas with the model.

    Args:
        model ([`NanoLLaDAForMaskedLM`]): The model.
        canvas ([`Canvas`]): The rows.
        settings ([`NanoLLaDAGenerationConfig`]): For `cfg_scale`, `grow_length` and the caches.
    """

    def __init__(self, model, canvas: Canvas, settings):
        self.model, self.canvas, self.cfg_scale = model, canvas, settings.cfg_scale
        self.block_length, self.grow_length = model.config.block_length, settings.grow_length
        self.static = settings.cache_implementation == "static"
        self.options = {"return_dict": True} | ({"edit_tokens": True} if edits_tokens(settings) else {})

    def start_block(self, block: torch.BoolTensor, columns: slice) -> None:
        """The open positions `block`, `[B, W]`, all in `columns`, are next."""
        self.rows = block.any(1).nonzero()[:, 0]  # [S]
        self.width = columns.stop if self.grow_length else block.shape[1]

    def predict(self, active: torch.BoolTensor) -> torch.FloatTensor:
        """Logits `[N, V]` of the positions `active`, `[B, W]`, row by row; with guidance from two rows in one pass."""
        raise NotImplementedError

    def read(self, ids, given, active, visible, **kwargs):
        """One forward pass over `ids`, `[S, Q]`: logits of the positions `active`. `given` is hidden for guidance."""
        if self.cfg_scale:
            ids = torch.cat((ids, ids.masked_fill(given, self.model.config.mask_token_id)))  # [2S, Q]
            active = active.repeat(2, 1)
            visible = None if visible is None else visible.repeat(2, 1)
            if "position_ids" in kwargs:  # a row's are also those of its copy
                kwargs["position_ids"] = kwargs["position_ids"].repeat(2, 1)
        mask = None if visible is None else visible.long()
        options = self.options | kwargs
        logits = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=active, **options).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.cfg_scale:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (self.cfg_scale + 1) * (conditional - unconditional)
        return logits


class WholeRows(Predictor):
    """The reference: every step reads the row again, up to the end of what it may see."""

    def start_block(self, block, columns):
        super().start_block(block, columns)
        if self.block_length is not None:  # later blocks are not seen
            positions = self.canvas.visible.long().cumsum(1) - 1  # [B, W]
            open_positions = positions.masked_fill(~block, -1).amax(1, keepdim=True) // self.block_length
            seen = (positions // self.block_length <= open_positions)[self.rows]
            self.width = int(seen.sum(1).max())

    def predict(self, active):
        rows, canvas = active.any(1).nonzero()[:, 0], self.canvas
        visible = None if canvas.all_visible else canvas.visible[rows, : self.width]
        ids, given = canvas.ids[rows, : self.width], canvas.given[rows, : self.width]
        return self.read(ids, given, active[rows, : self.width], visible)


class CachedBlocks(Predictor):
    """
    Exact, for block-causal models: keys and values of a finished block depend on no later one, so they are computed
    once, together with the first step of the next block.

    Rows may begin at different columns and stand in different blocks. Each forward reads, of every row, the blocks
    that are finished but not cached (flush right, the gaps hidden) and the block at work. Behind the pass, the
    first are kept and the block at work is forgotten.
    """

    def __init__(self, model, canvas, settings):
        super().__init__(model, canvas, settings)
        self.whole_rows = WholeRows(model, canvas, settings)  # the reference, on a transformers that nobody has tested
        self.order = (~canvas.visible).int().argsort(dim=1, stable=True)  # [B, W], column of each position of the row
        self.slots = torch.arange(len(canvas.ids), device=self.order.device)  # the rows in the cache
        self.done = torch.zeros_like(self.slots)  # [B], cached blocks of each row
        self.capacity = self.room() if self.static else None
        self.cache = BlockCache(self.model.config.num_hidden_layers, self.capacity)
        self.kept = torch.zeros(len(self.slots), 0, dtype=torch.bool, device=self.order.device)  # [S, K], no gap
        self.gaps = False

    def room(self) -> int:
        """Keys that will ever stand in the cache, gaps included: the blocks at work are known from the start."""
        positions = (self.canvas.visible.long().cumsum(1) - 1) // self.block_length  # [B, W]
        paths = []
        for row, open_columns in enumerate(self.canvas.undecided):
            pairs = torch.stack((self.canvas.blocks[row], positions[row]))[:, open_columns].unique(dim=1)
            paths.append([0, *pairs[1].tolist()])  # the model's block in each turn
        paths = [path + path[-1:] * (max(map(len, paths)) - len(path)) for path in paths]
        turns = zip(*([after - before for before, after in itertools.pairwise(path)] for path in paths), strict=True)
        return self.block_length * (sum(map(max, turns)) + 1)

    def start_block(self, block, columns):
        super().start_block(block, columns)
        self.whole_rows.start_block(block, columns)
        size, canvas = self.block_length, self.canvas
        if len(self.rows) < len(self.slots):  # finished rows leave
            stay = torch.isin(self.slots, self.rows).nonzero()[:, 0]
            self.slots, self.kept = self.slots[stay], self.kept[stay]
            self.cache.select(torch.cat((stay, stay + len(self.done))) if self.cfg_scale else stay)
            self.done = self.done[stay]
        position = (canvas.visible.long().cumsum(1) - 1).masked_fill(~block, block.shape[1]).amin(1)[self.slots]
        self.current = position // size  # [S]
        self.pending = size * int((self.current - self.done).max())
        index = torch.arange(-self.pending, size, device=position.device) + size * self.current[:, None]  # [S, P + B]
        self.real = index >= size * self.done[:, None]  # the others are gaps
        self.gaps |= not bool(self.real.all())
        self.index = index.clamp(min=0)
        self.columns = self.order[self.slots].gather(1, self.index)

    def predict(self, active):
        canvas, slots, columns = self.canvas, self.slots[:, None], self.columns
        visible = torch.cat((self.kept, self.real), dim=1)  # [S, K + P + B]
        if self.capacity is not None:
            visible = torch.nn.functional.pad(visible, (0, self.capacity - visible.shape[1]))
        elif not self.gaps:
            visible = None
        logits = self.read(
            canvas.ids[slots, columns],
            canvas.given[slots, columns],
            active[slots, columns] & self.real,
            visible,
            position_ids=self.index,
            cache=self.cache,
        )
        if self.kept.shape[1] and must_verify("blocks"):
            verify_cached("blocks", logits, self.whole_rows.predict(active))
        if self.pending:
            self.kept = torch.cat((self.kept, self.real[:, : self.pending]), dim=1)
            self.cache.keep(self.kept.shape[1])
            self.columns, self.index, self.real = (
                part[:, self.pending :] for part in (self.columns, self.index, self.real)
            )
            self.done, self.pending = self.current, 0
        return logits


class FrozenContext(Predictor):
    """
    Approximate, for models that see the whole row (Fast-dLLM, arXiv 2505.22618, §3.2): a block's first step reads all;
    its later steps take keys and values outside from there, of what is before the block ("prefix") or of all ("dual").
    """

    def __init__(self, model, canvas, settings):
        super().__init__(model, canvas, settings)
        self.dual = settings.approximate_cache == "dual"

    def start_block(self, block, columns):
        super().start_block(block, columns)
        self.cache = BlockCache(self.model.config.num_hidden_layers, self.width if self.static else None)
        self.first = 0
        self.stop = columns.stop if self.dual else self.width
        self.begin = columns.start

    def predict(self, active):
        logits = self.read_window(active)
        self.first = self.begin
        self.cache.keep(self.begin, self.width if self.dual else None)
        if must_verify("frozen"):  # nothing has changed since the whole row was read
            verify_cached("frozen", self.read_window(active), logits)
        return logits

    def read_window(self, active):
        """Logits `[N, V]` of the positions `active`; a block's first step reads the whole row."""
        canvas, rows = self.canvas, self.rows
        window = slice(self.first, self.stop if self.first else self.width)
        positions = (canvas.visible.long().cumsum(1) - 1).clamp(min=0)[rows, window]
        return self.read(
            canvas.ids[rows, window],
            canvas.given[rows, window],
            active[rows, window],
            None if canvas.all_visible else canvas.visible[rows, : self.width],
            position_ids=positions,
            cache=self.cache,
        )
