"""`RULES` and, with theirs, all fields that the diffusion `generate` has beside transformers'.

A rule in a file of its own imports `rule_nanollada`, and is an entry here. Functions of the literature are imported
where they are asked: this file needs no torch, for the help of a program reads it.
"""

import math

from .rule_nanollada import (
    AT_LEAST_ONE,
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SHARE,
    Decision,
    Rule,
    Setting,
    Step,
)


def _threshold(step: Step, sampler) -> Decision:
    from .commit_nanollada import above_threshold

    return Decision(above_threshold(step.ranked, sampler.settings.threshold))


def _hierarchical(step: Step, sampler) -> Decision:
    from .commit_nanollada import hierarchical

    return Decision(hierarchical(step.ranked, sampler.settings.threshold, sampler.settings.low_threshold))


def _klass(step: Step, sampler) -> Decision:
    from .commit_nanollada import stable

    divergence = step.spread(sampler.divergence(step.logits, step.active, step.rows), math.inf)
    return Decision(stable(step.ranked, divergence, sampler.settings.threshold, sampler.settings.kl_threshold))


def _factor(step: Step, sampler) -> Decision:
    from .commit_nanollada import within_factor

    return Decision(within_factor(step.ranked, sampler.settings.factor))


def _entropy_bound(step: Step, sampler) -> Decision:
    from .commit_nanollada import entropy, within_entropy

    entropies = step.spread(entropy(step.logits), math.inf).masked_fill(step.late, math.inf)
    return Decision(within_entropy(entropies, sampler.settings.entropy_bound))


def _remdm(step: Step, sampler) -> Decision:
    """Two draws of noise: for the open positions and for the decided ones."""
    from .commit_nanollada import remdm_rates

    sigma, decide = remdm_rates(step.steps, step.index, sampler.settings.remdm, sampler.settings.remdm_eta)
    selected, again = (sampler.noise(step.active.shape, step.active.device) for _ in range(2))
    return Decision(selected < decide[:, None], reopened=again < sigma[:, None])


def _joint(step: Step, sampler) -> Decision:
    from .joint_nanollada import joint

    return joint(step, sampler)


def _structural(step: Step, sampler) -> Decision:
    from .structural_nanollada import structural

    return structural(step, sampler)


def _editor(sampler, pad_token_id):
    from .editing_nanollada import Editor

    return Editor(sampler, pad_token_id)


def _edits(settings) -> str:
    temperature, threshold = settings.get_temperature(), settings.edit_threshold
    if temperature > 0 and threshold > 0:
        rule = "`edit_threshold` must be 0 where tokens are drawn, or edits would change the law of the rows"
        return f"{rule}, got {threshold} and a `temperature` of {temperature}"
    if settings.edit_rule == "replace" and settings.repetition_penalty not in (None, 1):
        rule = "`repetition_penalty` counts the token that an edit asks about: it must be unset with `edit_threshold`"
        return f"{rule}, got {settings.repetition_penalty}"
    other = f"`joint_threshold` edits by itself: `edit_threshold` must be unset with it, got {threshold}"
    return other if is_set(settings.joint_threshold) else ""


def _expansions(settings) -> str:
    rules = ("kl_threshold", "remdm", "joint_threshold", "edit_threshold")
    for name in (*rules, "block_length", "steps", "grow_length", "approximate_cache"):
        if is_set(value := getattr(settings, name)):
            return f"`max_expansions` changes the length of rows: `{name}` must be unset with it, got {value!r}"
    schedule = settings.commit_schedule
    message = f"`max_expansions` changes the number of masks: `commit_schedule` must be 'equal', got {schedule!r}"
    return message * (schedule not in (None, "equal"))


def _joint_settings(settings) -> str:
    temperature, penalty = settings.get_temperature(), settings.repetition_penalty
    if temperature > 0:
        return f"`joint_threshold` takes the likeliest tokens: `temperature` must be 0, got {temperature}"
    rule = "`repetition_penalty` counts the token that an edit asks about: it must be unset with `joint_threshold`"
    return "" if penalty in (None, 1) else f"{rule}, got {penalty}"


def _structural_settings(settings) -> str:
    message = f"`joint_penalty` must be 0 with `structural_edits`, got {settings.joint_penalty}"
    return _joint_settings(settings) or message * bool(settings.joint_penalty)


def _low_threshold(settings) -> str:
    low, high = settings.low_threshold, settings.threshold
    return "" if low <= high else f"`low_threshold` must not exceed `threshold`, got {low} and {high}"


RULES = {
    "quota": Rule("equal shares of the block, best score first", "LLaDA, arXiv 2502.09992"),
    "threshold": Rule(
        "all above it, at least the quota",
        "Fast-dLLM, arXiv 2505.22618; LLaDA 2.0, arXiv 2512.15745",
        _threshold,
        {"threshold": Setting(float, NOT_NEGATIVE, "commit every position whose score, a probability, exceeds this.")},
        needs_probability=True,
    ),
    "hierarchical": Rule(
        "also the best of every run of neighbouring masks above the lower one",
        "dInfer, arXiv 2510.08666",
        _hierarchical,
        {"low_threshold": Setting(float, NOT_NEGATIVE, "with `threshold`, also the surest of every gap above this.")},
        refines="threshold",
        check=_low_threshold,
    ),
    "klass": Rule(
        "those above it whose distribution came to rest",
        "KLASS, arXiv 2511.05664",
        _klass,
        {
            "kl_threshold": Setting(
                float,
                ("> 0", lambda value: 0 < value <= math.inf),
                "with `threshold`, only what moved by less than this since the step before, KL in nats.",
            )
        },
        refines="threshold",
    ),
    "factor": Rule(
        "the n best with (n + 1)(1 − c₍ₙ₎) below it",
        "Fast-dLLM",
        _factor,
        {"factor": Setting(float, POSITIVE, "Fast-dLLM's factor rule, c₍ₙ₎ being the score of the n-th.")},
        needs_probability=True,
    ),
    "entropy_bound": Rule(
        "the most certain ones with Σ H − max H within it",
        "EB-Sampler, arXiv 2505.24857",
        _entropy_bound,
        {"entropy_bound": Setting(float, NOT_NEGATIVE, "EB-Sampler's bound on Σ H − max H of a step, in nats.")},
    ),
    "remdm": Rule(
        "ancestral steps that also mask decided tokens again",
        "ReMDM, arXiv 2503.00307",
        _remdm,
        {
            "remdm": Setting(
                str,
                ("cap", "rescale"),
                "decide at random, and mask decided tokens again with probability σ, in each of a block's `steps`: "
                "min(`remdm_eta`, σ_max), or (rescale) `remdm_eta`·σ_max.",
            ),
            "remdm_eta": Setting(float, PROBABILITY, "how often ReMDM masks decided tokens again.", 0.02),
        },
        ranks=False,
        draws=True,
        revises=True,
    ),
    "joint": Rule(
        "all above it, or the surest; beside them tokens that are not the likeliest change",
        "LLaDA 2.1, arXiv 2602.08676",
        _joint,
        {
            "joint_threshold": Setting(
                float,
                PROBABILITY,
                "fill every mask likelier than this, at least one a step, and replace tokens beside it.",
            ),
            "joint_edit_threshold": Setting(
                float, PROBABILITY, "a token gives way to the likeliest one if that is likelier than this.", 0.0
            ),
            "joint_penalty": Setting(
                float, NOT_NEGATIVE, "taken from the logit of the token before, against stutter.", 0.0
            ),
        },
        check=_joint_settings,
        ranks=False,
        revises=True,
        reads_all=True,
    ),
    "structural": Rule(
        "also removes tokens, and makes room before others",
        "LLaDA 2.2",
        _structural,
        {"structural_edits": Setting(bool, help="with `joint_threshold`, tokens are removed and inserted, too.")},
        refines="joint",
        check=_structural_settings,
        ranks=False,
        revises=True,
        reads_all=True,
        edit_tokens=True,
    ),
    "edit": Rule(
        "then tokens that others are likelier than give way",
        "LLaDA 2.1, arXiv 2602.08676, and T2M, arXiv 2604.18738",
        settings={
            "edit_threshold": Setting(
                float, BELOW_ONE, "when a block has no masks, edit its tokens: to such as are likelier than this."
            ),
            "edit_margin": Setting(float, NOT_NEGATIVE, "what log p must gain by an edit, in nats.", 0.7),
            "max_edits": Setting(int, AT_LEAST_ONE, "edits a step; several at once may undo each other.", 1),
            "edit_rule": Setting(
                str,
                ("replace", "remask"),
                "ask a model that was trained to edit about all tokens, or any model about one masked token a step.",
                "replace",
            ),
        },
        check=_edits,
        editor=_editor,
    ),
    "expand": Rule(
        "also makes two masks of one, or none: infilling of unknown length",
        "DreamOn",
        settings={
            "max_expansions": Setting(
                int, NOT_NEGATIVE, "a prompt's masks may become more, by so many tokens a row at most, or fewer."
            )
        },
        check=_expansions,
        resizes=True,
        edit_tokens=True,
    ),
}
# Read by several rules: their switches.
SHARED = {
    "max_post_steps": (
        ("edit_threshold", "joint_threshold"),
        Setting(int, AT_LEAST_ONE, "steps of a block after its last mask, at most.", 16),
    )
}

# What this `generate` has beside transformers' fields.
OWN_SETTINGS = {
    "block_length": Setting(int, AT_LEAST_ONE, "tokens per block, left to right. Default: the model's, or all."),
    "steps": Setting(int, AT_LEAST_ONE, "denoising steps per block. Default: one token per step."),
    "remasking": Setting(
        str, ("low_confidence", "random"), "decide the surest places first, or random ones.", "low_confidence"
    ),
    "position_score": Setting(
        str, ("max_prob", "margin", "entropy", "sampled_prob"), "what makes a place sure.", "max_prob"
    ),
    **{name: setting for rule in RULES.values() for name, setting in rule.settings.items()},
    **{name: setting for name, (_, setting) in SHARED.items()},
    "commit_schedule": Setting(str, ("equal", "ratio", "ramp"), "how many tokens each step decides.", "equal"),
    "ramp_start": Setting(float, SHARE, "first share of the ramp.", 0.08),
    "ramp_end": Setting(float, SHARE, "last share of the ramp.", 0.5),
    "max_commits": Setting(int, AT_LEAST_ONE, "at most so many tokens a step."),
    "cfg_scale": Setting(float, NOT_NEGATIVE, "classifier-free guidance; 0: off.", 0.0),
    "eos_policy": Setting(
        str, ("none", "last", "cut", "forbid"), "decide ends of text last, nothing behind one (cut), or none.", "none"
    ),
    "early_stop": Setting(bool, help="stop at an end of text with nothing undecided before it.", default=True),
    "grow_length": Setting(bool, help="no masks behind the block.", default=False),
    "approximate_cache": Setting(
        str, ("prefix", "dual"), "freeze what surrounds a block (Fast-dLLM); changes results."
    ),
}


def is_set(value) -> bool:
    """Whether a switch is on: `None` and `False` are off, 0 is not."""
    return value is not None and value is not False


def rule_of(settings) -> Rule:
    """
    The rule that is on; without a switch `RULES["quota"]`.

    Args:
        settings ([`NanoLLaDAGenerationConfig`]): Or anything with the switches as attributes.
    """
    on = [name for name in _switched(settings) if not RULES[name].beside]
    refined = {RULES[name].refines for name in on}
    return RULES[next((name for name in on if name not in refined), "quota")]


def editor_of(settings) -> Rule | None:
    """The rule of the edits behind a block's last mask; `None` without any."""
    return next((RULES[name] for name in _switched(settings) if RULES[name].editor), None)


def expander_of(settings) -> Rule | None:
    """The rule under which rows grow and shrink; `None` without any."""
    return next((RULES[name] for name in _switched(settings) if RULES[name].resizes), None)


def edits_tokens(settings) -> bool:
    """Whether a rule that is on executes `<|delete|>` and `<|insert|>`."""
    return any(RULES[name].edit_tokens for name in _switched(settings))


def _switched(settings) -> list[str]:
    return [name for name, rule in RULES.items() if rule.switch and is_set(getattr(settings, rule.switch, None))]
