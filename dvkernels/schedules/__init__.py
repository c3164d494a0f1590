"""Who sends what when: pure integers, standard library only."""

from __future__ import annotations

__all__: list[str] = []
