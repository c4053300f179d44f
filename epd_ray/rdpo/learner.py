"""The update of the policy: one step on the clipped PPO loss per minibatch, in the TorchLearner of RLlib."""

from collections.abc import Mapping
from typing import Any

import torch
from ray.rllib.core import Columns
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO
from torch import Tensor

from epd_ray.drawing.worker import log_prob
from epd_ray.policy.dirichlet import TableDistribution
from epd_ray.policy.loss import clipped_surrogate
from epd_ray.policy.network import PolicyNetwork

ADVANTAGES = "advantages"
RATIO_TOLERANCE = 1e-3  # log-probabilities are sent in float32, and devices differ in the last bits


class RDPOLearner(TorchLearner):  # type: ignore[misc]
    """Minimises the clipped PPO loss + kl_coeff * KL(policy || policy at the start) - entropy_coeff * entropy."""

    def __repr__(self) -> str:  # Ray's dashboard and logs show this
        return "learner"

    def build(self) -> None:
        torch.set_num_threads(1)  # in the driver as in an actor, because the last bits depend on the number of threads
        super().build()

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        module = self.module[module_id]
        parameters = self.get_parameters(module)
        self.register_optimizer(
            module_id=module_id,
            optimizer=torch.optim.AdamW(parameters, weight_decay=config.weight_decay),
            params=parameters,
            lr_or_lr_schedule=config.lr,
        )

    def set_state(self, state: dict[str, Any]) -> None:
        # RLlib keeps its present weights where they had as many updates or more; 0 means that it takes the state's.
        super().set_state({**state, WEIGHTS_SEQ_NO: 0})
        for optimizer in self._named_optimizers.values():
            for group in optimizer.param_groups:
                group["weight_decay"] = self.config.weight_decay

    def before_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        super().before_gradient_based_update(timesteps=timesteps)
        [(optimizer, schedule)] = self._optimizer_lr_schedules.items()
        self._lr = schedule.update(
            timesteps["images"]
        )  # set anew, because population-based training loads checkpoints of other trials
        self._set_optimizer_lr(optimizer, lr=self._lr)
        self._on_policy = timesteps["staleness"] == 0
        self._first_minibatch = True

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: Mapping[str, Tensor]
    ) -> Tensor:
        network: PolicyNetwork = self.module[module_id].unwrapped().policy
        space = network.spec.space
        policy = TableDistribution(space, fwd_out[Columns.ACTION_DIST_INPUTS])
        surrogate = clipped_surrogate(
            log_prob(policy, batch[Columns.ACTIONS]),
            batch[Columns.ACTION_LOGP].double(),
            batch[ADVANTAGES].double(),
            config.clip,
        )
        if self._first_minibatch:
            self._check_ratio(surrogate.ratio)
            self._log(module_id, {"behaviour_kl": surrogate.approx_kl})
        current = TableDistribution(space, policy.parameters[0])
        kl_to_base = current.kl_per_interval(TableDistribution(space, network.base)).sum()
        entropy = current.entropy_per_interval().sum()
        self._log(
            module_id,
            {
                "policy_loss": surrogate.loss.detach(),
                "approx_kl": surrogate.approx_kl,
                "clipfrac": surrogate.clipfrac,
                "kl_to_base": kl_to_base.detach(),
                "entropy": entropy.detach(),
                "learning_rate": self._lr,
            },
        )
        loss: Tensor = surrogate.loss + config.kl_coeff * kl_to_base - config.entropy_coeff * entropy
        return loss

    def _check_ratio(self, ratio: Tensor) -> None:
        """Check that the learner and the rollout actors hold the same policy before the first step on new rollouts."""
        self._first_minibatch = False
        worst = float((ratio - 1).abs().max())
        if self._on_policy and worst > RATIO_TOLERANCE:
            raise RuntimeError(
                f"the first probability ratio differs from 1 by {worst:.2g}, at most {RATIO_TOLERANCE:g} is expected"
            )

    def _log(self, module_id: str, values: Mapping[str, Tensor | float]) -> None:
        self.metrics.log_dict({k: float(v) for k, v in values.items()}, key=module_id, window=1)
