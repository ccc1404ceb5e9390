"""Files: reading and writing audio, token files and plots, and transcoding between audio and codes."""
