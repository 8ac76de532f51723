"""Builds the C++ and CUDA libraries during installation; everything else about the package is in pyproject.toml.

`pip install -e .` puts the libraries into the source tree, and a folder on the path that links to the package;
`pip install .` and a wheel include the libraries with their sources, so that `python -m fastlora.native` can compile
them later too. Without a compiler the installation continues: one line says so, which pip shows with -v, and the first
call that would use the library warns. Without nvcc it continues silently, as on any machine without a GPU;
`fastlora doctor` reports it.
"""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent


def _load_recipe() -> ModuleType:
    """fastlora/native/build.py without importing the package, which needs torch."""
    spec = importlib.util.spec_from_file_location("fastlora_build", ROOT / "fastlora" / "native" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = _load_recipe()


class build_native(Command):  # noqa: N801
    """Compiles the libraries; a step of `build`, in setuptools' SubCommand protocol."""

    description = "compile the C++ and CUDA libraries"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        libraries = self._package() / "lib"
        if not self.editable_mode:
            self._copy_sources()
            for name in (recipe.LIBRARY, recipe.CUDA_LIBRARY):
                (libraries / name).unlink(missing_ok=True)  # build_py copied the source tree's, which may be outdated
        try:
            recipe.compile_library(libraries / recipe.LIBRARY)
        except recipe.BuildError as error:
            print(f"fastlora: installed without its CPU library: {error}", file=sys.stderr)
            return  # the CUDA library needs the same compiler
        try:
            recipe.find_nvcc()
        except recipe.BuildError:
            return
        try:
            recipe.compile_cuda_library(libraries / recipe.CUDA_LIBRARY)
        except recipe.BuildError as error:
            print(f"fastlora: installed without its CUDA library: {error}", file=sys.stderr)

    def _package(self) -> Path:
        assert self.build_lib is not None
        return (ROOT if self.editable_mode else Path(self.build_lib)) / "fastlora"

    def _copy_sources(self) -> None:
        for source, copy in self._copies().items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)

    def _copies(self) -> dict[Path, Path]:
        folder = recipe.source_dir()
        return {path: self._package() / "csrc" / path.relative_to(folder) for path in recipe.source_files()}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in recipe.source_files()]

    def get_outputs(self) -> list[str]:
        if self.editable_mode:
            return []
        libraries = (self._package() / "lib" / name for name in (recipe.LIBRARY, recipe.CUDA_LIBRARY))
        return [*map(str, self._copies().values()), *map(str, libraries)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class linked_editable_wheel(editable_wheel):  # noqa: N801
    """An editable installation by a folder on the path that holds links, and nothing else of the repository.

    setuptools would install a finder, which Python asks after the whole path. In a folder that holds a clone named
    fastlora, that clone would be the package: a namespace package, and empty. A real one on the path goes before it.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        folder = ROOT / ".editable"
        try:
            folder.mkdir(exist_ok=True)
            for name in ("fastlora", "fastlora_kernels.py"):
                (folder / name).unlink(missing_ok=True)
                (folder / name).symlink_to(Path("..", name))
        except OSError as error:
            print(
                f"fastlora: installed by setuptools' finder, because {folder} takes no links: {error}", file=sys.stderr
            )
            return
        self.package_dir = {"": folder.name}


class PlatformDistribution(Distribution):
    """A package that contains machine code, but no extension module that setuptools would know about."""

    def has_ext_modules(self) -> bool:
        return True


class platform_wheel(bdist_wheel):  # noqa: N801
    """A wheel for this platform and any Python 3: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


build.sub_commands.append(("build_native", None))
setup(
    distclass=PlatformDistribution,
    cmdclass={
        "build_native": build_native,
        "bdist_wheel": platform_wheel,
        "editable_wheel": linked_editable_wheel,
    },
)
