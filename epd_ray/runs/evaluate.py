"""`epd-ray evaluate RUN`: a run's solver and the baselines again, on other or more prompts."""

import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from epd_ray.actors.beforehand import panel_of
from epd_ray.config.run_config import RunConfig
from epd_ray.embedded.scenes import Split
from epd_ray.errors import PromptError, RunDirectoryError
from epd_ray.evaluation.comparison import Comparison
from epd_ray.evaluation.suites.tune import Tuning
from epd_ray.evaluation.tuning import require_apart
from epd_ray.evaluation.verdict import closing
from epd_ray.prompts.files import Prompts, read_rows
from epd_ray.prompts.splits import BUILTIN, SHAPES, load_prompts
from epd_ray.randomness import Purpose, noise_seeds
from epd_ray.rdpo.session import algorithm, warn_of_long_prompts
from epd_ray.runs.compare import comparison, contest
from epd_ray.runs.report import write_report
from epd_ray.runs.saved import open_run, saved_prompts
from epd_ray.storage.lock import held
from epd_ray.storage.places import inside, place_of, reading
from epd_ray.storage.run_directory import RunDirectory
from epd_ray.telemetry.progress import Observer

HELD_OUT = {"validation": Purpose.VALIDATION, "test": Purpose.TEST}


def evaluate(
    where: str | Path, count: int | None, prompts_file: Path | None, split: Split, observer: Observer
) -> list[str]:
    """Compare a run's solver with the baselines again, on other or more prompts.

    The results and a report go to RUN/evaluations/<split>-<count>, or to RUN/evaluations/file-<name>-<checksum>-<count>
    for a file of prompts. The results of the run itself stay as they are, and the run may be in progress meanwhile.

    Args:
        where: the path or URI of a run that has a solver.
        count: the number of prompts; None for all of them. Prompts of the embedded scenes are generated anew, as many
            as `count`.
        prompts_file: a file with one prompt a line, which replaces the split.
        split: "validation" or "test".
        observer: sees the progress.

    Returns:
        The results in a few lines, and the path of the report.

    Raises:
        RunDirectoryError: no run with a solver is there, or it cannot be read.
        PromptError: the prompts cannot be read, or are fewer than `count`.
        ConfigError: the prompts of the file are among the validation prompts, on which rivals are tuned.
    """
    place = place_of(where)
    with place.visited() as folder:
        run, config = open_run(place, folder)
        if not (run.solver / "solver.json").exists():
            raise RunDirectoryError(f"{where} has no solver yet: continue it with epd-ray train --resume {where}")
        with reading(place, folder):
            chosen = _prompts(config, run, count, prompts_file, split)
        prompts = chosen.texts
        name = f"{_file_name(prompts_file, prompts) if prompts_file else split}-{len(prompts)}"
        seeds = noise_seeds(HELD_OUT["test" if prompts_file else split], config.seed, len(prompts))
        final = run.path / "evaluations" / name
        final.parent.mkdir(exist_ok=True)
        with held(final.with_name(f".{name}.lock"), str(final)):
            held_out = _tuned_on(config, run, prompts, prompts_file, split)
            with draft(run, final) as target:
                found = _compared(config, run, target, chosen, seeds, held_out, observer)
            report = write_report(final)  # outside of the draft: the results stay where the report fails
        observer.done()
        return [*closing(found.evaluation), f"report: {inside(where, Path('evaluations', name, report.name))}"]


def _prompts(
    config: RunConfig, run: RunDirectory, count: int | None, prompts_file: Path | None, split: Split
) -> Prompts:
    panel = panel_of(config)
    if prompts_file is not None:
        found = read_rows(prompts_file, panel)
    elif config.prompts.train in (SHAPES, BUILTIN) and count is not None:
        prompts = config.prompts.model_copy(update={split: count})
        wider = load_prompts(prompts, config.seed, panel)
        found = Prompts(wider.splits[split], wider.rows)
    else:
        saved = saved_prompts(run)
        found = Prompts(saved.splits[split], saved.rows)
    if count is not None and count > len(found.texts):
        raise PromptError(f"{count} prompts asked, {len(found.texts)} there: lower --count or give more prompts")
    kept = replace(found, texts=found.texts[:count])
    panel.require_use((kept.rows.get(prompt, {}) for prompt in kept.texts), str(prompts_file or split))
    return kept


def _tuned_on(
    config: RunConfig, run: RunDirectory, prompts: list[str], prompts_file: Path | None, split: Split
) -> list[str] | None:
    """The validation prompts on which the rivals are tuned; None where they are not, or are the prompts themselves."""
    if not config.evaluation.tune or (split == "validation" and prompts_file is None):
        return None
    held_out = saved_prompts(run).validation
    require_apart(held_out, prompts)
    return held_out


def _file_name(path: Path, prompts: list[str]) -> str:
    """A name that depends on the prompts too, and that no split has."""
    return f"file-{path.stem.lstrip('.')}-{zlib.crc32(chr(10).join(prompts).encode()):08x}"


def _compared(
    config: RunConfig,
    run: RunDirectory,
    target: RunDirectory,
    chosen: Prompts,
    seeds: list[int],
    held_out: list[str] | None,
    observer: Observer,
) -> Comparison:
    local = config.model_copy(update={"cluster": config.cluster.model_copy(update={"learner_actors": 0})})
    prompts, rows = chosen.texts, {**saved_prompts(run).rows, **chosen.rows}
    observer.stage("starting actors", 1)
    with algorithm(local, prompts, None, rows) as algo:
        observer.advance()
        warn_of_long_prompts(algo, prompts)
        if held_out is None and config.evaluation.tune:
            observer.note(
                "the rivals are as they come: the prompts on which they are tuned are those of this comparison"
            )
        tuning = None if held_out is None else Tuning(config, algo, held_out, observer)
        who, keep = contest(config, run, algo, tuning), config.evaluation.pictures
        return comparison(algo.sample_scored, who, prompts, seeds, target.path.name, target, keep, observer)


@contextmanager
def draft(run: RunDirectory, final: Path) -> Iterator[RunDirectory]:
    """A directory for a new evaluation, which takes the place of an earlier one when the block ends without an error.

    Args:
        run: the run, whose files a report needs beside the evaluation; they are copied.
        final: where the evaluation is to lie.

    Raises:
        RunDirectoryError: an evaluation that was replaced before cannot be removed.
    """
    new, earlier = (final.with_name(f".{final.name}.{end}") for end in ("new", "old"))
    _settle(final, earlier)
    if earlier.exists():
        raise RunDirectoryError(f"{earlier} cannot be removed: end what has its files open, or delete it")
    target = RunDirectory(new / final.name)  # the results show the last part of the path
    shutil.rmtree(new, ignore_errors=True)
    target.path.mkdir(parents=True)
    for source in (run.config, run.versions, run.metrics):
        shutil.copy(source, target.path)
    if run.validation.is_file():
        shutil.copy(run.validation, target.path)
    shutil.copytree(run.solver, target.solver)
    shutil.copytree(run.distilled, target.distilled)
    try:
        yield target
        if final.exists():
            final.rename(earlier)
        target.path.rename(final)
    finally:
        _settle(final, earlier)
        shutil.rmtree(new, ignore_errors=True)


def _settle(final: Path, earlier: Path) -> None:
    """Move an evaluation back that was moved aside and not replaced; remove it where it was replaced."""
    if final.exists():
        shutil.rmtree(earlier, ignore_errors=True)
    elif earlier.exists():
        earlier.rename(final)
