"""The packages of a wheel: the rooms, and two folders of the sources that it carries (pyproject.toml says which)."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["megatron_omega*"]),
        "megatron_omega.examples",
        "megatron_omega.ds_configs",
    ]
)
