"""RunConfig: all sections of a run's configuration, and what must hold between them."""

import re
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from epd_ray.config.sections import (
    AUTO,
    BackboneConfig,
    DistillConfig,
    EvaluationConfig,
    PromptsConfig,
    RDPOSection,
    SolverConfig,
)
from epd_ray.config.services import (
    RESERVED_HEADS,
    CheckpointConfig,
    ClusterConfig,
    RewardConfig,
    StoreConfig,
    TrackingConfig,
)
from epd_ray.config.values import NAME_PATTERN, Name, Section
from epd_ray.errors import shown
from epd_ray.stage_one.combinations import too_many_combinations

FORMAT = 2
"""The newest version of the file format that this code reads, and the one that it writes."""


class RunConfig(Section):
    """The whole configuration of a run. The validators here are about keys of several sections."""

    format: int = Field(
        default=FORMAT, ge=1, le=FORMAT, description=f"The version of the file format, at least 1 and at most {FORMAT}."
    )
    name: Name = Field(
        default="shapes", description="The last part of the run directory's name: letters, digits, - and _."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="The seed of prompts, noise and policy, at least 0 and below 2147483648."
    )
    backbone: BackboneConfig = BackboneConfig()
    solver: SolverConfig = SolverConfig()
    prompts: PromptsConfig = PromptsConfig()
    rewards: dict[Name, RewardConfig] = Field(
        default={"clip": RewardConfig(options={"model": "shapes-clip"})},
        min_length=1,
        description="The reward heads, at least 1, by the names that columns and metrics use: letters, digits, -, _.",
    )
    distill: DistillConfig = DistillConfig()
    rdpo: RDPOSection = RDPOSection()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    store: StoreConfig = StoreConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("rewards", mode="before")
    @classmethod
    def _heads_of_their_names(cls, rewards: Any) -> Any:
        """A head that is not named is the one whose name the entry has; another name is then refused as a head."""
        if not isinstance(rewards, dict):
            return rewards
        return {
            name: {"head": name, **given} if isinstance(given, dict) and re.match(NAME_PATTERN, str(name)) else given
            for name, given in rewards.items()
        }

    @field_validator("rewards")
    @classmethod
    def _free_names(cls, rewards: dict[str, RewardConfig]) -> dict[str, RewardConfig]:
        taken = sorted(RESERVED_HEADS.intersection(rewards))
        if taken:
            raise ValueError(f"{shown(taken[0])} is the name of another column or metric: call the head something else")
        return rewards

    @field_validator("rewards")
    @classmethod
    def _weighted(cls, rewards: dict[str, RewardConfig]) -> dict[str, RewardConfig]:
        if not sum(reward.weight for reward in rewards.values()):
            raise ValueError("weights add up to 0, at least one head needs a positive weight")
        return rewards

    @field_validator("rdpo")
    @classmethod
    def _normalisable(cls, rdpo: RDPOSection, info: ValidationInfo) -> RDPOSection:
        if rdpo.normalisation != "reference":
            return rdpo
        from epd_ray.rewards.scoring import REFERENCE  # with torch, which takes long to import

        unknown = [r.head for r in info.data.get("rewards", {}).values() if r.weight and r.head not in REFERENCE]
        if unknown:
            raise ValueError(f"normalisation reference has no clamps for head {shown(unknown[0])}: set zscore or none")
        return rdpo

    @field_validator("cluster")
    @classmethod
    def _encodable(cls, cluster: ClusterConfig, info: ValidationInfo) -> ClusterConfig:
        family = info.data.get("backbone", BackboneConfig()).family
        if cluster.encoder_actors and family != AUTO:
            raise ValueError(
                f"encoder_actors is 1, but family {shown(family)} cannot open text encoders on their own: set 0"
            )
        return cluster

    @field_validator("rdpo")
    @classmethod
    def _keeps_start_point(cls, rdpo: RDPOSection, info: ValidationInfo) -> RDPOSection:
        if rdpo.scale_time and info.data.get("solver", SolverConfig()).start_point:
            raise ValueError("scale_time would move the start point in time: set it false, or solver.start_point=false")
        return rdpo

    @field_validator("rdpo")
    @classmethod
    def _finds_its_scales(cls, rdpo: RDPOSection, info: ValidationInfo) -> RDPOSection:
        distill = info.data.get("distill", DistillConfig())
        scales = rdpo.scale_dir and distill.scale_range
        if rdpo.scale_time and _runs(distill) and distill.method == "gradient" and not scales:
            raise ValueError(
                "scale_time is fitted by distill.method=gradient only together with direction scales: set scale_dir "
                "true and distill.scale_range above 0, or distill.method=least_squares"
            )
        return rdpo

    @field_validator("rdpo")
    @classmethod
    def _has_something_to_learn(cls, rdpo: RDPOSection, info: ValidationInfo) -> RDPOSection:
        solver = info.data.get("solver", SolverConfig())
        if solver.points == 1 and solver.start_point and not rdpo.scale_dir:
            raise ValueError(
                "scale_dir is false, but a single point at the interval's start has nothing else to learn: set it "
                "true, or solver.points to 2 or more"
            )
        return rdpo

    @field_validator("distill")
    @classmethod
    def _finds_the_parts(cls, distill: DistillConfig, info: ValidationInfo) -> DistillConfig:
        solver = info.data.get("solver", SolverConfig())
        if solver.reuse_count and not distill.enabled:
            raise ValueError(
                f"enabled is false, but stage 1 chooses the {solver.reuse_count} intervals of solver.reuse: set it "
                "true, or list the intervals"
            )
        if _runs(distill) and solver.grid and distill.teacher_steps == 1:
            raise ValueError(
                "teacher_steps is 1, at least 2 is needed for solver.grid: two noise levels would meet between the "
                "teacher's"
            )
        return distill

    @field_validator("distill")
    @classmethod
    def _solvable(cls, distill: DistillConfig, info: ValidationInfo) -> DistillConfig:
        if not _runs(distill):
            return distill
        solver = info.data.get("solver", SolverConfig())
        points = solver.points
        if distill.grid < points:
            raise ValueError(f"grid is {distill.grid}, at least solver.points = {points} is needed")
        if problem := too_many_combinations(distill.grid, points, solver.start_point):
            raise ValueError(problem)
        if distill.min_weight * points >= 1:
            raise ValueError(
                f"min_weight is {distill.min_weight:g}, less than 1 / solver.points = {1 / points:g} is needed"
            )
        if distill.method == "gradient" and solver.start_point and (solver.order > 1 or solver.afs):
            raise ValueError(
                "method gradient cannot fit a start point together with solver.order above 1 or solver.afs: set method "
                "least_squares, or solver.start_point=false"
            )
        return distill


def _runs(distill: DistillConfig) -> bool:
    """Whether stage 1 runs."""
    return distill.enabled and distill.table is None
