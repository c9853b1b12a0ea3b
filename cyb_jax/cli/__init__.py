"""The `cyb-*` programs; each has a thin module."""
