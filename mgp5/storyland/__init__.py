"""Storyland: a procedurally drawn picture-book world with known attributes."""
