"""Optimal Sampling: text for distillation, each token drawn from the geometric mixture of a teacher and a student."""

from __future__ import annotations

__version__ = "0.1.0"
