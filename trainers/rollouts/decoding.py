"""What of a decoder its rollouts' likelihood depends on, and which decoders have one that can be computed."""

from dataclasses import dataclass

from nanollada.modeling_nanollada import NanoLLaDAGenerationConfig
from nanollada.modeling_nanollada.generation_config_nanollada import token_ids
from nanollada.modeling_nanollada.rules_nanollada import editor_of, expander_of, rule_of

_TRUNCATED = "leaves tokens out of a draw, so another policy's ratio has no value there"
# Settings that make the drawn tokens another law than the model's at a temperature: their values that do nothing, why.
_REFUSED = {
    **dict.fromkeys(("top_k", "epsilon_cutoff", "eta_cutoff", "min_p"), ((None, 0), _TRUNCATED)),
    **dict.fromkeys(("top_p", "typical_p"), ((None, 1), _TRUNCATED)),
    "top_h": ((None,), _TRUNCATED),
    "repetition_penalty": ((None, 1), "changes the distribution with the row"),
    "cfg_scale": ((None, 0), "mixes two predictions"),
    "approximate_cache": ((None,), "predicts from keys that no replay has"),
}


@dataclass(frozen=True)
class Decoding:
    """
    How tokens were drawn, and what the model saw.

    Attributes:
        mask_token_id (`int`): The model's.
        grid (`int`, *optional*): The model's `config.block_length`.
        block_length (`int`, *optional*): The decoder's; read where `grow_length` is on.
        grow_length (`bool`): Whether a model without `config.block_length` saw no masks behind the block.
        temperature (`float`): Of the draws, above 0.
        never (`tuple[int, ...]`): Tokens that could not be drawn.
    """

    mask_token_id: int
    grid: int | None = None
    block_length: int | None = None
    grow_length: bool = False
    temperature: float = 1.0
    never: tuple[int, ...] = ()

    @classmethod
    def of(cls, settings: NanoLLaDAGenerationConfig, config) -> "Decoding":
        """
        Of the settings that a `generate` call decodes with, and the model's config.

        Raises:
            `ValueError`: for greedy decoding, whose draws have no likelihood to learn from.
        """
        temperature = settings.get_temperature()
        if temperature <= 0:
            raise ValueError(f"`temperature` must be above 0 to score what was drawn, got {temperature}")
        never = {config.mask_token_id, *token_ids(settings.suppress_tokens)}
        if settings.eos_policy == "forbid":
            never.update(token_ids(settings.eos_token_id))
        return cls(
            mask_token_id=config.mask_token_id,
            grid=config.block_length,
            block_length=settings.block_length,
            grow_length=bool(settings.grow_length),
            temperature=temperature,
            never=tuple(sorted(never)),
        )


def check_replayable(settings: NanoLLaDAGenerationConfig, logits_processor=None) -> None:
    """
    Refuses decoders whose trajectory has no exact likelihood.

    It has one where positions are chosen before their tokens are drawn: by the distributions (every rule that ranks),
    or by noise of their own (`remasking="random"`, whose law is no policy's to change). Then a row and its steps say
    all that happened. `position_score="sampled_prob"` chooses by draws that it throws away, and ReMDM, edits and
    expansions take tokens or masks back that the row no longer shows.

    Args:
        settings ([`NanoLLaDAGenerationConfig`]): As `generate` decodes with them.
        logits_processor (`LogitsProcessorList`, *optional*): The call's; there must be none.

    Raises:
        `ValueError`: naming the setting.
    """
    for name, (idle, why) in _REFUSED.items():
        value = getattr(settings, name)
        if value not in idle:
            raise ValueError(f"`{name}` {why}: it must be unset for a replay, got {value!r}")
    if settings.get_temperature() <= 0:
        raise ValueError(f"`temperature` must be above 0 for a replay, got {settings.get_temperature()}")
    for rule in filter(None, (editor_of(settings), expander_of(settings), rule_of(settings))):
        if rule.beside or rule.revises:
            raise ValueError(
                f"`{rule.switch}` takes decisions back, so a row does not show its trajectory: it must be unset for "
                f"a replay, got {getattr(settings, rule.switch)!r}"
            )
    if settings.position_score == "sampled_prob" and settings.remasking != "random":
        raise ValueError(
            "`position_score` must not be 'sampled_prob' for a replay: it chooses positions by tokens of which most "
            "are thrown away, got 'sampled_prob'"
        )
    if logits_processor:
        names = ", ".join(type(item).__name__ for item in logits_processor)
        raise ValueError(f"`logits_processor` changes the distributions: it must be unset for a replay, got {names}")
