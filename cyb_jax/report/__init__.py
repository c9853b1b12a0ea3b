"""Reports of one run, or of several runs side by side, as one HTML file and its pictures."""
