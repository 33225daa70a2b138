"""How much memory a run takes, estimated before weights are loaded, and where the parts of a model wait."""
