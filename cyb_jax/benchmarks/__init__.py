"""What `cyb-benchmark` measures, one file each."""
