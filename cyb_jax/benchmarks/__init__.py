"""What `cyb-benchmark` measures: one file a benchmark, each with its flags and one function that returns the object."""
