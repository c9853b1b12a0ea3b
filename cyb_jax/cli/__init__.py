"""The `cyb-*` programs, one thin module each."""
