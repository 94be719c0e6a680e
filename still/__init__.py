"""STILL."""
