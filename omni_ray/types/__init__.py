"""Nouns that cross rooms: frozen dataclasses, protocols and errors."""
