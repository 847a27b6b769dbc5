"""A replay against what the decoder itself computed when it wrote, and the decoders that have none."""

import re

import pytest
import torch
from generation_models import EOS, MASK, build, left_padded, seeded
from transformers import LogitsProcessorList

from nanollada.modeling_nanollada import NanoLLaDAGenerationConfig
from nanollada.modeling_nanollada.prediction_nanollada import CachedBlocks, WholeRows
from nanollada.trainers.rollouts import passes
from nanollada.trainers.rollouts.decoding import Decoding, check_replayable
from nanollada.trainers.rollouts.likelihoods import ESTIMATORS
from nanollada.trainers.rollouts.passes import TOKENS_PER_FORWARD
from nanollada.trainers.rollouts.replay import replay
from nanollada.trainers.rollouts.rollouts import Rollouts, row_keys

ROWS = [[4, 5, 6, 7], [8, 9], [10, MASK, 11, MASK, 12], [13], [14, 15, 16]]
ENDS = list(range(4, 14))  # often drawn
CASES = {
    "plain": {"eos_token_id": None},
    "warm": {"temperature": 1.7, "eos_token_id": EOS},
    "ends": {"eos_token_id": ENDS},
    "cut": {"eos_token_id": ENDS, "eos_policy": "cut"},
    "last": {"eos_token_id": ENDS, "eos_policy": "last"},
    "forbidden": {"eos_token_id": ENDS, "eos_policy": "forbid", "suppress_tokens": [20, 21]},
    "goes on": {"eos_token_id": ENDS, "early_stop": False},
    "threshold": {"eos_token_id": EOS, "threshold": 0.2},
    "klass": {"eos_token_id": EOS, "threshold": 0.1, "kl_threshold": 0.5},
    "entropy bound": {"eos_token_id": EOS, "entropy_bound": 1.0},
    "random": {"eos_token_id": ENDS, "remasking": "random", "steps": 3},
    "blocks": {"eos_token_id": ENDS, "block_length": 2},
    "growing": {"eos_token_id": ENDS, "block_length": 2, "grow_length": True, "eos_policy": "cut"},
}


def watched(monkeypatch, model, ids, attention_mask, **run):
    """What `generate` gives, and the log-probability of each token in the step that drew it, `[B, W]`."""
    tables = []
    for kind in (CachedBlocks, WholeRows):

        def predict(self, active, original=kind.predict):
            logits = original(self, active)
            tables.append((self.canvas.forwards.clone(), active.clone(), logits))
            return logits

        monkeypatch.setattr(kind, "predict", predict)
    out = model.generate(ids, attention_mask=attention_mask, return_dict_in_generate=True, **run)
    never = {MASK, *run.get("suppress_tokens", ()), *(ENDS if run.get("eos_policy") == "forbid" else ())}
    log_probs = torch.zeros(out.canvas.shape, dtype=torch.double)
    for forwards, active, logits in tables:
        logits[:, sorted(never)] = -torch.inf
        drawn = (logits / run.get("temperature", 1.0)).log_softmax(-1)
        drawn = drawn.gather(1, out.canvas[active][:, None])[:, 0]
        mine = active & (out.commit_steps == forwards[:, None])
        log_probs[mine] = drawn[mine[active]].double()
    monkeypatch.undo()
    return out, log_probs


@pytest.mark.parametrize("shape", [{}, {"block_length": 4}, {"label_shift": True}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_replay_is_what_the_decoder_computed(monkeypatch, name, shape):
    """Left padding, masks in a prompt, ends of text, blocks with a cache: the same number for every token."""
    model, (ids, attention_mask) = build(2, **shape), left_padded(ROWS)
    run = {"max_new_tokens": 7, "do_sample": True, **CASES[name]}
    out, expected = watched(monkeypatch, model, ids, attention_mask, generator=seeded(4), **run)
    settings = NanoLLaDAGenerationConfig(**run)
    check_replayable(settings)
    decoding, rollouts = Decoding.of(settings, model.config), Rollouts.of(out, attention_mask, model.config)
    with torch.no_grad():
        scores = replay(model, rollouts, decoding)
        assert (expected < 0).sum() > 20
        torch.testing.assert_close(scores.log_probs, expected, rtol=0, atol=1e-6)
        some = replay(model, rollouts, decoding, steps=2)
    scored = some.weights > 0
    torch.testing.assert_close(some.log_probs[scored], expected[scored], rtol=0, atol=1e-6)
    assert (some.log_probs[~scored] == 0).all() and not (scored & ~rollouts.decided).any()
    assert name != "cut" or (out.canvas[:, ids.shape[1] :] == MASK).any(), "the case needs rows that end"


@pytest.mark.parametrize("grid", [None, 8])
def test_few_tokens_a_forward_change_nothing(monkeypatch, grid):
    model, (ids, attention_mask) = build(2, block_length=grid), left_padded(ROWS)
    run = {"max_new_tokens": 9, "do_sample": True, "eos_token_id": None}
    out = model.generate(ids, attention_mask=attention_mask, return_dict_in_generate=True, **run)
    rollouts = Rollouts.of(out, attention_mask, model.config)
    decoding, calls = Decoding.of(NanoLLaDAGenerationConfig(**run), model.config), []

    def counting(**inputs):
        calls.append(inputs["input_ids"].numel() * (2 if "clean_input_ids" in inputs else 1))
        return model(**inputs)

    with torch.no_grad():
        at_once = replay(counting, rollouts, decoding).log_probs
        assert len(calls) == 1
        monkeypatch.setitem(TOKENS_PER_FORWARD, "cpu", 60)
        in_parts = replay(counting, rollouts, decoding).log_probs
    assert len(calls) > 10 and max(calls[1:]) <= 60
    torch.testing.assert_close(at_once, in_parts, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_ranks_call_a_model_they_share_equally_often(monkeypatch, name):
    """A rank that is done reads on for the others, and it changes neither scores nor gradients."""
    model, (ids, attention_mask) = build(2, block_length=4), left_padded(ROWS)
    run = {"max_new_tokens": 7, "do_sample": True, "eos_token_id": None}
    out = model.generate(ids, attention_mask=attention_mask, return_dict_in_generate=True, **run)
    rollouts, calls, found = Rollouts.of(out, attention_mask, model.config), [], []
    decoding = Decoding.of(NanoLLaDAGenerationConfig(**run), model.config)

    def counting(**inputs):
        calls.append(inputs)
        return model(**inputs)

    for others in (0, 2):
        monkeypatch.setattr(passes, "_most_of_all_ranks", lambda count, device, others=others: count + others)
        scores = ESTIMATORS[name].score(counting, rollouts, decoding, entropy=True)
        gradients = torch.autograd.grad(scores.total().sum(), list(model.parameters()))
        found.append([scores.log_probs, scores.weights, scores.entropies, *gradients])
    assert len(calls) == 1 + 3 and all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_block_model_reads_a_step_of_all_blocks_at_once():
    """n passes for n steps of each block; a clean half only where blocks before have masks."""
    model, prompt = build(2, block_length=4), torch.tensor([[4, 5, 6, 7]])
    run = {"max_new_tokens": 12, "do_sample": True, "eos_token_id": None}
    out = model.generate(prompt, return_dict_in_generate=True, **run)
    rollouts, seen = Rollouts.of(out, torch.ones_like(prompt), model.config), []
    decoding = Decoding.of(NanoLLaDAGenerationConfig(**run), model.config)

    def watching(**inputs):
        seen.append(inputs)
        return model(**inputs)

    replay(watching, rollouts, decoding)
    assert sum(len(inputs["input_ids"]) for inputs in seen) == 4 and all(
        "clean_input_ids" in inputs for inputs in seen
    )
    scores = replay(watching, rollouts, decoding, steps=1)
    assert len(seen[-1]["input_ids"]) == 1
    assert scores.weights[0, 4:].view(3, 4).sort(1).values.tolist() == [[0, 0, 0, 4]] * 3
    first = Rollouts(out.canvas[:, :8], out.commit_steps[:, :8], torch.ones(1, 8), 4)
    replay(watching, first, decoding)
    assert "clean_input_ids" not in seen[-1]


REFUSED = {
    "do_sample": (False, "`temperature` must be above 0 for a replay, got 0.0"),
    "top_k": (5, "`top_k` leaves tokens out of a draw"),
    "top_p": (0.9, "`top_p` leaves tokens out of a draw"),
    "min_p": (0.1, "`min_p` leaves tokens out of a draw"),
    "top_h": (0.4, "`top_h` leaves tokens out of a draw"),
    "typical_p": (0.9, "`typical_p` leaves tokens out of a draw"),
    "epsilon_cutoff": (0.1, "`epsilon_cutoff` leaves tokens out of a draw"),
    "eta_cutoff": (0.1, "`eta_cutoff` leaves tokens out of a draw"),
    "repetition_penalty": (1.2, "`repetition_penalty` changes the distribution with the row"),
    "cfg_scale": (0.5, "`cfg_scale` mixes two predictions: it must be unset for a replay, got 0.5"),
    "approximate_cache": ("dual", "`approximate_cache` predicts from keys that no replay has"),
    "edit_threshold": (0.0, "`edit_threshold` takes decisions back, so a row does not show its trajectory"),
    "max_expansions": (3, "`max_expansions` takes decisions back, so a row does not show its trajectory"),
    "remdm": ("cap", "`remdm` takes decisions back, so a row does not show its trajectory"),
    "position_score": ("sampled_prob", "`position_score` must not be 'sampled_prob' for a replay"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_decoders_without_an_exact_likelihood_are_refused(name):
    value, message = REFUSED[name]
    settings = {"do_sample": True, "max_new_tokens": 4, name: value}
    with pytest.raises(ValueError, match=re.escape(message)):
        check_replayable(NanoLLaDAGenerationConfig(**settings))


def test_what_is_off_is_no_reason_to_refuse():
    """TRL passes its own defaults."""
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0, "repetition_penalty": 1.0, "cfg_scale": 0.0, "typical_p": 1.0}
    check_replayable(NanoLLaDAGenerationConfig(do_sample=True, temperature=1.0, max_new_tokens=4, **off))
    check_replayable(NanoLLaDAGenerationConfig(do_sample=True, remasking="random"), LogitsProcessorList())
    message = "`logits_processor` changes the distributions: it must be unset for a replay, got function"
    with pytest.raises(ValueError, match=message):
        check_replayable(NanoLLaDAGenerationConfig(do_sample=True), [lambda ids, scores: scores])
    with pytest.raises(ValueError, match="`temperature` must be above 0 to score what was drawn, got 0.0"):
        Decoding.of(NanoLLaDAGenerationConfig(do_sample=False), build().config)


def test_rollouts_must_fit_their_prompts():
    model, prompt = build(), torch.tensor([[4, 5, 6, 7]])
    out = model.generate(
        prompt, max_new_tokens=3, num_return_sequences=2, do_sample=True, return_dict_in_generate=True
    )
    with pytest.raises(ValueError, match="`attention_mask` must have a row for each sequence, got 1 and 2"):
        Rollouts.of(out, torch.ones_like(prompt), model.config)
    filled = model.generate(torch.tensor([[4, MASK]]), max_new_tokens=0, do_sample=True, return_dict_in_generate=True)
    rollouts = Rollouts.of(filled, torch.ones(1, 2), model.config)
    with pytest.raises(ValueError, match="`grow_length` must come with new tokens to be scored, got prompts alone"):
        replay(model, rollouts, Decoding(MASK, grow_length=True, never=(MASK,)))


def test_keys_are_the_rows_own():
    """Their tokens and places, whatever pads them; another token, another order, another key."""
    ids = torch.tensor([[0, 0, 5, 6, 7], [0, 5, 6, 7, 0], [0, 5, 7, 6, 0], [5, 6, 0, 0, 0], [5, 6, 7, 7, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    keys = row_keys(ids, mask).tolist()
    assert keys[0] == keys[1] and len(set(keys)) == 4
