"""The flow solvers against diffusers' schedulers and against a flow whose answer is known."""

import pytest
import torch

from shards.errors import UserError
from train.sampling.solver import make_grid, make_solver


def _diffusers_unipc(num_steps, shift):
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


def _velocity(x, timestep):
    """A curved field, so that a wrong history or coefficient shows."""
    return torch.sin(3 * x + timestep / 200) - 0.3 * x


def _solve(name, grid, x):
    solver = make_solver(name, grid)
    for timestep in grid.timesteps:
        x = solver.step(_velocity(x, timestep), x)
    return x


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_unipc_grid_and_trajectory_equal_diffusers(num_steps, shift):
    scheduler = _diffusers_unipc(num_steps, shift)
    grid = make_grid("unipc", num_steps, shift)
    assert list(grid.sigmas) == scheduler.sigmas.tolist()
    assert list(grid.timesteps) == scheduler.timesteps.tolist()
    x = reference = torch.randn(1, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    solver = make_solver("unipc", grid)
    for timestep in scheduler.timesteps:
        x = solver.step(_velocity(x, float(timestep)), x)
        reference = scheduler.step(_velocity(reference, float(timestep)), timestep, reference, return_dict=False)[0]
        torch.testing.assert_close(x, reference, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 50])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_the_grid_named_diffusers_is_diffusers_under_euler_too(num_steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    grid = make_grid("euler", num_steps, shift)
    assert list(grid.sigmas) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
    assert list(grid.timesteps) == pytest.approx(scheduler.timesteps.tolist(), abs=1e-3)
    official = make_grid("euler", num_steps, shift, "official")
    assert official.sigmas == make_grid("unipc", num_steps, shift, "official").sigmas != grid.sigmas


@pytest.mark.parametrize("num_steps", [1, 10, 50])
def test_euler_equals_diffusers_on_the_same_sigmas(num_steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    grid = make_grid("euler", num_steps, 5.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=list(grid.sigmas[:-1]))
    x = reference = torch.randn(1, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    solver = make_solver("euler", grid)
    for mine, timestep in zip(grid.timesteps, scheduler.timesteps, strict=True):
        assert mine == pytest.approx(float(timestep), rel=1e-6)
        x = solver.step(_velocity(x, mine), x)
        reference = scheduler.step(_velocity(reference, mine), timestep, reference, return_dict=False)[0]
    torch.testing.assert_close(x, reference, atol=1e-5, rtol=1e-5)


def test_official_grid_is_the_one_of_the_reference_inference():
    # FlowUniPCMultistepScheduler(shift=1).set_timesteps(4, shift=5): linspace(0.999, 0, 5)[:-1], shifted, int64.
    grid = make_grid("unipc", 4, 5.0, "official")
    before = [0.999, 0.74925, 0.4995, 0.24975]
    assert grid.sigmas[:-1] == pytest.approx([5 * s / (1 + 4 * s) for s in before], rel=1e-6)
    assert grid.sigmas[-1] == 0
    assert grid.timesteps == (999.0, 937.0, 833.0, 624.0)
    official, diffusers = (make_grid("unipc", 50, 5.0, name).sigmas for name in ("official", "diffusers"))
    assert max(abs(a - b) for a, b in zip(official, diffusers, strict=True)) <= 0.0043


@pytest.mark.parametrize("name", ["unipc", "euler"])
def test_a_straight_flow_is_solved_exactly_in_one_step_and_in_many(name):
    noise, latent = torch.randn(2, 1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    for num_steps in (1, 7):
        grid = make_grid(name, num_steps, 5.0)
        solver = make_solver(name, grid)
        x = noise
        for sigma in grid.sigmas[:-1]:
            x = solver.step((x - latent) / sigma, x)  # the velocity whose x0 is always `latent`
        torch.testing.assert_close(x, latent, atol=1e-4, rtol=1e-4)


def test_more_steps_come_closer_and_unipc_closer_than_euler():
    x = torch.linspace(-2, 2, 45).view(1, 1, 5, 3, 3)
    truth = _solve("euler", make_grid("euler", 4000, 5.0), x)
    errors = {
        (name, n): (_solve(name, make_grid(name, n, 5.0), x) - truth).abs().mean().item()
        for name in ("unipc", "euler")
        for n in (10, 40)
    }
    assert errors["euler", 40] < 0.5 * errors["euler", 10]
    assert errors["unipc", 40] < errors["euler", 40]


def test_no_steps_are_refused():
    with pytest.raises(UserError, match=r"sampler\.steps"):
        make_grid("unipc", 0, 5.0)
