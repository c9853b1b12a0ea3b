"""Trackers: programs and services that show the metrics of runs. See docs/guides/training.md."""

from cyb_jax.training.trackers.interface import TrackedRun, Tracker
from cyb_jax.training.trackers.registry import TRACKERS, check_installed, check_trackers
from cyb_jax.training.trackers.tracking import Trackers, log_report

__all__ = ["TRACKERS", "TrackedRun", "Tracker", "Trackers", "check_installed", "check_trackers", "log_report"]
