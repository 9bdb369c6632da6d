"""Tests, a package so that `python -m tests.drill` finds these and not one that another distribution installs."""
