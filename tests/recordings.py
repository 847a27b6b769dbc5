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


def denoised(tokenizer, prompt, answer, order=None, ended=True):
    """The denoising of token ids behind a prompt's; `order` holds the places of each step, by default one each."""
    trace, row = TraceRecorder(tokenizer), [tokenizer.mask_token_id] * len(answer)
    trace.put(torch.tensor(prompt))
    for places in [[place] for place in range(len(answer))] if order is None else order:
        for place in places:
            row[place] = answer[place]
        trace.put_draft(torch.tensor([row]))
    if ended:
        trace.put(torch.tensor(row))
        trace.end()
    return trace


def written(tokenizer, prompt, answer, ended=True):
    """The same text as an AR model writes it."""
    trace = TraceRecorder(tokenizer)
    trace.put(torch.tensor(prompt))
    for token in answer:
        trace.put(torch.tensor([token]))
    if ended:
        trace.end()
    return trace
