"""Schedules: which rank sends which segment when, and what that costs; standard library only.

Imports: errors.
"""

from __future__ import annotations

__all__: list[str] = []
