"""The training loop of the embedded models' networks, which goes on from its last checkpoint.

A batch is a function of seed, step and process, and a stage ends after a number of steps: two trainings see the same
batches, and give the same network but for rounding.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

CHECKPOINT_SECONDS = 60.0
COOLDOWN = 0.3  # share of a stage's steps, at its end, in which the learning rate falls to 0


@dataclass
class Stage:
    """A network and how it is trained.

    Attributes:
        name: name of the stage, and of its checkpoint.
        module: the network.
        optimizers: the optimizers, each with the learning rate of its middle part.
        loss: the loss of a step; it draws its own batch from (seed, step, rank).
        ema_decay: decay of the moving average of the parameters after the first steps.
        warmup: number of steps in which the learning rate rises.
        ema: the moving average of the parameters, by name.
        step: number of steps so far.
        elapsed: seconds of training so far, earlier processes included.
        mean_loss: moving average of the loss, not a number before the first step.
    """

    name: str
    module: nn.Module
    optimizers: list[torch.optim.Optimizer]
    loss: Callable[[int], Tensor]
    ema_decay: float = 0.998
    warmup: int = 200
    ema: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    elapsed: float = 0.0
    mean_loss: float = math.nan


def run_stage(stage: Stage, out: Path, steps: int, rank: int, world_size: int) -> None:
    """Train until the stage has had its steps, earlier processes included, and save every minute and at the end."""
    parameters = dict(stage.module.named_parameters())
    stage.ema = {k: p.detach().clone() for k, p in parameters.items()}
    rates = [[g["lr"] for g in o.param_groups] for o in stage.optimizers]  # before a checkpoint brings scheduled ones
    restore(stage, out / f"{stage.name}.pt")
    bar = tqdm(total=steps, initial=stage.step, unit="step", desc=stage.name, disable=rank > 0, mininterval=5)
    last_save = time.monotonic()
    while stage.step < steps:
        start = time.monotonic()
        set_learning_rates(stage, rates, steps)
        loss = stage.loss(stage.step)
        learn(stage, loss, parameters, world_size)
        value = float(loss.detach())
        stage.mean_loss = value if math.isnan(stage.mean_loss) else 0.98 * stage.mean_loss + 0.02 * value
        stage.elapsed += time.monotonic() - start
        bar.update()
        bar.set_postfix(loss=f"{stage.mean_loss:.4f}", refresh=False)
        if rank == 0 and (time.monotonic() - last_save > CHECKPOINT_SECONDS or stage.step == steps):
            save(stage, out, world_size)
            last_save = time.monotonic()
    bar.close()


def restore(stage: Stage, path: Path) -> None:
    """Take over a stage's checkpoint, if there is one."""
    if not path.exists():
        return
    saved = torch.load(path, weights_only=True)
    stage.module.load_state_dict(saved["model"])
    stage.ema = saved["ema"]
    for optimizer, state in zip(stage.optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    stage.step, stage.elapsed = saved["step"], saved["seconds"]


def save(stage: Stage, out: Path, world_size: int) -> None:
    """Write a stage's checkpoint, and a summary of it as JSON."""
    path = out / f"{stage.name}.pt"
    state = {
        "model": stage.module.state_dict(),
        "ema": stage.ema,
        "optimizers": [o.state_dict() for o in stage.optimizers],
        "step": stage.step,
        "seconds": stage.elapsed,
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    summary = {"step": stage.step, "seconds": round(stage.elapsed), "loss": stage.mean_loss, "processes": world_size}
    (out / f"{stage.name}.json").write_text(json.dumps(summary))


def set_learning_rates(stage: Stage, rates: list[list[float]], steps: int) -> None:
    """Set the learning rates of a step: they rise over the first steps, and fall to 0 over the last ones."""
    share = min(1.0, (stage.step + 1) / stage.warmup, (1 - stage.step / steps) / COOLDOWN)
    for optimizer, own in zip(stage.optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = rate * share


def learn(stage: Stage, loss: Tensor, parameters: dict[str, nn.Parameter], world_size: int) -> None:
    """Take a gradient step, and move the average of the parameters."""
    for optimizer in stage.optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if world_size > 1:
        average_gradients(list(parameters.values()), world_size)
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    for optimizer in stage.optimizers:
        optimizer.step()
    stage.step += 1
    decay = min(stage.ema_decay, (1 + stage.step) / (10 + stage.step))
    torch._foreach_lerp_(list(stage.ema.values()), [p.detach() for p in parameters.values()], 1 - decay)


def average_gradients(parameters: list[nn.Parameter], world_size: int) -> None:
    """Average the gradients over the processes, in one all-reduce."""
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.flatten() for g in grads]) / world_size
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([g.numel() for g in grads]), strict=True):
        parameter.grad = part.view_as(parameter)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    return torch.autocast(device().type, dtype=torch.bfloat16)


def launch(make: Callable[[int, int], Stage], name: str, out: Path, steps: int, processes: int) -> None:
    """Train a stage in this process, or data-parallel in several.

    Args:
        make: makes the stage, given the rank of its process and the number of processes; it can be pickled.
        name: name of the stage.
        out: folder of the checkpoints.
        steps: how many steps to train, earlier processes included.
        processes: number of processes, with one torch thread each.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.rendezvous").unlink(missing_ok=True)
    if processes == 1:
        _work(0, make, name, out, steps, 1)
    else:
        spawn(_work, (make, name, out, steps, processes), nprocs=processes)


def _work(rank: int, make: Callable[[int, int], Stage], name: str, out: Path, steps: int, world_size: int) -> None:
    torch.set_num_threads(1)
    # On a CPU the gradient of flash attention takes a third of a step; plain matrix products are faster.
    torch.backends.cuda.enable_flash_sdp(torch.cuda.is_available())
    if world_size > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo", init_method=f"file://{out.resolve()}/{name}.rendezvous", rank=rank, world_size=world_size
        )
    run_stage(make(rank, world_size), out, steps, rank, world_size)
    if world_size > 1:
        dist.destroy_process_group()
