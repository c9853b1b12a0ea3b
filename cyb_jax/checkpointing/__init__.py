"""Checkpoints, and the work directory of a run.

`manager` saves, finds and restores checkpoints. It writes through `disk` or `bucket`, which implement
`backend.Backend`; `serialization` is the only module that imports orbax; `integrity` detects damage by checksums, and
`selection` chooses among undamaged checkpoints. `workdir` manages the folder of a run.
"""
