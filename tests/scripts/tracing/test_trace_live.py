"""Looking on while a text comes about."""

import threading

import pytest
import torch

from nanollada.scripts.tracing.live import LiveRecorder, Stopped, follow
from nanollada.scripts.tracing.pieces import trace_cells


def test_the_text_is_shown_while_it_comes_about(tokenizer):
    """Each step waits until the last was seen: so every one is."""
    recorder, taken = LiveRecorder(tokenizer), threading.Semaphore(0)
    mask = tokenizer.mask_token_id

    def write():
        recorder.put(torch.tensor([5]))
        for decided in range(1, 4):
            recorder.put_draft(torch.tensor([[7] * decided + [mask] * (3 - decided)]))
            assert taken.acquire(timeout=10)
        recorder.put(torch.tensor([7, 7, 7]))
        recorder.end()

    seen = []
    for step in follow(recorder, write):
        seen.append((step, sum(cell.piece.kind == "mask" for cell in trace_cells(recorder, step)[0])))
        taken.release()
    assert seen == [(1, 2), (2, 1), (3, 0)] and recorder.ended


def test_nobody_waits_for_a_text_that_is_not_looked_at(tokenizer):
    recorder, ended = LiveRecorder(tokenizer), []

    def write():
        recorder.put(torch.tensor([5]))
        try:
            for token in range(50_000):
                recorder.put(torch.tensor([token % 100]))
        except Stopped:
            ended.append(True)
            raise

    steps = follow(recorder, write)
    assert next(steps) >= 1
    steps.close()
    assert ended == [True]


def test_errors_come_through_after_the_last_step(tokenizer):
    recorder, seen = LiveRecorder(tokenizer), []

    def write():
        recorder.put(torch.tensor([5]))
        recorder.put(torch.tensor([6]))
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        for step in follow(recorder, write):
            seen.append(step)
    assert seen == [1]


def test_the_clock_can_be_started_anew(tokenizer):
    recorder = LiveRecorder(tokenizer)
    recorder.started -= 100
    recorder.restart()
    recorder.put(torch.tensor([5]))
    recorder.put(torch.tensor([6]))
    assert recorder.seconds[0] < 50
