"""Variety of drawn texts, and what a judge says of them."""

import math
from collections.abc import Callable
from typing import ClassVar

from nanollada.scripts.decoding.settings import effective_settings
from nanollada.scripts.evaluation.bench import Bench, Kind, Metric, Outcome, Row, Task, mapping, settings, whole
from nanollada.scripts.evaluation.metrics import distinct, repetition, unigram_entropy
from nanollada.scripts.evaluation.tasks.written import (
    WrittenTask,
    check_prompt,
    own_settings,
    prompts_of,
    write_answers,
)
from nanollada.trainers.data.encoding import encode_spans
from nanollada.trainers.data.files import BadRow
from nanollada.trainers.data.packing import IGNORE
from nanollada.trainers.scoring.estimates import mean, ratio, share


@settings
class StatisticsTask(WrittenTask):
    """Texts that begin with nothing (`rows` of them), or with the prompts of `data`."""

    rows: int | None = whole(1, 32)
    max_new_tokens: int = whole(1, 128)
    decoding: dict = mapping(temperature=1.0)

    greedy: ClassVar[dict] = {}

    def complete(self, given: dict, wrong) -> None:
        """Prompts are as many as there are."""
        if self.data is not None:
            if "rows" in given:
                raise wrong("rows", "left out where `data` has the prompts", given["rows"])
            self.rows = None
        super().complete(given, wrong)


def run_statistics(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """
    Variety of drawn texts, each by itself and averaged (a text too short for an n-gram is left out of that figure,
    whose `rows` says so): distinct-1 to -3 and unigram entropy over the model's own tokens, the share of 4-grams that
    stand earlier in the text; and a judge's nats, over all texts.
    """
    decoding = {"temperature": 1.0, **task.decoding, "max_new_tokens": task.max_new_tokens}
    decoding = own_settings(bench, decoding)
    said = write_answers(bench, task, prompts_of(bench, task, rows), decoding)
    records = [
        {"text": bench.tokenizer.decode(ids, skip_special_tokens=True), "tokens": ids, "ended": ended}
        for ids, ended in said
    ]
    results = []
    for metric, measure in STATISTICS.items():
        values = [value for record in records if (value := measure(record["tokens"])) is not None]
        results += [{"metric": metric, **mean(values)}] if values else []
    ended = share([record["ended"] for record in records])
    results.append({"metric": "ended", **ended})
    if bench.judge is not None:
        results += _judged(bench, task, rows, records)
    return Outcome(results, records, {"generate": effective_settings(bench.model, **decoding)})


STATISTICS: dict[str, Callable] = {
    "distinct_1": lambda tokens: distinct(tokens, 1),
    "distinct_2": lambda tokens: distinct(tokens, 2),
    "distinct_3": lambda tokens: distinct(tokens, 3),
    "repetition_4": repetition,
    "unigram_entropy": unigram_entropy,
    "tokens": lambda tokens: float(len(tokens)),
}


def _judged(bench: Bench, task: Task, rows: list[Row], records: list[dict]) -> list[dict]:
    """
    The judge's nats by its tokens and by bytes, and the perplexity exp(nats per token); of a text given its prompt,
    but of an answer in a chat by itself: the judge knows no chats.
    """
    judged = []
    for row, record in zip(rows, records, strict=True):
        prompt = row.values["prompt"]
        context = prompt if isinstance(prompt, str) and not task.chat else ""
        with row.faults():
            judged.append(judge_nats(*bench.judge, record["text"], context))
    for record, (nats, tokens) in zip(records, judged, strict=True):
        record |= {"judge_nats": nats, "judge_tokens": tokens}
    nats, tokens = zip(*judged, strict=True)
    sizes = [len(record["text"].encode()) for record in records]
    if not sum(tokens):
        return []
    per_token, per_byte = ratio(nats, tokens), ratio([value / math.log(2) for value in nats], sizes)
    perplexity, error = math.exp(per_token["value"]), per_token["standard_error"]
    figures = {
        "judge_nats_per_token": per_token,
        "judge_bits_per_byte": per_byte,
        "judge_perplexity": {
            "value": perplexity,
            "standard_error": None if error is None else error * perplexity,
        },
    }
    return [{"metric": metric, **figure, "rows": len(records)} for metric, figure in figures.items()]


def judge_nats(model, tokenizer, text: str, context: str = "") -> tuple[float, int]:
    """
    −log p of a text behind its context under a causal model, and the number of the text's tokens. In front of both
    stands what begins the judge's documents: ours begin with `<|endoftext|>`, others with their BOS, or else their
    EOS.

    Raises:
        `ValueError`: for a text longer than the judge's positions, or that its vocabulary lacks, and for a judge
            without such a token.
    """
    import torch

    ours = model.config.model_type == "nanollada"
    names = ("pad_token_id",) if ours else ("bos_token_id", "eos_token_id")
    start = next((token for name in names if (token := getattr(tokenizer, name)) is not None), None)
    if start is None:
        raise ValueError("`judge` must have a token that begins a text (BOS or EOS), got a tokenizer with none")
    try:
        ids, labels = encode_spans(tokenizer, context + text, [(len(context), len(context + text))])
    except BadRow as error:
        raise ValueError(f"`judge` must spell prompt and drawn text with its vocabulary, got {error}") from error
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and len(ids) + 1 > most:
        raise ValueError(f"`judge` must have room for a text, got {len(ids) + 1} tokens and {most} positions")
    count = len(ids) - labels.count(IGNORE)
    if not count:
        return 0.0, 0
    row = torch.tensor([[start, *ids]], device=model.device)
    with torch.no_grad():
        logits = model(row, attention_mask=torch.ones_like(row)).logits[0, -count - 1 : -1].double()  # [count, V]
    return torch.nn.functional.cross_entropy(logits, row[0, -count:], reduction="sum").item(), count


KIND = Kind(
    "Free text",
    task=StatisticsTask,
    check_row=check_prompt,
    run=run_statistics,
    metrics={
        "distinct_1": Metric("different tokens by tokens of a drawn text, mean over texts."),
        "distinct_2": Metric("the same for pairs of tokens."),
        "distinct_3": Metric("the same for triples of tokens."),
        "repetition_4": Metric("share of 4-grams of tokens that stand earlier in the text, mean over texts."),
        "unigram_entropy": Metric("entropy of a drawn text's token frequencies in nats, mean over texts.", "nats"),
        "tokens": Metric("tokens of a drawn text.", "tokens/text", drawn=False),
        "ended": Metric("share of drawn texts that ended by themselves."),
        "judge_nats_per_token": Metric(
            "nats of the drawn texts under the judge given their prompts (answers in a chat: alone), by its tokens.",
            "nats/judge token",
            drawn=False,
        ),
        "judge_bits_per_byte": Metric("the same in bits by UTF-8 bytes; ± over the drawn texts.", "bits/byte"),
        "judge_perplexity": Metric(
            "exp of the judge's nats per token; read it beside the entropy: repetition is cheap.",
            "perplexity",
            drawn=False,
        ),
    },
    make_rows=lambda task, seed: [{"prompt": ""}] * task.rows,
    judged=True,
)
