"""The comparison of a run's solver with the baselines, and the files that it leaves in the run directory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from epd_ray.actors.pipeline import TASKS_AHEAD
from epd_ray.config.run_config import RunConfig
from epd_ray.drawing.sampler import Sampler, learned
from epd_ray.evaluation.comparison import (
    Comparison,
    Draw,
    compare,
    opponents,
    places,
    save_comparison,
    save_pictures,
)
from epd_ray.evaluation.records import OURS, Tuned
from epd_ray.evaluation.suites.tune import Tuning
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.solvers import Solver
from epd_ray.storage.run_directory import RunDirectory
from epd_ray.telemetry.progress import Observer
from epd_ray.types import ImageArray


@dataclass(frozen=True)
class Contest:
    """Who is compared, and what is known of the model.

    Attributes:
        samplers: the samplers with distinct keys, in the order in which they take turns.
        at_once: the number of pictures that a sampler draws in its turn, at least 1; a multiple of the batch size.
        reference: the key of the slow sampler; None if there is none.
        guidance_scale: the guidance scale of all pictures; None if it is not known.
        classifier_free: whether a guidance scale above 1 takes a second pass of the network; None if it is not known.
        sigmas: a sampler's key -> its noise levels [N+1], as far as they are known.
        tuned: the key of a sampler that was tuned -> how it came to its settings.
    """

    samplers: Sequence[Sampler]
    at_once: int
    reference: str | None = None
    guidance_scale: float | None = None
    classifier_free: bool | None = None
    sigmas: Mapping[str, Sequence[float]] = field(default_factory=dict)
    tuned: Mapping[str, Tuned] = field(default_factory=dict)


def contest(config: RunConfig, run: RunDirectory, algo: RDPO, tuned: Tuning | None) -> Contest:
    """What a run compares: its solver, the table that it started from, 50 Euler steps, and the baselines.

    With tuning, the baselines as they come stand beside the tuned ones, and the 50 steps have the best guidance.

    The start table draws first, because the time of whoever draws a prompt first includes its encoding, and no other
    time is compared with that of the start table.
    """
    ours = learned(Solver.from_pretrained(run.solver), OURS, "EPD + RDPO")
    start = learned(Solver.from_pretrained(run.distilled), "distilled", "EPD distilled")
    names, equal = config.evaluation.baselines, config.evaluation.equal_evals
    chosen: Mapping[str, Tuned] = {}
    if tuned is None:
        slow, *others = opponents(names, ours, equal)
    else:
        slow, others, chosen = tuned.opponents(places(names, ours, equal))
    samplers = [start, ours, slow, *others]
    sigmas = algo.work("steps", [(tuple(samplers),)])[0]
    by_key = dict(zip((sampler.key for sampler in samplers), sigmas, strict=True))
    turn = algo.images_at_once // TASKS_AHEAD  # a batch for each actor: many short turns make the median time firm
    return Contest(samplers, turn, slow.key, algo.facts.guidance_scale, algo.facts.classifier_free, by_key, chosen)


def comparison(
    draw: Draw,
    who: Contest,
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
        who: the samplers.
        prompts: the B prompts that every sampler draws.
        seeds: one noise seed per prompt.
        split: the name of the prompts, which the results show.
        run: the directory that receives the results.
        pictures: the number of pictures per sampler that are kept, from the first prompt.
        observer: sees one step for each turn of a sampler.
    """

    def save(sampler: Sampler, first: int, images: ImageArray) -> None:
        save_pictures(run.samples / sampler.key, images[: max(0, pictures - first)], first)

    rows = compare(draw, who.samplers, prompts, seeds, who.at_once, save, observer)
    found = Comparison(
        split,
        tuple(prompts),
        tuple(seeds),
        rows,
        reference=who.reference,
        guidance_scale=who.guidance_scale,
        classifier_free=who.classifier_free,
        sigmas=who.sigmas,
        tuned=who.tuned,
    )
    save_comparison(run, found, pictures)
    return found
