"""Named settings of the experiments, plain models of the same cost as another method, and comparisons of settings."""
