"""A cache for denoising: the same positions are written again and again until they are final."""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class BlockCacheLayer(CacheLayerMixin):
    """
    Keys and values of one layer, `[rows, heads, capacity, head_dim]`, written in place.

    `update` writes at `start` and moves nothing: the next call overwrites, unless `BlockCache.keep` is told otherwise.

    Args:
        capacity (`int`, *optional*): Room for this many keys at once, all of which `update` returns (static shapes).
            By default the room grows, and `update` returns what was written.
    """

    is_compileable = True
    is_sliding = False
    is_croppable = False

    def __init__(self, capacity: int | None = None):
        super().__init__()
        self.capacity, self.start, self.length = capacity, 0, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, heads, _, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(rows, heads, self.capacity or 0, head_dim)
        self.values = value_states.new_zeros(rows, heads, self.capacity or 0, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.start + key_states.shape[2]
        if end > self.keys.shape[2]:
            if self.capacity is not None:
                raise ValueError(f"A static cache must hold all keys, got room for {self.capacity} and {end} keys")
            more = max(end, 2 * self.keys.shape[2]) - self.keys.shape[2]
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, more))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, more))
        self.keys[:, :, self.start : end] = key_states
        self.values[:, :, self.start : end] = value_states
        end = self.capacity or max(end, self.length)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.capacity or max(self.start + query_length, self.length), 0

    def get_seq_length(self) -> int:
        return self.start

    def get_max_length(self) -> int:
        return self.capacity or -1


class BlockCache(Cache):
    """
    A [`BlockCacheLayer`] per layer.

    Args:
        layers (`int`): Layers of the model.
        capacity (`int`, *optional*): Makes it static.
    """

    def __init__(self, layers: int, capacity: int | None = None):
        super().__init__(layers=[BlockCacheLayer(capacity) for _ in range(layers)])

    def keep(self, start: int, length: int | None = None) -> None:
        """The next keys are written from `start` on; the first `length` (default: `start`) are seen in any case."""
        for layer in self.layers:
            layer.start, layer.length = start, start if length is None else length

    def select(self, rows: torch.LongTensor) -> None:
        """Only these rows go on."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]
