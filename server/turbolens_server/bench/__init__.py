"""Side-by-side measurements: `turbolens bench`, and what the scripts in `benchmarks/` share."""
