"""Names that a package offers without importing the modules that define them until somebody asks for one."""

import importlib
from collections.abc import Callable, Mapping


def lazy_names(package: str, targets: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose modules import heavy libraries, such as torch.

    Args:
        package: `__name__` of the package.
        targets: each offered name with the module that defines it. A name must not equal that of a submodule of the
            package: Python binds an imported submodule to its name, and `__getattr__` would not be asked.

    Returns:
        The two functions, to be assigned at the top level of the package.
    """

    def get(name: str) -> object:
        if name not in targets:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(targets[name]), name)

    def names() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *targets})

    return get, names
