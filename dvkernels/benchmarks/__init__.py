"""What is measured and how: shared by ``python -m dvkernels bench`` and the asv suite."""
