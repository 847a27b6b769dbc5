"""Models whose word on every token is exact, for tests of edits: a chain as a masked-diffusion model."""

import torch
from toy_law import FIRST, KINDS, LENGTH, MASK, WEIGHTS, chain, conditionals

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM
from nanollada.modeling_nanollada.sampling_nanollada import Sampler

# Drafted all at once, a row's law is 0.36 off.
NEXT = torch.tensor([[0.401, 0.301, 0.298], [0.199, 0.399, 0.402], [0.701, 0.101, 0.198]], dtype=torch.double)
ROWS, LAW = chain(FIRST, NEXT)
TABLE = conditionals(FIRST, NEXT)


class ExactChain(NanoLLaDAForMaskedLM):
    """
    p(x_i | all that is visible) at masks; at visible tokens a copy of them, as an untrained model gives it, or with
    `edits` p(x_i | the others).
    """

    def __init__(self, edits=False):
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        tokens = {"eos_token_id": None, "pad_token_id": None, "bos_token_id": None, "mask_token_id": MASK}
        super().__init__(NanoLLaDAConfig(vocab_size=KINDS + 1, **tokens, **shape))
        self.edits, self.calls = edits, 0

    def forward(self, input_ids, attention_mask=None, logits_to_keep=None, return_dict=True, **kwargs):
        self.calls += 1
        rows = input_ids[:, None, :].expand(-1, LENGTH, -1)  # [B, 6, 6]: a row for each of its positions
        if self.edits:
            rows = torch.where(torch.eye(LENGTH, dtype=torch.bool), MASK, rows)
        exact = TABLE[(rows * WEIGHTS).sum(-1)]  # [B, 6, 6, 4]
        logits = exact[:, torch.arange(LENGTH), torch.arange(LENGTH)].log()
        return type("Output", (), {"logits": logits[logits_to_keep]})()


def log_law(rows):
    """log p of finished rows, `[..., 6]`."""
    return FIRST[rows[..., 0]].log() + NEXT[rows[..., :-1], rows[..., 1:]].log().sum(-1)


def drafted(monkeypatch, rows):
    """Makes the first draw of a call write `rows`; gives the list of all distributions that were drawn from."""
    seen, draw = [], Sampler.draw

    def first(self, logits, ids, row_of):
        seen.append((logits / (self.settings.temperature or 1)).softmax(-1, dtype=torch.double))
        return rows.flatten().clone() if len(seen) == 1 else draw(self, logits, ids, row_of)

    monkeypatch.setattr(Sampler, "draw", first)
    return seen


class Drafts:
    """A streamer that keeps the rows after each step."""

    def __init__(self):
        self.rows = []

    def put(self, value):
        """Finished columns are in the drafts."""

    def end(self):
        """Nothing more comes."""

    def put_draft(self, value):
        self.rows.append(value.clone())
