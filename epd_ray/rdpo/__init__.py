"""What RLlib needs of RDPO: the algorithm and its configuration, the learner and its module, the rollout actors."""

from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.config import RDPOConfig

RDPOConfig.builds = RDPO

__all__ = ["RDPO", "RDPOConfig"]
