"""Noise for infilling of unknown length: its law, what it keeps, and the decoder that its tabular optimum makes."""

import collections

import pytest
import torch
from training_cases import assert_same_gradients, build_trainer, make_rows, one_step

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM
from nanollada.trainers.diffusion import DiffusionConfig
from nanollada.trainers.noise import expansion, masking
from nanollada.trainers.noise.expansion import ExpansionSettings
from nanollada.trainers.noise.masking import MaskingSettings

PAD, BOS, EOS, MASK, DELETE, INSERT = range(6)
CONFIG = NanoLLaDAConfig(
    vocab_size=64,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
    mask_token_id=MASK,
    delete_token_id=DELETE,
    insert_token_id=INSERT,
)


def keys(count, **settings):
    index = torch.arange(count)
    own = {**vars(MaskingSettings()), **vars(ExpansionSettings(**settings))}
    return {"seed": 7, "index": index, "rank": index, "epoch": torch.zeros_like(index), **own}


def counted_rows(count, length=20):
    """Rows of distinct tokens: two that are no target, text, an end, text, and two that are no target."""
    ids = torch.arange(8, 8 + length).repeat(count, 1)
    ids[:, length // 2] = EOS
    targets = torch.ones_like(ids).bool()
    targets[:, :2] = targets[:, -2:] = False
    return ids, targets


def runs(row):
    """The maximal runs of masks, as ranges."""
    found, start = [], None
    for place, token in enumerate([*row, None]):
        if token == MASK and start is None:
            start = place
        if token != MASK and start is not None:
            found.append(range(start, place))
            start = None
    return found


def test_labels_are_those_of_tokens_dealt_out_evenly():
    ids, targets = counted_rows(600)
    noise = expansion.corrupt(ids, targets, CONFIG, **keys(600, expand_rows=1.0, max_extra=5))
    seen = collections.Counter()
    for row, labels, origin in zip(
        noise.noisy_input_ids.tolist(), noise.labels.tolist(), noise.origin.tolist(), strict=True
    ):
        width = origin.index(-1) if -1 in origin else len(origin)
        assert set(row[width:]) <= {PAD} and origin[:width] == sorted(origin[:width])
        assert [row[i] for i in range(width) if row[i] != MASK] == [
            8 + column if column != 10 else EOS for i, column in enumerate(origin[:width]) if row[i] != MASK
        ]
        kept, extra = set(), 0
        for run in runs(row[:width]):
            assert 0 < run.start and run.stop < width
            tokens = list(range(origin[run.start - 1] + 9, origin[run.stop] + 8))  # between what is visible
            even, more = divmod(len(tokens), len(run)) if len(tokens) > len(run) else (1, 0)
            for number, place in enumerate(run):
                size = even + (number >= len(run) - more) if len(tokens) > len(run) else int(number < len(tokens))
                assert labels[place] == (
                    tokens[sum_before(tokens, number)] if size == 1 else INSERT if size else DELETE
                )
                kept.add(place)
            extra += max(0, len(run) - len(tokens))
            seen[(len(tokens) > len(run)) - (len(tokens) < len(run))] += 1
            seen["nothing"] += not tokens
        assert extra <= 5 and {i for i, label in enumerate(labels) if label != -100} == kept
    assert min(seen.values()) > 40
    torch.testing.assert_close(noise.weights.sum(-1), targets.sum(-1).double())


def sum_before(tokens, number):
    """The first masks of a gap stand for one token each until the first that stands for more."""
    return min(number, len(tokens) - 1)


def test_off_is_masking_to_the_bit_and_so_are_rows_without_a_hole():
    ids, targets = counted_rows(64)
    given = keys(64)
    plain = masking.corrupt(
        ids, targets, CONFIG, **{k: v for k, v in given.items() if k not in vars(ExpansionSettings())}
    )
    off = expansion.corrupt(ids, targets, CONFIG, **{**given, "expand_rows": 0.0})
    some = expansion.corrupt(ids, targets, CONFIG, **given)
    assert off.origin is None and torch.equal(off.weights, plain.weights) and torch.equal(off.labels, plain.labels)
    same = 0
    for row in range(64):
        columns = slice(None, 20)
        same += all(
            torch.equal(getattr(some, name)[row, columns], getattr(plain, name)[row])
            for name in ("noisy_input_ids", "labels", "weights")
        )
    assert 20 < same < 44
    assert not any((expansion.corrupt(ids, targets & False, CONFIG, **given).weights).flatten().tolist())


def test_a_rows_noise_does_not_hang_on_its_batch():
    ids, targets = counted_rows(16)
    given, settings = keys(16, expand_rows=1.0), {}
    together = expansion.corrupt(ids, targets, CONFIG, **given)
    for row in range(16):
        one = slice(row, row + 1)
        settings = {k: v[one] if torch.is_tensor(v) else v for k, v in given.items()}
        wide = torch.nn.functional.pad(ids[one], (0, 3)), torch.nn.functional.pad(targets[one], (0, 3))
        alone = expansion.corrupt(*wide, CONFIG, **settings)
        inside = (together.origin[row] >= 0).nonzero()[:, 0]
        assert torch.equal(alone.noisy_input_ids[0, inside], together.noisy_input_ids[row, inside])
        assert torch.equal(alone.labels[0, inside], together.labels[row, inside])
        assert torch.equal(alone.weights[0, inside], together.weights[row, inside])


def test_context_moves_with_the_columns():
    ids, targets = counted_rows(40)
    documents = (torch.arange(20) > 10).long().expand(40, -1)
    mask = torch.ones_like(ids)
    mask[::2, 18:] = 0
    noise = expansion.corrupt(ids, targets, CONFIG, **keys(40, expand_rows=1.0))
    context = noise.context({"attention_mask": mask, "document_ids": documents, "position_ids": ids})
    for row, origin in enumerate(noise.origin.tolist()):
        width = origin.index(-1) if -1 in origin else len(origin)
        assert context["attention_mask"][row, width:].sum() == 0
        assert context["attention_mask"][row, :width].tolist() == [int(mask[row, i]) for i in origin[:width]]
        one = sum(column <= 10 for column in origin[:width])
        assert context["document_ids"][row, :width].tolist() == [0] * one + [1] * (width - one)
        assert context["position_ids"][row, :width].tolist() == [*range(one), *range(width - one)]


TEXTS = {(10,): 3, (10, 11): 2, (11, 11, 10): 2, (12, 10, 11): 1, (12, 12): 1}


def table(count=60_000):
    """The labels that were ever asked for, in each state: the support of the tabular optimum."""
    ids = torch.tensor([[BOS, *text, *[EOS] * (4 - len(text))] for text, n in TEXTS.items() for _ in range(n)])
    ids = ids.repeat(count // len(ids), 1)
    targets = (ids != BOS) & (ids != EOS)
    noise = expansion.corrupt(ids, targets, CONFIG, **keys(len(ids), expand_rows=1.0, max_extra=3))
    found = collections.defaultdict(lambda: collections.defaultdict(set))
    for row, labels in {
        (tuple(row), tuple(labels))
        for row, labels in zip(noise.noisy_input_ids.tolist(), noise.labels.tolist(), strict=True)
    }:
        state = row[: row.index(EOS) + 1]
        for place, label in enumerate(labels):
            if label != -100:
                found[state][place].add(label)
    return found


def successors(state, seen):
    """The states that a decision may lead to."""
    for place in (place for place, token in enumerate(state) if token == MASK):
        for label in seen[state][place]:
            yield (*state[:place], *{INSERT: (MASK, MASK), DELETE: ()}.get(label, (label,)), *state[place + 1 :])


def test_the_tabular_optimum_writes_all_texts_of_the_law_and_no_other():
    """Whatever the order of decisions; and each state that it comes to was seen in training."""
    seen = table()
    for masks in range(1, 4):
        reached, done = {(BOS, *[MASK] * masks, EOS)}, set()
        todo = list(reached)
        while todo:
            state = todo.pop()
            if MASK not in state:
                done.add(state[1:-1])
                continue
            new = set(successors(state, seen)) - reached
            todo += new
            reached |= new
            assert all(seen[state][place] for place, token in enumerate(state) if token == MASK), state
        assert done == set(TEXTS)


TRAINED = {"corruption": "expansion", "expand_rows": 0.7}


def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return NanoLLaDAForMaskedLM(
        NanoLLaDAConfig(vocab_size=32, delete_token_id=30, insert_token_id=31, **shape)
    ).double()


def test_accumulation_and_batches_give_the_same_gradient(tmp_path):
    one, loss = one_step("diffusion", tmp_path / "one", 8, 1, model=model(), **TRAINED)
    other, again = one_step("diffusion", tmp_path / "other", 2, 4, model=model(), **TRAINED)
    assert_same_gradients(one, other)
    assert loss == pytest.approx(again)
    masked, _ = one_step("diffusion", tmp_path / "off", 8, 1, model=model())
    head = next(name for name in one if "lm_head" in name)
    assert one[head][30:].abs().max() > 0 and masked[head][30:].abs().max() == 0


REFUSED = (
    ({"complementary": True}, "`complementary` must be unset with `corruption` expansion"),
    ({"block_length": 4}, "`block_length` must be unset with `corruption` expansion: .* got 4"),
    ({"block_length_schedule": "[[1.0, 4]]"}, "`block_length_schedule` must be unset"),
    ({"attention_annealing_steps": 3}, "`attention_annealing_steps` must be unset"),
    ({"repetition_penalty_weight": 0.1}, "`repetition_penalty_weight` must be unset"),
    ({"merge_rate": 0.8, "extra_rate": 0.3}, "must be at most 1 together, got 0.8 and 0.3"),
    ({"expand_rows": 1.5}, r"`expand_rows` must lie in \[0, 1\], got 1.5"),
    ({"max_extra": 0}, "`max_extra` must be >= 1"),
    ({"corruption": "masking", "merge_rate": 0.1}, "`merge_rate` is for `corruption` expansion, got 0.1"),
)


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_has_no_meaning_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(output_dir=str(tmp_path), **{"corruption": "expansion", **settings})


def test_a_model_in_blocks_is_refused(tmp_path):
    blocks = model()
    blocks.config.block_length = 4
    trainer = build_trainer("diffusion", tmp_path, blocks, make_rows(), corruption="expansion", max_steps=1)
    with pytest.raises(ValueError, match="`config.block_length` must be None, got 4"):
        trainer.train()
