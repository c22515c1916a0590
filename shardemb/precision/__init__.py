"""From float32 to the bytes of a row and back; see ``codecs.py`` for the formulas."""
