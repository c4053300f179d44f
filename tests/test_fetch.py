"""Weights on two nodes of a cluster that is joined, and what the actors there see of the environment."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import ray
from diffusers import DiffusionPipeline
from ray.cluster_utils import Cluster

from epd_ray.actors.cluster import ray_session
from epd_ray.actors.environments import runtime_env
from epd_ray.backbones import index as indices
from epd_ray.backbones.loading import UNUSED
from epd_ray.config.loading import load_config
from epd_ray.errors import HubError, ModelError
from epd_ray.runs import fetch as module
from epd_ray.runs.fetch import NOT_OPENED, FetchError, fetch, fetch_model
from epd_ray.runs.train import train
from tests.conftest import TINY
from tests.fakes import Quiet
from tests.test_actors import PLANTED, assert_absent
from tests.tiny_models import save_clip, save_sd


@pytest.fixture(scope="module")
def cluster(no_ray: None) -> Iterator[Cluster]:
    """Two nodes on this machine, joined by address with a token in the environment."""
    before = os.environ.get("HF_TOKEN")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    os.environ["HF_TOKEN"] = PLANTED
    with ray_session(nodes.address, ["HF_TOKEN", "NOT_SET_AT_ALL"]):
        os.environ.pop("HF_TOKEN") if before is None else os.environ.update(HF_TOKEN=before)
        yield nodes
    nodes.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_sd(folder / "sd")
    save_clip(folder / "clip")
    return folder


def wanted(model: Path, *overrides: str):  # type: ignore[no-untyped-def]
    return load_config(None, [f"backbone.model={model}", "prompts.train=shapes", *overrides])


@pytest.mark.slow
def test_every_node_gets_everything_once(cluster: Cluster, models: Path) -> None:
    heads = (
        f"rewards={{mine: {{head: clip, options: {{model: {models / 'clip'}, device: cpu}}}}, s: {{head: simulated}}}}"
    )
    lines = fetch(wanted(models / "sd", heads), Quiet())
    assert len(lines) == 2 and len({line.split(":")[0] for line in lines}) == 2
    for line in lines:
        assert line.startswith("node 127.0.0.1 (") and f"model {models / 'sd'} in " in line
        assert "reward mine in " in line and "reward s in " in line
    assert "model" not in fetch(load_config(None, TINY), Quiet())[0]  # nothing to fetch for a simulated backbone


@pytest.mark.slow
def test_all_that_is_missing_is_named_with_its_node(cluster: Cluster, models: Path, tmp_path: Path) -> None:
    heads = "rewards={a: {head: clip, options: {model: /nowhere/clip}}, s: {head: simulated}}"
    with pytest.raises(FetchError) as raised:
        fetch(wanted(models / "gone", heads), Quiet())
    lines = str(raised.value).splitlines()
    assert len(lines) == 4 and all(line.startswith("node 127.0.0.1 (") for line in lines)
    assert sum(f"model '{models / 'gone'}' is no directory" in line for line in lines) == 2
    assert sum("reward a: model '/nowhere/clip' is no directory" in line for line in lines) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no model_index\.json"):
        fetch_model(str(tmp_path / "empty"), None)


def test_a_node_that_cannot_reach_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, asked = [{"NodeID": f"{i}" * 8, "NodeManagerAddress": f"10.0.0.{i}", "Alive": True} for i in (1, 2)], []

    def on_all(
        item: module.Item, there: Sequence[module.Node]
    ) -> Iterator[tuple[module.Node, float, Exception | None]]:
        for node in there:
            asked.append((item.what, node.address))
            yield node, 1.0, HubError("no hub") if node.address == "10.0.0.1" else None

    monkeypatch.setattr(module, "_items", lambda config: [module.Item(name, fetch_model, ()) for name in "abc"])
    monkeypatch.setattr(module, "_on_all", on_all)
    monkeypatch.setattr(module, "run_session", lambda config: nullcontext())
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    with pytest.raises(FetchError) as raised:
        fetch(load_config(None), Quiet())
    first = "node 10.0.0.1 (11111111)"
    assert str(raised.value).splitlines() == [f"{first}: a: no hub", f"{first}: not tried without the hub: b, c"]
    assert asked == [("a", "10.0.0.1"), ("a", "10.0.0.2"), ("b", "10.0.0.2"), ("c", "10.0.0.2")]


@pytest.mark.slow
def test_an_environment_that_is_not_on_a_node_is_named(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = module.RewardSpec(head="simulated", python="/nowhere/bin/python")
    items = [module.Item("reward p", module.fetch_head, ("p", spec))]
    monkeypatch.setattr(module, "_items", lambda config: items)
    with pytest.raises(FetchError, match=r"reward p: /nowhere/bin/python.*rewards install"):
        fetch(load_config(None), Quiet())


@pytest.mark.nightly
def test_a_package_head_is_opened_on_its_interpreter(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = module.RewardSpec(head="hpsv2.1", target="tests.fakes:NanHead", python=sys.executable)
    monkeypatch.setattr(module, "_items", lambda config: [module.Item("reward p", module.fetch_head, ("p", spec))])
    lines = fetch(load_config(None), Quiet())
    assert len(lines) == 2 and all("reward p in " in line for line in lines)


@pytest.mark.nightly
def test_a_head_whose_process_dies_is_named(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = module.RewardSpec(head="tests.frail:Dying", options={"when": "build"})
    monkeypatch.setattr(module, "_items", lambda config: [module.Item("reward p", module.fetch_head, ("p", spec))])
    with pytest.raises(FetchError, match=r"reward p: .*'p'.*loading"):
        fetch(load_config(None), Quiet())


def test_an_unsupported_pipeline_is_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        indices, "read_index", lambda *_: indices.Index("owner/name", "WanImageToVideoPipeline", {}, "abc")
    )
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_, **__: pytest.fail("it was downloaded"))
    with pytest.raises(ModelError, match=r"'owner/name'.*WanImageToVideoPipeline.*StableDiffusion"):
        fetch_model("owner/name", None)


def test_a_repository_is_downloaded_without_what_is_never_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    index = indices.Index("owner/name", "StableDiffusionPipeline", {}, "abc")
    monkeypatch.setattr(indices, "read_index", lambda *_: index)
    monkeypatch.setattr(DiffusionPipeline, "download", lambda model, **options: asked.append((model, options)))
    fetch_model("owner/name", "v1")
    assert asked == [("owner/name", {"revision": "v1", **dict.fromkeys(NOT_OPENED)})]
    assert set(NOT_OPENED) == set(UNUSED)

    def refuse(model: str, **options: object) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(DiffusionPipeline, "download", refuse)
    with pytest.raises(ModelError, match=r"'owner/name'.*no route to the hub"):
        fetch_model("owner/name", None)


@pytest.mark.slow
def test_actors_see_the_variables_and_no_run_keeps_their_values(cluster: Cluster, tmp_path: Path) -> None:
    @ray.remote(num_cpus=0)
    class Witness:
        def see(self, name: str) -> str | None:
            return os.environ.get(name)

    witness = Witness.remote()
    assert ray.get(witness.see.remote("HF_TOKEN")) == PLANTED
    assert ray.get(witness.see.remote("NOT_SET_AT_ALL")) is None
    elsewhere = Witness.options(runtime_env=runtime_env(sys.executable)).remote()  # as a head's own environment has it
    assert ray.get(elsewhere.see.remote("HF_TOKEN")) == PLANTED
    os.environ["HF_TOKEN"] = PLANTED
    try:
        train(load_config(None, [*TINY, "rdpo.iterations=1"]), tmp_path / "run", Quiet())
    finally:
        del os.environ["HF_TOKEN"]
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 10 and any("HF_TOKEN" in path.read_text() for path in written if path.name == "config.yaml")
    assert_absent(tmp_path / "run")
    assert_absent(Path(cluster.head_node.get_session_dir_path()))
