"""`<|delete|>` and `<|insert|>`: what a tokenizer, a model and a run gain, and that nothing else changes."""

import copy
from itertools import product

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.modeling_nanollada.loading_nanollada import EDIT_TOKENS, check_tokenizer, load_model
from nanollada.modeling_nanollada.loss_nanollada import FLOOR
from nanollada.trainers.data.encoding import RowEncoder
from nanollada.trainers.data.files import DataError
from nanollada.trainers.data.formats import Example
from nanollada.trainers.data.prepare import DataArguments, prepare_datasets
from nanollada.trainers.data.sources import RowPolicy
from nanollada.trainers.data.tokenizers import edit_tokens_of, ensure_edit_tokens
from nanollada.trainers.diffusion import DiffusionConfig, DiffusionTrainer
from nanollada.trainers.models import add_edit_tokens, config_for
from nanollada.trainers.noise import masking
from nanollada.trainers.noise.corruption import CorruptionKind
from nanollada.trainers.noise.registry import CORRUPTIONS
from nanollada.trainers.scoring.likelihood import causal_nll, exact_nelbo

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS = [NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM]
TEXT = "a<|delete|>b<|insert|>c"


@pytest.fixture
def pair(tokenizer):
    """A function: a model with large random weights, and its own copy of the tokenizer."""

    def make(head=NanoLLaDAForMaskedLM, **shape):
        own = copy.deepcopy(tokenizer)
        torch.manual_seed(1)
        return head(config_for(own, **SHAPE, initializer_range=0.5, **shape)).eval(), own

    return make


# ---- the tokenizer


@pytest.mark.parametrize("kind", ["tokenizer", "char_tokenizer"])
def test_a_tokenizer_gains_them_once(kind, request, tmp_path):
    own = copy.deepcopy(request.getfixturevalue(kind))
    text = "the cat"
    size, ids = len(own), own(text).input_ids
    assert edit_tokens_of(own) == {}
    assert ensure_edit_tokens(own) == (size, size + 1) == ensure_edit_tokens(own)
    own.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == size + 2 and ensure_edit_tokens(again) == (size, size + 1)
    assert set(EDIT_TOKENS) <= set(again.all_special_tokens)
    assert again(text).input_ids == ids and again.decode([size, *ids, size + 1], skip_special_tokens=True) == text


def test_tokens_that_a_tokenizer_has_set_aside_are_kept(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<|insert|>", "<|delete|>"])  # ordinary ones, in another order
    size = len(own)
    assert edit_tokens_of(own) == {}
    assert ensure_edit_tokens(own) == (size - 1, size - 2) and len(own) == size
    assert edit_tokens_of(own) == {"<|delete|>": size - 1, "<|insert|>": size - 2}


def test_a_text_that_spells_them_is_text_and_ids_are_refused(tokenizer):
    own = copy.deepcopy(tokenizer)
    ids = ensure_edit_tokens(own)
    encoder = RowEncoder(own, 100)
    ((_, row),) = encoder.encode([Example("texts", 1, text=TEXT)], RowPolicy())
    assert not set(ids) & set(row["input_ids"]) and own.decode(row["input_ids"][:-1]) == TEXT
    own.chat_template = "{{ '<|insert|>' }}" + own.chat_template
    chat = Example("chats", 7, messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    with pytest.raises(DataError, match=r"chats, row 7: edit token: the text contains '<\|insert\|>'"):
        list(RowEncoder(own, 100).encode([chat], RowPolicy()))
    rows = Dataset.from_list([{"input_ids": [5, 6]}, {"input_ids": [5, ids[0]]}])
    with pytest.raises(DataError, match=r"row 2: edit token: `input_ids` hold '<\|delete\|>'"):
        prepare_datasets(rows, None, None, own, seed=0)


# ---- the model


@pytest.mark.parametrize(
    ("head", "shape"),
    [*product(HEADS, [{}, {"tie_word_embeddings": True}]), (NanoLLaDAForMaskedLM, {"block_length": 4})],
)
def test_a_model_gains_two_rows_and_predicts_what_it_predicted(pair, head, shape, tmp_path):
    model, own = pair(head, **shape)
    ids = torch.randint(4, len(own), (2, 12))
    with torch.no_grad():
        before, size = model(ids).logits, len(own)
        assert add_edit_tokens(model, own) == 2 and add_edit_tokens(model, own) == 0
        after = model(ids).logits
    assert model.config.edit_token_ids == [size, size + 1] and model.config.vocab_size == len(own) == size + 2
    assert torch.equal(after[..., :size], before) and (after[..., size:] == FLOOR).all()
    assert torch.equal(after.softmax(-1)[..., :size], before.softmax(-1))
    model.save_pretrained(tmp_path)
    again = load_model(head, tmp_path)
    check_tokenizer(again, own)
    assert torch.equal(again(ids).logits, after)
    if head is NanoLLaDAForCausalLM:
        assert again.generation_config.suppress_tokens == [3, size, size + 1]
    else:
        ids[:, 3:] = 3
    written = again.generate(ids[:, :5], max_new_tokens=8, do_sample=False)
    model, own = pair(head, **shape)
    assert torch.equal(written, model.generate(ids[:, :5], max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("tied", [False, True])
def test_a_new_token_is_no_likelier_than_the_average_one(pair, tied):
    model, own = pair(tie_word_embeddings=tied)
    ids, size = torch.randint(0, len(own), (8, 24)), len(own)
    add_edit_tokens(model, own)
    with torch.no_grad():
        open_, closed = model(ids, edit_tokens=True).logits, model(ids).logits
    assert torch.equal(open_[..., :size], closed[..., :size])
    shares = open_.double().softmax(-1)[..., size:]
    assert 0 < shares.min() and shares.max() <= 1 / (size - 1 + 2) and torch.equal(shares[..., 0], shares[..., 1])
    others = torch.arange(size) != 3
    rows = model.get_output_embeddings().weight
    assert torch.allclose(rows[size], rows[:size][others].mean(0), atol=1e-6)


def test_rows_behind_the_tokenizer_are_used_first(pair):
    model, own = pair()
    size = len(own)
    model.resize_token_embeddings(size + 3)
    model.config.tokenizer_length = size
    add_edit_tokens(model, own)
    check_tokenizer(model, own)
    assert (model.config.vocab_size, model.config.tokenizer_length) == (size + 3, size + 2)
    assert model.config.edit_token_ids == [size, size + 1]
    model, own = pair()
    model.resize_token_embeddings(size + 1)
    model.config.tokenizer_length = size
    add_edit_tokens(model, own)
    assert (model.config.vocab_size, model.config.tokenizer_length) == (size + 2, size + 2)


def test_a_tokenizer_that_has_them_leaves_the_tables_alone(tokenizer):
    own = copy.deepcopy(tokenizer)
    ids = ensure_edit_tokens(own)
    model = NanoLLaDAForMaskedLM(config_for(own, **SHAPE))
    assert model.config.edit_token_ids == list(ids)  # a fresh model knows what its tokenizer has
    model.config.delete_token_id = model.config.insert_token_id = None  # trained before it knew
    before = copy.deepcopy(model.state_dict())
    assert add_edit_tokens(model, own) == 0 and model.config.edit_token_ids == list(ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_tokenizer_must_have_what_the_config_names(pair):
    model, own = pair()
    other = copy.deepcopy(own)
    add_edit_tokens(model, own)
    other.add_tokens(["x1", "x2"])
    size = len(own)
    message = rf"`delete_token_id` must be None \(the tokenizer's <\|delete\|>\), got {size - 2}; `insert_token_id`"
    with pytest.raises(ValueError, match=message):
        check_tokenizer(model, other)
    model.config.delete_token_id, model.config.insert_token_id = size - 1, size - 2
    message = rf"`delete_token_id` must be {size - 2} \(the tokenizer's <\|delete\|>\), got {size - 1}"
    with pytest.raises(ValueError, match=message):
        check_tokenizer(model, own)


# ---- likelihood, loss, labels


def test_they_take_nothing_from_a_text(pair):
    """A text's likelihood is that of the tokens a text is made of, whatever the rows of the edit tokens hold."""
    batch = {"input_ids": torch.tensor([[1, 40, 41, 42, 2]]), "labels": torch.tensor([[-100, 40, 41, 42, 2]])}
    for head, score in zip(HEADS, (causal_nll, exact_nelbo), strict=True):
        model, own = pair(head)
        with torch.no_grad():
            before, size = score(model, batch), len(own)
            add_edit_tokens(model, own)
            model.get_output_embeddings().weight[size:] = 9.0  # as if they were learnt
            assert torch.equal(score(model, batch), before)
    assert (model(batch["input_ids"], edit_tokens=True).logits[..., size:] != FLOOR).all()


def test_losses_know_them_where_they_are_asked_for(pair):
    model, own = pair()
    ids, size = torch.tensor([[1, 40, 3, 42, 2]]), len(own)
    labels, weights = torch.tensor([[-100, -100, 41, -100, -100]]), torch.ones(1, 5)
    before = model(ids, labels=labels, loss_weights=weights).loss
    add_edit_tokens(model, own)
    assert torch.equal(model(ids, labels=labels, loss_weights=weights).loss, before)
    log_probs = model(ids, edit_tokens=True).logits[0, 2].log_softmax(-1)
    for label in (41, size, size + 1):
        labels[0, 2] = label
        with_weights = model(ids, labels=labels, loss_weights=weights, edit_tokens=True).loss
        plain = model(ids, labels=labels, edit_tokens=True).loss
        assert torch.allclose(with_weights, -log_probs[label]) and torch.allclose(plain, -log_probs[label])
    assert model(ids, labels=labels, loss_weights=weights).loss == torch.inf
    with pytest.raises(ValueError, match=f"`labels` must not hold an edit token, got {size + 1}"):
        model(ids, labels=labels)
    with pytest.raises(ValueError, match="`edit_tokens` needs a model with `config.delete_token_id`, got None"):
        pair()[0](ids, edit_tokens=True)


def test_the_ar_twin_keeps_them_out_of_its_weighted_loss(pair):
    model, own = pair(NanoLLaDAForCausalLM)
    ids = torch.tensor([[1, 40, 41, 42, 2]])
    before = model(ids, labels=ids, loss_weights=torch.ones(1, 5)).loss
    add_edit_tokens(model, own)
    assert torch.equal(model(ids, labels=ids, loss_weights=torch.ones(1, 5)).loss, before)


# ---- a run


def delete_all(input_ids, targets, config, *, seed, index, rank, epoch, block_ids, **settings):
    """Every target gives way to a mask; every other of them is to be deleted."""
    noise = masking.corrupt(
        input_ids, targets, config, seed=seed, index=index, rank=rank, epoch=epoch, block_ids=block_ids, **settings
    )
    odd = torch.arange(input_ids.shape[1]) % 2 == 1
    noise.labels = noise.labels.masked_fill(noise.supervised & odd, config.delete_token_id)
    return noise


@pytest.fixture
def deleting(monkeypatch):
    kind = CorruptionKind(delete_all, (masking.MaskingSettings,), "deleting", "deletes", edit_tokens=lambda args: True)
    monkeypatch.setitem(CORRUPTIONS, "deleting", kind)


def arguments(tmp_path, corruption="deleting", **more):
    more = {"max_steps": 24, "learning_rate": 0.02, "logging_steps": 12, "report_to": ["none"], **more}
    return DiffusionConfig(str(tmp_path / "run"), corruption=corruption, use_cpu=True, **more)


def train(model, own, args, **kwargs):
    rows = Dataset.from_list([{"text": f"the {word} sat on the {word}"} for word in ("cat", "dog", "hen") * 40])
    data = DataArguments(max_length=16)
    return DiffusionTrainer(model, args, train_dataset=rows, processing_class=own, data_args=data, **kwargs)


def test_a_run_that_needs_them_adds_and_learns_them(deleting, pair, tmp_path):
    model, own = pair()
    size = len(own)
    trainer = train(model, own, arguments(tmp_path))
    assert trainer.model.config.edit_token_ids == [size, size + 1] and len(own) == size + 2
    trainer.train()
    first, *_, last = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert last < first  # a label that may not be predicted has an infinite loss
    trainer.save_model(str(tmp_path / "saved"))
    saved, tokens = (
        load_model(NanoLLaDAForMaskedLM, tmp_path / "saved"),
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
    )
    check_tokenizer(saved, tokens)
    ids = torch.full((1, 16), 3)
    odd = saved(ids, edit_tokens=True).logits.softmax(-1)[0, :, size]
    assert odd[1::2].mean() > 5 / size  # less than 1/size at first
    again = train(str(tmp_path / "saved"), None, arguments(tmp_path))  # knows them: nothing is added
    assert again.model.config.vocab_size == size + 2
    assert torch.equal(again.model.lm_head.weight, saved.lm_head.weight)


def test_a_run_that_needs_none_adds_none(pair, tmp_path):
    model, own = pair()
    size = len(own)
    assert train(model, own, arguments(tmp_path, "masking")).model.config.edit_token_ids == [] and len(own) == size


def test_adapters_carry_no_new_rows(deleting, pair, tmp_path):
    model, own = pair()
    model.save_pretrained(tmp_path / "base")
    own.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2)
    with pytest.raises(ValueError, match=r"needs a checkpoint that knows <\|delete\|> and <\|insert\|>"):
        train(str(tmp_path / "base"), None, arguments(tmp_path), peft_config=lora)
    model, own = load_model(NanoLLaDAForMaskedLM, tmp_path / "base"), AutoTokenizer.from_pretrained(tmp_path / "base")
    add_edit_tokens(model, own)
    model.save_pretrained(tmp_path / "grown")
    own.save_pretrained(tmp_path / "grown")
    trainer = train(str(tmp_path / "grown"), None, arguments(tmp_path), peft_config=lora)
    trainer.train()  # the adapter moves the states that the rows are multiplied with
    assert trainer.state.log_history[-1]["train_loss"] < torch.inf


def test_a_run_without_a_tokenizer_must_know_them(deleting, pair, tmp_path):
    columns = {"input_ids": [1, 40], "labels": [-100, 40], "document_ids": [0, 0], "position_ids": [0, 1]}
    rows = [{**columns, "num_bytes": 1, "index": 0}]
    with pytest.raises(ValueError, match=r"`processing_class` must be given for a model without <\|delete\|>"):
        DiffusionTrainer(pair()[0], arguments(tmp_path), train_dataset=rows)
