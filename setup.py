"""Lays the folders of the repository out as one package, `semore_bench`, when a wheel is built.

In the repository `wrappers/`, `semore_bench/` and `agents/` stand side by side. In site-packages such names would be in
the way of others, so the first and the last go into the second, and what imports `wrappers` imports
`semore_bench.wrappers` there. An editable installation is left as it is.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

WRAPPERS = re.compile(r"(?<![\w./-])wrappers(?=\.[A-Za-z_]| import\b)")


class OnePackage(build_py):
    """Builds `semore_bench` with the wrappers and the agents inside."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        shutil.rmtree(self.build_lib, ignore_errors=True)  # modules that are gone would come along
        super().run()
        package = Path(self.build_lib) / "semore_bench"
        (Path(self.build_lib) / "wrappers").rename(package / "wrappers")
        (package / "agents").mkdir()
        for file in sorted(Path("agents").glob("*.py")):
            shutil.copyfile(file, package / "agents" / file.name)
        for file in package.rglob("*.py"):
            text = file.read_text("utf-8")
            file.write_text(WRAPPERS.sub("semore_bench.wrappers", text), "utf-8")


class OneName(egg_info):
    """Names the one package that a wheel puts into site-packages."""

    def run(self) -> None:
        super().run()
        (Path(self.egg_info) / "top_level.txt").write_text("semore_bench\n")


setup(cmdclass={"build_py": OnePackage, "egg_info": OneName})
