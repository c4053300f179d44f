"""A trained solver as a diffusers scheduler, for unmodified pipelines: `pipe.scheduler = EPDScheduler...`."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from epd_ray.backbones.doors import door_of
from epd_ray.deploy.asking import asking_call, check_ends, check_windows, control_windows, default_steps, first_call
from epd_ray.deploy.window import LayerWindow
from epd_ray.errors import ScheduleError, TableError, shown
from epd_ray.solvers import Solver, SolverTable
from epd_ray.solvers.network import Network, check_same
from epd_ray.solvers.scheduler_config import (
    SCHEDULER_FILE,
    TRAIN_TIMESTEPS,
    UNSET,
    SolverValues,
    check_values,
    facts_of,
    parse_facts,
)
from epd_ray.solvers.stepwise import GuidedCall, Loop, Plan, PointInputs, check_shapes
from epd_ray.solvers.table import Rows
from epd_ray.storage.documents import read_json
from epd_ray.types import Form
from epd_ray.weights.hub import explain

DAMAGED = "save the solver again"
log = logging.getLogger(__name__)


class EPDScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # diffusers ships no types
    """Runs a solver inside an unmodified diffusers pipeline, one evaluation per call of the network.

    An interval takes `order` calls of the network: K + 1, or K with a start point, and at most 2 in parallel mode. The
    analytical first step saves the first call, except for flow models: their pipelines let no scheduler change the
    network's first input, so that call is made and its output not used. The state is kept in float32, whatever the
    dtype of the pipeline's latents. A pipeline for image to image begins at the start of an interval: with
    num_inference_steps = N, a `strength` of m / N runs the last m intervals. Terms of the table's history whose
    interval was left out count nothing, and an interval that would reuse guidance from there makes both passes. Where a
    pipeline repaints what lies outside of a mask, it does so at each start and at each point. A table that sets
    guidance needs the hooks of `guide` or `parallelize`. Pipelines that end before the last step are refused.
    To open a saved pipeline that has this scheduler, import `epd_ray.deploy.scheduler` first.

    Its configuration also holds that of the scheduler that it replaced, under that scheduler's own keys, so that
    `OtherScheduler.from_config(pipe.scheduler.config)` gives the same before and after.

    Args:
        sigmas: [N+1], decreasing, > 0.
        positions: [N, K], column of the table, see `SolverTable`.
        weights: [N, K], column of the table.
        scale_dir: [N, K], column of the table; None stands for ones.
        scale_time: [N, K], column of the table; None stands for ones.
        history: [N, H], column of the table; None stands for zeros.
        guidance: [N], column of the table; None leaves the guidance scale to the pipeline.
        reuse: [N], column of the table; None stands for no interval.
        form: how noise enters x, "ve" or "flow".
        afs: whether the first drift is analytical.
        multistep_order: order of the multistep slope that leads to the points, 1 to 4.
        prediction_type: what the network's output is: "epsilon", "v_prediction" or "sample" in VE form,
            "flow_prediction" in flow form.
        num_train_timesteps: number of timesteps in the network's training.
        beta_start: first beta of the training schedule (VE form only), as in diffusers' other schedulers.
        beta_end: last beta of the training schedule.
        beta_schedule: diffusers' name of the curve between them.
        trained_betas: all betas, in place of the three values above.
        use_flow_sigmas: derived from the form; tells pipelines not to pass sigmas of their own.
        backbone: the family of models that the solver was made for; a pipeline of another one is warned of.
        replaced: the configuration of the scheduler that was in the pipeline before, as JSON values.

    Raises:
        TableError: values that are absent, wrong, or do not fit each other.
        ScheduleError: sigmas that do not decrease or that reach 0.
    """

    # The arguments are as many as they are because diffusers keeps a scheduler's configuration as the arguments of its
    # constructor, plain JSON values all of them: scheduler_config.json is read back as EPDScheduler(**values).
    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sigmas: list[float] | None = None,
        positions: Rows | None = None,
        weights: Rows | None = None,
        scale_dir: Rows | None = None,
        scale_time: Rows | None = None,
        history: Rows | None = None,
        guidance: list[float] | None = None,
        reuse: list[bool] | None = None,
        form: Form | None = None,
        afs: bool = False,
        multistep_order: int = 1,
        prediction_type: str | None = None,
        num_train_timesteps: int = TRAIN_TIMESTEPS,
        beta_start: float | None = None,
        beta_end: float | None = None,
        beta_schedule: str | None = None,
        trained_betas: list[float] | None = None,
        use_flow_sigmas: bool = False,
        backbone: str | None = None,
        replaced: dict[str, Any] | None = None,
    ) -> None:
        if sigmas is None or positions is None or weights is None:
            raise TableError(
                "no sigmas, positions or weights: EPDScheduler is made from a solver, not from another scheduler's "
                "config (use EPDScheduler.from_pretrained with a solver's directory)"
            )
        kinds = {name: self.config[name] for name in SolverValues.model_fields}
        check_values(kinds)
        facts = {
            "prediction_type": prediction_type, "num_train_timesteps": num_train_timesteps, "beta_start": beta_start,
            "beta_end": beta_end, "beta_schedule": beta_schedule, "trained_betas": trained_betas,
        }  # fmt: skip
        self.network = Network(parse_facts(facts, form))
        self.form = cast(Form, form)
        table = SolverTable.from_lists(
            {
                "positions": positions, "weights": weights, "scale_dir": scale_dir, "scale_time": scale_time,
                "history": history, "guidance": guidance, "reuse": reuse,
            }
        )  # fmt: skip
        self.solver = Solver(table, torch.tensor(sigmas, dtype=torch.float64), self.form, afs, multistep_order)
        own = {name: value for name, value in self.config.items() if not name.startswith("_")}
        self.register_to_config(**_beside(own | {"use_flow_sigmas": form == "flow"}, replaced))
        self._warned: set[str] = set()
        self.init_noise_sigma = sigmas[0] if form == "ve" else 1.0
        self.set_parallel(False)

    # -- made from and saved as ---------------------------------------------------------------------------------------

    @classmethod
    def from_solver(cls, solver: Solver, *, like: Any = None) -> "EPDScheduler":
        """The scheduler that runs a solver.

        Args:
            solver: its `meta["scheduler"]` holds the facts about the network that it was made for.
            like: the scheduler of the pipeline that it will run in. It supplies the facts if meta has none; otherwise
                both must agree. Its configuration is kept for the `from_config` of other schedulers.

        Returns:
            A new scheduler.

        Raises:
            TableError: too little is known about the network, or the pipeline's network is another one.
        """
        theirs = None if like is None else facts_of(like.config, solver.form)
        config = solver.scheduler_config(theirs if solver.meta.get("scheduler") is None else None)
        if config is None:
            raise TableError(
                "the solver does not say what its network predicts "
                "(pass like=pipe.scheduler, or set form and meta['scheduler'])"
            )
        scheduler: EPDScheduler = cls(**config, replaced=None if like is None else _replaced(like.config))
        if like is not None:
            scheduler._check_like(like)
        return scheduler

    def _check_like(self, like: Any) -> None:
        check_same(self.network.facts, parse_facts(facts_of(like.config, self.form), self.form))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        *,
        like: Any = None,
        **kwargs: Any,  # diffusers' own: revision, token, cache_dir ...
    ) -> Any:
        """Read a scheduler from a solver's directory, a hub repository, or a preset of this package.

        Args:
            pretrained_model_name_or_path: a directory, a hub id "owner/name", or a preset ("sd3-1024-rl").
            subfolder: the folder in it that holds the files.
            return_unused_kwargs: whether to return the pair (scheduler, unused keyword arguments), as diffusers does.
            like: the scheduler of the pipeline that it will run in, see `from_solver`.

        Returns:
            The scheduler.

        Raises:
            TableError: the solver is missing, or does not say enough about its network.
        """
        source = os.fspath(pretrained_model_name_or_path)
        folder = Path(source, subfolder or "")
        local = Path(source).is_dir()
        revision = kwargs.get("revision")
        if (folder / SCHEDULER_FILE).is_file() or (not Path(source).exists() and "/" in source):
            kept = {} if like is None else {"replaced": _replaced(like.config)}
            try:
                read = super().from_pretrained(source, subfolder, return_unused_kwargs, **kept, **kwargs)
            except (TableError, ScheduleError) as error:
                raise TableError(f"{shown(str(folder))} cannot be opened: {error}") from error
            except OSError as error:
                if local or subfolder is not None:
                    raise TableError(f"{shown(source)} cannot be opened: {explain(error)}") from error
            else:
                if like is not None:
                    (read[0] if return_unused_kwargs else read)._check_like(like)
                return read
        solver = Solver.from_pretrained(folder if local else source, revision=revision)
        made: EPDScheduler = cls.from_solver(solver, like=like)
        return (made, kwargs) if return_unused_kwargs else made

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str], **_: Any) -> dict[str, Any]:
        """Read a configuration, as diffusers does, which would take a lone text in the file for the name of a model."""
        found = read_json(Path(json_file), TableError, DAMAGED)
        if not isinstance(found, dict):
            raise TableError(f"{json_file} is {shown(found)}, expected an object ({DAMAGED})")
        return found

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Take this class's own keys from a configuration, which may hold those of a replaced scheduler beside them."""
        own = {name: config_dict[name] for name in cls._get_init_keys(cls) & config_dict.keys()}
        if "sigmas" in own and "solver_order" in config_dict:  # its name in files of an earlier version
            own.setdefault("multistep_order", config_dict["solver_order"])
        return super().extract_init_dict(own, **kwargs)

    # -- what pipelines ask for ---------------------------------------------------------------------------------------

    @property
    def parallel(self) -> bool:
        """Whether all points of an interval are evaluated in one call, which only works after `parallelize`."""
        return self._plan.parallel

    def set_parallel(self, parallel: bool) -> None:
        """Choose whether all points of an interval are evaluated in one call. A loop that is under way ends."""
        self._plan = Plan(self.solver, self.network, parallel=parallel)
        self.order = self._plan.order
        self.set_timesteps()
        self._loop: Loop | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Begin a denoising loop.

        Args:
            num_inference_steps: not used, because the solver has its own N; another number is logged once, unless it is
                the default of the pipeline that asks, which cannot be told apart from no wish at all.
            device: where `timesteps` is put.
            sigmas: not used, because the solver has its own; logged once.
            mu: not used, because it only shapes sigmas.
            timesteps: refused, because a network would be told them in place of those of the solver's points.

        Raises:
            TableError: there are timesteps; or the pipeline that asks shall end before the last step, or would leave
                out layers at other points than those in its window, see `LayerWindow`.
        """
        if timesteps is not None:
            raise TableError(
                "timesteps are given, expected none: a learned solver has its own (leave timesteps out; pipelines that "
                "give their own, as CogView4Pipeline, cannot have this scheduler: sample with epd-ray)"
            )
        intervals = self.solver.table.intervals
        asking = asking_call(self)
        pipe = asking.get("self")
        check_ends(pipe, intervals)
        if self.solver.table.reused and asking.get("do_true_cfg"):
            raise TableError(
                "the solver leaves out passes without the prompt, which the pipeline makes one by one for "
                "true_cfg_scale (leave true_cfg_scale out, or use a solver without the part reuse)"
            )
        self._windows = control_windows(asking)
        check_windows(self._windows, self._plan, 0)
        window = LayerWindow.asked(asking, self._plan)
        if window is not None and self.parallel and self.solver.table.unguided:
            raise TableError(
                "skip_guidance_layers needs both passes of each evaluation, of which this solver leaves some out "
                "(leave skip_guidance_layers out, or take guide in place of parallelize)"
            )
        fine = (None, intervals, default_steps(pipe), window and len(window.places))
        if sigmas is not None or num_inference_steps not in fine:
            given = "sigmas" if sigmas is not None else f"num_inference_steps={num_inference_steps}"
            self._warn_once("steps", f"{given} is not used: this solver has {intervals} intervals of its own")
        door, made_for = door_of(pipe), self.config.get("backbone")
        if door is not None and made_for not in (None, door.family):
            self._warn_once(
                "backbone",
                f"this solver is for the backbone family {made_for}, but {type(pipe).__name__} is of the family "
                f"{door.family}: expect poor pictures (take a solver of the same family)",
            )
        evaluated = torch.stack([self._plan.sigma(call)[0] for call in self._plan.calls])
        self.sigmas = torch.cat([evaluated, self.solver.sigmas[-1:]]).float()  # [calls + 1]
        self.timesteps = self.network.timestep(evaluated).to(device)  # [calls]
        self.num_inference_steps = intervals
        self._loop, self._begin = Loop(self._plan), 0
        self._scaled = self._expanded = self._guided = False
        self._window = window

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Leave out the first calls, for a pipeline that begins from a noisy picture.

        Args:
            begin_index: 0, or the first call of an interval.

        Raises:
            TableError: any other index; or it is not where the `strength` of the pipeline that asks would begin.
        """
        if begin_index == 0 and self._loop is None:
            return
        self._begin = first_call(asking_call(self), begin_index, self._plan)
        check_windows(self._windows, self._plan, self._begin)
        self._current().made = self._begin

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """A clean picture at the noise level of the latents that the next call takes.

        Pipelines that begin from a noisy picture, or repaint a part of one, call this.

        Args:
            original_samples: [B, ...], clean latents.
            noise: [B, ...], unit normal.
            timesteps: that of the next call, any number of times.

        Returns:
            Latents [B, ...] in the dtype of original_samples.

        Raises:
            TableError: any other timestep, or the pipeline repaints at a point that it cannot reach.
        """
        loop = self._current()
        if loop.made > self._begin and self.solver.afs and self.form == "ve":
            raise TableError(
                "the picture is repainted, but the first point of an analytical first step is not the pipeline's to "
                "repaint (use a solver without afs)"
            )
        due = float(self.timesteps[loop.made])
        if not torch.allclose(asked := torch.as_tensor(timesteps).float().cpu(), torch.tensor(due), atol=1e-3):
            raise TableError(
                f"noise for timestep {asked.flatten()[0].item():g} is asked for, expected {due:g}, the next one of "
                "this solver (use a pipeline that calls set_begin_index, or another scheduler)"
            )
        sigma = loop.level
        clean = original_samples.float() * (1 - sigma if self.form == "flow" else 1.0)
        return (clean + sigma * noise.float()).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """The same as `add_noise`, under the name and with the order of schedulers for flow models."""
        return self.add_noise(sample, noise, timestep)

    @property
    def begin_index(self) -> int:
        """The first call of this loop; above 0 where a pipeline begins from a noisy picture."""
        return self._begin

    @property
    def step_index(self) -> int | None:
        """Number of calls made so far in this loop; None outside of a loop."""
        return None if self._loop is None else self._loop.made

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The network's input in the next call, for a model in VE form.

        Args:
            sample: [R, ...], the latents, repeated where classifier-free guidance needs them twice.
            timestep: not used, because calls come in order.

        Returns:
            The point to evaluate at unit variance, in the shape and dtype of sample. In parallel mode the hook of
            `parallelize` supplies an interval's points later, and the sample is returned as it is.

        Raises:
            TableError: the solver is for a flow model, or no loop has begun.
        """
        if self.form == "flow":
            raise TableError(
                "a solver for a flow model is in a pipeline whose network predicts noise (use a matching one)"
            )
        loop = self._current()
        self._scaled = True
        return sample if self.parallel and loop.call[1] is not None else loop.seen(sample)[:, 0]

    def point_inputs(self, hidden: Tensor) -> PointInputs | None:
        """The points of the interval, if the next call evaluates them all; `parallelize` asks for them.

        Args:
            hidden: [R, ...], the pipeline's input for its network: the latents, repeated for classifier-free guidance.

        Returns:
            The points in the dtype of hidden; None if the next call evaluates an interval's start, or outside of
            parallel mode.
        """
        loop = self._loop
        if not self.parallel or loop is None or loop.call[1] is None:
            return None
        self._expanded = True
        timesteps = self.network.timestep(self._plan.sigma(loop.call)).to(hidden.device)
        return PointInputs(loop.seen(hidden), timesteps)

    def guided_call(self) -> GuidedCall | None:
        """What the table says about the guidance of the next call; the hooks of `guide` and `parallelize` ask for it.

        None for a table that does not set guidance, or outside of a loop.
        """
        if self._loop is None or not self.solver.table.guides:
            return None
        self._guided = True
        return self._loop.guided

    def skips_layers(self) -> list[bool] | None:
        """For each point of the next call, whether it is in the pipeline's window of left-out layers; None without one.

        In parallel mode the pipeline decides for all points of an interval at once; `parallelize` asks for this.
        """
        return None if self._window is None or self._loop is None else self._window.wanted(self._loop.call)

    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, return_dict: bool = True,
        generator: Any = None,
    ) -> SchedulerOutput | tuple[Tensor]:  # fmt: skip
        """Take the network's output and return the latents for the next call.

        Args:
            model_output: [B, ...], or [B * K, ...] for the points of an interval in one call (row b * K + k).
            timestep: the next one of `timesteps`; numbers and copies are not compared, because calls come in order.
            sample: [B, ...], the tensor that the call before returned. If the pipeline changed or replaced it, the new
                values count: as the state at an interval's start, or as the one point that this call evaluated.
            return_dict: whether to return a SchedulerOutput or a tuple.
            generator: not used, because nothing is drawn at random.

        Returns:
            The latents [B, ...] for the next call, in the dtype of sample.

        Raises:
            TableError: more calls than the solver makes, or a pipeline that the solver does not fit.

        Source: EPD-Solver (arXiv 2507.14797).
        """
        loop = self._current()
        if self.form == "ve" and not self._scaled:
            raise TableError(
                "a solver in VE form is in a pipeline that does not scale its network's input, as DDPMPipeline and "
                "those of flow models (use one made for this model; by hand, call scale_model_input before the network)"
            )
        if self.parallel and loop.call[1] is not None and not self._expanded:
            raise TableError("the network did not see the points (parallelize the pipeline that this scheduler is in)")
        if self.solver.table.guides and not self._guided:
            raise TableError(
                "the solver sets the guidance of each interval, which a scheduler alone cannot (call guide or "
                "parallelize of epd_ray.deploy.parallelize on the pipeline)"
            )
        check_shapes(loop, model_output, sample)
        self._check_place(timestep, loop.made)
        latents = loop.advance(model_output, sample)
        self._scaled = self._expanded = self._guided = False
        if loop.done:
            self._loop = None
        return SchedulerOutput(prev_sample=latents) if return_dict else (latents,)

    def _check_place(self, timestep: Any, made: int) -> None:
        """Refuse a pipeline that cuts `timesteps` without `set_begin_index`; no value is read, only where it lies."""
        if not isinstance(timestep, Tensor):
            return
        own = self.timesteps
        if timestep.untyped_storage().data_ptr() != own.untyped_storage().data_ptr():
            return
        if (place := timestep.storage_offset() - own.storage_offset()) != made:
            raise TableError(
                f"timesteps[{place}] is taken, expected timesteps[{made}]: a learned solver takes all its timesteps in "
                "order (use a pipeline that calls set_begin_index, or another scheduler)"
            )

    def _current(self) -> Loop:
        if self._loop is None:
            raise TableError(f"all {len(self._plan.calls)} calls are made, or none is due: call set_timesteps first")
        return self._loop

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning(message)


def _replaced(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What to keep of the configuration of a scheduler that an EPDScheduler replaces, as JSON values."""
    if "positions" in config:  # another EPDScheduler, which knows the first one
        return cast(dict[str, Any] | None, config.get("replaced"))
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in config.items()}


def _beside(own: dict[str, Any], theirs: Mapping[str, Any] | None) -> dict[str, Any]:
    """A configuration with the values of an EPDScheduler beside those of the scheduler that it replaced.

    Diffusers' `from_config` passes over the keys in `_use_default_values`. So it gives the other schedulers exactly
    what their own configuration held, and nothing of ours.
    """
    if theirs is None:
        return own
    ours = {name for name in own if name not in theirs or name in _OF_OURS}
    hidden = {name for name in ours if name not in theirs or theirs[name] != own[name]} | {*theirs.get(UNSET, ())}
    return {**own, **{k: v for k, v in theirs.items() if k not in ours}, UNSET: sorted(hidden)}


_OF_OURS = frozenset({"use_flow_sigmas"})  # pipelines read it to know how this scheduler behaves
