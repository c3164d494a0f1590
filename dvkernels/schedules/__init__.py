"""Schedules of collectives as data, and their cost models; standard library only.

Imports: errors.
"""

from __future__ import annotations

__all__: list[str] = []
