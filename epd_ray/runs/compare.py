"""The comparison of a run's solver with the baselines, and the files that it leaves in the run directory."""

from collections.abc import Sequence

from epd_ray.config.run_config import RunConfig
from epd_ray.drawing.sampler import Sampler, learned
from epd_ray.evaluation.comparison import (
    Comparison,
    Draw,
    Row,
    compare,
    rivals,
    save_comparison,
    save_pictures,
)
from epd_ray.solvers import Solver
from epd_ray.storage.run_directory import RunDirectory
from epd_ray.telemetry.progress import Observer
from epd_ray.types import ImageArray


def contenders(config: RunConfig, run: RunDirectory) -> list[Sampler]:
    """The samplers that a run compares: its solver, the table that it started from, and the baselines."""
    ours = learned(Solver.from_pretrained(run.solver), "rdpo", "EPD + RDPO")
    start = learned(Solver.from_pretrained(run.distilled), "distilled", "EPD distilled")
    return [ours, start, *rivals(config.evaluation.baselines, ours, config.evaluation.equal_evals)]


def comparison(
    draw: Draw,
    samplers: Sequence[Sampler],
    prompts: Sequence[str],
    seeds: Sequence[int],
    split: str,
    run: RunDirectory,
    pictures: int,
    observer: Observer,
) -> Comparison:
    """Compare samplers, and write the results and a few pictures into the run directory.

    Args:
        draw: draws and scores pictures (RDPO.sample_scored).
        samplers: the samplers, with distinct keys.
        prompts: the B prompts that every sampler draws.
        seeds: one noise seed per prompt.
        split: the name of the prompts, which the results show.
        run: the directory that receives the results.
        pictures: the number of pictures per sampler that are kept, from the first prompt.
        observer: sees one step per sampler.
    """
    observer.stage("comparing", len(samplers))

    def save(sampler: Sampler, first: int, images: ImageArray) -> None:
        save_pictures(run.samples / sampler.key, images[: max(0, pictures - first)], first)

    def show(row: Row) -> None:
        observer.advance(1, **{name: float(values.mean()) for name, values in row.values.items()})

    found = compare(draw, samplers, prompts, seeds, split, save, show)
    save_comparison(run, found, pictures)
    return found
