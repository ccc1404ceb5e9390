"""Corpora: audio of any amount to tables of codes, in batches that change no code, and what is done with such tables."""
