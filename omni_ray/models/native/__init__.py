"""Compiled forms of hot loops, where a C compiler is at hand; see decision 0033."""
