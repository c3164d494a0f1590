"""Benchmarks of dvkernels, one file a subject.

``cd asv_benchmarks && asv run --python=same --quick``. Parameters are the same on every machine;
what a machine lacks raises NotImplementedError in ``setup``, which asv shows as n/a. Code is
compiled in ``setup``, and every result is checked there, on random data.
"""
