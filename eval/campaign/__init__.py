"""Campaigns: a recipe's grid of runs, from the grid to its report. `python -m eval.campaign --help` says how."""

from eval.campaign.recipe import arguments, cells, check, command_line, fit, load_script, read_recipe
