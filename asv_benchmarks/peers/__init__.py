"""Benchmarks of dvkernels beside other libraries: ``cd asv_benchmarks && python -m peers VERB``."""
