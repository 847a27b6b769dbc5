"""What a study of editing measures: edits, forward passes, windows of text, likelihoods, and what tokens say."""

import json
from types import SimpleNamespace

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.evaluation.answers import until_end
from nanollada.scripts.studies.editing import measures
from nanollada.scripts.studies.editing.decoders import DECODERS
from nanollada.scripts.studies.editing.measures import Questions, Tally, beliefs, filled, gaps_of, likelihood, write
from nanollada.trainers.models import config_for
from nanollada.trainers.scoring.likelihood import causal_nll

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MASK = 3


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return NanoLLaDAForMaskedLM(config_for(tokenizer, initializer_range=0.5, **SHAPE)).eval()


@pytest.fixture(scope="module")
def judge(tokenizer):
    torch.manual_seed(1)
    return NanoLLaDAForCausalLM(config_for(tokenizer, initializer_range=0.5, **SHAPE)).eval()


def test_edits_are_tokens_that_lost_their_place():
    tally = Tally(MASK)
    tally.put(torch.tensor([[7, 7], [7, 7]]))
    for draft in ([[5, MASK, MASK], [MASK, 6, MASK]], [[5, 8, 9], [4, MASK, MASK]], [[7, 9], [MASK, 5]]):
        tally.put_draft(torch.tensor(draft))
    tally.end()
    assert tally.edits.tolist() == [1, 1]  # 8 → 7; 6 → mask; that a mask is filled is none
    tally.put_moves(torch.tensor([[1, -1, 2], [1, 2, -1]]))
    for draft in ([[7, 6, 9], [4, 5, 8]], [[7, 5, 9], [4, 5, 8]]):
        tally.put_draft(torch.tensor(draft))
    assert tally.edits.tolist() == [2, 1]


@pytest.mark.parametrize("settings", [{}, {"steps": 1}, {"threshold": 0.2}, {"steps": 3, "temperature": 1.0}])
def test_forwards_are_those_of_the_row(model, tokenizer, settings):
    """All rows together: what the model read. And a row alone, where nothing is drawn: as in its batch."""
    prompts, read = [[5, 6], [7, 8, 9, 10], [11], [12, 13, 14]], []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        rows, forwards, edits = write(model, prompts, tokenizer.pad_token_id, 0, max_new_tokens=9, **settings)
        assert sum(forwards) == sum(read) and edits == [0] * 4
        assert all(1 <= count <= settings.get("steps", 9) for count in forwards)
        for prompt, row, count in zip(prompts, rows, forwards, strict=True):
            assert row[: len(prompt)] == prompt and len(row) == len(prompt) + 9
            if "temperature" not in settings:
                read.clear()
                alone, _, _ = write(model, [prompt], tokenizer.pad_token_id, 0, max_new_tokens=9, **settings)
                assert (alone[0], len(read)) == (row, count)
    finally:
        hook.remove()


def test_a_row_that_ends_early_takes_fewer_forwards(model, tokenizer, monkeypatch):
    biased = NanoLLaDAForMaskedLM(model.config).eval()
    biased.load_state_dict(model.state_dict())
    biased.generation_config = model.generation_config
    own = biased.forward

    def forward(*args, **kwargs):  # the end is the surest of all
        output = own(*args, **kwargs)
        output.logits[:, tokenizer.eos_token_id] += 50
        return output

    monkeypatch.setattr(biased, "forward", forward)
    rows, forwards, _ = write(biased, [[5, 6], [7]], tokenizer.pad_token_id, 0, max_new_tokens=9)
    assert forwards == [1, 1] and all(until_end(biased, row)[1] for row in rows)


class Editor:
    """A model whose prediction at a place hangs on the other tokens, and on its own by `trust`."""

    device = torch.device("cpu")

    def __init__(self, trust):
        self.trust, self.config = trust, SimpleNamespace(mask_token_id=MASK)

    def __call__(self, input_ids, attention_mask, logits_to_keep):
        others = (input_ids * attention_mask).sum(1, keepdim=True) - input_ids  # [B, L]
        logits = torch.nn.functional.one_hot(others % 20, 20) + torch.arange(20) / 10
        own = torch.nn.functional.one_hot(input_ids, 20) * (input_ids != MASK)[..., None]
        return SimpleNamespace(logits=(logits + self.trust * own)[logits_to_keep])


def test_an_exact_editor_says_what_the_mask_says():
    questions = Questions([([5, 6], [7, 8, 9]), ([5], [10, 11]), ([4], [6])])
    exact = beliefs(Editor(0.0), questions, 0, 2, seed=1)
    assert {name: len(values) for name, values in exact.items()} == {"replaced": 2, "kept": 2}
    assert exact["replaced"] == pytest.approx([0, 0], abs=1e-12) == exact["kept"]
    copier = beliefs(Editor(4.0), questions, 0, 2, seed=1)
    assert min(copier["replaced"]) > 0.5 and min(copier["kept"]) > 0.5


def test_beliefs_are_the_models_own(model, tokenizer):
    """One place by hand, behind padding and before what follows a gap."""
    questions = Questions([([5, 6, 7], [20]), ([8], [21, 22])], behind=[[9], [10]])
    found = beliefs(model, questions, tokenizer.pad_token_id, 2, seed=3)
    mask = model.config.mask_token_id

    def said(row, place):
        with torch.no_grad():
            return model(input_ids=torch.tensor([row])).logits[0, place].double().log_softmax(-1)

    def divergence(row, place, token):
        truth, other = (said(row[:place] + [put] + row[place + 1 :], place) for put in (mask, token))
        return torch.nn.functional.kl_div(other, truth, log_target=True, reduction="sum").item()

    assert found["kept"][0] == pytest.approx(divergence([5, 6, 7, 20, 9], 3, 20), rel=1e-4)
    assert found["replaced"][0] in [pytest.approx(divergence([5, 6, 7, 20, 9], 3, t), rel=1e-4) for t in (21, 22)]
    both = [divergence([8, 21, 22, 10], place, token) for place, token in ((1, 21), (2, 22))]
    assert found["kept"][1] == pytest.approx(sum(both) / 2, rel=1e-4)


@pytest.fixture
def texts(tmp_path, tokenizer):
    path = tmp_path / "texts.jsonl"
    lines = ["The cat sat on the mat. The dog sat on the log, the bird sang.", "print(add(1, 2)) and it is long."] * 3
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return [str(path)]


def test_windows_of_text(texts, tokenizer):
    rows = measures.documents(tokenizer, texts)
    assert len(rows) == 6 and all(row[0] == tokenizer.pad_token_id for row in rows)
    pairs = measures.text_questions(tokenizer, texts, 8, 4, 6).pairs
    assert [len(pair[0]) + len(pair[1]) for pair in pairs] == [10] * 8
    assert pairs[0] == (rows[0][:4], rows[0][4:10]) and pairs[1] == (rows[1][:4], rows[1][4:10])
    assert pairs[6][0] == rows[0][:1] + rows[0][11:14]  # of the second round: none twice
    with pytest.raises(ValueError, match="`eval_rows` must not exceed the windows of `eval_data`, .*, got 999"):
        measures.text_questions(tokenizer, texts, 999, 4, 6)


def test_gaps_in_text(model, texts, tokenizer):
    questions = measures.infill_questions(tokenizer, texts, 5, 10, 4)
    rows = [
        before + answer + behind for (before, answer), behind in zip(questions.pairs, questions.behind, strict=True)
    ]
    assert [len(answer) for _, answer in questions.pairs] == [2, 3, 4, 2, 3]
    assert {len(row) for row in rows} == {10} and rows[0] == measures.documents(tokenizer, texts)[0][:10]
    assert all(before and behind for (before, _), behind in zip(questions.pairs, questions.behind, strict=True))
    mask = model.config.mask_token_id
    for masks, counts in ((0.0, [1] * 5), (1.0, [2, 3, 4, 2, 3]), (2.0, [4, 6, 8, 4, 6])):
        prompts = gaps_of(model, questions, masks)
        assert [prompt.count(mask) for prompt in prompts] == counts
        assert prompts[1][0] == rows[1][0] and prompts[1][-1] == rows[1][-1]


def test_a_gap_is_filled_as_it_was_or_not(judge, tokenizer):
    questions = Questions([([5, 6], [7, 8]), ([5], [9])], behind=[[10], [11, 12]])
    rows = [measures.unpadded(row, 0) for row in ([5, 6, 7, 8, 10, 0, 0], [5, 9, 9, 11, 12])]
    scores = filled(tokenizer, questions, rows, judge)
    assert scores["quality"] == [1, 0] and scores["length_error"] == [0, 1]
    row = torch.tensor([[5, 6, 7, 8, 10]])
    nats = causal_nll(judge, {"input_ids": row, "labels": row.masked_fill(torch.arange(5) == 0, -100)})
    assert scores["log_probability"][0] == pytest.approx(-nats.item(), rel=1e-5)


def test_text_is_judged_with_its_end_a_token(model, judge, tokenizer):
    end, questions = tokenizer.eos_token_id, Questions([([5, 6], []), ([7], [])])
    scores = likelihood(tokenizer, model, questions, [[8, 9, 8, 9], [10, end, 4, 4]], judge)
    assert scores["distinct"] == [pytest.approx(2 / 3), 1.0]
    for quality, row, given in zip(scores["quality"], ([5, 6, 8, 9, 8, 9], [7, 10, end]), (2, 1), strict=True):
        ids = torch.tensor([row])
        nats = causal_nll(judge, {"input_ids": ids, "labels": ids.masked_fill(torch.arange(len(row)) < given, -100)})
        assert quality == pytest.approx(-nats.item() / (len(row) - given), rel=1e-5)


def test_every_decoder_is_a_setting_of_generate_and_stands_beside_its_draft():
    from nanollada.modeling_nanollada import NanoLLaDAGenerationConfig

    for name, decoder in DECODERS.items():
        NanoLLaDAGenerationConfig(**decoder.settings)
        if decoder.draft is not None:
            own, draft = decoder.settings, DECODERS[decoder.draft].settings
            assert decoder.kind and not DECODERS[decoder.draft].kind
            assert decoder.kind == "preset" or draft.items() <= own.items(), name


def test_gaps_that_grow_are_counted_by_forwards_too(tokenizer, monkeypatch):
    torch.manual_seed(5)
    config = config_for(tokenizer, initializer_range=0.5, **SHAPE)
    config.delete_token_id, config.insert_token_id = config.vocab_size - 2, config.vocab_size - 1
    model, read = NanoLLaDAForMaskedLM(config).eval(), []
    own = model.forward

    def forward(**inputs):  # masks like to become two
        read.append(len(inputs["input_ids"]))
        output = own(**inputs)
        output.logits[:, config.insert_token_id] += 20
        return output

    monkeypatch.setattr(model, "forward", forward)
    mask = config.mask_token_id
    prompts = [[5, 6, mask, 7], [8, mask, mask, 9, 10], [11, mask, 12]]
    settings = {"max_new_tokens": 0, "max_expansions": 3}
    rows, forwards, _ = write(model, prompts, tokenizer.pad_token_id, 0, **settings)
    assert sum(forwards) == sum(read)
    rows = [measures.unpadded(row, tokenizer.pad_token_id) for row in rows]
    assert all(len(row) == len(prompt) + 3 for row, prompt in zip(rows, prompts, strict=True))
    for row, prompt in zip(rows, prompts, strict=True):
        first, last = prompt.index(mask), len(prompt) - 1 - prompt[::-1].index(mask)
        assert row[:first] == prompt[:first] and row[len(row) - len(prompt) + last + 1 :] == prompt[last + 1 :]
        assert mask not in row
