"""The backends' operations; imports nothing else of the library."""
