"""ODE solvers `solve(drift, x, sigmas, ...) -> x`, the learned solver table, and the file that a trained one lives in.

The solver step itself is `epd_ray.solvers.epd.epd`: a package cannot offer a name that is also one of its modules.
"""

from typing import TYPE_CHECKING

from epd_ray.registry import lazy_names

if TYPE_CHECKING:
    from epd_ray.solvers.baselines import dpm2, edm, euler, heun, ipndm
    from epd_ray.solvers.epd import Callback
    from epd_ray.solvers.fit import check_fit
    from epd_ray.solvers.solver import Solver
    from epd_ray.solvers.table import SolverTable, dpm2_table, heun_table
    from epd_ray.types import Form
else:  # torch takes more than a second to import, and listing the presets needs none of it
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            **dict.fromkeys(("dpm2", "edm", "euler", "heun", "ipndm"), "epd_ray.solvers.baselines"),
            **dict.fromkeys(("SolverTable", "dpm2_table", "heun_table"), "epd_ray.solvers.table"),
            "Callback": "epd_ray.solvers.epd",
            "Form": "epd_ray.types",
            "Solver": "epd_ray.solvers.solver",
            "check_fit": "epd_ray.solvers.fit",
        },
    )

__all__ = [
    "Callback",
    "Form",
    "Solver",
    "SolverTable",
    "check_fit",
    "dpm2",
    "dpm2_table",
    "edm",
    "euler",
    "heun",
    "heun_table",
    "ipndm",
]
