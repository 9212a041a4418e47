"""Packs train.py, eval.py and configs/, which stand beside the package, into it as megabyte_jax.scripts."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

BESIDE = {
  "megabyte_jax.scripts": ".",
  "megabyte_jax.scripts.configs": "configs",
  "megabyte_jax.scripts.configs.paper": "configs/paper",
}


class BuildPy(build_py):
  """Leaves this file out."""

  def find_package_modules(self, package, package_dir):
    """Lists (package, module, file) of a package."""
    return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


setup(packages=[*find_packages(include=["megabyte_jax*"]), *BESIDE], package_dir=BESIDE, cmdclass={"build_py": BuildPy})
