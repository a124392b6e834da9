"""Builds the extension modules; everything else about the package stands in pyproject.toml."""

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# setup.py runs by itself too, and then the folder of the build tools is not on the path.
sys.path.insert(0, str(ROOT))

for link in ("layers", "integrations"):
    if not (ROOT / "moe_ep" / link).is_dir():
        sys.exit(
            f"moe_ep/{link} must be a folder or a link to ../{link}, but was lost in copying: clone with links on."
        )

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

from build_tools.compiler import CompileError  # noqa: E402
from build_tools.extensions import build, make_plan  # noqa: E402


class BuildExtensions(build_ext):
    """Builds all modules together, so that their sources share one pool, and copies them to setuptools' places."""

    def run(self) -> None:
        """Builds what this machine allows, drops what an earlier build left, and says in one line what there is."""
        try:
            self._plan = make_plan(os.environ)
        except ValueError as error:
            sys.exit(f"moe_ep: {error}")
        left_out = [] if self._plan.nvshmem else ["moe_ep._C_internode"]
        self.extensions = [extension for extension in self.extensions if extension.name not in left_out]
        super().run()
        for name in left_out:
            Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)
            Path(self.build_lib, self.get_ext_filename(name)).unlink(missing_ok=True)
        sys.stderr.write(self._plan.summary() + "\n")

    def build_extensions(self) -> None:
        """Compiles and links what changed and copies it to where setuptools looks for it."""
        try:
            built = build(self._plan, os.environ)
        except CompileError as error:
            sys.exit(f"moe_ep: a compiler failed\n{error}")
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built[extension.name], target)


setup(
    ext_modules=[Extension("moe_ep._C", sources=[]), Extension("moe_ep._C_internode", sources=[])],
    cmdclass={"build_ext": BuildExtensions},
)
