"""Which kind of language model a model is."""


def is_diffusion(model) -> bool:
    """
    Whether a model denoises. Our heads say so, also under PEFT and as remote code; a foreign one that writes is AR.

    Raises:
        `ValueError`: for a model that is neither.
    """
    if hasattr(model, "is_diffusion"):
        return model.is_diffusion
    config = getattr(model, "config", None)
    unsaid = getattr(config, "model_type", None) == "nanollada"  # remote code of before heads said so
    if unsaid or not getattr(model, "can_generate", bool)() or config.is_encoder_decoder:
        raise ValueError(f"`model` must be a causal language model or one that denoises, got {type(model).__name__}")
    return False
