"""Training with several processes.

`cluster` connects the processes, `channel` sends messages between them, `agreement` checks that they run the same
program and config, and `watchdog` ends them together. In this package, a process is called a host, even if several
processes share a machine.
"""
