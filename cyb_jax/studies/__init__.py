"""Named settings of the experiments, and plain models that cost as much as another method."""
