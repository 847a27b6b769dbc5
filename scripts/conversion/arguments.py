"""What is converted to what."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nanollada.scripts.conversion.families.registry import named, names, written
from nanollada.scripts.conversion.shape import SHAPE

RECORD = "conversion.json"
OURS = ("causal", "masked")


@dataclass
class ConvertArguments:
    """
    What is converted to what.

    Raises:
        `ValueError`: for an unknown target, an output that is not empty, and a shape or tokenizer for the way back.
    """

    source: str = field(
        metadata={
            "help": f"Folder or .pt, .pth or .safetensors file of {', '.join(names())}, or a folder of nanollada."
        }
    )
    to: Literal[(*OURS, *names(written))] = field(
        metadata={"help": f"causal or masked (nanollada's AR and diffusion model), {', '.join(names(written))}."}
    )
    output: str = field(metadata={"help": "New folder."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder with the tokenizer. Default: the source's. Gains <|mask|> if needed."}
    )
    num_attention_heads: int | None = field(
        default=None,
        metadata={"help": "Query heads: this and the next five are for weights that come without a config."},
    )
    hidden_act: str | None = field(default=None, metadata={"help": "Activation of the MLP, e.g. silu."})
    rms_norm_eps: float | None = field(default=None, metadata={"help": "Epsilon of the norms, e.g. 1e-5."})
    max_position_embeddings: int | None = field(default=None, metadata={"help": "Longest sequence, e.g. 32768."})
    rope_parameters: dict | str | None = field(
        default=None, metadata={"help": 'RoPE as JSON, e.g. {"rope_theta": 1e6}, with the keys that transformers has.'}
    )
    architecture: str | None = field(
        default=None,
        metadata={"help": f"Whose forward pass it is, for tensors alone: {', '.join(names(named))}."},
    )
    verify: bool = field(
        default=True, metadata={"help": "Load the output, and compare its logits with the source's on random ids."}
    )

    def __post_init__(self):
        if isinstance(self.rope_parameters, str):
            self.rope_parameters = json.loads(self.rope_parameters)
        if self.to not in (*OURS, *names(written)):
            raise ValueError(f"`to` must be one of {', '.join((*OURS, *names(written)))}, got {self.to!r}")
        output = Path(self.output)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"`output` must be new or empty, got {self.output}")
        if self.to not in OURS and (self.shape() or self.tokenizer):
            name = next(iter(self.shape()), "tokenizer")
            raise ValueError(f"`{name}` is the nanollada checkpoint's own with `to` {self.to!r}, got one")

    def shape(self) -> dict:
        """What was said of the shape, and whose it is."""
        return {name: getattr(self, name) for name in (*SHAPE, "architecture") if getattr(self, name) is not None}
