"""The search finds the best attack on a loss that is known, within its bounds."""

import random

import pytest
import torch
from toy_attack import LISTS, TEXT, UNBOUNDED, Toy, attack
from word_lists import NEIGHBOURS

from eval.attack.textfooler import AttackOptions, attack_article, attack_group
from eval.attack.words import Words


def test_the_best_attack_on_an_additive_loss():
    """Words add up, so that the best attack exchanges every word for its worst neighbour: brute force agrees."""
    loss = Toy(film=-0.5, flick=0.25, movie=0.125, old=0.0, aged=-0.25, elderly=-0.5, vast=0.5, huge=0.25, city=1.0)
    found = attack(loss)
    worst = {w: max([w, *near], key=lambda x: loss.harm.get(x, 0.0)) for w, near in NEIGHBOURS.items() if w != "the"}
    best = 1 + sum(loss.harm.get(worst.get(w.lower(), w.lower()), 0.0) for w in Words(TEXT).cores)
    assert found.loss_after == best == loss([found.text])[0]
    assert [(old.lower(), new.lower()) for _, old, new in found.changed] == [
        (w.lower(), worst[w.lower()]) for w in Words(TEXT).cores if w.lower() in worst and worst[w.lower()] != w.lower()
    ]
    assert found.stop == "words" and found.loss_before == loss([TEXT])[0]


def test_the_most_important_words_come_first():
    """Deleting "film" raises this loss most: with room for one change it is the one, though "town" gives more."""
    found = attack(Toy(film=-1.0, old=-0.5, town=-0.25, city=5.0, movie=0.0), text="old film town", max_changed=0.34)
    assert found.text == "old movie town" and found.stop == "share" and found.rate == 1 / 3


def test_the_goal_ends_it_with_the_nearest_neighbour_that_reaches_it():
    loss = Toy(film=-1.0, movie=-0.75, flick=0.0, picture=3.0, town=-0.5)
    found = attack(loss, text="film town", goal=0.5)
    assert found.text == "flick town" and found.stop == "goal" and found.loss_after - found.loss_before == 1
    assert found.queries == 1 + 2 + 3 == len(loss.texts)


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 8, 13, 17, 22, 23, 24, 1000])
def test_the_budget_is_kept_to_the_query(budget):
    loss = Toy(movie=0.5, vast=0.25)
    found = attack(loss, queries=budget)
    # 1 for the text; 8 words to rank; film twice 3, old twice 1 (elderly: adverb), big twice 2, town twice 1
    full = 1 + 8 + 2 * 3 + 2 * 1 + 2 * 2 + 2 * 1
    assert found.queries == len(loss.texts) <= budget
    if budget >= full:
        assert found.queries == full and found.stop == "words"
    elif budget >= 3:
        assert found.queries == budget and found.stop == "budget"


def test_all_candidates_of_a_word_are_asked_in_one_call():
    loss = Toy(movie=1.0)
    attack(loss, text="old film town")
    assert loss.calls == 1 + 1 + 3


def test_stop_words_stay_and_are_no_candidates():
    loss = Toy(les=100.0, the=50.0)
    found = attack(loss)
    assert not any("les" in Words(t).cores for t in loss.texts)
    assert all(sum(w.lower() == "the" for w in Words(t).cores) <= 2 for t in loss.texts) and not found.changed


def test_the_same_seed_gives_the_same_attack():
    """Only a budget too small for all words leaves something to chance."""
    results = [attack(Toy(movie=0.5, vast=0.25, city=0.125), seed=seed, queries=7) for seed in (*range(8), 0)]
    assert results[0] == results[-1]
    assert len({r.text for r in results}) > 1
    wide = [attack(Toy(movie=0.5, vast=0.25, city=0.125), seed=seed) for seed in range(3)]
    assert wide[0] == wide[1] == wide[2]


def test_a_group_gives_what_each_article_alone_gives():
    loss = Toy(movie=0.5, vast=0.25, city=0.125, film=-0.25)
    texts = [TEXT, "", "old town", "nothing here", "the film of the old big town"]
    options, seeds = AttackOptions(**(UNBOUNDED | dict(queries=9))), range(len(texts))
    group = attack_group(
        texts, lambda asked: loss([t for _, t in asked]), LISTS, options, [random.Random(s) for s in seeds]
    )
    assert group == [
        attack_article(t, loss, LISTS, options, random.Random(s)) for t, s in zip(texts, seeds, strict=True)
    ]


def test_the_share_bounds_the_changes():
    harm = Toy(movie=1.0, aged=1.0, huge=1.0, city=1.0)
    for share in (0.0, 0.1, 0.25, 0.5):
        found = attack(harm, max_changed=share)
        assert len(found.changed) == min(int(share * 14), 7) and found.words == 14
    limited = attack_article(TEXT, harm, LISTS, AttackOptions(**UNBOUNDED), random.Random(0), limit=3)
    assert limited.words == 3 and [i for i, _, _ in limited.changed] == [1, 2]


def test_the_similarity_bound_compares_windows_with_the_original():
    """Vectors that count letters of "movie" and "huge" make those candidates far; others have cosine 1."""

    def embed(texts):
        assert all(len(t.split()) <= 3 for t in texts)
        return torch.tensor([[1.0, sum(t.count(w) for w in ("movie", "huge"))] for t in texts])

    harm = Toy(movie=3.0, huge=3.0, flick=1.0, vast=1.0, film=-1.0)
    options = AttackOptions(**(UNBOUNDED | dict(min_similarity=0.9, window=3)))
    found = attack_article("big old film", harm, LISTS, options, random.Random(0), embed_of=embed)
    assert found.text == "vast old flick"
    # 1 + 3 ranked + flick, picture + aged + vast: what is too far is not asked
    assert found.queries == 1 + 3 + 2 + 1 + 1
    with pytest.raises(ValueError, match="go together"):
        attack_article("old", harm, LISTS, options, random.Random(0))


def test_small_changes_of_meaning_add_up():
    """Each change moves the vector of the window; against the text so far none would be too much, against the
    original the third is: cos((1, 0), (1, 0.4 n)) is 0.93, 0.78, 0.64 for n = 1, 2, 3."""

    def embed(texts):
        return torch.tensor([[1.0, 0.4 * sum(w not in NEIGHBOURS for w in t.split())] for t in texts])

    harm = Toy(movie=1.0, huge=1.0, city=1.0)
    options = AttackOptions(**(UNBOUNDED | dict(min_similarity=0.75, window=9)))
    found = attack_article("big film town", harm, LISTS, options, random.Random(0), embed_of=embed)
    assert len(found.changed) == 2 and found.stop == "words"


@pytest.mark.parametrize(
    ("loss", "message"),
    [(lambda t: [float("nan")] * len(t), "the loss of an article is nan"), (lambda t: [1.0], "gave 1 losses for")],
)
def test_a_broken_loss_is_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        attack(loss)


@pytest.mark.parametrize(
    "bad", [dict(queries=0), dict(max_changed=1.5), dict(goal=0.0), dict(min_similarity=2.0), dict(window=1.5)]
)
def test_options_out_of_range(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=.*expected"):
        AttackOptions(**bad)
