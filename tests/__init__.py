"""Tests. They run in the environment of the commands, so that it is set before torch is imported."""

from cdm.system.environment import prepare_environment

prepare_environment()
