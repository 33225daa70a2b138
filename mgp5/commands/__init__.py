"""The commands of mgp5, one file for those that belong together. Heavy imports stay inside the functions."""
