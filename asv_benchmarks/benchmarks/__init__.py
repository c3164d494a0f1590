"""asv benchmarks of dvkernels, one module per subject.

``cd asv_benchmarks && asv run --python=same --quick``. Parameters are the same on every machine;
where a machine lacks a device or package, ``setup`` raises NotImplementedError, which asv shows as
n/a. Code is compiled in ``setup``, and every result is checked there, on random data.
"""
