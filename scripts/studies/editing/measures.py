"""What a study of editing measures: what decoders write, at how many forward passes, and what visible tokens say."""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

from nanollada.scripts.studies.editing.decoders import DECODERS

TOGETHER = 200  # rows of a batch
CANDIDATES = 16  # places of an answer at which visible tokens are asked about
PAIRS = 2  # n-grams of `distinct`


# ---- writing


class Tally:
    """
    A streamer that counts, row by row, how often a decided token was replaced or masked again. A step that moves
    tokens counts for nothing else.

    Args:
        mask_token_id (`int`): The model's.

    Attributes:
        edits (`torch.LongTensor` of shape `(batch,)`): So far; `None` before the first step.
        forwards (`torch.LongTensor` of shape `(batch,)`): The passes that the row was read in; likewise.
    """

    def __init__(self, mask_token_id: int):
        self.mask_token_id, self.edits, self.draft, self.moved = mask_token_id, None, None, False
        self.forwards = None

    def put(self, value) -> None:
        """Prompts and finished columns: nothing to count."""

    def put_draft(self, value) -> None:
        """The last columns of all rows after a step: as many as of the step before, or fewer."""
        if self.edits is None:
            self.edits = value.new_zeros(len(value))
        elif not self.moved:
            before = self.draft[:, -value.shape[1] :]
            self.edits += ((before != value) & (before != self.mask_token_id)).sum(1)
        self.draft, self.moved = value.clone(), False

    def put_confidence(self, value) -> None:
        """What the step read, NaN elsewhere: the rows that were at work."""
        read = (~value.isnan()).any(1).long()
        self.forwards = read if self.forwards is None else self.forwards + read

    def put_moves(self, origin) -> None:
        """Where the columns of the draft that comes next stood before."""
        self.moved = True

    def end(self) -> None:
        """Nothing is left to do."""


def padded(model, rows: list[list[int]], pad_token_id: int):
    """Ids and attention mask, `[B, W]`, of rows that end together."""
    import torch

    width = max(map(len, rows))
    ids = [[pad_token_id] * (width - len(row)) + row for row in rows]
    visible = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=model.device), torch.tensor(visible, device=model.device)


def write(model, prompts: list[list[int]], pad_token_id: int, seed: int, **settings) -> tuple[list, list, list]:
    """
    Lets a diffusion model write behind prompts, and fill the masks inside them.

    Args:
        model ([`NanoLLaDAForMaskedLM`]): The model.
        prompts (`list[list[int]]`): Token ids.
        pad_token_id (`int`), seed (`int`): Of batches, and of what is drawn.
        settings: Of `generate`; the checkpoint's own are left out.

    Returns:
        `tuple`: for each prompt the row without padding, its forward passes and its edits.
    """
    import torch

    from nanollada.scripts.decoding.settings import default_decoding

    rows, forwards, edits = ([None] * len(prompts) for _ in range(3))
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for start in range(0, len(order), TOGETHER):
        places = order[start : start + TOGETHER]
        ids, visible = padded(model, [prompts[place] for place in places], pad_token_id)
        tally, generator = Tally(model.config.mask_token_id), torch.Generator().manual_seed(1000 * seed + start)
        with default_decoding(model):
            output = model.generate(ids, attention_mask=visible, streamer=tally, generator=generator, **settings)
        columns = (output.tolist(), tally.forwards.tolist(), tally.edits.tolist())
        for place, row, *counts in zip(places, *columns, strict=True):
            rows[place] = row[ids.shape[1] - len(prompts[place]) :]
            forwards[place], edits[place] = counts
    return rows, forwards, edits


# ---- parts


@dataclass(frozen=True)
class Questions:
    """
    Held-out rows: what is asked and what is right.

    Attributes:
        pairs (`list[tuple[list[int], list[int]]]`): Token ids before the answer, and of it.
        rows (`list[dict]`): What a puzzle's verifier reads; empty for text.
        behind (`list[list[int]]`): Infilling: what stands behind each answer.
    """

    pairs: list
    rows: list = field(default_factory=list)
    behind: list = field(default_factory=list)


def puzzle_questions(tokenizer, puzzle: str, count: int, options: dict) -> Questions:
    """Problems of a puzzle's test side, the same ones for all."""
    from nanollada.scripts.evaluation.answers import questions_of
    from nanollada.trainers.puzzles.registry import make_rows

    rows = make_rows(puzzle, count, 0, "test", **options)
    turns = [[("user", row["prompt"]), ("assistant", row["answer"])] for row in rows]
    chats = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    return Questions(questions_of(tokenizer, chats), rows)


def documents(tokenizer, files: list[str]) -> list[list[int]]:
    """Token ids of texts, each behind the token that documents begin with."""
    from nanollada.scripts.decoding.checkpoint import prompt_ids

    lines = itertools.chain(*(Path(file).read_text(encoding="utf-8").splitlines() for file in files))
    return [prompt_ids(tokenizer, json.loads(line)["text"]) for line in lines]


def text_questions(tokenizer, files: list[str], count: int, before: int, tokens: int) -> Questions:
    """Beginnings and what follows them: the start of each document, then windows inside, until there are enough."""
    texts, pairs = documents(tokenizer, files), []
    for start in range(0, max(map(len, texts)), before + tokens):
        for ids in texts:
            row = ids[:1] + ids[1 + start : start + before + tokens]
            if len(row) == before + tokens:
                pairs.append((row[:before], row[before:]))
    return Questions(enough(pairs, count))


def infill_questions(tokenizer, files: list[str], count: int, before: int, tokens: int) -> Questions:
    """Windows of `before` tokens with a gap of 2 to `tokens` of them in the middle, by turns."""
    texts, pairs, behind = documents(tokenizer, files), [], []
    for start in range(0, max(map(len, texts)), before):
        for ids in texts:
            row, gap = ids[:1] + ids[1 + start : start + before], 2 + len(pairs) % (tokens - 1)
            if len(row) == before:
                cut = (before - gap) // 2
                pairs.append((row[:cut], row[cut : cut + gap]))
                behind.append(row[cut + gap :])
    return Questions(enough(pairs, count), behind=behind[:count])


def references(questions: Questions) -> list[list[int]]:
    """The rows as they were."""
    behind = questions.behind or [[]] * len(questions.pairs)
    return [before + answer + rest for (before, answer), rest in zip(questions.pairs, behind, strict=True)]


def enough(pairs: list, count: int) -> list:
    """
    Raises:
        `ValueError`: for fewer windows than are asked for.
    """
    if len(pairs) < count:
        raise ValueError(f"`eval_rows` must not exceed the windows of `eval_data`, {len(pairs)}, got {count}")
    return pairs[:count]


def solved(tokenizer, model, questions: Questions, written: list, puzzle: str) -> dict[str, list]:
    """1 for an answer that solves its problem."""
    from nanollada.scripts.evaluation.answers import until_end
    from nanollada.trainers.puzzles.registry import solves

    texts = [tokenizer.decode(until_end(model, ids)[0], skip_special_tokens=True) for ids in written]
    return {"quality": [int(solves(puzzle, row, text)) for row, text in zip(questions.rows, texts, strict=True)]}


def likelihood(tokenizer, model, questions: Questions, written: list, judge) -> dict[str, list]:
    """Mean log-probability of what was written, its end included, under the AR twin, nats a token; and its variety."""
    from nanollada.scripts.evaluation.answers import until_end
    from nanollada.scripts.evaluation.metrics import distinct
    from nanollada.trainers.scoring.continuations import score_continuations

    ended = [until_end(model, ids) for ids in written]
    said = [ids + ([tokenizer.eos_token_id] if end else []) for ids, end in ended]
    pairs = [(before, ids) for (before, _), ids in zip(questions.pairs, said, strict=True)]
    scores = score_continuations(judge, pairs, pad_token_id=tokenizer.pad_token_id, batch_size=TOGETHER)
    per_token = (-scores.nats / scores.tokens).tolist()
    return {"quality": per_token, "distinct": [distinct(ids, PAIRS) if len(ids) >= PAIRS else 1.0 for ids in said]}


def filled(tokenizer, questions: Questions, rows: list, judge) -> dict[str, list]:
    """1 for a gap filled as it was; tokens too many or too few; the row's log-probability under the AR twin, nats."""
    from nanollada.trainers.scoring.continuations import score_continuations

    pairs = [(row[:1], row[1:]) for row in rows]
    scores = score_continuations(judge, pairs, pad_token_id=tokenizer.pad_token_id, batch_size=TOGETHER)
    whole = references(questions)
    return {
        "quality": [int(row == reference) for row, reference in zip(rows, whole, strict=True)],
        "length_error": [abs(len(row) - len(reference)) for row, reference in zip(rows, whole, strict=True)],
        "log_probability": (-scores.nats).tolist(),
    }


# ---- what visible tokens say


def beliefs(model, questions: Questions, pad_token_id: int, rows: int, seed: int) -> dict[str, list]:
    """
    How far the prediction at a visible token is from that at the same place masked, KL(masked ‖ visible) in nats: an
    exact editor has none. Masked models copy what is there.

    Args:
        model ([`NanoLLaDAForMaskedLM`]): The model.
        questions ([`Questions`]): The held-out rows.
        pad_token_id (`int`), rows (`int`), seed (`int`): Of batches, how many of the rows, and of what is drawn.

    Returns:
        `dict`: by row, the mean over at most 16 places of its answer: `kept` with the right token there, `replaced`
            with another one, drawn from all answers' tokens.
    """
    import random

    import torch

    drawn, mask = random.Random(seed), model.config.mask_token_id
    answers = [answer for _, answer in questions.pairs[:rows]]
    whole, pool = references(questions), [token for answer in answers for token in answer]
    masked, replaced, kept, places, owners = [], [], [], [], []
    for number, (before, answer) in enumerate(questions.pairs[:rows]):
        row = whole[number]
        asked = min(CANDIDATES, len(answer))
        for step in range(asked):
            place = len(before) + step * len(answer) // asked
            other = drawn.choice([token for token in pool if token != row[place]])
            for kind, token in ((masked, mask), (replaced, other), (kept, row[place])):
                kind.append(row[:place] + [token] + row[place + 1 :])
            places.append(place)
            owners.append(number)
    truth, *said = (predicted(model, kind, places, pad_token_id) for kind in (masked, replaced, kept))
    owners, counts = torch.tensor(owners), torch.tensor(owners).bincount()
    found = {}
    for name, other in zip(("replaced", "kept"), said, strict=True):
        divergence = (truth.exp() * (truth - other)).sum(-1)  # [N]
        found[name] = (divergence.new_zeros(len(answers)).index_add_(0, owners, divergence) / counts).tolist()
    return found


def predicted(model, rows: list[list[int]], places: list[int], pad_token_id: int):
    """The log-probabilities, `[N, V]` in float64, that a model gives at one place of each row."""
    import torch

    parts = []
    for start in range(0, len(rows), TOGETHER):
        batch, at = rows[start : start + TOGETHER], places[start : start + TOGETHER]
        ids, visible = padded(model, batch, pad_token_id)
        asked = torch.zeros_like(ids, dtype=torch.bool)
        for number, (row, place) in enumerate(zip(batch, at, strict=True)):
            asked[number, place - len(row)] = True
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=visible, logits_to_keep=asked).logits
        parts.append(logits.double().log_softmax(-1).cpu())
    return torch.cat(parts)


# ---- a run


def measure(folder: str, decoders, part: str, args, seed: int) -> dict:
    """
    Lets every decoder write the same held-out rows.

    Args:
        folder (`str`): The checkpoint.
        decoders (`Iterable[str]`): Names of `DECODERS`; those that insert or delete are left out where the model has
            no tokens for it.
        part (`str`): A puzzle's name, "text" or "infill".
        args ([`~scripts.studies.editing.study.EditingArguments`]): Which rows, how many, how long; who judges.
        seed (`int`): Of what is drawn.

    Returns:
        `dict`: `decoders`: by name, and of each by row `quality` (the greater, the better), `forwards`, `edits` and
            what else the part measures; `beliefs`: of [`beliefs`].
    """
    from nanollada.scripts.decoding.checkpoint import load_checkpoint

    model, tokenizer = load_checkpoint(folder)
    judge = None if args.ar is None else load_checkpoint(args.ar, argument="ar")[0]
    limits = (args.eval_rows, args.prompt_tokens, args.max_new_tokens)
    if part == "text":
        questions = text_questions(tokenizer, args.eval_data, *limits)
    elif part == "infill":
        questions = infill_questions(tokenizer, args.eval_data, *limits)
    else:
        questions = puzzle_questions(tokenizer, part, args.eval_rows, json.loads(args.puzzle_options))
    found, knows = {}, model.config.insert_token_id is not None
    for name in [name for name in decoders if knows or not DECODERS[name].edit_tokens]:
        decoder, settings = DECODERS[name], {"max_new_tokens": args.max_new_tokens, **DECODERS[name].settings}
        prompts = [before for before, _ in questions.pairs]
        if part == "infill":
            prompts, settings = gaps_of(model, questions, decoder.masks), {**settings, "max_new_tokens": 0}
        if decoder.kind == "reference":
            rows, *counts = references(questions), [0] * len(prompts), [0] * len(prompts)
        else:
            rows, *counts = write(model, prompts, tokenizer.pad_token_id, seed, **settings)
        if part == "infill":
            scores = filled(tokenizer, questions, [unpadded(row, tokenizer.pad_token_id) for row in rows], judge)
        else:
            written = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
            judged = (likelihood, judge) if part == "text" else (solved, part)
            scores = judged[0](tokenizer, model, questions, written, judged[1])
        found[name] = {**scores, **dict(zip(("forwards", "edits"), counts, strict=True))}
    return {"decoders": found, "beliefs": beliefs(model, questions, tokenizer.pad_token_id, args.belief_rows, seed)}


def unpadded(row: list[int], pad_token_id: int) -> list[int]:
    """A row without the pad tokens at its end, where others have grown."""
    length = next((place for place in range(len(row), 0, -1) if row[place - 1] != pad_token_id), 0)
    return row[:length]


def gaps_of(model, questions: Questions, masks: float) -> list[list[int]]:
    """The rows with masks in their gaps, as many as the answers' tokens times `masks`, at least one."""
    mask = model.config.mask_token_id
    counts = [max(1, round(masks * len(answer))) for _, answer in questions.pairs]
    parts = zip(questions.pairs, counts, questions.behind, strict=True)
    return [before + [mask] * count + behind for (before, _), count, behind in parts]
