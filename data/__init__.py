"""Data: a named set or a folder of text, to tokens (data.lm) or records."""
