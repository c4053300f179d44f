"""The window of SD3's skip-layer guidance, which its pipeline measures in calls of the network.

While call i of the network is within it (steps * start < i < steps * stop), the pipeline calls the network once more,
with some layers left out, and moves its output away from the answer. `steps` is the pipeline's num_inference_steps,
which is no count of these calls. The share of a solver's calls made so far, one for each point, is what is meant.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epd_ray.errors import TableError
from epd_ray.solvers.stepwise import Call, Plan


@dataclass(frozen=True)
class LayerWindow:
    """Which points of a solver are guided by left-out layers.

    Attributes:
        start: the share of all calls after which the window begins.
        stop: the share of all calls at which it ends.
        steps: the number of calls that the pipeline takes for all.
        places: how many calls came before each interval's start (None) and each point, where each has a call.
    """

    start: float
    stop: float
    steps: int
    places: Mapping[tuple[int, int | None], int]

    @classmethod
    def asked(cls, asking: Mapping[str, Any], plan: Plan) -> "LayerWindow | None":
        """The window of the pipeline's call that is under way, or None without one.

        Args:
            asking: the variables of the pipeline's call.
            plan: the calls that the pipeline will make.

        Raises:
            TableError: the pipeline would act on other points than those within the window.
        """
        if asking.get("skip_guidance_layers") is None or not asking["self"].do_classifier_free_guidance:
            return None
        single = Plan(plan.solver, plan.network, parallel=False).calls
        places = {(i, None if part is None else part.start): place for place, (i, part) in enumerate(single)}
        start, stop, steps = (
            asking[name]
            for name in ("skip_layer_guidance_start", "skip_layer_guidance_stop", "num_inference_steps")
        )  # fmt: skip
        window = cls(start, stop, steps, places)
        for i, call in enumerate(plan.calls):
            taken, wanted = window._has(i, steps), window.wanted(call)
            if not taken and any(wanted):
                if not plan.parallel:
                    raise window._refusal()
                raise TableError(
                    f"skip_layer_guidance_start is {start}: the network's call {i + 1} evaluates points within the "
                    f"window, but the pipeline, which counts calls, begins later (leave out parallelize, or begin "
                    "earlier)"
                )
            if taken and not all(wanted) and not plan.parallel:
                raise window._refusal()
        return window

    def wanted(self, call: Call) -> list[bool]:
        """For each point of a call, whether it is within the window."""
        interval, part = call
        points = [None] if part is None else range(part.start, part.stop)
        return [self._has(self.places[interval, point], len(self.places)) for point in points]

    def _has(self, place: int, calls: int) -> bool:
        return calls * self.start < place < calls * self.stop  # as the pipeline reckons, to the last bit

    def _refusal(self) -> TableError:
        count = len(self.places)
        return TableError(
            f"skip_guidance_layers acts in a window of num_inference_steps={self.steps} calls of the network, but this "
            f"solver makes {count} (pass num_inference_steps={count})"
        )
