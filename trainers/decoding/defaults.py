"""The decoding that a model was trained for, in the fields of its generation config."""

from nanollada.modeling_nanollada.generation_config_nanollada import OWN_FIELDS

PLAIN_TEXT = 128  # new tokens of a pretrained model at most: nothing ends its text

# What a trainer decides anew, whatever the checkpoint said that it went on from.
DECIDED = ("max_new_tokens", "max_length", *OWN_FIELDS)


def length_limit(longest: int, has_answers: bool) -> dict:
    """
    `max_new_tokens` where a text's length is the model's to choose: the longest row that it was trained on, for
    answers end by themselves; of plain text half of it, at most `PLAIN_TEXT`.
    """
    return {"max_new_tokens": longest if has_answers else max(1, min(PLAIN_TEXT, longest // 2))}


def diffusion_defaults(
    longest: int, has_answers: bool, block_length: int | None, eos_padding: str, eos_padding_block: int
) -> dict:
    """
    What a diffusion model was trained for.

    - A model in blocks (`block_length`, of its config) decodes in these, with a limit alone.
    - Whole rows whose answers end at a block's end (`eos_padding` "block") decode in growing rows, block by block.
    - Other answers in whole rows are decoded as they were trained, in a canvas of the longest row: `max_length`, the
      prompt included. With "max_length" that was every row's; with "none" a canvas tells the model where to end, and
      whoever knows an answer's length says so (`max_new_tokens`).

    Args:
        longest (`int`): Tokens of the longest row in training.
        has_answers (`bool`): SFT rows, and no plain text.
        block_length (`int`, *optional*): Of the model's config; `None` is the whole row.
        eos_padding (`str`), eos_padding_block (`int`): Of SFT.
    """
    fields = {"trained_length": longest}
    if has_answers:
        fields["eos_policy"] = "cut"  # an answer ends with an EOS, and nothing is behind it
    if not has_answers or block_length is not None:
        return fields | length_limit(longest, has_answers)
    if eos_padding == "block":
        return fields | {"block_length": eos_padding_block, "grow_length": True} | length_limit(longest, True)
    return fields | {"max_length": longest}


def set_defaults(model, fields: dict) -> None:
    """
    The model's generation config says `fields` and nothing else about lengths and denoising: what a checkpoint said
    before was about other training. Special tokens and how tokens are drawn stay.
    """
    settings = model.generation_config
    known = vars(type(settings)())
    for name in DECIDED:
        if name in fields or name in known:
            setattr(settings, name, fields.get(name))
        elif hasattr(settings, name):  # an AR model's, from a diffusion checkpoint
            delattr(settings, name)


def longest_row(rows) -> int:
    """
    Tokens of the longest row of [`~trainers.data.prepare.PreparedData`]; of a stream, which nobody has read yet,
    those that a row may have.
    """
    import pyarrow.compute

    if "max_length" not in rows.report and not hasattr(rows.train, "data"):  # a caller's own list
        return max(len(row["input_ids"]) for row in rows.train)
    if rows.train is None or not hasattr(rows.train, "data"):
        return rows.report["max_length"]
    column = rows.train.with_format("arrow")["input_ids"]
    return pyarrow.compute.max(pyarrow.compute.list_value_length(column)).as_py()
