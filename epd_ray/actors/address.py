"""Checks whether a Ray cluster can be joined, because ray.init itself would wait for minutes or abort the process."""

import os
from platform import python_version

import grpc  # type: ignore[import-untyped]
import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import (  # type: ignore[attr-defined]
    AuthenticationMode,
    AuthenticationTokenLoader,
    GcsClient,
    get_authentication_mode,
)
from ray.exceptions import AuthenticationError, RpcError

from epd_ray.actors.beforehand import named_cluster
from epd_ray.errors import ClusterError
from epd_ray.storage.documents import parse_json

CONNECT_SECONDS = 15.0
AUTO = "auto"
DASHBOARD = ("http://", "https://")
TOKEN_HELP = (
    "export RAY_AUTH_MODE=token and put the cluster's token into ~/.ray/auth_token, or into the file that "
    "RAY_AUTH_TOKEN_PATH names (`ray get-auth-token --generate` makes one where the cluster is started)"
)
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0"  # without it Ray takes 127.0.0.1 for the address in the network
START_HELP = "ray get-auth-token --generate; RAY_AUTH_MODE=token ray start --head --node-ip-address=ADDRESS"
"""Starts a head that asks for a token. Without one, everybody who reaches its ports can run code on every node."""


def reachable(address: str | None) -> str | None:
    """Check that a cluster answers, accepts the token of this machine, and runs the same versions of Ray and Python.

    Args:
        address: host:port or "auto"; None takes the address in the environment variable RAY_ADDRESS, if it is set.

    Returns:
        The host:port of the cluster; None where neither `address` nor RAY_ADDRESS names a cluster.

    Raises:
        ClusterError: the cluster cannot be joined; the message says why, and how to mend it.
    """
    asked, source = named_cluster(address)
    if asked is None:
        return None
    where = f"{asked} ({source})"
    if asked.startswith(DASHBOARD):
        raise ClusterError(
            f"{where} is the address of a dashboard: submit a job to it by `ray job submit --address {asked}`, "
            f"or {_instead(source)}"
        )
    if asked.startswith("ray://"):
        raise ClusterError(
            f"{where} is the address of a Ray Client server, which runs cannot use: submit a job to the "
            f"dashboard (ray job submit --address http://...:8265), or {_instead(source)}"
        )
    found = _resolved(asked, where, source)
    _require_listener(found, where, source)
    _require_token(asked, where)
    _require_same_versions(found, where)
    return found


def _instead(source: str) -> str:
    return "leave cluster.address out" if source == "cluster.address" else "unset RAY_ADDRESS"


def _resolved(asked: str, where: str, source: str) -> str:
    try:
        return str(canonicalize_bootstrap_address_or_die(asked))
    except ConnectionError:
        raise ClusterError(
            f"no Ray runs on this machine to join as {where}: start one ({START_HELP}), or {_instead(source)} to start "
            "Ray for this run alone"
        ) from None
    except ValueError:
        raise ClusterError(f"{where} is not an address: give host:port, such as 10.0.0.5:6379, or auto") from None


def _require_listener(address: str, where: str, source: str) -> None:
    with init_grpc_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)
        except grpc.FutureTimeoutError:
            tried = "" if address in where else f", tried {address} (for a Ray on loopback set {LOOPBACK})"
            raise ClusterError(
                f"no Ray answers at {where}{tried} within {CONNECT_SECONDS:.0f} s: start one there ({START_HELP}), "
                f"or {_instead(source)} to start Ray for this run alone"
            ) from None


def _require_token(asked: str, where: str) -> None:
    """Check that this machine has a token if the cluster wants one: without it Ray would abort this process."""
    try:
        if asked == AUTO:  # as ray.init does
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        enabled = get_authentication_mode() == AuthenticationMode.TOKEN
        there = not enabled or AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    except AuthenticationError:
        path = os.environ.get("RAY_AUTH_TOKEN_PATH")
        raise ClusterError(f"no token for {where} in {path} (RAY_AUTH_TOKEN_PATH): {TOKEN_HELP}") from None
    if not there:
        raise ClusterError(f"no token for {where}, though RAY_AUTH_MODE=token: {TOKEN_HELP}")


def _require_same_versions(address: str, where: str) -> None:
    try:
        stored = GcsClient(address=address).internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster", timeout=10)
    except RpcError:
        raise ClusterError(
            f"{where} answers, but is not a Ray head: give the port of `ray start --head --port`, 6379 by default"
        ) from None
    except AuthenticationError:
        sent = "got another one" if get_authentication_mode() == AuthenticationMode.TOKEN else "got none"
        raise ClusterError(f"{where} asks for its token and {sent}: {TOKEN_HELP}") from None
    theirs = parse_json(stored or b"{}", f"what {where} says of itself", ClusterError, "restart the Ray head")
    ours = {"ray_version": ray.__version__, "python_version": python_version()}
    for key, name in (("ray_version", "Ray"), ("python_version", "Python")):
        if theirs.get(key, ours[key]) != ours[key]:
            raise ClusterError(
                f"{where} runs {name} {theirs[key]}, this machine {ours[key]}: install the same version on both"
            )
