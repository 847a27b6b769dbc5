"""The threshold that a trainer writes: chosen where enumeration says, on rows that nothing but the seed decides."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from generation_models import EOS, MASK, PAD, SHAPE, VOCABULARY, build
from transformers.modeling_outputs import MaskedLMOutput

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM
from nanollada.trainers.decoding import threshold as module
from nanollada.trainers.decoding.threshold import (
    CANDIDATES,
    LOSS,
    Answer,
    Question,
    affordable_rows,
    choose,
    choose_threshold,
    decode_rows,
    draw,
    questions_of,
)


class Hasty(NanoLLaDAForMaskedLM):
    """
    Behind a prompt token p its answer is 10 + p, 20 + p, EOS. As long as the first is open, the second looks like 30,
    with the probability `sureness[p]`, which is also the first one's: decided together, they are wrong.
    """

    def __init__(self, sureness):
        super().__init__(NanoLLaDAConfig(vocab_size=VOCABULARY, eos_token_id=EOS, mask_token_id=MASK, **SHAPE))
        self.sureness = torch.tensor(sureness, dtype=torch.double)
        self.generation_config.update(eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=4, eos_policy="cut")
        self.asked = []

    def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, **kwargs):
        prompt, early = input_ids[:, 0], input_ids[:, 1] == MASK
        token = torch.full_like(input_ids, EOS)
        sure = torch.full(input_ids.shape, 0.99999, dtype=torch.double)
        token[:, 1], sure[:, 1] = 10 + prompt, self.sureness[prompt]
        token[:, 2] = torch.where(early, 30, 20 + prompt)
        sure[:, 2] = torch.where(early, self.sureness[prompt] - 1e-6, sure[:, 2])
        rest = (1 - sure) / (VOCABULARY - 2)
        logits = rest[..., None].repeat(1, 1, VOCABULARY).scatter(-1, token[..., None], sure[..., None]).log()
        logits[..., MASK] = -torch.inf
        return MaskedLMOutput(logits=logits[logits_to_keep])


def rows_of(prompts):
    rows = [{"input_ids": [p, 10 + p, 20 + p, EOS], "labels": [-100, 10 + p, 20 + p, EOS]} for p in prompts]
    return [*rows, {"input_ids": [5, 15], "labels": [-100, 15]}]  # its answer was cut


def trainer_of(model, rows, **settings):
    """As much of a trainer as the choice asks for."""
    args = {"threshold_rows": 4, "seed": 0, "per_device_eval_batch_size": 3, "process_index": 0, "world_size": 1}
    return SimpleNamespace(
        args=SimpleNamespace(**{**args, **settings}),
        plain_model=model.train(),
        rows=SimpleNamespace(eval=rows),
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
        state=SimpleNamespace(num_input_tokens_seen=torch.tensor(0)),
        averaged_weights=nullcontext,
        is_world_process_zero=lambda: True,
    )


@pytest.mark.parametrize("surest", [0.5, 0.93, 0.96, 0.98, 0.992, 0.997, 0.9995])
def test_the_lowest_threshold_that_loses_nothing(surest):
    """Of a model whose probabilities are known it is the lowest candidate that they don't exceed."""
    sureness = [0.5] * VOCABULARY
    sureness[6] = surest
    model = Hasty(sureness)
    choice = choose_threshold(trainer_of(model, rows_of([4, 5, 6, 7])))
    expected = min((value for value in CANDIDATES if value > surest), default=None)
    assert choice["threshold"] == expected and choice["rows"] == 4
    first, *tried = choice["tried"]
    assert first["threshold"] is None and first["exact_match"] == 1.0
    assert [record["threshold"] for record in tried] == list(CANDIDATES[: len(tried)])
    assert all(record["exact_match"] == 1.0 for record in tried if record["threshold"] > surest)
    if surest > min(CANDIDATES):
        last = tried[-1]
        assert (last["exact_match"], last["lost"], last["gained"]) == (0.75, 1, 0)
    assert model.training, "as it was before"


def test_passes_are_counted():
    model = Hasty([0.5] * VOCABULARY).eval()
    (one,) = decode_rows(model, [Question([4], [14, 24])], 1, None)
    assert (one.ids, one.ended, one.passes) == ([14, 24], True, 3.0)
    (fast,) = decode_rows(model, [Question([4], [14, 24])], 1, 0.4)
    assert (fast.ids, fast.ended, fast.passes) == ([14, 30], True, 1.0)


def scripted(critical, references):
    """Answers that are right from a row's critical threshold on; below it another token stands there."""

    def decode(threshold):
        right = [threshold is None or threshold >= value for value in critical]
        answers = [list(ids) if good else [*ids[:-1], 99] for ids, good in zip(references, right, strict=True)]
        return [Answer(ids, True, 1.0) for ids in answers]

    return decode


def test_free_text_may_change_a_little():
    """No answer is the reference; the likeness to it decides, within half a point, and the order is kept."""
    references = [[i, *range(50)] for i in range(100)]

    def decode(threshold):
        wrong = {None: 1, 0.999: 1, 0.995: 2, 0.99: 9}.get(threshold, 0)  # 0: the first that fails ends it
        return [Answer([*ids[: len(ids) - wrong], *[99] * wrong], True, 1.0) for ids in references]

    threshold, records = choose(decode, references)
    assert threshold == 0.999 and [record["threshold"] for record in records] == [None, 0.999, 0.995]
    assert records[2]["likeness_difference"] == pytest.approx(-1 / 51)

    def seldom(threshold):
        loss = 0 if threshold is None or threshold > 0.96 else 10
        return [
            Answer([99, *ids[1:]] if i >= loss else [99, 98, *ids[2:]], True, 2.0) for i, ids in enumerate(references)
        ]

    threshold, records = choose(seldom, references)
    assert threshold == min(CANDIDATES) and records[-1]["likeness_difference"] == pytest.approx(-0.1 / 51)
    assert records[-1]["standard_error"] > 0 and records[-1]["tokens_per_forward"] == 26.0


def test_a_gain_makes_up_for_a_loss_and_an_unended_answer_is_wrong():
    references = [[7, 8]] * 3
    decode = scripted([0.0, 0.96, 0.0], references)

    def swapped(threshold):
        first, second, third = decode(threshold)
        third = third if threshold is not None and threshold < 0.96 else Answer([7, 8], False, 1.0)
        return [first, second, third]

    threshold, records = choose(swapped, references)
    assert records[0]["exact_match"] == pytest.approx(2 / 3)
    assert records[5]["threshold"] == 0.95 and (records[5]["lost"], records[5]["gained"]) == (1, 1)
    assert threshold == 0.97, "the likeness fell"


def test_questions_are_the_last_answers():
    chat = {"input_ids": [1, 4, EOS, 5, 6, 7, EOS], "labels": [-100, 4, EOS, -100, 6, 7, EOS]}
    bare = {"input_ids": [4, EOS], "labels": [4, EOS]}
    assert questions_of([chat, bare, *rows_of([4])], EOS) == [
        Question([1, 4, EOS, 5], [6, 7]),
        Question([4], [14, 24]),
    ]


def test_a_canvas_is_the_same_in_every_batch():
    """Of a total length, as the checkpoint's own `generate` has it for each prompt alone."""
    model = build(initializer_range=0.3)
    model.generation_config.update(eos_token_id=EOS, pad_token_id=PAD, max_length=16, eos_policy="cut")
    questions = [Question(list(range(4, 4 + length)), [8]) for length in (2, 2, 2, 5, 12)]
    alone = [decode_rows(model, [question], 1, None)[0] for question in questions]
    assert decode_rows(model, questions, 2, None) == decode_rows(model, questions, 8, None) == alone
    assert len(alone[0].ids) > 16 - 12, "longer than a batch with the last prompt would allow"


def test_rows_longer_than_the_canvas_ask_nothing():
    """Held-out rows may be longer than all that were trained on: no row to write in, and no end of the run."""
    rows = [{"input_ids": [4] * n + [9, EOS], "labels": [-100] * n + [9, EOS]} for n in (3, 4, 5, 6, 9)]
    assert [len(question.prompt) for question in questions_of(rows, EOS, canvas=6)] == [3, 4]
    model = Hasty([0.5] * VOCABULARY)
    model.generation_config.update(max_new_tokens=None, max_length=6)
    assert choose_threshold(trainer_of(model, rows))["rows"] == 2
    assert choose_threshold(trainer_of(model, rows[2:]))["threshold"] is None


def test_the_rows_depend_on_the_seed_alone():
    questions = [Question([i] * (1 + i % 3), [i]) for i in range(50)]
    drawn = draw(questions, 10, seed=1)
    assert drawn == draw(questions, 10, seed=1) != draw(questions, 10, seed=2)
    assert len(drawn) == 10 and [len(q.prompt) for q in drawn] == sorted(len(q.prompt) for q in drawn)


def test_ranks_decode_their_shares(monkeypatch):
    """What two ranks gather is what one decodes."""
    model = Hasty([0.5] * VOCABULARY).eval()
    questions = [Question([p], [10 + p, 20 + p]) for p in (4, 5, 6, 7, 8)]
    alone = module._decode_together(trainer_of(model, []), questions, None)
    shares = [decode_rows(model, questions[rank::2], 3, None) for rank in range(2)]
    monkeypatch.setattr(module, "gather_object", lambda mine: shares if mine[0] in shares else None)
    for rank in range(2):
        trainer = trainer_of(model, [], process_index=rank, world_size=2)
        assert module._decode_together(trainer, questions, None) == alone


def test_what_the_run_pays_for():
    """At most 128 rows, and 2 % of training's 6 operations a token against 2 a token read."""
    questions = [Question([1] * 10, [2] * 5)] * 200
    assert affordable_rows(questions, None, 10**9) == 128
    assert affordable_rows(questions, None, 50_000) == int(0.06 * 50_000 / (5 * 15)) == 40
    assert affordable_rows(questions, 100, 1_000_000) == int(0.06 * 1_000_000 / (90 * 100)) == 6
    assert affordable_rows(questions[:20], None, 10**9) == 20


@pytest.mark.parametrize(
    ("change", "rows", "reason"),
    [
        ({"threshold_rows": 0}, [4], "`threshold_rows` is 0"),
        ({}, [], "there are no held-out answers"),
        ({"threshold_rows": None}, [4, 5], "2 held-out answers and 0 tokens of training afford 0 rows, fewer than 32"),
        ({"fsdp": True}, [4], "no rank has all weights"),
    ],
)
def test_no_threshold_has_a_reason(change, rows, reason, caplog):
    model = Hasty([0.5] * VOCABULARY)
    trainer = trainer_of(model, rows_of(rows), **{name: value for name, value in change.items() if name != "fsdp"})
    trainer.is_fsdp_enabled = "fsdp" in change
    choice = choose_threshold(trainer)
    assert choice["threshold"] is None and reason in choice["reason"]
    assert (reason in caplog.text) == (change.get("threshold_rows") != 0)


def test_a_lost_answer_counts_however_alike_it_is():
    """One token of 400 wrong is half of what likeness may lose, but the answer is no longer the reference."""
    right, wrong = Answer(list(range(400)), True, 401.0), Answer([*range(399), 0], True, 5.0)
    chosen, records = choose(lambda value: [wrong if value and value < 0.97 else right], [list(range(400))])
    assert chosen == 0.97 and records[-1]["threshold"] == 0.95 and records[-1]["lost"] == 1
    assert -LOSS < records[-1]["likeness_difference"] < 0
