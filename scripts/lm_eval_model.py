"""The model that `lm_eval_nanollada.py` gives to lm-eval: exact likelihoods of AR, bounds of diffusion models."""

import json
import logging
from collections.abc import Callable
from dataclasses import fields

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from nanollada.scripts.generate import DecodingArguments

logger = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16", "float64")
DECODING = tuple(item.name for item in fields(DecodingArguments) if item.name != "max_new_tokens")
ROOM = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names, the first wins


class NanoLLaDALM(TemplateLM):
    """
    An AR or diffusion checkpoint for lm-eval.

    A plain context begins with `<|endoftext|>`, as every training document does, and is cut from its continuation by
    `continuations.encode_pair`. A context that begins with a special token is a rendered chat
    (`--apply_chat_template`): it begins with that token, as SFT rows do, and is cut where the answer begins, as in
    training.

    Log-likelihoods of a diffusion model are lower bounds (minus `score_continuations`'s nats), with masks that belong
    to a task's row, whatever else is run beside it. `is_greedy` tells
    whether greedy decoding writes the continuation: for AR, each of its tokens is the likeliest one; for diffusion, a
    canvas of the continuation's length is filled token by token, the surest position first (`generate`'s default), in
    the model's own blocks.

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
        max_gen_toks (`int`, defaults to 256): Tokens to write, where the task does not say.
        device (`str`, *optional*): Default: cuda if there is one, else cpu; so also for "cuda:0", which lm-eval's
            command line says where nothing was said.
        dtype (`str`, defaults to `"float32"`): Of the weights: float32, bfloat16, float16 or float64.
        trust_remote_code (`bool`, defaults to `False`): Run the code that comes with the checkpoint.
        max_batch_size (`None`): lm-eval passes it; there is no automatic batch size to bound.
        decoding: Defaults of `generate`, as for `generate.py` (`block_length`, `steps`, `threshold`, `temperature`,
            …). What a task says goes before them.

    Raises:
        `ValueError`: for arguments out of range, unknown ones, and those that the kind of model has no use for.
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
        max_gen_toks: int = 256,
        device: str | None = None,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        max_batch_size: None = None,
        **decoding,
    ):
        super().__init__()
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
        self.max_gen_toks = _integer("max_gen_toks", max_gen_toks, 1)
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
        import torch

        from nanollada.scripts.generate import generation_settings, load_checkpoint
        from nanollada.trainers.likelihood import is_causal, scored_block_length

        if device == "cuda:0" and not torch.cuda.is_available():  # lm-eval's own default, on every machine
            logger.warning("there is no cuda:0: the model runs on the CPU")
            device = "cpu"
        self.model, self.tokenizer = load_checkpoint(self.pretrained, trust_remote_code, device)
        self.model = self.model.to(getattr(torch, self.dtype))
        self._device, self.is_causal = self.model.device, is_causal(self.model)
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
        return {**facts, "bound": not self.is_causal, "model_num_parameters": self.model.num_parameters()}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """
        Renders messages with the tokenizer's own template; the last one is left open unless
        `add_generation_prompt`.

        Raises:
            `ValueError`: without a template, or for one whose chats do not begin with a special token.
        """
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template, which --apply_chat_template needs")
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        text = self.tokenizer.apply_chat_template(chat_history, tokenize=False, **how)
        if not self._begins_itself(text):
            raise ValueError(f"the chat template must begin with a special token to be told apart, got {text[:20]!r}")
        return text

    # ---- tokens

    def _begins_itself(self, text: str) -> bool:
        return text.startswith(tuple(self.special_tokens))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Token ids of a text alone, or (`add_special_tokens`) as the beginning of a document or chat."""
        from nanollada.trainers.continuations import context_ids

        ids = context_ids(self.tokenizer, string)
        return ids if add_special_tokens and not self._begins_itself(string) else ids[1:]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        from nanollada.trainers.continuations import encode_pair
        from nanollada.trainers.tokenization import IGNORE, encode_spans

        if not self._begins_itself(context):
            return encode_pair(self.tokenizer, context, continuation)
        whole = context + continuation
        ids, labels = encode_spans(self.tokenizer, whole, [(len(context), len(whole))])
        cut = labels.count(IGNORE)
        if cut == len(ids):
            raise ValueError(
                f"`continuation` must add a token to its context, got {continuation!r} behind {context!r}"
            )
        return ids[:cut], ids[cut:]

    def _check(self, number: int, ids: list[int], room: int = 0) -> None:
        """Nothing is cut, and the mask token is no text."""
        if self.tokenizer.mask_token_id in ids:
            raise ValueError(f"`requests`, number {number}: it must not hold {self.tokenizer.mask_token}, got it")
        if len(ids) + room > self.max_length:
            raise ValueError(
                f"`requests`, number {number}: its tokens must fit into `max_length`, got {len(ids)} "
                f"and {room} to write with {self.max_length}"
            )

    # ---- scores

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), is_greedy) of each (context, continuation); see the class."""
        pairs = []
        for number, request in enumerate(requests):
            context, continuation = request.args
            try:
                pairs.append(((context, continuation), *self._encode_pair(context, continuation)))
            except ValueError as error:
                raise ValueError(f"`requests`, number {number}: {error}") from error
            self._check(number, pairs[-1][1] + pairs[-1][2])
        answers = {}
        for places in _by_task(requests):
            found = self._loglikelihood_tokens([pairs[place] for place in places], disable_tqdm=disable_tqdm)
            answers |= zip(places, found, strict=True)
        return [answers[place] for place in range(len(requests))]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        from tqdm.auto import tqdm

        from nanollada.trainers.continuations import score_continuations

        pairs = [(context, continuation) for _, context, continuation in requests]
        bar = tqdm(total=len(pairs), desc="Scoring continuations", unit=" pairs", disable=disable_tqdm)
        pad = self.tokenizer.pad_token_id
        options = {"pad_token_id": pad, "batch_size": self.batch_size, "progress": bar.update, **self._noise()}
        found = score_continuations(self.model, pairs, **options)
        bar.close()
        return list(zip((-found.nats).tolist(), greedy_matches(self.model, pairs, pad, self.batch_size), strict=True))

    def _noise(self) -> dict:
        return {"samples": self.samples, "seed": self.seed, "block_length": self.eval_block_length}

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each text; 0 for an empty one."""
        nats = {}
        for places in _by_task(requests):
            rows, owners = [], []
            for place in places:
                ids = self.tok_encode(requests[place].args[0])
                self._check(place, [token for token in ids if token == self.tokenizer.mask_token_id])
                rows += self._rolled(ids, len(rows))
                owners += [place] * (len(rows) - len(owners))
            found = self._row_nats(rows, disable_tqdm)
            nats |= {place: 0.0 for place in places}
            for owner, value in zip(owners, found, strict=True):
                nats[owner] += value
        return [0.0 - nats[place] for place in range(len(requests))]

    def _rolled(self, ids: list[int], index: int) -> list[dict]:
        from nanollada.trainers.rolling import rolling_rows

        place = {"block_length": self.scored_block_length, "index": index}
        return list(rolling_rows(ids, self.max_length, self.rolling_context, self.prefix_token_id, **place))

    def _row_nats(self, rows: list[dict], disable_tqdm: bool) -> list[float]:
        """Nats of rows that are numbered by their place."""
        from tqdm.auto import tqdm

        from nanollada.trainers.collator import Collator
        from nanollada.trainers.likelihood import score_rows

        longest_first = sorted(rows, key=lambda row: -len(row["input_ids"]))  # little padding
        collate, size = Collator(self.tokenizer.pad_token_id), self.batch_size
        starts = tqdm(range(0, len(rows), size), desc="Scoring texts", unit="batch", disable=disable_tqdm)
        batches = (collate(longest_first[start : start + size]) for start in starts)
        nats = [0.0] * len(rows)
        for batch, found, _, _ in score_rows(self.model, batches, **self._noise()):
            for index, value in zip(batch["index"].tolist(), found.tolist(), strict=True):
                nats[index] = value
        return nats

    # ---- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """
        For each (context, options) the text that `generate` writes, cut at the model's end of text and before the
        first of the options' `until` strings.

        Raises:
            `ValueError`: for options that are none of `generate`'s, contradictory ones, and contexts without room.
        """
        from tqdm.auto import tqdm

        groups: dict[str, list[tuple[int, list[int]]]] = {}
        for number, request in enumerate(requests):
            context, options = request.args
            settings, until = self.settings_of(options)
            ids = self.tok_encode(context, add_special_tokens=True)
            self._check(number, ids, settings["max_new_tokens"])
            groups.setdefault(json.dumps([settings, until], sort_keys=True), []).append((number, ids))
        texts, bar = (
            [""] * len(requests),
            tqdm(total=len(requests), desc="Writing", unit=" rows", disable=disable_tqdm),
        )
        for key, group in groups.items():
            settings, until = json.loads(key)
            group.sort(key=lambda item: len(item[1]))
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                answers = self._answers([ids for _, ids in batch], settings, until, self.seed + batch[0][0])
                for (number, _), text in zip(batch, answers, strict=True):
                    texts[number] = text
                bar.update(len(batch))
        bar.close()
        return texts

    def settings_of(self, options: dict) -> tuple[dict, list[str]]:
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
        room = _integer("max_gen_toks", rooms[0] if rooms else self.max_gen_toks, 1)
        return {"temperature": 0.0, **self.decoding, **given, "max_new_tokens": room}, [text for text in until if text]

    def _answers(self, prompts: list[list[int]], settings: dict, until: list[str], seed: int) -> list[str]:
        from nanollada.scripts.evaluate import answers_to
        from nanollada.scripts.generate import generation_settings

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


def _by_task(requests: list[Instance]) -> list[list[int]]:
    """Places of the requests of each task: masks belong to a task's row, whichever other tasks are run."""
    places: dict = {}
    for place, request in enumerate(requests):
        places.setdefault(request.task_name, []).append(place)
    return list(places.values())


def greedy_matches(model, pairs: list[tuple[list[int], list[int]]], pad_token_id: int, batch_size: int) -> list[bool]:
    """
    Whether greedy decoding writes each pair's continuation behind its context, in as many tokens; see
    [`NanoLLaDALM`].
    """
    from nanollada.trainers.likelihood import is_causal

    order = sorted(range(len(pairs)), key=lambda place: (len(pairs[place][1]), len(pairs[place][0])))
    batch_of: Callable = _causal_matches if is_causal(model) else _diffusion_matches
    found: dict[int, bool] = {}
    while len(found) < len(order):
        start = len(found)
        length = len(pairs[order[start]][1])
        places = [place for place in order[start : start + batch_size] if len(pairs[place][1]) == length]
        found |= zip(places, batch_of(model, [pairs[place] for place in places], pad_token_id), strict=True)
    return [found[place] for place in range(len(pairs))]


def _causal_matches(model, pairs: list[tuple[list[int], list[int]]], pad_token_id: int) -> list[bool]:
    import torch

    from nanollada.trainers.continuations import conditional_rows

    (batch,) = conditional_rows(*zip(*pairs, strict=True), pad_token_id, len(pairs))
    labels = batch["labels"].to(model.device)
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # position i predicts token i + 1
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        likeliest = model(**inputs, use_cache=False).logits.argmax(-1)  # [B, L]
    return ((likeliest == targets) | (targets == -100)).all(-1).tolist()


def _diffusion_matches(model, pairs: list[tuple[list[int], list[int]]], pad_token_id: int) -> list[bool]:
    import torch

    from nanollada.scripts.generate import generation_settings, seeded_generate

    length, width = len(pairs[0][1]), max(len(context) for context, _ in pairs)
    ids = [[pad_token_id] * (width - len(context)) + context for context, _ in pairs]
    visible = [[0] * (width - len(context)) + [1] * len(context) for context, _ in pairs]
    whole = {"block_length": length} if model.config.block_length is None else {}
    settings = generation_settings(model, max_new_tokens=length, temperature=0.0, **whole)
    tensors = (torch.tensor(rows, device=model.device) for rows in (ids, visible))  # [B, width]
    said = seeded_generate(model, *tensors, 0, **settings)[:, width:].tolist()
    return [row == continuation for row, (_, continuation) in zip(said, pairs, strict=True)]
