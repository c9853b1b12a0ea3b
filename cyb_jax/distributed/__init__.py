"""Several processes that train as one.

`cluster` joins them, `channel` carries messages between them, `agreement` checks that they run the same, and `watchdog`
ends them together. A process is called a host here, whether or not it has a machine to itself.
"""
