"""What a way of corrupting rows is, what it may use, and what it gives back."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import chain

import torch


@dataclass
class Corruption:
    """
    A corrupted batch: noisy ids, labels and weights, drawn together so that they can't disagree.

    Attributes:
        noisy_input_ids (`torch.LongTensor` of shape `(copies * batch, length)`): What the model reads.
        labels (`torch.LongTensor` of shape `(copies * batch, length)`): The ids that it predicts, and −100.
        weights (`torch.DoubleTensor` of shape `(copies * batch, length)`): What a label's cross-entropy counts. Of
            masks alone their expectation is one per target, so that a sum over labels divided by the number of
            *targets* estimates the loss per token.
        copies (`int`): How often each row is there: first all rows once, then all again.
        edited (`torch.BoolTensor` of shape `(copies * batch, length)`, *optional*): The labels at tokens that are
            visible and may be wrong, for the log. `None`: labels at masks alone.
        origin (`torch.LongTensor` of shape `(copies * batch, length)`, *optional*): Where rows change their length, so
            that `length` isn't the batch's: the column of the clean row whose context (document, …) each column has;
            −1 is padding. `None`: its own.
    """

    noisy_input_ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    copies: int = 1
    edited: torch.Tensor | None = None
    origin: torch.Tensor | None = None

    def context(self, context: dict) -> dict:
        """What a model reads beside the clean ids, `[copies * batch, L]` each, as it goes with the noisy ones."""
        if self.origin is None:
            return context
        inside, source = self.origin >= 0, self.origin.clamp(min=0)
        context = {name: value.gather(-1, source) for name, value in context.items()}
        mask = context.get("attention_mask", torch.ones_like(source))
        context["attention_mask"] = mask.where(inside, 0)
        if "document_ids" in context:
            documents = context["document_ids"].where(inside, -1)
            columns = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
            begins = torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
            positions = columns - columns.where(begins, 0).cummax(-1).values
            context |= {"document_ids": documents, "position_ids": positions}
        return context

    @property
    def supervised(self) -> torch.BoolTensor:
        """`(copies * batch, length)`: where a label stands."""
        return self.labels != -100


@dataclass(frozen=True)
class Lexicon:
    """
    The tokens that may take another's place, with their law in the training rows.

    A fixed law of the run, and not of a batch or a row: a row's noise then does not hang on its batch mates, and a
    token that is out of place does not tell what stands elsewhere in its row.

    Attributes:
        text (`torch.BoolTensor` of shape `(vocab_size,)`): What is no special token.
        counts (`torch.LongTensor` of shape `(vocab_size,)`): How often a text token is a target.
    """

    text: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, rows: Iterable[dict], config, tokenizer=None) -> "Lexicon":
        """
        Counts the targets of rows with `input_ids` and `labels`.

        Raises:
            `ValueError`: if none of them is text.
        """
        size = config.vocab_size
        counts = torch.zeros(size, dtype=torch.long)
        for row in rows:
            ids, labels = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])
            counts += torch.bincount(ids[labels != -100], minlength=size)
        text = torch.ones(size, dtype=torch.bool)
        text[list(special_ids(config, tokenizer))] = False
        if tokenizer is not None:
            text[len(tokenizer) :] = False  # rows that only fill the embedding up
        counts = counts.masked_fill(~text, 0)
        if not counts.any():
            raise ValueError("`train_dataset` must have targets that are text, got special tokens alone")
        return cls(text, counts)

    def to(self, device) -> "Lexicon":
        return Lexicon(self.text.to(device), self.counts.to(device))

    def draw(self, uniform: torch.Tensor, source: str) -> torch.LongTensor:
        """
        A token for each number.

        Args:
            uniform (`torch.DoubleTensor`): Numbers in [0, 1), of any shape.
            source (`str`): "unigram", as often as it is a target; or "uniform", all text alike.
        """
        shares = (self.counts if source == "unigram" else self.text.long()).cumsum(-1)  # [V]
        place = torch.searchsorted(shares, (uniform * shares[-1]).long(), right=True)
        return place.view(uniform.shape)


def special_ids(config, tokenizer=None) -> set[int]:
    """The ids that are no text: a model's own, and its tokenizer's special tokens."""
    names = [name for name in vars(config) if name.endswith("_token_id")]
    found = [getattr(config, name) for name in names]
    own = (value if isinstance(value, list) else [value] for value in found if value is not None)
    return {*chain.from_iterable(own), *getattr(tokenizer, "all_special_ids", ())}


@dataclass(frozen=True)
class CorruptionKind:
    """
    A way of corrupting, as `CORRUPTIONS` of `noise/registry.py` names it.

    Attributes:
        corrupt (`Callable`): `corrupt(input_ids, targets, config, *, seed, index, rank, epoch, block_ids, **settings)`
            to a `Corruption`; see `masking.corrupt`.
        settings (`tuple[type, ...]`): Dataclasses of what it reads, which other kinds may read, too: fields with
            defaults and `metadata["help"]`, which become options of `DiffusionConfig` and its program, and a method
            `check` of them alone, which raises `ValueError`.
        objective (`str`): What the loss is then, as `run.json` and the model card name it.
        help (`str`): What is hidden or changed, in a line.
        check (`Callable`, *optional*): `check(args)` raises `ValueError` for settings that don't go together.
        drafts (`Callable`, *optional*): `drafts(args)`: whether `corrupt` also gets `draft`, the model's own
            predictions: `draft(noisy_input_ids [R, L], where [R, L], rows [R])` gives the logits `[N, V]` at `where`,
            in the order of rows. `rows` are numbers of the corrupted batch: each is read in the context (blocks,
            documents, …) of its row.
        lexicon (`bool`): Whether it also gets `lexicon`, a [`Lexicon`].
        documents (`bool`): Whether it also gets `document_ids`, those of packed rows or `None`.
        edit_tokens (`Callable`, *optional*): `edit_tokens(args)`: whether the labels hold the config's
            `delete_token_id` and `insert_token_id`.
    """

    corrupt: Callable[..., Corruption]
    settings: tuple[type, ...]
    objective: str
    help: str
    check: Callable | None = None
    drafts: Callable | None = None
    lexicon: bool = False
    documents: bool = False
    edit_tokens: Callable | None = None

    def settings_of(self, args) -> dict:
        """Of training arguments what this way reads, by name."""
        names = [field.name for settings in self.settings for field in fields(settings)]
        return {name: getattr(args, name) for name in names}
