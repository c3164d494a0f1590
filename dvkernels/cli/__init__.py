"""One file a verb of ``python -m dvkernels``."""
