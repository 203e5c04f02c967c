"""Packages, and the folders of the sources that a wheel carries inside the package; the rest is in pyproject.toml."""

from setuptools import find_packages, setup

CARRIED = {"megatron_omega.examples": "examples", "megatron_omega.ds_configs": "ds_configs"}

setup(
    packages=[*find_packages(include=["megatron_omega*"]), *CARRIED],
    package_dir=CARRIED,
    package_data={name: ["**/*"] for name in CARRIED},
)
