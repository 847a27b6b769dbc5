"""A recorded denoising, without a model: what tests of pages share."""

import torch

from nanollada.scripts.tracing.recorder import TraceRecorder


def recorded(tokenizer):

    trace = TraceRecorder(tokenizer)
    ids, mask = tokenizer("the cat").input_ids, tokenizer.mask_token_id
    trace.put(torch.tensor(ids))
    trace.put_draft(torch.tensor([[mask, ids[0]]]))
    trace.put_draft(torch.tensor([[ids[1], ids[0]]]))
    trace.put(torch.tensor([ids[1], ids[0]]))
    trace.end()
    return trace
