"""The model that `lm_eval_nanollada.py` gives to lm-eval: exact likelihoods of AR, bounds of diffusion models."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tqdm.auto import tqdm

from nanollada.scripts.decoding.checkpoint import load_checkpoint
from nanollada.scripts.decoding.settings import (
    DecodingArguments,
    draws,
    generation_settings,
    has_own_limit,
    new_tokens_limit,
)
from nanollada.scripts.decoding.writing import DRAWN_TOGETHER, keyed_seed
from nanollada.scripts.evaluation.answers import answers_to, batches_of_length, greedy_answers
from nanollada.trainers.data.chats import placeholders, render_hidden
from nanollada.trainers.data.collator import Collator
from nanollada.trainers.data.files import BadRow
from nanollada.trainers.scoring.continuations import (
    conditional_rows,
    context_ids,
    encode_pair,
    score_continuations,
    split_ids,
)
from nanollada.trainers.scoring.kind import is_diffusion
from nanollada.trainers.scoring.likelihood import score_rows, scored_block_length
from nanollada.trainers.scoring.rolling import rolling_rows

logger = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16", "float64")
DECODING = tuple(item.name for item in fields(DecodingArguments) if item.name != "max_new_tokens")
PARTS = 2**16  # choices of a row, or rows of a text, at most
CHUNK = 64  # batches whose scores are kept together
RENDERED = "\U0010fffd"  # begins a rendered chat, so that no text is taken for one: private, in no text
ROOM = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names, the first wins


class NanoLLaDALM(TemplateLM):
    """
    An AR or diffusion checkpoint for lm-eval.

    A plain context begins with `<|endoftext|>`, as every training document does, and is cut from its continuation by
    `continuations.encode_pair`. A chat that was rendered (`--apply_chat_template`; its
    text begins with a private character that says so) begins with the template's own first token, as SFT rows do, and
    is cut where the answer begins, as in training. Control tokens that are written out in a task's texts are text.

    Log-likelihoods of a diffusion model are lower bounds (minus `score_continuations`'s nats), with masks that belong
    to the row and the choice, whatever else is run beside them. `is_greedy` tells whether greedy decoding writes the
    continuation: for AR, each of its tokens is the likeliest one; for diffusion, a canvas of the continuation's length
    is filled token by token, the surest position first, in the model's own blocks, whatever the checkpoint's
    generation config says.

    With `--use_cache` every answer is kept as soon as its batch is done, and a run that goes on from there has the
    same numbers. Drawn texts are an exception: 16 rows of a task draw together, whatever the batch size, and those of
    them that are missing draw others than a whole run.

    `loglikelihood_rolling` scores a text from `<|endoftext|>`, without an end-of-text behind it (lm-eval's rule;
    `evaluate.py` scores the end, too), in the rows of `rolling.rolling_rows`.

    Args:
        pretrained (`str`): Folder of a checkpoint, or a model's name on the Hub.
        samples (`int`, defaults to 128): Monte Carlo masks per scored text of a diffusion model, even.
        seed (`int`, defaults to 0): Of these masks, and of what is drawn in generation.
        batch_size (`int`, defaults to 1): Rows per forward; on the command line lm-eval's `--batch_size`.
        eval_block_length (`int`, *optional*): Blocks in which a diffusion model is scored; by default the
            checkpoint's, 0 for whole rows.
        max_length (`int`, *optional*): Tokens of the longest row, `config.max_position_embeddings` by default. What
            is longer is an error, but for rolling likelihoods, which are cut into rows of so many tokens.
        rolling_context (`int`, *optional*): Tokens of context at least that such a row repeats. Default: half of it,
            in whole blocks.
        max_gen_toks (`int`, *optional*): Tokens to write, where the task does not say. By default as many as the
            checkpoint says, and 256 where that doesn't say, either.
        device (`str`, *optional*): Default: cuda if there is one, else cpu; so also for "cuda:0", which lm-eval's
            command line says where nothing was said.
        dtype (`str`, defaults to `"float32"`): Of the weights: float32, bfloat16, float16 or float64.
        trust_remote_code (`bool`, defaults to `False`): Run the code that comes with the checkpoint.
        max_batch_size (`None`): lm-eval passes it; there is no automatic batch size to bound.
        decoding: Defaults of `generate`, as for `generate.py` (`block_length`, `steps`, `threshold`, `temperature`,
            …). What a task says goes before them.

    Raises:
        `ValueError`: for arguments out of range, unknown ones, those that the kind of model has no use for, and in one
            of several processes.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        samples: int = 128,
        seed: int = 0,
        batch_size: int | str = 1,
        eval_block_length: int | None = None,
        max_length: int | None = None,
        rolling_context: int | None = None,
        max_gen_toks: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        max_batch_size: None = None,
        **decoding,
    ):
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"`nanollada` must run in one process, got WORLD_SIZE {os.environ['WORLD_SIZE']}")
        if max_batch_size is not None:
            raise ValueError(f"`max_batch_size` bounds an automatic batch size: it must be None, got {max_batch_size}")
        unknown = [name for name in decoding if name not in DECODING]
        if unknown:
            raise ValueError(f"`model_args` must be of the model nanollada or of `generate`, got {', '.join(unknown)}")
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if not isinstance(trust_remote_code, bool):
            raise ValueError(f"`trust_remote_code` must be True or False, got {trust_remote_code!r}")
        self.samples = _integer("samples", samples, 2)
        if self.samples % 2:
            raise ValueError(f"`samples` must be a positive even number (two draws in each stratum), got {samples}")
        self.seed, self.batch_size = _integer("seed", seed, 0), _integer("batch_size", batch_size, 1)
        self.max_gen_toks = max_gen_toks if max_gen_toks is None else _integer("max_gen_toks", max_gen_toks, 1)
        self.pretrained, self.dtype, self.decoding = pretrained, dtype, decoding
        self._load(trust_remote_code, device, eval_block_length)
        most = self.model.config.max_position_embeddings
        self.max_length = most if max_length is None else _integer("max_length", max_length, 2, most)
        blocks = self.scored_block_length
        unit = blocks if blocks is not None and blocks < self.max_length else 1
        self.rolling_context = max(1, self.max_length // unit // 2 * unit)
        if rolling_context is not None:
            self.rolling_context = _integer("rolling_context", rolling_context, 1, self.max_length - 1)

    def _load(self, trust_remote_code: bool, device: str | None, block_length: int | None) -> None:
        if device == "cuda:0" and not torch.cuda.is_available():  # lm-eval's own default, on every machine
            logger.warning("there is no cuda:0: the model runs on the CPU")
            device = "cpu"
        self.model, self.tokenizer = load_checkpoint(self.pretrained, trust_remote_code, device)
        self.model = self.model.to(getattr(torch, self.dtype))
        self._device, self.is_diffusion = self.model.device, is_diffusion(self.model)
        self.eval_block_length = block_length if block_length is None else _integer("eval_block_length", block_length)
        self.scored_block_length = scored_block_length(self.model, self.eval_block_length)
        generation_settings(self.model, **self.decoding)  # what does not fit is told before anything takes long
        added = self.tokenizer.added_tokens_decoder.items()
        self.special_tokens = {token.content: index for index, token in added if token.special}

    # ---- what lm-eval asks for beside scores

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """`<|endoftext|>`, with which every document begins."""
        return self.tokenizer.pad_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict:
        """What decides the scores beside the command line, for lm-eval's results file."""
        names = ("pretrained", "dtype", "samples", "seed", "max_length", "rolling_context", "scored_block_length")
        facts = {name: getattr(self, name) for name in names}
        facts |= {"bound": self.is_diffusion, "model_num_parameters": self.model.num_parameters()}
        return {**facts, "generation_config": self.model.generation_config.to_diff_dict()}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """
        Renders messages with the tokenizer's own template; the last one is left open unless
        `add_generation_prompt`.

        Raises:
            `ValueError`: without a template, and for messages that it refuses.
        """
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template, which --apply_chat_template needs")
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return RENDERED + render_hidden(self.tokenizer, chat_history, **how)
        except BadRow as error:
            raise ValueError(f"`chat_history` must be usable, got {error}") from error

    # ---- tokens

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids of a text alone, or (`add_special_tokens`) as the beginning of a document or chat."""
        if string.startswith(RENDERED):
            chat = placeholders(self.tokenizer).show(string.removeprefix(RENDERED))
            return split_ids(self.tokenizer, chat.text, 0, chat.literal)[1]
        ids = context_ids(self.tokenizer, string)
        return ids if add_special_tokens else ids[1:]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context.startswith(RENDERED):
            return encode_pair(self.tokenizer, context, continuation)
        context, hidden = context.removeprefix(RENDERED), placeholders(self.tokenizer)
        try:
            whole = context + hidden.hide(continuation)
        except BadRow as error:
            raise ValueError(f"`continuation` must be usable, got {error}") from error
        chat = hidden.show(whole, [(len(context), len(whole))])
        before, behind = split_ids(self.tokenizer, chat.text, chat.spans[0][0], chat.literal)
        if not behind:
            raise ValueError(
                f"`continuation` must add a token to its context, got {continuation!r} behind {context!r}"
            )
        return before, behind

    def _check(self, ids: list[int], room: int = 0) -> None:
        """Nothing is cut."""
        if len(ids) + room > self.max_length:
            raise ValueError(
                f"its tokens must fit into `max_length`, got {len(ids)} and {room} to write with {self.max_length}"
            )

    # ---- scores

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), is_greedy) of each (context, continuation); see the class."""
        asked = []
        for number, request in enumerate(requests):
            with _of(number, request):
                context, continuation = request.args
                asked.append(((context, continuation), *self._encode_pair(context, continuation)))
                self._check(asked[-1][1] + asked[-1][2])
        numbers = [_row_number(request) for request in requests]
        order = sorted(range(len(asked)), key=lambda place: -len(asked[place][1]) - len(asked[place][2]))
        answers, size = {}, CHUNK * self.batch_size
        for start in range(0, len(order), size):
            places = order[start : start + size]
            options = {"numbers": [numbers[place] for place in places], "disable_tqdm": disable_tqdm}
            answers |= zip(
                places, self._loglikelihood_tokens([asked[place] for place in places], **options), strict=True
            )
        return [answers[place] for place in range(len(asked))]

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, numbers: list[int] | None = None
    ) -> list[tuple[float, bool]]:
        pairs, pad = [(context, continuation) for _, context, continuation in requests], self.tokenizer.pad_token_id
        bar = tqdm(total=len(pairs), desc="Scoring continuations", unit=" pairs", disable=disable_tqdm)
        options = {"pad_token_id": pad, "batch_size": self.batch_size, "progress": bar.update, **self._noise()}
        scores = -score_continuations(self.model, pairs, numbers=numbers, **options).nats
        bar.close()
        found = list(zip(scores.tolist(), greedy_matches(self.model, pairs, pad, self.batch_size), strict=True))
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def _noise(self) -> dict:
        return {"samples": self.samples, "seed": self.seed, "block_length": self.eval_block_length}

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """
        log p of each text; 0 for an empty one.

        Raises:
            `ValueError`: for a text longer than `max_length` where that has no room for `rolling_context` and a block.
        """
        rows: list[list[dict]] = []
        for number, request in enumerate(requests):
            with _of(number, request):
                ids = self.tok_encode(request.args[0])
                rows.append(self._rolled(ids, _row_number(request)))
        found = []
        for start in range(0, len(rows), CHUNK):
            texts = rows[start : start + CHUNK]
            nats = iter(self._row_nats([row for made in texts for row in made], disable_tqdm))
            for request, made in zip(requests[start : start + CHUNK], texts, strict=True):
                found.append(0.0 - sum(next(nats) for _ in made))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def _rolled(self, ids: list[int], number: int) -> list[dict]:
        unit = self.scored_block_length or 1
        if len(ids) < self.max_length:  # one row, wherever its blocks end
            return list(rolling_rows(ids, self.max_length, 1, self.prefix_token_id, index=number))
        if -(-self.rolling_context // unit) >= self.max_length // unit:
            raise ValueError(
                "`rolling_context` must leave room for a block in `max_length`, "
                f"got {self.rolling_context} with blocks of {unit} and {self.max_length}"
            )
        place = {"block_length": self.scored_block_length, "index": number}
        return list(rolling_rows(ids, self.max_length, self.rolling_context, self.prefix_token_id, **place))

    def _row_nats(self, rows: list[dict], disable_tqdm: bool) -> list[float]:
        """Nats of rows, in their order."""
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]["input_ids"]))  # little padding
        collate, size = Collator(self.tokenizer.pad_token_id), self.batch_size
        starts = tqdm(range(0, len(rows), size), desc="Scoring texts", unit="batch", disable=disable_tqdm)
        batches = (collate([rows[place] for place in order[start : start + size]]) for start in starts)
        found = [nats.tolist() for _, nats, _, _ in score_rows(self.model, batches, **self._noise())]
        nats = dict(zip(order, sum(found, []), strict=True))
        return [nats[place] for place in range(len(rows))]

    # ---- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """
        For each (context, options) the text that `generate` writes, cut at the model's end of text and before the
        first of the options' `until` strings.

        Raises:
            `ValueError`: for options that are none of `generate`'s, contradictory ones, and contexts without room.
        """
        groups: dict[str, list[tuple[int, list[int]]]] = {}
        for number, request in enumerate(requests):
            with _of(number, request):
                context, options = request.args
                ids = self.tok_encode(context, add_special_tokens=True)
                settings, until = self.settings_of(options, len(ids))
                self._check(ids, settings["max_new_tokens"])
            groups.setdefault(json.dumps([settings, until], sort_keys=True), []).append((number, ids))
        plan = [
            (key, *batch)
            for key, group in groups.items()
            for batch in self._batches(json.loads(key)[0], group, requests)
        ]
        texts: list[str] = [""] * len(requests)
        with tqdm(total=len(requests), desc="Writing", unit=" rows", disable=disable_tqdm) as bar:
            for key, batch, seed in plan:
                settings, until = json.loads(key)
                answers = self._answers([ids for _, ids in batch], settings, until, seed)
                for (number, _), text in zip(batch, answers, strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update(len(batch))
        return texts

    def _batches(
        self, settings: dict, group: list[tuple[int, list[int]]], requests: list[Instance]
    ) -> Iterator[tuple]:
        """
        (batch, seed) of requests of the same settings: greedy ones by length; drawn ones in fixed groups of a task's
        rows, a repeat of a request in another group. All settings are checked before anything is written.
        """
        number, _ = group[0]
        with _of(number, requests[number]):
            drawn = draws(self.model, **settings)
        if not drawn:
            group = sorted(group, key=lambda item: len(item[1]))
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size], self.seed
            return
        together: dict[tuple, list] = {}
        seen: Counter = Counter()
        for number, ids in group:
            request = requests[number]
            row = (request.task_name, request.doc_id or 0, request.idx)
            key = (request.task_name, (request.doc_id or 0) // DRAWN_TOGETHER, request.idx, seen[row])
            together.setdefault(key, []).append((number, ids))
            seen[row] += 1
        for key, batch in together.items():
            yield batch, keyed_seed(self.seed, *key)

    def settings_of(self, options: dict, prompt_length: int = 0) -> tuple[dict, list[str]]:
        """From a task's `generation_kwargs` to the options of `generate`, and the strings to stop at."""
        given = {name: value for name, value in options.items() if value is not None}
        until = given.pop("until", [])
        until = [until] if isinstance(until, str) else list(until)
        rooms = [given.pop(name) for name in ROOM if name in given]
        sampled = given.pop("do_sample", None)
        unknown = [name for name in given if name not in DECODING]
        if unknown:
            raise ValueError(f"`generation_kwargs` must be options of `generate`, got {', '.join(unknown)}")
        temperature = given.get("temperature")
        if sampled and temperature == 0:
            raise ValueError("`temperature` must be above 0 with `do_sample`, got 0")
        if sampled is False:
            given["temperature"] = 0.0  # lm-eval's rule: `do_sample=False` goes before a temperature
        elif sampled and temperature is None:
            given["temperature"] = self.decoding.get("temperature") or 1.0
        if given.get("temperature") == 0:  # several of lm-eval's own tasks say so; the likeliest token is in every set
            idle = [name for name in ("top_k", "top_p") if given.pop(name, None)]
            if idle:
                logger.warning("%s of the task's `generation_kwargs` is of no use without draws", ", ".join(idle))
        room = rooms[0] if rooms else self.max_gen_toks
        if room is None:
            room = new_tokens_limit(self.model, prompt_length, 256)
            if has_own_limit(self.model):  # which ends at the last position
                room = min(room, max(1, self.max_length - prompt_length))
        room = _integer("max_gen_toks", room, 1)
        return {"temperature": 0.0, **self.decoding, **given, "max_new_tokens": room}, [text for text in until if text]

    def _answers(self, prompts: list[list[int]], settings: dict, until: list[str], seed: int) -> list[str]:
        texts, ends = [], {self.special_tokens[text] for text in until if text in self.special_tokens}
        settings = generation_settings(self.model, **settings)
        for ids, _ in answers_to(self.model, self.tokenizer, prompts, seed, settings):
            end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
            text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
            texts.append(text[: min((at for at in map(text.find, until) if at >= 0), default=len(text))])
        return texts


def _integer(name: str, value, low: int = 0, high: int | None = None) -> int:
    """An integer argument; lm-eval's command line passes some as text."""
    number = int(value) if isinstance(value, str) and value.isdigit() else value
    good = isinstance(number, int) and not isinstance(number, bool) and number >= low
    if not good or (high is not None and number > high):
        most = "" if high is None else f" and at most {high}"
        raise ValueError(f"`{name}` must be an integer of at least {low}{most}, got {value!r}")
    return number


@contextmanager
def _of(number: int, request: Instance):
    """Says in which request a fault lies."""
    try:
        yield
    except ValueError as error:
        task = f" of task {request.task_name}" if request.task_name else ""
        raise ValueError(f"`requests`, number {number}{task}: {error}") from error


def _row_number(request: Instance) -> int:
    """Of a task's row and the choice in it, with room for a text's parts behind it: what keys the masks."""
    return ((request.doc_id or 0) * PARTS + request.idx) * PARTS


def greedy_matches(model, pairs: list[tuple[list[int], list[int]]], pad_token_id: int, batch_size: int) -> list[bool]:
    """
    Whether greedy decoding writes each pair's continuation behind its context, in as many tokens; see
    [`NanoLLaDALM`].
    """
    if is_diffusion(model):
        rows = greedy_answers(model, pairs, pad_token_id, batch_size)
        return [row == continuation for row, (_, continuation) in zip(rows, pairs, strict=True)]
    right: dict[int, bool] = {}
    for places in batches_of_length(pairs, batch_size):
        right |= zip(places, _causal_matches(model, [pairs[place] for place in places], pad_token_id), strict=True)
    return [right[place] for place in range(len(pairs))]


def _causal_matches(model, pairs: list[tuple[list[int], list[int]]], pad_token_id: int) -> list[bool]:
    (batch,) = conditional_rows(*zip(*pairs, strict=True), pad_token_id, len(pairs))
    labels = batch["labels"].to(model.device)
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # position i predicts token i + 1
    inputs, keep = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}, targets != -100
    with torch.no_grad():
        right = model(**inputs, logits_to_keep=keep, use_cache=False).logits.argmax(-1) == targets[keep]  # [N]
    return torch.ones_like(keep).masked_scatter(keep, right).all(-1).tolist()
