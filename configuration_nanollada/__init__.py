"""`NanoLLaDAConfig`, the one configuration of the AR and the diffusion model."""

from .configuration_nanollada import NanoLLaDAConfig

__all__ = ["NanoLLaDAConfig"]
