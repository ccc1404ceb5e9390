"""What is computed: configurations, the codecs Mimi and JODIO, and their layers."""
