"""A run, or several side by side, as one HTML file and its pictures."""
