"""The synonym attack on a text and a toy loss whose best attack is known."""

import random

from word_lists import NEIGHBOURS

from data.wordlists import WordLists
from eval.attack.textfooler import AttackOptions, attack_article
from eval.attack.words import Words

LISTS = WordLists(NEIGHBOURS, stop_words=frozenset(["the", "a", "of"]))
TEXT = 'The old film, "Big Town", was a film of\nthe BIG old town.  End'
UNBOUNDED = dict(max_changed=1.0, goal=float("inf"), keep_names=False)


class Toy:
    """A loss that is a sum over words: what each adds, its position aside; it counts what it was asked."""

    def __init__(self, **harm):
        self.harm, self.texts, self.calls = harm, [], 0

    def __call__(self, texts):
        self.texts += texts
        self.calls += 1
        return [1 + sum(self.harm.get(w.lower(), 0.0) for w in Words(t).cores) for t in texts]


def attack(loss, text=TEXT, seed=0, lists=LISTS, **options):
    return attack_article(text, loss, lists, AttackOptions(**(UNBOUNDED | options)), random.Random(seed))
