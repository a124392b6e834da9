"""Functions travel to worker processes as (module, file, qualified name): the worker imports the module itself."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class FunctionReference:
    """Where a module-level function is found again in another process."""

    module: str
    file: str
    qualname: str

    @classmethod
    def of(cls, fn: Callable[..., Any]) -> "FunctionReference":
        """Refer to ``fn``.

        Raises:
            ValueError: when ``fn`` is a lambda, a closure, or a bound object that no other process can look up.
        """
        module = sys.modules.get(getattr(fn, "__module__", ""))
        file, qualname = getattr(module, "__file__", None), getattr(fn, "__qualname__", "<unnamed>")
        if module is None or file is None or "<" in qualname:
            raise ValueError(
                f"fn={fn!r} cannot be sent to worker processes: only functions at the top level of a file can; "
                "move it there and pass what it captured as arguments"
            )
        return cls(module.__name__, str(Path(file).resolve()), qualname)

    def resolve(self) -> Callable[..., Any]:
        """Import the module where needed and return the function."""
        found: Any = _import(self.module, self.file)
        for name in self.qualname.split("."):
            found = getattr(found, name)
        return found


def _import(name: str, file: str) -> ModuleType:
    if name == "__main__":
        return _load_file(f"moe_ep_shipped_{Path(file).stem}", file)
    if name in sys.modules:
        return sys.modules[name]
    # Under pytest the root of a test package is on the parent's path only after the pool was started.
    root = str(Path(file).parents[name.count(".") + (Path(file).name == "__init__.py")])
    if root not in sys.path:
        sys.path.insert(0, root)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        return _load_file(name, file)


def _load_file(name: str, file: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
