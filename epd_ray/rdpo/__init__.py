"""RDPO on RLlib: the algorithm and its configuration, the learner, the policy module and the rollout actors."""

from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.config import RDPOConfig

RDPOConfig.builds = RDPO

__all__ = ["RDPO", "RDPOConfig"]
