"""Run configurations that several cases share, as overrides of the default run."""

from epd_ray.config.run_config import RunConfig

DEFAULTS = RunConfig()
"""The default run. A case takes from here each number that it does not vary."""
NO_STAGE_ONE = "distill.enabled=false"
TWO_POINTS = ("solver.points=2", "solver.start_point=false")
"""Two points in each interval besides its start, as in the papers; the default has as many evaluations."""
NO_SCALES = "rdpo.scale_dir=false"
PUBLISHED_SOLVER = (*TWO_POINTS, NO_SCALES)


def simulated(batch_s: float = 0.0, score_s: float = 0.0) -> list[str]:
    """A backbone and a reward head, named "sim", that sleep instead of computing.

    Args:
        batch_s: seconds in which a rollout actor draws a batch with the default solver, >= 0.
        score_s: seconds in which the head scores a batch, >= 0.
    """
    calls = 2 * DEFAULTS.solver.intervals  # the start of each interval, and all of its other points together
    return [
        "backbone.family=simulated",
        f"backbone.options={{latency: {batch_s / calls}}}",
        f"rewards={{sim: {{head: simulated, options: {{latency: {score_s}}}}}}}",
    ]


def placeholders(count: int) -> list[str]:
    """Prompts for a simulated backbone, to which every text is as good as another."""
    return [f"prompt {i}" for i in range(count)]
