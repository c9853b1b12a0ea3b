"""Checkpoints, and the work directory of a run that holds them.

`manager` saves, finds and restores checkpoints. It writes through `disk` or `bucket`, which implement
`backend.Backend`; `serialization` is the one module that imports orbax; `integrity` finds damage by checksums, and
`selection` chooses among whole checkpoints. `workdir` is the folder around them.
"""
