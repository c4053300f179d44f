"""The configurations that ship: they load, they fit their GPUs, and the reference's twins are the reference's."""

from pathlib import Path

import pytest

from epd_ray.config.loading import load_config
from epd_ray.config.run_config import RunConfig
from epd_ray.prompts.splits import load_prompts
from epd_ray.rdpo.config import placement
from epd_ray.rdpo.session import rdpo_config
from epd_ray.solvers import Solver

FOLDER = Path(__file__).parent.parent / "jobs" / "configs"
GPUS = 8
# resolution, guidance scale, N, images of a batch, concentration, the table of the start. Source: the reference's
# training configurations and the shapes of its tables; it has no SDXL, which takes its SD1.5 settings here.
REFERENCE = {
    "sd15": (512, 7.5, 10, 8, 20, "sd15-distilled"),
    "sdxl": (1024, 5.0, 10, 8, 20, None),
    "sd3_512": (512, 4.5, 10, 16, 10, "sd3-512-distilled"),
    "sd3_1024": (1024, 4.5, 10, 8, 10, "sd3-1024-distilled"),
    "flux_dev": (1024, 3.5, 8, 8, 10, None),
}

FEW = {f"{name}_{suffix}": (name, count) for name in ("sd15", "sdxl", "sd3_1024", "flux_dev")
       for suffix, count in (("1gpu", 1), ("2gpus", 2))}  # fmt: skip


def load(name: str) -> RunConfig:
    return load_config(FOLDER / f"{name}.yaml")


def gpus(config: RunConfig) -> list[float]:
    bundles = placement(rdpo_config(config, ["any"])).values()
    return [bundle["GPU"] for group in bundles for bundle in group if bundle.get("GPU")]


def fits(shares: list[float], count: int) -> bool:
    """First fit of the largest first, as fractions of a GPU do not spread over two."""
    free = [1.0] * count
    for share in sorted(shares, reverse=True):
        place = next((i for i, room in enumerate(free) if room >= share - 1e-9), None)
        if place is None:
            return False
        free[place] -= share
    return True


def test_there_is_a_pair_per_family() -> None:
    there = {path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("embedded_")} - {
        "sd3_1024_cluster"
    }
    assert there == {*REFERENCE, *(f"{name}_reference" for name in REFERENCE), *FEW}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_one_loads_and_finds_its_prompts(path: Path) -> None:
    config = load_config(path)
    prompts = load_prompts(config.prompts, config.seed)
    assert len(prompts.train) >= config.distill.prompts and len(prompts.test) == config.prompts.test
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 120 and "hf_" not in text
    assert f"jobs/configs/{path.name}" in text  # how to run it is its first word


@pytest.mark.parametrize("name", REFERENCE)
def test_both_of_a_pair_run_the_same_model_on_8_gpus(name: str) -> None:
    ours, theirs = load(name), load(f"{name}_reference")
    assert fits(gpus(ours), GPUS) and fits(gpus(theirs), GPUS)
    assert sum(gpus(ours)) == pytest.approx(GPUS)
    for key in ("model", "revision", "resolution", "guidance_scale"):
        assert getattr(ours.backbone, key) == getattr(theirs.backbone, key), key
    assert ours.solver.intervals == theirs.solver.intervals and ours.prompts == theirs.prompts
    assert ours.solver.points - ours.solver.start_point == theirs.solver.points  # evaluations
    assert ours.name == name and theirs.name == f"{name}-reference"


@pytest.mark.parametrize("name", FEW)
def test_the_same_run_fits_one_and_two_gpus(name: str) -> None:
    whole, count = FEW[name]
    few, many = load(name), load(whole)
    assert fits(gpus(few), count) and sum(gpus(few)) == pytest.approx(count)
    for key in ("model", "revision", "resolution", "dtype", "guidance_scale"):
        assert getattr(few.backbone, key) == getattr(many.backbone, key), key
    assert (few.name, few.solver, few.prompts) == (many.name, many.solver, many.prompts)
    cluster, rdpo = few.cluster, few.rdpo
    images = rdpo.prompts_per_iteration * rdpo.group_size
    assert images % (cluster.rollout_actors * cluster.images_per_job) == 0 and images % rdpo.minibatch_size == 0
    assert images >= many.rdpo.prompts_per_iteration * many.rdpo.group_size
    weights = {reward.head: reward.weight for reward in few.rewards.values()}
    assert weights["hpsv2.1"] == 1 and sum(weights.values()) == 1 and len(weights) >= 2  # one is watched
    assert cluster.encoder_actors == many.cluster.encoder_actors
    assert "# Memory:" in (FOLDER / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", REFERENCE)
def test_ours_keeps_every_gpu_busy(name: str) -> None:
    config = load(name)
    cluster, rdpo = config.cluster, config.rdpo
    images = rdpo.prompts_per_iteration * rdpo.group_size
    assert images == cluster.rollout_actors * cluster.images_per_job and images % rdpo.minibatch_size == 0
    assert rdpo.staleness == 1 and rdpo.same_latent and rdpo.baseline == "per_prompt"
    weights = {reward.head: reward.weight for reward in config.rewards.values()}
    assert weights == {"hpsv2.1": 1, "pickscore": 0, "imagereward": 0, "clip": 0}
    assert cluster.encoder_actors == (name.startswith(("sd3", "flux")))  # those with T5-XXL


@pytest.mark.parametrize("name", REFERENCE)
def test_the_twin_has_the_references_numbers(name: str) -> None:
    config = load(f"{name}_reference")
    resolution, guidance, intervals, batch, concentration, table = REFERENCE[name]
    r = config.rdpo
    assert (config.backbone.resolution, config.backbone.guidance_scale) == (resolution, guidance)
    assert (config.solver.intervals, config.solver.points) == (intervals, 2)
    assert (r.prompts_per_iteration * r.group_size, r.group_size, r.minibatch_size, r.num_epochs) == (batch, 4, 4, 1)
    assert (r.lr, r.weight_decay, r.clip, r.grad_clip) == (7e-5, 0, 0.2, 1)
    assert (r.kl_coeff, r.entropy_coeff, r.concentration, r.staleness) == (0, 0, concentration, 0)
    assert (r.baseline, r.same_latent, r.normalisation) == ("mixed", False, "reference")
    assert (r.hidden_width, r.hidden_depth, r.scale_dir, r.scale_time) == (128, 2, False, False)
    assert r.concentration_bound >= 1e5  # it has none
    assert [(reward.head, reward.weight) for reward in config.rewards.values()] == [("hpsv2.1", 1)]
    assert config.distill.table == table
    if table is not None:
        start = Solver.from_pretrained(table)
        assert (start.table.intervals, start.table.points) == (intervals, 2)
        assert start.meta["model_id"] == config.backbone.model and start.meta["resolution"] == resolution
    assert config.distill.enabled == (name != "flux_dev")
