"""Files: audio, tokens, pictures, and encoding from one to another."""
