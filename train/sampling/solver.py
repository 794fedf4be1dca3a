"""Solvers of the flow's ordinary differential equation: from noise (sigma near 1) to a latent (sigma 0).

A solver sees `x0` predictions only through `x_σ = (1 − σ)·x₀ + σ·ε`, velocity `v = ε − x₀`, so `x₀ = x_σ − σ·v`.
Coefficients are computed in float64 from sigmas rounded to float32, as the references hold them.

Sources: UniPC-bh2 of order 2 as in Wan2.2's `wan/utils/fm_solvers_unipc.py` and diffusers' `UniPCMultistepScheduler`
(arXiv:2302.04867); Euler as in diffusers' `FlowMatchEulerDiscreteScheduler`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from shards.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SolverName = Literal["unipc", "euler"]
GridName = Literal["diffusers", "official"]
NUM_TRAIN_TIMESTEPS = 1000


class Grid(NamedTuple):
    """The steps of a solver: one more sigma than timesteps, because the last step ends at sigma 0."""

    sigmas: tuple[float, ...]
    """Noise levels, falling, the last one 0."""
    timesteps: tuple[float, ...]
    """What the model gets at each step: 1000·sigma, cut to a whole number where the reference does so."""


def make_grid(solver: SolverName, num_steps: int, shift: float, grid: GridName = "diffusers") -> Grid:
    """The noise levels of `num_steps` steps under a shift: sigma' = shift·sigma / (1 + (shift − 1)·sigma).

    `official` starts at 0.999 before the shift and ends at 0 (Wan2.2's `set_timesteps`). `diffusers` is the grid of
    diffusers' scheduler of that solver: UniPC starts at 1 and ends at 0.001, its sigmas differ from the official ones
    by at most 0.0043; Euler's last level is the shifted 0.001, which is then shifted again, and the levels up to it
    include it. UniPC's timesteps are cut to whole numbers as in both references.
    """
    if num_steps < 1:
        raise UserError(f"sampler.steps: {num_steps}", expected="at least 1")
    first, last = (1.0, 1 / NUM_TRAIN_TIMESTEPS) if grid == "diffusers" else (1 - 1 / NUM_TRAIN_TIMESTEPS, 0.0)
    if (solver, grid) == ("euler", "diffusers"):
        sigmas = np.linspace(first, shift * last / (1 + (shift - 1) * last), num_steps)
    else:
        sigmas = np.linspace(first, last, num_steps + 1)[:-1]
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    if abs(sigmas[0] - 1) < 1e-6 and solver == "unipc":
        sigmas[0] -= 1e-6  # log(1 − sigma) must stay finite; the same step aside as in diffusers
    timesteps = sigmas * NUM_TRAIN_TIMESTEPS
    if solver == "unipc":
        timesteps = np.floor(timesteps)
    kept = [float(sigma) for sigma in np.append(sigmas, 0.0).astype(np.float32)]
    return Grid(tuple(kept), tuple(float(timestep) for timestep in timesteps))


def make_solver(solver: SolverName, grid: Grid) -> UniPC | Euler:
    """A new solver for one trajectory over the grid: call `step` once a grid step, in order."""
    return UniPC(grid) if solver == "unipc" else Euler(grid)


class Euler:
    """x ← x + (σ_next − σ)·v."""

    def __init__(self, grid: Grid) -> None:
        self._sigmas = grid.sigmas
        self._index = 0

    def step(self, velocity: Tensor, x: Tensor) -> Tensor:
        """Advance `x` along the velocity by the difference of the two noise levels."""
        here, there = self._sigmas[self._index : self._index + 2]
        self._index += 1
        return x + (there - here) * velocity


class UniPC:
    """UniPC with B(h) = e^h − 1, order 2, x₀ prediction: correct the point just reached, then predict the next."""

    def __init__(self, grid: Grid) -> None:
        self._sigmas = grid.sigmas
        self._index = 0
        self._order = 1
        self._last_x: Tensor | None = None
        self._x0s: list[Tensor] = []

    def step(self, velocity: Tensor, x: Tensor) -> Tensor:
        """Correct `x` with the new evaluation, then predict the sample at the grid's next noise level."""
        x0 = x - self._sigmas[self._index] * velocity
        if self._last_x is not None:
            x = self._correct(self._last_x, x0)
        self._x0s = [*self._x0s[-1:], x0]
        steps_left = len(self._sigmas) - 1 - self._index
        self._order = min(2, steps_left, self._index + 1)
        self._last_x = x
        x = self._predict(x)
        self._index += 1
        return x

    def _predict(self, x: Tensor) -> Tensor:
        alpha, sigma_ratio, h, b = self._coefficients(self._index, self._index + 1)
        x0 = self._x0s[-1]
        x_next = sigma_ratio * x - alpha * b * x0
        if self._order == 2:
            ratio = self._ratio(self._index - 1, self._index, h)
            x_next = x_next - alpha * b * 0.5 * (self._x0s[-2] - x0) / ratio
        return x_next

    def _correct(self, last_x: Tensor, x0_here: Tensor) -> Tensor:
        alpha, sigma_ratio, h, b = self._coefficients(self._index - 1, self._index)
        x0_before = self._x0s[-1]
        x = sigma_ratio * last_x - alpha * b * x0_before
        if self._order == 1:
            return x - alpha * b * 0.5 * (x0_here - x0_before)
        ratio = self._ratio(self._index - 2, self._index - 1, h)
        older, newer = _corrector_weights(ratio, -h, b)
        change = older * (self._x0s[-2] - x0_before) / ratio + newer * (x0_here - x0_before)
        return x - alpha * b * change

    def _coefficients(self, start: int, end: int) -> tuple[float, float, float, float]:
        """alpha at the end, sigma_end ÷ sigma_start, h = difference of log-SNR halves, and e^(−h) − 1."""
        here, there = self._sigmas[start], self._sigmas[end]
        if there == 0.0:
            return 1.0, 0.0, math.inf, -1.0
        h = _half_log_snr(there) - _half_log_snr(here)
        return 1.0 - there, there / here, h, math.expm1(-h)

    def _ratio(self, older: int, start: int, h: float) -> float:
        """Position of the older evaluation in units of the step h (negative)."""
        return (_half_log_snr(self._sigmas[older]) - _half_log_snr(self._sigmas[start])) / h


def _half_log_snr(sigma: float) -> float:
    return math.log(1.0 - sigma) - math.log(sigma)


def _corrector_weights(ratio: float, hh: float, b: float) -> tuple[float, float]:
    """Solve the 2 × 2 system of UniC-2: rows 1 and `ratio`, right sides phi_2 and 2·phi_3 over B(h)."""
    phi_2 = b / hh - 1
    phi_3 = phi_2 / hh - 0.5
    right = (phi_2 / b, 2 * phi_3 / b)
    older = (right[1] - right[0]) / (ratio - 1)
    return older, right[0] - older
