"""The cluster recipes: Ray's own schema, who is let in, and where the actors of the configuration land."""

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from click import Context
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.cluster_utils import Cluster
from ray.util.state import list_actors
from typer.main import get_command

from epd_ray.actors.cluster import ray_session
from epd_ray.cli import app
from epd_ray.config.loading import load_config
from epd_ray.config.run_config import RunConfig
from epd_ray.rdpo.config import placement
from epd_ray.rdpo.session import rdpo_config
from tests.ray_head import free_ports

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "jobs" / "configs" / "sd3_1024_cluster.yaml"
GROUP_OF = {"rollout": "rollout_gpu", "reward": "reward_gpu"}


def recipe() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def job() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "jobs" / "rayjob.yaml").read_text())
    return loaded


def config() -> RunConfig:
    return load_config(CONFIG)


def asked() -> Counter[str]:
    """What the actors of the configuration ask for in all, with as many that draw as there may be."""
    total: Counter[str] = Counter()
    given = rdpo_config(config(), ["any"])
    most = given.copy().env_runners(num_env_runners=given.max_env_runners)
    for bundles in placement(most).values():
        for bundle in bundles:
            total.update({name: round(1000 * amount) for name, amount in bundle.items()})
    return total


# -- cluster.yaml -----------------------------------------------------------------------------------------------------


def test_the_recipe_passes_rays_own_check() -> None:
    validate_config(prepare_config(recipe()))
    wrong = recipe() | {"head_nod_type": "head"}
    with pytest.raises(Exception, match="head_nod_type"):
        validate_config(prepare_config(wrong))


def test_the_nodes_of_the_recipe_hold_the_configuration() -> None:
    types = recipe()["available_node_types"]
    room: Counter[str] = Counter(types["head"]["resources"])
    for name in GROUP_OF.values():
        assert 1 <= types[name]["min_workers"] <= types[name]["max_workers"]
        for resource, amount in types[name]["resources"].items():
            room[resource] += amount * types[name]["max_workers"]
    assert not {name for name, amount in asked().items() if amount > 1000 * room[name]}
    assert sum(types[name]["max_workers"] for name in types) <= recipe()["max_workers"]
    assert "GPU" not in types["head"]["resources"]
    assert types["rollout_gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert not {"head", "reward_gpu"} & {n for n, t in types.items() if "InstanceMarketOptions" in t["node_config"]}


def test_a_run_starts_with_the_nodes_that_are_always_there_and_takes_all() -> None:
    """Spot nodes may be short: the run waits for none but the first."""
    types, asks = recipe()["available_node_types"], config().cluster
    assert asks.rollout_actors == types["rollout_gpu"]["min_workers"]
    assert asks.max_rollout_actors == types["rollout_gpu"]["max_workers"]


def test_no_node_is_started_again_without_its_shared_folder() -> None:
    """Ray skips the setup commands of a stopped AWS node that it starts again."""
    assert recipe()["provider"]["cache_stopped_nodes"] is False


def test_every_node_asks_for_the_token_and_the_dashboard_is_not_public() -> None:
    cluster = recipe()
    head, worker = cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]
    for command in (head, worker):
        assert command.index("RAY_AUTH_MODE=token") < command.index("ray start")
    assert "--dashboard-host=127.0.0.1" in shlex.split(head) and "0.0.0.0" not in str(cluster)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN=" not in str(cluster)
    assert any(" mount " in command and "/shared" in command for command in cluster["setup_commands"])


# -- jobs/rayjob.yaml -------------------------------------------------------------------------------------------------


def containers() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Group, its rayStartParams, and each container."""
    spec = job()["spec"]["rayClusterSpec"]
    for name, group in [("head", spec["headGroupSpec"]), *((g["groupName"], g) for g in spec["workerGroupSpecs"])]:
        for container in group["template"]["spec"]["containers"]:
            yield name, group["rayStartParams"], container


def test_the_manifest_is_a_ray_job_with_authentication() -> None:
    manifest = job()
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    spec = manifest["spec"]
    assert spec["shutdownAfterJobFinishes"] and spec["backoffLimit"] >= 1
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"} and cluster["enableInTreeAutoscaling"]
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)  # that authOptions needs
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_every_container_says_what_it_needs_and_holds_no_secret() -> None:
    for name, _, container in containers():
        needs = container["resources"]
        assert needs["requests"] == needs["limits"] and {"cpu", "memory"} <= set(needs["limits"])
        assert ("nvidia.com/gpu" in needs["limits"]) == (name != "head")
        assert {m["mountPath"] for m in container["volumeMounts"]} == {"/shared"}
        for variable in container["env"]:
            assert "value" not in variable or not {"TOKEN", "KEY"} & set(variable["name"].split("_"))


def test_the_groups_of_the_manifest_hold_the_configuration() -> None:
    room: Counter[str] = Counter()
    replicas = {g["groupName"]: g["maxReplicas"] for g in job()["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    for name, params, container in containers():
        custom = json.loads(json.loads(params["resources"])) if "resources" in params else {}
        assert set(custom) <= set(GROUP_OF)
        limits = container["resources"]["limits"]
        has = {"CPU": int(params.get("num-cpus", limits["cpu"])), "GPU": int(limits.get("nvidia.com/gpu", 0)), **custom}
        for resource, amount in has.items():
            room[resource] += amount * replicas.get(name, 1)
    assert not {name for name, amount in asked().items() if amount > 1000 * room[name]}


def test_the_image_gets_what_git_has() -> None:
    lines = (ROOT / ".gitignore").read_text().splitlines()
    ignored = [line.rstrip("/") for line in lines if not line.startswith("#")]
    anchored = [line.removeprefix("/") if line.startswith("/") else f"**/{line}" for line in ignored]
    assert (ROOT / ".dockerignore").read_text().split() == [".git", *anchored]


def test_the_entrypoint_is_a_command_of_ours() -> None:
    python, script, *arguments = shlex.split(job()["spec"]["entrypoint"])
    root = "/home/ray/epd_ray/"
    assert python == "python" and (ROOT / script.removeprefix(root)).is_file()
    train = get_command(app).commands["train"]  # type: ignore[attr-defined]
    parsed = train.make_context("train", arguments, parent=Context(train)).params
    assert parsed["retry"] and str(parsed["out"]).startswith("/shared/")
    assert (ROOT / str(parsed["config"]).removeprefix(root)) == CONFIG


# -- a cluster of these nodes -----------------------------------------------------------------------------------------


@pytest.fixture
def nodes(no_ray: None) -> Iterator[dict[str, str]]:
    """Node id -> type, of a cluster with one node of each type and two that draw; GPUs in name only."""
    types = recipe()["available_node_types"]

    def has(name: str) -> dict[str, Any]:
        own = dict(types[name]["resources"])
        return {"num_cpus": own.pop("CPU"), "num_gpus": own.pop("GPU", 0), "resources": own}

    (port,) = free_ports(1)
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}  # it lists actors
    cluster = Cluster(initialize_head=True, head_node_args={**has("head"), **dashboard})
    try:
        found = {cluster.head_node.node_id: "head"}
        for name in ("rollout_gpu", "rollout_gpu", "reward_gpu"):
            found[cluster.add_node(**has(name)).node_id] = name
        cluster.wait_for_nodes()
        with ray_session(cluster.address):
            yield found
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_actors_land_on_the_nodes_made_for_them(nodes: dict[str, str]) -> None:
    """The recipe's node types and its configuration's own requests; the models alone are simulated."""
    given = config()
    few = {"rollout_actors": 2, "max_rollout_actors": None, "encoder_actors": 0, "placement_timeout_s": 60.0}
    simulated = {name: head.model_copy(update={"head": "simulated"}) for name, head in given.rewards.items()}
    small = given.model_copy(
        update={
            "backbone": given.backbone.model_copy(update={"family": "simulated", "model": "any"}),
            "cluster": given.cluster.model_copy(update=few),
            "rewards": simulated,
        }
    )
    algo = rdpo_config(small, [f"prompt {i}" for i in range(8)]).build_algo()
    try:
        here = ray.get_runtime_context().gcs_address  # other clusters may run on the machine
        alive = [("state", "=", "ALIVE")]
        placed = list_actors(here, filters=alive, detail=True, timeout=60)
        where = [(actor.class_name, nodes[actor.node_id]) for actor in placed]
        assert Counter(t for c, t in where if c == "RewardActor") == {"reward_gpu": len(given.rewards)}
        assert Counter(t for c, t in where if c not in ("RewardActor",) and "Runner" in c) == {"rollout_gpu": 2}
    finally:
        algo.stop()
