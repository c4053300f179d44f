"""Frozen diffusion models behind one protocol; each entry loads when first asked for."""

from typing import TYPE_CHECKING

from epd_ray.registry import Registry

if TYPE_CHECKING:
    from epd_ray.types import Backbone

BACKBONES: "Registry[Backbone]" = Registry(
    "backbone",
    {
        "gaussian": "epd_ray.backbones.gaussian:GaussianBackbone",
        "sd3": "epd_ray.backbones.sd3:SD3Backbone",
        "simulated": "epd_ray.backbones.simulated:SimulatedBackbone",
    },
)
