"""Packages by pattern, and the configs, which travel in the wheel as `shards/configs`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["preprocess*", "shards*", "train*"]), "shards.configs"],
    package_dir={"": ".", "shards.configs": "configs"},
    package_data={"shards": ["web/*"], "shards.configs": ["**/*"]},
)
