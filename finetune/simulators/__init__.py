"""Simulators, chosen by name. Only this package touches a physics engine, and it imports it late."""

from .base import Observation, Simulator, SimulatorError, check_frames
from .metaworld import MetaWorldSimulator

SIMULATORS: dict[str, type[MetaWorldSimulator]] = {"metaworld": MetaWorldSimulator}

__all__ = ["SIMULATORS", "Observation", "Simulator", "SimulatorError", "check_frames"]
