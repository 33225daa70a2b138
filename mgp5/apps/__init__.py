"""Applications: what people run with a model, each called with a typed request by a command or from Python."""
