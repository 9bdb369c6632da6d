"""Attacks on summarisers by synonyms. ``python -m eval.attack`` is the door; the recipe itself takes any loss."""

from eval.attack.textfooler import Attack, AttackOptions, attack_article, attack_group

__all__ = ["Attack", "AttackOptions", "attack_article", "attack_group"]
