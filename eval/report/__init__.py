"""Reports over run folders: tables, curves and verdicts as one page."""
