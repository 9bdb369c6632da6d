"""The human study: which of two arms' texts do people prefer? A page for the raters, and what their votes say."""
