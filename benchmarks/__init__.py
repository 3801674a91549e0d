"""Side-by-side benchmarks: ratios of times measured in one run, never timed assertions. Run `python -m benchmarks --help`."""
