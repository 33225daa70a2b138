"""Views: consumers of generation events."""
