"""Measures how fast this machine draws, writes and trains: suites of rows, each one way to do a work at one size."""
