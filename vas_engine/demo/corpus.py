"""A seeded source of little stories whose mood, length and subject vary freely, to make the demo model of.

A story draws its cast, its length and a path of moods first, then writes one sentence after another. The mood
drifts or turns on the way, so what comes next can be foreseen in part, and the next words matter.

    for text in generate_texts(3, seed=0):
        print(text)
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from vas_engine.demo.lexicon import (
    BEAST_KINDS,
    BEASTS,
    BONDS,
    COLOURS,
    ENDING_TEMPLATES,
    GRADED,
    LINKS,
    MEN,
    MIDDLE_TEMPLATES,
    MOMENTS,
    OPENING_TEMPLATES,
    SUBJECTS,
    TAILS,
    TIMES,
    TURN_TEMPLATES,
    WOMEN,
    WOMEN_BONDS,
)

__all__ = ["OPENINGS", "generate_texts"]

OPENINGS: tuple[str, ...] = (
    "Mara went to the harbour",
    "One morning the old cat",
    "On a cloudy day, Tom",
    "Long ago, Greta",
    "Ella and her friend Ben",
    "Every evening, Mr Hill",
    "The little fox",
    "There was a quiet day when Nora",
    "It was a windy evening at the mill",
    "When Omar came to the library",
    "Leo had",
    "After lunch, the grey donkey",
    "Hana felt",
    "A robin was in the garden",
    "In the quiet old days,",
    "Last winter, Mrs Bell",
)

MAX_SENTENCES = 7
# Sentences that bring a link of their own, or speech: another link in front of them would stammer.
LINKED = ("then ", "(so|", "and ", "after ", "from ", "the next", "what ", '"')
PRONOUNS = {"woman": ("she", "her", "her"), "man": ("he", "him", "his"), "beast": ("it", "it", "its")}


@dataclass(frozen=True)
class Noun:
    """Someone or something of a story: how it is named when it comes in, and ever after."""

    first: str
    later: str


def generate_texts(count: int, seed: int) -> Iterator[str]:
    """Yield `count` stories of 1 to 7 sentences; a seed's stories are the same whatever the count."""
    rng = random.Random(seed)
    for _ in range(count):
        yield _Story(rng).write()


class _Story:
    """One story in the making: its cast, what has been mentioned, and the mood of the sentence at hand."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.subject = SUBJECTS[rng.choice(tuple(SUBJECTS))]
        hero, kind = self._draw_hero()
        preposition, place = rng.choice(self.subject.places).split(" ", 1)
        pronouns = PRONOUNS[kind]
        self.cast = {
            "hero": hero,
            "friend": self._draw_friend(kind, hero.first, pronouns[2]),
            "thing": self._draw_thing(pronouns[2]),
            "critter": self._draw_critter(hero.later),
        }
        self.words = {
            "him": pronouns[1],
            "his": pronouns[2],
            "place": place,
            "at_place": f"{preposition} {place}",
            "time": rng.choice(TIMES),
        }
        self.subjective = pronouns[0]
        self.mentioned: set[str] = set()
        self.used: set[str] = set()
        self.level = self.level_before = 0

    def write(self) -> str:
        """Return the finished story."""
        count = self.rng.randint(1, MAX_SENTENCES)
        moods = self._draw_moods(count)
        kinds = self.rng.sample(tuple(MIDDLE_TEMPLATES), max(0, count - 2))
        return " ".join(self._sentence(index, mood, kinds) for index, mood in enumerate(moods))

    def _draw_hero(self) -> tuple[Noun, str]:
        kind = self.rng.choices(("woman", "man", "beast"), (4, 4, 3))[0]
        if kind == "beast":
            beast = self.rng.choice(BEASTS)
            return Noun(f"the {self.rng.choice(BEAST_KINDS)} {beast}", f"the {beast}"), kind
        name = self.rng.choice(WOMEN if kind == "woman" else MEN)
        return Noun(name, name), kind

    def _draw_friend(self, hero_kind: str, hero: str, his: str) -> Noun:
        # The friend takes the other pronoun, so that "she" and "he" stay clear.
        female = hero_kind == "man" or (hero_kind == "beast" and self.rng.random() < 0.5)
        name = self.rng.choice([name for name in (WOMEN if female else MEN) if name != hero])
        if name.startswith("Mr"):
            return Noun(name, name)
        bond = self.rng.choice(WOMEN_BONDS if female else BONDS)
        return Noun(f"{his} {bond} {name}", name)

    def _draw_thing(self, his: str) -> Noun:
        thing = self.rng.choice(self.subject.things)
        article = self.rng.choice(("a", "a", "the", his))
        return Noun(f"{article} {self.rng.choice(COLOURS)} {thing}", f"the {thing}")

    def _draw_critter(self, hero: str) -> Noun:
        critter = self.rng.choice([name for name in self.subject.critters if name not in hero])
        return Noun(f"a {critter}", f"the {critter}")

    def _draw_moods(self, count: int) -> list[float]:
        """Return one mood in -1 ... 1 per sentence: a start, a slow drift and, in some stories, a turn."""
        mood = self.rng.uniform(-1, 1)
        drift = self.rng.gauss(0, 0.1)
        turn = self.rng.randint(1, MAX_SENTENCES) if self.rng.random() < 0.4 else count
        moods = []
        for index in range(count):
            if index == turn:
                mood, drift = -mood, -drift
            moods.append(mood)
            mood = max(-1.0, min(1.0, mood + drift))
        return moods

    def _sentence(self, index: int, mood: float, kinds: list[str]) -> str:
        """Write sentence `index`: the opening, one of the middle `kinds` or, after these, the ending."""
        self.level_before = self.level or self.level_before
        # Many sentences say nothing of the mood, so that a text's tone is a matter of degree.
        bare = self.rng.random() < 0.35
        self.level = 0 if bare else max(-2, min(2, round(2 * mood + self.rng.gauss(0, 0.3))))
        turned = self.level * self.level_before < 0
        if index == 0:
            template = self._pick(OPENING_TEMPLATES)
        elif index <= len(kinds):
            says_so = turned and self.rng.random() < 0.35
            options = TURN_TEMPLATES if says_so else MIDDLE_TEMPLATES[kinds[index - 1]][self._sign]
            template = self._pick(options)
        else:
            template = self._pick(ENDING_TEMPLATES[self._sign])
        if index > 0:
            template = self._link(template, turned, ending=index > len(kinds))
        if '"' not in template and ", " not in template and self.rng.random() < (0.2 if index else 0.5):
            template = f"{template}, {self._pick(TAILS[self._sign])}"
        return self._finish(self._fill(template))

    def _link(self, template: str, turned: bool, ending: bool) -> str:
        """Now and then tie a sentence to the one before it: often where the mood has turned."""
        if template.startswith(LINKED):
            return template
        chance, links = (0.3, LINKS["end"]) if ending else (0.25, LINKS["same"])
        if turned:
            chance, links = 0.8, LINKS["up" if self.level > 0 else "down"]
        return f"{self._pick(links)} {template}" if self.rng.random() < chance else template

    @property
    def _sign(self) -> int:
        return (self.level > 0) - (self.level < 0)

    def _pick(self, options: tuple[str, ...]) -> str:
        """Choose one of `options`, one that this story has not used if there is any left."""
        chosen = self.rng.choice([option for option in options if option not in self.used] or options)
        self.used.add(chosen)
        return chosen

    def _fill(self, template: str) -> str:
        """Expand choices, innermost first, then slots from left to right: first mentions come first."""
        while (expanded := re.sub(r"\(([^()]*)\)", self._choose, template)) != template:
            template = expanded
        return re.sub(r"\{(\w+)\}", lambda match: self._slot(match[1]), template)

    def _choose(self, match: re.Match[str]) -> str:
        return self.rng.choice(match[1].split("|"))

    def _slot(self, name: str) -> str:
        if name in self.words:
            return self.words[name]
        if name in self.cast:
            return self._mention(name)
        if name == "he":
            return self.subjective if self.rng.random() < 0.7 else self._mention("hero")
        if name == "scene":
            return self._fill(self._pick(self.subject.scenes[self._sign]))
        if name == "task":
            return self._pick(self.subject.tasks)
        if name == "moment":
            return self._pick(MOMENTS)
        if name == "felt":
            return self._pick(GRADED["feel"][self.level_before])
        return self._pick(GRADED[name][self.level])

    def _mention(self, name: str) -> str:
        noun = self.cast[name]
        if name in self.mentioned:
            return noun.later
        self.mentioned.add(name)
        return noun.first

    @staticmethod
    def _finish(sentence: str) -> str:
        """Mend articles, begin with a capital letter and end with a full stop."""
        sentence = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", sentence)
        start = 1 if sentence.startswith('"') else 0
        sentence = sentence[:start] + sentence[start].upper() + sentence[start + 1 :]
        return f"{sentence}."
