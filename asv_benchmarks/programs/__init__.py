"""Whole programs beside what else one would write: ``cd asv_benchmarks && python -m programs``."""
