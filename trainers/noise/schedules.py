"""Noise schedules: how probable it is, at each time, that a token is hidden."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NoiseSchedule:
    """
    A noise schedule by its formula: `alpha(t)` is the probability that a token is still clean at time t in [0, 1].

    Attributes:
        formula (`str`): alpha(t), as printed in logs and model cards.
        mask_rate (`Callable`): m(t) = 1 − alpha(t), rising from m(0) = 0 to m(1) = 1.
        slope (`Callable`): m'(t) = −alpha'(t).
        time (`Callable`): the inverse of m.
        integral (`Callable`): the integral of m from 0 to t.
    """

    formula: str
    mask_rate: Callable[[torch.Tensor], torch.Tensor]
    slope: Callable[[torch.Tensor], torch.Tensor]
    time: Callable[[torch.Tensor], torch.Tensor]
    integral: Callable[[torch.Tensor], torch.Tensor]


# Two different schedules are called "cosine" in the field, so each is named by its formula here.
_HALF_PI = math.pi / 2
NOISE_SCHEDULES = {
    "linear": NoiseSchedule("1 - t", lambda t: t, torch.ones_like, lambda m: m, lambda t: t**2 / 2),
    "cosine_squared": NoiseSchedule(
        "cos(pi t / 2)^2",
        lambda t: torch.sin(_HALF_PI * t) ** 2,
        lambda t: _HALF_PI * torch.sin(math.pi * t),
        lambda m: torch.asin(m.sqrt()) / _HALF_PI,
        lambda t: t / 2 - torch.sin(math.pi * t) / (2 * math.pi),
    ),
    "one_minus_cosine": NoiseSchedule(
        "1 - cos(pi (1 - t) / 2)",
        lambda t: torch.sin(_HALF_PI * t),
        lambda t: _HALF_PI * torch.cos(_HALF_PI * t),
        lambda m: torch.asin(m) / _HALF_PI,
        lambda t: (1 - torch.cos(_HALF_PI * t)) / _HALF_PI,
    ),
}
