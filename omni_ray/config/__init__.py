"""Checked settings; importable without torch."""
