"""Rows through the layers in one compiled function, where a C compiler is at hand; see decision 0033."""
