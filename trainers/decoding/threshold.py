"""The `threshold` of a diffusion model's generation config, chosen on held-out rows at no loss of score."""

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

import torch
from accelerate.utils import gather_object

from nanollada.trainers.data.packing import IGNORE

logger = logging.getLogger(__name__)

CANDIDATES = (0.999, 0.995, 0.99, 0.97, 0.95, 0.9)  # from the safest to that of Fast-dLLM (arXiv 2505.22618)
LOSS = 0.005  # what an answer's likeness to the reference may lose, on average
FEWEST, MOST = 32, 128  # rows
SHARE = 0.02  # of training's compute, for decoding the rows one token a step


@dataclass(frozen=True)
class Question:
    """A held-out row: token ids of the prompt, and of the answer without its EOS."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Answer:
    """What a model wrote: token ids before the EOS, whether there is one, and the forward passes."""

    ids: list[int]
    ended: bool
    passes: float


def choose(
    decode: Callable[[float | None], list[Answer]], references: Sequence[list[int]]
) -> tuple[float | None, list[dict]]:
    """
    The lowest threshold at which no score falls, going down from the safest and stopping where one does.

    The scores are the number of answers that are the reference, and the mean likeness to it (`difflib`'s ratio of
    common tokens, in [0, 1]), both against one token a step on the same rows. The first must not fall, the second by
    no more than `LOSS`: free text is seldom the reference, and few of its tokens are decided otherwise where no score
    falls. A candidate below one that fails is not tried (fixed sequence: no error rate grows with the candidates).

    Args:
        decode (`Callable`): From a threshold (`None`: one token a step) to the answers, in the references' order.
        references (`Sequence[list[int]]`): Token ids, without EOS.

    Returns:
        The threshold, or `None` if the safest loses; and a record of all that were tried: `threshold`,
        `exact_match`, `likeness`, `tokens_per_forward`, and against one token a step `lost` and `gained` (answers that
        are no longer the reference, and those that became it), `likeness_difference` and its `standard_error`.
    """
    first = decode(None)
    records, chosen = [_record(None, first, first, references)], None
    for threshold in CANDIDATES:
        record = _record(threshold, decode(threshold), first, references)
        records.append(record)
        if record["lost"] > record["gained"] or record["likeness_difference"] < -LOSS:
            break
        chosen = threshold
    return chosen, records


def _record(threshold: float | None, answers: list[Answer], first: list[Answer], references) -> dict:
    right, before, alike, alike_before = (
        [measure(*pair) for pair in zip(said, references, strict=True)]
        for measure in (_is_right, _likeness)
        for said in (answers, first)
    )
    differences = [now - then for now, then in zip(alike, alike_before, strict=True)]
    written = sum(len(said.ids) + said.ended for said in answers)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return {
        "threshold": threshold,
        "exact_match": sum(right) / len(right),
        "likeness": statistics.fmean(alike),
        "tokens_per_forward": written / sum(said.passes for said in answers),
        "lost": sum(then and not now for now, then in zip(right, before, strict=True)),
        "gained": sum(now and not then for now, then in zip(right, before, strict=True)),
        "likeness_difference": statistics.fmean(differences),
        "standard_error": error,
    }


def _is_right(said: Answer, reference: list[int]) -> bool:
    return said.ended and said.ids == reference


def _likeness(said: Answer, reference: list[int]) -> float:
    return SequenceMatcher(None, said.ids, reference, autojunk=False).ratio()


def questions_of(rows, eos_token_id: int, canvas: int | None = None) -> list[Question]:
    """
    Held-out SFT rows, each with its last answer; without those that have no prompt, whose answer was cut, or which are
    longer than every canvas.
    """
    questions = []
    for row in rows:
        ids, labels = list(row["input_ids"]), list(row["labels"])
        if canvas is not None and len(ids) > canvas:
            continue
        start = max((place + 1 for place, label in enumerate(labels) if label == IGNORE), default=0)
        if start and start < len(ids) and ids[-1] == eos_token_id:
            questions.append(Question(ids[:start], ids[start:-1]))
    return questions


def affordable_rows(questions: Sequence[Question], canvas: int | None, tokens_seen: int) -> int:
    """
    The rows, at most `MOST`, whose decoding one token a step takes `SHARE` of training's compute: 2 operations a
    parameter and token that is read, and 6 in training. The same on every machine.

    Args:
        questions (`Sequence[Question]`): All there are.
        canvas (`int`, *optional*): Tokens of every canvas; `None` where it grows with the answer.
        tokens_seen (`int`): Of training.
    """
    read = [
        len(question.answer) * (len(question.prompt) + len(question.answer))
        if canvas is None
        else (canvas - len(question.prompt)) * canvas
        for question in questions
    ]
    return min(MOST, len(questions), int(SHARE * 3 * tokens_seen / max(1, statistics.fmean(read))))


def draw(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """`count` of them, the same whatever the ranks; those with the shortest prompts first."""
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return sorted((questions[place] for place in order), key=lambda question: len(question.prompt))


@torch.no_grad()
def decode_rows(model, questions: Sequence[Question], batch_size: int, threshold: float | None) -> list[Answer]:
    """
    Greedy answers as the model's generation config decodes them, which has no threshold, and with this one. Where it
    says `max_length`, prompt included, only prompts of one length share a batch: its padding would be taken from their
    canvas.
    """
    settings, ends = model.generation_config, model.generation_config.eos_token_id
    ends, pad = set(ends) if isinstance(ends, (list, tuple)) else {ends}, settings.pad_token_id
    answers, options = [], {"temperature": 0.0, "return_dict_in_generate": True}
    if threshold is not None:
        options["threshold"] = threshold
    for batch in _batches(questions, batch_size, settings.max_new_tokens is None):
        prompts = [question.prompt for question in batch]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])  # [B, width]
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), **options)
        rates = output.tokens_per_forward.tolist()
        for row, rate in zip(output.sequences[:, width:].tolist(), rates, strict=True):
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            tokens = end + (end < len(row))
            answers.append(Answer(row[:end], end < len(row), tokens / rate))
    return answers


def _batches(questions: Sequence[Question], size: int, of_one_length: bool) -> Iterator[list[Question]]:
    """In their order."""
    for _, group in groupby(questions, key=lambda question: of_one_length and len(question.prompt)):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def choose_threshold(trainer) -> dict:
    """
    Chooses the threshold for the weights that the trainer saves, on its held-out rows, all ranks together.

    Args:
        trainer ([`~trainers.diffusion.DiffusionTrainer`]): With `rows`, SFT's; `args.threshold_rows` says how many.

    Returns:
        `dict`: `threshold` (`None`: none), and `rows` and `tried` (see [`choose`]), or why there is none, `reason`.
    """
    args, model = trainer.args, trainer.plain_model
    if args.threshold_rows == 0:
        return {"threshold": None, "reason": "`threshold_rows` is 0"}
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return _none(trainer, "no rank has all weights (FSDP or DeepSpeed)")
    canvas = model.generation_config.max_length
    questions = questions_of(trainer.rows.eval or (), model.config.eos_token_id, canvas)
    if not questions:
        return _none(trainer, "there are no held-out answers (`eval_data`, or a `held_out_fraction`)")
    seen, count = int(trainer.state.num_input_tokens_seen), args.threshold_rows
    if count is None:
        count = affordable_rows(questions, canvas, seen)
        if count < FEWEST:
            found = f"{len(questions)} held-out answers and {seen} tokens of training"
            return _none(trainer, f"{found} afford {count} rows, fewer than {FEWEST} (give `threshold_rows`)")
    drawn = draw(questions, count, args.seed)
    training = model.training
    with trainer.averaged_weights():
        model.eval()
        threshold, records = choose(lambda value: _decode_together(trainer, drawn, value), [q.answer for q in drawn])
        model.train(training)
    return {"threshold": threshold, "rows": len(drawn), "tried": records}


def _decode_together(trainer, questions: list[Question], threshold: float | None) -> list[Answer]:
    """Every rank decodes its share, and has all answers."""
    rank, ranks = trainer.args.process_index, trainer.args.world_size
    mine = decode_rows(trainer.plain_model, questions[rank::ranks], trainer.args.per_device_eval_batch_size, threshold)
    shares = gather_object([mine])
    return [shares[place % ranks][place // ranks] for place in range(len(questions))]


def _none(trainer, reason: str) -> dict:
    if trainer.is_world_process_zero():
        logger.warning("no `threshold` is written into generation_config.json: %s", reason)
    return {"threshold": None, "reason": reason}
